"""A process of this machine, by its files below /proc (proc(5)): who it is, and what it holds.

Only reads. What can end at any moment is told by a value of its own: None, or nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from dataclasses import dataclass

from pyqemu_ifconf.ids import is_unmapped
from pyqemu_ifup.hook import waiting_for

SIZE_MAX = 1 << 18
"""Bytes of a command line that is read; a longer one, which no QEMU has, is unknown."""

PATH_MAX = 4096
"""Bytes of a path, linux/limits.h."""

PID_MAX = 1 << 22
"""PID_MAX_LIMIT of linux/threads.h."""

_GONE = (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM)
"""How /proc answers for a process that has ended, or that is hidden from us."""
_UNSEEN = (*_GONE, errno.EINVAL)


@dataclass(frozen=True)
class Stat:
    """Of /proc/PID/stat, fields 3, 4, 6 and 22: `start` is in clock ticks since boot."""

    state: str
    parent: int
    session: int
    start: int

    @property
    def has_ended(self) -> bool:
        """Tell whether all that is left of it is for its parent to take."""
        return self.state in ("Z", "X")


def read_stat(pid: int) -> Stat | None:
    """Return what the kernel tells of process `pid`; None where it has gone or is hidden."""
    # NOTE: the second field, the process's name, may hold spaces and parentheses.
    fields = _read_proc(pid, "stat").rpartition(b")")[2].split()
    if len(fields) <= 19:
        return None
    return Stat(fields[0].decode(), int(fields[1]), int(fields[3]), int(fields[19]))


def process_start(pid: int) -> int | None:
    """Return when process `pid` started, in clock ticks since boot; None where it has ended.

    A pid is used again, the pair of both is not. One that its parent has not waited for has ended.
    """
    found = read_stat(pid)
    return found.start if found is not None and not found.has_ended else None


def find_parent(pid: int) -> int | None:
    """Return the parent of process `pid`; None where it has gone."""
    found = read_stat(pid)
    return found.parent if found is not None else None


def process_name(pid: int) -> str:
    """Return the name of process `pid`, which is of its own choice; empty where it has gone."""
    return os.fsdecode(_read_proc(pid, "comm").removesuffix(b"\n"))


def owner_of(pid: int) -> int | None:
    """Return who owns the files of process `pid`; None where it has gone or is hidden.

    That is its effective user, or root where it says that nobody may look into it (prctl(2)).
    """
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return None


def descriptors_of(pid: int) -> str:
    """Return the folder of the descriptors of process `pid`, a symbolic link for each."""
    return f"/proc/{pid}/fd"


def read_fdinfo(pid: int | str, number: int | str, key: str) -> list[str]:
    """Return what stands after each `key:` of what the kernel tells of a descriptor.

    `pid` may be "self". Raises OSError, as where the process has let it go (proc_pid_fdinfo(5)).
    """
    path = f"/proc/{pid}/fdinfo/{number}"
    with open(path, encoding="ascii", errors="replace", newline="\n") as file:
        pairs = (line.partition(":") for line in file)
        return [value.strip() for name, _, value in pairs if name == key]


def as_seen_by(pid: int, path: str) -> str:
    """Return how this process reaches the file that process `pid` calls `path`."""
    return f"/proc/{pid}/root{path}" if path.startswith("/") else f"/proc/{pid}/cwd/{path}"


def real_uid(pid: int) -> int | None:
    """Return the real uid of process `pid`; None where it has ended or is hidden."""
    found = read_status(pid, ("Uid",))
    return int(found["Uid"].split()[0]) if found else None


def is_here(pid: int) -> bool:
    """Tell whether a process is in this network namespace, or that cannot be told."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
    except OSError as error:
        if error.errno not in _UNSEEN:
            raise
        # NOTE: who has no id here can only have come into this network namespace by a root's hand.
        return not is_unmapped(real_uid(pid) or 0)


def same_root(pid: int) -> bool:
    """Tell whether a process sees the same files as this one, or that cannot be told."""
    root = f"/proc/{pid}/root"
    try:
        with waiting_for(f"the root folder of process {pid} does not let itself be looked at"):
            theirs, ours = os.stat(root), os.stat("/proc/self/root")
        same_mounts = os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino
    except OSError as error:
        if error.errno not in _UNSEEN:
            raise
        return True
    return same_mounts and (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def read_status(pid: int, names: Collection[str]) -> dict[str, str]:
    """Return those of the fields `names` that /proc/PID/status has; none where it has ended."""
    # NOTE: of what ends a line, the kernel escapes \n alone in a process's name (proc_task_name).
    lines = _read_proc(pid, "status").decode("ascii", "replace").split("\n")
    pairs = (line.partition(":") for line in lines)
    return {name: value.strip() for name, _, value in pairs if name in names}


def command_line(pid: int) -> list[str]:
    """Return the words of process `pid`; none where it has ended, is hidden, or has too many."""
    return [os.fsdecode(word) for word in read_line(pid).split(b"\0")[:-1]]


def read_program(pid: int) -> str:
    """Return the first word of process `pid`, as far as it is no longer than a path may be.

    That takes the same time whatever other words there are. It is empty where the process has ended
    or is hidden.
    """
    return os.fsdecode(_read_proc(pid, "cmdline", PATH_MAX).partition(b"\0")[0])


def find_word(pid: int, part: str) -> str:
    """Return the first word of process `pid` that has `part` in it, empty for none."""
    line = read_line(pid)
    at = line.find(os.fsencode(part))
    return os.fsdecode(line[line.rfind(b"\0", 0, at) + 1 :].partition(b"\0")[0]) if at >= 0 else ""


def command_size(pid: int) -> int:
    """Return the bytes of the words of process `pid`, 0 where `command_line` returns none."""
    return len(read_line(pid))


def read_line(pid: int) -> bytes:
    """Return the command line of process `pid`, a NUL after each word, as `command_line` does."""
    line = _read_proc(pid, "cmdline", SIZE_MAX + 1)
    return line if len(line) <= SIZE_MAX else b""


def read_number(text: str, most: int) -> int | None:
    """Return the decimal number that a text of another's is, None where it is none up to `most`."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most))):
        return None
    number = int(text)
    return number if number <= most else None


def _read_proc(pid: int, name: str, size: int = -1) -> bytes:
    """Return the file `name` of process `pid` in /proc; empty where it has ended or is hidden.

    Of a file that is longer, the first `size` bytes.
    """
    try:
        with (
            waiting_for(f"process {pid} does not let its {name} be read"),
            open(f"/proc/{pid}/{name}", "rb") as file,
        ):
            return file.read(size)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return b""
