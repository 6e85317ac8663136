"""What doctor's checks share: a fault, and what they ask of a Scene."""

from __future__ import annotations

from pyqemu_ifconf.policy import Kind, Network, Policy, Port
from pyqemu_ifconf.settings.vlan import VID_MAX
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifctl.doctor.wanted import Wanted
from pyqemu_ifup import kinds
from pyqemu_ifup.look import Seen


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
    port = Port("", network.name, network.place, network.position)
    return [kind.name for kind in kinds.tap_kinds() if kind.is_there(port, seen)]
