"""The laboratory's guest: it boots, and its packets go through a tap that a script attached."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import boot, needs
from lab.netns import Namespace
from lab.qemu import Qemu
from lab.taps import tags

CARD = "virtio-net-pci,netdev=n0,mac=52:54:00:aa:00:01"
HWADDR = "52:54:00:ff:00:01"
UP = """#!/bin/sh
ip link set dev "$1" master br0 && ip link set dev "$1" up
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The least up script: the tap joins br0."""
    needs.require("qemu")
    reason = boot.setup()
    if reason is not None:
        needs.lack(reason)
    path = tmp_path / "up"
    path.write_text(UP)
    path.chmod(0o755)
    return path


@pytest.mark.timeout(200)
def test_guest_pings_the_host(netns: Namespace, script: Path) -> None:
    netns.add_bridge("br0", mac=HWADDR)
    netns.ip("address", "add", "10.9.0.1/24", "dev", "br0")
    netdev = f"tap,id=n0,ifname=web0,script={script},downscript=no"
    with boot.Console() as console:
        guest = boot.guest_arguments(console, ip="10.9.0.2/24", ping="10.9.0.1", count=2, hold=True)
        with Qemu(
            *guest, "-netdev", netdev, "-device", CARD, netns=netns.name, machine="pc"
        ) as qemu:
            assert console.wait("card") == "card eth0 52:54:00:aa:00:01 mtu 1500"
            assert console.wait("ping") == "ping 10.9.0.1 answered"
            assert "2 packets received" in console.wait("2 packets")
            console.wait("ready")
            neighbours = {entry["dst"]: entry.get("lladdr") for entry in netns.ip("neigh", "show")}
            assert neighbours["10.9.0.2"] == "52:54:00:aa:00:01"
            assert qemu.quit() == 0
    netns.ip("link", "del", "br0")


@pytest.mark.timeout(200)
def test_guest_gets_a_lease(netns: Namespace, script: Path, tmp_path: Path) -> None:
    netns.add_bridge("br0", mac=HWADDR)
    netns.ip("address", "add", "10.9.0.1/24", "dev", "br0")
    conf = tmp_path / "udhcpd.conf"
    files = f"pidfile {tmp_path}/pid\nlease_file {tmp_path}/leases\n"
    conf.write_text(f"interface br0\nstart 10.9.0.7\nend 10.9.0.7\nopt mtu 1400\n{files}")
    netdev = f"tap,id=n0,ifname=web0,script={script},downscript=no"
    with netns.popen([boot.cache() / "guest" / "busybox", "udhcpd", "-f", conf]) as server:
        with boot.Console() as console:
            guest = boot.guest_arguments(console, ip="dhcp", ping="10.9.0.1")
            with Qemu(
                *guest, "-netdev", netdev, "-device", CARD, netns=netns.name, machine="pc"
            ) as qemu:
                assert console.wait("lease") == "lease 10.9.0.7 mtu 1400"
                assert console.wait("ping") == "ping 10.9.0.1 answered"
                assert console.wait("done") == "done"
                assert qemu.wait() == 0
        server.terminate()
    netns.ip("link", "del", "br0")


@pytest.mark.timeout(200)
def test_guest_tags_its_frames(netns: Namespace, script: Path) -> None:
    netns.add_bridge("br0", mac=HWADDR)
    netdev = f"tap,id=n0,ifname=web0,script={script},downscript=no"
    with boot.Console() as console:
        guest = boot.guest_arguments(console, vlan=10, ip="10.9.0.2/24", ping="10.9.0.1")
        with Qemu(
            *guest, "-S", "-netdev", netdev, "-device", CARD, netns=netns.name, machine="pc"
        ) as qemu:
            assert qemu.greeting
            wire = netns.raw("web0")
            qemu.execute("cont")
            console.wait("card")
            assert wire.recv(10, lambda frame: tags(frame) == (10,)) is not None
            assert qemu.quit() == 0
    netns.ip("link", "del", "br0")
