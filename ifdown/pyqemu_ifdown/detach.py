"""Undoes it: takes one tap away from where its own mark says that we put it."""

from __future__ import annotations

import syslog

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.shell import ifctl, quote, readable
from pyqemu_ifup import kinds, made
from pyqemu_ifup.deadline import Unconfirmed
from pyqemu_ifup.hook import log
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link
from pyqemu_ifup.mark import find_here, is_anothers
from pyqemu_ifup.ops import Op, SetDown
from pyqemu_ifup.plan import plan_down
from pyqemu_ifup.system.lock import lock_by_name

PATIENCE = 2.0
"""Seconds that a down waits for ovs-vswitchd once the row is gone: QEMU's exit waits for us."""


async def detach(
    host: Host, tap: str, parent: int, index: int | None = None, *, by_user: bool = False
) -> None:
    """Take `tap` from its bridge, as far as it carries our mark; gone already is success.

    `parent` is the calling process: a tap that meanwhile serves another living one is left
    alone. A tap without the ifindex `index`, if that is given, is another. `by_user`: whoever asks
    is not root, and root's mark stays. Raises Failure: 77 where privilege forbids something, 69 or
    75 where Open vSwitch does not do its part.
    """
    with await lock_by_name(tap, host.deadline):
        # NOTE: whoever asked may have done it himself since, or have gone: then nothing is touched.
        host.deadline.check()
        await detach_alone(host, tap, parent, index, by_user=by_user)


async def detach_alone(
    host: Host, tap: str, parent: int, index: int | None = None, *, by_user: bool = False
) -> None:
    """Do as `detach`, with the tap's lock held."""
    link = host.kernel.look_up(tap)
    if link is not None and index not in (None, link.index):
        log(syslog.LOG_INFO, f"{quote(tap)}: left alone: it is another tap by now")
        return
    mark = link.mark if link else None
    if mark is not None and is_anothers(mark, parent):
        log(
            syslog.LOG_INFO,
            f"{quote(tap)}: left alone: attached to {readable(mark.bridge)} for process {mark.pid}",
        )
        return
    if link is not None and link.up and mark is not None and mark.ovsdb is not None:
        # NOTE: first of all, for a mute server may take all the time there is.
        await _run(host, SetDown(tap, link.index))
    await host.open_databases(_databases(link))
    await host.catch_up(link)
    plan = plan_down(kinds.look(host, tap, None), find_here(), by_user=by_user)
    allowed = True
    for op in plan:
        host.deadline.check()
        allowed = await _run(host, op) and allowed
    if plan and allowed and mark is not None:
        log(
            syslog.LOG_INFO,
            f"{quote(tap)}: detached from {readable(mark.bridge)}, "
            f"network {readable(mark.network)}",
        )
    await made.leave(host, mark)


def leave_to_gc(tap: str, failure: Failure) -> None:
    """Tell syslog of what privilege forbids a down; raise any other failure."""
    if failure.status is not Status.DENIED:
        raise failure
    log(syslog.LOG_WARNING, f"{quote(tap)}: left to {ifctl('gc', tap)}: {failure}")


def _databases(link: Link | None) -> list[str]:
    """Return where a row of the tap may be: a tap's own mark tells; without one, the default."""
    mark = link.mark if link else None
    if mark is None:
        return [DEFAULT_OVSDB]
    return [mark.ovsdb] if mark.ovsdb is not None else []


async def _run(host: Host, op: Op) -> bool:
    """Execute one op; tell whether privilege allows it."""
    try:
        with host.patient(PATIENCE):
            await host.run(op)
    except Unconfirmed:
        log(
            syslog.LOG_WARNING,
            f"{quote(op.port)}: ovs-vswitchd does not answer; the port is out of its database",
        )
    except Failure as failure:
        if failure.status is Status.DENIED:
            # What else there is to do may be allowed.
            leave_to_gc(op.port, failure)
            return False
        # NOTE: QEMU closes the tap as soon as we are done, or has died meanwhile.
        if failure.status is not Status.REFUSED or host.kernel.look_up(op.port) is not None:
            raise
    return True
