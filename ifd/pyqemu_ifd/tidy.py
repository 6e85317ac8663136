"""What the agent does unasked: cleans up after taps that died, and brings guests back.

A tap that goes without a down leaves its Open vSwitch port: that goes at once. A switch that comes
back, or a bridge that was deleted and made again, has lost its guests: those that still run are
attached again. Nothing is remembered between events; the live system tells what is ours.
"""

from __future__ import annotations

import syslog
import time
from collections.abc import Generator, Iterator

from pyqemu_ifconf.policy import Attach, Caller, Policy, Port, decide, policy_asks, port_on
from pyqemu_ifd.keeper import PolicyKeeper
from pyqemu_ifd.pool import AgentHost, Pool
from pyqemu_ifdown.detach import PATIENCE
from pyqemu_ifdown.gc import judge
from pyqemu_ifup.attach import attaching, success_line
from pyqemu_ifup.caller import find_caller
from pyqemu_ifup.linux_bridge import LinkEvent
from pyqemu_ifup.look import Link
from pyqemu_ifup.manners import Watch, log
from pyqemu_ifup.stamp import Here, Stamp, is_alive
from pyqemu_ifup.work import Work

DELAY = 0.3
"""Seconds after a change in which what belongs to it may still follow."""
LIMIT = 10.0
"""Seconds that one clean-up may take."""


class Tidier:
    """Gathers what has happened, and turns it into work for each tap concerned."""

    def __init__(self, pool: Pool, keeper: PolicyKeeper, here: Here) -> None:
        self.pool = pool
        self.keeper = keeper
        self.here = here
        self._sweep_due: float | None = None
        """When to look at every tap of ours, None where nothing calls for it."""
        self._gone: set[str] = set()
        """Taps that have gone."""
        self._lost: dict[str, float] = {}
        """Ports that have gone, and when to look whether their tap should have one."""
        self._bridges: set[int] = set()

    @property
    def due(self) -> float | None:
        """When there will be something to do, in seconds of time.monotonic()."""
        times = [*self._lost.values()]
        if self._sweep_due is not None:
            times.append(self._sweep_due)
        return min(times, default=None)

    def everything(self) -> None:
        """Look at every tap of ours, in a moment."""
        self._sweep_due = time.monotonic() + DELAY

    def take(self, events: list[LinkEvent] | None) -> None:
        """Take in what has happened to links; None: some of it was lost."""
        if events is None:
            self.everything()
            return
        for event in events:
            if event.kind == "tun" and event.gone:
                self._gone.add(event.name)
            elif event.kind == "bridge" and event.gone:
                self._bridges.discard(event.index)
            elif event.kind == "bridge" and event.index not in self._bridges:
                self._bridges.add(event.index)
                self.everything()

    def work(self) -> Iterator[tuple[str, Generator[float, None, None]]]:
        """Return the taps that something is to be done about now, and the work."""
        now = time.monotonic()
        for database in self.pool.databases.values():
            bridges_new, ports_gone = database.take_news()
            if bridges_new:
                self.everything()
            self._lost.update(dict.fromkeys(ports_gone, now + DELAY))
        for name in self._gone:
            if any(port.ours for each in self.pool.databases.values() for port in each.ports(name)):
                yield name, self._clean(name)
        self._gone.clear()
        for name in [name for name, due in self._lost.items() if now >= due]:
            del self._lost[name]
            link = self.pool.kernel.look_up(name)
            if link is not None and self._has_lost(link):
                yield name, self._bring_back(name)
        if self._sweep_due is not None and now >= self._sweep_due:
            self._sweep_due = None
            yield from self._sweep()

    def _sweep(self) -> Iterator[tuple[str, Generator[float, None, None]]]:
        # NOTE: the ports before the links: a tap is there before its port is.
        ports = [port for each in self.pool.databases.values() for port in each.ports()]
        links = self.pool.kernel.links()
        for leftover in judge(ports, links, self.here):
            if leftover.remove is not None:
                yield leftover.port.name, self._clean(leftover.port.name)
        for link in links:
            if self._has_lost(link):
                yield link.name, self._bring_back(link.name)

    def _has_lost(self, link: Link) -> bool:
        """Tell whether a running guest's tap is not on its bridge, which is there again."""
        stamp = link.stamp
        # NOTE: a down takes the link down before all else, so that it is not mistaken for a loss.
        if stamp is None or not link.up or not is_alive(stamp):
            return False
        if stamp.kind == "linux":
            bridge = self.pool.kernel.look_up(stamp.bridge)
            return link.master is None and bridge is not None and bridge.kind == "bridge"
        database = self.pool.databases.get(stamp.ovsdb or "")
        return (
            database is not None
            and database.is_connected
            and database.has_bridge(stamp.bridge)
            and not database.ports(link.name)
        )

    def _host(self, tap: str) -> AgentHost:
        return AgentHost(self.pool, tap, Watch(LIMIT), lambda command: None)

    def _clean(self, tap: str) -> Work[None]:
        """Remove the ports of ours that a tap which is gone has left."""
        with self._host(tap) as host:
            for address, database in self.pool.databases.items():
                if database.is_connected:
                    host.databases[address] = database
            ports = host.ports(tap)
            link = host.kernel.look_up(tap)
            for leftover in judge(ports, [link] if link is not None else [], self.here):
                if leftover.remove is not None:
                    yield from host.run(leftover.remove, host.watch, PATIENCE)
                    log(
                        syslog.LOG_INFO,
                        f"{tap}: port on {leftover.port.bridge} removed: {leftover.because}",
                    )

    def _bring_back(self, tap: str) -> Work[None]:
        """Attach a tap again, by the policy in force, for the process that it was attached for."""
        policy = self.keeper.get()
        with self._host(tap) as host:
            host.watch.allow(policy.timeout)
            link = host.kernel.look_up(tap)
            stamp = link.stamp if link is not None else None
            if link is None or stamp is None or not self._has_lost(link):
                return
            caller = find_caller(tap, stamp.pid, want_user=policy_asks(policy, "user"))
            port = self._port(policy, caller, stamp)
            ovsdbs = [each.ovsdb for each in policy.networks.values()]
            yield from attaching(host, port, caller, stamp.pid, ovsdbs)
            log(syslog.LOG_NOTICE, f"{success_line(port, caller)}: its bridge had lost it")

    @staticmethod
    def _port(policy: Policy, caller: Caller, stamp: Stamp) -> Port:
        """Return what the tap shall have: by its rule, else on the network that it was put on."""
        decision = decide(policy, caller)
        if isinstance(decision, Attach) and decision.port.network == stamp.network:
            return decision.port
        return port_on(policy, stamp.network, caller.tap)


