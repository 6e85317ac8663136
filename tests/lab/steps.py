"""Stops a forked process before any one of its system calls (ptrace(2)), of whatever kind."""

from __future__ import annotations

import ctypes
import os
import signal

# sys/ptrace.h
TRACEME, CONT, DETACH, SYSCALL, SETOPTIONS = 0, 7, 17, 24, 0x4200
TRACESYSGOOD, EXITKILL = 0x1, 0x100000
AT_CALL = signal.SIGTRAP | 0x80
"""The signal that a stop at a system call shows, with TRACESYSGOOD."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) == -1:
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x}")


def be_traced() -> None:
    """Have this process wait for `Steps` of the thread that has forked it."""
    _ptrace(TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)


class Steps:
    """A child of this thread that has called `be_traced`; its own children run freely."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.calls = 0
        """System calls that it has come to so far."""
        _, status = os.waitpid(pid, 0)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP, status
        _ptrace(SETOPTIONS, pid, TRACESYSGOOD | EXITKILL)

    def to(self, number: int) -> bool:
        """Let it run until right before its system call of this number, from 0, as of now.

        Tells whether it came to it; else it has ended, and is still to be waited for.
        """
        entering, deliver = True, 0
        while True:
            _ptrace(SYSCALL, self.pid, deliver)
            seen = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert seen is not None
            if seen.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
                return False
            os.waitid(os.P_PID, self.pid, os.WSTOPPED)
            deliver = 0
            if seen.si_status != AT_CALL:
                deliver = seen.si_status
                continue
            if entering:
                self.calls += 1
                if number == 0:
                    return True
                number -= 1
            entering = not entering

    def go_on(self, deliver: int = 0) -> None:
        """Let it go, for good, with a signal if one is given."""
        _ptrace(DETACH, self.pid, deliver)
