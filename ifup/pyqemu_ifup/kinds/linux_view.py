"""Linux bridges as status, info, graph and doctor show them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from pyqemu_ifconf.kinds.bridge import BridgePlace
from pyqemu_ifconf.kinds.linux import LinuxPlace
from pyqemu_ifconf.policy import Network
from pyqemu_ifconf.shell import Command, all_of, quote, sh
from pyqemu_ifup.kinds import linux
from pyqemu_ifup.kinds.base import Leftover, TapKind
from pyqemu_ifup.kinds.check import Check, Finding
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.kinds.view import PortView, Uplink
from pyqemu_ifup.look import Link, Seen, spans, vlan_of_vids
from pyqemu_ifup.mark import Here, Mark
from pyqemu_ifup.ops import set_link
from pyqemu_ifup.system.own_mac import NO_MAC, mac_for

QUICK = 400
"""Hundredths of a second: the least forward delay that IEEE 802.1D allows."""

kind: TapKind = linux
outlives = False


def view(seen: Seen, here: Here, *, ours: bool) -> PortView | None:
    """Return the bridge that is the tap's master, with the tap's VIDs and isolation there."""
    tap, master = seen.tap, seen.master
    if tap is None or master is None or master.kind != linux.master_kind:
        return None
    return PortView(linux.name, master.name, vlan_of_vids(seen.vids), tap.isolated)


def lost_mark(seen: Seen, here: Here) -> Mark | None:
    """Return nothing: the mark is on the tap alone."""
    return None


def left(leftover: Leftover) -> tuple[PortView, Mark]:
    """Return where the port is; there is none, as each goes with its tap."""
    raise LookupError(leftover)


def is_own(link: Link, snapshot: Snapshot) -> bool:
    """Tell that it is not: a bridge makes no tap."""
    return False


def ports(snapshot: Snapshot, network: Network) -> list[Link]:
    """Return the links whose master is the bridge."""
    bridge = snapshot.link(network.place.name)
    return [each for each in snapshot.links if bridge is not None and each.master == bridge.index]


def uplinks(snapshot: Snapshot, bridge: str, databases: Collection[str]) -> list[Uplink]:
    """Return the ports of the bridge that are no taps."""
    master = snapshot.link(bridge)
    if master is None:
        return []
    return [
        Uplink(link.name, _carried(link, master, snapshot), link)
        for link in snapshot.links
        if link.master == master.index and link.kind != "tun"
    ]


def _carried(link: Link, master: Link, snapshot: Snapshot) -> frozenset[int] | None:
    if not master.vlan_filtering or snapshot.vids is None:
        return None
    return frozenset(each.vid for each in snapshot.vids_of(link))


def has_host_ends(snapshot: Snapshot, network: Network) -> bool:
    """Tell that it has none: the bridge itself is the host's end."""
    return False


def carrying(uplink: Uplink, vids: Sequence[int]) -> Command:
    """Return what bridge(8) is told."""
    return all_of(
        *(sh("bridge", "vlan", "add", "dev", uplink.name, "vid", each) for each in spans(vids))
    )


def adding(snapshot: Snapshot, network: Network) -> Command | None:
    """Return what ip-link(8) is told: the bridge filters VLANs if one is wanted there."""
    if not isinstance(network.place, (LinuxPlace, BridgePlace)):
        return None
    name = network.place.bridge
    filtering = bool(snapshot.vids_wanted(name))
    return linux.adding_bridge(name, mac_for(name, snapshot.host_id), filtering=filtering)


def raising(network: Network, mtu: int) -> Command:
    """Return what ip-link(8) is told."""
    return set_link(network.place.name, "mtu", str(mtu))


def _bridges(snapshot: Snapshot) -> list[Link]:
    """Return the Linux bridges that the policy names."""
    found = (snapshot.link(network.place.name) for network in snapshot.networks_on(linux))
    return list({link.index: link for link in found if link is not None}.values())


def find_bridges_down(snapshot: Snapshot) -> Iterator[Finding]:
    """A Linux bridge that is down."""
    for bridge in _bridges(snapshot):
        if not bridge.up:
            yield Finding(
                f"the bridge {quote(bridge.name)} is down",
                "it passes no frame of any guest",
                sh("ip", "link", "set", "dev", bridge.name, "up"),
            )


def find_no_filtering(snapshot: Snapshot) -> Iterator[Finding]:
    """VLANs that are wanted on a Linux bridge that filters none."""
    for bridge in _bridges(snapshot):
        name, vids = bridge.name, snapshot.vids_wanted(bridge.name)
        if vids and not bridge.vlan_filtering:
            want = vids[min(vids)]
            mend = sh("ip", "link", "set", "dev", name, "type", "bridge", "vlan_filtering", "1")
            cannot = "run a kernel that can (CONFIG_BRIDGE_VLAN_FILTERING), or Open vSwitch"
            yield Finding(
                f"{quote(name)} does not filter VLANs, and network {quote(want.network.name)} "
                "wants VLAN "
                f"{', '.join(spans(vids))} ({want.position})",
                "each start of a QEMU with a tap there fails (status 71), since nothing would "
                "separate its frames",
                *((mend,) if bridge.vlan_filtering is not None else (None, cannot)),
            )


def find_loose_macs(snapshot: Snapshot) -> Iterator[Finding]:
    """A Linux bridge without an uplink whose MAC nobody has set: it takes that of a tap."""
    for bridge in _bridges(snapshot):
        name = bridge.name
        if snapshot.pinned.get(name) is False and not uplinks(snapshot, name, ()):
            yield Finding(
                f"the MAC of {quote(name)} is not set, and it has no uplink",
                "its MAC changes with the guests that come and go, and the host is cut off "
                "meanwhile",
                _set_mac(snapshot, name),
            )


def find_zero_macs(snapshot: Snapshot) -> Iterator[Finding]:
    """A Linux bridge that has no MAC, and would have if nobody had set it so."""
    for bridge in _bridges(snapshot):
        # NOTE: one without a port, whose MAC nobody set, takes that of its next one.
        has_port = any(link.master == bridge.index for link in snapshot.links)
        if bridge.mac == NO_MAC and (has_port or snapshot.pinned.get(bridge.name)):
            yield Finding(
                f"the MAC of {quote(bridge.name)} is {NO_MAC}",
                "no guest on it reaches this host",
                _set_mac(snapshot, bridge.name),
            )


def _set_mac(snapshot: Snapshot, bridge: str) -> Command:
    return sh("ip", "link", "set", "dev", bridge, "address", mac_for(bridge, snapshot.host_id))


def find_slow_bridges(snapshot: Snapshot) -> Iterator[Finding]:
    """A Linux bridge that runs the spanning tree protocol, and lets a guest wait for it."""
    for bridge in _bridges(snapshot):
        delay = bridge.forward_delay or 0
        if bridge.stp and delay > QUICK:
            words = ["stp_state", "0"]
            if len(uplinks(snapshot, bridge.name, ())) > 1:
                # NOTE: without it there may be a loop; the least that IEEE 802.1D allows.
                words = ["hello_time", "100", "max_age", "600", "forward_delay", str(QUICK)]
            yield Finding(
                f"{quote(bridge.name)} runs STP with a forward delay of {delay / 100:g} s",
                "a guest's network is silent that long, twice, after its start: DHCP and PXE give "
                "up",
                sh("ip", "link", "set", "dev", bridge.name, "type", "bridge", *words),
            )


checks: tuple[Check[Snapshot], ...] = (
    Check("bridge-down", "error", find_bridges_down),
    Check("bridge-stp", "warning", find_slow_bridges),
    Check("bridge-mac", "warning", find_loose_macs),
    Check("bridge-no-mac", "error", find_zero_macs),
    Check("vlan-filtering", "error", find_no_filtering),
)
