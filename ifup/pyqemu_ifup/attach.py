"""Makes it so: look, plan, apply, prove; and when that fails, the way back."""

from __future__ import annotations

import os
import syslog
from collections.abc import Callable, Container, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from pyqemu_ifconf.failure import Failure, OfCaller, Status
from pyqemu_ifconf.policy import DEFAULT_OVSDB, Caller, Kind, Port
from pyqemu_ifconf.shell import ifctl, quote, readable, sh
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.host import Host
from pyqemu_ifup.lock import lock_by_name
from pyqemu_ifup.look import Link, Seen, show_vlan
from pyqemu_ifup.manners import left_to_gc, log
from pyqemu_ifup.plan import (
    ADDRESS_MAY_COME,
    IPV6,
    OF_CONTAINER,
    UNWRITABLE,
    AddPort,
    Prove,
    SetDown,
    Step,
    check_bridge_mtu,
    differences,
    find_kind,
    gets_address,
    is_open_to_all,
    is_ours_to_touch,
    is_taken_over,
    plan_undo,
    plan_up,
    refuse_down,
    refuse_foreign_ports,
    refuse_shared,
    refuse_strangers,
    was_before,
)
from pyqemu_ifup.stamp import Stamp, find_here, is_anothers, make_stamp, renew_stamp

if TYPE_CHECKING:
    from pyqemu_ifup.openvswitch import Database

PATIENCE = 0.5
"""Seconds that a failed up waits for ovs-vswitchd to let the port go, once its row is gone."""
ASKING = 0.75
"""Of the time for the way back, what databases that do not answer may take; the kernel does."""


class Handed(NamedTuple):
    """How many of a tap's queues were handed over to us, and a descriptor of one, if it is kept."""

    queues: int = 0
    descriptor: int | None = None


NOTHING = Handed()


def attach(
    port: Port,
    caller: Caller,
    parent: int,
    ovsdbs: Iterable[str],
    deadline: Deadline,
    tell: Callable[[str], None],
    by_name: bool = False,
    handed: Handed = NOTHING,
) -> None:
    """Attach the tap as `port` says, for the process `parent`, and prove that it is so.

    `ovsdbs` are the databases of the policy: the tap's name is looked up in each that this host
    has. `by_name`: it is for the network's name that the tap gets there, whatever the rules say.
    `handed` is what of the tap the caller has handed over.
    Raises Failure; then the tap is down, attached nowhere, and as it was before, but for
    somebody else's tap or name, which is not touched.
    """
    with Host(port.tap, deadline, tell) as host:
        host.finish(attaching(host, port, caller, parent, ovsdbs, by_name=by_name, handed=handed))


async def attaching(
    host: Host,
    port: Port,
    caller: Caller,
    parent: int,
    ovsdbs: Iterable[str],
    uid: int | None = None,
    admit: Callable[[Link], None] = lambda link: None,
    by_name: bool = False,
    made: bool = False,
    handed: Handed = NOTHING,
) -> None:
    """Do as `attach`, on a host that is there already, for the user `uid`; None is root.

    `admit` raises Failure where that user may not have this tap. `made`: it is of our making, as
    its mark says from then on.
    """
    with await lock_by_name(port.tap, host.deadline):
        # NOTE: whoever asked may have done it himself since, or have gone: then nothing is touched.
        host.deadline.check()
        said = host.deadline.stopped
        try:
            await attaching_alone(
                host, port, caller, parent, ovsdbs, uid, admit, by_name, made, handed
            )
        except Failure as failure:
            if host.left and failure.remedy == said:
                failure.remedy = left_to_gc(port.tap)
            raise


async def attaching_alone(
    host: Host,
    port: Port,
    caller: Caller,
    parent: int,
    ovsdbs: Iterable[str],
    uid: int | None = None,
    admit: Callable[[Link], None] = lambda link: None,
    by_name: bool = False,
    made: bool = False,
    handed: Handed = NOTHING,
    kept: Stamp | None = None,
) -> None:
    """Do as `attaching`, with the tap's lock held.

    `kept` is the mark of a tap that is attached again, which goes on saying what it says of its
    process.
    """
    link = host.kernel.look_up(port.tap)
    stamp = link.stamp if link is not None else None
    left = [stamp.ovsdb] if stamp is not None and stamp.ovsdb is not None else []
    try:
        # NOTE: first the one that the way back needs.
        await host.open_databases([*left, port.ovsdb, DEFAULT_OVSDB, *ovsdbs])
        await host.catch_up(link)
        if port.ovsdb in host.databases and host.kernel.look_up(port.bridge) is None:
            # NOTE: the row of a bridge is there before its interface, whose MTU is looked at.
            await host.databases[port.ovsdb].made(port.bridge, host.deadline)
    except Failure:
        await _undo(host, port, parent, admit, kept)
        raise
    before = host.look(port.tap, port.bridge)
    link = refuse_strangers(port.tap, before, parent)
    admit(link)
    refuse_shared(link, uid if uid is not None else os.getuid())
    refuse_foreign_ports(before, find_here())
    made = made or (link.stamp is not None and link.stamp.made)
    is_joining = False
    try:
        if uid is None and not made:
            await owning_it(host, link, parent, handed)
        async with _ensured(host, port):
            is_joining = True
            await _joining(host, port, caller, parent, before, uid, by_name, made, kept)
    except BaseException:
        if not is_joining:
            await _undo(host, port, parent, admit, kept)
        raise


def _ensured(host: Host, port: Port) -> AbstractAsyncContextManager[object]:
    """Return the block in which the network of `port` is there for the tap to join.

    It is held meanwhile, so that nobody takes it away before the tap is on its bridge.
    """
    if port.nat is None:
        return nullcontext()
    from pyqemu_ifup.nat_network import making

    return making(host, port)


def tell_taken_over(seen: Seen) -> None:
    """Say of a tap that a script has put on the wanted bridge that it is ours from now on."""
    if is_taken_over(seen):
        assert seen.tap is not None and seen.master is not None
        log(
            syslog.LOG_NOTICE,
            f"{quote(seen.tap.name)}: taken over: it was on {quote(seen.master.name)} already, "
            "where another script has put it; that need not be run any more",
        )


async def owning_it(host: Host, link: Link, parent: int, handed: Handed) -> None:
    """See to it that nobody but root has a tap of root's, or can open it. Raises Failure (77).

    One with our mark has been looked at before it got that. The rest is as for `owning`.
    """
    is_new = link.stamp is None and (link.multi_queue or link.persistent)
    if is_open_to_all(link) or (is_new and link.group is None and link.owner == os.getuid()):
        # NOTE: most taps are neither, and a hook need not have it loaded.
        from pyqemu_ifup.owner import owning

        await owning(host.kernel, link, parent, *handed)


async def _joining(
    host: Host,
    port: Port,
    caller: Caller,
    parent: int,
    before: Seen,
    uid: int | None,
    by_name: bool,
    made: bool,
    kept: Stamp | None,
) -> None:
    """Attach a tap that is nobody else's, as it was seen `before`; what fails is taken back."""
    here = find_here()
    try:
        if port.nat is not None:
            # NOTE: its bridge may have been made meanwhile.
            before = host.look(port.tap, port.bridge)
        require_database(host.databases, port, before)
        kind = find_kind(port, before)
        if kept is not None:
            stamp = renew_stamp(kept, port, kind)
        else:
            stamp = make_stamp(port, kind, caller, parent, uid, by_name, made)
            stamp = replace(stamp, was=was_before(before))
        told = False
        for op in plan_up(port, kind, before, stamp, here):
            host.deadline.check()
            if isinstance(op, Prove):
                await prove(host, port, kind, before, up=op.up, told=told)
            else:
                await host.run(op, host.deadline)
            told = isinstance(op, AddPort)
        host.deadline.last_check()
    except BaseException:
        await _undo_joining(host, port, before, kept)
        raise
    tell_taken_over(before)
    tell_of_sitting(host, port, before.tap)


def require_database(databases: Container[str], port: Port, before: Seen) -> None:
    """Raise Failure (69) where the bridge can only be Open vSwitch's, and that is not running.

    `databases` are those that this host has.
    """
    linux = before.bridge is not None and before.bridge.kind == "bridge"
    wanted = (
        port.kind == "openvswitch"
        or (port.kind is None and not linux and port.ovsdb != DEFAULT_OVSDB)
        or (before.bridge is not None and before.bridge.kind == "openvswitch")
    )
    if wanted and port.ovsdb not in databases:
        raise Failure(
            Status.UNAVAILABLE,
            f"Open vSwitch is not there: no socket at {quote(port.ovsdb)}",
            f"{quote(port.bridge)} of network {quote(port.network)} is its bridge",
            "start Open vSwitch by its own service",
        )


async def prove(
    host: Host, port: Port, kind: Kind, before: Seen, *, up: bool, told: bool = False
) -> None:
    """Look again. Raises Failure where what is differs from what was wanted: 71, or refuse_down.

    `told`: the server of Open vSwitch has just told all that it knew, and need not be asked.
    """
    if kind == "openvswitch":
        database = host.databases[port.ovsdb]
        tap = host.kernel.look_up(port.tap)
        # NOTE: a persistent tap that nobody has opened yet has no carrier, so no link to wait for.
        if up and tap is not None and tap.carrier:
            # NOTE: it tells in order: whoever has had to wait for it knows all that came before.
            told = await database.link_up(port.tap, host.deadline)
        if not told:
            await database.sync(host.deadline)
    now = host.look(port.tap, port.bridge)
    if now.tap is None or before.tap is None or now.tap.index != before.tap.index:
        raise OfCaller(
            Status.REFUSED,
            "the tap has gone meanwhile",
            "its QEMU has ended or closed it",
            "see whether the calling process still runs",
        )
    # NOTE: first the cause, then its effects: with mtu: bridge, a bridge whose MTU the tap has
    # lowered agrees with the tap.
    refuse_down(port, kind, now.bridge)
    check_bridge_mtu(port, kind, before, now)
    # NOTE: a host that can keep no IPv6 address away is told so, and not that its taps fail.
    found = [each for each in differences(port, kind, now, up=up) if each.setting != IPV6]
    if found:
        raise Failure(
            Status.REFUSED,
            "what was read back differs",
            "; ".join(map(str, found)),
            "see who else manages this bridge",
        )
    if up:
        _tell_of_mac(port, before, now)
        _tell_of_ipv6(port, now)


def tell_of_sitting(host: Host, port: Port, tap: Link | None) -> None:
    """Warn of what of the host's sits on a tap that was there before its QEMU.

    What cannot be looked at is only told: the tap is attached all the same.
    """
    if tap is None or not tap.persistent:
        # NOTE: QEMU has just made it, and nobody else has had it.
        return
    from pyqemu_ifup.on_port import find_sitting

    try:
        sights = host.kernel.sights(routes_of=(tap.index,))
    except Failure as failure:
        log(
            syslog.LOG_WARNING,
            f"{quote(port.tap)}: cannot tell what of this host's sits on it: {failure}",
        )
        return
    for found in find_sitting(tap, port.bridge, sights):
        log(syslog.LOG_WARNING, f"{quote(port.tap)}: {found.what}: {found.why}; {found.remedy}")


def _tell_of_ipv6(port: Port, now: Seen) -> None:
    """Say what would keep an IPv6 address from the host's end, if nothing of ours does."""
    if now.tap is None or not gets_address(now.tap):
        return
    why, remedy = "its disable_ipv6 is 0 again", "see who else sets that"
    if not now.sysctl:
        why, remedy = UNWRITABLE, OF_CONTAINER
    log(syslog.LOG_WARNING, f"{quote(port.tap)}: {ADDRESS_MAY_COME}: {why}; {remedy}")


def _tell_of_mac(port: Port, before: Seen, now: Seen) -> None:
    """Say how to pin the MAC of a bridge that has none of its own and has taken the tap's."""
    if before.bridge is None or now.bridge is None or now.tap is None:
        return
    if now.bridge.mac == now.tap.mac != before.bridge.mac:
        from pyqemu_ifup.own_mac import mac_for, this_host  # rare

        log(
            syslog.LOG_NOTICE,
            f"{quote(port.tap)}: {quote(port.bridge)} has no MAC of its own and has taken the "
            "tap's; pin one: "
            + sh(
                "ip",
                "link",
                "set",
                "dev",
                port.bridge,
                "address",
                mac_for(port.bridge, this_host()),
            ),
        )


async def _undo(
    host: Host, port: Port, parent: int, admit: Callable[[Link], None], kept: Stamp | None
) -> None:
    """Take a tap from where it was attached before, though nothing has been done to it yet.

    One that somebody else has a claim to stays as it is. Raises Failure as `admit`.
    """
    with host.until(host.deadline.undo()):
        await _undo_within(host, port, parent, admit, kept)


async def _undo_within(
    host: Host, port: Port, parent: int, admit: Callable[[Link], None], kept: Stamp | None
) -> None:
    asking = host.deadline.child(host.deadline.remaining() * ASKING)
    link = host.kernel.look_up(port.tap)
    stamp = link.stamp if link is not None else None
    unasked, why = None, "it cannot be asked"
    if (
        link is not None
        and stamp is not None
        and not is_anothers(stamp, parent)
        and (stamp.ovsdb is not None and _is_for_ovs(host, link))
    ):
        admit(link)
        if link.up:
            # NOTE: first of all, for a mute server may take all the time there is.
            await _take_back(host, SetDown(link.name, link.index), asking)
        # NOTE: it has not been tried yet where another one has failed before.
        try:
            await host.open_databases([stamp.ovsdb], asking)
        except Failure as failure:
            why = str(failure)
        unasked = stamp.ovsdb
    await ask_again(host, port.tap, asking)
    before = _look_back(host, port)
    if before is None or before.tap is None:
        return
    is_ours = is_ours_to_touch(port.tap, before, parent)
    if unasked is not None and unasked not in host.databases:
        _tell_of_port(host, port.tap, unasked, why)
        # NOTE: of a port that no row tells of, the mark alone says whose it is.
        is_ours = is_ours or (link is not None and before.tap.index == link.index)
    if is_ours:
        admit(before.tap)
        await _go_back(host, port, before, before, kept, asking)


def _is_for_ovs(host: Host, link: Link) -> bool:
    """Tell whether the tap is on no bridge but Open vSwitch's, which the kernel may not tell of."""
    master = host.kernel.look_at(link.master) if link.master is not None else None
    return link.master is None or (master is not None and master.kind == "openvswitch")


async def _undo_joining(host: Host, port: Port, before: Seen, kept: Stamp | None) -> None:
    """Take back what was done, as far as it can be; what cannot is told in syslog."""
    with host.until(host.deadline.undo()):
        asking = host.deadline.child(host.deadline.remaining() * ASKING)
        link = host.kernel.look_up(port.tap)
        if link is not None and link.up:
            # NOTE: first of all, for a mute server may take all the time there is.
            await _take_back(host, SetDown(link.name, link.index), asking)
        await ask_again(host, port.tap, asking)
        now = _look_back(host, port)
        if now is not None:
            await _go_back(host, port, before, now, kept, asking)


def _look_back(host: Host, port: Port) -> Seen | None:
    """Look at what there is to take back; None where that cannot be told, as syslog is."""
    try:
        return host.look(port.tap, port.bridge)
    except Failure as failure:
        host.left = True
        log(syslog.LOG_ERR, f"{quote(port.tap)}: cannot look at what is left: {failure}")
        return None


async def _go_back(
    host: Host, port: Port, before: Seen, now: Seen, kept: Stamp | None, asking: Deadline
) -> None:
    for step in plan_undo(before, now, find_here(), again=kept is not None):
        await _take_back(host, step, asking)


async def ask_again(host: Host, tap: str, deadline: Deadline, remedy: str = "") -> None:
    """See to it that the databases say what is: what became of a commit that was given up, too.

    One that has talked nonsense is connected to anew; one that does not answer is asked nothing
    more, as syslog is told, with the `remedy` where there is a better one than gc.
    """
    for address, database in list(host.databases.items()):
        try:
            await _ask_one_again(host, address, database, deadline)
        except Failure as failure:
            _tell_of_port(host, tap, address, str(failure), remedy)


def _tell_of_port(host: Host, tap: str, address: str, why: str, remedy: str = "") -> None:
    """Tell syslog of a port that may be left in a database, and whoever asked that something is."""
    host.left = True
    log(
        syslog.LOG_ERR,
        f"{quote(tap)}: a port may be left in {quote(address)}: {why}; "
        + (remedy or f"{ifctl('gc', tap)} removes it"),
    )


async def _ask_one_again(host: Host, address: str, database: Database, deadline: Deadline) -> None:
    if database.fault is None:
        if not database.unsure:
            return
        try:
            await database.sync(deadline)
            return
        except Failure:
            if database.fault is None:
                raise
    await host.reconnect(address, deadline)


async def _take_back(host: Host, step: Step, deadline: Deadline) -> None:
    try:
        await host.run(step, deadline, PATIENCE)
    except Failure as failure:
        host.left = True
        log(
            syslog.LOG_ERR,
            f"{quote(step.tap)}: not taken back: {failure}; {ifctl('gc', step.tap)} will",
        )


def success_line(port: Port, caller: Caller) -> str:
    """Return what syslog is told of a tap that is attached."""
    words = [f"attached to {quote(port.bridge)}"]
    if port.vlan is not None:
        words.append(f"vlan {show_vlan(port.vlan)}")
    if port.isolated:
        words.append("isolated")
    words.append(f"network {quote(port.network)}")
    words.append(port.position.name)
    if caller.vm:
        words.append(f"vm {readable(caller.vm)}")
    return f"{quote(port.tap)}: " + ", ".join(words)
