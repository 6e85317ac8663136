"""pyqemu-ifctl apply on what this machine's kernel lacks: VLAN-aware bridges, OVS's datapath."""

from __future__ import annotations

import pytest

from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.plug import break_after_each, reapply, unplug, vids_of
from lab.snapshot import Snapshot, diff
from lab.storm import Storm, native, spelled, trunk, vlan
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Policy

BRIDGE_MAC = "02:00:00:00:00:0b"
STORM = [
    vlan(10),
    vlan(20),
    trunk(20, 30),
    native(10, 30),
    None,
    trunk(10, 40),
    native(40, 20, 30),
    vlan(30),
]


@pytest.fixture
def lan(netns: Namespace) -> Namespace:
    """A namespace with the VLAN-aware bridge br0."""
    netns.add_bridge("br0", mac=BRIDGE_MAC, vlan_filtering=True)
    return netns


@pytest.fixture
def fabric(ovs_system: OpenVSwitch) -> OpenVSwitch:
    """An Open vSwitch with the bridge br-int on the kernel's datapath."""
    ovs_system.add_bridge("br-int", hwaddr="02:00:00:00:00:0a", mtu=1500)
    return ovs_system


def policy_of(settings: str, bridge: str = "bridge: br0") -> Policy:
    # NOTE: nothing here is about the time, and a busy machine may stop this one for ten seconds.
    text = f"version: 1\ntimeout: 60\nnetworks: {{lan: {{{bridge}}}}}\n"
    text += f"rules: [{{tap: web0, network: lan, {settings}}}]\n"
    return parse_policy([Source("policy.yaml", text.encode())])


def test_two_hundred_changes_under_traffic(lan: Namespace) -> None:
    """Not one frame in a VLAN that the policy of its time does not allow."""
    netns = lan
    with Storm(netns, untagged=1) as storm:
        for vid, tap in storm.sniffers.items():
            netns.ip("link", "set", "dev", tap.name, "master", "br0")
            netns.run(["bridge", "vlan", "del", "dev", tap.name, "vid", "1"])
            netns.run(
                ["bridge", "vlan", "add", "dev", tap.name, "vid", str(vid), "pvid", "untagged"]
            )
        storm.run([(vlan, policy_of(f"vlan: {spelled(vlan)}")) for vlan in STORM], 200)
        unplug(netns, "web0")
    assert storm.wrong(older=0) == []
    assert storm.quiet() < 20


def test_changes_under_traffic_on_the_kernels_datapath(
    netns: Namespace, fabric: OpenVSwitch
) -> None:
    bridge = f"bridge: br-int, kind: openvswitch, ovsdb: '{fabric.db}'"
    with Storm(netns) as storm:
        for vid, tap in storm.sniffers.items():
            fabric.add_port("br-int", tap.name, f"tag={vid}" if vid else "vlan_mode=access")
        fabric.wait_up(*(tap.name for tap in storm.sniffers.values()))
        storm.run([(vlan, policy_of(f"vlan: {spelled(vlan)}", bridge)) for vlan in STORM], 12)
        for tap in storm.sniffers.values():
            fabric.del_port(tap.name)
        unplug(netns, "web0")
    assert storm.wrong() == []
    assert storm.quiet() < 4


def test_all_or_nothing(lan: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken after each step, the port has the VIDs that it had, and its link is up."""
    netns = lan
    netns.tap("web0")
    reapply(netns, policy_of("vlan: {native: 10, trunk: [20, 30]}, isolated: true"), "web0")
    before = Snapshot.take(netns)
    assert set(vids_of(netns, "web0")) == {10, 20, 30}

    def attempt() -> None:
        (outcome,) = reapply(netns, policy_of("vlan: {trunk: [20, 40]}, txqueuelen: 7"))
        if outcome.failure is not None:
            raise outcome.failure

    def check() -> None:
        assert diff(before, Snapshot.take(netns)) == []

    assert "SetVlans" in break_after_each(monkeypatch, attempt, check)
    assert vids_of(netns, "web0") == {20: "", 40: ""}
    unplug(netns, "web0")
