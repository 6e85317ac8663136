"""The policy as the agent keeps it: read once, and again when its files change (inotify(7))."""

from __future__ import annotations

import ctypes
import errno
import os
import syslog
import time

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.load import DROP_INS, ETC, load_host_policy, load_policy
from pyqemu_ifconf.policy import Policy
from pyqemu_ifup.manners import log

IN_CHANGES = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
"""IN_MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF, MOVE_SELF."""
IN_NONBLOCK, IN_CLOEXEC = 0x800, 0x80000
SETTLE = 0.05
"""Seconds for an editor to finish what it does to a file."""


class PolicyKeeper:
    """The last good policy, of `file` or of this host; `changed` says that it must be read again.

    A broken edit keeps the last good one in force; `failure` is what is wrong with it.
    """

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.policy: Policy | None = None
        self.failure: Failure | None = None
        self.loaded = 0.0
        """When the policy in force was read, in seconds of time.time()."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = self._libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC)
        if self._inotify < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self.load()

    def fileno(self) -> int:
        """Return the descriptor that turns readable when a file of the policy changes."""
        return int(self._inotify)

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
        # NOTE: watched first, so that a change while it is read is not missed.
        for folder in self._folders():
            self._watch(folder)
        before = self.failure
        try:
            if self.file is not None:
                policy = load_policy([self.file])
            else:
                policy = load_host_policy({})
        except Failure as failure:
            self.failure = failure
            if str(failure) != str(before):
                kept = "; the last good policy stays in force" if self.policy else ""
                log(syslog.LOG_ERR, f"policy: {failure}{kept}")
            return
        self.failure = None
        if policy != self.policy:
            self.policy = policy
            self.loaded = time.time()
            log(
                syslog.LOG_INFO,
                f"policy: {len(policy.networks)} networks, {len(policy.rules)} rules in force",
            )

    def drain(self) -> None:
        """Take in what inotify has told."""
        while True:
            try:
                os.read(self._inotify, 65536)
            except BlockingIOError:
                return

    def _folders(self) -> list[str]:
        if self.file is not None:
            return [os.path.dirname(os.path.abspath(self.file))]
        return [os.path.dirname(ETC), ETC, os.path.join(ETC, DROP_INS)]

    def _watch(self, folder: str) -> None:
        # A folder that is watched already is told from a new one by the kernel itself.
        if self._libc.inotify_add_watch(self._inotify, os.fsencode(folder), IN_CHANGES) >= 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            raise OSError(code, os.strerror(code), folder)
