"""Locks in /run/pyqemu-ifup: who has one is alone. It says nothing else, and ends with him."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from pyqemu_ifconf.failure import Failure, Forbidden, Lacking, Status
from pyqemu_ifconf.ids import is_alone
from pyqemu_ifconf.shell import quote, readable
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.system.process import descriptors_of, owner_of, process_name, read_fdinfo, real_uid
from pyqemu_ifup.task import RETRY, Task, pause

RUN = "/run/pyqemu-ifup"
"""Where the locks are, and each network's folder; root alone writes there."""
TAPS = f"{RUN}/.taps.lock"
"""No network is called so. One byte of it is the lock on a tap, whether it has that byte or not."""

L = TypeVar("L", bound="Lock")

FIRST = 0.002
"""Seconds after which a lock that somebody has is looked at again; twice as long each time."""
LAST = 1 << 62
"""Where the places in line of those who let all others go first begin, in the file of a lock."""
SEARCH = 0.1
"""Seconds of the processor that it may take to find who has a lock."""
PIECE = 0.002
"""Seconds of the processor after which others of the same process go on before that search does."""
FEW = 64
"""Descriptors of a process that are looked at before it is asked whose it is, which costs more."""
_MAY_NOT = (errno.EACCES, errno.EPERM, errno.EROFS)


class Lock:
    """A lock that is held until `close`, which a `with` calls, or until the process ends.

    Without a `descriptor` it is that of one who may not have it, and holds nothing.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def __enter__(self: L) -> L:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor is not None:
            os.close(self._descriptor)


async def lock_by_name(tap: str, deadline: Deadline) -> Lock:
    """Wait for the lock on the tap that is called so, as `lock_tap`; there is none without one."""
    while True:
        index = index_of(tap)
        if index is None:
            return Lock(None)
        lock = await lock_tap(index, deadline)
        if index_of(tap) == index:
            return lock
        lock.close()


async def lock_tap(index: int, deadline: Deadline) -> Lock:
    """Wait for the lock on the tap with this ifindex, in the network namespace of the caller.

    Whoever changes a tap has it, and looks at the tap anew once he has. One who may not write
    there goes on without: as no root he may change no tap of this namespace, but with a bare
    CAP_NET_ADMIN, whose traces the proof at the end and pyqemu-ifctl gc find. Raises Failure: 75
    by the deadline, else as `cannot_use`.
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
    # NOTE: the inode of a namespace has 32 bits, an offset 63.
    at = (netns & 0x7FFFFFFF) << 32 | index
    wanted = _flock(kind, at, 1)
    lock = Lock(descriptor)

    async def who_has_it() -> str:
        holder = await _holder(descriptor, str(at), str(at))
        return f"{holder or 'another process'} has this tap in hand"

    try:
        # NOTE: the descriptor holds it, not the process: two in one agent are two.
        take = partial(fcntl.fcntl, descriptor, fcntl.F_OFD_SETLK, wanted)
        await wait_for(take, deadline, who_has_it)
    except BaseException:
        lock.close()
        raise
    return lock


async def lock_file(descriptor: int, deadline: Deadline, what: str, *, last: bool = False) -> None:
    """Wait for the lock on a whole open file, which stands for `what`, in words.

    They have it in the order in which their deadlines began, but who comes `last` after all others.
    Raises Failure, 75 by the deadline.
    """
    # NOTE: a byte of the file, whether it has that byte or not, is a place in line. Who looks only
    # now and then whether a lock is free would be passed by those who come just then.
    place = int(deadline.start * 1e9) + (LAST if last else 0)
    while not _lock_byte(descriptor, fcntl.F_WRLCK, place):
        place += 1
    before: int | None = None

    def take() -> None:
        nonlocal before
        before = _locked_before(descriptor, place)
        if before is not None:
            raise BlockingIOError
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    async def who_has_it() -> str:
        holder = await _holder(descriptor, "0", "EOF")
        if holder is None and before is not None:
            holder = await _holder(descriptor, str(before), str(before))
        return f"{holder or 'another process'} has {what} in hand"

    await wait_for(take, deadline, who_has_it, lambda: FIRST if before is None else RETRY)
    _lock_byte(descriptor, fcntl.F_UNLCK, place)


def _flock(kind: int, start: int, length: int) -> bytes:
    """Return the struct flock of fcntl(2)."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)


def _lock_byte(descriptor: int, kind: int, at: int) -> bool:
    """Lock a byte for this open file, or unlock it; tell whether it was free. Raises OSError."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(kind, at, 1))
    except BlockingIOError:
        return False
    return True


def _locked_before(descriptor: int, end: int) -> int | None:
    """Return a byte before `end` that another open file has locked, None where there is none."""
    found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, 0, end))
    kind, _, at = struct.unpack_from("hhq", found)
    return None if kind == fcntl.F_UNLCK else at


async def wait_for(
    take: Callable[[], object],
    deadline: Deadline,
    who_has_it: Callable[[], Task[str]],
    longest: Callable[[], float] = lambda: RETRY,
) -> None:
    """Take a lock when nobody has it any more; `take` raises BlockingIOError while somebody does.

    It is tried again after `longest` seconds at the most. Raises Failure (75); `who_has_it`
    tells what was waited for.
    """
    seconds = FIRST
    while True:
        try:
            take()
            return
        except BlockingIOError:
            if not deadline.remaining():
                raise deadline.expired(await who_has_it()) from None
            deadline.check()
            seconds = min(seconds, longest())
            await pause(min(seconds, deadline.remaining()))
            seconds *= 2


def index_of(tap: str) -> int | None:
    """Return the ifindex of a link, None where there is none of this name."""
    try:
        return socket.if_nametoindex(tap)
    except OSError:
        # ENODEV, the only one; before Python 3.12 no errno is set.
        return None


async def _holder(descriptor: int, first: str, last: str) -> str | None:
    """Return in words who has a lock on these bytes of an open file, None where nobody is found.

    The last line but one of proc_pid_fdinfo(5). It takes SEARCH seconds of the processor at most.
    """
    end = "/" + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    wanted = os.fstat(descriptor)
    spent, began = 0.0, time.thread_time()
    # NOTE: who waits has most often met one that began lately.
    for pid in sorted(map(int, filter(str.isdigit, os.listdir("/proc"))), reverse=True):
        took = time.thread_time() - began
        if took > PIECE:
            await pause(0.0)
            spent, began = spent + took, time.thread_time()
        if spent > SEARCH:
            return None
        try:
            if _has_locked(pid, end, wanted, (first, last), began + SEARCH - spent):
                return f"process {pid} ({readable(process_name(pid))})"
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH, *_MAY_NOT):
                raise
    return None


def _has_locked(
    pid: int, end: str, wanted: os.stat_result, span: tuple[str, str], until: float
) -> bool:
    """Tell whether a process of the file's owner has locked these bytes of it. Raises OSError.

    `end` is that of the file's path, and `until` the thread's time when the look ends.
    """
    # NOTE: nobody but root can open it; others, and a su(1) of theirs, may have more descriptors
    # than we have time.
    if owner_of(pid) != wanted.st_uid:
        return False
    with os.scandir(descriptors_of(pid)) as entries:
        for count, entry in enumerate(entries):
            if count == FEW and real_uid(pid) != wanted.st_uid:
                return False
            if count % FEW == 0 and time.thread_time() > until:
                return False
            try:
                # NOTE: not stat(2), for which another's file may keep us waiting.
                if not os.readlink(entry.path).endswith(end):
                    continue
                locks = [line.split() for line in read_fdinfo(pid, entry.name, "lock")]
            except FileNotFoundError:
                continue
            of_it = f":{wanted.st_ino}"
            if any(words[-3].endswith(of_it) and (*words[-2:],) == span for words in locks):
                return real_uid(pid) == wanted.st_uid
    return False


def make_folder(path: str) -> None:
    """Make a folder that all may look into, where it is not there. Raises OSError."""
    try:
        os.mkdir(path, 0o755)
        os.chmod(path, 0o755)
    except FileExistsError:
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise


def network_folders() -> list[str]:
    """Return the names of the folders that networks have there, of any network namespace."""
    try:
        with os.scandir(RUN) as entries:
            return [each.name for each in entries if each.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def open_lock(path: str) -> int:
    """Open a file of root's alone, made where it is not there. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def require_folder(folder: str) -> None:
    """Check that a network's lock could be opened, and its folder made; changes nothing.

    Raises Failure as `cannot_use`, of the error that the kernel would give.
    """
    places = (f"{folder}/lock", folder, RUN)
    there = next(filter(os.path.lexists, places), os.path.dirname(RUN))
    try:
        # NOTE: access(2) tells no errno here, and the kernel asks in this order.
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not os.access(there, os.W_OK | (os.X_OK if os.path.isdir(there) else 0)):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise cannot_use(folder, error) from error


def cannot_use(path: str, error: OSError) -> Failure:
    """Return the Failure, 77 or 71, of one who could not open a lock."""
    what, why = f"cannot use {quote(path)}", error.strerror or str(error)
    if isinstance(error, PermissionError):
        if not (os.geteuid() == 0 and is_alone()):
            return Forbidden(what, why)
        remedy = "have a /run of one's own: unshare -Urnm, and in it: mount -t tmpfs run /run"
        return Failure(Status.DENIED, what, why, remedy)
    if error.errno == errno.EROFS:
        # NOTE: a container whose root is read-only.
        return Lacking(Status.REFUSED, what, why, "--tmpfs /run")
    return Failure(Status.REFUSED, what, why, "see whether /run is there, and can be written to")
