"""Attaching to a VLAN-aware Linux bridge, shown by frames and by what the kernel says.

NOTE: most tests call what the hooks call (lab.plug) in this process: an interpreter takes a
second to start in here. The programs themselves are run where their words or their timing count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pyqemu_ifup.attach
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.plug import (
    UNTAGGED,
    Blast,
    Tags,
    break_after_each,
    crossing,
    meddle,
    plug,
    port_of,
    unplug,
    vids_of,
)
from lab.snapshot import Snapshot, diff
from lab.taps import Tap, carries, frame, holds, mac
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Port, Vlan
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.linux import SetVlans
from pyqemu_ifup.ops import Op, Plan, SetUp
from pyqemu_ifup.plan import plan_up

BRIDGE_MAC = "02:00:00:00:00:0b"
EVERY = range(1, 4095)
ACCESS = "pvid untagged"


@dataclass
class Lan:
    """A VLAN-aware bridge `br0` with two guests: `trunk` has each VID tagged, `peer` VLAN 1."""

    netns: Namespace
    trunk: Tap
    peer: Tap

    def access(self, name: str, vid: int) -> Tap:
        """Add a guest with an access port in one VLAN."""
        tap = self.netns.tap(name, up=True, master="br0")
        self.vlan("del", name, 1)
        self.vlan("add", name, vid, "pvid", "untagged")
        return tap

    def vlan(self, verb: str, tap: str, vid: int | str, *flags: str) -> None:
        """Run `bridge vlan VERB` on a port."""
        self.netns.run(["bridge", "vlan", verb, "dev", tap, "vid", str(vid), *flags])

    def set(self, *words: str) -> None:
        """Run `ip link set dev br0`."""
        self.netns.ip("link", "set", "dev", "br0", *words)


@pytest.fixture
def lan(netns: Namespace) -> Lan:
    netns.add_bridge("br0", mac=BRIDGE_MAC, vlan_filtering=True)
    trunk, peer = (netns.tap(name, up=True, master="br0") for name in ("trunk", "peer"))
    lan = Lan(netns, trunk, peer)
    lan.vlan("del", "trunk", 1)
    lan.vlan("add", "trunk", "1-4094")
    return lan


@pytest.fixture
def hooks(tmp_path: Path, netns: Namespace, served: Callable[..., Hooks]) -> Hooks:
    return served(Hooks(tmp_path / "hooks", netns=netns.name))


def write_policy(hooks: Hooks, settings: str) -> None:
    """Put each tap into br0 with these settings."""
    hooks.write_policy(
        "version: 1\n"
        f"networks:\n  lan: {{bridge: br0{settings}}}\n"
        'rules:\n  - {tap: "*", network: lan}\n'
    )


def refusal(netns: Namespace, port: Port, status: Status = Status.REFUSED) -> str:
    """Attach in vain; check the status and that nothing has changed, return the words."""
    before = Snapshot.take(netns)
    with pytest.raises(Failure) as caught:
        plug(netns, port)
    assert caught.value.status is status, caught.value
    assert diff(before, Snapshot.take(netns)) == []
    return str(caught.value)


def is_loose(netns: Namespace, tap: str) -> bool:
    """Tell whether the tap is down, without a master, VIDs and our mark."""
    link = netns.link(tap)
    return not (
        "UP" in link["flags"] or "master" in link or link.get("ifalias") or vids_of(netns, tap)
    )


@dataclass(frozen=True)
class Row:
    """One setting: the bridge's default PVID and `vlan`; the VIDs, and frames from and to it."""

    vlan: Vlan | None
    vids: dict[int, str]
    out: dict[Tags, Tags | None]
    back: dict[Tags, Tags | None]
    default_pvid: int = 1


TABLE = {
    "no vlan": Row(
        None, {1: ACCESS}, {UNTAGGED: (1,), (10,): None, (20,): None}, {(1,): UNTAGGED, (10,): None}
    ),
    "no vlan, default PVID 7": Row(
        None,
        {7: ACCESS},
        {UNTAGGED: (7,), (1,): None, (20,): None},
        {(7,): UNTAGGED, (1,): None},
        default_pvid=7,
    ),
    "vlan 100": Row(
        Vlan(100),
        {100: ACCESS},
        {UNTAGGED: (100,), (1,): None, (20,): None},
        {(100,): UNTAGGED, (1,): None, (20,): None},
    ),
    "vlan 1, default PVID 7": Row(
        Vlan(1),
        {1: ACCESS},
        {UNTAGGED: (1,), (7,): None},
        {(1,): UNTAGGED, (7,): None},
        default_pvid=7,
    ),
    "vlan 100, no default PVID": Row(
        Vlan(100),
        {100: ACCESS},
        {UNTAGGED: (100,), (1,): None},
        {(100,): UNTAGGED, (1,): None},
        default_pvid=0,
    ),
    "trunk": Row(
        Vlan(None, (20, *range(30, 40))),
        {20: "", **dict.fromkeys(range(30, 40), "")},
        {UNTAGGED: None, (1,): None, (20,): (20,), (30,): (30,), (39,): (39,), (40,): None},
        {(1,): None, (20,): (20,), (35,): (35,), (40,): None},
    ),
    "native and trunk": Row(
        Vlan(10, (20, *range(30, 40))),
        {10: ACCESS, 20: "", **dict.fromkeys(range(30, 40), "")},
        {UNTAGGED: (10,), (1,): None, (20,): (20,), (39,): (39,), (40,): None},
        {(10,): UNTAGGED, (1,): None, (20,): (20,), (40,): None},
    ),
    "native in trunk too": Row(
        Vlan(10, (10, 20)),
        {10: ACCESS, 20: ""},
        {UNTAGGED: (10,), (20,): (20,), (30,): None},
        {(10,): UNTAGGED, (20,): (20,), (30,): None},
    ),
}


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_what_vlan_means(lan: Lan, row: Row) -> None:
    lan.set("type", "bridge", "vlan_default_pvid", str(row.default_pvid))
    web0 = lan.netns.tap("web0")
    plug(lan.netns, port_of("web0", "br0", vlan=row.vlan))
    assert vids_of(lan.netns, "web0") == row.vids
    # NOTE: the two observers follow the bridge's default PVID; make them what they were.
    lan.vlan("add", "trunk", "1-4094")
    assert crossing(web0, lan.trunk, row.out) == row.out
    assert crossing(lan.trunk, web0, row.back) == row.back
    unplug(lan.netns, "web0")
    assert is_loose(lan.netns, "web0")
    lan.set("type", "bridge", "vlan_default_pvid", "1")
    lan.vlan("add", "trunk", "1-4094")
    lan.vlan("add", "peer", 1, "pvid", "untagged")


def test_no_default_pvid_and_no_vlan_is_refused(lan: Lan) -> None:
    lan.set("type", "bridge", "vlan_default_pvid", "0")
    lan.netns.tap("web0")
    assert refusal(lan.netns, port_of("web0", "br0")) == (
        "br0 has no default PVID: and the policy gives no vlan; set vlan: for network lan, "
        "or: ip link set dev br0 type bridge vlan_default_pvid 1"
    )
    lan.set("type", "bridge", "vlan_default_pvid", "1")
    plug(lan.netns, port_of("web0", "br0"))
    assert vids_of(lan.netns, "web0") == {1: ACCESS}
    unplug(lan.netns, "web0")
    lan.vlan("add", "trunk", "1-4094")
    lan.vlan("add", "peer", 1, "pvid", "untagged")


def test_hooks_attach_and_detach(lan: Lan, hooks: Hooks) -> None:
    write_policy(hooks, ", vlan: {native: 100, trunk: [20, 30-39]}, isolated: true")
    web0 = lan.netns.tap("web0")
    done = hooks.up("web0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert vids_of(lan.netns, "web0") == {100: ACCESS, 20: "", **dict.fromkeys(range(30, 40), "")}
    out: dict[Tags, Tags | None] = {UNTAGGED: (100,), (30,): (30,), (40,): None}
    assert crossing(web0, lan.trunk, out) == out
    done = hooks.down("web0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert is_loose(lan.netns, "web0")
    done = hooks.down("web0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_debug_tells_commands_that_do_the_same(lan: Lan, hooks: Hooks) -> None:
    """What the hook says with PYQEMU_IFUP_DEBUG=1 does the same, typed into a shell."""
    write_policy(hooks, ", vlan: {native: 100, trunk: [20, 30-39]}, isolated: true")
    lan.netns.tap("web0")
    done = hooks.up("web0", PYQEMU_IFUP_DEBUG="1")
    assert done.returncode == 0, done.stderr
    attached = Snapshot.take(lan.netns)
    told = [line.removeprefix("pyqemu-ifup: web0: ") for line in done.stderr.splitlines()]
    unplug(lan.netns, "web0")
    loose = Snapshot.take(lan.netns)
    assert diff(attached, loose)
    lan.netns.run(["sh", "-ec", "\n".join(told)])
    assert diff(attached, Snapshot.take(lan.netns)) == []
    unplug(lan.netns, "web0")


def test_trunk_of_every_vlan_is_one_message(lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = Host.run

    async def run(self: Host, step: Op) -> None:
        if isinstance(step, SetVlans):
            route = self.kernel._route
            send = route.vlan_filter

            def vlan_filter(verb: str, *, index: int, vlan_info: dict[str, Any]) -> object:
                asked.append((verb, str(vlan_info["vid"])))
                return send(verb, index=index, vlan_info=vlan_info)

            monkeypatch.setattr(route, "vlan_filter", vlan_filter)
        await real(self, step)

    monkeypatch.setattr(Host, "run", run)
    web0 = lan.netns.tap("web0")
    start = time.monotonic()
    plug(lan.netns, port_of("web0", "br0", vlan=Vlan(None, tuple(EVERY)[1:])))
    print(f"up of a trunk of 4093 VLANs: {time.monotonic() - start:.2f} s")
    assert asked == [("del", "1"), ("add", "2-4094")]
    assert vids_of(lan.netns, "web0") == dict.fromkeys(range(2, 4095), "")
    out: dict[Tags, Tags | None] = {(2,): (2,), (4094,): (4094,), (1,): None, UNTAGGED: None}
    assert crossing(web0, lan.trunk, out) == out
    unplug(lan.netns, "web0")


def test_isolated_ports_do_not_meet(lan: Lan) -> None:
    taps = {name: lan.netns.tap(name) for name in ("web0", "web1", "web2")}
    for name in taps:
        plug(lan.netns, port_of(name, "br0", vlan=Vlan(100), isolated=name != "web2"))
    for name in taps:
        port = lan.netns.link(name)["linkinfo"]["info_slave_data"]
        assert port["isolated"] is (name != "web2")
    assert crossing(taps["web0"], taps["web1"], {UNTAGGED: None}) == {UNTAGGED: None}
    for pair in (("web0", "web2"), ("web2", "web1")):
        first, second = (taps[name] for name in pair)
        assert crossing(first, second, {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    # NOTE: persistent in spirit: attached again by another policy it is isolated no more.
    plug(lan.netns, port_of("web0", "br0", vlan=Vlan(100)))
    assert crossing(taps["web0"], taps["web1"], {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    for name in taps:
        unplug(lan.netns, name)


def test_mtu_mac_and_queue_length(lan: Lan) -> None:
    lan.set("mtu", "9000")
    web0 = lan.netns.tap("web0")
    before = lan.netns.link("web0")
    with lan.netns.enter():
        switch = Path("/proc/sys/net/ipv6/conf/web0/disable_ipv6")
        assert switch.read_text() == "0\n"
    plug(lan.netns, port_of("web0", "br0", vlan=Vlan(100), txqueuelen=77))
    link = lan.netns.link("web0")
    assert (link["mtu"], link["txqlen"]) == (9000, 77)
    assert link["address"] == "fe" + before["address"][2:]
    with lan.netns.enter():
        assert switch.read_text() == "1\n"
    assert lan.netns.link("br0")["address"] == BRIDGE_MAC
    lan.netns.ip("link", "set", "dev", "trunk", "mtu", "9000")
    web0.send(frame(mac(1), payload=b"j" * 8900))
    assert lan.trunk.recv(3, holds(b"j" * 8900)) is not None
    plug(lan.netns, port_of("web0", "br0", vlan=Vlan(100), mtu=1400))
    assert lan.netns.link("web0")["mtu"] == 1400
    assert lan.netns.link("br0")["mtu"] == 9000
    unplug(lan.netns, "web0")
    lan.netns.ip("link", "set", "dev", "trunk", "mtu", "1500")
    lan.set("mtu", "1500")


def test_mtu_that_lowers_the_bridge_is_refused(netns: Namespace) -> None:
    """A bridge whose MTU nobody set follows its ports: the uplink's 9000, then the tap's 1500."""
    netns.ip("link", "add", "uplink", "mtu", "9000", "up", "type", "dummy")
    netns.add_bridge("br0", mac=BRIDGE_MAC, vlan_filtering=True)
    netns.ip("link", "set", "dev", "uplink", "master", "br0")
    assert netns.link("br0")["mtu"] == 9000
    netns.tap("web0")
    assert refusal(netns, port_of("web0", "br0", vlan=Vlan(100), mtu=1500)) == (
        "the tap's MTU would lower that of br0 from 9000 to 1500: its other ports would lose "
        "longer frames; pin it: ip link set dev br0 mtu 8999 && ip link set dev br0 mtu 9000"
    )
    # The kernel takes no notice of the value that a link has already: hence the two commands.
    netns.run(["sh", "-ec", "ip link set dev br0 mtu 8999 && ip link set dev br0 mtu 9000"])
    plug(netns, port_of("web0", "br0", vlan=Vlan(100), mtu=1500))
    assert (netns.link("br0")["mtu"], netns.link("web0")["mtu"]) == (9000, 1500)
    unplug(netns, "web0")
    for name in ("br0", "uplink"):
        netns.ip("link", "del", name)


def test_vids_are_replaced_when_attached_again(lan: Lan) -> None:
    web0 = lan.netns.tap("web0")
    rows = (
        (Vlan(20), {20: ACCESS}, {UNTAGGED: (20,)}),
        (Vlan(10, (20, 30)), {10: ACCESS, 20: "", 30: ""}, {UNTAGGED: (10,), (20,): (20,)}),
        (Vlan(None, (10, 40)), {10: "", 40: ""}, {UNTAGGED: None, (10,): (10,), (20,): None}),
        (None, {1: ACCESS}, {UNTAGGED: (1,), (40,): None}),
    )
    for vlan, vids, out in rows:
        plug(lan.netns, port_of("web0", "br0", vlan=vlan))
        assert vids_of(lan.netns, "web0") == vids
        assert crossing(web0, lan.trunk, out) == out
    unplug(lan.netns, "web0")
    assert is_loose(lan.netns, "web0")


def test_vids_of_a_bridge_that_it_left_do_not_come_along(lan: Lan) -> None:
    lan.netns.add_bridge("br9", mac="02:00:00:00:00:09", vlan_filtering=True)
    lan.netns.tap("web0", master="br9")
    lan.vlan("add", "web0", 5, "pvid", "untagged")
    lan.vlan("add", "web0", 6)
    lan.netns.ip("link", "set", "dev", "web0", "nomaster")
    plug(lan.netns, port_of("web0", "br0", vlan=Vlan(100)))
    assert vids_of(lan.netns, "web0") == {100: ACCESS}
    unplug(lan.netns, "web0")
    lan.netns.ip("link", "del", "br9")


def test_vids_that_a_script_gave_it_go_when_it_is_taken_over(lan: Lan) -> None:
    """It was on the wanted bridge already, in the default VLAN and one more."""
    lan.netns.tap("web0", master="br0", up=True)
    lan.vlan("add", "web0", 6)
    plug(lan.netns, port_of("web0", "br0", vlan=Vlan(100)))
    assert vids_of(lan.netns, "web0") == {100: ACCESS}
    unplug(lan.netns, "web0")
    assert is_loose(lan.netns, "web0")


def test_bridge_that_does_not_filter_is_refused_with_the_command(lan: Lan, hooks: Hooks) -> None:
    lan.netns.add_bridge("br9", mac="02:00:00:00:00:09")
    lan.netns.tap("web0")
    write_policy(hooks, ", vlan: 100")
    hooks.write_policy(hooks.policy.read_text().replace("br0", "br9"))
    before = Snapshot.take(lan.netns)
    done = hooks.up("web0")
    assert (done.returncode, done.stdout) == (71, "")
    assert done.stderr == (
        "pyqemu-ifup: web0: br9 does not filter VLANs: vlan 100 is wanted; "
        "turn it on: ip link set dev br9 type bridge vlan_filtering 1\n"
    )
    assert diff(before, Snapshot.take(lan.netns)) == []
    for vlan in (Vlan(None, (20,)), Vlan(10, (20,))):
        assert "turn it on" in refusal(lan.netns, port_of("web0", "br9", vlan=vlan))
    # The command that it gave.
    lan.netns.run("ip link set dev br9 type bridge vlan_filtering 1".split())
    plug(lan.netns, port_of("web0", "br9", vlan=Vlan(100)))
    assert vids_of(lan.netns, "web0") == {100: ACCESS}
    unplug(lan.netns, "web0")
    lan.netns.ip("link", "del", "br9")


@pytest.mark.parametrize("kind", [SetVlans, SetUp])
def test_vid_that_somebody_adds_is_seen_and_undone(
    lan: Lan, monkeypatch: pytest.MonkeyPatch, kind: type[Op]
) -> None:
    """Before the link is up and after: the proof sees the VID that nobody asked for."""
    lan.netns.tap("web0")
    meddle(monkeypatch, kind, lambda: lan.vlan("add", "web0", 666), after=True)
    assert refusal(lan.netns, port_of("web0", "br0", vlan=Vlan(100))) == (
        "what was read back differs: vlan is native 100 trunk 666, wanted 100; "
        "see who else manages this bridge"
    )
    assert is_loose(lan.netns, "web0")


def test_filtering_turned_off_meanwhile_is_seen_and_undone(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    lan.netns.tap("web0")
    before = Snapshot.take(lan.netns)
    off = ("type", "bridge", "vlan_filtering", "0")
    meddle(monkeypatch, SetVlans, lambda: lan.set(*off), after=True)
    with pytest.raises(Failure) as caught:
        plug(lan.netns, port_of("web0", "br0", vlan=Vlan(100)))
    assert caught.value.status is Status.REFUSED
    assert "br0 does not filter VLANs" in str(caught.value)
    lan.set("type", "bridge", "vlan_filtering", "1")
    assert diff(before, Snapshot.take(lan.netns)) == []
    assert is_loose(lan.netns, "web0")


def test_undo_after_every_step_leaves_the_tap_as_it_was(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    lan.set("mtu", "9000")
    lan.netns.tap("web0")
    port = port_of("web0", "br0", vlan=Vlan(10, (20, 30)), isolated=True, txqueuelen=77)
    before = Snapshot.take(lan.netns)

    def check() -> None:
        assert diff(before, Snapshot.take(lan.netns)) == []

    steps = break_after_each(monkeypatch, lambda: plug(lan.netns, port), check)
    assert steps == [
        "SetAlias",
        "SetMac",
        "SetMtu",
        "SetTxQueueLen",
        "SetIpv6",
        "JoinBridge",
        "SetVlans",
        "SetIsolated",
        "SetUp",
    ]
    unplug(lan.netns, "web0")
    lan.set("mtu", "1500")


def test_no_frame_before_its_vlan(lan: Lan, hooks: Hooks) -> None:
    """Facts A.6: a guest that sends all the while, up before us, never reaches another VLAN."""
    home = lan.access("home", 100)
    web0 = lan.netns.tap("web0", up=True)
    write_policy(hooks, ", vlan: 100")
    with Blast(web0, lan.peer, home) as blast:
        done = hooks.up("web0")
        assert done.returncode == 0, done.stderr
        blast.wait_for(home, UNTAGGED)
        assert blast.seen(lan.peer) == set()
    unplug(lan.netns, "web0")
    lan.netns.ip("link", "set", "dev", "home", "nomaster")


@pytest.mark.parametrize("wrong", ["up before its VLANs", "not taken down"])
def test_wrong_order_leaks(lan: Lan, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """The control of the test above: with our own steps in a wrong order it would fail."""

    def reordered(*arguments: Any) -> Plan:
        plan = plan_up(*arguments)
        up = next(op for op in plan if isinstance(op, SetUp))
        rest: list[Op] = [op for op in plan if not isinstance(op, SetUp)]
        place = [type(op).__name__ for op in rest].index("JoinBridge") + 1
        if wrong == "not taken down":
            return tuple(op for op in rest if type(op).__name__ != "SetDown")
        return (*rest[:place], up, *rest[place:])

    monkeypatch.setattr(pyqemu_ifup.attach, "plan_up", reordered)
    # Nothing is proven before frames may pass.
    monkeypatch.setattr(SetUp, "opens", False)
    # NOTE: a machine that is quick would close the window before the guest is heard.
    meddle(monkeypatch, SetVlans, lambda: blast.wait_for(lan.peer, UNTAGGED))
    web0 = lan.netns.tap("web0", up=True)
    with Blast(web0, lan.peer) as blast:
        plug(lan.netns, port_of("web0", "br0", vlan=Vlan(100)))
        assert UNTAGGED in blast.seen(lan.peer)
    unplug(lan.netns, "web0")


def test_vlan_0_stacking_is_not_stopped(lan: Lan) -> None:
    """Facts A.7, a known limit: what a hostile guest on an access port gets through today.

    A tag of VID 0 is taken for no tag, so that the one behind it stays: out of the trunk goes a
    frame tagged twice. The port's own VID and stacks below it are taken too.
    """
    other = lan.access("other", 10)
    evil = lan.netns.tap("evil")
    plug(lan.netns, port_of("evil", "br0", vlan=Vlan(10)))
    out: dict[Tags, Tags | None] = {
        (0,): (10,),
        (0, 20): (10, 20),
        (10,): (10,),
        (10, 20): (10, 20),
        (20,): None,
        (20, 10): None,
    }
    assert crossing(evil, lan.trunk, out) == out
    seen = carries(evil, other, b"double", (0, 20))
    assert seen is not None and seen[12:16] == b"\x81\x00\x00\x14"
    unplug(lan.netns, "evil")
    lan.netns.ip("link", "set", "dev", "other", "nomaster")
