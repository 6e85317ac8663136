"""Looks at and closes what unprivileged clients send, where nobody else is kept waiting by that.

close(2) of a descriptor may last as long as its maker likes: a TCP socket lingers (SO_LINGER of
socket(7)), a file of FUSE asks its server. So does the close of a connection in whose queue such
a socket lies unread. A signal ends the lingering (sk_stream_wait_close of net/core/stream.c);
nothing but its server ends the wait for a file of FUSE, each close of which waits: that of a child
too, before it executes a program.

The close that waits for a connection is the last one, and a child, or a thread with a table of its
own, begins with a copy of each. So none of them may find that its copy is the last: no thread
closes connections, and whoever makes a copy goes on when all but what is needed of it is closed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.system.forked import close_but, fork_with

T = TypeVar("T")

PROD = signal.SIGUSR1
"""What a thread is sent whose close(2) waits; whoever makes a Closer catches it."""
PROD_FIRST, PROD_LAST = 0.02, 1.0
"""Seconds after which a thread that waits is sent it: twice as long each time, this at the most."""
OF_USER = 4
"""Threads that may wait to close what they have looked at: of a user."""
OF_NEW, OF_ALL = 32, 56
"""Of all together, beyond which there is room for the users we know alone, or for none."""
CLONE_FILES = 0x400
"""linux/sched.h."""
ENDS_OF_USER, ENDS_MAX = 2, 32
"""Processes that connections of a user, or of all, may keep from their end; no more are made."""


class Closer:
    """Threads that look and close, and processes that hang up, while there is something to do.

    `closed` are the users of the connections that are really gone by now, for the caller to take.
    """

    def __init__(self) -> None:
        self.closed: deque[int] = deque()
        self.wakeup = 2
        """What a signal's handler writes to (signal.set_wakeup_fd()), in whatever thread."""
        self._lock = threading.Lock()
        self._connections: dict[int, list[int]] = {}
        """The descriptors of each user's connections that are to be closed."""
        self._ends: dict[int, tuple[int, int]] = {}
        """The processes that have connections to close: of which user, and how many."""
        self._ends_due = 0.0
        """When to look at them again, and the earliest time for the next."""
        self._held: Counter[int] = Counter()
        """The threads for each user that have not come to their end."""
        self._busy: dict[int, _Wait] = {}
        """The threads that are in close(2)."""

    def has_room(self, uid: int, *, known: bool) -> bool:
        """Tell whether a descriptor of the user's may be looked at now."""
        with self._lock:
            return self._held[uid] < OF_USER and self._held.total() < (OF_ALL if known else OF_NEW)

    @property
    def due(self) -> float | None:
        """When `prod` has something to do, in seconds of time.monotonic()."""
        with self._lock:
            idle = not (self._busy or self._held)
            times = [each.due for each in self._busy.values()]
        times += [] if idle or times else [time.monotonic() + PROD_FIRST]
        times += [self._ends_due] if self._connections or self._ends else []
        return min(times, default=None)

    def prod(self) -> None:
        """Hang up, and send a signal to each thread that has waited in close(2) for long."""
        now = time.monotonic()
        if now >= self._ends_due and (self._connections or self._ends):
            self._let_end()
            self._close_connections()
            self._ends_due = time.monotonic() + PROD_FIRST
        with self._lock:
            for thread, wait in self._busy.items():
                if now >= wait.due:
                    signal.pthread_kill(thread, PROD)
                    wait.pause = min(2 * wait.pause, PROD_LAST)
                    wait.due = now + wait.pause

    def apart(self, uid: int, connection: int, look: Callable[[list[int]], T]) -> T:
        """Do `look`, which adds the descriptors that it takes to its list, and return what it does.

        It has a thread and a table of descriptors of its own, with nothing but the `connection` of
        the user `uid`: what it has taken keeps neither the other threads nor their children from
        anything. Once it returns, nothing is left of that; where it raises, the close may last.
        Raises what `look` does, and Failure (75) where there is no thread.
        """
        answer: Future[T] = Future()
        with self._lock:
            self._held[uid] += 1
        # NOTE: what the collector closed there would stay open here.
        gc.disable()
        try:
            if not _start(lambda: self._apart(uid, connection, look, answer)):
                self._let_go(uid)
                raise Failure(
                    Status.TRY_AGAIN,
                    "cannot take a descriptor",
                    "there is no room for a thread",
                    "try again",
                )
            return answer.result()
        finally:
            gc.enable()

    def _apart(
        self, uid: int, connection: int, look: Callable[[list[int]], T], answer: Future[T]
    ) -> None:
        taken: list[int] = []
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_FILES):
                raise OSError(ctypes.get_errno(), "unshare(2)")
            # NOTE: nobody's connection, tap or lock is to last as long as this thread.
            close_but({0, 1, 2, connection, self.wakeup})
            found = look(taken)
            while taken:
                os.close(taken.pop())
        except BaseException as error:
            answer.set_exception(error)
            for descriptor in taken:
                self._close(descriptor)
            self._let_go(uid)
        else:
            self._let_go(uid)
            answer.set_result(found)

    def _let_go(self, uid: int) -> None:
        with self._lock:
            self._held[uid] -= 1
            if not self._held[uid]:
                del self._held[uid]

    def hang_up(self, uid: int, connection: int) -> None:
        """Close a connection of the user `uid`: root's at once, another's soon."""
        if uid == 0:
            os.close(connection)
            self.closed.append(uid)
            return
        self._connections.setdefault(uid, []).append(connection)

    def _let_end(self) -> None:
        """Take in which of the processes have come to their end."""
        for pid in [pid for pid in self._ends if os.waitpid(pid, os.WNOHANG)[0]]:
            uid, number = self._ends.pop(pid)
            self.closed.extend([uid] * number)

    def _close_connections(self) -> None:
        """Let go of the connections of each user, apart from those of all others."""
        ends = Counter(uid for uid, _ in self._ends.values())
        for uid, connections in list(self._connections.items()):
            if ends[uid] < ENDS_OF_USER and len(self._ends) < ENDS_MAX:
                pid = _end_with(connections)
                if pid is None:
                    # There is no room for a process just now.
                    return
                self._ends[pid] = uid, len(connections)
                del self._connections[uid]

    def _close(self, descriptor: int) -> None:
        me = threading.get_ident()
        with self._lock:
            self._busy[me] = _Wait()
        # NOTE: it is closed whatever is said of that, as by a FUSE server.
        with suppress(OSError):
            os.close(descriptor)
        with self._lock:
            del self._busy[me]


def _end_with(connections: list[int]) -> int | None:
    """Close connections, and return a process that has copies of them, and ends with those.

    What a process that ends has open does not linger (PF_EXITING in inet_release() of
    net/ipv4/af_inet.c). None: there is no room for one, and they stay open.
    """
    try:
        heard, told = os.pipe2(os.O_CLOEXEC)
    except OSError:
        return None
    try:
        pid = fork_with((*connections, heard))
    except OSError:
        os.close(heard)
        os.close(told)
        return None
    if pid == 0:
        try:
            os.read(heard, 1)
        finally:
            os._exit(0)
    os.close(heard)
    for connection in connections:
        os.close(connection)
    # NOTE: only now it ends, so that none of ours was the last one.
    os.close(told)
    return pid


def _start(work: Callable[[], None]) -> bool:
    """Start a thread; tell whether there is one: there may be no room for it just now."""
    try:
        threading.Thread(target=work, daemon=True).start()
    except RuntimeError:
        return False
    return True


class _Wait:
    """When a thread that is in close(2) is to be sent a signal."""

    def __init__(self) -> None:
        self.pause = PROD_FIRST
        self.due = time.monotonic() + PROD_FIRST
