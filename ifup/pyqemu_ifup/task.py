"""Tasks that may have to wait: coroutines, so that a hook and an agent can run the same code.

One waits by `pause`, where nothing can be done before something changes. Whoever drives it waits as
it likes: a hook blocks, an agent does another's task meanwhile. asyncio, whose import takes longer
than a whole hook, has no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import TypeVar, cast

T = TypeVar("T")
Task = Coroutine[float, None, T]
"""What is driven by `send(None)`: it gives the longest time in seconds after which to go on."""

SLICE = 0.25
"""Seconds of the longest wait: the end of a caller turns no descriptor ready."""
RETRY = 0.05
"""Seconds after which a server that has gone, or whose queue is full, is tried again."""


@coroutine
def pause(seconds: float) -> Generator[float, None, None]:
    """Wait until something changes, so many seconds at the longest; 0 lets others go on."""
    yield seconds


def step(task: Task[object]) -> float | None:
    """Run `task` until it waits, and return for how long; None: it has ended."""
    try:
        return task.send(None)
    except StopIteration:
        return None


def finish(task: Task[T], wait: Callable[[float], None]) -> T:
    """Run `task` to its end and return what it returns; `wait` blocks for so many seconds."""
    try:
        seconds = task.send(None)
        while True:
            try:
                wait(seconds)
            except BaseException as error:
                # The task deals with it where it waits: it may have to be taken back.
                seconds = task.throw(error)
            else:
                seconds = task.send(None)
    except StopIteration as end:
        return cast(T, end.value)
