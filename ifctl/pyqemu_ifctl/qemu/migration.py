"""How running QEMUs are just now: their hubs, and whose guest waits for a migration or has left.

A port of a hub may be plugged in and out over QMP.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure
from pyqemu_ifctl.qemu.running import Guest, ask_any, each_in_time

if TYPE_CHECKING:
    from pyqemu_ifctl.qemu.qmp import State

AWAY = frozenset(("inmigrate", "postmigrate", "finish-migrate", "restore-vm"))
"""States of a QEMU (RunState of its QAPI) in which its guest does not run, but may elsewhere."""
PATIENCE = 1.5
"""Seconds that all of them together may take to tell."""
States = Mapping[int, "State | Failure"]
"""What QEMUs have told, or why they have not, by process; who was not reached in time is not in."""


def find_states(guests: Sequence[Guest], *, joints: Collection[int] = ()) -> States:
    """Ask each QEMU how it is, and those of the processes `joints` what their hubs join."""
    from pyqemu_ifctl.qemu.qmp import ask_state

    def ask(guest: Guest) -> State:
        return ask_any(guest, partial(ask_state, joints=guest.pid in joints), PATIENCE)

    return each_in_time(guests, ask, PATIENCE) if guests else {}


def may_join(guest: Guest) -> bool:
    """Tell whether a QEMU is worth asking what its hubs join: who holds two taps is.

    Of who has no QMP socket, or does not answer there, its command line is what is known.
    """
    return bool(guest.monitors) and len(set(guest.taps.values())) > 1


def may_be_away(guests: Sequence[Guest], macs: Mapping[int, Collection[str]]) -> list[Guest]:
    """Return who shares a MAC with a guest of -incoming; `macs` are those of each process."""
    holders: dict[str, list[Guest]] = {}
    for guest in guests:
        for mac in set(macs.get(guest.pid, ())):
            holders.setdefault(mac, []).append(guest)
    found = {
        guest.pid: guest
        for sharing in holders.values()
        if len(sharing) > 1 and any(guest.incoming for guest in sharing)
        for guest in sharing
    }
    return list(found.values())


def find_away(asked: Sequence[Guest], told: States) -> tuple[frozenset[int], dict[int, str]]:
    """Return the processes whose guest does not run there, and why that is not known of others.

    A guest of -incoming counts as one that waits where it does not tell.
    """
    away, unknown = set(), {}
    for guest in asked:
        state = told.get(guest.pid)
        if isinstance(state, Failure) or state is None:
            if guest.incoming:
                away.add(guest.pid)
                unknown[guest.pid] = str(state or "there was no time to ask it")
        elif state.state in AWAY:
            away.add(guest.pid)
    return frozenset(away), unknown
