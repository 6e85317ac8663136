"""Doctor's checks of the bridges that the policy names, and of their uplinks, of each kind alike.

What differs from kind to kind is that kind's: its view has the checks of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.kinds import spec_of
from pyqemu_ifconf.policy import Network, Position, each_port, refuses_taps
from pyqemu_ifconf.shell import edit, quote
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifup import kinds
from pyqemu_ifup.kinds.base import TapKind
from pyqemu_ifup.kinds.check import Finding, finding_of
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.kinds.view import TapView
from pyqemu_ifup.look import FRESH, Link, Seen, spans
from pyqemu_ifup.mark import Mark
from pyqemu_ifup.on_port import Sitting, find_sitting
from pyqemu_ifup.ops import set_link
from pyqemu_ifup.plan import plan_up

STACKED = ("vlan", "macvlan", "ipvlan")
"""Kinds of links that are on top of others."""


def _kinds_of(snapshot: Snapshot, network: Network) -> list[TapKind]:
    """Return the kinds of which there is a bridge with the name of the network's."""
    return [kind for kind in kinds.tap_kinds() if snapshot.is_on(network, kind)]


def _each_bridge(snapshot: Snapshot) -> Iterator[tuple[Network, TapView]]:
    """Yield each bridge of the policy that is there, once: its first network, and its kind."""
    seen = set()
    for network in snapshot.networks:
        for view in kinds.views():
            databases = () if view.kind.has_link else network.place.databases
            place = (view.kind.name, network.place.name, databases)
            if place not in seen and snapshot.is_on(network, view.kind):
                seen.add(place)
                yield network, view


def find_missing_bridges(scene: Scene) -> Iterator[Finding]:
    """A bridge that the policy names and that is not there, but one that its first tap makes."""
    for network in scene.networks:
        if network.made is not None:
            continue
        if _kinds_of(scene, network) or scene.link(network.place.name) is not None:
            continue
        if scene.may_be_on(network):
            continue
        what = f"there is no bridge {quote(network.place.name)}"
        fails = "each start of a QEMU with a tap on this network fails (status 69)"
        link = next((link for link in scene.links if network.place.name in link.altnames), None)
        if link is not None:
            place = edit(network.position.file, network.position.line)
            yield Finding(
                f"{what}: that is another name of {quote(link.name)}, which network "
                f"{quote(network.name)} does not name ({network.position})",
                fails,
                place,
            )
            continue
        adding = [view.adding(scene, network) for view in kinds.views()]
        command = next(each for each in reversed(adding) if each is not None)
        on_it = f"network {quote(network.name)} is on ({network.position})"
        yield Finding(f"{what}, which {on_it}", fails, command)


def find_other_kinds(scene: Scene) -> Iterator[Finding]:
    """A bridge of another kind than the policy says, of both kinds, or no bridge at all."""
    if isinstance(scene.policy, Failure):
        return
    for network in scene.policy.networks.values():
        if refuses_taps(network) or scene.is_other_s(network):
            continue
        there, link = _kinds_of(scene, network), scene.link(network.place.name)
        why = f"no tap is attached to network {quote(network.name)}: what is meant is not guessed"
        command = edit(network.position.file, network.position.line)
        titles = [kind.title for kind in there]
        if len(there) > 1 and network.kind is None:
            yield Finding(
                f"{quote(network.place.name)} is both {' and '.join(titles)}, and network "
                f"{quote(network.name)} gives no kind ({network.position})",
                why,
                command,
            )
        elif there and network.kind not in (None, *(kind.name for kind in there)):
            wanted = spec_of(network.kind).title if network.kind is not None else ""
            yield Finding(
                f"{quote(network.place.name)} is {titles[0]}, and network {quote(network.name)} "
                f"wants {wanted} ({network.position})",
                why,
                command,
            )
        elif not there and link is not None and not scene.may_be_on(network):
            yield Finding(
                f"{quote(network.place.name)} is no bridge, and network {quote(network.name)} is "
                f"on it ({network.position})",
                why,
                command,
            )


def find_refusing_bridges(snapshot: Snapshot) -> Iterator[Finding]:
    """A bridge that is there and cannot do what the policy wants of it.

    It asks as an up does (plan_up). What other checks tell of is left to them: that it is down,
    filters no VLANs, or is of another kind.
    """
    if isinstance(snapshot.policy, Failure):
        return
    looked_at: set[object] = set()
    for port in each_port(snapshot.policy):
        wanted = replace(port, position=Position("", 0, 0), network="")
        if port.made is not None or wanted in looked_at:
            continue
        looked_at.add(wanted)
        there = _kinds_of(snapshot, snapshot.policy.networks[port.network])
        if len(there) != 1 or kinds.said(port) not in (None, there[0]):
            continue
        kind = there[0]
        bridge = snapshot.link(port.place.name)
        if bridge is not None:
            filtering = bridge.vlan_filtering or port.settings.vlan is not None
            bridge = replace(bridge, up=True, vlan_filtering=filtering)
        mark = Mark(port.network, kind.name, port.place.name, "", 0, 0)
        try:
            plan_up(port, kind, Seen(FRESH, bridge=bridge), mark, snapshot.here)
        except Failure as failure:
            yield finding_of(
                failure,
                f"each start of a QEMU with a tap on network {quote(port.network)} as "
                f"{port.position} says fails (status {int(failure.status)})",
            )


def find_port_addresses(snapshot: Snapshot) -> Iterator[Finding]:
    """An address of this host's on a port of a bridge: it answers nobody there."""
    for _, _, found in _sitting(snapshot):
        if found.setting == "address":
            yield Finding(found.what, found.why, found.command, found.do or None)


def find_port_devices(snapshot: Snapshot) -> Iterator[Finding]:
    """A device on a tap, or on an uplink for a VLAN that is wanted, that takes frames away."""
    for network, port, found in _sitting(snapshot):
        link = snapshot.link(found.name)
        if found.setting != "device" or link is None:
            continue
        # NOTE: a VLAN of an uplink's may be for this host alone.
        if port.kind == "tun" or link.vid in snapshot.vids_wanted(network.place.name):
            yield Finding(found.what, found.why, found.command, found.do or None)


def _sitting(snapshot: Snapshot) -> Iterator[tuple[Network, Link, Sitting]]:
    """Yield what sits on each port of the policy's bridges: the network, the port, and that."""
    if snapshot.sights is None:
        return
    for network, view in _each_bridge(snapshot):
        for link in view.ports(snapshot, network):
            for found in find_sitting(link, network.place.name, snapshot.sights):
                yield network, link, found


def find_uplinks_down(snapshot: Snapshot) -> Iterator[Finding]:
    """An uplink that is down."""
    for network, view in _each_bridge(snapshot):
        for uplink in view.uplinks(snapshot, network.place.name, network.place.databases):
            if uplink.link is not None and not uplink.link.up:
                yield Finding(
                    f"{quote(uplink.name)}, an uplink of {quote(network.place.name)}, is down",
                    "the guests reach nobody beyond it",
                    set_link(uplink.name, "up"),
                )


def find_lonely_bridges(snapshot: Snapshot) -> Iterator[Finding]:
    """A bridge with running guests that has neither an uplink nor an address of this host's."""
    if snapshot.sights is None:
        return
    addressed = {
        each.index for each in snapshot.sights.addresses if not each.text.startswith("fe80:")
    }
    if any(link.kind in STACKED and link.index in addressed for link in snapshot.links):
        # NOTE: such a link may be on a bridge, and the host's way onto it.
        return
    for network, view in _each_bridge(snapshot):
        bridge = snapshot.link(network.place.name)
        if network.made is not None or bridge is None or bridge.index in addressed:
            continue
        guests = [
            link
            for link in snapshot.links
            if link.tap
            and link.carrier
            and link.mark is not None
            and link.mark.bridge == network.place.name
        ]
        leads_on = view.uplinks(snapshot, network.place.name, network.place.databases)
        if guests and not leads_on and not view.has_host_ends(snapshot, network):
            yield Finding(
                f"{quote(network.place.name)} of network {quote(network.name)} has guests, and "
                "neither an uplink nor an address of this host's",
                "its guests reach each other alone: no DHCP, no way out, unless one of them has it",
                None,
                "if they shall have that, give the network nat: in place of a bridge of the "
                "host's, see NETWORKS WITH NAT in pyqemu-ifup-policy(5), or the bridge an uplink",
            )


def find_lost_vlans(snapshot: Snapshot) -> Iterator[Finding]:
    """A VLAN that no uplink of its bridge carries."""
    for network, view in _each_bridge(snapshot):
        uplinks = view.uplinks(snapshot, network.place.name, network.place.databases)
        lost = [
            vid
            for vid in sorted(snapshot.vids_wanted(network.place.name))
            if all(each.vids is not None and vid not in each.vids for each in uplinks)
        ]
        if uplinks and lost:
            yield Finding(
                f"no uplink of {quote(network.place.name)} carries VLAN {', '.join(spans(lost))}",
                "guests in it reach each other on this host, and nobody beyond it",
                view.carrying(uplinks[0], lost),
            )


def find_small_uplinks(snapshot: Snapshot) -> Iterator[Finding]:
    """An uplink whose MTU is less than that of the taps, or of their bridge."""
    for network, view in _each_bridge(snapshot):
        most, who = _largest(snapshot, network, view)
        for uplink in view.uplinks(snapshot, network.place.name, network.place.databases):
            if uplink.link is not None and uplink.link.mtu < most:
                yield Finding(
                    f"{quote(uplink.name)}, an uplink of {quote(network.place.name)}, has an MTU "
                    f"of {uplink.link.mtu}, and {who} one of {most}",
                    "what a guest sends in larger frames than the uplink takes is lost in silence",
                    set_link(uplink.name, "mtu", str(most)),
                )


def _largest(snapshot: Snapshot, network: Network, view: TapView) -> tuple[int, str]:
    """Return the largest MTU that a tap on the bridge has or is to have, and who has it."""
    found = [
        (want.mtu, f"network {quote(want.network.name)} ({want.position})")
        for want in snapshot.wanted.get(network.place.name, ())
        if want.mtu is not None
    ]
    found += [
        (link.mtu, f"the tap {quote(link.name)}")
        for link in view.ports(snapshot, network)
        if link.tap and link.mark is not None
    ]
    return max(found, default=(0, ""))


def find_small_bridges(snapshot: Snapshot) -> Iterator[Finding]:
    """A bridge whose own MTU is less than that of its taps."""
    for network, view in _each_bridge(snapshot):
        bridge = snapshot.link(network.place.name)
        most, who = _largest(snapshot, network, view)
        if bridge is not None and bridge.mtu < most:
            yield Finding(
                f"{quote(bridge.name)} has an MTU of {bridge.mtu}, and {who} one of {most}",
                "the host does not get its guests' larger frames, nor sends as large ones",
                view.raising(network, most),
            )
