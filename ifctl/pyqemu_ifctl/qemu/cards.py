"""What a running guest and this host say of its NICs, side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Nic, Policy
from pyqemu_ifconf.shell import readable
from pyqemu_ifctl.answer import count
from pyqemu_ifctl.bounded import ALL, Parts, attempt
from pyqemu_ifctl.databases import read_policy, worst
from pyqemu_ifctl.look import look
from pyqemu_ifctl.qemu.migration import find_away, find_states, may_be_away
from pyqemu_ifctl.qemu.qmp import Address, Backend, GuestNic, Joint, ask_nics
from pyqemu_ifctl.qemu.running import (
    NO_MONITOR,
    Guest,
    each_in_time,
    find_guests,
    is_left_for,
    tap_of,
)
from pyqemu_ifctl.taps import Row, rows, wanted
from pyqemu_ifup import kinds
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.look import Counters
from pyqemu_ifup.nic_macs import host_id, macs_of
from pyqemu_ifup.qemu.hubs import NAMED_MAX, WHY, WHY_MIXED
from pyqemu_ifup.system.holders import Holders, all_holders

PATIENCE = 3.0
"""Seconds that one QEMU may take to answer, at all its sockets together."""
SPARE = 2.0
"""Seconds before the deadline at which nobody is waited for any more: there is more to do."""
NO_ANSWER = (Status.BUG, Status.REFUSED)
"""How a guest fails that answers, but not as QEMU does: then the verb fails too."""


@dataclass(frozen=True)
class Side:
    """One tap as this host has it; `counters` None where the tap is not in this namespace."""

    row: Row
    counters: Counters | None


@dataclass(frozen=True)
class Card:
    """One NIC: as QEMU has it (None: QEMU could not be asked), and its tap on this host.

    Or one hub without a NIC, a `joint`. `faults` is what does not fit together.
    """

    nic: GuestNic | None
    tap: str | None
    side: Side | None
    faults: tuple[str, ...]
    joint: Joint | None = None


@dataclass(frozen=True)
class View:
    """One guest: its QEMU, its NICs, and why QEMU's half is missing, where it is."""

    guest: Guest
    monitor: Address | None
    cards: tuple[Card, ...]
    missing: str = ""
    status: Status = Status.DONE


@dataclass(frozen=True)
class Told:
    """What a QEMU has told of its NICs, and where; None and why not, where it has not."""

    nics: tuple[GuestNic, ...] | None
    monitor: Address | None
    missing: str = ""
    status: Status = Status.DONE
    joints: tuple[Joint, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What there is to be shown of the guests; `status` is not 0 where something is not known."""

    views: list[View]
    status: Status
    remarks: tuple[str, ...]


NO_TIME = Told(None, None, "there was no time to ask it", Status.TRY_AGAIN)


def find_views(
    vm: str | None,
    qmp: str | None,
    environ: Mapping[str, str],
    deadline: Deadline,
    tell: Callable[[str], None],
) -> Seen:
    """Look at the NICs of every running guest, or of the guest `vm`; `qmp` names its QMP socket.

    A QEMU that does not answer does not keep the rest from being seen. Raises Failure (69) where no
    such guest runs.
    """
    policy = read_policy(environ)
    holders = all_holders()
    running = find_guests(holders)
    guests = [g for g in running.found if vm is None or _is_called(g, vm, policy)]
    if vm is not None and not guests:
        raise Failure(
            Status.UNAVAILABLE,
            f"no QEMU that runs here is called {readable(vm)}",
            "none has that -name, nor the taps that the policy gives that guest",
            "pyqemu-ifctl info lists them all",
        )
    if qmp is not None and len(guests) != 1:
        raise Failure(
            Status.USAGE,
            f"--qmp is of one guest, and {count(len(guests), 'QEMU')} would be shown",
            "",
            "name the guest: info VM --qmp PATH",
        )
    with Host(None, deadline, tell) as host:
        # NOTE: on a clock of its own: the QEMUs have the time of the whole.
        parts = Parts(deadline.child(ALL))
        snapshot = look(host, policy, parts)
        found = {
            row.tap: Side(row, _counters(host, row))
            for row in rows(snapshot, lambda name, mark: wanted(policy, name, mark))
        }
    views = []
    answers = ask_each(guests, qmp, deadline)
    for guest, told in zip(guests, answers, strict=True):
        view = attempt(partial(view_of, guest, told, found, policy))
        views.append(
            View(guest, None, (), str(view), view.status) if isinstance(view, Failure) else view
        )
    migrating = may_be_away(
        guests,
        {
            view.guest.pid: {card.nic.mac.lower() for card in view.cards if card.nic is not None}
            for view in views
        },
    )
    away, unknown = find_away(migrating, find_states(migrating))
    views = _with_twins(views, away)
    remarks = [str(failure) for failure in snapshot.failed.values()]
    remarks += [f"not seen: {each}" for each in running.unread]
    remarks += [
        f"whether QEMU {pid} waits for a migration is not known: {why}"
        for pid, why in unknown.items()
    ]
    if isinstance(policy, Failure):
        remarks.insert(0, f"what is wanted is not known: {policy}")
    remarks += [f"not seen: {each}" for each in parts.missed]
    remarks += _hidden(holders, snapshot)
    status = worst(snapshot.failed.values())
    if status is Status.DONE:
        late = running.unread or parts.missed or NO_TIME in answers
        unread = Status.TRY_AGAIN if late else Status.DONE
        status = max((view.status for view in views if view.status in NO_ANSWER), default=unread)
    return Seen(views, status, tuple(remarks))


def _counters(host: Host, row: Row) -> Counters | None:
    """Return what has passed a tap, as its host's end sees it; None if it is not here."""
    found = host.kernel.counters(row.ifindex) if row.ifindex else None
    # NOTE: a link that was made for the guest has no other end: what it sends is the guest's.
    is_guests = row.kind is not None and kinds.maker(row.kind) is not None
    return found.turned if found is not None and is_guests else found


def ask_each(guests: Sequence[Guest], qmp: str | None, deadline: Deadline) -> list[Told]:
    """Ask the QMP sockets of each guest, or just `qmp`; return what each has told in time."""
    seconds = deadline.remaining() - SPARE
    until = time.monotonic() + seconds
    told = each_in_time(guests, partial(_ask, qmp, until), seconds)
    answers = (told.get(guest.pid, NO_TIME) for guest in guests)
    return [
        Told(None, None, str(each), each.status) if isinstance(each, Failure) else each
        for each in answers
    ]


def _ask(qmp: str | None, until: float, guest: Guest) -> Told:
    monitors: list[Address] = [qmp] if qmp is not None else list(guest.monitors)
    until = min(until, time.monotonic() + PATIENCE)
    told = Told(None, None, NO_MONITOR)
    for number, address in enumerate(monitors):
        seconds = round((until - time.monotonic()) / (len(monitors) - number), 1)
        if seconds <= 0:
            return NO_TIME
        answer = attempt(partial(ask_nics, address, seconds))
        if not isinstance(answer, Failure):
            nics, joints = answer
            return Told(tuple(nics), address, joints=tuple(joints))
        told = Told(None, None, str(answer), answer.status)
    return told


def _is_called(guest: Guest, vm: str, policy: Policy | Failure) -> bool:
    """Tell whether a QEMU is the guest `vm`: by its -name, else by a tap of the policy's."""
    if guest.vm is not None:
        return guest.vm == vm
    known = policy.vms.get(vm) if isinstance(policy, Policy) else None
    taps = {nic.tap for nic in known.nics if nic.tap} if known is not None else set()
    return not taps.isdisjoint(guest.taps.values())


def _hidden(holders: Holders, snapshot: Snapshot) -> list[str]:
    """Return what could not be seen: the taps here that nobody who can be looked into holds."""
    if not holders.hidden:
        return []
    held = {held.tap for held in holders.held}
    taps = [link.name for link in snapshot.links if link.tap and link.carrier]
    unseen = [tap for tap in taps if tap not in held]
    if not unseen:
        return []
    return [
        f"who holds {', '.join(map(readable, unseen))} cannot be seen: "
        f"{count(len(holders.hidden), 'process')} may not be looked into"
        + ("; run as root" if os.geteuid() != 0 else "")
    ]


def view_of(guest: Guest, told: Told, sides: Mapping[str, Side], policy: Policy | Failure) -> View:
    """Return all that is known of one guest."""
    nics = told.nics
    # NOTE: status knows of no guest who has a tap, and so of no rule for that one.
    sides = {
        **sides,
        **{
            tap: replace(side, row=replace(side.row, state="left"))
            for tap in guest.taps.values()
            if (side := sides.get(tap)) is not None
            and side.row.state == "loose"
            and is_left_for(policy, guest, tap)
        },
    }
    ends = {each: tap_of(each, guest) for nic in nics or () for each in nic.backends}
    left = dict.fromkeys(guest.taps.values())
    for tap in ends.values():
        left.pop(tap or "", None)
    unknown = [each for each, tap in ends.items() if each.type == "tap" and tap is None]
    if len(unknown) == len(left) == 1:
        # NOTE: of one that a helper has brought, QEMU tells neither the name nor the descriptor.
        ends[unknown.pop()] = left.popitem()[0]
    cards = []
    for nic in nics or ():
        taps = [each for each in nic.backends if each.type == "tap"]
        if len(taps) > 1:
            # NOTE: only a hub has several, and each leads to the host.
            left |= {tap: None for each in taps if (tap := ends[each]) is not None}
            cards.append(Card(nic, None, None, faults_of(nic, None, None, None, policy)))
            continue
        backend = next(iter(taps or nic.backends), None)
        tap = ends[backend] if backend is not None else None
        side = sides.get(tap) if tap is not None else None
        cards.append(Card(nic, tap, side, faults_of(nic, backend, tap, side, policy)))
    cards += [
        Card(None, None, None, (_of_hub(joint.hub, joint.backends),), joint)
        for joint in told.joints
        if joint.hub not in {nic.hub for nic in nics or ()}
    ]
    used = {tap for tap in ends.values() if tap is not None}
    for tap in left:
        side = sides.get(tap)
        idle = nics is not None and not unknown and tap not in used
        because = ("no NIC of the guest is on it",) if idle else ()
        cards.append(Card(None, tap, side, (*because, *_of_host(tap, side))))
    return View(guest, told.monitor, tuple(cards), told.missing, told.status)


def faults_of(
    nic: GuestNic,
    backend: Backend | None,
    tap: str | None,
    side: Side | None,
    policy: Policy | Failure,
) -> tuple[str, ...]:
    """Return what does not fit together of a NIC, its backend and its tap.

    `backend` is None where it has none, or is on a hub with several taps.
    """
    found: list[str] = []
    if not nic.backends:
        found.append("it has no netdev: nothing is at its other end")
    if len(nic.backends) > 1:
        found.append(_of_hub(nic.hub, nic.backends))
    if backend is not None and backend.queues > 1 and not nic.mq:
        found.append(f"its netdev has {backend.queues} queues, and it uses one; add mq=on")
    if tap is not None:
        found += _of_host(tap, side)
    if side is not None and nic.host_mtu is not None and nic.host_mtu != side.row.mtu:
        found.append(f"it tells the guest of an MTU of {nic.host_mtu}, its tap has {side.row.mtu}")
    wish = _wish(tap, policy)
    if wish is not None and isinstance(policy, Policy):
        found += _otherwise(nic, *wish, policy)
    return tuple(found)


def _otherwise(nic: GuestNic, vm: str, want: Nic, policy: Policy) -> Iterator[str]:
    """Yield what of a NIC is not as `want` is, the NIC of the guest `vm` in the policy."""
    mac = want.mac
    if mac is None:
        try:
            mac = macs_of(policy, host_id())[vm, want.id]
        except Failure:
            mac = None
    if mac is not None and mac != nic.mac.lower():
        yield f"its MAC is {readable(nic.mac)}, the policy has {mac} ({want.position})"
    if want.model not in (nic.model, "virtio-net"):
        yield f"it is a {readable(nic.model)}, the policy has {want.model} ({want.position})"


def _of_hub(hub: int | None, backends: Sequence[Backend]) -> str:
    """Return what is wrong with a hub that joins several backends."""
    names = [
        readable(each.ifname) if each.ifname else f"{readable(each.type)} {readable(each.id)}"
        for each in backends[:NAMED_MAX]
    ]
    several = sum(each.type == "tap" for each in backends) > 1
    return f"hub {hub} joins {' and '.join(names)}: {WHY if several else WHY_MIXED}"


def _wish(tap: str | None, policy: Policy | Failure) -> tuple[str, Nic] | None:
    """Return the NIC that the policy gives this tap, and its guest's name."""
    if tap is None or isinstance(policy, Failure):
        return None
    return next(
        ((vm.name, nic) for vm in policy.vms.values() for nic in vm.nics if nic.tap == tap), None
    )


def _of_host(tap: str, side: Side | None) -> list[str]:
    """Return what is wrong with the tap on this host."""
    if side is None:
        return [f"{readable(tap)} is not in this network namespace"]
    row = side.row
    found = [str(each) for each in row.differences or ()]
    if row.state == "loose":
        found.append(f"{readable(tap)} is on no bridge")
    if row.because:
        found.append(row.because)
    return found


def _with_twins(views: list[View], away: Collection[int] = ()) -> list[View]:
    """Return the views, where two NICs have the same MAC with a word about that.

    But of those `away`, whose guest runs elsewhere just now.
    """
    holders: dict[str, list[str]] = {}
    for view in views:
        if view.guest.pid in away:
            continue
        for nic in {card.nic for card in view.cards if card.nic is not None}:
            holders.setdefault(nic.mac.lower(), []).append(_of(nic, view.guest))
    found = []
    for view in views:
        cards = []
        for card in view.cards:
            own = _of(card.nic, view.guest) if card.nic is not None else ""
            counts = card.nic is not None and view.guest.pid not in away
            same = holders.get(card.nic.mac.lower(), []) if card.nic is not None and counts else []
            others = [each for each in same if each != own]
            more = (f"{' and '.join(others)} has the same MAC",) if others else ()
            cards.append(replace(card, faults=(*card.faults, *more)))
        found.append(replace(view, cards=tuple(cards)))
    return found


def _of(nic: GuestNic, guest: Guest) -> str:
    return f"{readable(nic.name)} of {name_of(guest)}"


def name_of(guest: Guest) -> str:
    """Return what a QEMU is called in a sentence: its guest's name, or its process."""
    return readable(guest.vm) if guest.vm is not None else f"process {guest.pid}"
