"""What a QEMU's -readconfig FILE says, as QEMU reads it (qemu_config_foreach, util/qemu-config.c).

The file is of root's QEMU for root, of a user's own for that user, and of nobody else: nobody gets
a file read by another's right. It is looked up as that process sees it, whatever namespace or
folder it is in, and nothing is waited for.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import deque
from dataclasses import dataclass

from pyqemu_ifup.system.process import PATH_MAX, as_seen_by, real_uid

CONFIG_MAX = 1 << 18
"""Bytes of a file that is read; a longer one is not."""
FILES_MAX = 16
"""Files of one command line that are read."""
LINE_MAX = 1023
"""Bytes of a line, its end included: QEMU takes what is beyond for another line."""
LINKS_MAX = 40
"""Symbolic links on one path, MAXSYMLINKS of linux/namei.h."""
_BARRED = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.ESRCH,
    errno.EIO,
    errno.ESTALE,
)
_NAMED = re.compile(rb'\[\s*(\S{1,63})\s+"([^"]{1,63})')
_UNNAMED = re.compile(rb"\[([^\]]{1,63})")
_KEY = re.compile(rb'\s*(\S{1,63})(?:\s+=\s*"([^"]+))?')
"""QEMU's sscanf() patterns; a value that is not written so is empty."""


@dataclass(frozen=True)
class Section:
    """A section of such a file, `[group]` or `[group "id"]`, and its keys."""

    group: str
    id: str | None
    keys: dict[str, str]


def read_config(pid: int, path: str) -> list[Section] | None:
    """Return the sections of the file that process `pid` was given; None where it is not read.

    That is where the process is another user's, and where it is no file that QEMU starts with.
    """
    if not os.getuid() == os.geteuid() == real_uid(pid):
        return None
    try:
        found = _find_as(pid, path)
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                return None
            with open(f"/proc/self/fd/{found}", "rb") as file:
                data = file.read(CONFIG_MAX + 1)
        finally:
            os.close(found)
    except ValueError:
        # No path: half a character.
        return None
    except OSError as error:
        if error.errno not in _BARRED:
            raise
        return None
    return parse(data) if len(data) <= CONFIG_MAX else None


def _find_as(pid: int, path: str) -> int:
    """Return a descriptor, not to read from, of what `path` leads to for process `pid`.

    NOTE: name after name, since the kernel goes on from this process's own root where a symbolic
    link is absolute. What is in /proc is each process's own: that cannot be told, ENOENT.
    """
    at = _start(pid, path)
    try:
        names = deque(path.split("/"))
        links = 0
        while names:
            name = names.popleft()
            if name in ("", "."):
                continue
            found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            if not stat.S_ISLNK(os.fstat(found).st_mode):
                os.close(at)
                at = found
                continue
            try:
                target = os.readlink("", dir_fd=found)
            finally:
                os.close(found)
            links += 1
            if links > LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            names.extendleft(reversed(target.split("/")))
            if target.startswith("/"):
                start = _start(pid, target)
                os.close(at)
                at = start
        return at
    except BaseException:
        os.close(at)
        raise


def _start(pid: int, path: str) -> int:
    """Return a descriptor of the folder where the walk of `path` begins for process `pid`."""
    if len(path) > PATH_MAX or path.lstrip("/").partition("/")[0] == "proc":
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    folder = as_seen_by(pid, path[:1] if path.startswith("/") else "")
    return os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def parse(data: bytes) -> list[Section] | None:
    """Return the sections that a file has, None where QEMU does not start with it."""
    found: list[Section] = []
    for line in data.split(b"\n"):
        if len(line) >= LINE_MAX or b"\0" in line:
            return None
        if line[:1] in (b"", b"#"):
            continue
        if line[:1] == b"[":
            named, unnamed = _NAMED.match(line), _UNNAMED.match(line)
            if named is not None:
                found.append(Section(os.fsdecode(named[1]), os.fsdecode(named[2]), {}))
            elif unnamed is not None:
                found.append(Section(os.fsdecode(unnamed[1]), None, {}))
            else:
                return None
            continue
        key = _KEY.match(line)
        if key is None or not found:
            return None
        found[-1].keys[os.fsdecode(key[1])] = os.fsdecode(key[2] or b"")
    return found
