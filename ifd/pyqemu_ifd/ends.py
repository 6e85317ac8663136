"""Tells of the end of processes, by a descriptor of each (pidfd_open(2))."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Collection

from pyqemu_ifup.system.process import process_start

_ENDED = (errno.ESRCH, errno.EINVAL, errno.ENOENT)
"""How pidfd_open(2) answers for a pid of none; the last two are for a pid that is a thread's."""
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

Process = tuple[int, int]
"""A process by its pid and when it started (field 22 of /proc/PID/stat, in clock ticks)."""


class Ends:
    """The processes that are watched; its descriptor turns readable when one of them has ended."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._watched: dict[Process, int] = {}

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._poll.fileno()

    def close(self) -> None:
        """Watch none any more."""
        self.watch(())
        self._poll.close()

    def watch(self, processes: Collection[Process]) -> bool:
        """Watch these, and no others; tell whether one of them has ended already.

        Where there is no descriptor left for one, its end is not told of.
        """
        for process in self._watched.keys() - {*processes}:
            self._forget(process)
        ended = False
        for process in {*processes} - self._watched.keys():
            try:
                descriptor = _open(process)
            except OSError as error:
                if error.errno not in _SHORT:
                    raise
                continue
            if descriptor is None:
                ended = True
                continue
            self._watched[process] = descriptor
            self._poll.register(descriptor, select.EPOLLIN)
        return ended

    def take(self) -> bool:
        """Tell whether one has ended since, and watch it no more."""
        ended = {descriptor for descriptor, _ in self._poll.poll(0)}
        gone = [process for process, descriptor in self._watched.items() if descriptor in ended]
        for process in gone:
            self._forget(process)
        return bool(gone)

    def _forget(self, process: Process) -> None:
        descriptor = self._watched.pop(process)
        # NOTE: a close alone leaves it in the poll for as long as a forked child has a copy.
        self._poll.unregister(descriptor)
        os.close(descriptor)


def _open(process: Process) -> int | None:
    """Return a descriptor of the process, None where it has ended. Raises OSError."""
    pid, start = process
    # NOTE: what a mark says is any number, and by now a thread may have it.
    if process_start(pid) != start:
        return None
    try:
        descriptor = os.pidfd_open(pid)
    except OverflowError:
        return None
    except OSError as error:
        if error.errno not in _ENDED:
            raise
        return None
    try:
        # NOTE: once more: whoever has the pid by now is the one that is watched.
        is_same = process_start(pid) == start
    except BaseException:
        os.close(descriptor)
        raise
    if is_same:
        return descriptor
    os.close(descriptor)
    return None
