"""Changes a running guest's tap to what is wanted now; where that fails, it is what it was."""

from __future__ import annotations

import os
import syslog
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Caller, Kind, Port
from pyqemu_ifconf.shell import ifctl, quote, readable
from pyqemu_ifup.attach import (
    NOTHING,
    PATIENCE,
    ask_again,
    owning_it,
    prove,
    require_database,
    tell_of_sitting,
    tell_taken_over,
)
from pyqemu_ifup.caller import process_start
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link, OvsPort, Seen
from pyqemu_ifup.manners import log
from pyqemu_ifup.plan import (
    AddPort,
    DelPort,
    Difference,
    Plan,
    Prove,
    SetAlias,
    SetDown,
    SetPort,
    SetUp,
    Step,
    differences,
    find_kind,
    is_in_place,
    is_open_to_all,
    plan_back,
    plan_change,
    refuse_foreign_ports,
    refuse_shared,
    refuse_strangers,
    was_before,
)
from pyqemu_ifup.stamp import Stamp, find_here, format_alias, make_stamp, renew_stamp


@dataclass(frozen=True)
class Holder:
    """The QEMU that a tap serves: its process, and how it came to its network.

    `stamp` is the mark that the tap has, None where it has none; `by_name` is as in Stamp. `uid`
    is the user whose tap it is, None for root.
    """

    pid: int
    stamp: Stamp | None = None
    by_name: bool = False
    uid: int | None = None


@dataclass(frozen=True)
class Change:
    """What is to be done about one tap: what differs, and the steps; none where it is so already.

    `mark` is the ifalias that the tap shall have; `holder` is whom it serves.
    """

    holder: Holder
    port: Port
    kind: Kind
    before: Seen
    mark: str
    differences: tuple[Difference, ...]
    plan: Plan

    @property
    def moves(self) -> bool:
        """Whether the tap is for another network than it is on: its link comes up anew."""
        return any(isinstance(op, SetUp) for op in self.plan)


def find_change(
    host: Host,
    port: Port,
    caller: Caller,
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
    before = host.look(port.tap, port.bridge)
    if before.bridge is None and assumed is not None:
        before = replace(before, bridge=assumed)
    tap = refuse_strangers(port.tap, before, holder.pid)
    here = find_here()
    linux = before.bridge is not None and before.bridge.kind == "bridge"
    needed = [tap.stamp.ovsdb] if tap.stamp is not None and tap.stamp.ovsdb is not None else []
    if port.kind == "openvswitch" or (port.kind is None and not linux):
        needed.append(port.ovsdb)
    for address in needed:
        if address in unasked:
            raise unasked[address]
    refuse_shared(tap, holder.uid if holder.uid is not None else os.getuid())
    refuse_foreign_ports(before, here)
    require_database(host.databases, port, before)
    kind = find_kind(port, before)
    if unasked and not is_in_place(port, kind, before, here):
        raise next(iter(unasked.values()))
    stamp = _find_stamp(port, kind, caller, holder, before)
    mark = tap.alias if stamp == tap.stamp else format_alias(stamp)
    plan = plan_change(port, kind, before, stamp, here)
    found = differences(port, kind, before, up=True)
    if tap.stamp is not None and tap.stamp.network != port.network:
        found = (Difference("network", port.network, tap.stamp.network), *found)
    if tap.stamp != stamp and not found:
        found = (Difference("our mark", _told(stamp), _told(tap.stamp)),)
    if holder.uid is None and is_open_to_all(tap):
        found = (*found, Difference("owner", "root", "none"))
    if found and not plan:
        # What no step of ours can mend, as a link that ovs-vswitchd has yet to see up.
        plan = (Prove(port.tap, up=True),)
    return Change(holder, port, kind, before, mark, found, plan)


def _find_stamp(port: Port, kind: Kind, caller: Caller, holder: Holder, before: Seen) -> Stamp:
    """Return the mark that the tap shall have: what it says of its process stays.

    The place of the rule alone, which may stand on another line by now, is no change.
    """
    old = holder.stamp
    if old is None:
        stamp = make_stamp(port, kind, caller, holder.pid, holder.uid, holder.by_name)
        # NOTE: of a tap that is attached already nobody knows what it was before.
        is_loose = before.master is None and not before.ports
        return replace(stamp, was=was_before(before)) if is_loose else stamp
    stamp = renew_stamp(old, port, kind)
    if holder.pid != old.pid or not old.start:
        stamp = replace(stamp, pid=holder.pid, start=process_start(holder.pid) or 0)
    return old if replace(stamp, rule=old.rule) == old else stamp


def _told(stamp: Stamp | None) -> str:
    """Return in words what a mark says beside the network."""
    if stamp is None:
        return "none"
    vm = f", vm {readable(stamp.guest)}" if stamp.guest else ""
    return f"{stamp.kind} bridge {readable(stamp.bridge)}, process {stamp.pid}{vm}"


async def changing(host: Host, change: Change) -> None:
    """Take the steps of `change`, and prove that the tap is as wanted.

    Raises Failure; then the tap is attached as it was before, as far as that can be.
    """
    port, link = change.port, change.before.tap
    if change.holder.uid is None and change.plan and link is not None:
        await owning_it(host, link, change.holder.pid, NOTHING)
    try:
        for op in change.plan:
            host.deadline.check()
            if isinstance(op, Prove):
                await prove(host, port, change.kind, change.before, up=op.up)
            else:
                await host.run(op, host.deadline)
        host.deadline.last_check()
    except BaseException:
        await _restore(host, change)
        raise
    tell_taken_over(change.before)
    if any(isinstance(op, Prove) and op.up for op in change.plan):
        tell_of_sitting(host, port, link)


async def _restore(host: Host, change: Change) -> None:
    """Put the tap back to what it was, as far as it can be; what cannot is told in syslog."""
    with host.until(host.deadline.undo()):
        await _restore_within(host, change)


async def _restore_within(host: Host, change: Change) -> None:
    tap = change.port.tap
    try:
        link = host.kernel.look_up(tap)
        if change.moves and link is not None and link.up:
            # NOTE: first of all, for a mute server may take all the time there is.
            await _take_back(host, SetDown(tap, link.index))
        await ask_again(host, tap, host.deadline, _again(tap))
        now = host.look(tap, change.port.bridge)
        plan = plan_back(change.port, change.before, now, find_here())
    except Failure as failure:
        log(syslog.LOG_ERR, f"{quote(tap)}: cannot look at what is left: {failure}")
        return
    if any(port.ovsdb not in host.databases for port in change.before.ports):
        # NOTE: where its port is by now nobody can tell, so the mark and the link stay as they are.
        plan = tuple(
            step
            for step in plan
            if not isinstance(step, (AddPort, DelPort, SetPort, SetUp, SetDown))
            and not (isinstance(step, SetAlias) and not step.alias)
        )
        if now.tap is not None and not now.tap.up:
            log(
                syslog.LOG_ERR,
                f"{quote(tap)}: its link stays down: its port cannot be asked for; {_again(tap)}",
            )
    for step in plan:
        if isinstance(step, SetUp) and not _is_safe(host, change):
            log(syslog.LOG_ERR, f"{quote(tap)}: its link stays down: it is not where it was")
            return
        await _take_back(host, step)


def _is_safe(host: Host, change: Change) -> bool:
    """Tell whether the tap has no more than it had, so that its link may come up again."""
    before = change.before
    try:
        now = host.look(change.port.tap, change.port.bridge)
    except Failure:
        return False
    return (
        now.tap is not None
        and before.tap is not None
        and (
            now.master is None
            or (before.master is not None and now.master.index == before.master.index)
        )
        and set(now.vids) <= set(before.vids)
        and (now.tap.isolated or not before.tap.isolated or now.master is None)
        and set(map(_place, now.ports)) <= set(map(_place, before.ports))
    )


def _place(row: OvsPort) -> tuple[object, ...]:
    """Return what of a port decides whom its frames reach."""
    return row.ovsdb, row.bridge, row.vlan_mode, row.tag, row.trunks, row.protected


async def _take_back(host: Host, step: Step) -> None:
    try:
        await host.run(step, host.deadline, PATIENCE)
    except Failure as failure:
        log(syslog.LOG_ERR, f"{quote(step.tap)}: not taken back: {failure}; {_again(step.tap)}")


def _again(tap: str) -> str:
    """Return what puts a living guest's tap right that could not be put back."""
    return f"{ifctl('apply', tap)} tries again"
