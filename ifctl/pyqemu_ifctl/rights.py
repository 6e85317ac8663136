"""Taps of ours that are not where their mark says, or have no right to be: what doctor names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Deny, Policy, Port
from pyqemu_ifconf.shell import Command, ifctl
from pyqemu_ifdown.gc import find_ended
from pyqemu_ifup import kinds
from pyqemu_ifup.access import check_given, find_user, may_still
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link
from pyqemu_ifup.mark import Mark, is_alive
from pyqemu_ifup.qemu.caller import find_hook_at_work

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.ovsdb import Database


@dataclass(frozen=True)
class Lost:
    """A tap of ours that has no right to its place by now, why, and what ends it."""

    link: Link
    why: str
    command: Command


def find_lost(
    host: Host, policy: Policy | Failure, links: Iterable[Link], want: Callable[[str, Mark], object]
) -> list[Lost]:
    """Return the taps of ours that are users' no more, or that the policy denies by now.

    `want` tells what the policy says of a tap with a mark: a Port, a Deny, or that it cannot tell.
    """
    ours = [link for link in links if kinds.is_ports(link) and link.mark is not None]
    ended = {each.link.index: each.because for each in host.finish(find_ended(ours))}
    found = []
    for link in ours:
        if link.index in ended:
            found.append(Lost(link, ended[link.index], ifctl("gc", link.name)))
        elif (why := _denied(policy, link, want)) is not None:
            found.append(Lost(link, why, cut_command(link.name)))
    return found


def _denied(
    policy: Policy | Failure, link: Link, want: Callable[[str, Mark], object]
) -> str | None:
    mark = link.mark
    assert mark is not None
    try:
        check_given(link)
        wish = want(link.name, mark)
        if isinstance(wish, Port) and mark.uid is not None and isinstance(policy, Policy):
            may_still(policy, wish, find_user(mark.uid))
    except Failure as failure:
        return f"{failure.what}: {failure.why}"
    return f"denied: {wish.because}" if isinstance(wish, Deny) else None


def find_off(
    links: Sequence[Link], databases: Mapping[str, Database], want: Callable[[str, Mark], object]
) -> list[Link]:
    """Return the taps of running guests that the policy attaches, and that are down or nowhere.

    `databases` are those that answer, by their addresses: of others nothing is known. A bridge that
    is not there, or is down, is another fault; a tap that a script of its QEMU's has in hand is on
    its way.
    """
    by_name = {link.name: link for link in links}
    found = []
    for link in links:
        mark = link.mark
        if mark is None or not kinds.is_ports(link) or not is_alive(mark):
            continue
        database = databases.get(mark.ovsdb or "")
        nowhere = kinds.load(mark.kind).is_lost(link, by_name.get(mark.bridge), database)
        if (link.up and not nowhere) or not isinstance(want(link.name, mark), Port):
            continue
        if find_hook_at_work(link.name, mark.pid) is None:
            found.append(link)
    return found


def cut_command(tap: str) -> Command:
    """Return the command that takes down the link of a tap that is denied."""
    return ifctl("apply", tap, options=["--cut"])
