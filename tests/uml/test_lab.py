"""What only the User Mode Linux has: VLAN-aware bridges, 8021q, Open vSwitch's kernel datapath."""

from __future__ import annotations

from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.snapshot import Snapshot, diff
from lab.taps import carries, frame, holds, mac, vid

HWADDR = "52:54:00:ff:00:01"


def set_vlans(netns: Namespace, tap: str, *vlans: str) -> None:
    """Replace VLAN 1 of a bridge port by `vlans`: words of `bridge vlan add`."""
    netns.run(["bridge", "vlan", "del", "dev", tap, "vid", "1"])
    for vlan in vlans:
        netns.run(["bridge", "vlan", "add", "dev", tap, "vid", *vlan.split()])


def test_vlan_aware_bridge_tags_frames(netns: Namespace) -> None:
    netns.add_bridge("br0", mac=HWADDR, vlan_filtering=True)
    access, trunk, other = (
        netns.tap(name, up=True, master="br0") for name in ("access", "trunk", "other")
    )
    set_vlans(netns, "access", "10 pvid untagged")
    set_vlans(netns, "trunk", "10", "20-29")
    set_vlans(netns, "other", "20 pvid untagged")

    seen = carries(access, trunk, b"from access")
    assert seen is not None and vid(seen) == 10
    assert other.recv(0.2, holds(b"from access")) is None
    seen = carries(trunk, access, b"from trunk", (10,))
    assert seen is not None and vid(seen) is None
    seen = carries(trunk, other, b"to other", (20,))
    assert seen is not None and vid(seen) is None
    assert carries(trunk, access, b"wrong vlan", (30,)) is None
    netns.ip("link", "del", "br0")


def test_tap_that_is_up_leaks_before_its_vlan(netns: Namespace) -> None:
    """Facts A.6: up and joined, then its VLAN: the first frame reaches VLAN 1."""
    netns.add_bridge("br0", mac=HWADDR, vlan_filtering=True)
    peer = netns.tap("peer", up=True, master="br0")
    early = netns.tap("early", up=True, master="br0")
    assert carries(early, peer, b"leak") is not None
    set_vlans(netns, "early", "10 pvid untagged")
    assert carries(early, peer, b"early") is None
    late = netns.tap("late", master="br0")
    set_vlans(netns, "late", "10 pvid untagged")
    netns.ip("link", "set", "dev", "late", "up")
    assert carries(late, peer, b"late") is None
    seen = carries(late, early, b"same vlan")
    assert seen is not None and vid(seen) is None
    netns.ip("link", "del", "br0")


def test_vlan_left_behind_is_seen(netns: Namespace) -> None:
    netns.add_bridge("br0", mac=HWADDR, vlan_filtering=True)
    netns.tap("t0", master="br0")
    before = Snapshot.take(netns)
    netns.run(["bridge", "vlan", "add", "dev", "t0", "vid", "10"])
    (line,) = diff(before, Snapshot.take(netns))
    assert line.startswith("vlan t0: ")
    netns.ip("link", "del", "br0")


def test_vlan_device_tags_frames(netns: Namespace) -> None:
    netns.ip("link", "add", "v0", "type", "veth", "peer", "name", "v1")
    netns.ip("link", "add", "link", "v0", "name", "v0.10", "type", "vlan", "id", "10")
    for name in ("v0", "v1", "v0.10"):
        netns.ip("link", "set", "dev", name, "up")
    wire = netns.raw("v1")
    netns.raw("v0.10").send(frame(mac(1), payload=b"tagged"))
    seen = wire.recv(1, holds(b"tagged"))
    assert seen is not None and vid(seen) == 10
    netns.ip("link", "del", "v0")


def test_kernel_datapath_tags_frames(netns: Namespace, ovs_system: OpenVSwitch) -> None:
    ovs_system.add_bridge("br-int", hwaddr=HWADDR)
    access, trunk, other = (netns.tap(name, up=True) for name in ("access", "trunk", "other"))
    ovs_system.add_port("br-int", "access", "tag=10", "vlan_mode=access")
    ovs_system.add_port("br-int", "trunk", "trunks=10,20", "vlan_mode=trunk")
    ovs_system.add_port("br-int", "other", "tag=20", "vlan_mode=access")
    assert netns.link("access")["master"] == "ovs-system"
    ovs_system.wait_up("access", "trunk", "other")

    seen = carries(access, trunk, b"from access")
    assert seen is not None and vid(seen) == 10
    assert other.recv(0.2, holds(b"from access")) is None
    seen = carries(trunk, access, b"from trunk", (10,))
    assert seen is not None and vid(seen) is None
    assert carries(trunk, access, b"wrong vlan", (30,)) is None
    ovs_system.vsctl("del-br", "br-int")


def test_stale_row_takes_a_new_tap_into_the_old_vlan(
    netns: Namespace, ovs_system: OpenVSwitch
) -> None:
    """Facts A.4: the kernel datapath attaches a new tap by the row of the one that died."""
    ovs_system.add_bridge("br-int", hwaddr=HWADDR)
    trunk = netns.tap("trunk", up=True)
    ovs_system.add_port("br-int", "trunk", "trunks=10,20", "vlan_mode=trunk")
    old = netns.tap("web0", up=True)
    ovs_system.add_port("br-int", "web0", "tag=10")
    old.close()
    ovs_system.wait_until("Interface", "web0", "ofport=-1")
    new = netns.tap("web0", up=True)
    ovs_system.wait_until("Interface", "web0", "ofport>0")
    ovs_system.wait_up("web0", "trunk")
    seen = carries(new, trunk, b"nobody ran a hook")
    assert seen is not None and vid(seen) == 10
    ovs_system.vsctl("del-br", "br-int")
