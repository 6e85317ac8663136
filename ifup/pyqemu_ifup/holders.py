"""Which process holds which tap, from the descriptors of all processes (proc(5))."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

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
    """The descriptors of taps, and the processes that may not be looked into."""

    held: tuple[Held, ...]
    hidden: tuple[int, ...]

    def of(self, tap: str) -> tuple[int, ...]:
        """Return the processes that hold this tap, each once, the lowest first."""
        return tuple(sorted({held.pid for held in self.held if held.tap == tap}))

    def of_process(self, pid: int) -> dict[int, str]:
        """Return the taps of one process, by its descriptors."""
        return {held.descriptor: held.tap for held in self.held if held.pid == pid}


def find_holders() -> Holders:
    """Look at the descriptors of every process; a tap's name is that of its own namespace."""
    held: list[Held] = []
    hidden: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                held += _held_by(int(name))
            except OSError as error:
                if error.errno in _HIDDEN:
                    hidden.append(int(name))
                elif error.errno not in _GONE:
                    raise
    return Holders(tuple(held), tuple(sorted(hidden)))


def _held_by(pid: int) -> Iterator[Held]:
    folder = f"/proc/{pid}/fd"
    for number in os.listdir(folder):
        # NOTE: the name of the link alone asks no file, and all but a few are none of a tap's.
        try:
            if not os.readlink(f"{folder}/{number}").endswith("/net/tun"):
                continue
            tap = _tap_of(pid, number)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            continue
        if tap:
            yield Held(pid, int(number), tap)


def _tap_of(pid: int, number: str) -> str:
    """Return the name after `iff:` (tun_chr_show_fdinfo of drivers/net/tun.c), empty for none."""
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("iff:"):
                return line[len("iff:"):].strip()
    return ""
