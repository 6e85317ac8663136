"""This host at one moment, which status, info, graph and doctor are made of.

It is filled in by pyqemu-ifctl; what a kind of bridge shows of it is pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.policy import Network, Policy, Port, refuses_taps
from pyqemu_ifconf.settings.vlan import VID_MAX
from pyqemu_ifup.kinds.base import TapKind
from pyqemu_ifup.kinds.vswitchd import Vswitchd
from pyqemu_ifup.kinds.wanted import Wanted, wants
from pyqemu_ifup.look import Link, OvsPort, OvsSwitch, Seen, Vid
from pyqemu_ifup.made.names import is_ours
from pyqemu_ifup.mark import Here
from pyqemu_ifup.on_port import NOTHING, Sights


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """This host at one moment, as far as taps, and what they are on, go.

    `vids` are those of each port of a Linux bridge that filters VLANs, by its ifindex. `ports` are
    of the databases that answered, and `ovs_bridges` tells which of these have a bridge, by the
    name of each bridge of the policy. `failed` are the databases that did not answer, and `unasked`
    these and those that there was no time for. `left` are the taps without a mark of ours that a
    `leave` rule has by their name. `own` is what the kinds that make links see of each beside, by
    its ifindex. `sights` are the links with their addresses, and the routes.
    `vids` and `sights` are None if there was no time for them.

    The rest is there if details were asked for. `pinned` tells of a Linux bridge whether its MAC
    was set, None if that is not known. `switches` tells how each Open vSwitch is, by the address of
    its database, and `vswitchd` how it is run. `absent` are the databases of the policy that are
    not there at all. `host_id` is no other host's.
    """

    policy: Policy | Failure
    here: Here
    links: tuple[Link, ...] = ()
    ports: tuple[OvsPort, ...] = ()
    vids: Mapping[int, tuple[Vid, ...]] | None = field(default_factory=dict)
    ovs_bridges: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    failed: Mapping[str, Failure] = field(default_factory=dict)
    unasked: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()
    own: Mapping[int, object] = field(default_factory=dict)
    sights: Sights | None = NOTHING
    pinned: Mapping[str, bool | None] = field(default_factory=dict)
    switches: Mapping[str, OvsSwitch] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    vswitchd: Vswitchd = field(default_factory=Vswitchd)
    host_id: str = ""

    def link(self, name: str) -> Link | None:
        """Return the link of this name."""
        return next((link for link in self.links if link.name == name), None)

    def vids_of(self, link: Link) -> tuple[Vid, ...]:
        """Return the VIDs of a bridge's port, none if they are not known."""
        return (self.vids or {}).get(link.index, ())

    @cached_property
    def wanted(self) -> dict[str, list[Wanted]]:
        """What the policy wants of each bridge, by its name."""
        found: dict[str, list[Wanted]] = {}
        for want in wants(self.policy):
            found.setdefault(want.network.place.name, []).append(want)
        return found

    def vids_wanted(self, bridge: str) -> dict[int, Wanted]:
        """Return the VIDs that the policy wants on a bridge, each with the first that wants it."""
        found: dict[int, Wanted] = {}
        looked_at = set()
        for want in self.wanted.get(bridge, ()):
            if want.vlan is None or want.vlan in looked_at or len(found) == VID_MAX:
                continue
            looked_at.add(want.vlan)
            native = () if want.vlan.native is None else (want.vlan.native,)
            for vid in (*native, *want.vlan.trunk):
                found.setdefault(vid, want)
        return found

    def is_other_s(self, network: Network) -> bool:
        """Tell whether what has the name of the bridge that a network makes is somebody else's."""
        link = self.link(network.place.name) if network.made is not None else None
        return link is not None and not is_ours(link, network.name)

    @cached_property
    def networks(self) -> tuple[Network, ...]:
        """The first network of the policy on each bridge, but on one of somebody else's."""
        found: dict[tuple[str, tuple[str, ...]], Network] = {}
        if isinstance(self.policy, Policy):
            for network in self.policy.networks.values():
                if refuses_taps(network) or self.is_other_s(network):
                    continue
                # NOTE: whatever kind it says, its bridge may be in the host's own database.
                databases = network.place.databases or (DEFAULT_OVSDB,)
                found.setdefault((network.place.name, databases), network)
        return tuple(found.values())

    def is_on(self, network: Network, kind: TapKind) -> bool:
        """Tell whether there is a bridge of this kind with the name of the network's."""
        databases = self.ovs_bridges.get(network.place.name, ())
        seen = Seen(None, bridge=self.link(network.place.name), ovs_bridges=databases)
        port = Port("", network.name, network.place, network.position)
        return kind.is_there(port, seen)

    def networks_on(self, kind: TapKind) -> list[Network]:
        """Return the first network of the policy on each bridge that is of this kind."""
        return [network for network in self.networks if self.is_on(network, kind)]
