"""The policy as the agent keeps it: read once, and again when its files change (inotify(7))."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import pickle
import resource
import select
import signal
import struct
import syslog
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import DROP_INS, ETC, MAIN_FILE, load_host_policy, load_policy
from pyqemu_ifconf.policy import Policy
from pyqemu_ifconf.trust import LINKS_MAX, steps
from pyqemu_ifup.forked import fork_with
from pyqemu_ifup.manners import log

IN_CHANGES = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
"""IN_MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF, MOVE_SELF."""
IN_Q_OVERFLOW, IN_IGNORED = 0x4000, 0x8000
IN_NONBLOCK, IN_CLOEXEC = 0x800, 0x80000
EVENT = struct.Struct("iIII")
SETTLE = 0.05
"""Seconds for an editor to finish what it does to a file."""
SMALL = 8192
"""Bytes of a policy that is read at once: no hook notices."""
READER_SECONDS = 60
"""Seconds of processor time that the reader of a larger one may take."""


class PolicyCache:
    """The last good policy, of `file` or of the folder `etc`.

    A broken edit keeps the last good one in force; `failure` is what is wrong with it. Raises
    Failure (71) where the kernel gives no means of watching files.
    """

    def __init__(self, file: str | None, etc: str = ETC) -> None:
        self.file = file
        self.etc = etc
        self.policy: Policy | None = None
        self.failure: Failure | None = None
        self.loaded = 0.0
        """When the policy in force was read, in seconds of time.time()."""
        self._reader: tuple[int, int] | None = None
        """The process that reads the policy, and the pipe from it."""
        self._told: list[bytes] = []
        """What the reader has told so far."""
        self._again = False
        """Whether the policy has changed since the reader began."""
        self._watched: dict[int, frozenset[str] | None] = {}
        """For each watch the names that count in its folder, None where each does."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify: int = self._libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC)
        if self._inotify < 0:
            raise _no_watch("inotify_init1(2)")
        self._poll = select.epoll()
        self._poll.register(self._inotify, select.EPOLLIN)
        self._watch_all()
        self._put(self._read())

    def fileno(self) -> int:
        """Return what turns readable when there is something to `drain`, or to `take`."""
        return self._poll.fileno()

    def close(self) -> None:
        """Stop watching, and reading."""
        if self._reader is not None:
            os.kill(self._reader[0], signal.SIGKILL)
            self._end_reader(self._reader)
        self._poll.close()
        os.close(self._inotify)

    def get(self) -> Policy:
        """Return the policy in force. Raises Failure where there has never been a good one."""
        if self.policy is None:
            assert self.failure is not None
            raise self.failure
        return self.policy

    def load(self) -> bool:
        """Read the policy again, and say in syslog what came of it; tell whether that is done.

        A larger one is read by a process of its own, and taken in by `take` later: meanwhile the
        one before stays in force, and no hook waits.
        """
        if self._reader is not None:
            self._again = True
            return False
        # NOTE: watched first, so that a change while it is read is not missed.
        try:
            self._watch_all()
        except Failure as failure:
            self._put(failure)
            return True
        if self._size() <= SMALL or not self._start_reader():
            self._put(self._read())
            return True
        return False

    def take(self) -> bool:
        """Take in what the reader has told, if anything; tell whether it has ended."""
        if self._reader is None:
            return False
        try:
            data = os.read(self._reader[1], 1 << 20)
        except BlockingIOError:
            return False
        if data:
            self._told.append(data)
            return False
        self._end_reader(self._reader)
        told, self._told = b"".join(self._told), []
        found: Policy | Failure = Failure(
            Status.TRY_AGAIN,
            "the policy was not read",
            "its reader has ended before",
            "see syslog; make the policy smaller",
        )
        if told:
            policy, given = load_told(told)
            found = policy if policy is not None else Failure(*given)
        self._put(found)
        if self._again:
            self._again = False
            self.load()
        return True

    def _size(self) -> int:
        """Return how many bytes the policy has, as far as that can be told."""
        return sum(map(_size_of, self._files()))

    def _files(self) -> list[str]:
        """Return what the policy may be made of, as far as that can be told."""
        if self.file is not None:
            return [self.file]
        folder = os.path.join(self.etc, DROP_INS)
        try:
            names = os.listdir(folder)
        except OSError:
            names = []
        return [os.path.join(self.etc, MAIN_FILE), *(os.path.join(folder, name) for name in names)]

    def _read(self) -> Policy | Failure:
        try:
            if self.file is not None:
                return load_policy([self.file])
            return load_host_policy({}, self.etc)
        except Failure as failure:
            return failure

    def _start_reader(self) -> bool:
        """Have a process read the policy; tell whether there is room for one."""
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            # NOTE: nobody's connection or tap is to last as long as this process.
            pid = fork_with((0, 1, 2, theirs))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM):
                raise
            os.close(ours)
            os.close(theirs)
            return False
        if pid == 0:
            self._be_reader(theirs)
        os.close(theirs)
        os.set_blocking(ours, False)
        self._reader = (pid, ours)
        self._poll.register(ours, select.EPOLLIN)
        return True

    def _be_reader(self, pipe: int) -> NoReturn:
        """Tell what the policy is, as the process that has just been made for it, and end."""
        status = 1
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CPU, (READER_SECONDS, READER_SECONDS))
            found = self._read()
            told = (None, found.args) if isinstance(found, Failure) else (found, None)
            if not isinstance(found, Failure):
                # NOTE: it comes along, so that no hook has to wait for it.
                assert found.index is not None
            with open(pipe, "wb") as file:
                pickle.dump(told, file)
            status = 0
        finally:
            os._exit(status)

    def _end_reader(self, reader: tuple[int, int]) -> None:
        pid, pipe = reader
        self._reader = None
        self._poll.unregister(pipe)
        os.close(pipe)
        os.waitpid(pid, 0)

    def _put(self, found: Policy | Failure) -> None:
        """Put what was read in force, where it is a policy, and say in syslog what came of it."""
        before = self.failure
        if isinstance(found, Failure):
            self.failure = found
            if str(found) != str(before):
                kept = "; the last good policy stays in force" if self.policy else ""
                log(syslog.LOG_ERR, f"policy: {found}{kept}")
            return
        policy = found
        self.failure = None
        if policy != self.policy or before is not None:
            self.policy = policy
            self.loaded = time.time()
            log(
                syslog.LOG_INFO,
                f"policy: {len(policy.networks)} networks, {len(policy.rules)} rules in force",
            )

    def drain(self) -> bool:
        """Take in what inotify has told; tell whether the policy must be read again."""
        changed = False
        while True:
            try:
                data = os.read(self._inotify, 65536)
            except BlockingIOError:
                return changed
            at = 0
            while at < len(data):
                watch, mask, _, length = EVENT.unpack_from(data, at)
                name = data[at + EVENT.size : at + EVENT.size + length].rstrip(b"\0")
                at += EVENT.size + length
                if mask & IN_IGNORED:
                    self._watched.pop(watch, None)
                    continue
                only = self._watched.get(watch)
                changed = changed or only is None or os.fsdecode(name) in only

    def _folders(self) -> list[tuple[str, str | None]]:
        """Return the folders to watch, and of each one name that counts, None for all.

        A folder that is not there yet is seen to come in the nearest one that is; a symbolic link
        is seen to lead elsewhere.
        """
        if self.file is not None:
            folders = [os.path.dirname(os.path.abspath(self.file))]
        else:
            folders = [self.etc, os.path.join(self.etc, DROP_INS)]
        found: list[tuple[str, str | None]] = [(folder, None) for folder in folders]
        folder = folders[0]
        while not os.path.isdir(folder):
            folder, name = os.path.split(folder)
            found.append((folder, name))
        parent, name = os.path.split(folder)
        if name:
            found.append((parent, name))
        for path in (*self._files(), *folders):
            found += _beyond_links(path)
        return found

    def _watch_all(self) -> None:
        watched: dict[int, frozenset[str] | None] = {}
        for folder, only in self._folders():
            watch = self._watch(folder)
            names = watched.get(watch, frozenset())
            if watch >= 0:
                watched[watch] = None if only is None or names is None else names | {only}
        for watch in self._watched.keys() - watched.keys():
            self._libc.inotify_rm_watch(self._inotify, watch)
        self._watched = watched

    def _watch(self, folder: str) -> int:
        """Watch `folder` and return the number of that, -1 where there is no such folder."""
        # NOTE: one that is watched already keeps its number, by whatever path it is come to.
        watch: int = self._libc.inotify_add_watch(self._inotify, os.fsencode(folder), IN_CHANGES)
        if watch < 0:
            code = ctypes.get_errno()
            if code not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                raise _no_watch(f"inotify_add_watch(2) of {folder}")
        return watch


def _beyond_links(path: str) -> Iterator[tuple[str, str]]:
    """Yield each folder and the name in it that decide where `path` leads, from its first link on.

    Nothing without a symbolic link.
    """
    here, links = "/", 0
    names = steps(os.path.abspath(path))[1:]
    while names and links <= LINKS_MAX:
        name = names.pop(0)
        at = os.path.normpath(os.path.join(here, name))
        try:
            target = os.readlink(at)
        except OSError:
            # No link, or it is told of when the policy is read.
            target = ""
        links += bool(target)
        if links:
            yield here, name
        if target:
            names[:0] = steps(target)
        else:
            here = at


def load_told(told: bytes) -> Any:
    """Return what the reader has told: a policy, and what a Failure is of in its place."""
    gc.disable()  # NOTE: it would look through all that is being made, again and again.
    try:
        return pickle.loads(told)
    finally:
        gc.enable()


def _size_of(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        # It is read all the same, and told of then.
        return 0


def _no_watch(what: str) -> Failure:
    why = os.strerror(ctypes.get_errno())
    return Failure(
        Status.REFUSED,
        "cannot watch the policy",
        f"{what}: {why}",
        "raise fs.inotify.max_user_instances and max_user_watches (sysctl)",
    )
