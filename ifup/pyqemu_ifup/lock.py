"""Locks in /run/pyqemu-ifup: who has one is alone. It says nothing else, and ends with him."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from functools import partial

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.manners import Watch
from pyqemu_ifup.work import RETRY, Work

RUN = "/run/pyqemu-ifup"
"""Where the locks are, and each network's folder; nothing is decided from what is there."""
TAPS = f"{RUN}/.taps.lock"
"""No network is called so. One byte of it is the lock on a tap, whether it has that byte or not."""

_MAY_NOT = (errno.EACCES, errno.EPERM, errno.EROFS)


class Lock:
    """A lock that is held until `close`, which a `with` calls, or until the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)


def lock_tap(index: int, watch: Watch) -> Work[Lock | None]:
    """Wait for the lock on the tap with this ifindex, in the network namespace of the caller.

    It is for those who change the tap of a running guest though its QEMU has not called: the
    agent, and pyqemu-ifctl apply. Returns None where the caller may not write to that folder.
    Raises Failure: 75 with `watch`, else as `cannot_use`.
    """
    try:
        make_folder(RUN)
        descriptor = open_lock(TAPS)
    except OSError as error:
        if error.errno in _MAY_NOT:
            return None
        raise cannot_use(TAPS, error) from error
    netns = os.stat("/proc/thread-self/ns/net").st_ino
    # NOTE: struct flock of fcntl(2); the inode of a namespace has 32 bits, an offset 63.
    at = (netns & 0x7FFFFFFF) << 32 | index
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)
    lock = Lock(descriptor)
    try:
        # NOTE: the descriptor holds it, not the process: two in one agent are two.
        yield from wait_for(
            partial(fcntl.fcntl, descriptor, fcntl.F_OFD_SETLK, wanted),
            watch, "the agent, or a pyqemu-ifctl apply, has this tap in hand",
        )
    except BaseException:
        lock.close()
        raise
    return lock


def wait_for(take: Callable[[], object], watch: Watch, doing: str) -> Work[None]:
    """Take a lock when nobody has it any more; `take` raises BlockingIOError while somebody does.

    Raises Failure, 75 with `watch`, telling what it was `doing`.
    """
    while True:
        try:
            take()
            return
        except BlockingIOError:
            watch.check(doing)
            yield min(RETRY, watch.remaining())


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
        Status.DENIED if denied else Status.REFUSED, f"cannot use {path}",
        error.strerror or str(error), "run as root" if denied else "see whether /run is there",
    )
