"""The QEMUs that run on this host: their guests' names, their taps, and their QMP sockets."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure
from pyqemu_ifctl.bounded import attempt
from pyqemu_ifup.caller import (
    command_line,
    read_command_line,
    read_number,
    real_uid,
    split_option,
    walk_options,
)
from pyqemu_ifup.holders import OTHERS, Holders, find_holders

if TYPE_CHECKING:
    from pyqemu_ifctl.qmp import Address

PORT_MAX = 65535
MONITORS_MAX = 8
"""QMP servers of one QEMU that are looked at: each may take its time."""
_UNSEEN = (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM, errno.EINVAL)


@dataclass(frozen=True)
class Guest:
    """One running QEMU; `vm` is None without a -name. `taps`: name by descriptor."""

    pid: int
    vm: str | None
    taps: dict[int, str]
    monitors: tuple[Address, ...]


@dataclass(frozen=True)
class Guests:
    """The QEMUs that run here, and in words each process that could not be looked at, and why."""

    found: tuple[Guest, ...]
    unread: tuple[str, ...]


def find_guests(holders: Holders | None = None, others: float = OTHERS) -> Guests:
    """Return every QEMU of this network namespace that this process can see.

    One is known by its program, or by a tap that it holds. Those of other users than root have
    `others` seconds together, and who has the shortest command line comes first.
    """
    holders = holders if holders is not None else find_holders()
    taps: dict[int, dict[int, str]] = {}
    for held in holders.held:
        taps.setdefault(held.pid, {})[held.descriptor] = held.tap
    candidates = []
    for name in os.listdir("/proc"):
        pid = int(name) if name.isdigit() else None
        words = command_line(pid) if pid is not None else []
        if pid is not None and words and (is_qemu(words) or pid in taps) and is_here(pid):
            candidates.append((real_uid(pid) != 0, sum(map(len, words)), pid, words))
    found: list[Guest] = []
    unread = [f"process {pid} has too many descriptors" for pid in holders.unread]
    until: float | None = None
    for is_others, _, pid, words in sorted(candidates):
        if is_others and until is None:
            until = time.monotonic() + others
        if until is not None and time.monotonic() > until:
            unread.append(f"process {pid} was not reached in {others:g} s")
            continue
        guest = attempt(partial(guest_of, pid, words, taps.get(pid, {})))
        if isinstance(guest, Failure):
            unread.append(f"process {pid}: {guest}")
            continue
        # NOTE: who holds a tap and is no QEMU, such as a script, has no QMP either.
        if is_qemu(words) or guest.monitors or guest.vm:
            found.append(guest)
    return Guests(tuple(sorted(found, key=lambda guest: guest.pid)), tuple(unread))


def is_qemu(words: Sequence[str]) -> bool:
    """Tell whether a command line is QEMU's, by the name of the program."""
    program = os.path.basename(words[0])
    if program.startswith("ld-linux"):
        program = next((os.path.basename(word) for word in words if "qemu" in word), program)
    return program.startswith("qemu-system-") or program in ("qemu-kvm", "kvm", "qemu")


def guest_of(pid: int, words: Sequence[str], taps: dict[int, str]) -> Guest:
    """Return what the command line of process `pid` tells."""
    vm = read_command_line(words, "").vm
    return Guest(pid, vm, taps, tuple(_where(pid, each) for each in monitors_of(words)))


def monitors_of(words: Iterable[str]) -> list[Address]:
    """Return the addresses of QMP servers on a QEMU's command line, as it has them."""
    chardevs: dict[str, Address] = {}
    found: list[Address] = []
    controls: list[str] = []
    for name, argument in walk_options(list(words)):
        if name in ("qmp", "qmp-pretty"):
            address = _address_of_uri(argument)
            if address is not None:
                found.append(address)
        elif name == "chardev":
            keys = dict(split_option(argument, "backend"))
            if keys.get("backend") == "socket" and "id" in keys:
                if "path" in keys:
                    chardevs[keys["id"]] = keys["path"]
                elif (port := read_number(keys.get("port", ""), PORT_MAX)) is not None:
                    chardevs[keys["id"]] = (keys.get("host") or "localhost", port)
        elif name == "mon":
            keys = dict(split_option(argument, "chardev"))
            if keys.get("mode") == "control":
                controls.append(keys.get("chardev", ""))
    found += [chardevs[each] for each in controls if each in chardevs]
    return found[:MONITORS_MAX]


def _address_of_uri(text: str) -> Address | None:
    """Return the address of `unix:PATH,...` or `tcp:HOST:PORT,...`, None of any other."""
    kind, _, rest = split_option(text, "uri")[0][1].partition(":") if text else ("", "", "")
    if kind == "unix" and rest:
        return rest
    if kind == "tcp":
        host, _, number = rest.rpartition(":")
        port = read_number(number, PORT_MAX)
        if port is not None:
            return host.strip("[]") or "localhost", port
    return None


def _where(pid: int, address: Address) -> Address:
    """Return the address as this process reaches it: a path as that process sees it."""
    if not isinstance(address, str):
        return address
    base = f"/proc/{pid}/root" if address.startswith("/") else f"/proc/{pid}/cwd/"
    # NOTE: the common case reads better, and needs no right to look into the process.
    if address.startswith("/") and same_root(pid):
        return address
    return base + address


def is_here(pid: int) -> bool:
    """Tell whether a process is in this network namespace, or that cannot be told."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
    except OSError as error:
        if error.errno not in _UNSEEN:
            raise
        return True


def same_root(pid: int) -> bool:
    """Tell whether a process sees the same files as this one, or that cannot be told."""
    try:
        theirs, ours = os.stat(f"/proc/{pid}/root"), os.stat("/proc/self/root")
        same_mounts = os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino
    except OSError as error:
        if error.errno not in _UNSEEN:
            raise
        return True
    return same_mounts and (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)
