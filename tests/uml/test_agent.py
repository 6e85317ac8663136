"""The agent on a VLAN-aware Linux bridge and on Open vSwitch's kernel datapath.

An unprivileged user's QEMU, the hooks as clients, and a bridge that is deleted and made again,
shown by frames and by what the kernel and the database say.
"""

from __future__ import annotations

import json
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lab.agent import Agent
from lab.agent_site import HELD, held
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.plug import UNTAGGED, Blast, Tags, crossing, vids_of
from lab.public import NOBODY, as_user, publish
from lab.qemu import Qemu
from lab.station import Station
from lab.taps import Tap, frame, holds, mac

BRIDGE_MAC = "02:00:00:00:00:0b"
STRANGER = 65533
BRIEF = 8
"""Seconds that an up may take where it shall not be done in time; enough for its first steps."""
LATER = 60.0
"""Seconds after which what does not happen fails its test."""
OUT: dict[Tags, Tags | None] = {UNTAGGED: (100,), (1,): None, (20,): None}
"""How a guest's frames come out of the trunk where it has an access port in VLAN 100."""


@dataclass
class Site(ABC):
    """A bridge, once it is made, with a guest on `trunk`, which has each VLAN tagged, and an agent.

    The policy puts each tap into VLAN 100, and lets nobody, the user, have some.
    """

    netns: Namespace
    trunk: Tap
    agent: Agent
    """The users'."""
    root: Agent
    """Root's, which brings back."""
    hooks: Hooks

    bridge: ClassVar[str]
    kind: ClassVar[str]
    access: ClassVar[object]
    """What `port` returns for an access port in VLAN 100."""

    @abstractmethod
    def make(self) -> None:
        """Make the bridge with its trunk."""

    @abstractmethod
    def unmake(self) -> None:
        """Delete the bridge."""

    @abstractmethod
    def port(self, tap: str) -> object:
        """Return what the switch says about the tap's port, None where it has none."""

    @abstractmethod
    def wait_clean(self) -> None:
        """Return when the bridge has the trunk and no other port."""

    def qemu(self, *args: str, prefix: Sequence[str] = ()) -> Qemu:
        """Start QEMU as `web1`."""
        return Qemu(
            *("-name", "web1"), *args, netns=self.netns.name, prefix=prefix,
            env={**self.hooks.environ(), "HOME": "/"},
        )  # fmt: skip

    def netdev(self) -> str:
        """Return the argument of -netdev that gets a tap through our bridge helper."""
        helper = self.hooks.folder / "pyqemu-bridge-helper"
        return f"tap,id=n0,br={self.bridge},helper={helper}"

    def taps(self) -> set[str]:
        """Return the names of all taps but the trunk."""
        return {
            name for name, link in self.netns.links().items()
            if link.get("linkinfo", {}).get("info_kind") == "tun"
        } - {self.trunk.name}  # fmt: skip

    def mark(self, tap: str) -> str:
        """Return the link's alias: our mark."""
        alias: str = self.netns.link(tap).get("ifalias", "")
        return alias

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return for each verb of hooks how many requests the agent had, and how many failed."""
        requests = self.agent.report()["requests"]
        return {
            verb: (told["count"], told["failed"]) for verb, told in requests.items()
            if verb in ("up", "down") and told["count"]
        }  # fmt: skip


class Lan(Site):
    """With the VLAN-aware Linux bridge br0."""

    bridge = "br0"
    kind = "linux"
    access: ClassVar[object] = {100: "pvid untagged"}

    def make(self) -> None:
        self.netns.add_bridge("br0", mac=BRIDGE_MAC, vlan_filtering=True)
        self.netns.ip("link", "set", "dev", "trunk", "master", "br0")
        for words in (["del", "vid", "1"], ["add", "vid", "1-4094"]):
            self.netns.run(["bridge", "vlan", words[0], "dev", "trunk", *words[1:]])

    def unmake(self) -> None:
        self.netns.ip("link", "del", "br0")

    def port(self, tap: str) -> object:
        if self.netns.link(tap).get("master") != "br0":
            return None
        return vids_of(self.netns, tap)

    def wait_clean(self) -> None:
        links = self.netns.links().values()
        assert [link["ifname"] for link in links if link.get("master") == "br0"] == ["trunk"]


@dataclass
class Fabric(Site):
    """With br-int, a bridge of Open vSwitch on the kernel's datapath."""

    ovs: OpenVSwitch
    bridge = "br-int"
    kind = "openvswitch"
    access: ClassVar[object] = ("ovs-system", "access", 100, [])

    def make(self) -> None:
        self.ovs.add_bridge("br-int", hwaddr=BRIDGE_MAC, mtu=1500)
        self.ovs.add_port("br-int", "trunk", "vlan_mode=trunk")
        self.ovs.wait_up("trunk")

    def unmake(self) -> None:
        self.ovs.vsctl("del-br", "br-int")

    def port(self, tap: str) -> object:
        row = self.ovs.find("Port", tap)
        if row is None:
            return None
        master = self.netns.link(tap).get("master")
        return master, row["vlan_mode"], row["tag"], row["trunks"]

    def wait_clean(self) -> None:
        ports = [self.ovs.row("Port", name)["_uuid"] for name in ("br-int", "trunk")]
        self.ovs.wait_until("Bridge", "br-int", f"ports=[{','.join(ports)}]")


def write_policy(path: Path, network: dict[str, Any], timeout: int = 60) -> Path:
    rules = [{"tap": "*", "network": "lan"}]
    lan = {"vlan": 100, "users": ["nobody"], **network}
    path.write_text(
        json.dumps({"version": 1, "timeout": timeout, "networks": {"lan": lan}, "rules": rules})
    )
    path.chmod(0o644)
    return path


@pytest.fixture
def lan(netns: Namespace, tmp_path: Path) -> Iterator[Lan]:
    policy = write_policy(tmp_path / "policy.yaml", {"bridge": "br0"})
    with Agent(netns, policy, users=True) as agent, Agent(netns, policy) as root:
        own = Hooks(agent.folder / "bin", netns=netns.name, agent=agent.path)
        hooks = publish(own, agent.folder)
        yield Lan(netns, netns.tap("trunk", up=True), agent, root, hooks)


@pytest.fixture
def fabric(netns: Namespace, ovs_system: OpenVSwitch, tmp_path: Path) -> Iterator[Fabric]:
    policy = write_policy(tmp_path / "policy.yaml", {"bridge": "br-int", "ovsdb": ovs_system.db})
    with Agent(netns, policy, users=True) as agent, Agent(netns, policy, before=HELD) as root:
        own = Hooks(agent.folder / "bin", netns=netns.name, agent=agent.path)
        hooks = publish(own, agent.folder)
        yield Fabric(netns, netns.tap("trunk", up=True), agent, root, hooks, ovs_system)


def check_user_s_qemu(site: Site) -> None:
    """A user's QEMU is in VLAN 100, also on a bridge that is new; killed, it leaves nothing."""
    site.make()
    with (
        Station(site.netns) as station,
        site.qemu(
            "-netdev", site.netdev(), *station.arguments("n0"), prefix=as_user(NOBODY)
        ) as qemu,
    ):
        assert qemu.greeting
        status = Path(f"/proc/{qemu.pid}/status").read_text().splitlines()
        words = dict(line.split(":", 1) for line in status)
        assert words["Uid"].split() == [str(NOBODY)] * 4
        assert [int(words[name], 16) for name in ("CapPrm", "CapEff", "CapAmb")] == [0, 0, 0]
        assert site.taps() == {"tap0"}
        info = site.netns.link("tap0")["linkinfo"]["info_data"]
        assert (info["user"], info["persist"]) == ("root", False)
        check_guest(site, station, qemu.pid)
        site.unmake()
        # NOTE: a tap that is not taken down first is in the default VLAN 1 for a moment.
        with Blast(station, site.trunk) as blast:
            site.make()
            blast.wait_for(site.trunk, (100,))
        assert blast.seen(site.trunk) == {(100,)}
        check_guest(site, station, qemu.pid)
        assert qemu.signal(signal.SIGKILL) == -signal.SIGKILL
    assert site.taps() == set()
    site.wait_clean()
    site.unmake()


def check_guest(site: Site, station: Station, pid: int) -> None:
    """Check that tap0 is nobody's, attached for this QEMU, and in VLAN 100 alone."""
    assert site.port("tap0") == site.access
    assert "UP" in site.netns.link("tap0")["flags"]
    alias = site.mark("tap0")
    assert f" network=lan kind={site.kind} bridge={site.bridge} " in alias
    assert f" pid={pid} " in alias and f" uid={NOBODY} by=name made=1 " in alias
    assert alias.endswith(" vm=web1")
    assert crossing(station, site.trunk, OUT) == OUT
    site.trunk.send(frame(mac(2), payload=b"not for it", vids=(20,)))
    site.trunk.send(frame(mac(2), payload=b"for it", vids=(100,)))
    got = station.recv(5, holds(b"for it"))
    assert got is not None and b"not for it" not in got


def check_hooks(site: Site) -> None:
    """The hooks have the agent attach and detach."""
    site.make()
    web0 = site.netns.tap("web0")
    done = site.hooks.up("web0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert site.port("web0") == site.access
    assert f" bridge={site.bridge} " in site.mark("web0")
    assert crossing(web0, site.trunk, OUT) == OUT
    for _ in range(2):
        done = site.hooks.down("web0")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert site.port("web0") is None
        assert "UP" not in site.netns.link("web0")["flags"]
        assert site.mark("web0") == ""
    assert site.counts() == {"up": (1, 0), "down": (2, 0)}
    site.unmake()


def test_user_s_qemu_on_a_vlan_aware_bridge(lan: Lan) -> None:
    check_user_s_qemu(lan)


def test_user_s_qemu_on_the_kernel_datapath(fabric: Fabric) -> None:
    check_user_s_qemu(fabric)


def test_hooks_on_a_vlan_aware_bridge(lan: Lan) -> None:
    check_hooks(lan)


def test_hooks_on_the_kernel_datapath(fabric: Fabric) -> None:
    check_hooks(fabric)


def test_guest_that_vswitchd_does_not_let_go_of(fabric: Fabric) -> None:
    """What cannot be brought back in time is tried again, though its port is still in the kernel's.

    ovs-vswitchd stands still once it has taken the port in, and does not hear of the undo.
    """
    fabric.make()
    web0 = fabric.netns.tap("web0")
    assert fabric.hooks.up("web0").returncode == 0
    alias = fabric.mark("web0")
    network = {"bridge": "br-int", "ovsdb": fabric.ovs.db}
    write_policy(fabric.root.policy, network, BRIEF)
    wait(lambda: fabric.root.up("none").seconds == BRIEF, "the policy is not in force")
    try:
        with held(fabric.root, "web0", "AddPort", "after") as stand:
            fabric.ovs.vsctl("del-port", "web0")
            stand()
            fabric.ovs.vswitchd.stop()
        told = f"web0: not done after {BRIEF} s"
        wait(lambda: told in (fabric.root.report()["last_error"] or ""), "it was not tried")
        link = fabric.netns.link("web0")
        assert link["master"] == "ovs-system" and fabric.port("web0") is None
        assert "UP" in link["flags"] and link["ifalias"] == alias
        write_policy(fabric.root.policy, network)
    finally:
        fabric.ovs.vswitchd.cont()
    wait(lambda: fabric.port("web0") == fabric.access, "it is not back")
    assert crossing(web0, fabric.trunk, OUT) == OUT
    assert fabric.hooks.down("web0").returncode == 0
    fabric.unmake()


def wait(done: Callable[[], object], what: str) -> None:
    """Wait until it is so; fail the test where it is not in time."""
    end = time.monotonic() + LATER
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_who_is_not_allowed_is_told_so(lan: Lan) -> None:
    lan.make()
    with lan.qemu("-netdev", lan.netdev(), prefix=as_user(STRANGER)) as qemu:
        with pytest.raises(EOFError):
            assert not qemu.greeting
        assert qemu.wait() == 1
        said = qemu.stderr
    assert f"user {STRANGER} may not use network lan: neither the user nor one of " in said
    assert "bridge helper failed" in said or "failed to recv file descriptor" in said
    assert lan.taps() == set()
    lan.wait_clean()
    lan.unmake()
