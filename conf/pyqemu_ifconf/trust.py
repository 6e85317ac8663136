"""Opens what the policy is made of, and refuses what others than its owner's could change.

Trusted is what root or the effective user owns and nobody else can write, on a path of such
folders without symbolic links; a folder of root's with the sticky bit passes. So does, in a user
namespace, one above the policy's own that nobody has who is mapped there, as a container's `/` that
is the host's. What is checked is what was opened, never a path that could meanwhile name another
thing. ACLs are not looked at.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import file, sh

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def read_trusted(path: str, limit: int, *, folders: bool = True) -> bytes | None:
    """Return the first `limit` bytes of the regular file `path`, None where it does not exist.

    Without `folders`, the file's own owner and mode are checked but not the folders on its path.
    Raises Failure: 66 where it cannot be read, 78 where it is not to be trusted.
    """
    if folders:
        with _parent(path) as parent:
            if parent is None:
                return None
            sticky = bool(os.fstat(parent).st_mode & _WRITABLE_BY_OTHERS)
            return _read(path, os.path.basename(_absolute(path)), parent, limit, sticky)
    return _read(path, path, None, limit, False)


def list_trusted(path: str) -> list[str] | None:
    """Return the names in the folder `path`, in byte order, None where it does not exist.

    Raises Failure: 66 where it cannot be listed, 78 where it is not to be trusted.
    """
    # NOTE: with a name below it, the folder itself is the last one on the path.
    with _parent(os.path.join(path, "*")) as folder:
        if folder is None:
            return None
        try:
            listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
            try:
                return sorted(os.listdir(listing), key=os.fsencode)
            finally:
                os.close(listing)
        except OSError as error:
            raise _unreadable(path, error) from error


def _absolute(path: str) -> str:
    return os.path.normpath(os.path.join(os.getcwd(), path))


@contextmanager
def _parent(path: str) -> Iterator[int | None]:
    """Open the folder that `path` is in, each folder on the way checked; None where one is not."""
    names = _absolute(path).strip("/").split("/")[:-1]
    folder = os.open("/", _PATH)
    here = ""
    try:
        _check_folder("/", os.fstat(folder), above=bool(names))
        for left, name in zip(range(len(names) - 1, -1, -1), names, strict=True):
            here = f"{here}/{name}"
            try:
                below = os.open(name, _PATH, dir_fd=folder)
            except FileNotFoundError:
                yield None
                return
            except OSError as error:
                raise _unreadable(here, error) from error
            os.close(folder)
            folder = below
            _check_folder(here, os.fstat(folder), above=left > 0)
        yield folder
    finally:
        os.close(folder)


def _check_folder(path: str, found: os.stat_result, *, above: bool) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise _symlink(path)
    if not stat.S_ISDIR(found.st_mode):
        raise Failure(Status.NO_POLICY, show_path(path), "it is not a folder")
    if found.st_uid == 0 and found.st_mode & stat.S_ISVTX:
        return
    _check_owner_and_mode(path, found, above=above)


def _read(path: str, name: str, folder: int | None, limit: int, sticky: bool) -> bytes | None:
    try:
        opened = os.open(name, _READ, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        # O_NOFOLLOW on a symbolic link; see open(2).
        if error.errno == errno.ELOOP:
            raise _symlink(path) from error
        # A socket; see open(2).
        if error.errno == errno.ENXIO:
            raise _not_regular(path) from error
        raise _unreadable(path, error) from error
    try:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode):
            raise _not_regular(path)
        _check_owner_and_mode(path, found)
        # NOTE: where anybody may make names, a hard link can pass an old file of root's off as
        # the policy; elsewhere only root can make one.
        if sticky and found.st_nlink > 1:
            raise Failure(
                Status.UNSAFE,
                show_path(path),
                f"it has {found.st_nlink} hard links, in a folder that everybody can write",
                "move it to a folder that only root can write",
            )
        return _read_up_to(opened, limit)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(opened)


def _read_up_to(opened: int, limit: int) -> bytes:
    parts = []
    left = limit
    while left > 0 and (part := os.read(opened, left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _check_owner_and_mode(path: str, found: os.stat_result, *, above: bool = False) -> None:
    shown = show_path(path)
    if found.st_uid not in (0, os.geteuid()) and not (above and _is_unmapped(found.st_uid)):
        raise Failure(
            Status.UNSAFE,
            shown,
            f"user {found.st_uid} owns it and could change the policy",
            f"run {sh('chown', 'root', file(path))}",
        )
    if found.st_mode & _WRITABLE_BY_OTHERS:
        who = "everybody" if found.st_mode & stat.S_IWOTH else f"group {found.st_gid}"
        raise Failure(
            Status.UNSAFE,
            shown,
            f"{who} can write it (mode {stat.S_IMODE(found.st_mode):04o})",
            f"run {sh('chmod', 'go-w', file(path))}",
        )


def _is_unmapped(uid: int) -> bool:
    """Tell whether this uid stands for those that our user namespace has none for.

    See user_namespaces(7), "Unmapped user and group IDs". Without /proc nobody can say so.
    """
    try:
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            overflow = int(file.read())
        with open("/proc/self/uid_map", encoding="ascii", newline="\n") as file:
            mapped = [tuple(map(int, line.split())) for line in file]
    except FileNotFoundError:
        return False
    return uid == overflow and not any(
        first <= uid < first + count for first, _, count in mapped
    )


def show_path(path: str) -> str:
    """Return `path` for a message: one line, whatever bytes it is made of."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else ascii(text)[1:-1]


def _symlink(path: str) -> Failure:
    return Failure(
        Status.UNSAFE,
        show_path(path),
        "it is a symbolic link, which the policy must not depend on",
        "put the real thing there, or name a path without links",
    )


def _not_regular(path: str) -> Failure:
    return Failure(Status.NO_POLICY, show_path(path), "it is not a regular file")


def _unreadable(path: str, error: OSError) -> Failure:
    why = os.strerror(error.errno or 0)
    return Failure(Status.NO_POLICY, show_path(path), f"it cannot be read: {why}")
