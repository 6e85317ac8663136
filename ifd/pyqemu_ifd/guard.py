"""When to look at the tables of networks with `nat:`, after somebody has touched the ruleset.

Soon, however often it is touched: until a table is loaded again its guests are not kept from other
networks. One that somebody else changes at each of our loads, a firewall's manager say, is loaded
so often and no more, and told of ever less.
"""

from __future__ import annotations

import syslog
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pyqemu_ifup.drivers.nft_table import table_name
from pyqemu_ifup.hook import log

DELAY = 0.2
"""Seconds after an event in which what belongs to it may still follow; no look is sooner."""
PAUSE = 0.5
"""Seconds after a load of a table in which it is left as it is."""
SILENCE_FIRST, SILENCE_LAST = 60.0, 3600.0
"""Seconds in which no other load of a table is told: twice as long each time, this at the most.

A load after none in the last of them is a first one.
"""


@dataclass
class Loads:
    """When a table was last loaded again, and what was told of that."""

    last: float
    told: float
    silence: float = SILENCE_FIRST
    untold: int = 0


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
        return max(since + DELAY, loads.last + PAUSE if loads is not None else 0.0)

    def ripe(self, now: float, networks: Collection[str]) -> list[str]:
        """Return those of the `networks` to look at now; what is of no other is forgotten."""
        if self._all is not None and now >= self._all + DELAY:
            self._all = None
            for name in networks:
                self._touched.setdefault(name, now - DELAY)
        found = [
            name
            for name, since in self._touched.items()
            if name not in networks or now >= self._due(name, since)
        ]
        for name in found:
            del self._touched[name]
        return [name for name in found if name in networks]

    def found(self, network: str, fault: str, remedy: str) -> None:
        """Take in that a table was `fault`, and was loaded again; say so, but not too often.

        With a `remedy`, what is to be done, it was not: the policy does not have the network.
        """
        now = time.monotonic()
        head = f"network {network}: the nft table inet {table_name(network)} is"
        unguarded = (
            f"{head} {fault}, the policy does not have what to load, and nothing keeps its guests "
            f"from other networks; {remedy}"
        )
        loads = self._loads.get(network)
        if loads is None or now > loads.last + SILENCE_LAST:
            self._loads[network] = Loads(now, now)
            if remedy:
                log(syslog.LOG_ERR, unguarded)
            else:
                log(syslog.LOG_NOTICE, f"{head} loaded again: it was {fault}")
            return
        loads.last = now
        loads.untold += 1
        if now < loads.told + loads.silence:
            return
        again = (
            f"{head} {fault} again and again, and was loaded again as often: {loads.untold} times "
            f"in {now - loads.told:.0f} s; see who else manages the ruleset: nft monitor"
        )
        log(syslog.LOG_WARNING, unguarded if remedy else again)
        loads.told, loads.untold = now, 0
        loads.silence = min(2 * loads.silence, SILENCE_LAST)
