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

    def close(self, uid: int, descriptors: Iterable[int]) -> None:
        """Close the descriptors that came from the user `uid`: root's at once, another's soon."""
        if uid == 0:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        with self._lock:
            waiting = self._waiting.get(uid)
            if waiting is not None:
                waiting.extend(descriptors)
                return
            waiting = self._waiting[uid] = deque(descriptors)
        threading.Thread(target=self._run, args=(uid, waiting), daemon=True).start()

    def _run(self, uid: int, waiting: deque[int]) -> None:
        while True:
            with self._lock:
                if not waiting:
                    del self._waiting[uid]
                    return
                descriptor = waiting.popleft()
            os.close(descriptor)
