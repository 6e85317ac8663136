"""The policy cache: the policy is read once, and again when its files have changed.

Whether they have is looked at before each request and each of the agent's own tasks, and now and
then where there are none.
"""

from __future__ import annotations

import errno
import gc
import os
import pickle
import resource
import select
import signal
import syslog
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import ETC, load_host_policy, load_policy
from pyqemu_ifconf.policy import DEFAULT_TIMEOUT, Policy
from pyqemu_ifd.snapshot import Observer, Snapshot, take_snapshot
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.hook import log
from pyqemu_ifup.system.forked import fork_with
from pyqemu_ifup.task import pause

SETTLE = 0.05
"""Seconds for an editor to finish what it does to a file: nothing has changed for so long."""
SETTLE_MAX = 1.0
"""Seconds after the first change in which a policy that goes on changing is not read."""
EVERY = 1.0
"""Seconds without a request after which the files are looked at."""
SMALL = 8192
"""Bytes of a policy that is read at once: no hook notices."""
READER_SECONDS = 60
"""Seconds of processor time that the reader of a larger one may take."""
MUTE = Failure(
    Status.TRY_AGAIN,
    "cannot look whether the policy has changed",
    "its files do not answer",
    "see whether the file server that they are on does",
)


@dataclass(frozen=True)
class _Change:
    """Files that are not as they were read: what they are like, and since when, as was seen."""

    found: Snapshot
    since: float
    first: float
    """When they were first seen to change; both in seconds of time.monotonic()."""

    def is_settled(self) -> bool:
        """Tell whether nothing has changed for long enough, or all too much has."""
        now = time.monotonic()
        if now >= self.since + SETTLE or now >= self.first + SETTLE_MAX:
            return True
        # NOTE: a clock that is ahead of ours, as a file server's may be, does not tell.
        return time.time_ns() - self.found.changed >= SETTLE * 1e9


class PolicyCache:
    """The last good policy, of `file` or of the folder `etc`.

    A broken edit keeps the last good one in force; `failure` is what is wrong with it.
    """

    def __init__(self, file: str | None, etc: str = ETC) -> None:
        self.file = file
        self.etc = etc
        self.policy: Policy | None = None
        self.loaded = 0.0
        """When the policy in force was read, in seconds of time.time()."""
        self.reads = 0
        """How often the files have been read since the start."""
        self._failure: Failure | None = None
        self._observer = Observer(file, etc)
        self._is_mute = False
        """Whether the files do not let themselves be looked at."""
        self._looked = time.monotonic()
        """When they were looked at last."""
        self._is_asked = False
        """Whether to read them whatever they are like."""
        self._reader: tuple[int, int] | None = None
        """The process that reads the policy, and the pipe from it."""
        self._told: list[bytes] = []
        """What the reader has told so far."""
        self._poll = select.epoll()
        # NOTE: looked at first, so that a change while they are read is seen afterwards.
        change = _Change(take_snapshot(file, etc), self._looked, self._looked)
        is_settled = change.is_settled()
        self._put(self._read())
        self._known = change.found if is_settled else None
        """What the files were like when they were read; None: that was while they changed."""
        self._change = None if is_settled else change
        """The change that is still to be read."""
        self._reading = change
        """The change that is being read, or was last."""

    def fileno(self) -> int:
        """Return what turns readable when there is something to `take`."""
        return self._poll.fileno()

    def close(self) -> None:
        """Stop looking, and reading."""
        if self._reader is not None:
            os.kill(self._reader[0], signal.SIGKILL)
            self._end_reader(self._reader)
        self._observer.close()
        self._poll.close()

    @property
    def failure(self) -> Failure | None:
        """What is wrong with the files as they are now."""
        return MUTE if self._is_mute else self._failure

    @property
    def due(self) -> float | None:
        """When to `look` though nobody asks, in seconds of time.monotonic(); None: `take` first."""
        if self._reader is not None:
            return None
        if self._change is not None and not self._is_mute:
            return self._change.since + SETTLE
        return self._looked + EVERY

    @property
    def timeout(self) -> int:
        """Whole seconds that an up may take: the policy's, or the default until there is one."""
        return self.policy.timeout if self.policy is not None else DEFAULT_TIMEOUT

    def get(self) -> Policy:
        """Return the policy in force. Raises Failure where there has never been a good one."""
        if self.policy is None:
            assert self.failure is not None
            raise self.failure
        return self.policy

    async def current(self, deadline: Deadline) -> Policy:
        """Return the same once files that change just now have been read.

        Nobody waits for a larger policy: the one before stays in force until it has been read.
        Raises Failure, also 75.
        """
        end = time.monotonic() + 2 * SETTLE
        while self._change is not None and time.monotonic() < end:
            deadline.check("the policy is being changed")
            await pause(SETTLE)
        return self.get()

    def reload(self) -> None:
        """Read the policy whether it has changed or not, and say in syslog what comes of it."""
        self._is_asked = True
        self.look()

    def look(self) -> None:
        """Look whether the files have changed; where they have, and are at rest, read them.

        And say in syslog what comes of it. A larger policy is read by a process of its own, and
        taken in by `take` later: meanwhile the one before stays in force, and no hook waits.
        """
        now = self._looked = time.monotonic()
        if self._reader is not None:
            return
        change = self._change
        found = self._observe(self._known if change is None else change.found)
        if found is None:
            return
        if found == self._known and not self._is_asked:
            self._change = None
            return
        if change is None or found != change.found:
            change = _Change(found, now, now if change is None else change.first)
        self._change = change
        if not change.is_settled():
            return
        self._is_asked = False
        self._change, self._reading = None, change
        if found.size <= SMALL or not self._start_reader():
            self._end(self._read())

    def take(self) -> None:
        """Take in what the reader has told, if anything."""
        if self._reader is None:
            return
        try:
            data = os.read(self._reader[1], 1 << 20)
        except BlockingIOError:
            return
        if data:
            self._told.append(data)
            return
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
        self._end(found)

    def _observe(self, known: Snapshot | None) -> Snapshot | None:
        """Return what the files are like now, None where they cannot be looked at."""
        found = self._observer.look(known)
        if (found is None) != self._is_mute:
            self._is_mute = found is None
            if self._is_mute:
                log(syslog.LOG_ERR, f"policy: {MUTE}{self._kept()}")
            else:
                log(syslog.LOG_INFO, "policy: its files can be looked at again")
        return found

    def _end(self, found: Policy | Failure) -> None:
        """Take in what was read, unless the files have changed meanwhile: then it is read again."""
        change = self._reading
        after = self._observe(change.found)
        now = time.monotonic()
        if after is not None and after != change.found and now < change.first + SETTLE_MAX:
            # NOTE: half of it may be from before, and half from after.
            self._change = _Change(after, now, change.first)
            return
        self._known = change.found
        self.reads += 1
        self._put(found)

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
        before = self._failure
        if isinstance(found, Failure):
            self._failure = found
            if str(found) != str(before):
                log(syslog.LOG_ERR, f"policy: {found}{self._kept()}")
            return
        policy = found
        self._failure = None
        if policy != self.policy or before is not None:
            self.policy = policy
            self.loaded = time.time()
            log(
                syslog.LOG_INFO,
                f"policy: {len(policy.networks)} networks, {len(policy.rules)} rules in force",
            )

    def _kept(self) -> str:
        return "; the last good policy stays in force" if self.policy else ""


def load_told(told: bytes) -> Any:
    """Return what the reader has told: a policy, and what a Failure is of in its place."""
    gc.disable()  # NOTE: it would look through all that is being made, again and again.
    try:
        return pickle.loads(told)
    finally:
        gc.enable()
