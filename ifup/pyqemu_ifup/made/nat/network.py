"""A network with `nat:` as the engine of made networks knows it."""

from __future__ import annotations

from collections.abc import Sequence

from pyqemu_ifconf.failure import Failure
from pyqemu_ifup.drivers import dnsmasq
from pyqemu_ifup.drivers import nft_program as nft
from pyqemu_ifup.host import Host
from pyqemu_ifup.made.base import WantedNetwork
from pyqemu_ifup.made.nat import firewalls, needs, plan
from pyqemu_ifup.made.nat.look import Seen, look
from pyqemu_ifup.made.nat.server import EndServer
from pyqemu_ifup.ops import Plan


class NatNetwork:
    """See MadeNetwork."""

    def find_lacking(self, wanted: WantedNetwork) -> Sequence[Failure]:
        """Return a Failure (69) for nft(8) or dnsmasq(8) if it is needed and not there."""
        return needs.find_lacking(wanted)

    async def require(self, host: Host, wanted: WantedNetwork) -> None:
        """Check all needs, as an up does."""
        await needs.require(host, wanted)

    async def find_unmet(self, host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
        """Check all needs, and try whether nft(8) and dnsmasq(8) take what they are given."""
        return await needs.find_unmet(host, wanted)

    async def look(self, host: Host, wanted: WantedNetwork, *, guess: bool = False) -> Seen:
        """Look at bridge, switches, table and dnsmasq."""
        return await look(host, wanted, guess=guess)

    def make(self, wanted: WantedNetwork, seen: Seen) -> Plan:
        """Return the steps from what is seen to what is wanted."""
        return plan.make(wanted, seen)

    def restore(self, wanted: WantedNetwork, before: Seen) -> Plan:
        """Return the steps back to what was seen before."""
        return plan.restore(wanted, before)

    def unmake(self, network: str, bridge: str, folder: str) -> Plan:
        """Return the steps that take away dnsmasq, bridge and table."""
        end = EndServer(network, bridge, folder, *dnsmasq.read_last(folder))
        return plan.unmake(end)

    def differences(self, wanted: WantedNetwork, seen: Seen) -> tuple[str, ...]:
        """Return in words what is not as it is wanted."""
        return plan.differences(wanted, seen)

    async def tell(self, host: Host, wanted: WantedNetwork) -> None:
        """Tell of other firewalls that drop what is forwarded."""
        await firewalls.tell_of_firewalls(host, wanted)

    async def leftovers(self, host: Host) -> Sequence[str]:
        """Return the networks that have a table of ours."""
        found = []
        for network in await nft.find_table_networks(host.deadline):
            table = await nft.read_table(network, host.deadline)
            if table is not None and table.ours:
                found.append(network)
        return found
