"""The hooks on a real Open vSwitch: what each setting means, in its database and in frames."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pyqemu_ifdown.gc
import pyqemu_ifup.drivers.ovsdb
import pyqemu_ifup.drivers.ovsdb_connection
from lab.calls import Call, Calls, Ended
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.ovsdb_proxy import Proxy
from lab.plug import meddle, plug, port_of, unplug
from lab.snapshot import Snapshot, diff, leftovers
from lab.taps import Tap, frame, holds, mac, tags
from pyqemu_ifconf.policy import Vlan
from pyqemu_ifdown.gc import collect
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.ovsdb import REVALIDATION
from pyqemu_ifup.drivers.ovsdb_connection import SCHEMA
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.base import Leftover
from pyqemu_ifup.kinds.openvswitch import AddPort, DelPort, del_port
from pyqemu_ifup.ops import SetUp
from pyqemu_ifup.system.lock import Lock, lock_by_name
from pyqemu_ifup.task import Task

HWADDR = "52:54:00:ff:00:01"
ARRIVAL = 5.0
"""Seconds in which a frame must come through, sent again and again."""
LINGER = 0.15
"""Seconds in which a frame must not come through."""
_payloads = itertools.count()


@dataclass
class Site:
    """The bridge br-int of a private Open vSwitch, and hooks that are called as QEMU does."""

    netns: Namespace
    ovs: OpenVSwitch
    calls: Calls

    def policy(self, *rules: str, ovsdb: str = "", more: str = "", timeout: int = 10) -> None:
        """Put a policy in force: the network lan is br-int, `more` are other networks."""
        given = "".join(f"- {{{rule}}}\n" for rule in rules or ('tap: "*", network: lan',))
        self.calls.hooks.write_policy(
            f"version: 1\ntimeout: {timeout}\n"
            f'networks:\n  lan: {{bridge: br-int, ovsdb: "{ovsdb or self.ovs.db}"}}\n'
            f"{more}rules:\n{given}"
        )

    def vlan(self, settings: str, **more: Any) -> None:
        """Put a policy in force that plugs each tap into lan with these settings."""
        self.policy(", ".join(filter(None, ['tap: "*", network: lan', settings])), **more)

    def up(self, tap: str, status: int = 0) -> Ended:
        """Attach `tap`; the hook must end with `status`."""
        return _ended(self.calls.up(tap, close_descriptors), status)

    def down(self, tap: str, status: int = 0) -> Ended:
        """Detach `tap`; the hook must end with `status`."""
        return _ended(self.calls.down(tap, close_descriptors), status)

    def gc(self, tap: str | None = None, *, dry_run: bool = False) -> tuple[Leftover, ...]:
        """Collect what is left in the database."""
        with Host(tap, Deadline(10), lambda command: None) as host:
            host.finish(host.open_databases([self.ovs.db]))
            found = list(collect(host, tap=tap, dry_run=dry_run))
        assert all(let_go for _leftover, let_go in found)
        return tuple(leftover for leftover, _let_go in found)

    def peer(self, name: str, *settings: str) -> Tap:
        """Return a tap whose port somebody else has added; without settings a trunk of all."""
        tap = self.netns.tap(name, up=True)
        self.ovs.add_port("br-int", name, *settings)
        return tap

    def ids(self, tap: str) -> dict[str, str]:
        """Return the external_ids of the tap's Interface row."""
        ids: dict[str, str] = self.ovs.row("Interface", tap)["external_ids"]
        return ids


def close_descriptors() -> None:
    """Close what a hook inherits: the test holds the taps of several guests."""
    os.closerange(3, 4096)


def _ended(ended: Ended, status: int) -> Ended:
    assert ended.status == status, ended
    assert ended.stdout == b""
    assert ended.stderr.count("\n") == (status != 0), ended.stderr
    return ended


@pytest.fixture
def site(
    inside: Namespace, ovs_netdev: OpenVSwitch, tmp_path: Path, served: Callable[..., Hooks]
) -> Iterator[Site]:
    ovs_netdev.add_bridge("br-int", hwaddr=HWADDR, mtu=1500)
    calls = Calls(Hooks(tmp_path))
    served(calls.hooks, calls.syslog.path)
    made = Site(inside, ovs_netdev, calls)
    made.policy()
    yield made
    calls.close()


def rows_changed(before: Snapshot, site: Site) -> list[str]:
    """Return what has changed in the database alone."""
    lines = diff(before, Snapshot.take(site.netns, site.ovs))
    return [line for line in lines if line.startswith("row")]


def passes(src: Tap, dst: Tap, vids: tuple[int, ...], seconds: float) -> tuple[int, ...] | None:
    """Return the tags that a frame from one guest has at the other, None where none comes."""
    payload = f"frame {next(_payloads)}.".encode()
    end = time.monotonic() + seconds
    while True:
        src.send(frame(mac(1), payload=payload, vids=vids))
        got = dst.recv(LINGER, holds(payload))
        if got is not None or time.monotonic() > end:
            return None if got is None else tags(got)


def arrives(src: Tap, dst: Tap, vids: tuple[int, ...] = ()) -> tuple[int, ...] | None:
    return passes(src, dst, vids, ARRIVAL)


def is_dropped(src: Tap, dst: Tap, vids: tuple[int, ...] = ()) -> bool:
    return passes(src, dst, vids, 0) is None


# What a setting means


COLUMNS: Mapping[str, Any] = {
    "vlan_mode": "access",
    "tag": [],
    "trunks": [],
    "protected": False,
    "other_config": {"transient": "true"},
}


@pytest.mark.each_python
@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ("", {}),
        ("vlan: 100", {"tag": 100}),
        ("vlan: {trunk: [20, 30-32]}", {"vlan_mode": "trunk", "trunks": [20, 30, 31, 32]}),
        (
            "vlan: {native: 10, trunk: [20, 30]}",
            {"vlan_mode": "native-untagged", "tag": 10, "trunks": [20, 30]},
        ),
        (
            "vlan: {native: 10, trunk: [10, 20]}",
            {"vlan_mode": "native-untagged", "tag": 10, "trunks": [10, 20]},
        ),
        ("vlan: 4094, isolated: true", {"tag": 4094, "protected": True}),
    ],
)
def test_setting_sets_every_column_that_we_own(
    site: Site, settings: str, columns: dict[str, Any]
) -> None:
    site.vlan(settings)
    site.netns.tap("web0")
    site.up("web0")
    row = site.ovs.row("Port", "web0")
    read = {name: row[name] for name in COLUMNS}
    if read["trunks"] != []:
        read["trunks"] = sorted(read["trunks"]) if isinstance(read["trunks"], list) else []
    assert read == {**COLUMNS, **columns}
    site.down("web0")


def test_mark_stands_beside_the_policy_s_external_ids(site: Site) -> None:
    site.vlan('external_ids: {iface-id: "a b\\"c", team: net}')
    site.netns.tap("web0")
    site.up("web0")
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/thread-self/ns/net")
    assert site.ids("web0") == {
        "iface-id": 'a b"c',
        "team": "net",
        "pyqemu-ifup": "1",
        "pyqemu-network": "lan",
        "pyqemu-ifindex": str(site.netns.link("web0")["ifindex"]),
        "pyqemu-boot-id": boot_id,
        "pyqemu-netns": f"{namespace.st_dev}:{namespace.st_ino}",
        "vm-pid": str(os.getpid()),
    }
    alias = site.netns.link("web0")["ifalias"]
    assert alias.startswith("pyqemu-ifup/1 network=lan kind=openvswitch bridge=br-int ")
    assert alias.endswith(f" ovsdb={site.ovs.db}")
    site.down("web0")
    assert "ifalias" not in site.netns.link("web0")


FRAMES: dict[str, tuple[str, dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]] = {
    # settings, what comes of the guest's frames, what comes of frames to it
    "none": ("", {(): (), (10,): None, (20,): None}, {(): (), (10,): None}),
    "access": (
        "vlan: 10",
        {(): (10,), (10,): None, (20,): None},
        {(10,): (), (): None, (20,): None},
    ),
    "trunk": (
        "vlan: {trunk: [10, 20-21]}",
        {(10,): (10,), (21,): (21,), (): None, (30,): None},
        {(10,): (10,), (20,): (20,), (): None, (30,): None},
    ),
    "native": (
        "vlan: {native: 10, trunk: [20]}",
        {(): (10,), (20,): (20,), (30,): None},
        {(10,): (), (20,): (20,), (): None, (30,): None},
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_go_where_the_vlan_says(site: Site, name: str) -> None:
    settings, out, into = FRAMES[name]
    wire = site.peer("wire")
    site.vlan(settings)
    guest = site.netns.tap("web0", vnet_hdr=True)
    site.up("web0")
    for vids, wanted in out.items():
        if wanted is None:
            assert is_dropped(guest, wire, vids), vids
        else:
            assert arrives(guest, wire, vids) == wanted
    for vids, wanted in into.items():
        if wanted is None:
            assert is_dropped(wire, guest, vids), vids
        else:
            assert arrives(wire, guest, vids) == wanted
    site.down("web0")
    site.ovs.del_port("wire")


def test_isolated_taps_reach_only_those_that_are_not(site: Site) -> None:
    site.policy('tap: "iso*", network: lan, isolated: true', 'tap: "*", network: lan')
    one, two, other = (site.netns.tap(name) for name in ("iso1", "iso2", "web0"))
    for tap in (one, two, other):
        site.up(tap.name)
    assert arrives(one, other) == arrives(other, one) == arrives(other, two) == ()
    assert is_dropped(one, two) and is_dropped(two, one)
    for tap in (one, two, other):
        site.down(tap.name)


@pytest.mark.parametrize(
    ("name", "mtu", "length"),
    [("web0", 8950, 77), ("web1", 9000, None)],
    ids=["the bridge's MTU", "its own MTU"],
)
def test_link_of_the_tap_is_set(site: Site, name: str, mtu: int, length: int | None) -> None:
    site.ovs.vsctl("set", "Interface", "br-int", "mtu_request=8950")
    site.policy("tap: web0, network: lan, txqueuelen: 77", "tap: web1, network: lan, mtu: 9000")
    site.netns.tap(name)
    before = site.netns.link(name)
    site.up(name)
    link = site.netns.link(name)
    assert link["mtu"] == mtu
    assert link["txqlen"] == (length or before["txqlen"])
    assert link["address"] == "fe" + before["address"][2:]
    assert "UP" in link["flags"]
    ipv6 = f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6"
    assert Path(ipv6).read_text() == "1\n"
    site.down(name)
    site.ovs.vsctl("set", "Interface", "br-int", "mtu_request=1500")


def test_mtu_that_would_lower_the_bridge_s_is_undone(site: Site) -> None:
    site.ovs.vsctl("clear", "Interface", "br-int", "mtu_request")
    site.peer("wire")
    tap = site.netns.tap("web0")
    before = Snapshot.take(site.netns, site.ovs)
    site.vlan("mtu: 1400")
    ended = site.up("web0", 71)
    assert ended.stderr == (
        "pyqemu-ifup: web0: the tap's MTU would lower that of br-int from 1500 to 1400: its other "
        f"ports would lose longer frames; pin it: ovs-vsctl --db={site.ovs.db} set interface "
        "br-int mtu_request=1500\n"
    )
    assert leftovers(before, site.netns, site.ovs) == []
    site.ovs.vsctl(*ended.stderr.rpartition("ovs-vsctl ")[2].split())
    site.up("web0")
    assert (site.netns.link("web0")["mtu"], site.netns.link("br-int")["mtu"]) == (1400, 1500)
    site.down("web0")
    tap.close()
    site.ovs.del_port("wire")


# The database


def test_port_comes_in_one_update_with_all_its_columns(site: Site) -> None:
    columns = "name,tag,trunks,vlan_mode,protected,other_config"
    monitor = site.netns.popen(
        ["ovsdb-client", "--format=json", "monitor", site.ovs.db, "Open_vSwitch", "Port", columns]
    )
    assert monitor.stdout is not None
    assert json.loads(monitor.stdout.readline())["data"][0][1] == "initial"
    site.netns.tap("web0")
    site.vlan("vlan: {native: 10, trunk: [20]}, isolated: true")
    site.up("web0")
    _uuid, action, *row = json.loads(monitor.stdout.readline())["data"][0]
    assert action == "insert"
    assert row == ["web0", 10, 20, "native-untagged", True, ["map", [["transient", "true"]]]]
    monitor.terminate()
    monitor.communicate()
    site.down("web0")


@pytest.mark.alone("about the hook's own connection")
def test_only_what_is_needed_is_monitored(site: Site) -> None:
    site.netns.tap("web0")
    with Proxy(site.ovs.db) as proxy:
        site.policy(ovsdb=proxy.address)
        site.up("web0")
        asked = [message["params"] for message in proxy.requests("monitor_cond_since")]
        (requests,) = [params[2] for params in asked if params[0] == "Open_vSwitch"]
        site.down("web0")
        inserts = [
            message
            for message in proxy.requests("transact")
            if any(op.get("op") == "insert" for op in message["params"][1:])
        ]
    tables: Any = SCHEMA["tables"]
    assert {name: set(request[0]["columns"]) for name, request in requests.items()} == {
        name: set(table["columns"]) for name, table in tables.items()
    }
    for name in ("Port", "Interface"):
        assert requests[name][0]["where"] == [["name", "==", "web0"]]
    assert len(inserts) == 1


def test_each_monitored_column_is_used() -> None:
    modules = (pyqemu_ifup.drivers.ovsdb_connection, pyqemu_ifup.drivers.ovsdb)
    tree = ast.parse("\n".join(inspect.getsource(each) for each in modules))
    schema = next(
        node
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SCHEMA"
    )
    used = set()
    for part in tree.body:
        for node in ast.walk(part) if part is not schema else ():
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.Constant):
                used.add(str(node.value))
    tables: Any = SCHEMA["tables"]
    for name, table in tables.items():
        assert set(table["columns"]) <= used, name


@pytest.mark.each_python
def test_database_is_reached_over_tcp(site: Site) -> None:
    assert site.ovs.tcp_db is not None
    site.policy(ovsdb=site.ovs.tcp_db)
    site.netns.tap("web0")
    site.up("web0")
    assert site.ovs.row("Port", "web0")["vlan_mode"] == "access"
    site.down("web0")


def test_other_ports_of_a_crowd_do_not_matter(site: Site) -> None:
    """A row of another name, and one without a mark, is never touched by up, down or gc."""
    site.peer("wire", "tag=7", "external_ids:a=b").close()
    before = Snapshot.take(site.netns, site.ovs)
    site.netns.tap("web0")
    site.up("web0")
    site.down("web0")
    assert site.gc() == ()
    assert rows_changed(before, site) == []
    site.ovs.del_port("wire")


# Which bridge


@pytest.mark.parametrize(
    ("network", "status", "told"),
    [
        ("bridge: br-int, kind: openvswitch", 0, ""),
        ("bridge: br-int", 0, ""),
        ("bridge: br-int, kind: linux", 71, "br-int is not a bridge: it is a tun interface"),
        ("bridge: br-no", 69, "there is no bridge br-no: network net names it; make it (ip link"),
        ("bridge: br-no, kind: openvswitch", 69, "make it (ovs-vsctl --db={db} add-br br-no)"),
        ("bridge: lo", 71, "lo is not a bridge"),
    ],
)
def test_kind_is_looked_up_and_checked(site: Site, network: str, status: int, told: str) -> None:
    ovsdb = "" if "linux" in network else f', ovsdb: "{site.ovs.db}"'
    site.policy('tap: "*", network: net', more=f"  net: {{{network}{ovsdb}}}\n")
    site.netns.tap("web0")
    before = Snapshot.take(site.netns, site.ovs)
    ended = site.up("web0", status)
    assert told.format(db=site.ovs.db) in ended.stderr
    if status == 0:
        site.down("web0")
        assert rows_changed(before, site) == []
    else:
        assert leftovers(before, site.netns, site.ovs) == []


def test_name_of_two_bridges_needs_a_kind(site: Site) -> None:
    site.ovs.vswitchd.kill()
    site.ovs.vsctl("--no-wait", "add-br", "br0")
    site.netns.add_bridge("br0", mac="52:54:00:ff:00:02")
    site.netns.tap("web0")

    def say(kind: str) -> None:
        # NOTE: lan makes the database one of the policy's.
        where = f', ovsdb: "{site.ovs.db}"' if "linux" not in kind else ""
        site.policy(
            'tap: "*", network: net', more=f"  net: {{bridge: br0{where}{kind}}}\n", timeout=1
        )

    say("")
    ended = site.up("web0", 71)
    assert ended.stderr == (
        "pyqemu-ifup: web0: br0 is both a Linux bridge and an Open vSwitch bridge; "
        "say kind: linux or kind: openvswitch for network net\n"
    )
    say(", kind: linux")
    site.up("web0")
    assert site.netns.link("web0")["master"] == "br0"
    site.down("web0")
    say(", kind: openvswitch")
    assert "ovs-vswitchd does not answer" in site.up("web0", 75).stderr
    site.netns.ip("link", "del", "br0")
    site.ovs.vsctl("--no-wait", "del-br", "br0")
    site.ovs.start_vswitchd()


# What others have left


def killed_holder(site: Site, tap: str) -> None:
    """Attach `tap` for a process that holds it, and kill that process (SIGKILL)."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        Tap(tap)
        os.write(done, b".")
        signal.pause()
    os.read(ready, 1)
    site.up(tap)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ready)
    os.close(done)
    assert tap not in site.netns.links()
    assert site.ovs.find("Port", tap) is not None


@pytest.mark.each_python
@pytest.mark.alone("the agent collects it at once")
def test_new_tap_is_never_in_the_old_vlan(site: Site) -> None:
    """Facts A.3 to A.5: neither the stale row's VLAN, nor a port that no frame passes."""
    wire = site.peer("wire")
    site.vlan("vlan: 10")
    killed_holder(site, "web0")

    guest = site.netns.tap("web0")
    site.vlan("vlan: 20")
    site.up("web0")
    assert arrives(guest, wire) == (20,)
    assert arrives(wire, guest, (20,)) == ()
    assert is_dropped(wire, guest, (10,))
    assert site.ovs.row("Port", "web0")["tag"] == 20
    site.down("web0")
    site.ovs.del_port("wire")


@pytest.mark.alone("it runs in this process")
def test_a_link_is_up_when_the_flows_of_the_row_before_are_gone(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the kernel datapath the new port has the number of the old one, and its flows at first."""
    moments: list[float] = []

    def mark() -> None:
        moments.append(time.monotonic())

    with site.netns.tap("web0"):
        plug(site.netns, port_of("web0", "br-int", vlan=Vlan(10), ovsdb=site.ovs.db))
        meddle(monkeypatch, DelPort, mark, after=True)
        meddle(monkeypatch, SetUp, mark)
        plug(site.netns, port_of("web0", "br-int", vlan=Vlan(20), ovsdb=site.ovs.db))
        deleted, up = moments
        assert up - deleted >= 0.9 * REVALIDATION
        unplug(site.netns, "web0")


@pytest.mark.alone("it runs in this process")
def test_another_s_port_that_goes_meanwhile_shortens_no_wait(site: Site) -> None:
    """The agent has one connection for all guests."""
    names = ("web0", "web1")
    with site.netns.tap("web0"), site.netns.tap("web1"):
        for name in names:
            plug(site.netns, port_of(name, "br-int", vlan=Vlan(10), ovsdb=site.ovs.db))
        with site.netns.enter(), Host(None, Deadline(10), lambda command: None) as host:
            host.finish(host.open_databases([site.ovs.db]))
            (web0,), (web1,) = map(host.databases[site.ovs.db].ports, names)
            assert web0.ifindex is not None
            add = AddPort(
                site.ovs.db, "br-int", "web0", web0.ifindex, Vlan(20), False, web0.external_ids
            )
            host.finish(host.run(del_port(web0)))
            deleted = time.monotonic()
            for step in (del_port(web1), add):
                host.finish(host.run(step))
            assert time.monotonic() - deleted >= 0.9 * REVALIDATION
        for name in names:
            unplug(site.netns, name)


@pytest.mark.alone("the agent collects it at once")
def test_new_port_waits_until_the_old_one_is_let_go(site: Site) -> None:
    """Facts A.5: if ovs-vswitchd sees both changes at once, no frame passes the new port."""
    wire = site.peer("wire")
    site.vlan("vlan: 10")
    killed_holder(site, "web0")
    guest = site.netns.tap("web0")
    site.vlan("vlan: 20")
    for deleted_by_down in (False, True):
        site.ovs.vswitchd.stop()
        if deleted_by_down:
            assert any("ovs-vswitchd does not answer" in line for line in site.down("web0").log)
            guest.close()
            guest = site.netns.tap("web0")
        call = site.calls.start("pyqemu-ifup", "web0", change=close_descriptors)
        end = time.monotonic() + 3 * LINGER
        seen = set()
        while time.monotonic() < end:
            row = site.ovs.find("Port", "web0")
            seen.add(None if row is None else row["tag"])
        assert None in seen and 20 not in seen
        site.ovs.vswitchd.cont()
        _ended(call.wait(), 0)
        assert arrives(guest, wire) == (20,)
        assert arrives(wire, guest, (20,)) == ()
    site.down("web0")
    site.ovs.del_port("wire")


@pytest.mark.alone("the agent collects it at once")
def test_stale_row_of_another_bridge_goes(site: Site) -> None:
    site.ovs.add_bridge("br-old", hwaddr="52:54:00:ff:00:03")
    old_wire = site.netns.tap("oldwire", up=True)
    site.ovs.add_port("br-old", "oldwire")
    wire = site.peer("wire")
    site.policy(
        'tap: "*", network: old',
        more=f'  old: {{bridge: br-old, ovsdb: "{site.ovs.db}", vlan: 10}}\n',
    )
    killed_holder(site, "web0")

    guest = site.netns.tap("web0")
    site.vlan("vlan: 20")
    site.up("web0")
    assert arrives(guest, wire) == (20,)
    assert is_dropped(guest, old_wire) and is_dropped(old_wire, guest, (10,))
    assert site.ovs.vsctl("port-to-br", "web0").stdout == "br-int\n"
    site.down("web0")
    site.ovs.del_port("wire")
    site.ovs.vsctl("del-br", "br-old")


@pytest.mark.alone("the agent collects it at once")
def test_stale_row_is_gone_before_the_tap_joins_a_linux_bridge(site: Site) -> None:
    """The old port's frames would reach the new tap, though that shows no sign of it."""
    wire = site.peer("wire")
    site.netns.add_bridge("br0", mac="52:54:00:ff:00:02")
    site.vlan("vlan: 10")
    killed_holder(site, "web0")

    guest = site.netns.tap("web0")
    site.policy('tap: "*", network: flat', more="  flat: {bridge: br0}\n")
    site.up("web0")
    assert site.ovs.find("Port", "web0") is None
    assert is_dropped(wire, guest, (10,)) and is_dropped(guest, wire)
    other = site.netns.tap("other", up=True, master="br0")
    assert arrives(guest, other) == arrives(other, guest) == ()
    site.down("web0")
    site.netns.ip("link", "del", "br0")
    site.ovs.del_port("wire")


@pytest.mark.parametrize("network", ["lan", "flat"])
def test_row_of_somebody_else_is_left_and_its_owner_named(site: Site, network: str) -> None:
    site.netns.add_bridge("br0", mac="52:54:00:ff:00:02")
    site.netns.tap("web0")
    site.ovs.add_port("br-int", "web0", "tag=7")
    before = Snapshot.take(site.netns, site.ovs)
    site.policy(f'tap: "*", network: {network}', more="  flat: {bridge: br0}\n")
    ended = site.up("web0", 77)
    assert ended.stderr == (
        f"pyqemu-ifup: web0: Open vSwitch has a port of this name that is not ours: on bridge "
        f"br-int of {site.ovs.db}; if it shall go: ovs-vsctl --db={site.ovs.db} del-port web0\n"
    )
    site.down("web0")
    assert site.gc() == ()
    assert leftovers(before, site.netns, site.ovs) == []
    site.ovs.del_port("web0")
    site.netns.ip("link", "del", "br0")


@pytest.mark.alone("the agent collects it at once")
def test_row_of_another_namespace_is_left(site: Site) -> None:
    site.netns.tap("web0")
    site.up("web0")
    site.netns.kept.pop_all().close()
    site.ovs.vsctl("set", "Interface", "web0", 'external_ids:pyqemu-netns="4:1"')
    tap = site.netns.tap("web0")
    before = Snapshot.take(site.netns, site.ovs)
    ended = site.up("web0", 77)
    assert "of this name from another network namespace: on bridge br-int" in ended.stderr
    site.down("web0")
    (leftover,) = site.gc()
    assert (leftover.port.name, leftover.remove) == ("web0", None)
    assert leftovers(before, site.netns, site.ovs) == []
    tap.close()
    site.ovs.del_port("web0")


@pytest.mark.parametrize(
    ("mute", "status"),
    [
        (False, 69),
        pytest.param(True, 75, marks=pytest.mark.alone("the agent knows what is in a mute one")),
    ],
)
def test_linux_bridge_needs_the_database_that_is_there(site: Site, mute: bool, status: int) -> None:
    site.netns.add_bridge("br0", mac="52:54:00:ff:00:02")
    site.netns.tap("web0")
    before = Snapshot.take(site.netns, site.ovs)
    site.policy('tap: "*", network: flat', more="  flat: {bridge: br0}\n", timeout=1)
    if mute:
        site.ovs.server.stop()
    else:
        site.ovs.server.kill()
    ended = site.up("web0", status)
    assert site.ovs.db in ended.stderr
    assert ended.seconds < 3.5
    if mute:
        site.ovs.server.cont()
    else:
        site.ovs.start_server()
    assert leftovers(before, site.netns, site.ovs) == []
    site.netns.ip("link", "del", "br0")


# Again and again


def test_up_again_is_as_a_fresh_up(site: Site) -> None:
    wire = site.peer("wire")
    guest = site.netns.tap("web0")
    for settings in ("vlan: 10, isolated: true, external_ids: {a: b}", "", "vlan: 20", "vlan: 20"):
        site.vlan(settings)
        site.up("web0")
    again = (site.ovs.row("Port", "web0"), site.ids("web0"))
    assert arrives(guest, wire) == (20,)
    assert arrives(wire, guest, (20,)) == ()
    site.down("web0")
    site.up("web0")
    fresh = (site.ovs.row("Port", "web0"), site.ids("web0"))
    for name in COLUMNS:
        assert again[0][name] == fresh[0][name]
    assert again[1] == fresh[1]
    site.down("web0")
    site.ovs.del_port("wire")


def test_port_that_somebody_changed_comes_right(site: Site) -> None:
    site.vlan("vlan: 20")
    site.netns.tap("web0")
    site.up("web0")
    site.ovs.vsctl(
        "set", "Port", "web0", "tag=30", "trunks=5,6", "vlan_mode=trunk", "protected=true"
    )
    site.up("web0")
    row = site.ovs.row("Port", "web0")
    assert {name: row[name] for name in COLUMNS} == {**COLUMNS, "tag": 20}
    site.down("web0")


@pytest.mark.each_python
def test_down_goes_by_the_alias_and_may_run_again(site: Site) -> None:
    tap = site.netns.tap("web0")
    before = Snapshot.take(site.netns, site.ovs)
    site.up("web0")
    site.calls.hooks.policy.unlink()
    assert any("detached from br-int" in line for line in site.down("web0").log)
    assert site.ovs.find("Port", "web0") is None
    link = site.netns.link("web0")
    assert "UP" not in link["flags"] and "ifalias" not in link
    for _again in range(2):
        assert site.down("web0").log == ()
    tap.close()
    site.down("web0")
    assert rows_changed(before, site) == []


def test_late_down_leaves_the_newer_row(site: Site) -> None:
    """A persistent tap: its new QEMU has attached it before the old one's down runs."""
    site.netns.tap("web0", persist=True)
    new = site.calls.start("pyqemu-ifup", "web0", caller=lambda: None)
    _ended(new.wait(keep_caller=True), 0)
    before = Snapshot.take(site.netns, site.ovs)
    assert any("left alone" in line for line in site.down("web0").log)
    assert leftovers(before, site.netns, site.ovs) == []
    new.end_caller()
    site.down("web0")
    assert site.ovs.find("Port", "web0") is None
    site.netns.ip("link", "del", "web0")


@pytest.mark.alone("changes the hook's own process")
def test_down_leaves_a_row_that_came_meanwhile(site: Site) -> None:
    site.netns.tap("web0")
    site.up("web0")

    def replaced() -> None:
        run = Host.run

        async def late(self: Host, step: Any) -> None:
            if type(step).__name__ == "DelPort":
                site.ovs.vsctl("set", "Interface", "web0", "external_ids:vm-pid=1")
            return await run(self, step)

        setattr(Host, "run", late)  # noqa: B010  a method is no variable to mypy

    _ended(site.calls.down("web0", replaced), 0)
    assert site.ids("web0")["vm-pid"] == "1"
    site.ovs.del_port("web0")


# What a crash has left


@pytest.mark.alone("the agent collects it at once")
def test_gc_judges_each_row(site: Site) -> None:
    names = ("live", "stale", "newer", "other", "boot", "away")
    for name in names:
        site.netns.tap(name)
        site.up(name)
    site.netns.kept.pop_all().close()
    site.netns.tap("live", persist=True)
    site.up("live")
    site.netns.tap("newer")
    for name, key, value in (
        ("other", "netns", "4:1"),
        ("boot", "boot-id", "earlier"),
        ("away", "boot-id", "earlier"),
    ):
        site.ovs.vsctl("set", "Interface", name, f'external_ids:pyqemu-{key}="{value}"')
    site.ovs.vsctl("set", "Interface", "away", 'external_ids:pyqemu-netns="4:1"')
    site.ovs.vsctl(
        "add-port", "br-int", "theirs", "--", "set", "Interface", "theirs", "type=internal"
    )
    removed = {"stale", "newer", "boot", "away"}
    for dry_run in (True, False):
        found = {leftover.port.name: leftover for leftover in site.gc(dry_run=dry_run)}
        assert set(found) == set(names)
        assert {name for name, leftover in found.items() if leftover.remove} == removed
        left = {row["name"] for row in site.ovs.rows("Port")["Port"]} - {"br-int", "theirs"}
        assert left == (set(names) if dry_run else set(names) - removed)
    assert found["newer"].because.startswith("its tap is gone: no link newer with ifindex ")
    assert found["boot"].because == "its tap is gone: it is of an earlier boot"
    for name in ("live", "other", "theirs"):
        site.ovs.del_port(name)
    site.netns.ip("link", "del", "live")


@pytest.mark.alone("the agent collects it at once")
def test_gc_leaves_what_comes_up_meanwhile(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale row is judged, then a new tap's up replaces it before gc has the tap's lock."""
    site.vlan("vlan: 10")
    killed_holder(site, "web0")
    site.netns.tap("web0")
    site.vlan("vlan: 20")
    deadline = Deadline(10)
    real = lock_by_name

    def lock_late(tap: str, deadline: Deadline) -> Task[Lock]:
        site.up("web0")
        return real(tap, deadline)

    monkeypatch.setattr(pyqemu_ifdown.gc, "lock_by_name", lock_late)
    with Host(None, deadline, lambda command: None) as host:
        host.finish(host.open_databases([site.ovs.db]))
        assert list(collect(host, tap=None, dry_run=False)) == []
    assert site.ovs.row("Port", "web0")["tag"] == 20
    site.down("web0")


def test_gc_and_ups_race(site: Site) -> None:
    taps = [site.netns.tap(f"web{number}") for number in range(4)]
    for _round in range(3):
        running = [site.calls.start("pyqemu-ifup", tap.name) for tap in taps]
        for call in running:
            site.gc()
            _ended(call.wait(), 0)
        assert {leftover.remove for leftover in site.gc()} == {None}
        for tap in taps:
            assert site.ovs.row("Port", tap.name)["vlan_mode"] == "access"
            site.down(tap.name)


# Many at once


def test_hundred_taps_by_sixteen_callers(site: Site) -> None:
    names = [f"web{number}" for number in range(100)]
    site.vlan("vlan: 100", timeout=120)
    taps = [site.netns.tap(name) for name in names]
    wire = site.peer("wire")
    before = Snapshot.take(site.netns, site.ovs)

    def all_of(program: str) -> None:
        running: list[Call] = []
        for name in names:
            if len(running) == 16:
                _ended(running.pop(0).wait(), 0)
            running.append(site.calls.start(program, name, change=close_descriptors))
        for call in running:
            _ended(call.wait(), 0)

    all_of("pyqemu-ifup")
    rows = {row["name"]: row for row in site.ovs.rows("Port")["Port"]}
    assert {rows[name]["tag"] for name in names} == {100}
    ofports = {row["name"]: row["ofport"] for row in site.ovs.rows("Interface")["Interface"]}
    assert len({ofports[name] for name in names}) == 100
    assert arrives(taps[99], wire) == arrives(taps[0], wire) == (100,)
    all_of("pyqemu-ifdown")
    assert rows_changed(before, site) == []
    site.ovs.del_port("wire")
