"""What the hubs of running QEMUs join just now: a port may be plugged in and out over QMP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifctl.bounded import attempt
from pyqemu_ifctl.guests import NO_MONITOR, Guest, each_in_time

if TYPE_CHECKING:
    from pyqemu_ifctl.qmp import Joint

PATIENCE = 1.5
"""Seconds that all of them together may take to tell."""


def find_joints(guests: Sequence[Guest]) -> dict[int, tuple[Joint, ...]]:
    """Return what the hubs of each QEMU join, by its process.

    Only who holds two taps is asked. Who has no QMP socket, or does not answer there, is not in it:
    what is known of that one is its command line.
    """
    asked = [guest for guest in guests if guest.monitors and len(set(guest.taps.values())) > 1]
    told = each_in_time(asked, _ask, PATIENCE)
    return {pid: each for pid, each in told.items() if not isinstance(each, Failure)}


def _ask(guest: Guest) -> tuple[Joint, ...]:
    """Return what the hubs of a QEMU join. Raises Failure where none of its sockets tells."""
    from pyqemu_ifctl.qmp import ask_joints

    failure = Failure(Status.UNAVAILABLE, NO_MONITOR)
    for address in guest.monitors:
        joints = attempt(partial(ask_joints, address, PATIENCE / len(guest.monitors)))
        if not isinstance(joints, Failure):
            return tuple(joints)
        failure = joints
    raise failure
