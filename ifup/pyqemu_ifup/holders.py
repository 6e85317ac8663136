"""Which process holds which tap, from the descriptors of all processes (proc(5))."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pyqemu_ifup.caller import real_uid
from pyqemu_ifup.work import Work, finish

BATCH = 64
"""Descriptors, or processes, that are looked at in one go."""
OTHERS = 2.0
"""Seconds that all processes of others than root may take to be looked at."""
TUNGETDEVNETNS = 0x54E3
"""_IO('T', 227) of linux/if_tun.h."""
PIDFD_GETFD = 438
"""The system call pidfd_getfd(2), on every architecture."""
_HIDDEN = (errno.EACCES, errno.EPERM)
_GONE = (errno.ENOENT, errno.ESRCH)


@dataclass(frozen=True)
class Held:
    """One descriptor of a tap's: its process, its number there, and the tap's name."""

    pid: int
    descriptor: int
    tap: str


@dataclass(frozen=True)
class Holders:
    """The descriptors of taps, and the processes that hold we cannot tell which.

    `hidden` may not be looked into; `unread` have so many descriptors that the time was over.
    """

    held: tuple[Held, ...]
    hidden: tuple[int, ...]
    unread: tuple[int, ...] = ()

    def of(self, tap: str) -> tuple[int, ...]:
        """Return the processes that hold this tap, each once, the lowest first."""
        return tuple(sorted({held.pid for held in self.held if held.tap == tap}))

    def of_process(self, pid: int) -> dict[int, str]:
        """Return the taps of one process, by its descriptors."""
        return {held.descriptor: held.tap for held in self.held if held.pid == pid}


def find_holders(others: float = OTHERS) -> Holders:
    """Look at the descriptors of every process.

    A tap is left out that is certainly in another network namespace than this process: one there
    may have the name of one here.
    Those of other users than root have `others` seconds together, and who has few comes first, so
    that nobody hides another's tap behind descriptors of his own.
    """
    return finish(finding_holders(others), lambda pause: None)


def finding_holders(others: float) -> Work[Holders]:
    """Do as `find_holders`, a little at a time: it waits for nothing, and lets others go on."""
    held: list[Held] = []
    hidden: list[int] = []
    unread: list[int] = []
    until: float | None = None
    processes = []
    for number, process in enumerate(_processes()):
        processes.append(process)
        if number % BATCH == BATCH - 1:
            yield 0.0
    for is_others, _, pid in sorted(processes):
        if is_others and until is None:
            until = time.monotonic() + others
        try:
            if not (yield from _looking_into(pid, until, held)):
                unread.append(pid)
        except OSError as error:
            if error.errno in _HIDDEN:
                hidden.append(pid)
            elif error.errno not in _GONE:
                raise
    return Holders(tuple(held), tuple(sorted(hidden)), tuple(sorted(unread)))


def _processes() -> Iterator[tuple[bool, int, int]]:
    """Yield of each process whether it is another's than root's, its descriptors, and its pid."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                # NOTE: the number of descriptors since Linux 6.2, 0 before (proc_readfd_count).
                number = os.stat(f"/proc/{name}/fd").st_size
            except OSError as error:
                if error.errno not in (*_GONE, *_HIDDEN):
                    raise
                number = 0
            # NOTE: not the folder's owner, which is root where the process says so (prctl(2)).
            yield real_uid(int(name)) != 0, number, int(name)


def _looking_into(pid: int, until: float | None, held: list[Held]) -> Work[bool]:
    """Add what a process holds; tell whether all was seen before the time was over."""
    folder = f"/proc/{pid}/fd"
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if until is not None and time.monotonic() > until:
                return False
            if number % BATCH == BATCH - 1:
                yield 0.0
            # NOTE: the name of the link alone asks no file, and all but a few are none of a tap's.
            try:
                if not os.readlink(entry.path).endswith("/net/tun"):
                    continue
                tap = _tap_of(pid, entry.name)
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                continue
            if tap and not _is_elsewhere(pid, int(entry.name)):
                held.append(Held(pid, int(entry.name), tap))
    return True


def _tap_of(pid: int, number: str) -> str:
    """Return the name after `iff:` (tun_chr_show_fdinfo of drivers/net/tun.c), empty for none."""
    path = f"/proc/{pid}/fdinfo/{number}"
    with open(path, encoding="ascii", errors="replace", newline="\n") as file:
        for line in file:
            if line.startswith("iff:"):
                return line[len("iff:"):].strip()
    return ""


def _is_elsewhere(pid: int, number: int) -> bool:
    """Tell whether a descriptor's tap is certainly in another network namespace than we are.

    It takes the right to trace that process (pidfd_getfd(2)), Linux 5.6 and, of a tap that is not
    ours to change, CAP_NET_ADMIN there; without, it is not certain.
    """
    taken = namespace = -1
    try:
        process = os.pidfd_open(pid)
        try:
            taken = ctypes.CDLL(None).syscall(PIDFD_GETFD, process, number, 0)
        finally:
            os.close(process)
        if taken < 0:
            return False
        namespace = fcntl.ioctl(taken, TUNGETDEVNETNS)
        return not os.path.samestat(os.fstat(namespace), os.stat("/proc/thread-self/ns/net"))
    except OSError as error:
        if error.errno not in (*_HIDDEN, *_GONE, errno.ENOTTY, errno.EBADFD, errno.ENOSYS):
            raise
        return False
    finally:
        for each in (taken, namespace):
            if each >= 0:
                os.close(each)
