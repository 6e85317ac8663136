"""Closes what unprivileged clients have made us hold, where nobody else is kept waiting by that.

close(2) of a descriptor may last as long as its maker likes: a TCP socket lingers (SO_LINGER of
socket(7)), a file of FUSE asks its server. So does the close of a connection in whose queue such
a descriptor lies unread. A signal ends the lingering (sk_stream_wait_close of net/core/stream.c);
nothing but its server ends the wait for a file of FUSE.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

PROD = signal.SIGUSR1
"""What a thread is sent whose close(2) waits; whoever makes a Closer catches it."""
PROD_FIRST, PROD_LAST = 0.02, 1.0
"""Seconds after which a thread that waits is sent it: twice as long each time, this at the most."""
THREADS = 24
"""Threads that close descriptors: one for a user at the most."""
BATCH = 253
"""Connections that are closed at once: SCM_MAX_FD of net/scm.h."""


class Closer:
    """Threads that close, while there is something to be closed.

    `closed` are the users of the connections that are really gone by now, for the caller to take.
    """

    def __init__(self) -> None:
        self.closed: deque[int] = deque()
        self._lock = threading.Condition()
        self._connections: deque[tuple[int, int]] = deque()
        """User and descriptor of each connection that is to be closed."""
        self._hanging_up = False
        self._waiting: dict[int, deque[int]] = {}
        """What is to be closed for each user."""
        self._held: Counter[int] = Counter()
        self._users: set[int] = set()
        """The users for each of whom a thread is at work."""
        self._threads = 0
        self._busy: dict[int, _Wait] = {}
        """The threads that are in close(2)."""

    def held(self, uid: int | None = None) -> int:
        """Return how many descriptors that came from the user, or from all, are not closed yet."""
        with self._lock:
            return self._held[uid] if uid is not None else self._held.total()

    @property
    def due(self) -> float | None:
        """When `prod` has something to do, in seconds of time.monotonic()."""
        with self._lock:
            idle = not (self._busy or self._connections or self._waiting)
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

    def close(self, uid: int, descriptors: Iterable[int]) -> None:
        """Close the descriptors that came from the user `uid`: root's at once, another's soon."""
        if uid == 0:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        with self._lock:
            for descriptor in descriptors:
                self._waiting.setdefault(uid, deque()).append(descriptor)
                self._held[uid] += 1
            self._staff()

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
        """Start the threads that what waits needs."""
        if self._connections and not self._hanging_up:
            self._hanging_up = _start(self._close_connections)
        users = self._waiting.keys() | self._users
        if self._waiting and self._threads < min(THREADS, len(users)):
            self._threads += _start(self._close_descriptors)

    def _close_descriptors(self) -> None:
        while True:
            with self._lock:
                uid = next((each for each in self._waiting if each not in self._users), None)
                if uid is None:
                    self._threads -= 1
                    return
                waiting = self._waiting.pop(uid)
                descriptor = waiting.popleft()
                if waiting:
                    # NOTE: at the end: it is the others' turn.
                    self._waiting[uid] = waiting
                self._users.add(uid)
            self._close(descriptor)
            with self._lock:
                self._users.remove(uid)
                self._held[uid] -= 1
                if not self._held[uid]:
                    del self._held[uid]

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
