"""What doctor's checks share: a fault, the commands that mend one, and what the policy wants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Kind, Network, Policy, Port, Position, Rule, Vlan, merge
from pyqemu_ifconf.settings.vlan import VID_MAX
from pyqemu_ifconf.shell import Command
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifup import kinds
from pyqemu_ifup.look import Seen


@dataclass(frozen=True)
class Fault:
    """What a check has found of one thing; `do` says what mends it where no command does."""

    what: str
    why: str
    command: Command | None
    do: str | None = None


def fault_of(failure: Failure, why: str) -> Fault:
    """Return the fault of what up would end with, or QEMU; `why` is what comes of it."""
    what = f"{failure.what}: {failure.why}" if failure.why else failure.what
    if isinstance(failure.remedy, Command):
        return Fault(what, why, failure.remedy)
    return Fault(what, why, None, failure.remedy)


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


def vids_wanted(scene: Scene, bridge: str) -> dict[int, Wanted]:
    """Return the VIDs that the policy wants on a bridge, each with the first that wants it."""
    found: dict[int, Wanted] = {}
    looked_at = set()
    for want in scene.wanted.get(bridge, ()):
        if want.vlan is None or want.vlan in looked_at or len(found) == VID_MAX:
            continue
        looked_at.add(want.vlan)
        native = () if want.vlan.native is None else (want.vlan.native,)
        for vid in (*native, *want.vlan.trunk):
            found.setdefault(vid, want)
    return found


def wanted_kind(network: Network) -> str | None:
    """Return what kind of bridge a network is to be on, None where that is looked up.

    One with `nat` makes a Linux bridge.
    """
    return "linux" if network.nat is not None else network.kind


def each_bridge(scene: Scene) -> list[Network]:
    """Return the first network on each bridge, but on one of somebody else's (`nat-needs`)."""
    found: dict[tuple[str, str], Network] = {}
    if isinstance(scene.policy, Policy):
        for network in scene.policy.networks.values():
            if not scene.is_other_s(network):
                found.setdefault((network.bridge, network.ovsdb), network)
    return list(found.values())


def kinds_of(scene: Scene, network: Network) -> list[Kind]:
    """Return what kinds of bridge have the name of a network's."""
    switch = scene.switches.get(network.ovsdb)
    has_it = switch is not None and any(each.name == network.bridge for each in switch.bridges)
    databases = (network.ovsdb,) if has_it else ()
    seen = Seen(None, bridge=scene.link(network.bridge), ovs_bridges=databases)
    port = Port("", network.name, network.bridge, network.position, ovsdb=network.ovsdb)
    return [kind.name for kind in kinds.tap_kinds() if kind.is_there(port, seen)]
