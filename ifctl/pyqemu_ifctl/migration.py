"""Which guests run elsewhere just now: they wait for a migration, or have left by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifctl.bounded import attempt
from pyqemu_ifctl.guests import NO_MONITOR, Guest, each_in_time

AWAY = frozenset(("inmigrate", "postmigrate", "finish-migrate", "restore-vm"))
"""States of a QEMU (RunState of its QAPI) in which its guest does not run, but may elsewhere."""
PATIENCE = 1.5
"""Seconds that all of them together may take to tell."""


def find_away(
    guests: Sequence[Guest], macs: Mapping[int, Collection[str]]
) -> tuple[frozenset[int], dict[int, str]]:
    """Return the processes whose guest does not run there, and why that is not known of others.

    `macs` are those of each process. Only who shares one with a guest of -incoming is asked, which
    counts as one that waits where it does not tell.
    """
    holders: dict[str, list[Guest]] = {}
    for guest in guests:
        for mac in set(macs.get(guest.pid, ())):
            holders.setdefault(mac, []).append(guest)
    asked = {
        guest.pid: guest
        for sharing in holders.values()
        if len(sharing) > 1 and any(guest.incoming for guest in sharing)
        for guest in sharing
    }
    if not asked:
        return frozenset(), {}
    told = each_in_time(list(asked.values()), _state_of, PATIENCE)
    away, unknown = set(), {}
    for pid, guest in asked.items():
        state = told.get(pid, "there was no time to ask it")
        if isinstance(state, str) and state in AWAY:
            away.add(pid)
        elif guest.incoming and (isinstance(state, Failure) or pid not in told):
            away.add(pid)
            unknown[pid] = str(state)
    return frozenset(away), unknown


def _state_of(guest: Guest) -> str:
    """Return the state of a QEMU. Raises Failure where none of its sockets tells."""
    from pyqemu_ifctl.qmp import ask_state

    failure = Failure(Status.UNAVAILABLE, NO_MONITOR)
    for address in guest.monitors:
        state = attempt(partial(ask_state, address, PATIENCE / len(guest.monitors)))
        if not isinstance(state, Failure):
            return state
        failure = state
    raise failure
