"""Makes a network for its first port, and takes it away after its last.

The network's lock serialises all who do so. What is there, and whose it is, the live system says.
"""

from __future__ import annotations

import syslog
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Generic

from pyqemu_ifconf.failure import Failure, Lacking, Status
from pyqemu_ifconf.policy import Nat
from pyqemu_ifconf.shell import Command, ifctl, quote
from pyqemu_ifup.hook import log, tell_left
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link
from pyqemu_ifup.made.base import MadeNetwork, S, WantedNetwork
from pyqemu_ifup.made.bridge import MarkBridge
from pyqemu_ifup.made.folder import folders, forget, is_bare
from pyqemu_ifup.made.lock import hold
from pyqemu_ifup.made.names import find_bridge, network_of, ports_of
from pyqemu_ifup.made.nat.look import Seen
from pyqemu_ifup.made.nat.needs import own_bridge
from pyqemu_ifup.made.nat.network import NatNetwork
from pyqemu_ifup.ops import Plan
from pyqemu_ifup.steps import take_each, take_steps


def sort_of(made: Nat) -> MadeNetwork[Seen]:
    """Return what makes a network that the policy has made so."""
    return NatNetwork()


class _Attempt(Generic[S]):
    """One attempt to have a network there: its folder, and what is to be taken back of it.

    `changed` tells whether the network has been changed, and `before` what it was until then, None
    if it had no port.
    """

    def __init__(self, sort: MadeNetwork[S], wanted: WantedNetwork, folder: str) -> None:
        self.sort = sort
        self.wanted = wanted
        self.folder = folder
        self.changed = False
        self.before: S | None = None

    async def make(self, host: Host) -> None:
        """Make what of the network is not as it is wanted, and prove that it is so.

        Raises Failure.
        """
        sort, wanted = self.sort, self.wanted
        link = own_bridge(host, wanted.network, wanted.bridge)
        if lacking := sort.find_lacking(wanted):
            raise lacking[0]
        seen = await sort.look(host, wanted) if link is not None else None
        if seen is not None and not sort.differences(wanted, seen):
            return
        await sort.require(host, wanted)
        if seen is None:
            seen = await sort.look(host, wanted)
        if link is not None and ports_of(host.kernel.links(), link):
            self.before = seen
        self.changed = True
        await take_steps(host, sort.make(wanted, seen))
        if found := sort.differences(wanted, await sort.look(host, wanted)):
            raise Failure(
                Status.REFUSED,
                f"network {wanted.network}: what was read back differs",
                "; ".join(found),
                "see who else manages this bridge",
            )
        if link is None:
            made = f"network {wanted.network}: made, on bridge {quote(wanted.bridge)}"
            log(syslog.LOG_INFO, made)
            await sort.tell(host, wanted)

    async def take_back(self, host: Host) -> bool:
        """Take back what was done for a port that could not join; return whether all was.

        A network that has no port goes. Syslog is told what cannot be taken back, so that the
        caller hears of the cause.
        """
        network = self.wanted.network
        if not self.changed and find_bridge(host.kernel.links(), network) is None:
            # NOTE: what an earlier run has left is for the next one, which has to find it.
            if is_bare(self.folder):
                forget(self.folder)
            return True
        try:
            with host.until(host.deadline.undo()):
                if not await _leave(host, network, self.folder) and self.before is not None:
                    await take_each(host, self.sort.restore(self.wanted, self.before))
        except Failure as failure:
            log(
                syslog.LOG_ERR,
                f"network {network}: not taken back: {failure}; {ifctl('gc')} removes what no tap "
                f"is on, and {ifctl('apply')} puts the policy in force",
            )
            return False
        return True


@asynccontextmanager
async def ensure(host: Host, wanted: WantedNetwork, tap: str) -> AsyncIterator[None]:
    """See to it that the network is there, and hold its lock while `tap` joins it in the block.

    Raises Failure. If it fails, or the block does, the network is what it was before.
    """
    sort = sort_of(wanted.made)
    try:
        async with hold(host, wanted.network) as folder:
            attempt = _Attempt(sort, wanted, folder)
            try:
                await attempt.make(host)
                yield
            except BaseException as error:
                if not await attempt.take_back(host):
                    tell_left(error, host.deadline.stopped, tap)
                raise
    except Lacking:
        # NOTE: what else this container lacks is told with it.
        await sort.require(host, wanted)
        raise


# Telling


async def find_differences(host: Host, wanted: WantedNetwork) -> tuple[str, ...]:
    """Return in words what `ensure` would change of a network that is there; change nothing.

    Raises Failure: 75 with the host's deadline, 77 if its bridge is somebody else's.
    """
    if own_bridge(host, wanted.network, wanted.bridge) is None:
        return ()
    sort = sort_of(wanted.made)
    async with hold(host, wanted.network):
        return sort.differences(wanted, await sort.look(host, wanted))


async def find_unmet(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """Return why `ensure` could not make the network, the first as it would end; change nothing.

    A Forbidden among them is what this process may not look at; one (75) with the deadline is the
    last, and what comes after that has not been looked at.
    """
    return await sort_of(wanted.made).find_unmet(host, wanted)


async def plan_to_make(host: Host, wanted: WantedNetwork) -> Plan:
    """Return the steps that `ensure` would take now; change nothing.

    Of a network without a bridge, what this process may not look at counts as not there. Raises
    Failure: 75 with the host's deadline, 77 if the bridge is somebody else's.
    """
    sort = sort_of(wanted.made)
    link = own_bridge(host, wanted.network, wanted.bridge)
    seen = await sort.look(host, wanted, guess=link is None)
    if link is not None and not sort.differences(wanted, seen):
        return ()
    return sort.make(wanted, seen)


def commands_of(plan: Plan) -> tuple[tuple[Command, ...], tuple[Command, ...]]:
    """Return the commands of a plan to make a network, as before and as after the port joins it.

    Nobody who types them has the network's lock. So the mark comes last: an agent takes away a
    bridge that is marked and has no port.
    """
    marks = [op for op in plan if isinstance(op, MarkBridge)]
    others = [op for op in plan if not isinstance(op, MarkBridge)]
    return (
        tuple(line for op in others for line in op.commands()),
        tuple(line for op in marks for line in op.commands()),
    )


# Taking away


async def leave(host: Host, network: str) -> bool:
    """Take the network away if it has no port; return whether that is so. Raises Failure."""
    async with hold(host, network) as folder:
        return await _leave(host, network, folder)


async def _leave(host: Host, network: str, folder: str) -> bool:
    """Do as `leave`, with the lock held."""
    links = host.kernel.links()
    link = find_bridge(links, network)
    if link is not None and ports_of(links, link):
        return False
    # NOTE: the policy need not have the network any more, and each sort takes what is its own.
    plan = NatNetwork().unmake(network, link.name if link is not None else "", folder)
    with host.until(host.deadline.lasting()):
        await take_each(host, plan)
        # NOTE: the folder is there until nothing else is, so that what is left is found.
        forget(folder)
    log(syslog.LOG_INFO, f"network {network}: taken away")
    return True


async def leave_all(host: Host, bridges: Iterable[Link], network: str | None) -> None:
    """Take away the networks of these bridges if they have no port, and those without a bridge.

    With a `network` only that one of the latter, "" for none. Raises Failure.
    """
    found = {network_of(link): link for link in bridges}
    for name, link in found.items():
        if name is not None and not ports_of(host.kernel.links(), link):
            await leave(host, name)
    for name in folders():
        if name not in found and network in (None, name):
            await leave(host, name)


async def find_left(host: Host) -> list[tuple[str, str]]:
    """Return the networks of ours that have no port, or of which a part is left, with the bridge.

    The bridge's name is empty if only other parts are left.
    """
    links = host.kernel.links()
    masters = {link.master for link in links}
    in_use: set[str] = set()
    found: dict[str, str] = {}
    for link in links:
        network = network_of(link)
        if network is not None and link.index in masters:
            in_use.add(network)
        elif network is not None:
            found[network] = link.name
    for network in (*await NatNetwork().leftovers(host), *folders()):
        found.setdefault(network, "")
    return [(name, bridge) for name, bridge in sorted(found.items()) if name not in in_use]
