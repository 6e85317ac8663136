"""Looks whether the tables of made networks are as they were loaded, and loads them again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Nat, Policy
from pyqemu_ifconf.shell import quote
from pyqemu_ifup.drivers import nft_program as nft
from pyqemu_ifup.drivers.nft_table import Table
from pyqemu_ifup.drivers.sysctl import read_sysctl
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link
from pyqemu_ifup.made.lock import hold
from pyqemu_ifup.made.names import find_bridge, network_of, ports_of
from pyqemu_ifup.made.nat.filter import LoadTable
from pyqemu_ifup.made.nat.flows import forget
from pyqemu_ifup.made.nat.loopback import ShutBolt
from pyqemu_ifup.made.nat.rules import wanted_table, wants_loopback
from pyqemu_ifup.made.nat.switches import ALL_LOCALNET

OLDER = "not as the policy says"
"""What is wrong with a table that is as it was loaded, by an older policy."""


@dataclass(frozen=True)
class Guarded:
    """A network that has ports: its bridge, and what the policy wants of it there.

    `made` is None if the policy has no such network, or another bridge for it.
    """

    bridge: str
    made: Nat | None

    @property
    def remedy(self) -> str:
        """What is to be done if the policy does not say what to load."""
        return (
            "take its taps down, or have the policy give the network back its nat: and bridge: "
            f"{quote(self.bridge)}"
        )


def find_guarded(policy: Policy | None, links: Iterable[Link]) -> dict[str, Guarded]:
    """Return the networks that were made and have ports; `policy` is None if there is none."""
    links = list(links)
    masters = {link.master for link in links}
    found = {}
    for link in links:
        name = network_of(link)
        if name is not None and link.index in masters:
            network = policy.networks.get(name) if policy is not None else None
            is_wanted = network is not None and network.place.name == link.name
            found[name] = Guarded(link.name, network.made if network and is_wanted else None)
    return found


async def guard(
    host: Host, network: str, bridge: str, wanted: Nat | None, *, dry_run: bool = False
) -> str:
    """Load the table of a network that has ports, if it is not as it was loaded.

    A table that is as an older policy had it loaded stays; without `wanted` it is only looked at.
    Then `forget_flows` is due, for which nobody needs to wait. Returns in
    words what was wrong, "" for nothing. Raises Failure: 75 with the host's deadline, 77, 71.
    """
    async with hold(host, network):
        links = host.kernel.links()
        link = find_bridge(links, network)
        if link is None or link.name != bridge or not ports_of(links, link):
            return ""
        table = await nft.read_table(network, host.deadline)
        fault = Table.fault(table)
        if wanted is not None and not dry_run:
            is_needed = wants_loopback(wanted) or read_sysctl(ALL_LOCALNET) == "1"
            await ShutBolt(network, bridge, is_needed).run(host)
            if fault:
                loaded = wanted_table(network, bridge, wanted)
                await host.run(LoadTable(network, bridge, loaded, table is not None))
        return fault


async def find_table_faults(
    host: Host, policy: Policy | None, links: Iterable[Link]
) -> dict[str, str | Failure]:
    """Return in words what is wrong with the table of each network that has ports, or "".

    A Failure stands in place of each that could not be read.
    """
    found: dict[str, str | Failure] = {}
    for name, each in find_guarded(policy, links).items():
        try:
            table = await nft.read_table(name, host.deadline)
        except Failure as failure:
            found[name] = failure
            continue
        found[name] = Table.fault(table)
        if each.made is not None and not found[name]:
            wanted = wanted_table(name, each.bridge, each.made)
            found[name] = "" if table == wanted else OLDER
    return found


async def forget_flows(host: Host, network: str, wanted: Nat) -> None:
    """Have no flow go on that does not go by the network's table. Raises Failure."""
    await forget(host, network, wanted)
