"""Attaching to Open vSwitch's kernel datapath, shown by frames and by what the database says.

NOTE: most tests call what the hooks call (lab.plug) in this process: an interpreter takes a
second to start in here. The programs themselves are run where their words or their timing count.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
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
from lab.ports import giving
from lab.qemu import Qemu
from lab.snapshot import Snapshot, diff
from lab.station import Station
from lab.taps import Tap, carries, frame, holds, mac
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.linux import LinuxPlace
from pyqemu_ifconf.policy import Port, Vlan
from pyqemu_ifup.kinds.openvswitch import AddPort
from pyqemu_ifup.ops import SetUp

HWADDR = "02:00:00:00:00:0a"
BRIDGE_MAC = "02:00:00:00:00:0b"


@dataclass
class Fabric:
    """The bridge `br-int` with a guest on `trunk`, which has each VLAN tagged, and no VLAN too."""

    netns: Namespace
    ovs: OpenVSwitch
    trunk: Tap

    def port(self, tap: str, vlan: Vlan | None = None, *, bridge: str = "br-int") -> Port:
        """Return the wanted state of a tap in a VLAN of this Open vSwitch."""
        return port_of(tap, bridge, vlan=vlan, ovsdb=self.ovs.db)

    def access(self, name: str, vid: int) -> Tap:
        """Add a guest with an access port in one VLAN."""
        tap = self.netns.tap(name, up=True)
        self.ovs.add_port("br-int", name, f"tag={vid}", "vlan_mode=access")
        self.ovs.wait_up(name)
        return tap

    def plug(self, port: Port) -> None:
        """Attach the tap in this process."""
        plug(self.netns, port, ovsdbs=[self.ovs.db])

    def unplug(self, tap: str) -> None:
        """Detach the tap in this process."""
        unplug(self.netns, tap)

    def snapshot(self) -> Snapshot:
        """Look at everything."""
        return Snapshot.take(self.netns, self.ovs)

    def refusal(self, port: Port, status: Status = Status.REFUSED) -> str:
        """Attach in vain; check the status and that nothing has changed, return the words."""
        before = self.snapshot()
        with pytest.raises(Failure) as caught:
            self.plug(port)
        assert caught.value.status is status, caught.value
        assert diff(before, self.snapshot()) == []
        return str(caught.value)

    def is_loose(self, tap: str) -> bool:
        """Tell whether the tap is down, without a master, a row and our mark."""
        link = self.netns.link(tap)
        attached = "UP" in link["flags"] or "master" in link or link.get("ifalias")
        return not attached and self.ovs.find("Port", tap) is None


@pytest.fixture
def fabric(netns: Namespace, ovs_system: OpenVSwitch) -> Fabric:
    ovs_system.add_bridge("br-int", hwaddr=HWADDR, mtu=1500)
    trunk = netns.tap("trunk", up=True)
    ovs_system.add_port("br-int", "trunk", "vlan_mode=trunk")
    ovs_system.wait_up("trunk")
    return Fabric(netns, ovs_system, trunk)


@pytest.fixture
def hooks(tmp_path: Path, netns: Namespace, served: Callable[..., Hooks]) -> Hooks:
    return served(Hooks(tmp_path / "hooks", netns=netns.name))


def write_policy(hooks: Hooks, ovs: OpenVSwitch, settings: str, bridge: str = "br-int") -> None:
    """Put each tap into the bridge with these settings."""
    hooks.write_policy(
        "version: 1\n"
        "timeout: 60\n"
        "networks:\n"
        f'  lan: {{bridge: {bridge}, ovsdb: "{ovs.db}"{settings}}}\n'
        f'  other: {{bridge: br-int, ovsdb: "{ovs.db}"}}\n'
        'rules:\n  - {tap: "*", network: lan}\n'
    )


def columns(ovs: OpenVSwitch, tap: str) -> tuple[Any, Any, Any]:
    """Return vlan_mode, tag and trunks of the tap's row."""
    row = ovs.row("Port", tap)
    return row["vlan_mode"], row["tag"], row["trunks"]


@dataclass(frozen=True)
class Row:
    """One setting: `vlan`; the columns, and frames from and to it."""

    vlan: Vlan | None
    columns: tuple[str, Any, list[int]]
    out: dict[Tags, Tags | None]
    back: dict[Tags, Tags | None]


NO_TAG: list[int] = []
TABLE = {
    "no vlan": Row(
        None,
        ("access", NO_TAG, []),
        {UNTAGGED: UNTAGGED, (10,): None, (20,): None},
        {UNTAGGED: UNTAGGED, (10,): None, (20,): None},
    ),
    "vlan 100": Row(
        Vlan(100),
        ("access", 100, []),
        {UNTAGGED: (100,), (20,): None, (100,): None},
        {(100,): UNTAGGED, UNTAGGED: None, (20,): None},
    ),
    "trunk": Row(
        Vlan(None, (20, *range(30, 40))),
        ("trunk", NO_TAG, [20, *range(30, 40)]),
        {UNTAGGED: None, (20,): (20,), (30,): (30,), (39,): (39,), (40,): None},
        {UNTAGGED: None, (20,): (20,), (35,): (35,), (40,): None},
    ),
    "native and trunk": Row(
        Vlan(10, (20, *range(30, 40))),
        ("native-untagged", 10, [20, *range(30, 40)]),
        {UNTAGGED: (10,), (20,): (20,), (39,): (39,), (40,): None},
        {(10,): UNTAGGED, UNTAGGED: None, (20,): (20,), (40,): None},
    ),
    "native in trunk too": Row(
        Vlan(10, (10, 20)),
        ("native-untagged", 10, [10, 20]),
        {UNTAGGED: (10,), (20,): (20,), (30,): None},
        {(10,): UNTAGGED, (20,): (20,), (30,): None},
    ),
}


def test_what_vlan_means(fabric: Fabric) -> None:
    """The rows are one after the other, so that the columns of the one before must go too."""
    web0 = fabric.netns.tap("web0")
    for name, row in [*TABLE.items(), ("no vlan again", TABLE["no vlan"])]:
        fabric.plug(fabric.port("web0", row.vlan))
        assert columns(fabric.ovs, "web0") == row.columns, name
        assert crossing(web0, fabric.trunk, row.out) == row.out, name
        assert crossing(fabric.trunk, web0, row.back) == row.back, name
    fabric.unplug("web0")
    assert fabric.is_loose("web0")


def test_trunk_of_every_vlan(fabric: Fabric) -> None:
    web0 = fabric.netns.tap("web0")
    fabric.plug(fabric.port("web0", Vlan(None, tuple(range(1, 4095)))))
    assert columns(fabric.ovs, "web0") == ("trunk", NO_TAG, list(range(1, 4095)))
    out: dict[Tags, Tags | None] = {(1,): (1,), (4094,): (4094,), UNTAGGED: None}
    assert crossing(web0, fabric.trunk, out) == out
    fabric.unplug("web0")


def test_port_settings(fabric: Fabric) -> None:
    """MTU, MAC, queue length, IPv6, external_ids; and the order of MTU and joining."""
    web0 = fabric.netns.tap("web0")
    before = fabric.netns.link("web0")
    port = giving(
        fabric.port("web0", Vlan(100)),
        mtu=1300,
        txqueuelen=77,
        external_ids=(("iface-id", "8a1d"), ("note", 'a "b" \\ c')),
    )
    fabric.plug(port)
    link = fabric.netns.link("web0")
    assert (link["mtu"], link["txqlen"], link["master"]) == (1300, 77, "ovs-system")
    assert link["address"] == "fe" + before["address"][2:]
    with fabric.netns.enter():
        assert Path("/proc/sys/net/ipv6/conf/web0/disable_ipv6").read_text() == "1\n"
    row, interface = (fabric.ovs.row(table, "web0") for table in ("Port", "Interface"))
    assert row["other_config"] == {"transient": "true"} and row["protected"] is False
    ids = interface["external_ids"]
    assert (ids["iface-id"], ids["note"]) == ("8a1d", 'a "b" \\ c')
    assert (ids["pyqemu-ifindex"], ids["vm-name"]) == (str(link["ifindex"]), "web")
    assert (interface["ifindex"], interface["error"]) == (link["ifindex"], [])
    assert interface["ofport"] > 0
    web0.send(frame(mac(1), payload=b"m" * 1280))
    assert fabric.trunk.recv(5, holds(b"m" * 1280)) is not None
    fabric.plug(fabric.port("web0", Vlan(100)))
    assert fabric.netns.link("web0")["mtu"] == 1500
    ids = fabric.ovs.row("Interface", "web0")["external_ids"]
    assert "iface-id" not in ids and "note" not in ids
    fabric.unplug("web0")


def test_isolated_ports_do_not_meet(fabric: Fabric) -> None:
    taps = {name: fabric.netns.tap(name) for name in ("web0", "web1", "web2")}
    for name in taps:
        fabric.plug(giving(fabric.port(name, Vlan(100)), isolated=name != "web2"))
        assert fabric.ovs.row("Port", name)["protected"] is (name != "web2")
    for pair in (("web0", "web2"), ("web2", "web1")):
        first, second = (taps[name] for name in pair)
        assert crossing(first, second, {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    assert crossing(taps["web0"], taps["web1"], {UNTAGGED: None}) == {UNTAGGED: None}
    for name in taps:
        fabric.unplug(name)


def test_hooks_attach_and_detach(fabric: Fabric, hooks: Hooks) -> None:
    write_policy(hooks, fabric.ovs, ", vlan: {native: 100, trunk: [20, 30-39]}")
    web0 = fabric.netns.tap("web0")
    done = hooks.up("web0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert columns(fabric.ovs, "web0") == ("native-untagged", 100, [20, *range(30, 40)])
    out: dict[Tags, Tags | None] = {UNTAGGED: (100,), (30,): (30,), (40,): None}
    assert crossing(web0, fabric.trunk, out) == out
    for _ in range(2):
        done = hooks.down("web0")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert fabric.is_loose("web0")


def test_mtu_that_lowers_the_bridge_is_refused(fabric: Fabric) -> None:
    fabric.ovs.vsctl("remove", "Interface", "br-int", "mtu_request", "1500")
    assert fabric.netns.link("br-int")["mtu"] == 1500
    fabric.netns.tap("web0")
    port = giving(fabric.port("web0", Vlan(100)), mtu=1400)
    assert fabric.refusal(port) == (
        "the tap's MTU would lower that of br-int from 1500 to 1400: its other ports would lose "
        f"longer frames; pin it: ovs-vsctl --db={fabric.ovs.db} set interface br-int "
        "mtu_request=1500"
    )
    fabric.ovs.vsctl("set", "interface", "br-int", "mtu_request=1500")
    fabric.plug(port)
    assert fabric.netns.link("br-int")["mtu"] == 1500
    fabric.unplug("web0")


def test_tap_that_dies_before_it_is_added_is_refused(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts A.1: the commit of a port without a netdev succeeds, and says nothing."""
    tap = fabric.netns.tap("web0")
    meddle(monkeypatch, AddPort, tap.close)
    with pytest.raises(Failure) as caught:
        fabric.plug(fabric.port("web0", Vlan(100)))
    assert caught.value.status is Status.REFUSED
    assert str(caught.value) == (
        "br-int cannot use the tap: could not open network device web0 (No such device); "
        "see the log of ovs-vswitchd"
    )
    assert fabric.ovs.find("Port", "web0") is None


def test_tap_that_is_taken_meanwhile_is_refused(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts A.1 again: another bridge is faster, so vswitchd gets EBUSY, and ofport -1."""
    netns = fabric.netns
    netns.add_bridge("br9", mac=BRIDGE_MAC)
    netns.tap("web0")

    def take() -> None:
        netns.ip("link", "set", "dev", "web0", "master", "br9")

    meddle(monkeypatch, AddPort, take)
    with pytest.raises(Failure) as caught:
        fabric.plug(fabric.port("web0", Vlan(100)))
    assert caught.value.status is Status.REFUSED
    assert "br-int cannot use the tap" in str(caught.value)
    assert fabric.ovs.find("Port", "web0") is None
    netns.ip("link", "del", "br9")


def test_row_that_somebody_changes_is_seen_and_undone(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabric.netns.tap("web0")
    meddle(monkeypatch, SetUp, lambda: fabric.ovs.vsctl("set", "Port", "web0", "trunks=20"))
    assert fabric.refusal(fabric.port("web0", Vlan(100))) == (
        "what was read back differs: vlan is 100 (vlan_mode access, trunks 20), wanted 100; "
        "see who else manages this bridge"
    )
    assert fabric.is_loose("web0")


def test_commit_that_times_out_is_taken_back(fabric: Fabric) -> None:
    """Facts A.2: vswitchd is mute, so the row would go live when it comes back."""
    fabric.netns.tap("web0")
    look = Snapshot.take(fabric.netns)
    fabric.ovs.vswitchd.stop()
    with pytest.raises(Failure) as caught:
        plug(fabric.netns, fabric.port("web0", Vlan(100)), seconds=2)
    assert caught.value.status is Status.TRY_AGAIN
    assert fabric.ovs.find("Port", "web0") is None
    fabric.ovs.vswitchd.cont()
    fabric.ovs.vsctl("set", "Open_vSwitch", ".", "external_ids:again=1")
    fabric.ovs.vsctl("remove", "Open_vSwitch", ".", "external_ids", "again")
    assert diff(look, Snapshot.take(fabric.netns)) == []
    assert fabric.is_loose("web0")


@pytest.mark.parametrize("mute", [True, False])
def test_tap_is_down_whose_database_fails_before_it_is_attached_again(
    fabric: Fabric, mute: bool
) -> None:
    """Only its mark tells then that it is ours: its master is the whole datapath."""
    netns, server = fabric.netns, fabric.ovs.server
    netns.tap("web0", persist=True)
    port = fabric.port("web0", Vlan(10))
    fabric.plug(port)
    link = netns.link("web0")
    assert link["master"] == "ovs-system" and "UP" in link["flags"]
    if mute:
        server.stop()
    else:
        server.kill()
    with pytest.raises(Failure, match="does not answer" if mute else "nothing answers"):
        plug(netns, port, seconds=2)
    link = netns.link("web0")
    assert "UP" not in link["flags"] and not link.get("ifalias")
    if mute:
        server.cont()
    else:
        fabric.ovs.start_server()
    fabric.plug(port)
    fabric.unplug("web0")
    assert fabric.is_loose("web0")
    netns.close_kept()
    netns.ip("link", "del", "web0")


def test_undo_after_every_step_leaves_the_tap_as_it_was(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabric.netns.tap("web0")
    port = giving(fabric.port("web0", Vlan(10, (20,))), mtu=1300, txqueuelen=77, isolated=True)
    look = fabric.snapshot()

    def check() -> None:
        assert diff(look, fabric.snapshot()) == []

    steps = break_after_each(monkeypatch, lambda: fabric.plug(port), check)
    assert steps == ["SetAlias", "SetMac", "SetMtu", "SetTxQueueLen", "SetIpv6", "AddPort", "SetUp"]
    fabric.unplug("web0")


def test_tap_that_is_attached_again_changes_its_vlan(fabric: Fabric) -> None:
    """Facts A.3: the port that is there already is not left in its old VLAN."""
    web0 = fabric.netns.tap("web0")
    fabric.plug(fabric.port("web0", Vlan(10)))
    fabric.plug(fabric.port("web0", Vlan(20)))
    assert columns(fabric.ovs, "web0") == ("access", 20, [])
    assert crossing(web0, fabric.trunk, {UNTAGGED: (20,)}) == {UNTAGGED: (20,)}
    fabric.unplug("web0")


def test_stale_row_is_replaced_before_a_frame_passes(fabric: Fabric, hooks: Hooks) -> None:
    """Facts A.4: vswitchd itself takes a new tap of that name into the old VLAN."""
    netns, ovs = fabric.netns, fabric.ovs
    in_10, in_20 = fabric.access("in10", 10), fabric.access("in20", 20)
    old = netns.tap("web0")
    fabric.plug(fabric.port("web0", Vlan(10)))
    assert crossing(old, in_10, {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    old.close()
    ovs.wait_until("Interface", "web0", "ofport=-1")
    new = netns.tap("web0")
    # What it would be without us: no hook has run, and the tap is in the old VLAN.
    ovs.wait_until("Interface", "web0", "ofport>0")
    assert columns(ovs, "web0") == ("access", 10, [])
    write_policy(hooks, ovs, ", vlan: 20")
    with Blast(new, in_10, in_20) as blast:
        done = hooks.up("web0")
        assert done.returncode == 0, done.stderr
        blast.wait_for(in_20, UNTAGGED)
        assert blast.seen(in_10) == set()
    assert columns(ovs, "web0") == ("access", 20, [])
    fabric.unplug("web0")
    for name in ("in10", "in20"):
        ovs.del_port(name)


def test_no_frame_before_its_vlan(fabric: Fabric, hooks: Hooks) -> None:
    """Facts A.6: a guest that sends all the while, up before us, reaches no other VLAN.

    Last, two transactions as others make them, by which it does: so the test can fail.
    """
    netns, ovs = fabric.netns, fabric.ovs
    home, in_20 = fabric.access("home", 100), fabric.access("in20", 20)
    write_policy(hooks, ovs, ", vlan: 100")
    web0 = netns.tap("web0", up=True)
    with Blast(web0, home, in_20) as blast:
        done = hooks.up("web0")
        assert done.returncode == 0, done.stderr
        blast.wait_for(home, UNTAGGED)
        assert blast.seen(in_20) == set()
    fabric.unplug("web0")
    netns.ip("link", "set", "dev", "web0", "up")
    with Blast(web0, home, in_20) as blast:
        ovs.vsctl("add-port", "br-int", "web0")
        blast.wait_for(in_20, UNTAGGED)
        ovs.vsctl("set", "Port", "web0", "tag=100")
    for name in ("web0", "home", "in20"):
        ovs.del_port(name)


def test_moved_to_a_linux_bridge_and_back(fabric: Fabric) -> None:
    """A tap of ours goes where the policy says now, and leaves nothing where it was."""
    netns = fabric.netns
    netns.add_bridge("br0", mac=BRIDGE_MAC, vlan_filtering=True)
    watcher = netns.tap("watcher", up=True, master="br0")
    netns.run(["bridge", "vlan", "add", "dev", "watcher", "vid", "2-4094"])
    web0 = netns.tap("web0")
    for _ in range(2):
        fabric.plug(fabric.port("web0", Vlan(10)))
        assert netns.link("web0")["master"] == "ovs-system"
        assert crossing(web0, fabric.trunk, {UNTAGGED: (10,)}) == {UNTAGGED: (10,)}
        assert watcher.recv(0.2, holds(b"crossing")) is None
        fabric.plug(port_of("web0", "br0", vlan=Vlan(30)))
        assert netns.link("web0")["master"] == "br0"
        assert vids_of(netns, "web0") == {30: "pvid untagged"}
        assert fabric.ovs.find("Port", "web0") is None
        assert fabric.ovs.find("Interface", "web0") is None
        assert crossing(web0, watcher, {UNTAGGED: (30,)}) == {UNTAGGED: (30,)}
        assert fabric.trunk.recv(0.2, holds(b"crossing")) is None
    fabric.unplug("web0")
    assert fabric.is_loose("web0")
    netns.ip("link", "del", "br0")


def test_ports_of_others_are_refused(fabric: Fabric, hooks: Hooks) -> None:
    """Facts A.10: what another bridge holds is neither taken nor let go, its owner is named."""
    netns, ovs = fabric.netns, fabric.ovs
    netns.add_bridge("br9", mac=BRIDGE_MAC)
    netns.tap("web0")
    ovs.vsctl(
        "add-port", "br-int", "web0", "--", "set", "Interface", "web0", "external_ids:vm-name=db7"
    )
    words = (
        f"somebody else's tap: bridge br-int of {ovs.db}, vm db7 holds it; "
        f"if it shall go, take it out: ovs-vsctl --db={ovs.db} del-port web0"
    )
    for bridge in ("br-int", "br9"):
        assert fabric.refusal(fabric.port("web0", bridge=bridge), Status.DENIED) == words
    # Of a database that no policy names, the kernel tells the datapath at least.
    with pytest.raises(Failure) as caught:
        plug(netns, port_of("web0", "br9"))
    assert "ovs-system holds it" in str(caught.value)
    # A port of Open vSwitch cannot be taken out with ip.
    done = netns.run(["ip", "link", "set", "dev", "web0", "nomaster"], check=False)
    assert done.returncode != 0 and "not supported" in done.stderr
    ovs.del_port("web0")

    netns.ip("link", "set", "dev", "web0", "master", "br9")
    assert fabric.refusal(fabric.port("web0"), Status.DENIED) == (
        "somebody else's tap: br9 holds it; "
        "if it shall go, take it out: ip link set dev web0 nomaster"
    )
    # The kernel itself would have given it away.
    netns.add_bridge("br8", mac="02:00:00:00:00:08")
    netns.ip("link", "set", "dev", "web0", "master", "br8")
    assert netns.link("web0")["master"] == "br8"
    for name in ("br8", "br9"):
        netns.ip("link", "del", name)


def test_name_of_two_bridges_wants_a_kind(fabric: Fabric) -> None:
    """The local port of a kernel datapath takes the name: only a mute vswitchd lets it be two."""
    netns, ovs = fabric.netns, fabric.ovs
    netns.tap("web0")
    ovs.vswitchd.stop()
    ovs.vsctl("--no-wait", "add-br", "br9")
    netns.add_bridge("br9", mac=BRIDGE_MAC)
    assert fabric.refusal(fabric.port("web0", bridge="br9")) == (
        "br9 is both a Linux bridge and an Open vSwitch bridge; "
        "say kind: linux or kind: openvswitch for network lan"
    )
    fabric.plug(replace(fabric.port("web0"), place=LinuxPlace("br9")))
    assert netns.link("web0")["master"] == "br9"
    unplug(netns, "web0")
    netns.ip("link", "del", "br9")
    ovs.vsctl("--no-wait", "del-br", "br9")
    ovs.vswitchd.cont()


@pytest.mark.alone("the agent collects at once what this waits to see")
def test_killed_qemu_comes_back_in_its_new_place(fabric: Fabric, hooks: Hooks) -> None:
    """SIGKILL, then the same tap under another policy: a VLAN, then a Linux bridge."""
    netns, ovs = fabric.netns, fabric.ovs
    netns.add_bridge("br0", mac=BRIDGE_MAC, vlan_filtering=True)
    in_30 = netns.tap("in30", up=True, master="br0")
    netns.run(["bridge", "vlan", "add", "dev", "in30", "vid", "30", "pvid", "untagged"])
    netns.run(["bridge", "vlan", "del", "dev", "in30", "vid", "1"])
    in_10, in_20 = fabric.access("in10", 10), fabric.access("in20", 20)
    scripts = f"script={hooks.ifup},downscript={hooks.ifdown}"
    guests = {"vlan: 10": in_10, "vlan: 20": in_20, "vlan: 30": in_30}
    for setting, home in guests.items():
        write_policy(hooks, ovs, f", {setting}", "br0" if home is in_30 else "br-int")
        with (
            Station(netns) as station,
            Qemu(
                *("-netdev", f"tap,id=n0,ifname=web0,{scripts}"),
                *station.arguments("n0"),
                netns=netns.name,
                env=hooks.environ(),
            ) as qemu,
        ):
            with Blast(station, *guests.values()) as blast:
                assert qemu.greeting, qemu.stderr
                blast.wait_for(home, UNTAGGED)
                for other in guests.values():
                    assert other is home or blast.seen(other) == set()
            if home is in_30:
                assert qemu.quit() == 0, qemu.stderr
            else:
                qemu.signal(signal.SIGKILL)
                ovs.wait_until("Interface", "web0", "ofport=-1")
    assert ovs.find("Port", "web0") is None
    for name in ("in10", "in20"):
        ovs.del_port(name)
    netns.ip("link", "del", "br0")


@pytest.mark.alone("the agent collects at once what this waits to see")
def test_ifctl_shows_explains_and_cleans_up(fabric: Fabric, hooks: Hooks) -> None:
    """On both switches: status, explain, and gc of what a crash left, that and nothing else."""
    netns, ovs = fabric.netns, fabric.ovs
    netns.add_bridge("br0", mac=BRIDGE_MAC, vlan_filtering=True)
    trunk = {"native": 10, "trunk": [20, "30-39"]}

    def write(vid: int) -> None:
        hooks.write_policy(
            "version: 1\n"
            "networks:\n"
            f'  lan: {{bridge: br-int, ovsdb: "{ovs.db}", '
            "vlan: {native: 10, trunk: [20, 30-39]}}\n"
            f"  flat: {{bridge: br0, vlan: {vid}, isolated: true}}\n"
            "rules:\n  - {tap: web*, network: lan}\n  - {tap: db*, network: flat}\n"
        )

    def status() -> dict[str, dict[str, Any]]:
        return {tap["tap"]: tap for tap in hooks.ctl_json("status")["taps"]}

    write(40)
    web0 = netns.tap("web0")
    netns.tap("db0")
    told = {}
    for name, told_kind in (("web0", "openvswitch"), ("db0", "linux")):
        told[name] = hooks.ctl_json("explain", name)
        assert told[name]["decision"] == "attach"
        assert told[name]["port"]["kind"] == told_kind
    fabric.plug(fabric.port("web0", Vlan(10, (20, *range(30, 40)))))
    fabric.plug(replace(port_of("db0", "br0", vlan=Vlan(40), isolated=True), network="flat"))
    assert any("native-untagged" in command for command in told["web0"]["commands"])
    assert "bridge vlan add dev db0 vid 40 pvid untagged" in told["db0"]["commands"]
    shown = status()
    for name, wanted in (
        ("web0", {"kind": "openvswitch", "bridge": "br-int", "vlan": trunk, "isolated": False}),
        ("db0", {"kind": "linux", "bridge": "br0", "vlan": 40, "isolated": True}),
    ):
        assert {key: shown[name][key] for key in wanted} == wanted
        assert (shown[name]["state"], shown[name]["differences"]) == ("ok", [])
    assert shown["trunk"]["state"] == "foreign"
    write(50)
    web0.close()
    ovs.wait_until("Interface", "web0", "ofport=-1")
    shown = status()
    assert (shown["web0"]["state"], shown["db0"]["state"]) == ("stale", "differs")
    assert shown["db0"]["differences"] == [
        {"setting": "vlan", "wanted": "50", "is": "40", "because": None}
    ]
    gone = hooks.ctl_json("gc")
    assert [entry["tap"] for entry in gone["removed"]] == ["web0"]
    assert ovs.find("Port", "web0") is None and ovs.find("Interface", "web0") is None
    assert netns.link("db0")["master"] == "br0" and ovs.find("Port", "trunk") is not None
    fabric.unplug("db0")
    netns.ip("link", "del", "br0")


def test_vlan_0_stacking_is_not_stopped(fabric: Fabric) -> None:
    """Facts A.7, a known limit: what a hostile guest on an access port gets through today.

    A tag of VID 0 is taken for no tag, so that the one behind it stays: out of the trunk goes a
    frame tagged twice.
    """
    other = fabric.access("other", 10)
    evil = fabric.netns.tap("evil")
    fabric.plug(fabric.port("evil", Vlan(10)))
    out: dict[Tags, Tags | None] = {
        (0,): (10,),
        (0, 20): (10, 20),
        (10,): None,
        (10, 20): None,
        (20,): None,
        (20, 10): None,
    }
    assert crossing(evil, fabric.trunk, out) == out
    seen = carries(evil, other, b"double", (0, 20))
    assert seen is not None and seen[12:16] == b"\x81\x00\x00\x14"
    fabric.plug(fabric.port("evil"))
    fabric.ovs.settle()
    assert crossing(evil, fabric.trunk, {(0, 20): (20,)}) == {(0, 20): (20,)}
    fabric.unplug("evil")
    fabric.ovs.del_port("other")
