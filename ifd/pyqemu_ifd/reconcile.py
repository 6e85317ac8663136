"""What the agent does unasked: cleans up after taps that died, and brings guests back.

A tap that goes without a down leaves its Open vSwitch port: that goes at once. A switch that comes
back, or a bridge that was deleted and made again, has lost its guests: those that still run are
attached again. Nothing is remembered between events; the live system tells what is ours.
"""

from __future__ import annotations

import syslog
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.names import is_valid_name
from pyqemu_ifconf.policy import Caller, Policy, Port
from pyqemu_ifconf.shell import ifctl, quote, readable
from pyqemu_ifd.cache import PolicyCache
from pyqemu_ifd.ends import Ends
from pyqemu_ifd.guard import Guard
from pyqemu_ifd.keyed_lock import KeyedLock
from pyqemu_ifd.pool import Pool
from pyqemu_ifd.users import Users
from pyqemu_ifdown.gc import Ended, end, find_ended, remove
from pyqemu_ifup import kinds, made
from pyqemu_ifup.access import User, check_given, is_root_made
from pyqemu_ifup.attach import attach_alone, success_line
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers import nft
from pyqemu_ifup.drivers.links import LinkEvent
from pyqemu_ifup.drivers.nft_events import FILTERS
from pyqemu_ifup.drivers.nft_rules import Chain, chain_name
from pyqemu_ifup.guest import find_marked, find_user_said
from pyqemu_ifup.holder import Holder
from pyqemu_ifup.hook import log
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.base import Filtered
from pyqemu_ifup.look import Link, has_networks
from pyqemu_ifup.mark import BRIDGE_MARK, Here, Mark, is_alive
from pyqemu_ifup.ops import SetAlias, SetUp
from pyqemu_ifup.steps import take_steps
from pyqemu_ifup.system.lock import lock_by_name, lock_tap
from pyqemu_ifup.task import Task

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.ovsdb import Database

Chore = Callable[[], Task[None]]
"""Begins what is to be done unasked."""
DELAY = 0.3
"""Seconds after a change in which what belongs to it may still follow."""
LIMIT = 10.0
"""Seconds that one clean-up may take."""
SHORT = 1.0
"""Seconds that a pyqemu-ifctl apply which has a tap in hand is waited for, each time."""
ENDS = 10.0
"""Seconds after which processes of taps are looked at again: who passes one on makes no event."""
SILENCE = 60.0
"""Seconds in which no other load of a link's filters is told."""
AGAIN_FIRST, AGAIN_LAST = 1.0, 60.0
"""Seconds after which what failed is tried again: twice as long each time, this at the most."""


def _may_have_ended(link: Link) -> bool:
    """Tell whether a tap of ours is to be taken away when its process has ended.

    That is one of our making which does not go by itself; a user's; one that a QEMU of root's does
    not hold any more, whose down may have had no privilege (-runas); and one of root's whose down a
    user has asked for, which leaves the mark. What a script of root's has attached waits for who
    shall open it.
    """
    mark = link.mark
    if mark is None:
        return False
    if kinds.maker_of(link) is not None:
        return True
    if mark.uid is not None or (not link.up and link.master is None):
        return True
    return not link.carrier and bool(mark.vm or mark.netdev)


def _runs(link: Link, mark: Mark) -> bool:
    """Tell whether a tap has its guest: under -daemonize one of `run`'s goes on in another pid."""
    return is_alive(mark) or (mark.made and link.carrier)


def _by_link(chains: Iterable[Chain]) -> dict[str, dict[str, Chain]]:
    """Return the chains by the link that each is named by, and by `/NAME` of those it is bound to.

    What is in both is what `nft.read` returns of one link.
    """
    found: dict[str, dict[str, Chain]] = {}
    for chain in chains:
        devices = chain.base.devices if chain.base is not None else ()
        for key in (chain.name.partition("-")[0], *(f"/{device}" for device in devices)):
            found.setdefault(key, {})[chain.name] = chain
    return found


class Reconciler:
    """Gathers what has happened, and turns it into work for each tap concerned."""

    def __init__(
        self, pool: Pool, cache: PolicyCache, tap_lock: KeyedLock, users: Users, here: Here
    ) -> None:
        self.pool = pool
        self.users = users
        self.cache = cache
        self.tap_lock = tap_lock
        self.here = here
        self._sweep_due: float | None = None
        """When to look at every tap of ours, None where nothing calls for it."""
        self._again = AGAIN_FIRST
        self._failed: set[str] = set()
        """Taps that could not be brought back, and whose links are up for the next look at all."""
        self._denied: dict[str, tuple[int, str]] = {}
        """The links, by name and index, that were told of as not brought back, and why."""
        self._gone: set[str] = set()
        """Taps that have gone."""
        self._changed: dict[str, float] = {}
        """Taps whose port has come or gone, and when to look whether that is as it should be."""
        self._ends_due: float | None = None
        """When to look at whose process may have ended, None where there are none."""
        self._networks = False
        """Whether to look for networks that were made for taps, and have none."""
        self._bridges: dict[int, tuple[str, bool]] = {}
        self.ends = Ends()
        """The processes that have links of our making, which do not go by themselves."""
        self._made = frozenset(kind.link_kind for kind in kinds.makers())
        self._links_changed = False
        """Whether such a link has come, changed or gone."""
        self._filters_due: float | None = None
        """When to look at the filters of these links, None if nobody has touched one."""
        self._filtered: dict[int, tuple[Policy, Link, dict[str, Chain]]] = {}
        """The links, by index, that had the filters which the policy wants, and all that was so."""
        self._filters_told: dict[str, float] = {}
        """When it was told of each link that its filters were loaded again."""
        self.guard = Guard()
        """Which tables of networks to look at, and when."""
        self._astray: dict[str, Callable[[Host], Task[None]]] = {}
        """Networks whose tables were loaded again, with what has their flows go by them."""
        self._connected: set[str] = set()
        """The databases that were connected when last looked at."""

    @property
    def due(self) -> float | None:
        """When there will be something to do, in seconds of time.monotonic()."""
        times = [*self._changed.values()]
        others = (self._sweep_due, self._ends_due, self._filters_due, self.guard.due)
        times += [due for due in others if due is not None]
        times += [0.0] if self._astray else []
        return min(times, default=None)

    def everything(self, delay: float = DELAY) -> None:
        """Look at every tap of ours, in so many seconds at the latest."""
        due = time.monotonic() + delay
        self._sweep_due = due if self._sweep_due is None else min(due, self._sweep_due)

    def _look_at_ends(self, delay: float) -> None:
        """Look at whose process may have ended in so many seconds at the latest."""
        due = time.monotonic() + delay
        self._ends_due = due if self._ends_due is None else min(due, self._ends_due)

    def later(self) -> None:
        """Look at every tap of ours again, for something has failed: later each time."""
        self.everything(self._again)
        self._again = min(2 * self._again, AGAIN_LAST)

    def take(self, events: list[LinkEvent] | None) -> None:
        """Take in what has happened to links; None: some of it was lost."""
        if events is None:
            self.everything()
            return
        for event in events:
            if event.kind in self._made:
                self._links_changed = True
                # NOTE: filters are bound to a link by its name, which may be another now.
                self._look_at_filters()
            elif event.kind == "tun" and event.gone:
                self._gone.add(event.name)
                self._denied.pop(event.name, None)
                self._networks = True
            elif event.kind == "tun":
                # NOTE: whoever closed it may be about to end.
                self._look_at_ends(DELAY if event.idle else ENDS)
                if event.loose and event.name not in self._failed:
                    self._changed.setdefault(event.name, time.monotonic() + DELAY)
            elif event.kind == "bridge":
                self._take_bridge(event)

    def _take_bridge(self, event: LinkEvent) -> None:
        """Take in that a bridge has come, changed or gone."""
        if event.gone:
            self._bridges.pop(event.index, None)
            if self._makes_networks():
                self.everything()
            return
        # NOTE: one that comes up takes in taps, as one that comes.
        now = event.name, event.up
        if self._bridges.get(event.index) != now:
            self._bridges[event.index] = now
            self.everything()

    def take_rules(self, networks: set[str] | None) -> None:
        """Take in whose tables were touched, FILTERS among them; None: any may have been."""
        if networks is None or FILTERS in networks:
            self._look_at_filters()
        self.guard.take(None if networks is None else networks - {FILTERS})

    def _look_at_filters(self) -> None:
        """Look at the filters of all links of our making soon."""
        due = time.monotonic() + DELAY
        self._filters_due = due if self._filters_due is None else min(due, self._filters_due)

    def take_ends(self) -> None:
        """Take in that processes have ended that have links of our making."""
        if self.ends.take():
            self._look_at_ends(0.0)

    def work(self) -> Iterator[tuple[str, Chore]]:
        """Yield the taps that something is to be done about now, and what. Raises Failure."""
        now = time.monotonic()
        self._take_news_of_databases(now)
        if self._links_changed:
            self._watch_processes()
        if self._networks and self._makes_networks():
            yield from self._look_for_networks(self.pool.kernel.links())
        self._networks = False
        gone, self._gone = self._gone, set()
        for name in gone:
            yield from self._look_at(name)
        for name in [name for name, due in self._changed.items() if now >= due]:
            del self._changed[name]
            yield from self._look_at(name)
        if self._sweep_due is not None and now >= self._sweep_due:
            self._sweep_due = None
            self._failed.clear()
            # NOTE: what was flushed while nobody listened.
            self.take_rules(None)
            self._look_at_ends(0.0)
            self._watch_processes()
            yield from self._sweep()
            strays = "what a crash has left"
            yield strays, partial(self._do, strays, self._end_strays)
        if self._ends_due is not None and now >= self._ends_due:
            self._ends_due = None
            yield from self._look_for_ends()
        if self._filters_due is not None and now >= self._filters_due:
            self._filters_due = None
            yield from self._look_for_filters()
        if self.guard.due is not None and now >= self.guard.due:
            yield from self._guard(now)
        while self._astray:
            network, forget = self._astray.popitem()
            # NOTE: it is of no tap or bridge.
            name = f"flows of network {network}"
            yield name, partial(self._do, name, forget)

    def _look_for_ends(self) -> Iterator[tuple[str, Chore]]:
        """Yield what takes away the taps whose processes have ended. Raises Failure."""
        taps = list(filter(_may_have_ended, self.pool.kernel.links()))
        if taps:
            yield "taps' processes", partial(self._end_taps, taps)

    def _look_for_filters(self) -> Iterator[tuple[str, Chore]]:
        """Yield each link of our making, and what keeps its filters loaded. Raises Failure.

        Those are left out of which all is as it was when they had what they shall.
        """
        links = [each for each in self.pool.kernel.links() if kinds.maker_of(each) is not None]
        indexes = {link.index for link in links}
        self._filtered = {at: was for at, was in self._filtered.items() if at in indexes}
        if not links:
            return
        # NOTE: once for all of them: what it takes grows with their number.
        chains = _by_link(nft.read_all(in_force=True))
        for link in links:
            named, bound = chains.get(chain_name(link.index), {}), chains.get(f"/{link.name}", {})
            was = self._filtered.get(link.index)
            is_same = was is not None and was[0] is self.cache.policy
            if was is None or not is_same or was[1:] != (link, {**named, **bound}):
                yield link.name, partial(self._do, link.name, self._keep_filters)

    def _watch_processes(self) -> None:
        """Watch for the end of each process that has a link of our making. Raises Failure."""
        self._links_changed = False
        marks = [link.mark for link in self.pool.kernel.links() if kinds.maker_of(link)]
        if self.ends.watch({(mark.pid, mark.start) for mark in marks if mark is not None}):
            self._look_at_ends(0.0)

    def _take_news_of_databases(self, now: float) -> None:
        """Note which taps are to be looked at for what the databases tell. Raises Failure."""
        connected = self._databases()
        if connected.keys() - self._connected:
            # What happened while nobody looked.
            self.everything()
        self._connected = set(connected)
        for database in connected.values():
            bridges_new, ports_changed = database.take_news()
            if bridges_new:
                self.everything()
            # NOTE: the port of no link may have any name, and is not ours.
            self._changed.update(dict.fromkeys(filter(is_valid_name, ports_changed), now + DELAY))

    def _makes_networks(self) -> bool:
        """Tell whether the policy has networks that are made for taps."""
        policy = self.cache.policy
        return policy is not None and any(each.made for each in policy.networks.values())

    def _look_for_networks(self, links: list[Link]) -> Iterator[tuple[str, Chore]]:
        """Return the bridges that were made for taps and have none, and what takes them away."""
        masters = {link.master for link in links}
        for link in links:
            if link.alias.startswith(BRIDGE_MARK) and link.index not in masters:
                yield link.name, partial(self._do, link.name, self._leave_network)

    @staticmethod
    async def _leave_network(host: Host) -> None:
        assert host.tap is not None
        await made.leave_bridge(host, host.tap)

    def _guard(self, now: float) -> Iterator[tuple[str, Chore]]:
        """Return the bridges of the networks whose tables are to be looked at, and the work."""
        links = self.pool.kernel.links()
        if not has_networks(links):
            self.guard.ripe(now, ())
            return
        from pyqemu_ifup.made.guard import Guarded, find_guarded, forget_flows, guard

        networks = find_guarded(self.cache.policy, links)
        for name in self.guard.ripe(now, networks):

            async def look(host: Host, name: str = name, each: Guarded = networks[name]) -> None:
                fault = await guard(host, name, each.bridge, each.made)
                if fault:
                    self.guard.found(name, fault, each.remedy if each.made is None else "")
                if fault and each.made is not None:
                    self._astray[name] = partial(forget_flows, network=name, wanted=each.made)

            bridge = networks[name].bridge
            yield bridge, partial(self._do, bridge, look)

    def _look_at(self, name: str) -> Iterator[tuple[str, Chore]]:
        ports = [port for each in self._databases().values() for port in each.ports(name)]
        link = self.pool.kernel.look_up(name)
        leftovers = kinds.judge(ports, [link] if link is not None else [], self.here)
        if any(leftover.remove is not None for leftover in leftovers):
            yield name, partial(self._clean, name)
        elif link is not None and self._has_lost(link):
            yield name, partial(self._bring_back, name)

    def _databases(self) -> dict[str, Database]:
        return {
            address: database
            for address, database in self.pool.databases.items()
            if database.is_connected
        }

    def _sweep(self) -> list[tuple[str, Chore]]:
        # NOTE: the ports before the links: a tap is there before its port is.
        ports = [port for each in self._databases().values() for port in each.ports()]
        links = self.pool.kernel.links()
        leftovers = [
            each for each in kinds.judge(ports, links, self.here) if each.remove is not None
        ]
        found: list[tuple[str, Chore]] = [
            (each.port.name, partial(self._clean, each.port.name)) for each in leftovers
        ]
        found += self._look_for_networks(links)
        lost = filter(self._has_lost, links)
        found += [(link.name, partial(self._bring_back, link.name)) for link in lost]
        if not found:
            self._again = AGAIN_FIRST
        return found

    def _has_lost(self, link: Link) -> bool:
        """Tell whether a running guest's tap is not on its bridge, which is there again."""
        mark = link.mark
        # NOTE: a down takes the link down before all else, so that it is not mistaken for a loss.
        if mark is None or not link.up or not _runs(link, mark):
            return False
        bridge = self.pool.kernel.look_up(mark.bridge)
        database = self._databases().get(mark.ovsdb or "")
        if kinds.load(mark.kind).is_lost(link, bridge, database):
            return True
        # NOTE: one that is made for taps is made, and brought up, as a tap is attached.
        policy = self.cache.policy
        network = policy.networks.get(mark.network) if policy is not None else None
        is_made = network is not None and network.made is not None
        is_off = bridge is None or (bridge.kind in kinds.master_kinds(mark.kind) and not bridge.up)
        return link.master is None and is_made and is_off

    async def _keep_filters(self, host: Host) -> None:
        """Give a link of our making back what somebody else has taken: its filters."""
        assert host.tap is not None
        link = host.kernel.look_up(host.tap)
        mark, kind = link.mark if link is not None else None, kinds.maker_of(link)
        if link is None or mark is None or kind is None:
            return
        policy = await self.cache.current(host.deadline)
        asked = find_user_said(policy, mark)
        user = (await self.users.find(asked, host.deadline)) if asked is not None else None
        try:
            _, port = self._wanted(policy, link, mark, user)
            lock = await lock_tap(link.index, host.deadline.child(SHORT))
        except Failure as failure:
            # NOTE: one that is denied by now is told of by status, and cut off by apply.
            if failure.status is Status.TRY_AGAIN:
                self._filters_due = time.monotonic() + SHORT
            elif failure.status is not Status.DENIED:
                raise
            return
        with lock:
            seen = kinds.look(host, link.name, port.place.name)
            is_same = seen.tap is not None and (seen.tap.index, seen.tap.mark) == (link.index, mark)
            # NOTE: one that is down is being made, or taken away.
            if not is_same or not link.up or not kind.is_in_place(port, seen, self.here):
                return
            plan, _ = kind.change(port, seen, mark, self.here)
            if not plan and seen.tap is not None and isinstance(seen.own, Filtered):
                found = {chain.name: chain for chain in seen.own.chains}
                self._filtered[link.index] = policy, seen.tap, found
            await take_steps(host, plan)
        now = time.monotonic()
        if plan and now >= self._filters_told.get(link.name, 0.0):
            self._filters_told[link.name] = now + SILENCE
            log(
                syslog.LOG_WARNING,
                f"{quote(link.name)}: somebody else has removed or changed its filters, which are "
                "loaded again; see who manages the ruleset: nft monitor",
            )

    async def _end_strays(self, host: Host) -> None:
        """Take away what a crash has left that no port tells of."""
        for kind in kinds.makers():
            for stray in await kind.find_strays(host):
                await take_steps(host, stray.plan)
                log(syslog.LOG_NOTICE, f"{quote(stray.name)}: taken away: {stray.because}")

    async def _end_taps(self, taps: list[Link]) -> None:
        """Take away the taps whose process has ended, a user's where his right to it has."""
        for ended in await find_ended(taps, LIMIT, roots=True):
            await self._do(ended.link.name, partial(self._end, ended=ended))
        self._look_at_ends(ENDS)

    @staticmethod
    async def _end(host: Host, ended: Ended) -> None:
        if await end(host, ended):
            log(syslog.LOG_NOTICE, f"{quote(ended.link.name)}: taken away: {ended.because}")

    def _clean(self, tap: str) -> Task[None]:
        """Remove the ports of ours that a tap which is gone has left."""
        return self._do(tap, self._clean_locked)

    def _bring_back(self, tap: str) -> Task[None]:
        """Attach a tap again, by the policy in force, for the process that it was attached for."""
        return self._do(tap, self._bring_back_as_wanted)

    async def _do(self, tap: str, work: Callable[[Host], Task[None]]) -> None:
        """Do the work when earlier work on the tap is done; where it fails, look again later."""
        deadline = Deadline(LIMIT, late="it is tried again")
        with self.tap_lock.queue(tap) as ticket:
            try:
                await ticket.acquire(deadline)
                with self.pool.host(tap, deadline, lambda command: None) as host:
                    await work(host)
            except BaseException:
                self.later()
                raise

    async def _clean_locked(self, host: Host) -> None:
        assert host.tap is not None
        with await lock_by_name(host.tap, host.deadline):
            await self._clean_alone(host, host.tap)

    async def _clean_alone(self, host: Host, tap: str) -> None:
        host.databases.update(self._databases())
        ports = host.ports(tap)
        link = host.kernel.look_up(tap)
        for leftover in kinds.judge(ports, [link] if link is not None else [], self.here):
            if leftover.remove is not None:
                await remove(host, leftover.remove)
                self._again = AGAIN_FIRST
                log(
                    syslog.LOG_INFO,
                    f"{quote(tap)}: port on {readable(leftover.port.bridge or '')} removed: "
                    f"{leftover.because}",
                )

    async def _bring_back_as_wanted(self, host: Host) -> None:
        assert host.tap is not None
        policy = await self.cache.current(host.deadline)
        with host.until(host.deadline.allowing(policy.timeout)):
            await self._bring_back_by(host, host.tap, policy)

    async def _bring_back_by(self, host: Host, tap: str, policy: Policy) -> None:
        link = host.kernel.look_up(tap)
        mark = link.mark if link is not None else None
        if link is None or mark is None:
            return
        asked = find_user_said(policy, mark)
        user = (await self.users.find(asked, host.deadline)) if asked is not None else None
        database = None
        if mark.ovsdb is not None:
            database = await self.pool.connected(mark.ovsdb, host.deadline)
        try:
            # NOTE: not for long, for whoever calls for this tap has to wait for us.
            lock = await lock_tap(link.index, host.deadline.child(SHORT))
        except Failure as failure:
            if failure.status is not Status.TRY_AGAIN:
                raise
            self._changed[tap] = time.monotonic() + SHORT
            return
        with lock:
            if database is not None:
                # NOTE: a hook that does without us, or apply, may just have put it there.
                await database.sync(host.deadline)
            now = host.kernel.look_up(tap)
            if now is None or (now.index, now.mark) != (link.index, mark):
                self.everything()
                return
            # NOTE: a policy that has changed since has every tap looked at again.
            if self._has_lost(now) and self.cache.policy is policy:
                await self._attach_again(host, policy, now, mark, user)

    async def _attach_again(
        self, host: Host, policy: Policy, link: Link, mark: Mark, user: User | None
    ) -> None:
        try:
            caller, port = self._wanted(policy, link, mark, user)
        except Failure as failure:
            if failure.status is not Status.DENIED:
                raise
            # NOTE: once: whatever has every tap looked at again is no news of this one.
            if self._denied.get(link.name) != (link.index, str(failure)):
                self._denied[link.name] = link.index, str(failure)
                log(
                    syslog.LOG_WARNING,
                    f"{quote(link.name)}: not brought back to {readable(mark.bridge)}: {failure}",
                )
            return
        holder = Holder(caller, mark.pid, mark.uid, mark=mark)
        try:
            await attach_alone(host, port, holder)
        except BaseException:
            await self._leave_lost(host, link)
            raise
        self._again = AGAIN_FIRST
        self._denied.pop(link.name, None)
        log(syslog.LOG_NOTICE, f"{success_line(port, caller)}: its {port.place.noun} had lost it")

    async def _leave_lost(self, host: Host, before: Link) -> None:
        """Give a tap that could not be attached again its mark and link back, to be tried again."""
        kernel = self.pool.kernel
        link = kernel.look_at(before.index)
        if link is None or link.name != before.name or (link.alias and link.mark is None):
            return
        master = kernel.look_at(link.master) if link.master is not None else None
        # NOTE: ovs-vswitchd may take its time to let go of a port whose row has gone.
        if master is None or kinds.may_linger(master):
            await host.run(SetAlias(link.name, link.index, before.alias))
            # NOTE: that is no news, for which it would be tried again at once.
            self._failed.add(link.name)
            await host.run(SetUp(link.name, link.index))

    @staticmethod
    def _wanted(policy: Policy, link: Link, mark: Mark, user: User | None) -> tuple[Caller, Port]:
        """Return what the tap shall have by now, on the network that it was put on.

        Raises Failure (77) where the rules, or the network's users, have it there no more, or its
        holder has given it away.
        """
        check_given(link)
        caller, port = find_marked(
            policy, link.name, mark, user, root_made=is_root_made(link, mark.uid)
        )
        if port.network != mark.network:
            raise Failure(
                Status.DENIED,
                f"denied network {readable(mark.network)}",
                f"the rule at {port.position} has it on network {port.network} by now",
                f"move it: {ifctl('apply', link.name)}",
            )
        return caller, port
