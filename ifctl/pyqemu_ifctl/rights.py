"""Taps of ours whose right to their place has ended: what status and doctor call by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Deny, Policy, Port
from pyqemu_ifconf.shell import Command, ifctl, program, sh
from pyqemu_ifdown.gc import finding_ended
from pyqemu_ifup.access import check_given, find_user, may_still
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link
from pyqemu_ifup.stamp import Stamp


@dataclass(frozen=True)
class Lost:
    """A tap of ours that has no right to its place by now, why, and what ends it."""

    link: Link
    why: str
    command: Command


def find_lost(
    host: Host,
    policy: Policy | Failure,
    links: Iterable[Link],
    want: Callable[[str, Stamp], object],
) -> list[Lost]:
    """Return the taps of ours that are users' no more, or that the policy denies by now.

    `want` tells what the policy says of a tap with a stamp: a Port, a Deny, or that it cannot tell.
    """
    ours = [link for link in links if link.tap and link.stamp is not None]
    ended = {each.link.index: each.because for each in host.finish(finding_ended(ours))}
    found = []
    for link in ours:
        if link.index in ended:
            found.append(Lost(link, ended[link.index], ifctl("gc", link.name)))
        elif (why := _denied(policy, link, want)) is not None:
            found.append(Lost(link, why, cut_command(link.name)))
    return found


def _denied(
    policy: Policy | Failure, link: Link, want: Callable[[str, Stamp], object]
) -> str | None:
    stamp = link.stamp
    assert stamp is not None
    try:
        check_given(link)
        wish = want(link.name, stamp)
        if isinstance(wish, Port) and stamp.uid is not None and isinstance(policy, Policy):
            may_still(policy, wish, find_user(stamp.uid))
    except Failure as failure:
        return f"{failure.what}: {failure.why}"
    return f"denied: {wish.because}" if isinstance(wish, Deny) else None


def cut_command(tap: str) -> Command:
    """Return the command that takes down the link of a tap that is denied."""
    end = ["--"] if tap[:1] == "-" else []
    return sh(program("pyqemu-ifctl"), "apply", "--cut", *end, tap)
