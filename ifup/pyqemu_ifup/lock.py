"""Locks in /run/pyqemu-ifup: who has one is alone. It says nothing else, and ends with him."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Callable
from functools import partial

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import quote
from pyqemu_ifup.manners import Watch
from pyqemu_ifup.work import RETRY, Work

RUN = "/run/pyqemu-ifup"
"""Where the locks are, and each network's folder; root alone writes there."""
TAPS = f"{RUN}/.taps.lock"
"""No network is called so. One byte of it is the lock on a tap, whether it has that byte or not."""

FIRST = 0.002
"""Seconds after which a lock that somebody has is looked at again; twice as long each time."""
_MAY_NOT = (errno.EACCES, errno.EPERM, errno.EROFS)


class Lock:
    """A lock that is held until `close`, which a `with` calls, or until the process ends.

    Without a `descriptor` it is that of one who may not have it, and holds nothing.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor is not None:
            os.close(self._descriptor)


def lock_by_name(tap: str, watch: Watch) -> Work[Lock]:
    """Wait for the lock on the tap that is called so, as `lock_tap`; there is none without one."""
    while True:
        index = index_of(tap)
        if index is None:
            return Lock(None)
        lock = yield from lock_tap(index, watch)
        if index_of(tap) == index:
            return lock
        lock.close()


def lock_tap(index: int, watch: Watch) -> Work[Lock]:
    """Wait for the lock on the tap with this ifindex, in the network namespace of the caller.

    Whoever changes a tap has it, and looks at the tap anew once he has. One who may not write
    there goes on without: as no root he may change no tap of this namespace, but with a bare
    CAP_NET_ADMIN, whose traces the proof at the end and pyqemu-ifctl gc find. Raises Failure: 75
    with `watch`, else as `cannot_use`.
    """
    try:
        make_folder(RUN)
        descriptor, kind = open_lock(TAPS), fcntl.F_WRLCK
    except OSError as error:
        if error.errno not in _MAY_NOT:
            raise cannot_use(TAPS, error) from error
        try:
            # NOTE: whose /run is read-only keeps out all others, but those alike.
            descriptor, kind = os.open(TAPS, os.O_RDONLY | os.O_CLOEXEC), fcntl.F_RDLCK
        except OSError as other:
            if other.errno not in (*_MAY_NOT, errno.ENOENT):
                raise cannot_use(TAPS, other) from other
            return Lock(None)
    netns = os.stat("/proc/thread-self/ns/net").st_ino
    # NOTE: struct flock of fcntl(2); the inode of a namespace has 32 bits, an offset 63.
    at = (netns & 0x7FFFFFFF) << 32 | index
    wanted = struct.pack("hhqqi4x", kind, os.SEEK_SET, at, 1, 0)
    lock = Lock(descriptor)
    try:
        # NOTE: the descriptor holds it, not the process: two in one agent are two.
        yield from wait_for(
            partial(fcntl.fcntl, descriptor, fcntl.F_OFD_SETLK, wanted), watch,
            lambda: f"{_holder(descriptor, (str(at), str(at)))} has this tap in hand",
        )
    except BaseException:
        lock.close()
        raise
    return lock


def lock_file(descriptor: int, watch: Watch, what: str) -> Work[None]:
    """Wait for the lock on a whole open file, which stands for `what`, in words.

    Raises Failure, 75 with `watch`.
    """
    yield from wait_for(
        partial(fcntl.flock, descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB), watch,
        lambda: f"{_holder(descriptor, ('0', 'EOF'))} has {what} in hand",
    )


def wait_for(take: Callable[[], object], watch: Watch, doing: Callable[[], str]) -> Work[None]:
    """Take a lock when nobody has it any more; `take` raises BlockingIOError while somebody does.

    Raises Failure, 75 with `watch`; `doing` tells what was waited for.
    """
    pause = FIRST
    while True:
        try:
            take()
            return
        except BlockingIOError:
            if not watch.remaining():
                raise watch.expired(doing()) from None
            watch.check()
            yield min(pause, watch.remaining())
            pause = min(2 * pause, RETRY)


def index_of(tap: str) -> int | None:
    """Return the ifindex of a link, None where there is none of this name."""
    try:
        return socket.if_nametoindex(tap)
    except OSError:
        # ENODEV, the only one; before Python 3.12 no errno is set.
        return None


def _holder(descriptor: int, place: tuple[str, str]) -> str:
    """Return in words who holds a lock on an open file, from `place` on: its first and last byte.

    The last line but one of proc_pid_fdinfo(5).
    """
    wanted = os.fstat(descriptor)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            # NOTE: nobody but root can open it; others may have more descriptors than we have time.
            if os.stat(f"/proc/{pid}").st_uid != wanted.st_uid:
                continue
            for number in os.listdir(f"/proc/{pid}/fd"):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), wanted):
                    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as file:
                        lines = [line.split() for line in file if line.startswith("lock:")]
                    if any(tuple(words[-2:]) == place for words in lines):
                        with open(f"/proc/{pid}/comm", errors="replace") as file:
                            return f"process {pid} ({file.read().strip()})"
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH, *_MAY_NOT):
                raise
    return "another process"


def make_folder(path: str) -> None:
    """Make a folder that all may look into, where it is not there. Raises OSError."""
    try:
        os.mkdir(path, 0o755)
        os.chmod(path, 0o755)
    except FileExistsError:
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise


def open_lock(path: str) -> int:
    """Open a file of root's alone, made where it is not there. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def cannot_use(path: str, error: OSError) -> Failure:
    """Return the Failure, 77 or 71, of one who could not open a lock."""
    denied = isinstance(error, PermissionError)
    return Failure(
        Status.DENIED if denied else Status.REFUSED, f"cannot use {quote(path)}",
        error.strerror or str(error), "run as root" if denied else "see whether /run is there",
    )
