"""Looks at and closes what unprivileged clients send, where nobody else is kept waiting by that.

close(2) of a descriptor may last as long as its maker likes: a TCP socket lingers (SO_LINGER of
socket(7)), a file of FUSE asks its server. So does the close of a connection in whose queue such
a socket lies unread. A signal ends the lingering (sk_stream_wait_close of net/core/stream.c);
nothing but its server ends the wait for a file of FUSE, each close of which waits: that of a child
too, before it executes a program.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from pyqemu_ifconf.failure import Failure, Status

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
BATCH = 253
"""Connections that are closed at once: SCM_MAX_FD of net/scm.h."""


class Closer:
    """Threads that look and close, while there is something to look at or to be closed.

    `closed` are the users of the connections that are really gone by now, for the caller to take.
    """

    def __init__(self) -> None:
        self.closed: deque[int] = deque()
        self.wakeup = 2
        """What a signal's handler writes to (signal.set_wakeup_fd()), in whatever thread."""
        self._lock = threading.Condition()
        self._connections: deque[tuple[int, int]] = deque()
        """User and descriptor of each connection that is to be closed."""
        self._hanging_up = False
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
            idle = not (self._busy or self._connections or self._held)
            times = [each.due for each in self._busy.values()]
        return None if idle else min(times, default=time.monotonic() + PROD_FIRST)

    def prod(self) -> None:
        """Send a signal to each thread that has waited in close(2) for long."""
        now = time.monotonic()
        with self._lock:
            self._staff()
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
                    Status.TRY_AGAIN, "cannot take a descriptor", "there is no room for a thread",
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
            low, high = sorted((connection, self.wakeup))
            os.closerange(3, low)
            os.closerange(low + 1, high)
            os.closerange(high + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
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
        with self._lock:
            self._connections.append((uid, connection))
            self._staff()
            self._lock.notify()

    def _staff(self) -> None:
        """Start the thread that what waits needs."""
        if self._connections and not self._hanging_up:
            self._hanging_up = _start(self._close_connections)

    def _close_connections(self) -> None:
        while True:
            with self._lock:
                while not self._connections:
                    self._lock.wait()
                count = min(BATCH, len(self._connections))
                batch = [self._connections.popleft() for _ in range(count)]
            self._close_together([connection for _, connection in batch])
            self.closed.extend(uid for uid, _ in batch)

    def _close_together(self, connections: list[int]) -> None:
        """Close connections so that one wait, which one signal ends, is that of all of them."""
        try:
            left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            for connection in connections:
                self._close(connection)
            return
        try:
            # NOTE: while they are under way, ours is not the last descriptor of any.
            socket.send_fds(left, [b"x"], connections)
        except OSError:
            for connection in connections:
                self._close(connection)
        else:
            for connection in connections:
                os.close(connection)
        finally:
            self._close(right.detach())
            left.close()

    def _close(self, descriptor: int) -> None:
        me = threading.get_ident()
        with self._lock:
            self._busy[me] = _Wait()
        # NOTE: it is closed whatever is said of that, as by a FUSE server.
        with suppress(OSError):
            os.close(descriptor)
        with self._lock:
            del self._busy[me]


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
