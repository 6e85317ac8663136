"""The QEMUs that run, as doctor looks at them."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Policy
from pyqemu_ifconf.shell import readable
from pyqemu_ifctl.answer import count
from pyqemu_ifctl.bounded import Parts
from pyqemu_ifctl.qemu.command_nics import CommandNic, nics_of
from pyqemu_ifctl.qemu.migration import States, find_away, find_states, may_be_away, may_join
from pyqemu_ifctl.qemu.running import (
    Guest,
    Guests,
    each_in_time,
    find_guests,
    is_left_for,
    leads_to,
)
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.guest import Patience, find_otherwise, tell_otherwise
from pyqemu_ifup.look import Link
from pyqemu_ifup.qemu.command_line import Option
from pyqemu_ifup.system.holders import LONGEST, Holders, all_holders
from pyqemu_ifup.system.process import read_status

if TYPE_CHECKING:
    from pyqemu_ifctl.qemu.qmp import Joint
DEFAULT_SCRIPTS = {"script": "/etc/qemu-ifup", "downscript": "/etc/qemu-ifdown"}
"""What QEMU calls for a tap if it is told nothing (configure, --sysconfdir=/etc)."""
HELPERS = (
    "/usr/lib/qemu/qemu-bridge-helper",
    "/usr/libexec/qemu-bridge-helper",
    "/usr/lib/qemu-bridge-helper",
    "/usr/local/libexec/qemu-bridge-helper",
)
"""Where distributions, and QEMU's own `make install`, put its helper, as pyqemu-takeover has it."""
NICS_MAX = 64
"""NICs of one guest that are looked at."""
PATHS_SECONDS = 1.5
"""Seconds that all guests together may take: whoever makes a path decides what it leads to."""
HOLDERS_SECONDS = LONGEST + 0.5


@dataclass(frozen=True)
class Qemu:
    """One running QEMU.

    `scripts` tells of each script=, downscript= and helper= what its path leads to, None if there
    is no such program. `confined`: its system calls are filtered, and it can gain no privilege;
    None if that is not known. `nics` are the first of its NICs. `left` are its taps that a `leave`
    rule has. `joints` is what its hubs join just now, None if only its command line is known.
    `hidden`: which taps it holds could not be seen.
    """

    guest: Guest
    confined: bool | None
    scripts: Mapping[str, str | None]
    nics: tuple[CommandNic, ...] = ()
    left: frozenset[str] = frozenset()
    joints: tuple[Joint, ...] | None = None
    hidden: bool = False

    @property
    def process(self) -> str:
        """Which process it is, and whose, for a message."""
        uid, words = self.guest.uid, f"process {self.guest.pid}"
        if uid is None:
            return words
        try:
            login = pwd.getpwuid(uid).pw_name
        except KeyError:
            login = str(uid)
        return f"{words} of user {readable(login)}"

    @property
    def name(self) -> str:
        """The guest's name, for a message, with its process."""
        if self.guest.vm is None:
            return f"QEMU {self.guest.pid}"
        return f"{readable(self.guest.vm)} (QEMU {self.guest.pid})"


@dataclass(frozen=True)
class Running:
    """The QEMUs that run, and the processes of those `away`, whose guest runs elsewhere just now.

    `unseen` is what may not be looked at, `unread` what does not let itself be looked at in time.
    """

    qemus: tuple[Qemu, ...]
    away: frozenset[int]
    unseen: tuple[str, ...]
    unread: tuple[str, ...]


def look_at_qemus(parts: Parts, policy: Policy | Failure, deadline: Deadline) -> Running:
    """Return the QEMUs that run, as far as they let themselves be looked at before the deadline."""
    # NOTE: it sees to it itself that who uses up its time hides nobody else.
    seen_holders = parts.take_apart("the taps that processes hold", all_holders, HOLDERS_SECONDS)
    holders = seen_holders or Holders((), ())
    hidden_pids = {*holders.hidden, *holders.unread}
    guests = parts.take_apart("the guests", lambda: find_guests(holders)) or Guests((), ())
    unread = list(guests.unread)
    qemus = []
    seen = each_in_time(
        guests.found, partial(_qemu, policy), min(PATHS_SECONDS, deadline.remaining())
    )
    for guest in guests.found:
        qemu = seen.get(guest.pid, "where its scripts lead was not seen in time")
        if isinstance(qemu, Qemu):
            qemus.append(qemu)
            if len(qemu.nics) > NICS_MAX:
                unread.append(
                    f"QEMU {guest.pid} has more than {NICS_MAX} NICs: the others were not looked at"
                )
        else:
            unread.append(f"QEMU {guest.pid}: {qemu}")
    migrating = may_be_away(
        [qemu.guest for qemu in qemus],
        {qemu.guest.pid: {nic.mac for nic in qemu.nics if nic.mac} for qemu in qemus},
    )
    told = _ask_qemus(parts, [qemu.guest for qemu in qemus], migrating)
    away, unknown = find_away(migrating, told)
    unseen = [f"whether QEMU {pid} waits for a migration: {why}" for pid, why in unknown.items()]
    if holders.hidden and os.geteuid() != 0:
        processes = count(len(holders.hidden), "process")
        unseen.append(f"the taps that {processes} of other users may hold; run as root")
    return Running(
        qemus=tuple(
            replace(
                qemu,
                joints=_joints_of(told, qemu.guest.pid),
                hidden=seen_holders is None or qemu.guest.pid in hidden_pids,
            )
            for qemu in qemus
        ),
        away=away,
        unseen=tuple(unseen),
        unread=tuple(unread),
    )


def _qemu(policy: Policy | Failure, guest: Guest) -> Qemu:
    paths = {
        path
        for option in guest.options
        for key in DEFAULT_SCRIPTS
        if (path := script_of(option, key)) is not None
    }
    paths.update(path for option in guest.options for path in helpers_of(option))
    scripts = {path: leads_to(guest.pid, path) for path in paths}
    left = frozenset(tap for tap in guest.taps.values() if is_left_for(policy, guest, tap))
    return Qemu(guest, _is_confined(guest.pid), scripts, nics_of(guest, NICS_MAX + 1), left)


def script_of(option: Option, key: str) -> str | None:
    """Return the script= or downscript= that QEMU calls for a tap of its own, None for none."""
    if option.keys.get("type") != "tap" or option.keys.keys() & {"fd", "fds", "helper"}:
        return None
    path = option.keys.get(key, DEFAULT_SCRIPTS[key])
    return None if path in ("", "no") else path


def helpers_of(option: Option) -> tuple[str, ...]:
    """Return the bridge helper that QEMU calls for a tap, or if none is named all it may be."""
    kind, words = option.keys.get("type"), option.keys.get("helper", "").split()
    if kind not in ("bridge", "tap") or (kind == "tap" and not words):
        return ()
    # NOTE: with a space in it, QEMU has a shell run it.
    return (words[0],) if words else HELPERS


def _is_confined(pid: int) -> bool | None:
    """Tell whether -sandbox is on (Seccomp and NoNewPrivs of /proc/PID/status)."""
    found = read_status(pid, ("Seccomp", "NoNewPrivs"))
    if "Seccomp" not in found:
        return None
    return found["Seccomp"] == "2" and found.get("NoNewPrivs", "0") == "1"


def _ask_qemus(parts: Parts, guests: Sequence[Guest], migrating: Sequence[Guest]) -> States:
    """Ask over QMP what is of use of each: those that may join taps, and those `migrating`."""
    joining = {guest.pid for guest in guests if may_join(guest)}
    asked = [guest for guest in guests if guest.pid in joining or guest in migrating]
    if not asked:
        return {}
    return (
        parts.take_apart("how QEMUs are, over QMP", lambda: find_states(asked, joints=joining))
        or {}
    )


def _joints_of(told: States, pid: int) -> tuple[Joint, ...] | None:
    """Return what the hubs of a QEMU join, None if it has not told."""
    state = told.get(pid)
    return None if isinstance(state, Failure) or state is None else state.joints


def look_at_words(links: Iterable[Link]) -> tuple[dict[str, str], list[str]]:
    """Return what taps' processes say otherwise than their marks, and who was not read in time."""
    otherwise, unread = {}, []
    patience = Patience()
    for tap, mark in ((link.name, link.mark) for link in links if link.mark is not None):
        others = find_otherwise(tap, mark, patience)
        words = tell_otherwise(mark, others)
        if words and others is None:
            unread.append(f"{readable(tap)}: {words}")
        elif words:
            otherwise[tap] = words
    return otherwise, unread
