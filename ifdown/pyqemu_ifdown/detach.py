"""Undoes it: takes one tap away from where its own mark says that we put it."""

from __future__ import annotations

import syslog
from collections.abc import Callable

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import DEFAULT_OVSDB
from pyqemu_ifconf.shell import ifctl, quote, readable
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.host import Host
from pyqemu_ifup.leave import leaving_networks
from pyqemu_ifup.lock import lock_by_name
from pyqemu_ifup.look import Link, Seen
from pyqemu_ifup.manners import log
from pyqemu_ifup.plan import DelPort, DelTap, SetDown, Step, plan_given_back, plan_leave, plan_was
from pyqemu_ifup.stamp import Here, find_here, is_anothers

PATIENCE = 2.0
"""Seconds that a down waits for ovs-vswitchd once the row is gone: QEMU's exit waits for us."""


def detach(tap: str, parent: int, deadline: Deadline, tell: Callable[[str], None]) -> None:
    """Take `tap` from its bridge, as far as it carries our mark; gone already is success.

    `parent` is the calling process: a tap that meanwhile serves another living one is left
    alone. Raises Failure: 77 where privilege forbids something, 69 or 75 where Open vSwitch does
    not do its part.
    """
    with Host(tap, deadline, tell) as host:
        host.finish(detaching(host, tap, parent))


async def detaching(
    host: Host, tap: str, parent: int, index: int | None = None, *, by_user: bool = False
) -> None:
    """Do as `detach`, on a host that is there already; a tap without this ifindex is another.

    `by_user`: whoever asks is not root, and root's mark stays.
    """
    with await lock_by_name(tap, host.deadline):
        # NOTE: whoever asked may have done it himself since, or have gone: then nothing is touched.
        host.deadline.check()
        await detaching_alone(host, tap, parent, index, by_user=by_user)


async def detaching_alone(
    host: Host, tap: str, parent: int, index: int | None = None, *, by_user: bool = False
) -> None:
    """Do as `detaching`, with the tap's lock held."""
    link = host.kernel.look_up(tap)
    if link is not None and index not in (None, link.index):
        log(syslog.LOG_INFO, f"{quote(tap)}: left alone: it is another tap by now")
        return
    stamp = link.stamp if link else None
    if stamp is not None and is_anothers(stamp, parent):
        log(
            syslog.LOG_INFO,
            f"{quote(tap)}: left alone: attached to {readable(stamp.bridge)} for process "
            f"{stamp.pid}",
        )
        return
    if link is not None and link.up and stamp is not None and stamp.kind == "openvswitch":
        # NOTE: first of all, for a mute server may take all the time there is.
        await _run(host, SetDown(tap, link.index))
    await host.open_databases(_databases(link))
    await host.catch_up(link)
    plan = plan_down(host.look(tap, None), find_here(), by_user=by_user)
    allowed = True
    for step in plan:
        host.deadline.check()
        allowed = (await _run(host, step)) and allowed
    if plan and allowed and stamp is not None:
        log(
            syslog.LOG_INFO,
            f"{quote(tap)}: detached from {readable(stamp.bridge)}, "
            f"network {readable(stamp.network)}",
        )
    await leaving_networks(host, stamp)


def leave_to_gc(tap: str, failure: Failure) -> None:
    """Tell syslog of what privilege forbids a down; raise any other failure."""
    if failure.status is not Status.DENIED:
        raise failure
    log(syslog.LOG_WARNING, f"{quote(tap)}: left to {ifctl('gc', tap)}: {failure}")


def _databases(link: Link | None) -> list[str]:
    """Return where a row of the tap may be: a tap's own stamp tells; without one, the default."""
    stamp = link.stamp if link else None
    if stamp is None:
        return [DEFAULT_OVSDB]
    return [stamp.ovsdb] if stamp.ovsdb is not None else []


def plan_down(seen: Seen, here: Here, *, by_user: bool = False) -> tuple[Step, ...]:
    """Return the steps that take away what of the tap carries our mark, the mark itself last.

    A persistent tap is given back as its mark says that it was, its link too.
    With it goes a tap that we have made for a user, to whom it would belong without it. A mark of
    root's stays where a user asks (`by_user`): a guest that has taken its QEMU over would be free
    of it. With the tap's last process it goes.
    """
    tap = seen.tap
    steps = plan_leave(seen, here)
    if tap is None or tap.stamp is None:
        return tuple(step for step in steps if isinstance(step, DelPort))
    if tap.stamp.made and tap.stamp.uid is not None:
        return (*steps, DelTap(tap.name, tap.index))
    if by_user and tap.stamp.uid is None:
        return (*steps, *plan_was(seen))
    return (*steps, *plan_given_back(seen))


async def _run(host: Host, step: Step) -> bool:
    """Execute one step; tell whether privilege allows it."""
    try:
        if not (await host.run(step, host.deadline, PATIENCE)):
            log(
                syslog.LOG_WARNING,
                f"{quote(step.tap)}: ovs-vswitchd does not answer; the port is out of its database",
            )
    except Failure as failure:
        if failure.status is Status.DENIED:
            # What else there is to do may be allowed.
            leave_to_gc(step.tap, failure)
            return False
        # NOTE: QEMU closes the tap as soon as we are done, or has died meanwhile.
        if failure.status is not Status.REFUSED or host.kernel.look_up(step.tap) is not None:
            raise
    return True
