"""Opens the files of a policy, and refuses those that others could change.

A file is trusted if root or the effective user owns it and nobody else can write it, and if each
folder on its path is such a one too. A folder of root's with the sticky bit passes. In a user
namespace a folder above the policy's own passes as well if its owner is not mapped there: a
container's `/` may be the host's. A symbolic link is followed if its owner and each step of its own
way pass. The checks are made on what was opened, never on a path, which could name another thing by
then. ACLs are not looked at.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import closing

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.ids import is_unmapped
from pyqemu_ifconf.policy import POLICY_VARIABLE
from pyqemu_ifconf.shell import file, sh

LINKS_MAX = 40
"""Symbolic links followed on the way to one file: as many as by the kernel (path_resolution(7))."""
PROTECTED_LINKS = "/proc/sys/fs/protected_hardlinks"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_OWN = (
    "have a policy of one's own, in a folder where nobody else can write, and name it: "
    f"{POLICY_VARIABLE}=FILE"
)
"""What the root of an ordinary user's own namespace can do: it can change no other's folder."""
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def read_trusted(path: str, limit: int, *, folders: bool = True) -> bytes | None:
    """Return the first `limit` bytes of the regular file `path`, None if it does not exist.

    Without `folders`, the file's own owner and mode are checked, and the way to it is not.
    Raises Failure: 66 if it cannot be read, 78 if it is not to be trusted.
    """
    if not folders:
        try:
            opened = os.open(path, _READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _cannot_open(path, error) from error
        return _read(path, opened, limit)
    with closing(_Way(path)) as way:
        opened = way.open_last()
        return None if opened < 0 else _read(way.last, opened, limit, makers=way.makers())


def list_trusted(path: str) -> list[str] | None:
    """Return the names in the folder `path`, in byte order, None if it does not exist.

    Raises Failure: 66 if it cannot be listed, 78 if it is not to be trusted.
    """
    # NOTE: a name is added below it, so that the folder itself is the last one on the way.
    with closing(_Way(os.path.join(path, "*"))) as way:
        if not way.go():
            return None
        try:
            listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=way.folder)
            try:
                return sorted(os.listdir(listing), key=os.fsencode)
            finally:
                os.close(listing)
        except OSError as error:
            raise _unreadable(path, error) from error


class _Way:
    """The way to a file, step by step: `folder` is open, and `here` is its name without links.

    Each folder and link is checked as it is reached. Raises Failure: 78 if one is not to be
    trusted, 66 if one cannot be passed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.folder = -1
        self.here = ""
        self._names = steps(path if path.startswith("/") else os.path.join(os.getcwd(), path))
        """The names that are still ahead, the file's own last."""
        self._given = len(self._names)
        """How many of these are of the path itself, and not of a link."""
        self._links = 0

    def close(self) -> None:
        if self.folder >= 0:
            os.close(self.folder)

    @property
    def last(self) -> str:
        """The file's own path, without links."""
        return os.path.normpath(os.path.join(self.here, self._names[-1]))

    def makers(self) -> str:
        """Return who else may make names in this folder, which is sticky then; "" for nobody.

        The kernel may keep a group's members from linking a file of root's, and then they are not
        counted.
        """
        found = os.fstat(self.folder)
        if found.st_mode & stat.S_IWOTH:
            return "everybody"
        # NOTE: /nix/store is a group's, and its equal files are hard links of each other.
        if found.st_mode & stat.S_IWGRP and not _are_links_protected():
            return f"group {found.st_gid}"
        return ""

    def open_last(self) -> int:
        """Go to the end, and return a descriptor of what is there; -1 if the path does not exist.

        NOTE: it is opened as a file at once, for nothing can be read by an O_PATH descriptor.
        """
        while self.go():
            (name,) = self._names
            try:
                return os.open(name, _READ | os.O_NOFOLLOW, dir_fd=self.folder)
            except FileNotFoundError:
                self._check_absent(self.last)
                return -1
            except OSError as error:
                # O_NOFOLLOW on a symbolic link; see open(2).
                if error.errno != errno.ELOOP:
                    raise _cannot_open(self.last, error) from error
                self._step()
        return -1

    def go(self) -> bool:
        """Go to the folder that the file is in; tell whether there is one."""
        while len(self._names) > 1:
            if not self._step():
                return False
        return True

    def _step(self) -> bool:
        """Go into the next folder, or follow the next link; tell whether it exists."""
        name = self._names[0]
        at = os.path.normpath(os.path.join(self.here, name))
        try:
            below = os.open(name, _PATH, dir_fd=self.folder)
        except FileNotFoundError:
            self._check_absent(at)
            return False
        except OSError as error:
            raise _unreadable(at, error) from error
        del self._names[0]
        self._given = min(self._given, len(self._names))
        found = os.fstat(below)
        if not stat.S_ISLNK(found.st_mode) and self._names:
            self._enter(at, below)
            return True
        try:
            # NOTE: EINVAL of readlink(2): the file was a link a moment ago.
            self._check_link(at, found)
            self._names[:0] = steps(os.readlink("", dir_fd=below))
        except OSError as error:
            raise _unreadable(at, error) from error
        finally:
            os.close(below)
        return True

    def _enter(self, here: str, folder: int) -> None:
        before, self.folder, self.here = self.folder, folder, here
        if before >= 0:
            os.close(before)
        _check_folder(here, os.fstat(folder), above=len(self._names) > 1)

    def _check_link(self, path: str, found: os.stat_result) -> None:
        _check_owner(path, found, above=bool(self._names))
        _check_hard_links(path, found, self.makers())
        self._links += 1
        if self._links > LINKS_MAX:
            raise Failure(
                Status.NO_POLICY,
                show_path(self.path),
                f"it leads over more than {LINKS_MAX} symbolic links",
                "lead it straight there",
            )

    def _check_absent(self, path: str) -> None:
        """Refuse a link to a name that does not exist: it is a fault, and not an absent policy."""
        if len(self._names) > self._given:
            raise Failure(
                Status.NO_POLICY,
                show_path(self.path),
                f"it leads to {show_path(path)}, which does not exist",
                "lead it to what is there, or take the symbolic link away",
            )


def steps(path: str) -> list[str]:
    """Return the names of a path, with `/` for the root of an absolute one."""
    names = [name for name in path.split("/") if name]
    return ["/", *names] if path.startswith("/") else names


def _check_folder(path: str, found: os.stat_result, *, above: bool) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise Failure(Status.NO_POLICY, show_path(path), "it is not a folder")
    roots = found.st_uid == 0 or (above and is_unmapped(found.st_uid))
    if roots and found.st_mode & stat.S_ISVTX:
        return
    _check_owner_and_mode(path, found, above=above)


def _check_hard_links(path: str, found: os.stat_result, makers: str) -> None:
    # NOTE: in a folder where anybody may make names, a hard link can pass an old file of root's off
    # as the policy. In any other folder only root can make one.
    if makers and found.st_nlink > 1:
        raise Failure(
            Status.UNSAFE,
            show_path(path),
            f"it has {found.st_nlink} hard links, in a folder that {makers} can write",
            "move it to a folder that only root can write",
        )


def _are_links_protected() -> bool:
    """Tell whether users can hard-link only their own files (fs.protected_hardlinks of proc(5))."""
    try:
        with open(PROTECTED_LINKS, encoding="ascii") as file:
            return file.read().strip() == "1"
    except FileNotFoundError:
        return False


def _read(path: str, opened: int, limit: int, *, makers: str = "") -> bytes:
    """Return the first `limit` bytes of what is `opened`, and close it."""
    try:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode):
            raise _not_regular(path)
        _check_owner_and_mode(path, found)
        _check_hard_links(path, found, makers)
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


def _check_owner(path: str, found: os.stat_result, *, above: bool = False) -> None:
    if found.st_uid in (0, os.geteuid()) or (above and is_unmapped(found.st_uid)):
        return
    if is_unmapped(found.st_uid):
        raise Failure(
            Status.UNSAFE,
            show_path(path),
            "a user whom this user namespace does not have owns it, and could change the policy",
            _OWN,
        )
    raise Failure(
        Status.UNSAFE,
        show_path(path),
        f"user {found.st_uid} owns it and could change the policy",
        f"run {sh('chown', *(['-h'] if stat.S_ISLNK(found.st_mode) else []), 'root', file(path))}",
    )


def _check_owner_and_mode(path: str, found: os.stat_result, *, above: bool = False) -> None:
    shown = show_path(path)
    _check_owner(path, found, above=above)
    if found.st_mode & _WRITABLE_BY_OTHERS:
        who = "everybody" if found.st_mode & stat.S_IWOTH else f"group {found.st_gid}"
        raise Failure(
            Status.UNSAFE,
            shown,
            f"{who} can write it (mode {stat.S_IMODE(found.st_mode):04o})",
            _OWN if is_unmapped(found.st_uid) else f"run {sh('chmod', 'go-w', file(path))}",
        )


def show_path(path: str) -> str:
    """Return `path` for a message, on one line whatever its bytes are."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else ascii(text)[1:-1]


def _not_regular(path: str) -> Failure:
    return Failure(Status.NO_POLICY, show_path(path), "it is not a regular file")


def _cannot_open(path: str, error: OSError) -> Failure:
    # A socket; see open(2).
    return _not_regular(path) if error.errno == errno.ENXIO else _unreadable(path, error)


def _unreadable(path: str, error: OSError) -> Failure:
    why = os.strerror(error.errno or 0)
    return Failure(Status.NO_POLICY, show_path(path), f"it cannot be read: {why}")
