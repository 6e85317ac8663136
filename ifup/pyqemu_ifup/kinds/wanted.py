"""What the policy wants of each bridge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Network, Policy, Position, Rule, Vlan, merge


@dataclass(frozen=True)
class Wanted:
    """What one network, or one rule or NIC on it, wants of its bridge."""

    network: Network
    position: Position
    vlan: Vlan | None
    mtu: int | None


def wants(policy: Policy | Failure) -> Iterator[Wanted]:
    """Yield what each network, and each rule and NIC on one, wants."""
    if isinstance(policy, Failure):
        return
    rules: list[tuple[Network, Position, Rule | None]] = [
        (each, each.position, None) for each in policy.networks.values()
    ]
    rules += [
        (policy.networks[rule.network], rule.position, rule)
        for rule in policy.rules
        if rule.network is not None
    ]
    for network, position, rule in rules:
        settings = network.settings if rule is None else merge(network.settings, rule.settings)
        vlan, mtu = settings.given.get("vlan"), settings.given.get("mtu")
        yield Wanted(
            network,
            position,
            vlan if isinstance(vlan, Vlan) else None,
            mtu if isinstance(mtu, int) else None,
        )
