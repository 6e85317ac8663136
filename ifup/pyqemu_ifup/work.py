"""Work that may have to wait: a generator, so that a hook and an agent can run the same code.

It yields when nothing can be done before something changes, with the longest time in seconds
after which it wants to look again. Whoever drives it waits as it likes: a hook blocks, an agent
does another's work meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar, cast

T = TypeVar("T")
Work = Generator[float, None, T]

SLICE = 0.25
"""Seconds of the longest wait: the end of a caller turns no descriptor ready."""
RETRY = 0.05
"""Seconds after which a server that has gone, or whose queue is full, is tried again."""


def finish(work: Work[T], wait: Callable[[float], None]) -> T:
    """Run `work` to its end and return what it returns; `wait` blocks for so many seconds."""
    try:
        pause = next(work)
        while True:
            try:
                wait(pause)
            except BaseException as error:
                # The work deals with it where it waits: it may have to be taken back.
                pause = work.throw(error)
            else:
                pause = next(work)
    except StopIteration as end:
        return cast(T, end.value)
