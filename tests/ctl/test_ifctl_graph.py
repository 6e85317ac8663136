"""pyqemu-ifctl status --graph: the picture from values, and from a real host, drawn by graphviz."""

from __future__ import annotations

import itertools
import os
import subprocess
import xml.etree.ElementTree as xml
from dataclasses import replace
from pathlib import Path

import pytest

from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.sites import both_switches
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Vlan
from pyqemu_ifctl.graph import NAME_MAX, as_dot, as_svg, find_bridges
from pyqemu_ifctl.taps import Row
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.look import Link, OvsPort, Vid
from pyqemu_ifup.mark import Here

TAP = Link(
    index=7,
    name="web0",
    kind="tun",
    tap=True,
    up=True,
    mtu=1500,
    mac="fe:54:00:aa:bb:cc",
    txqueuelen=1000,
    master=None,
    alias="",
    carrier=True,
)
BR0 = replace(TAP, index=2, name="br0", kind="bridge", tap=False, vlan_filtering=True)
ETH0 = replace(TAP, index=3, name="eth0", kind=None, tap=False, master=2)
ROW = Row("web0", "ok", kind="linux", bridge="br0", network="lan", vlan=Vlan(10), vm="web", pid=42)
UPLINK = OvsPort(
    ovsdb="unix:/run/db",
    bridge="br-int",
    name="enp3s0",
    tag=None,
    trunks=(),
    vlan_mode=None,
    protected=False,
    transient=False,
    external_ids=(),
    ofport=1,
    error=None,
    ifindex=1,
    link_state="up",
)


POLICY = parse_policy([
    Source(
        "policy.yaml",
        b"version: 1\nnetworks: {sw: {bridge: br-int, ovsdb: 'unix:/run/db'}}\nrules: []\n",
    )
])  # fmt: skip

pytestmark = pytest.mark.usefixtures("graphviz")


@pytest.fixture
def graphviz() -> None:
    require("graphviz")


def system(*links: Link, ports: tuple[OvsPort, ...] = (), **more: object) -> Snapshot:
    found = Snapshot(
        policy=POLICY,
        links=links,
        ports=ports,
        vids={3: (Vid(10), Vid(20))},
        ovs_bridges={"br-int": ("unix:/run/db",)} if ports else {},
        unasked=frozenset(),
        here=Here("boot", "4:42"),
    )
    return replace(found, **more)  # type: ignore[arg-type]


def edges(dot: str) -> set[tuple[str, str]]:
    """Return the lines that are seen, by what graphviz itself makes of the picture."""
    done = subprocess.run(["dot", "-Tplain"], input=dot, capture_output=True, text=True, check=True)
    labels, found = {}, set()
    for line in done.stdout.splitlines():
        words = line.split()
        if words[0] == "node":
            labels[words[1]] = line.split(" ", 6)[6].rsplit(" ", 4)[0].strip('"')
        elif words[0] == "edge" and "invis" not in words:
            found.add((labels[words[1]], labels[words[2]]))
    return found


def shown(
    places: list[tuple[str, str]], looked: Snapshot
) -> list[tuple[str, str, list[tuple[str, frozenset[int] | None]]]]:
    """Return the name, the kind and the uplinks of each bridge, with what these carry."""
    return [
        (each.name, each.kind, [(uplink.name, uplink.vids) for uplink in each.uplinks])
        for each in find_bridges(places, looked)
    ]


def test_uplinks_of_each_kind_of_bridge() -> None:
    tagged = replace(UPLINK, name="vxlan0", vlan_mode="access", tag=100)
    ours = replace(UPLINK, name="web9", external_ids=(("pyqemu-ifup", "1"),))
    local = replace(UPLINK, name="br-int")
    looked = system(BR0, ETH0, replace(TAP, master=2), ports=(UPLINK, tagged, ours, local))
    assert shown([("linux", "br0")], looked) == [
        ("br0", "linux", [("eth0", {10, 20})]),
        ("br-int", "openvswitch", [("enp3s0", None), ("vxlan0", {100})]),
    ]
    plain = system(replace(BR0, vlan_filtering=False), ETH0)
    assert shown([("linux", "br0")], plain) == [("br0", "linux", [("eth0", None)])]


def test_what_leads_nowhere_else_is_no_uplink() -> None:
    """Neither what Open vSwitch made for this host, nor what it could not make."""
    inner = replace(UPLINK, name="mgmt0", internal=True)
    broken = replace(UPLINK, name="gone0", ofport=-1, error="could not open network device")
    assert shown([], system(ports=(inner, broken))) == [("br-int", "openvswitch", [])]


def test_a_vlan_is_joined_to_the_uplinks_that_carry_it() -> None:
    rows = [
        ROW,
        replace(ROW, tap="web1", vlan=Vlan(30), pid=43),
        replace(ROW, tap="web2", vlan=Vlan(None, (20, 30)), pid=42),
    ]
    found = edges(as_dot(rows, system(BR0, ETH0)))
    assert found == {
        (r"web\npid 42", "web0"),
        (r"web\npid 43", "web1"),
        (r"web\npid 42", "web2"),
        ("web0", "VLAN 10"),
        ("web1", "VLAN 30"),
        ("web2", "VLAN trunk 20,30"),
        ("VLAN 10", "eth0"),
        ("VLAN trunk 20,30", "eth0"),
    }


HOSTILE = [
    '"]; evil [label="x',
    "back\\slash\\",
    "\\N \\G \\l",
    "<b>bold</b> &lt;i&gt; &amp;",
    "new\nline",
    "-- { } ; /* */ // #",
    "\x1b[2J\u202e",
    "\udcff\udc80",
    "x" * 300,
    "全" * 60,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_guests_name_is_text_and_no_more(name: str) -> None:
    row = replace(ROW, vm=name)
    plain = as_svg(as_dot([ROW], system(BR0, ETH0)), 60)
    svg = as_svg(as_dot([row], system(BR0, ETH0)), 60)
    assert _shape(svg) == _shape(plain)
    texts = [each.text or "" for each in xml.fromstring(svg).iter() if each.tag.endswith("}text")]
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    (found,) = (text for text in texts if shown[:5] in text)
    assert found == shown or (found.endswith("~") and len(found) <= NAME_MAX)


def _shape(svg: str) -> list[str]:
    return [each.tag for each in xml.fromstring(svg).iter()]


def test_fifty_guests() -> None:
    """Each name in it stands by itself: no two boxes of one column are at the same height."""
    rows = [
        replace(ROW, tap=f"web{n}", vm=f"guest{n}.example", pid=1000 + n, vlan=Vlan(10 * (n % 5)))
        for n in range(50)
    ]
    dot = as_dot(rows, system(BR0, ETH0))
    assert len([edge for edge in edges(dot) if edge[0].startswith("guest")]) == 50
    texts = [
        (round(float(each.get("x", "0"))), round(float(each.get("y", "0"))))
        for each in xml.fromstring(as_svg(dot, 60)).iter()
        if each.tag.endswith("}text")
    ]
    assert len(texts) == len(set(texts)) >= 150
    heights = sorted({y for _, y in texts})
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 1


@pytest.fixture
def hooks(netns: Namespace, ovs: OpenVSwitch, tmp_path: Path) -> Hooks:
    return both_switches(netns, ovs, tmp_path / "hooks")


def test_real_host(hooks: Hooks, netns: Namespace, tmp_path: Path) -> None:
    netns.ip("link", "add", "up0", "type", "veth", "peer", "name", "far0")
    netns.ip("link", "set", "up0", "master", "br0")
    for name in ("lan0", "sw0", "bare"):
        netns.tap(name)
    assert hooks.up("lan0").returncode == hooks.up("sw0").returncode == 0
    done = hooks.ctl("status", "--graph", "dot")
    assert (done.returncode, done.stderr) == (0, "")
    who = rf"no name\npid {os.getpid()}"
    assert edges(done.stdout) == {
        (who, "lan0"),
        (who, "sw0"),
        ("lan0", "no VLAN"),
        ("sw0", "VLAN 100"),
        ("no VLAN", "up0"),
    }
    drawn = hooks.ctl("status", "--graph", "svg")
    assert drawn.returncode == 0 and xml.fromstring(drawn.stdout).tag.endswith("}svg")
    # Without graphviz.
    empty = tmp_path / "empty"
    empty.mkdir()
    python = hooks.folder / "pyqemu-ifctl"
    bare = subprocess.run(
        [python, "status", "--graph", "svg"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(empty), "PYQEMU_IFUP_POLICY": str(hooks.policy)},
    )
    assert (bare.returncode, bare.stdout) == (69, "")
    assert bare.stderr.endswith(
        "cannot draw: graphviz is not installed: there is no program dot; "
        "install the package graphviz, or take --graph dot\n"
    )
    assert hooks.ctl("status", "--graph", "dot", "nosuch").returncode == 69
    for name in ("lan0", "sw0"):
        assert hooks.down(name).returncode == 0
    netns.ip("link", "del", "up0")


@pytest.mark.parametrize("words", ["dot --json", "dot --watch", "png"])
def test_what_does_not_go_with_a_graph(hooks: Hooks, words: str) -> None:
    done = hooks.ctl("status", "--graph", *words.split())
    assert (done.returncode, done.stdout) == (64, "")


def test_graphviz_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Failure) as caught:
        as_svg("graph {", 60)
    assert caught.value.status is Status.REFUSED
    assert "syntax error" in str(caught.value)
    with pytest.raises(Failure) as caught:
        as_svg("graph {}", 0.0001)
    assert caught.value.status is Status.TRY_AGAIN
