"""Closes what unprivileged clients have sent, where nobody but themselves can be kept waiting.

close(2) of a descriptor may last as long as its maker likes: a TCP socket lingers (SO_LINGER of
socket(7)), a file of FUSE asks its server. So does the close of a connection in whose queue such
a descriptor lies unread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable


class Closer:
    """A thread for each user whose descriptors are being closed, while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, deque[int]] = {}
        """What is still to be closed for each user who has a thread."""
        self._left: list[tuple[int, deque[int]]] = []
        """What found no thread: there is a limit to them."""

    def close(self, uid: int, descriptors: Iterable[int]) -> None:
        """Close the descriptors that came from the user `uid`: root's at once, another's soon."""
        if uid == 0:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        left, self._left = self._left, []
        for user, waiting in [*left, (uid, deque(descriptors))]:
            self._add(user, waiting)

    def _add(self, uid: int, descriptors: deque[int]) -> None:
        with self._lock:
            waiting = self._waiting.get(uid)
            if waiting is not None:
                waiting.extend(descriptors)
                return
            self._waiting[uid] = descriptors
        try:
            threading.Thread(target=self._run, args=(uid, descriptors), daemon=True).start()
        except RuntimeError:
            with self._lock:
                del self._waiting[uid]
            self._left.append((uid, descriptors))

    def _run(self, uid: int, waiting: deque[int]) -> None:
        while True:
            with self._lock:
                if not waiting:
                    del self._waiting[uid]
                    return
                descriptor = waiting.popleft()
            os.close(descriptor)
