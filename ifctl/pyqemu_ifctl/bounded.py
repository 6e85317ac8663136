"""What depends on a process of anybody's ends in time, whatever that process does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.manners import explain_bug

T = TypeVar("T")


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

    Raises TimeoutError where it has not ended after so long; it is left behind then, in a thread
    that ends with this process.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError
    return answer.result()
