"""A lock for each key: work on one tap is done one after the other, in the order in which it came.

It keeps order within the agent. Other processes are kept away by pyqemu_ifup.system.lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.task import SLICE, pause


class Ticket:
    """A place in the queue of one key."""

    def __init__(self, queue: deque[Ticket]) -> None:
        self._queue = queue

    async def acquire(self, deadline: Deadline) -> None:
        """Wait until no earlier ticket is left. Raises Failure (75), also where that is now."""
        deadline.check()
        while self._queue[0] is not self:
            deadline.check("other work on this tap is under way")
            await pause(SLICE)


class KeyedLock:
    """The queues of all keys that somebody asks for."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Ticket]] = {}

    @contextmanager
    def queue(self, key: str) -> Iterator[Ticket]:
        """Join the end of the queue of `key`, in a `with`, at whose end the ticket is given up."""
        queue = self._queues.setdefault(key, deque())
        ticket = Ticket(queue)
        queue.append(ticket)
        try:
            yield ticket
        finally:
            queue.remove(ticket)
            if not queue:
                del self._queues[key]
