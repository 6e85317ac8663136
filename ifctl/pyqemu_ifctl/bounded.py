"""What depends on a process of anybody's ends in time, whatever that process does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.hook import explain_bug, who_holds_up

T = TypeVar("T")

ALL = 8.0
"""Seconds that all the parts of a look may take: the rest is for what is made of them."""
PART = 3.0
"""Seconds that one part may take, so that one which is mute leaves time for the others."""


def attempt(call: Callable[[], T]) -> T | Failure:
    """Return what `call` returns, or its Failure; a bug is one of status 70, told in syslog.

    It is for one of many: what one process of anybody's leads to is not the end of the others.
    """
    try:
        return call()
    except Failure as failure:
        return failure
    except Exception as error:
        return Failure(Status.BUG, explain_bug(error))


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what `call` returns, or raise what it raises.

    Raises TimeoutError if it has not ended after so long, with a clause on who holds it up; it
    is left behind then, in a thread that ends with this process.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if not wait([answer], seconds).done:
        raise TimeoutError(who_holds_up(thread.native_id or 0, seconds))
    return answer.result()


class Parts:
    """The parts of a look at this host: one that is not done in time leaves the others to be shown.

    `missed` tells which were not, and who did not answer.
    """

    def __init__(self, deadline: Deadline) -> None:
        self.missed: list[str] = []
        self._deadline = deadline

    def take(self, what: str, call: Callable[[], T]) -> T | None:
        """Return what `call` returns, None if it is not done in time. Raises Failure."""
        if not self._deadline.remaining():
            self.missed.append(f"{what}: the time was up before")
            return None
        try:
            return call()
        except Failure as failure:
            if failure.status is not Status.TRY_AGAIN or self._deadline.interrupted() is not None:
                raise
            self.missed.append(f"{what}: {failure.what}: {failure.why}")
            return None

    def take_apart(
        self, what: str, call: Callable[[], T], seconds: float | None = None
    ) -> T | None:
        """Do as `take`, of what uses nothing that others do; `seconds` (PART) at the most."""
        seconds = min(PART if seconds is None else seconds, self._deadline.remaining())

        def bounded() -> T:
            try:
                return within(seconds, call)
            except TimeoutError as late:
                self._deadline.check(str(late))
                raise Failure(
                    Status.TRY_AGAIN, f"not done after {seconds:.0f} s", str(late)
                ) from None

        return self.take(what, bounded)

    def end(self) -> None:
        """Have done with the clock: what is still to come waits for nobody."""
        self._deadline.disarm()
