"""When to look at the tables of networks with `nat:`, after somebody has touched the ruleset.

Each soon after it was touched; one that somebody else changes again and again, a firewall's
manager say, later each time.
"""

from __future__ import annotations

import syslog
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pyqemu_ifup.manners import log
from pyqemu_ifup.nat import table_name

DELAY = 0.2
"""Seconds after an event in which what belongs to it may still follow; no look is sooner."""
PATIENT, PAUSE_MAX = 1.0, 60.0
"""Seconds between two loads of a table: from the first on it is no mishap; the most."""
PEACE = 60.0
"""Seconds beyond its pause that a table was left alone, so that the next change is a first one."""


@dataclass
class Loads:
    """When a table was last loaded again, and for how long it is left after that."""

    last: float
    pause: float = DELAY


class Guard:
    """Remembers which tables were touched, and which were loaded again how often."""

    def __init__(self) -> None:
        self._touched: dict[str, float] = {}
        """Networks, and when their tables were touched."""
        self._all: float | None = None
        """When any table may have been touched."""
        self._loads: dict[str, Loads] = {}

    def take(self, networks: Iterable[str] | None) -> None:
        """Take in whose tables were touched; None: that of any may have been."""
        now = time.monotonic()
        if networks is None:
            self._all = now if self._all is None else self._all
            return
        for name in networks:
            self._touched.setdefault(name, now)

    @property
    def due(self) -> float | None:
        """When there will be a table to look at, in seconds of time.monotonic()."""
        times = [self._due(name, since) for name, since in self._touched.items()]
        if self._all is not None:
            times.append(self._all + DELAY)
        return min(times, default=None)

    def _due(self, name: str, since: float) -> float:
        loads = self._loads.get(name)
        return max(since + DELAY, loads.last + loads.pause if loads is not None else 0.0)

    def ripe(self, now: float, networks: Collection[str]) -> list[str]:
        """Return those of the `networks` to look at now; what is of no other is forgotten."""
        if self._all is not None and now >= self._all + DELAY:
            self._all = None
            for name in networks:
                self._touched.setdefault(name, now - DELAY)
        found = [
            name for name, since in self._touched.items()
            if name not in networks or now >= self._due(name, since)
        ]
        for name in found:
            del self._touched[name]
        return [name for name in found if name in networks]

    def loaded(self, network: str, fault: str) -> None:
        """Take in that a table was loaded again since it was `fault`; say so, but not too often."""
        now = time.monotonic()
        loads = self._loads.get(network)
        if loads is None or now > loads.last + loads.pause + PEACE:
            loads = self._loads[network] = Loads(now)
        else:
            was, loads.last = loads.pause, now
            loads.pause = min(2 * was, PAUSE_MAX)
            if was >= PATIENT:
                return
            if loads.pause >= PATIENT:
                log(
                    syslog.LOG_WARNING,
                    f"network {network}: the nft table inet {table_name(network)} is changed again "
                    f"and again, and loaded again later each time, every {PAUSE_MAX:g} s at the "
                    "most; see who else manages the ruleset: nft monitor",
                )
                return
        log(
            syslog.LOG_NOTICE,
            f"network {network}: the nft table inet {table_name(network)} is loaded again: it was "
            f"{fault}",
        )
