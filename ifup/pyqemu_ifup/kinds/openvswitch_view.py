"""Bridges of Open vSwitch as status, info, graph and doctor show them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from pyqemu_ifconf.failure import Status
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB, BridgePlace
from pyqemu_ifconf.kinds.openvswitch import OvsPlace
from pyqemu_ifconf.policy import Network, Policy
from pyqemu_ifconf.shell import Command, ifctl, quote, readable, vsctl
from pyqemu_ifup.kinds import openvswitch
from pyqemu_ifup.kinds.base import Leftover, TapKind
from pyqemu_ifup.kinds.check import Check, Finding
from pyqemu_ifup.kinds.openvswitch import bridge_at, vlan_of_columns
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.kinds.view import UNTAGGED, PortView, Uplink
from pyqemu_ifup.kinds.vswitchd import find_fault
from pyqemu_ifup.look import Link, OvsPort, OvsSwitch, Seen
from pyqemu_ifup.mark import KEY_NETWORK, KEY_VM_NAME, KEY_VM_PID, Here, Mark
from pyqemu_ifup.system.own_mac import mac_for
from pyqemu_ifup.system.process import PID_MAX, read_number

DATAPATH_TAP = "ovs-netdev"
"""The tap that ovs-vswitchd itself makes for its userspace datapath."""
OLDEST = (2, 10)
"""The first Open vSwitch that deletes ports marked as transient at its start."""

kind: TapKind = openvswitch
outlives = True


def view(seen: Seen, here: Here, *, ours: bool) -> PortView | None:
    """Return what the tap's row says; of one that is not ours, else what its master tells."""
    tap, master = seen.tap, seen.master
    if tap is None:
        return None
    if ours:
        row = _marked(seen, here)
        return view_of(row) if row is not None else None
    row = next((each for each in seen.ports if not each.ours), None)
    if row is not None:
        return view_of(row)
    if master is None or master.kind != openvswitch.master_kind:
        return None
    bridge = seen.ports[0].bridge if seen.ports else master.name
    return PortView(openvswitch.name, bridge, None, None)


def view_of(row: OvsPort) -> PortView:
    """Return where a port is and what it has, as its row says."""
    return PortView(openvswitch.name, row.bridge, vlan_of_columns(row), row.protected)


def _marked(seen: Seen, here: Here) -> OvsPort | None:
    """Return the row that was made for the tap."""
    index = seen.tap.index if seen.tap is not None else 0
    return next((each for each in seen.ports if each.ours and each.is_of(index, here)), None)


def lost_mark(seen: Seen, here: Here) -> Mark | None:
    """Return what the row says that was made for the tap."""
    row = _marked(seen, here)
    return mark_of(row) if row is not None else None


def mark_of(port: OvsPort) -> Mark:
    """Return the mark of a tap whose alias is lost, from its port."""
    ids = port.ids
    # NOTE: its vm-name is left out if it had no room.
    unsaid = {"netdev", "mac", "user", "by"} | ({"vm"} if KEY_VM_NAME not in ids else set())
    return Mark(
        ids.get(KEY_NETWORK, ""),
        openvswitch.name,
        port.bridge or "",
        ids.get(KEY_VM_NAME, ""),
        read_number(ids.get(KEY_VM_PID, ""), PID_MAX) or 0,
        0,
        port.ovsdb,
        unsaid=frozenset(unsaid),
    )


def left(leftover: Leftover) -> tuple[PortView, Mark]:
    """Return where the port is, and what its row says of its tap."""
    return view_of(leftover.port), mark_of(leftover.port)


def is_own(link: Link, snapshot: Snapshot) -> bool:
    """Tell whether the tap is one that ovs-vswitchd makes on its userspace datapath."""
    if link.mark is not None:
        return False
    # NOTE: one that it could not make, as a guest's tap has the name, has no ifindex.
    is_its_port = any(
        port.internal
        and port.name == link.name
        and (port.ifindex == link.index or port.name == port.bridge)
        for port in snapshot.ports
    )
    return is_its_port or (link.name == DATAPATH_TAP and not link.alias)


def _rows(snapshot: Snapshot, network: Network) -> list[OvsPort]:
    """Return the rows of the ports of a network's bridge."""
    at = bridge_at(network.place)
    return [port for port in snapshot.ports if (port.bridge, port.ovsdb) == (at.bridge, at.ovsdb)]


def ports(snapshot: Snapshot, network: Network) -> list[Link]:
    """Return the links of the bridge's ports; what Open vSwitch has made itself is the host's."""
    names = {port.name for port in _rows(snapshot, network) if not port.internal}
    return [link for link in snapshot.links if link.name in names]


def uplinks(snapshot: Snapshot, bridge: str, databases: Collection[str]) -> list[Uplink]:
    """Return the ports of the bridge that lead elsewhere, and that ovs-vswitchd could make.

    A patch port or a tunnel has no link in this namespace.
    """
    found = []
    for port in snapshot.ports:
        if port.bridge != bridge or (databases and port.ovsdb not in databases):
            continue
        link = snapshot.link(port.name)
        is_tap = link is not None and link.kind == "tun"
        is_host_s = port.internal or port.name == bridge
        if not port.ours and not is_tap and not is_host_s and (port.ofport or 0) > 0:
            found.append(Uplink(port.name, _carried(port), link, port))
    return found


def _carried(port: OvsPort) -> frozenset[int] | None:
    """Return the VIDs of a port (ovs-vswitchd.conf.db(5), Port: VLAN Configuration)."""
    vlan = vlan_of_columns(port)
    if vlan is None:
        return frozenset({UNTAGGED})
    if vlan.trunk and not port.trunks:
        return None
    return frozenset({*vlan.trunk, *(() if vlan.native is None else (vlan.native,))})


def has_host_ends(snapshot: Snapshot, network: Network) -> bool:
    """Tell whether there is an internal port, which may have an address of this host's."""
    return any(port.internal and port.name != port.bridge for port in _rows(snapshot, network))


def carrying(uplink: Uplink, vids: Sequence[int]) -> Command:
    """Return what ovs-vsctl(8) is told."""
    port = uplink.port
    assert port is not None  # it is one of `uplinks`
    mode = port.vlan_mode or ("trunk" if port.tag is None else "access")
    trunks = ",".join(map(str, vids))
    if mode == "access" and port.tag is None:
        return vsctl(port.ovsdb, ("clear", "Port", port.name, "vlan_mode"))
    if mode == "access":
        return vsctl(
            port.ovsdb, ("set", "Port", port.name, "vlan_mode=native-untagged", f"trunks={trunks}")
        )
    return vsctl(port.ovsdb, ("add", "Port", port.name, "trunks", *map(str, vids)))


def adding(snapshot: Snapshot, network: Network) -> Command | None:
    """Return what ovs-vsctl(8) is told, if the policy says this kind, or the database answers."""
    at = bridge_at(network.place)
    answers = isinstance(network.place, BridgePlace) and at.ovsdb in snapshot.switches
    if answers or isinstance(network.place, OvsPlace):
        return vsctl(at.ovsdb, ("add-br", at.bridge))
    return None


def raising(network: Network, mtu: int) -> Command:
    """Return what ovs-vsctl(8) is told."""
    at = bridge_at(network.place)
    return vsctl(at.ovsdb, ("set", "Interface", at.bridge, f"mtu_request={mtu}"))


def find_slow_bridges(snapshot: Snapshot) -> Iterator[Finding]:
    """A bridge of Open vSwitch that runs STP, and lets a guest wait for it."""
    for network in snapshot.networks_on(openvswitch):
        at = bridge_at(network.place)
        for row in snapshot.switches[at.ovsdb].bridges:
            if row.name == at.bridge and row.stp:
                yield Finding(
                    f"{quote(row.name)} runs STP, with a forward delay of 15 s by default",
                    "a guest's network is silent that long, twice, after its start: DHCP and PXE "
                    "give up",
                    vsctl(
                        row.ovsdb,
                        ("set", "Bridge", row.name, "stp_enable=false", "rstp_enable=true"),
                    ),
                )


def find_loose_macs(snapshot: Snapshot) -> Iterator[Finding]:
    """A bridge of Open vSwitch without an uplink whose MAC nobody has set."""
    for network in snapshot.networks_on(openvswitch):
        at = bridge_at(network.place)
        for row in snapshot.switches[at.ovsdb].bridges:
            if row.name != at.bridge or row.pinned or snapshot.link(row.name) is None:
                continue
            if not uplinks(snapshot, row.name, (row.ovsdb,)):
                mac = mac_for(row.name, snapshot.host_id)
                yield Finding(
                    f"the MAC of {quote(row.name)} is not set, and it has no uplink",
                    "its MAC changes with the guests that come and go, and the host is cut off "
                    "meanwhile",
                    vsctl(row.ovsdb, ("set", "Bridge", row.name, f'other_config:hwaddr="{mac}"')),
                )


def find_down(snapshot: Snapshot) -> Iterator[Finding]:
    """A database of Open vSwitch that the policy needs, and that is mute or not there."""
    start = snapshot.vswitchd.start()
    networks, asked = [], {DEFAULT_OVSDB}
    if isinstance(snapshot.policy, Policy):
        networks = list(snapshot.policy.networks.values())
        asked.update(snapshot.policy.databases)
    for address, failure in snapshot.failed.items():
        if address in asked and failure.status != Status.DENIED:
            # NOTE: an up looks a tap's name up in each that is there, whatever its network.
            yield Finding(
                str(failure).partition(";")[0],
                "no tap is attached to it, and on a host with it none to a Linux bridge either",
                start,
            )
    for address in sorted(snapshot.absent):
        needed = next(each for each in networks if address in each.place.databases)
        yield Finding(
            f"Open vSwitch does not run: there is no {quote(address)}",
            f"each start of a QEMU with a tap on network {quote(needed.name)} fails (status 69)",
            start,
        )


def find_vswitchd_down(snapshot: Snapshot) -> Iterator[Finding]:
    """An ovs-vswitchd that does not run, is stopped, or does not do what is configured."""
    for switch in snapshot.switches.values():
        finding = find_fault(switch, snapshot.vswitchd)
        if finding is not None:
            yield finding


def find_old(snapshot: Snapshot) -> Iterator[Finding]:
    """An Open vSwitch that is older than what we need of it."""
    for address, switch in snapshot.switches.items():
        version = _version(switch)
        if version is not None and version < OLDEST:
            yield Finding(
                f"Open vSwitch is {readable(switch.version or '')} ({quote(address)})",
                "before 2.10 it keeps the ports of guests over a reboot of the host",
                snapshot.vswitchd.install,
                "install a newer one" if snapshot.vswitchd.install is None else None,
            )


def _version(switch: OvsSwitch) -> tuple[int, ...] | None:
    found = re.match(r"([0-9]{1,6})\.([0-9]{1,6})", switch.version or "")
    return None if found is None else (int(found[1]), int(found[2]))


def find_errors(snapshot: Snapshot) -> Iterator[Finding]:
    """A port that ovs-vswitchd cannot use."""
    stale = {port.name for port in _stale(snapshot)}
    for port in snapshot.ports:
        if port.error is not None and port.name not in stale and _concerns(snapshot, port):
            yield Finding(
                f"Open vSwitch cannot use the port {quote(port.name)} of "
                f"{readable(port.bridge or '')}: "
                f"{readable(port.error)}",
                "it passes no frames",
                vsctl(port.ovsdb, ("del-port", *([port.bridge] if port.bridge else []), port.name)),
            )


def find_stale_ports(snapshot: Snapshot) -> Iterator[Finding]:
    """A port of ours whose tap is gone."""
    for port in _stale(snapshot):
        yield Finding(
            f"the port {quote(port.name)} of {readable(port.bridge or '')} is left of a guest "
            "that is gone",
            "a tap that gets this name is given the VLAN of the old one",
            ifctl("gc", port.name),
        )


def _stale(snapshot: Snapshot) -> list[OvsPort]:
    found = openvswitch.judge(snapshot.ports, snapshot.links, snapshot.here)
    return [each.port for each in found if each.remove is not None]


def _concerns(snapshot: Snapshot, port: OvsPort) -> bool:
    """Tell whether a port is ours, or on a bridge that the policy names."""
    bridges = (bridge_at(each.place) for each in snapshot.networks)
    return port.ours or (port.bridge, port.ovsdb) in {(at.bridge, at.ovsdb) for at in bridges}


def find_trunks(snapshot: Snapshot) -> Iterator[Finding]:
    """A tap whose port carries every VLAN."""
    for port in snapshot.ports:
        link = snapshot.link(port.name)
        is_guest_s = link is not None and link.tap and not port.internal
        if not port.ours and port.name in snapshot.left:
            continue
        is_open = port.vlan_mode in (None, "trunk") and port.tag is None and not port.trunks
        if is_guest_s and is_open and _concerns(snapshot, port):
            yield Finding(
                f"the tap {quote(port.name)} carries every VLAN of {readable(port.bridge or '')}",
                "its guest chooses the VLAN that it sends to: this is Open vSwitch's default",
                vsctl(port.ovsdb, ("set", "Port", port.name, "vlan_mode=access")),
            )


checks: tuple[Check[Snapshot], ...] = (
    Check("bridge-stp", "warning", find_slow_bridges),
    Check("bridge-mac", "warning", find_loose_macs),
    Check("ovs-down", "error", find_down),
    Check("ovs-vswitchd", "error", find_vswitchd_down),
    Check("ovs-version", "warning", find_old),
    Check("ovs-error", "error", find_errors),
    Check("ovs-stale", "warning", find_stale_ports),
    Check("ovs-trunk", "error", find_trunks),
)
