"""Doctor's checks of the bridges that the policy names, of both kinds, and of their uplinks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.kinds import SPECS
from pyqemu_ifconf.policy import Network, Position, each_port
from pyqemu_ifconf.shell import Command, all_of, edit, quote, sh, vsctl
from pyqemu_ifctl.doctor.finding import each_bridge, kinds_of, vids_wanted
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifctl.doctor.wanted import wanted_kind
from pyqemu_ifup import kinds
from pyqemu_ifup.kinds.check import Finding, finding_of
from pyqemu_ifup.kinds.linux import adding_bridge
from pyqemu_ifup.look import FRESH, Link, OvsPort, Seen, spans
from pyqemu_ifup.on_port import Sitting, find_sitting
from pyqemu_ifup.plan import plan_up
from pyqemu_ifup.stamp import Stamp
from pyqemu_ifup.system.own_mac import NO_MAC, mac_for

QUICK = 400
"""Hundredths of a second: the least forward delay that IEEE 802.1D allows."""

STACKED = ("vlan", "macvlan", "ipvlan")
"""Kinds of links that are on top of others."""


def find_missing_bridges(scene: Scene) -> Iterator[Finding]:
    """A bridge that the policy names and that is not there, but one that its first tap makes."""
    for network in each_bridge(scene):
        if network.nat is not None:
            continue
        if kinds_of(scene, network) or scene.link(network.bridge) is not None:
            continue
        if scene.may_be_on(network):
            continue
        what = f"there is no bridge {quote(network.bridge)}"
        fails = "each start of a QEMU with a tap on this network fails (status 69)"
        link = next((link for link in scene.links if network.bridge in link.altnames), None)
        if link is not None:
            place = edit(network.position.file, network.position.line)
            yield Finding(
                f"{what}: that is another name of {quote(link.name)}, which network "
                f"{quote(network.name)} does not name ({network.position})",
                fails,
                place,
            )
            continue
        linux = network.kind == "linux" or (
            network.kind is None and network.ovsdb not in scene.switches
        )
        command = vsctl(network.ovsdb, ("add-br", network.bridge))
        if linux:
            mac = mac_for(network.bridge, scene.host_id)
            filtering = bool(vids_wanted(scene, network.bridge))
            command = adding_bridge(network.bridge, mac, filtering=filtering)
        on_it = f"network {quote(network.name)} is on ({network.position})"
        yield Finding(f"{what}, which {on_it}", fails, command)


WORDS: dict[str, str] = {spec.name: spec.title for spec in SPECS}


def find_other_kinds(scene: Scene) -> Iterator[Finding]:
    """A bridge of another kind than the policy says, of both kinds, or no bridge at all."""
    if isinstance(scene.policy, Failure):
        return
    for network in scene.policy.networks.values():
        if scene.is_other_s(network):
            continue
        kinds, link = kinds_of(scene, network), scene.link(network.bridge)
        why = f"no tap is attached to network {quote(network.name)}: what is meant is not guessed"
        command = edit(network.position.file, network.position.line)
        kind = wanted_kind(network)
        if len(kinds) == 2 and kind is None:
            yield Finding(
                f"{quote(network.bridge)} is both a Linux bridge and an Open vSwitch bridge, and "
                "network "
                f"{quote(network.name)} gives no kind ({network.position})",
                why,
                command,
            )
        elif kinds and kind is not None and kind not in kinds:
            yield Finding(
                f"{quote(network.bridge)} is {WORDS[kinds[0]]}, and network {quote(network.name)} "
                "wants "
                f"{WORDS[kind]} ({network.position})",
                why,
                command,
            )
        elif not kinds and link is not None and not scene.may_be_on(network):
            yield Finding(
                f"{quote(network.bridge)} is no bridge, and network {quote(network.name)} is on it "
                f"({network.position})",
                why,
                command,
            )


def find_refusing_bridges(scene: Scene) -> Iterator[Finding]:
    """A bridge that is there and cannot do what the policy wants of it.

    It asks as an up does (plan_up). What other checks tell of is left to them: that it is down,
    filters no VLANs, or is of another kind.
    """
    if isinstance(scene.policy, Failure):
        return
    looked_at: set[object] = set()
    for port in each_port(scene.policy):
        wanted = replace(port, position=Position("", 0, 0), network="")
        if port.made is not None or wanted in looked_at:
            continue
        looked_at.add(wanted)
        there = kinds_of(scene, scene.policy.networks[port.network])
        if len(there) != 1 or kinds.said(port) not in (None, kinds.load(there[0])):
            continue
        kind = kinds.load(there[0])
        bridge = scene.link(port.place.name)
        if bridge is not None:
            filtering = bridge.vlan_filtering or port.settings.vlan is not None
            bridge = replace(bridge, up=True, vlan_filtering=filtering)
        stamp = Stamp(port.network, kind.name, port.place.name, "", 0, 0)
        try:
            plan_up(port, kind, Seen(FRESH, bridge=bridge), stamp, scene.here)
        except Failure as failure:
            yield finding_of(
                failure,
                f"each start of a QEMU with a tap on network {quote(port.network)} as "
                f"{port.position} says fails (status {int(failure.status)})",
            )


def find_bridges_down(scene: Scene) -> Iterator[Finding]:
    """A Linux bridge that is down."""
    for name, bridge in scene.bridges().items():
        if not bridge.up:
            yield Finding(
                f"the bridge {quote(name)} is down",
                "it passes no frame of any guest",
                sh("ip", "link", "set", "dev", name, "up"),
            )


def find_port_addresses(scene: Scene) -> Iterator[Finding]:
    """An address of this host's on a port of a bridge, where it answers nobody."""
    for _, _, found in _sitting(scene):
        if found.setting == "address":
            yield Finding(found.what, found.why, found.command, found.do or None)


def find_port_devices(scene: Scene) -> Iterator[Finding]:
    """A device on a tap, or on an uplink for a VLAN that is wanted, that takes frames away."""
    for network, port, found in _sitting(scene):
        link = scene.link(found.name)
        if found.setting != "device" or link is None:
            continue
        # NOTE: a VLAN of an uplink's may be for this host alone.
        if port.kind == "tun" or link.vid in vids_wanted(scene, network.bridge):
            yield Finding(found.what, found.why, found.command, found.do or None)


def _sitting(scene: Scene) -> Iterator[tuple[Network, Link, Sitting]]:
    """Yield what sits on each port of the policy's bridges: the network, the port, and that."""
    if scene.sights is None:
        return
    for network in each_bridge(scene):
        bridge, kinds = scene.link(network.bridge), kinds_of(scene, network)
        names = (
            {
                port.name
                for port in scene.ports
                if port.bridge == network.bridge
                and port.ovsdb == network.ovsdb
                and not port.internal
            }
            if "openvswitch" in kinds
            else set()
        )
        for link in scene.links:
            on_linux = "linux" in kinds and bridge is not None and link.master == bridge.index
            # NOTE: what Open vSwitch has made itself is this host's end.
            if on_linux or link.name in names:
                for found in find_sitting(link, network.bridge, scene.sights):
                    yield network, link, found


def find_uplinks_down(scene: Scene) -> Iterator[Finding]:
    """An uplink of a Linux bridge that is down."""
    for name, bridge in scene.bridges().items():
        for uplink in scene.uplinks(bridge):
            if not uplink.up:
                yield Finding(
                    f"{quote(uplink.name)}, an uplink of {quote(name)}, is down",
                    "the guests reach nobody beyond it",
                    sh("ip", "link", "set", "dev", uplink.name, "up"),
                )


def find_lonely_bridges(scene: Scene) -> Iterator[Finding]:
    """A bridge with running guests that has neither an uplink nor an address of this host's."""
    if scene.sights is None:
        return
    addressed = {each.index for each in scene.sights.addresses if not each.text.startswith("fe80:")}
    if any(link.kind in STACKED and link.index in addressed for link in scene.links):
        # NOTE: such a link may be on a bridge, and the host's way onto it.
        return
    for network in each_bridge(scene):
        bridge = scene.link(network.bridge)
        if network.nat is not None or bridge is None or bridge.index in addressed:
            continue
        guests = [
            link
            for link in scene.links
            if link.tap
            and link.carrier
            and link.stamp is not None
            and link.stamp.bridge == network.bridge
        ]
        taps = {link.name for link in scene.links if link.tap} - {
            port.name for port in scene.ports if port.internal
        }
        ports = [
            port
            for port in scene.ports
            if port.bridge == network.bridge
            and port.name != network.bridge
            and port.name not in taps
        ]
        if guests and not ports and not scene.uplinks(bridge):
            yield Finding(
                f"{quote(network.bridge)} of network {quote(network.name)} has guests, and neither "
                "an uplink nor an address of this host's",
                "its guests reach each other alone: no DHCP, no way out, unless one of them has it",
                None,
                "if they shall have that, give the network nat: in place of a bridge of the "
                "host's, see NETWORKS WITH NAT in pyqemu-ifup-policy(5), or the bridge an uplink",
            )


def find_no_filtering(scene: Scene) -> Iterator[Finding]:
    """VLANs that are wanted on a Linux bridge that filters none."""
    for name, bridge in scene.bridges().items():
        vids = vids_wanted(scene, name)
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


def find_lost_vlans(scene: Scene) -> Iterator[Finding]:
    """A VLAN that no uplink of its bridge carries."""
    why = "guests in it reach each other on this host, and nobody beyond it"
    for name, bridge in scene.bridges().items():
        uplinks = scene.uplinks(bridge)
        if not bridge.vlan_filtering or not uplinks or scene.vids is None:
            continue
        carried = {each.vid for uplink in uplinks for each in scene.vids.get(uplink.index, ())}
        lost = sorted(vids_wanted(scene, name).keys() - carried)
        if lost:
            yield Finding(
                f"no uplink of {quote(name)} carries VLAN {', '.join(spans(lost))}",
                why,
                all_of(
                    *(
                        sh("bridge", "vlan", "add", "dev", uplinks[0].name, "vid", span)
                        for span in spans(lost)
                    )
                ),
            )
    for network in _ovs_bridges(scene):
        ports = _ovs_uplinks(scene, network)
        wanted = vids_wanted(scene, network.bridge)
        lost = sorted(vid for vid in wanted if not any(_carries(port, vid) for port in ports))
        if ports and lost:
            yield Finding(
                f"no uplink of {quote(network.bridge)} carries VLAN {', '.join(spans(lost))}",
                why,
                _carry(ports[0], lost),
            )


def _ovs_bridges(scene: Scene) -> list[Network]:
    return [each for each in each_bridge(scene) if "openvswitch" in kinds_of(scene, each)]


def _ovs_uplinks(scene: Scene, network: Network) -> list[OvsPort]:
    """Return the ports of an Open vSwitch bridge that lead elsewhere: no tap, no port of its own.

    A patch port or a tunnel has no link in this namespace.
    """
    found = []
    for port in scene.ports:
        if port.bridge != network.bridge or port.ovsdb != network.ovsdb or port.ours:
            continue
        link = scene.link(port.name)
        inner = link is not None and link.kind in ("tun", "openvswitch")
        if port.name != network.bridge and not inner and (port.ofport or 0) > 0:
            found.append(port)
    return found


def _carries(port: OvsPort, vid: int) -> bool:
    """Tell whether a port carries a VID (ovs-vswitchd.conf.db(5), Port: VLAN Configuration)."""
    mode = port.vlan_mode or ("trunk" if port.tag is None else "access")
    if mode in ("access", "dot1q-tunnel"):
        return port.tag == vid
    return not port.trunks or vid in port.trunks or (mode != "trunk" and port.tag == vid)


def _carry(port: OvsPort, vids: list[int]) -> Command:
    """Return the command that has a port carry more VIDs, tagged, beside what it carries now."""
    mode = port.vlan_mode or ("trunk" if port.tag is None else "access")
    trunks = ",".join(map(str, vids))
    if mode == "access" and port.tag is None:
        return vsctl(port.ovsdb, ("clear", "Port", port.name, "vlan_mode"))
    if mode == "access":
        return vsctl(
            port.ovsdb, ("set", "Port", port.name, "vlan_mode=native-untagged", f"trunks={trunks}")
        )
    return vsctl(port.ovsdb, ("add", "Port", port.name, "trunks", *map(str, vids)))


def find_small_uplinks(scene: Scene) -> Iterator[Finding]:
    """An uplink whose MTU is less than that of the taps, or of their bridge."""
    for network in each_bridge(scene):
        uplinks: list[Link] = []
        bridge = scene.link(network.bridge)
        kinds = kinds_of(scene, network)
        if bridge is not None and "linux" in kinds:
            uplinks = scene.uplinks(bridge)
        elif kinds:
            found = (scene.link(port.name) for port in _ovs_uplinks(scene, network))
            uplinks = [link for link in found if link is not None]
        most, who = _largest(scene, network)
        for uplink in uplinks:
            if uplink.mtu < most:
                yield Finding(
                    f"{quote(uplink.name)}, an uplink of {quote(network.bridge)}, has an MTU of "
                    f"{uplink.mtu}, "
                    f"and {who} one of {most}",
                    "what a guest sends in larger frames than the uplink takes is lost in silence",
                    sh("ip", "link", "set", "dev", uplink.name, "mtu", str(most)),
                )


def _largest(scene: Scene, network: Network) -> tuple[int, str]:
    """Return the largest MTU that a tap on the bridge has or is to have, and who has it."""
    found = [
        (want.mtu, f"network {quote(want.network.name)} ({want.position})")
        for want in scene.wanted.get(network.bridge, ())
        if want.mtu is not None
    ]
    names = {
        port.name
        for port in scene.ports
        if port.bridge == network.bridge and port.ovsdb == network.ovsdb
    }
    bridge = scene.link(network.bridge)
    found += [
        (link.mtu, f"the tap {quote(link.name)}")
        for link in scene.links
        if link.tap
        and link.stamp is not None
        and (link.name in names or (bridge is not None and link.master == bridge.index))
    ]
    return max(found, default=(0, ""))


def find_small_bridges(scene: Scene) -> Iterator[Finding]:
    """A bridge whose own MTU is less than that of its taps."""
    for network in each_bridge(scene):
        bridge, kinds = scene.link(network.bridge), kinds_of(scene, network)
        most, who = _largest(scene, network)
        if bridge is None or not kinds or bridge.mtu >= most:
            continue
        command = sh("ip", "link", "set", "dev", bridge.name, "mtu", str(most))
        if "linux" not in kinds:
            command = vsctl(network.ovsdb, ("set", "Interface", bridge.name, f"mtu_request={most}"))
        yield Finding(
            f"{quote(bridge.name)} has an MTU of {bridge.mtu}, and {who} one of {most}",
            "the host does not get its guests' larger frames, nor sends as large ones",
            command,
        )


def find_loose_macs(scene: Scene) -> Iterator[Finding]:
    """A bridge without an uplink whose MAC nobody has set: it takes that of a tap."""
    why = "its MAC changes with the guests that come and go, and the host is cut off meanwhile"
    for name, bridge in scene.bridges().items():
        if scene.pinned.get(name) is False and not scene.uplinks(bridge):
            yield Finding(
                f"the MAC of {quote(name)} is not set, and it has no uplink",
                why,
                _set_mac(scene, name),
            )
    for network in _ovs_bridges(scene):
        row = next(
            each for each in scene.switches[network.ovsdb].bridges if each.name == network.bridge
        )
        mac = mac_for(row.name, scene.host_id)
        if not row.pinned and scene.link(row.name) and not _ovs_uplinks(scene, network):
            yield Finding(
                f"the MAC of {quote(row.name)} is not set, and it has no uplink",
                why,
                vsctl(row.ovsdb, ("set", "Bridge", row.name, f'other_config:hwaddr="{mac}"')),
            )


def find_zero_macs(scene: Scene) -> Iterator[Finding]:
    """A Linux bridge that has no MAC, and would have if nobody had set it so."""
    for name, bridge in scene.bridges().items():
        # NOTE: one without a port, whose MAC nobody set, takes that of its next one.
        has_port = any(link.master == bridge.index for link in scene.links)
        if bridge.mac == NO_MAC and (has_port or scene.pinned.get(name)):
            yield Finding(
                f"the MAC of {quote(name)} is {NO_MAC}",
                "no guest on it reaches this host",
                _set_mac(scene, name),
            )


def _set_mac(scene: Scene, bridge: str) -> Command:
    return sh("ip", "link", "set", "dev", bridge, "address", mac_for(bridge, scene.host_id))


def find_slow_bridges(scene: Scene) -> Iterator[Finding]:
    """A bridge that runs the spanning tree protocol, and lets a guest wait for it."""
    why = "a guest's network is silent that long, twice, after its start: DHCP and PXE give up"
    for name, bridge in scene.bridges().items():
        delay = bridge.forward_delay or 0
        if bridge.stp and delay > QUICK:
            words = ["stp_state", "0"]
            if len(scene.uplinks(bridge)) > 1:
                # NOTE: without it there may be a loop; the least that IEEE 802.1D allows.
                words = ["hello_time", "100", "max_age", "600", "forward_delay", str(QUICK)]
            yield Finding(
                f"{quote(name)} runs STP with a forward delay of {delay / 100:g} s",
                why,
                sh("ip", "link", "set", "dev", name, "type", "bridge", *words),
            )
    for network in _ovs_bridges(scene):
        for row in scene.switches[network.ovsdb].bridges:
            if row.name == network.bridge and row.stp:
                yield Finding(
                    f"{quote(row.name)} runs STP, with a forward delay of 15 s by default",
                    why,
                    vsctl(
                        row.ovsdb,
                        ("set", "Bridge", row.name, "stp_enable=false", "rstp_enable=true"),
                    ),
                )
