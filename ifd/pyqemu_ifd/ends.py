"""Tells of the end of processes, by a descriptor of each (pidfd_open(2))."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Collection

from pyqemu_ifup.system.process import process_start

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
            # NOTE: with its last descriptor it goes from the poll.
            os.close(self._watched.pop(process))
        ended = False
        for process in {*processes} - self._watched.keys():
            try:
                descriptor = os.pidfd_open(process[0])
            except OSError as error:
                if error.errno not in (errno.ESRCH, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    raise
                ended = ended or error.errno == errno.ESRCH
                continue
            # NOTE: only now: whoever has the pid by now is the one that is watched.
            if process_start(process[0]) != process[1]:
                os.close(descriptor)
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
            os.close(self._watched.pop(process))
        return bool(gone)
