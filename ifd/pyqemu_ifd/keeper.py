"""The policy as the agent keeps it: read once, and again when its files change (inotify(7))."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import syslog
import time

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import DROP_INS, ETC, load_host_policy, load_policy
from pyqemu_ifconf.policy import Policy
from pyqemu_ifup.manners import log

IN_CHANGES = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
"""IN_MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF, MOVE_SELF."""
IN_Q_OVERFLOW, IN_IGNORED = 0x4000, 0x8000
IN_NONBLOCK, IN_CLOEXEC = 0x800, 0x80000
EVENT = struct.Struct("iIII")
SETTLE = 0.05
"""Seconds for an editor to finish what it does to a file."""


class PolicyKeeper:
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
        self._watched: dict[int, str | None] = {}
        """For each watch the one name that counts in its folder, None where each does."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify: int = self._libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC)
        if self._inotify < 0:
            raise _no_watch("inotify_init1(2)")
        self._watch_all()
        self.load()

    def fileno(self) -> int:
        """Return the descriptor that turns readable when there is something to `drain`."""
        return self._inotify

    def close(self) -> None:
        """Stop watching."""
        os.close(self._inotify)

    def get(self) -> Policy:
        """Return the policy in force. Raises Failure where there has never been a good one."""
        if self.policy is None:
            assert self.failure is not None
            raise self.failure
        return self.policy

    def load(self) -> None:
        """Read the policy again, and say in syslog what came of it."""
        before = self.failure
        try:
            # NOTE: watched first, so that a change while it is read is not missed.
            self._watch_all()
            if self.file is not None:
                policy = load_policy([self.file])
            else:
                policy = load_host_policy({}, self.etc)
        except Failure as failure:
            self.failure = failure
            if str(failure) != str(before):
                kept = "; the last good policy stays in force" if self.policy else ""
                log(syslog.LOG_ERR, f"policy: {failure}{kept}")
            return
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
                changed = changed or only is None or os.fsdecode(name) == only

    def _folders(self) -> list[tuple[str, str | None]]:
        """Return the folders to watch, and of each the one name that counts, None for all.

        A folder that is not there yet is seen to come in the nearest one that is.
        """
        if self.file is not None:
            folders = [os.path.dirname(os.path.abspath(self.file))]
        else:
            folders = [self.etc, os.path.join(self.etc, DROP_INS)]
        found: list[tuple[str, str | None]] = [(folder, None) for folder in folders]
        folder = folders[0]
        while not os.path.isdir(folder):
            folder, name = os.path.split(folder)
            found.insert(0, (folder, name))
        parent, name = os.path.split(folder)
        if name:
            found.insert(0, (parent, name))
        return found

    def _watch_all(self) -> None:
        for folder, only in self._folders():
            self._watch(folder, only)

    def _watch(self, folder: str, only: str | None) -> None:
        # A folder that is watched already keeps its number.
        watch = self._libc.inotify_add_watch(self._inotify, os.fsencode(folder), IN_CHANGES)
        if watch >= 0:
            self._watched[watch] = only
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            raise _no_watch(f"inotify_add_watch(2) of {folder}")


def _no_watch(what: str) -> Failure:
    why = os.strerror(ctypes.get_errno())
    return Failure(
        Status.REFUSED, "cannot watch the policy", f"{what}: {why}",
        "raise fs.inotify.max_user_instances and max_user_watches (sysctl)",
    )
