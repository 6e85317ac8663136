"""Work on one tap is done one after the other, in the order in which it came."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.task import SLICE, pause


class Turns:
    """The work that there is for each tap."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[object]] = {}

    @contextmanager
    def take(self, tap: str) -> Iterator[object]:
        """Stand in line for the tap, in a `with`; yields the place there."""
        line = self._lines.setdefault(tap, deque())
        place = object()
        line.append(place)
        try:
            yield place
        finally:
            line.remove(place)
            if not line:
                del self._lines[tap]

    async def come(self, tap: str, place: object, deadline: Deadline) -> None:
        """Wait until it is the turn of `place`. Raises Failure (75), also where that is now."""
        deadline.check()
        while self._lines[tap][0] is not place:
            deadline.check("other work on this tap is under way")
            await pause(SLICE)
