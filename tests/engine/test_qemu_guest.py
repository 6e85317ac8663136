"""A real guest behind our hooks: its packets on the wire, where the policy says, nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab import boot
from lab.hooks import Hooks
from lab.needs import lack, require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.qemu import Qemu
from lab.sites import HOME, HWADDR, Site
from lab.taps import Raw, Want, vid

HOST, GUEST = "10.9.0.1", "10.9.0.2"
MAC = "52:54:00:aa:00:01"
CARD = f"virtio-net-pci,netdev=n0,mac={MAC}"
SIZE = 1400
"""Bytes of data in each ping."""

# IPv4 and ICMP (RFC 791, RFC 792); offsets in an untagged Ethernet frame without IP options.
ETHERTYPE, IP_PROTOCOL, IP_SOURCE, IP_DESTINATION, ICMP_TYPE = 12, 23, 26, 30, 34
IPV4, ICMP, ECHO_REPLY, ECHO_REQUEST = 0x0800, 1, 0, 8


def address(text: str) -> bytes:
    """Return an IPv4 address as its four bytes."""
    return bytes(map(int, text.split(".")))


def echo(kind: int, source: str, destination: str) -> Want:
    """Want an untagged ICMP echo with our data from one address to the other."""

    def want(frame: bytes) -> bool:
        return (
            int.from_bytes(frame[ETHERTYPE : ETHERTYPE + 2], "big") == IPV4
            and frame[IP_PROTOCOL] == ICMP
            and frame[IP_SOURCE : IP_SOURCE + 4] == address(source)
            and frame[IP_DESTINATION : IP_DESTINATION + 4] == address(destination)
            and frame[ICMP_TYPE] == kind
            and len(frame) > SIZE
        )

    return want


def from_guest(frame: bytes) -> bool:
    """Want a frame that the guest has sent."""
    return frame[6:12] == bytes.fromhex(MAC.replace(":", ""))


@pytest.fixture
def linux(netns: Namespace, tmp_path: Path, served: Callable[..., Hooks]) -> Site:
    """A Linux bridge that has the host's address."""
    site = Site("linux", netns, served(Hooks(tmp_path / "hooks", netns.name)))
    netns.ip("address", "add", f"{HOST}/24", "dev", "br0")
    return site


@pytest.fixture
def openvswitch(ovs: OpenVSwitch, tmp_path: Path, served: Callable[..., Hooks]) -> Site:
    """An Open vSwitch bridge with the host's address on a port in the VLAN of HOME."""
    netns = ovs.namespace
    site = Site("openvswitch", netns, served(Hooks(tmp_path / "hooks", netns.name)), ovs)
    words = ("--", "set", "Interface", "gw100", "type=internal", f'mac="{HWADDR.format(7)}"')
    ovs.vsctl("add-port", "br-int", "gw100", "tag=100", *words)
    netns.ip("link", "set", "dev", "gw100", "up")
    netns.ip("address", "add", f"{HOST}/24", "dev", "gw100")
    return site


def run_guest(site: Site, port: Raw) -> None:
    """Boot a guest that may join HOME, see its pings and their answers on `port`, and quit."""
    require("qemu")
    reason = boot.setup()
    if reason is not None:
        lack(reason)
    site.write_policy({"vm": "web", "netdev": "n0", "mac": MAC, "network": HOME})
    with boot.Console() as console:
        guest = boot.guest_arguments(
            console, ip=f"{GUEST}/24", ping=HOST, count=3, size=SIZE, hold=True
        )
        with Qemu(
            *(*guest, "-name", "web", *site.qemu_arguments("web0"), "-device", CARD),
            netns=site.netns.name,
            machine="pc",
            env=site.hooks.environ(),
        ) as qemu:
            assert qemu.greeting
            assert site.network_of("web0") == HOME
            assert console.wait("ping") == f"ping {HOST} answered"
            assert "3 packets received" in console.wait("3 packets")
            request = port.recv(1, echo(ECHO_REQUEST, GUEST, HOST))
            assert request is not None and from_guest(request)
            assert port.recv(1, echo(ECHO_REPLY, HOST, GUEST), outgoing=True) is not None
            assert qemu.quit() == 0
            assert not [line for line in qemu.stderr.splitlines() if "pyqemu-" in line]
    assert "web0" not in site.netns.links() and site.is_clean("web0")


@pytest.mark.timeout(200)
def test_guest_on_a_linux_bridge(linux: Site) -> None:
    run_guest(linux, linux.netns.raw("br0"))


@pytest.mark.timeout(200)
def test_guest_on_openvswitch(openvswitch: Site, ovs: OpenVSwitch) -> None:
    netns = openvswitch.netns
    trunk, other = netns.tap("trunk", up=True), netns.tap("other", up=True)
    ovs.add_port("br-int", "trunk", "trunks=100,200", "vlan_mode=trunk")
    ovs.add_port("br-int", "other", "tag=200", "vlan_mode=access")
    for name in ("trunk", "other"):
        ovs.wait_until("Interface", name, "link_state=up")
    run_guest(openvswitch, netns.raw("gw100"))
    seen = trunk.recv(1, from_guest)
    assert seen is not None and vid(seen) == 100, "what it floods has the VLAN's tag"
    assert other.recv(0.2, from_guest) is None, "and stays in it"
    for name in ("trunk", "other"):
        ovs.del_port(name)
