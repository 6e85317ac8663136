"""What the agent tells of itself: `pyqemu-ifctl agent`."""

from __future__ import annotations

import os
import time
from collections import Counter, deque

from pyqemu_ifconf.failure import Status
from pyqemu_ifconf.version import find_version
from pyqemu_ifd.cache import PolicyCache
from pyqemu_ifd.pool import Pool

REMEMBERED = 1000
"""How many of the last requests' times are kept, for each verb."""


class Report:
    """Counts requests and keeps their times, and the last error."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        # NOTE: now, since later it is that of what has been installed meanwhile.
        self.release = find_version()
        self._code = _code()
        self.refused = 0
        """Connections that were closed since there were too many."""
        self.last_error: str | None = None
        self.last_error_at: float | None = None
        self._counts: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._times: dict[str, deque[float]] = {}

    def count(self, verb: str, status: Status, seconds: float) -> None:
        """Count a request that has ended with `status` after so long."""
        self._counts[verb] += 1
        if status != Status.DONE:
            self._failed[verb] += 1
        self._times.setdefault(verb, deque(maxlen=REMEMBERED)).append(seconds)

    def fault(self, text: str) -> None:
        """Keep `text` as the last error."""
        self.last_error = text
        self.last_error_at = time.time()

    def as_object(
        self, cache: PolicyCache, pool: Pool, connections: int, *, whole: bool
    ) -> dict[str, object]:
        """Return what `pyqemu-ifctl agent --json` prints; times in milliseconds.

        `connections` is how many there are. Without `whole`, for users other than root, what
        others have done wrong is left out.
        """
        return {
            "version": 1,
            "release": self.release,
            "pid": os.getpid(),
            "outdated": _code() != self._code,
            "uptime": round(time.monotonic() - self.started, 3),
            "connections": connections,
            "refused": self.refused,
            "requests": {
                verb: {
                    "count": self._counts[verb],
                    "failed": self._failed[verb],
                    "median": _quantile(times, 0.5),
                    "p99": _quantile(times, 0.99),
                }
                for verb, times in sorted(self._times.items())
            },
            "policy": {
                "files": list(cache.policy.files) if cache.policy is not None else None,
                "loaded": cache.loaded if cache.policy is not None else None,
                "error": str(cache.failure) if whole and cache.failure is not None else None,
            },
            "databases": [
                {"ovsdb": address, "connected": database.is_connected}
                for address, database in pool.databases.items()
            ],
            "last_error": self.last_error if whole else None,
            "last_error_at": self.last_error_at if whole else None,
        }


def _code() -> tuple[int, int, int] | None:
    """Return what file this module is of by now: each installation puts another there."""
    try:
        found = os.stat(__file__)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _quantile(times: deque[float], part: float) -> float:
    """Return the quantile of so many seconds, in milliseconds; the nearest of those measured."""
    ordered = sorted(times)
    return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))] * 1000, 3)
