"""The QEMUs that run on this host: their guests' names, their taps, and their QMP sockets."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Leave, Policy, choose, policy_asks
from pyqemu_ifctl.bounded import attempt
from pyqemu_ifup.qemu.caller import find_caller
from pyqemu_ifup.qemu.command_line import Option, cut_name, read_options, split_option, walk_options
from pyqemu_ifup.system.holders import OTHERS, Holders, all_holders
from pyqemu_ifup.system.process import (
    as_seen_by,
    command_line,
    command_size,
    find_word,
    is_here,
    read_number,
    read_program,
    real_uid,
    same_root,
)
from pyqemu_ifup.system.users import login_of

if TYPE_CHECKING:
    from pyqemu_ifctl.qemu.qmp import Address, Backend

PORT_MAX = 65535
MONITORS_MAX = 8
"""QMP servers of one QEMU that are looked at: each may take its time."""
NO_MONITOR = "it has no QMP socket: give it -qmp unix:PATH,server=on,wait=off"
THREADS = 64
"""Guests that are looked at, or asked, at the same time."""
OWN_THREADS = 8
"""Those of them that begin with root's and the caller's."""
_NO_PROGRAM = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_HIDDEN = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
"""How stat(2) answers for a program that nobody can run, and for one that we cannot look at."""
T = TypeVar("T")


@dataclass(frozen=True)
class Guest:
    """One running QEMU; `vm` is None without a -name. `taps`: name by descriptor.

    `uid` is its real user, None where that is not known, `options` are those of its network.
    `incoming`: it was started to take a guest that is migrated here, or has taken it since.
    """

    pid: int
    vm: str | None
    taps: dict[int, str]
    monitors: tuple[Address, ...]
    uid: int | None = None
    options: tuple[Option, ...] = ()
    incoming: bool = False

    @property
    def is_own(self) -> bool:
        """Tell whether it is root's, or of who asks."""
        return self.uid in (0, os.geteuid())


@dataclass(frozen=True)
class Guests:
    """The QEMUs that run here, and in words each process that could not be looked at, and why."""

    found: tuple[Guest, ...]
    unread: tuple[str, ...]


def is_left_for(policy: Policy | Failure, guest: Guest, tap: str) -> bool:
    """Tell whether a `leave` rule has a tap of a guest's, by all that a hook of its would know.

    Its launcher may well have no hook called for it.
    """
    if isinstance(policy, Failure) or not any(rule.leave for rule in policy.rules):
        return False
    caller = find_caller(tap, guest.pid, want_user=False)
    if caller.netdev is None:
        named = [
            option.id
            for option in guest.options
            if cut_name(option.keys.get("ifname", "")) == cut_name(tap)
        ]
        caller = replace(caller, netdev=named[0] if len(named) == 1 else None)
    if policy_asks(policy, "user") and guest.uid is not None:
        caller = replace(caller, user=login_of(guest.uid))
    caller = replace(caller, unprivileged=guest.uid != 0)
    return isinstance(choose(policy, caller), Leave)


def find_guests(holders: Holders | None = None, others: float = OTHERS) -> Guests:
    """Return every QEMU of this network namespace that this process can see.

    One is known by its program, or by a tap that it holds. Those of other users than root and the
    caller have `others` seconds together: one of each user, then the next of each, and who has the
    shortest command line first.
    """
    holders = holders if holders is not None else all_holders()
    taps: dict[int, dict[int, str]] = {}
    for held in holders.held:
        taps.setdefault(held.pid, {})[held.descriptor] = held.tap
    by_user: dict[int | None, list[tuple[int, int]]] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        if (pid in taps or runs_qemu(pid)) and is_here(pid):
            by_user.setdefault(real_uid(pid), []).append((command_size(pid), pid))
    turns = sorted(
        (uid not in (0, os.geteuid()), turn, size, pid)
        for uid, processes in by_user.items()
        for turn, (size, pid) in enumerate(sorted(processes))
    )
    found: list[Guest] = []
    unread = [f"process {pid} has too many descriptors" for pid in holders.unread]
    until: float | None = None
    for is_others, _, _, pid in turns:
        if is_others and until is None:
            until = time.monotonic() + others
        if until is not None and time.monotonic() > until:
            unread.append(f"process {pid} was not reached in {others:g} s")
            continue
        words = command_line(pid)
        if not words:
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


def runs_qemu(pid: int) -> bool:
    """Tell whether a process is a QEMU, in the same time whatever other words it has."""
    program = read_program(pid)
    if os.path.basename(program).startswith("ld-linux"):
        return is_qemu([program, find_word(pid, "qemu")])
    return is_qemu([program])


def guest_of(pid: int, words: Sequence[str], taps: dict[int, str]) -> Guest:
    """Return what the command line of process `pid` tells."""
    vm, options, _ = read_options(words, pid)
    monitors = tuple(_where(pid, each) for each in monitors_of(words))
    incoming = any(name == "incoming" for name, _ in walk_options(words))
    return Guest(pid, vm, taps, monitors, real_uid(pid), tuple(options), incoming)


def tap_of(backend: Backend | None, guest: Guest) -> str | None:
    """Return the tap of a backend of the guest's, None where it has none or that is unknown."""
    if backend is None or backend.type != "tap":
        return None
    if backend.ifname is not None:
        return backend.ifname
    return guest.taps.get(backend.descriptor) if backend.descriptor is not None else None


def each_in_time(
    guests: Sequence[Guest], call: Callable[[Guest], T], seconds: float
) -> dict[int, T | Failure]:
    """Return by pid what `call` returns of each guest that it was done with in so many seconds.

    Root's and the caller's come first. Those of another user come one after the other, while those
    of others do: nobody's keep another's from being reached. What is late is left behind, in a
    thread that ends with this process.
    """
    until = time.monotonic() + seconds
    own = [guest for guest in guests if guest.is_own]
    waiting = deque(some for number in range(OWN_THREADS) if (some := own[number::OWN_THREADS]))
    others: dict[int | None, list[Guest]] = {}
    for guest in guests:
        if not guest.is_own:
            others.setdefault(guest.uid, []).append(guest)
    waiting.extend(others.values())
    done: dict[int, T | Failure] = {}

    def work() -> None:
        while time.monotonic() < until:
            try:
                some = waiting.popleft()
            except IndexError:
                return
            guest = some.pop(0)
            done[guest.pid] = attempt(partial(call, guest))
            if some:
                (waiting.appendleft if guest.is_own else waiting.append)(some)

    most = min(THREADS, len(waiting))
    threads = [threading.Thread(target=work, daemon=True) for _ in range(most)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(done)


def ask_any(guest: Guest, ask: Callable[[Address, float], T], seconds: float) -> T:
    """Return what `ask` returns of the first of a QEMU's QMP sockets that tells.

    All of them together have `seconds`. Raises the Failure of the last where none tells.
    """
    failure = Failure(Status.UNAVAILABLE, NO_MONITOR)
    for address in guest.monitors:
        told = attempt(partial(ask, address, seconds / len(guest.monitors)))
        if not isinstance(told, Failure):
            return told
        failure = told
    raise failure


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
    # NOTE: the common case reads better, and needs no right to look into the process.
    if address.startswith("/") and same_root(pid):
        return address
    return as_seen_by(pid, address)


def leads_to(pid: int, path: str) -> str | None:
    """Return where a program of process `pid` really lies; hidden ones count as there.

    None where there is none. It may have no end, in which other threads go on.
    """
    path = path if same_root(pid) else as_seen_by(pid, path)
    found = -1
    try:
        # NOTE: the kernel walks it, once: where it leads, and for how long, its maker decides.
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.fstat(found).st_mode & 0o111:
            return None
        return os.readlink(f"/proc/self/fd/{found}")
    except ValueError:
        # No path: a NUL in it, or half a character.
        return None
    except OSError as error:
        if error.errno in _NO_PROGRAM:
            return None
        if error.errno not in _HIDDEN:
            raise
        return path
    finally:
        if found >= 0:
            os.close(found)
