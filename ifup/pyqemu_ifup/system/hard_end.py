"""Ends this process at a time, whatever its main thread waits for.

A handler of Python's does not run while that is in a call of the C library which goes on after a
signal (a directory of users, a lock), and none of Python's threads does while the call keeps the
interpreter (a program that is started from a file system that is mute). A timer of the C library's
own does: it has a thread, and calls a function of C (timer_create(2), SIGEV_THREAD).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

CLOCK_MONOTONIC = 1
SIGEV_THREAD = 2
LAST = 0.3, 0.5
"""Seconds after which, where Python does not speak, the C library does, and ends it all."""


class _Event(ctypes.Structure):
    """struct sigevent of sigevent(7), which has 64 bytes; what is behind `attributes` is unused."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_char * 64),
    )


class _Time(ctypes.Structure):
    """struct itimerspec of timer_settime(2): seconds and nanoseconds, of the interval first."""

    _fields_ = (("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2))


class HardEnd:
    """An end of this process with `status`, once it is `set`.

    `speak` says so first, and is to end it: as far as Python can run. Else `line` is said alone,
    behind the `program`.
    """

    def __init__(self, program: str, line: str, status: int, speak: Callable[[], None]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._settime = libc.timer_settime
        self._line = ctypes.c_char_p(line.replace("%", "%%").encode("ascii", "replace"))
        # NOTE: warnx(3) begins with it.
        self._program = ctypes.c_char_p.in_dll(libc, "program_invocation_short_name")
        self._program.value = program.encode("ascii", "replace")
        self._speak = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _value: speak())
        acts = (
            (0.0, ctypes.cast(self._speak, ctypes.c_void_p), None),
            (LAST[0], ctypes.cast(libc.warnx, ctypes.c_void_p), self._line),
            (LAST[1], ctypes.cast(libc._exit, ctypes.c_void_p), ctypes.c_void_p(status)),
        )
        self._timers: list[tuple[float, ctypes.c_void_p]] = []
        for after, function, value in acts:
            event = _Event(ctypes.cast(value, ctypes.c_void_p) if value else None, 0, SIGEV_THREAD)
            event.function = function.value
            timer = ctypes.c_void_p()
            # NOTE: a sandbox may forbid it; then there is no such end.
            if libc.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) == 0:
                self._timers.append((after, timer))

    def set(self, seconds: float | None) -> None:
        """End the process in so many seconds in place of when it was set to; None: not at all."""
        for after, timer in self._timers:
            time = _Time()
            if seconds is not None:
                whole, part = divmod(max(seconds, 0.0) + after, 1)
                time.value[0], time.value[1] = int(whole), int(part * 1e9) + 1
            self._settime(timer, 0, ctypes.byref(time), None)
