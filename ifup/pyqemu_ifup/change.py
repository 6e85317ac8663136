"""Changes a running guest's tap to what is wanted now; where that fails, it is what it was."""

from __future__ import annotations

import os
import syslog
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.kinds import spec_of
from pyqemu_ifconf.policy import Port
from pyqemu_ifconf.shell import ifctl, quote, readable
from pyqemu_ifup import kinds
from pyqemu_ifup.attach import ask_again, own_it, take
from pyqemu_ifup.claims import is_open_to_all, refuse_foreign_ports, refuse_shared, refuse_strangers
from pyqemu_ifup.holder import Holder
from pyqemu_ifup.hook import log
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.base import Difference, PortKind
from pyqemu_ifup.look import Link, Seen
from pyqemu_ifup.mark import Mark, find_here
from pyqemu_ifup.ops import Plan, SetDown
from pyqemu_ifup.plan import differences, plan_back, plan_change
from pyqemu_ifup.settings import was_before
from pyqemu_ifup.steps import take_back
from pyqemu_ifup.verify import tell_of_sitting, tell_taken_over


@dataclass(frozen=True)
class Change:
    """What is to be done about one tap: what differs, and the steps; none where it is so already.

    `holder` is whom it serves.
    """

    holder: Holder
    port: Port
    kind: PortKind
    before: Seen
    differences: tuple[Difference, ...]
    plan: Plan

    @property
    def is_needed(self) -> bool:
        """Whether something differs, be it what no step of ours can mend."""
        return bool(self.plan or self.differences)

    @property
    def moves(self) -> bool:
        """Whether the tap is for another network than it is on: its link comes up anew."""
        return any(op.opens for op in self.plan)


def find_change(
    host: Host,
    port: Port,
    holder: Holder,
    unasked: Mapping[str, Failure],
    assumed: Link | None = None,
) -> Change:
    """Look at the tap and return what must change for it to be as `port` says.

    `unasked` are the databases that have failed, which may hold a port of the tap's name;
    `assumed` is taken for a bridge that is not there and would be made. Raises
    Failure: 69 where the bridge is not there, 71 where the switch cannot do what is wanted, 77
    where somebody else has a claim to the tap or its name, and that of a database.
    """
    before = kinds.look(host, port.tap, port.place.name)
    if before.bridge is None and assumed is not None:
        before = replace(before, bridge=assumed)
    tap = refuse_strangers(port.tap, before, holder.pid)
    here = find_here()
    needed = [tap.mark.ovsdb] if tap.mark is not None and tap.mark.ovsdb is not None else []
    needed += kinds.databases(port, before)
    for address in needed:
        if address in unasked:
            raise unasked[address]
    refuse_shared(tap, holder.uid if holder.uid is not None else os.getuid())
    refuse_foreign_ports(before, here)
    kinds.require(host.databases, port, before)
    kind = kinds.find(port, before)
    if unasked and not kind.is_in_place(port, before, here):
        raise next(iter(unasked.values()))
    mark = _find_mark(port, kind, holder, before)
    plan = plan_change(port, kind, before, mark, here)
    found = differences(port, kind, before, up=True)
    if tap.mark is not None and tap.mark.network != port.network:
        found = (Difference("network", port.network, tap.mark.network), *found)
    if tap.mark != mark and not found:
        found = (Difference("our mark", _told(mark), _told(tap.mark)),)
    if holder.uid is None and is_open_to_all(tap):
        found = (*found, Difference("owner", "root", "none"))
    return Change(holder, port, kind, before, found, plan)


def _find_mark(port: Port, kind: PortKind, holder: Holder, before: Seen) -> Mark:
    """Return the mark that the tap shall have: what it says of its process stays.

    The place of the rule alone, which may stand on another line by now, is no change.
    """
    old, mark = holder.mark, holder.mark_for(port, kind)
    if old is None:
        # NOTE: of a tap that is attached already nobody knows what it was before.
        is_loose = before.master is None and not before.ports
        return replace(mark, was=was_before(before)) if is_loose else mark
    if holder.pid != old.pid or not old.start:
        mark = replace(mark, pid=holder.pid, start=holder.start)
    return old if replace(mark, rule=old.rule) == old else mark


def _told(mark: Mark | None) -> str:
    """Return in words what a mark says beside the network."""
    if mark is None:
        return "none"
    vm = f", vm {readable(mark.guest)}" if mark.guest else ""
    noun = spec_of(mark.kind).place.noun
    return f"{mark.kind} {noun} {readable(mark.bridge)}, process {mark.pid}{vm}"


async def change(host: Host, wanted: Change) -> None:
    """Take the steps that are wanted, and prove that the tap is as the policy says.

    Raises Failure; then the tap is attached as it was before, as far as that can be.
    """
    port, link = wanted.port, wanted.before.tap
    if wanted.holder.uid is None and wanted.is_needed and link is not None:
        await own_it(host, link, wanted.holder)
    try:
        await take(host, port, wanted.kind, wanted.before, wanted.plan)
        host.deadline.last_check()
    except BaseException:
        with host.until(host.deadline.undo()):
            await _restore(host, wanted)
        raise
    tell_taken_over(wanted.before)
    tell_of_sitting(host, port, link)


async def _restore(host: Host, change: Change) -> None:
    """Put the tap back to what it was, as far as it can be; what cannot is told in syslog."""
    tap = change.port.tap
    try:
        link = host.kernel.look_up(tap)
        if change.moves and link is not None and link.up:
            # NOTE: first of all, for a mute server may take all the time there is.
            await take_back(host, SetDown(tap, link.index), _again(tap))
        await ask_again(host, tap, _again(tap))
        now = kinds.look(host, tap, change.port.place.name)
        plan = plan_back(change.port, change.before, now, find_here())
    except Failure as failure:
        log(syslog.LOG_ERR, f"{quote(tap)}: cannot look at what is left: {failure}")
        return
    if any(port.ovsdb not in host.databases for port in change.before.ports):
        # NOTE: where its port is by now nobody can tell, so the mark and the link stay as they are.
        plan = tuple(op for op in plan if op.blind)
        if now.tap is not None and not now.tap.up:
            log(
                syslog.LOG_ERR,
                f"{quote(tap)}: its link stays down: its port cannot be asked for; {_again(tap)}",
            )
    for op in plan:
        if op.opens and not _is_safe(host, change):
            log(syslog.LOG_ERR, f"{quote(tap)}: its link stays down: it is not where it was")
            return
        await take_back(host, op, _again(tap))


def _is_safe(host: Host, change: Change) -> bool:
    """Tell whether the tap has no more than it had, so that its link may come up again."""
    before = change.before
    try:
        now = kinds.look(host, change.port.tap, change.port.place.name)
    except Failure:
        return False
    return (
        now.tap is not None
        and before.tap is not None
        and all(kind.is_no_worse(before, now) for kind in kinds.tap_kinds())
    )


def _again(tap: str) -> str:
    """Return what puts a living guest's tap right that could not be put back."""
    return f"{ifctl('apply', tap)} tries again"
