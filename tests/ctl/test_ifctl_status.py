"""pyqemu-ifctl status: each state from values and for real, the table, JSON, what fails."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.ports import giving
from lab.told import run_told
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.bridge import BridgePlace
from pyqemu_ifconf.kinds.linux import LinuxPlace
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Deny, Leave, Policy, Port, PortSettings, Position, Vlan
from pyqemu_ifctl import answer
from pyqemu_ifctl.answer import width
from pyqemu_ifctl.taps import Row, State, rows, wanted
from pyqemu_ifctl.verbs.status import as_list, as_object, as_table
from pyqemu_ifup.guest import Unsaid
from pyqemu_ifup.kinds.base import Difference
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.look import Link, OvsPort
from pyqemu_ifup.mark import Here, Mark, find_here, format_alias
from pyqemu_ifup.system.process import process_start

DB = "unix:/run/db"
HERE = Here("b007-1d", "4:42")
NO_POLICY = Failure(Status.NO_POLICY, "there is none")
POSITION = Position("policy.yaml", 5, 5)
LAN = Mark("lan", "linux", "br0", "web1", 0, 0)
SW = Mark("sw", "openvswitch", "br-int", "web1", 0, 0, DB)
LAN_PORT = Port("tap0", "lan", BridgePlace("br0"), POSITION)
SW_PORT = Port("tap0", "sw", BridgePlace("br-int", DB), POSITION, PortSettings(vlan=Vlan(100)))

TAP = Link(
    index=7,
    name="tap0",
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
BR0 = replace(TAP, index=2, name="br0", kind="bridge", tap=False, vlan_filtering=False)
OTHER = replace(BR0, index=3, name="docker0")
BOND = replace(BR0, index=4, name="bond0", kind="bond")
DATAPATH = replace(BR0, index=5, name="ovs-system", kind="openvswitch")
BR_INT = replace(TAP, index=6, name="br-int")
ON_LAN = replace(TAP, master=2, alias=format_alias(LAN), isolated=False)
ON_SW = replace(TAP, alias=format_alias(SW))
IDS = {
    "pyqemu-ifup": "1",
    "pyqemu-network": "sw",
    "pyqemu-ifindex": "7",
    "pyqemu-boot-id": "b007-1d",
    "pyqemu-netns": "4:42",
    "vm-name": "web1",
    "vm-pid": "12",
}


def port(*, bridge: str = "br-int", name: str = "tap0", **ids: str | None) -> OvsPort:
    given = {key.replace("_", "-"): value for key, value in ids.items()}
    pairs = {**IDS, **given}
    return OvsPort(
        ovsdb=DB,
        bridge=bridge,
        name=name,
        tag=100,
        trunks=(),
        vlan_mode="access",
        protected=False,
        transient=True,
        external_ids=tuple(sorted((k, v) for k, v in pairs.items() if v is not None)),
        ofport=1,
        error=None,
        ifindex=7,
        link_state="up",
    )


FOREIGN = replace(port(), external_ids=())
LOCAL = replace(port(name="br-int"), external_ids=(), internal=True)


def system(
    *links: Link, ports: tuple[OvsPort, ...] = (), unasked: frozenset[str] = frozenset()
) -> Snapshot:
    return Snapshot(
        policy=NO_POLICY,
        links=(BR0, OTHER, BOND, DATAPATH, *links),
        ports=ports,
        vids={},
        ovs_bridges={} if unasked else {"br-int": (DB,)},
        unasked=unasked,
        here=HERE,
    )


def found(seen: Snapshot, want: Port | Deny | None) -> list[tuple[str, State | None, str]]:
    """Return tap, state and differences of each row, unknown ones as "?"."""
    return [
        (
            row.tap,
            row.state,
            "?" if row.differences is None else "; ".join(map(str, row.differences)),
        )
        for row in rows(seen, lambda tap, mark: want)
    ]


STATES: list[tuple[str, Snapshot, Port | Deny | None, list[tuple[str, State | None, str]]]] = [
    ("no tap", system(), None, []),
    ("on a Linux bridge", system(ON_LAN), LAN_PORT, [("tap0", "ok", "")]),
    (
        "there was no time for VLANs",
        replace(
            system(replace(ON_LAN, master=9), replace(BR0, index=9, vlan_filtering=True)), vids=None
        ),
        LAN_PORT,
        [("tap0", None, "?")],
    ),
    (
        "on Open vSwitch",
        system(ON_SW, BR_INT, ports=(port(), LOCAL)),
        SW_PORT,
        [("tap0", "ok", "")],
    ),
    (
        "the datapath's own tap is none of the host's",
        system(replace(TAP, name="ovs-netdev")),
        None,
        [],
    ),
    (
        "on Open vSwitch's kernel datapath",
        system(replace(ON_SW, master=5), ports=(port(),)),
        SW_PORT,
        [("tap0", "ok", "")],
    ),
    (
        "another MTU",
        system(replace(ON_LAN, mtu=1400)),
        LAN_PORT,
        [("tap0", "differs", "mtu is 1400, wanted 1500")],
    ),
    (
        "another VLAN and network by now",
        system(ON_SW, ports=(port(),)),
        giving(replace(SW_PORT, network="dmz"), vlan=Vlan(None, (2, 3))),
        [("tap0", "differs", "network is sw, wanted dmz; vlan is 100, wanted trunk 2-3")],
    ),
    (
        "denied by now",
        system(ON_LAN),
        Deny("ask us", None),
        [("tap0", "differs", "network is lan, wanted none: denied: ask us")],
    ),
    (
        "the wanted bridge has gone",
        system(ON_LAN),
        replace(LAN_PORT, place=LinuxPlace("br9")),
        [
            (
                "tap0",
                "differs",
                "bridge is br0, wanted br9: there is no bridge br9: network lan names "
                "it; make it (ip link add name br9 up type bridge) or correct the policy",
            )
        ],
    ),
    (
        "moved away by hand",
        system(replace(ON_LAN, master=3)),
        LAN_PORT,
        [("tap0", "differs", "bridge is docker0, wanted br0")],
    ),
    (
        "taken out by hand",
        system(replace(ON_LAN, master=None)),
        LAN_PORT,
        [("tap0", "differs", "bridge is none, wanted br0")],
    ),
    (
        "its port has gone",
        system(ON_SW),
        SW_PORT,
        [("tap0", "differs", "bridge is none, wanted br-int")],
    ),
    (
        "its alias has gone",
        system(TAP, ports=(port(),)),
        SW_PORT,
        [("tap0", "differs", "alias is none, wanted our mark")],
    ),
    ("no policy", system(ON_LAN), None, [("tap0", "ok", "?")]),
    (
        "no policy, taken out",
        system(replace(ON_LAN, master=None)),
        None,
        [("tap0", "differs", "?")],
    ),
    (
        "its database is mute",
        system(ON_SW, unasked=frozenset({DB})),
        SW_PORT,
        [("tap0", None, "?")],
    ),
    (
        "on a Linux bridge, a database is mute",
        system(ON_LAN, unasked=frozenset({DB})),
        LAN_PORT,
        [("tap0", "ok", "")],
    ),
    ("nobody's", system(TAP), None, [("tap0", "loose", "")]),
    ("nobody's, with an alias", system(replace(TAP, alias="mine")), None, [("tap0", "loose", "")]),
    (
        "maybe nobody's, a database is mute",
        system(TAP, unasked=frozenset({DB})),
        None,
        [("tap0", None, "?")],
    ),
    ("another's bridge", system(replace(TAP, master=3)), None, [("tap0", "foreign", "")]),
    ("a bond", system(replace(TAP, master=4)), None, [("tap0", "foreign", "")]),
    ("another's port", system(TAP, ports=(FOREIGN,)), None, [("tap0", "foreign", "")]),
    ("another's port without a tap", system(ports=(FOREIGN,)), None, []),
    ("the tap is gone", system(ports=(port(),)), None, [("tap0", "stale", "")]),
    (
        "the tap is gone, and a new one is there",
        system(replace(TAP, index=9), ports=(port(),)),
        None,
        [("tap0", "loose", ""), ("tap0", "stale", "")],
    ),
    (
        "the tap is gone, and Open vSwitch took in a new one",
        system(replace(TAP, index=9, master=5), ports=(port(),)),
        None,
        [("tap0", "foreign", ""), ("tap0", "stale", "")],
    ),
    (
        "an earlier boot",
        system(TAP, ports=(port(pyqemu_boot_id="b007-0"),)),
        None,
        [("tap0", "loose", ""), ("tap0", "stale", "")],
    ),
    (
        "another network namespace",
        system(TAP, ports=(port(pyqemu_netns="4:43"),)),
        None,
        [("tap0", "elsewhere", ""), ("tap0", "loose", "")],
    ),
    (
        "another host",
        system(ports=(replace(port(pyqemu_boot_id="b007-0"), ovsdb="tcp:192.0.2.1:6640"),)),
        None,
        [("tap0", "elsewhere", "")],
    ),
    (
        "in the order of numbers",
        system(*(replace(TAP, name=name) for name in ("web10", "web9", "a", "web9b"))),
        None,
        [("a", "loose", ""), ("web9", "loose", ""), ("web9b", "loose", ""), ("web10", "loose", "")],
    ),
]


@pytest.mark.parametrize(
    ("seen", "want", "expected"), [row[1:] for row in STATES], ids=[row[0] for row in STATES]
)
def test_state(
    seen: Snapshot, want: Port | Deny | None, expected: list[tuple[str, State | None, str]]
) -> None:
    assert found(seen, want) == expected


def test_why_a_tap_cannot_be_as_wanted_stands_beside_what_it_is() -> None:
    (row,) = rows(system(ON_LAN), lambda tap, mark: giving(LAN_PORT, vlan=Vlan(20)))
    because = (
        "br0 does not filter VLANs: vlan 20 is wanted; turn it on: "
        "ip link set dev br0 type bridge vlan_filtering 1"
    )
    assert json.loads(as_object([row]))["taps"][0]["differences"] == [
        {"setting": "vlan", "wanted": "20", "is": "none", "because": because}
    ]
    one, table = (" ".join(text.split()) for text in (as_list(row), as_table([row])))
    assert f"differences vlan is none, wanted 20 because {because}" in one
    assert f"tap0: vlan is none, wanted 20: {because}" in table


def test_a_row_as_json() -> None:
    table = rows(system(ON_SW, ports=(port(),)), lambda tap, mark: giving(SW_PORT, mtu=1400))
    assert json.loads(as_object(table)) == {
        "version": 1,
        "taps": [
            {
                "tap": "tap0",
                "ifindex": 7,
                "kind": "openvswitch",
                "bridge": "br-int",
                "network": "sw",
                "mtu": 1500,
                "mac": "fe:54:00:aa:bb:cc",
                "vlan": 100,
                "isolated": False,
                "vm": "web1",
                "pid": None,
                "state": "differs",
                "differences": [
                    {"setting": "mtu", "wanted": "1400", "is": "1500", "because": None}
                ],
                "otherwise": None,
            }
        ],
    }


def test_a_stale_row_as_json() -> None:
    trunk = replace(port(), tag=10, trunks=(20, *range(30, 40)), vlan_mode="native-untagged")
    table = rows(system(ports=(trunk,)), lambda tap, mark: None)
    assert json.loads(as_object(table)) == {
        "version": 1,
        "taps": [
            {
                "tap": "tap0",
                "ifindex": None,
                "kind": "openvswitch",
                "bridge": "br-int",
                "network": "sw",
                "mtu": None,
                "mac": None,
                "vlan": {"native": 10, "trunk": [20, "30-39"]},
                "isolated": False,
                "vm": "web1",
                "pid": 12,
                "state": "stale",
                "differences": [],
                "otherwise": None,
            }
        ],
    }


def test_bytes_that_are_no_text_do_not_break_json() -> None:
    table = [Row("a\udcffb", "loose", vm="\ud800ü")]
    read = json.loads(as_object(table))["taps"][0]
    assert (read["tap"], read["vm"]) == ("a?b", "?ü")


TABLE = """\
TAP    STATE    BRIDGE  NETWORK  VLAN                      MTU   PID   VM
tap0   ok       br0     lan      -                         1500  4711  web1
tap1   differs  br-int  sw       native 10 trunk 20,30-39  1400  -     -
tap2   stale    br-int  sw       100                       -     12    web2
tap10  ?        -       -        -                         1500  -     -

tap1: mtu is 1400, wanted 1500; vlan is native 10 trunk 20,30-39, wanted none;
  its process 12 has ended
tap2: its tap is gone: it is of an earlier boot
"""


def test_a_table() -> None:
    vlan = Vlan(10, (20, *range(30, 40)))
    table = as_table(
        [
            Row("tap0", "ok", bridge="br0", network="lan", mtu=1500, vm="web1", pid=4711),
            Row(
                "tap1",
                "differs",
                bridge="br-int",
                network="sw",
                mtu=1400,
                vlan=vlan,
                differences=(
                    Difference("mtu", "1500", "1400"),
                    Difference("vlan", "none", "native 10 trunk 20,30-39"),
                ),
                because="its process 12 has ended",
            ),
            Row(
                "tap2",
                "stale",
                bridge="br-int",
                network="sw",
                vlan=Vlan(100),
                pid=12,
                vm="web2",
                because="its tap is gone: it is of an earlier boot",
            ),
            Row("tap10", None, mtu=1500),
        ]
    )
    assert table == TABLE


def test_no_tap_is_said() -> None:
    assert as_table([]) == "no taps\n"


LONG = [
    ("long", "abcdefghijklmno", "n" * 63, "v" * 200),
    ("wide", "abcdefghijklmno", "n" * 63, "客" * 90),
    ("escapes", "\udcff" * 15, "n", "\x1b[31m\u202e" * 9),
    ("blanks", "tap0", "n", "a b " * 60),
    ("short", "t", "n", "v"),
]


@pytest.mark.parametrize("columns", [60, 80, 132])
@pytest.mark.parametrize(("tap", "network", "vm"), [r[1:] for r in LONG], ids=[r[0] for r in LONG])
def test_whatever_the_names_it_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, tap: str, network: str, vm: str, columns: int
) -> None:
    monkeypatch.setattr(answer, "terminal", lambda: columns)
    odd = tuple(range(1, 4000, 2))
    row = Row(
        tap,
        "elsewhere",
        bridge="b" * 15,
        network=network,
        mtu=65521,
        pid=4194304,
        vm=vm,
        vlan=Vlan(None, odd),
        differences=(Difference("vlan", vm, network),),
        because=vm,
    )
    for text in (as_table([row, Row("tap0", "ok")]), as_list(row)):
        for line in text.splitlines():
            assert width(line) <= columns, line
            assert line.isprintable(), ascii(line)
    # What the table cuts stands whole below it.
    below = as_table([row]).partition("\n\n")[2].replace("\n  ", "").replace(" ", "")
    if "~" in as_table([row]).partition("\n\n")[0]:
        assert network in below and "3997,3999" in below


def on_terminal(argv: list[str], env: dict[str, str], columns: int) -> list[str]:
    """Run a program with a terminal of so many columns as its standard output; return the lines."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=theirs) as process:
        os.close(theirs)
        text = b""
        try:
            while data := os.read(ours, 65536):
                text += data
        except OSError as error:
            # The last who had the other end has gone; see tty_ioctl(4).
            if error.errno != errno.EIO:
                raise
        os.close(ours)
    assert process.returncode == 0
    return text.decode().splitlines()


def test_a_table_is_as_wide_as_the_terminal_and_whole_in_a_pipe(
    netns: Namespace, hooks: Hooks
) -> None:
    network = "a-network-whose-name-is-as-long-as-that-of-a-network-may-well-be"[:63]
    hooks.write_policy(
        f"version: 1\nnetworks: {{{network}: {{bridge: br0}}}}\n"
        f"rules: [{{tap: '*', network: {network}}}]\n"
    )
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    with netns.tap("web0") as tap:
        assert hooks.up("web0").returncode == 0
        env = {**hooks.environ(), "PYQEMU_IFUP_POLICY": str(hooks.policy)}
        seen = {
            columns: on_terminal(hooks.argv("pyqemu-ifctl", "status"), env, columns)
            for columns in (60, 80, 200, 0)
        }
        piped = hooks.ctl("status").stdout.splitlines()
        assert hooks.down("web0").returncode == 0
        tap.close()
    netns.ip("link", "del", "br0")
    for columns in (60, 80):
        _head, row, *below = seen[columns]
        assert width(row) <= columns and row.count("~") == 1
        assert network in "".join(line.strip() for line in below)
    assert len(seen[60][1]) < len(seen[80][1]) and seen[0] == seen[80], "0: it does not say"
    assert seen[200] == piped and len(piped) == 2
    assert network in piped[1]


LIST = """\
tap          tap0
state        differs
ifindex      7
kind         linux
bridge       br0
network      lan
mtu          1400
mac          fe:54:00:aa:bb:cc
vlan         -
isolated     false
vm           web1
pid          -
differences  mtu is 1400, wanted 1500
"""


def test_one_tap_as_a_list() -> None:
    (row,) = rows(system(replace(ON_LAN, mtu=1400)), lambda tap, mark: LAN_PORT)
    assert as_list(row) == LIST


POLICY = """\
version: 1
networks: {lan: {bridge: br0}, dmz: {bridge: br1}}
rules:
  - {netdev: n0, vm: web*, network: lan}
  - {tap: by-rule*, network: dmz}
"""


@pytest.fixture
def policy() -> Policy:
    return parse_policy([Source("policy.yaml", POLICY.encode())])


@contextmanager
def qemu(*words: str) -> Iterator[Mark]:
    """Run a process with QEMU's command line and yield the mark of a tap that it has."""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", "import sys; print(flush=True); sys.stdin.read()", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        start = process_start(process.pid)
        assert start is not None
        yield replace(LAN, pid=process.pid, start=start)


def network_of(want: Port | Deny | Leave | Unsaid | None) -> str | None:
    assert isinstance(want, Port | Deny | None)
    return want.network if isinstance(want, Port) else want.because if want else None


def test_what_is_wanted_depends_on_the_mark_alone(policy: Policy) -> None:
    """The process may say what it likes, and may have ended."""
    said = replace(LAN, netdev="n0")
    with qemu("-name", "db1", "-netdev", "tap,id=n1,ifname=tap0") as living:
        for mark in (said, replace(said, pid=living.pid, start=living.start)):
            assert network_of(wanted(policy, "tap0", mark)) == "lan"
            assert network_of(wanted(policy, "tap0", replace(mark, vm="db1"))) == "no rule matches"
            assert network_of(wanted(policy, "by-rule1", replace(mark, vm=""))) == "dmz"
    with qemu("-name", "web1", "-netdev", "tap,id=n0,ifname=tap0") as living:
        assert network_of(wanted(policy, "tap0", replace(living, vm="db1"))) == "no rule matches"


@pytest.mark.parametrize(
    ("unsaid", "asked"),
    [({"netdev"}, "netdev"), ({"vm"}, "vm"), ({"vm", "netdev", "user"}, "vm and netdev")],
)
def test_a_rule_that_asks_for_what_the_mark_does_not_say(
    policy: Policy, unsaid: set[str], asked: str
) -> None:
    mark = replace(LAN, netdev=None if "netdev" in unsaid else "n0", unsaid=frozenset(unsaid))
    want = wanted(policy, "tap0", mark)
    assert isinstance(want, Unsaid)
    assert str(want) == (
        f"left on network lan: the rule at policy.yaml:4 asks for {asked}, which the tap's mark "
        "does not say; start its QEMU anew"
    )
    # What it does say may be enough.
    assert network_of(wanted(policy, "tap0", replace(mark, by_name=True))) == "lan"
    if "vm" not in unsaid:
        assert network_of(wanted(policy, "tap0", replace(mark, vm="db1"))) == "no rule matches"


def test_a_lost_mark_may_have_told_of_a_network_s_own_name(policy: Policy) -> None:
    mark = replace(LAN, unsaid=frozenset({"by"}), netdev="n0")
    assert network_of(wanted(policy, "tap0", mark)) == "lan"
    assert isinstance(wanted(policy, "by-rule1", replace(mark, vm="db1")), Unsaid)


def test_what_is_wanted_by_the_hook_s_own_name(policy: Policy) -> None:
    words = "tap,id=n0,ifname=tap0,script=/usr/local/bin/pyqemu-ifup@dmz"
    with qemu("-name", "web1", "-netdev", words) as living:
        said = replace(living, netdev="n0", by_name=True)
        assert network_of(wanted(policy, "tap0", replace(said, by_name=False))) == "lan"
        assert network_of(wanted(policy, "tap0", replace(said, network="dmz"))) == "dmz"
        assert network_of(wanted(policy, "tap0", replace(said, network="gone"))) == (
            "network gone: the policy does not define it; the networks are lan, dmz"
        )


# ---------------------------------------------------------------------------- on the real thing


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path) -> Hooks:
    return Hooks(tmp_path / "hooks", netns=netns.name)


def write_policy(hooks: Hooks, ovs: OpenVSwitch, lan: str = "", more: str = "") -> None:
    hooks.write_policy(
        "version: 1\n"
        "networks:\n"
        f"  lan: {{bridge: br0{lan}}}\n"
        f"  sw: {{bridge: br-int, ovsdb: '{ovs.db}', vlan: 100}}\n{more}"
        "rules: [{tap: web*, network: lan}, {tap: sw*, network: sw}]\n"
    )


def add_row(ovs: OpenVSwitch, name: str, **ids: str) -> None:
    """Add a port of ours that another up has left, by its external_ids."""
    here = find_here()
    pairs = {
        "pyqemu-ifup": "1",
        "pyqemu-network": "sw",
        "pyqemu-ifindex": "99",
        "pyqemu-boot-id": here.boot_id,
        "pyqemu-netns": "1:1",
        **{key.replace("_", "-"): value for key, value in ids.items()},
    }
    # NOTE: without a device of the name, newer ones end with 65, the row committed.
    ovs.vsctl(
        "add-port",
        "br-int",
        name,
        "--",
        "set",
        "Interface",
        name,
        *(f'external_ids:{key}="{value}"' for key, value in pairs.items()),
        check=False,
    )
    assert ovs.find("Interface", name) is not None


def states(hooks: Hooks, *words: str) -> dict[str, str]:
    return {row["tap"]: row["state"] for row in hooks.ctl_json("status", *words)["taps"]}


@pytest.fixture
def bridges(netns: Namespace, ovs: OpenVSwitch) -> Iterator[None]:
    """A Linux bridge br0 and an Open vSwitch bridge br-int, made before the test's snapshot."""
    netns.ip("link", "add", "br0", "up", "type", "bridge")
    # NOTE: a bridge keeps an MTU that has been set, and it counts as set when it changes.
    for mtu in ("1400", "1500"):
        netns.ip("link", "set", "br0", "address", "52:54:00:00:00:01", "mtu", mtu, "up")
    ovs.add_bridge("br-int", mtu=1500)
    yield
    netns.ip("link", "del", "br0")
    ovs.vsctl("del-br", "br-int")


@pytest.mark.usefixtures("bridges")
def test_every_state_for_real(netns: Namespace, ovs: OpenVSwitch, hooks: Hooks) -> None:
    write_policy(hooks, ovs)
    taps = {name: netns.tap(name) for name in ("web0", "web1", "sw0", "sw1", "a", "b", "c")}
    for name in ("web0", "web1", "sw0", "sw1"):
        done = hooks.up(name)
        assert done.returncode == 0, done.stderr
    taps["sw1"].close()
    netns.ip("link", "set", "web1", "mtu", "1400")
    netns.ip("link", "set", "dev", "b", "master", "br0")
    ovs.add_port("br-int", "c")
    add_row(ovs, "x", vm_name="web7", vm_pid="77")
    try:
        done = hooks.ctl("status")
        codes = [
            hooks.ctl("status", "--exit-code", *tap).returncode
            for tap in ((), ("a",), ("b",), ("sw0",), ("sw1",), ("web1",), ("x",))
        ]
        one = hooks.ctl("status", "sw0")
        tables = hooks.ctl_json("status")
        gone, none = hooks.ctl("status", "sw1"), hooks.ctl("status", "y")
        run_told(hooks, " ".join(done.stdout.split()))
        assert "sw1" not in states(hooks)
    finally:
        for name in ("c", "x"):
            ovs.del_port(name)
        for tap in taps.values():
            tap.close()
        assert hooks.ctl("gc").returncode == 0
    assert (done.returncode, done.stderr) == (0, "")
    pid = os.getpid()
    lines = done.stdout.splitlines()
    index = next(r["ifindex"] for r in tables["taps"] if r["tap"] == "sw0") + 1
    assert [line.split() for line in lines[:9]] == [
        ["TAP", "STATE", "BRIDGE", "NETWORK", "VLAN", "MTU", "PID", "VM"],
        ["a", "loose", "-", "-", "-", "1500", "-", "-"],
        ["b", "foreign", "br0", "-", "-", "1500", "-", "-"],
        ["c", "foreign", "br-int", "-", "trunk", "1-4094", "1500", "-", "-"],
        ["sw0", "ok", "br-int", "sw", "100", "1500", str(pid), "-"],
        ["sw1", "stale", "br-int", "sw", "100", "-", str(pid), "-"],
        ["web0", "ok", "br0", "lan", "-", "1500", str(pid), "-"],
        ["web1", "differs", "br0", "lan", "-", "1400", str(pid), "-"],
        ["x", "elsewhere", "br-int", "sw", "trunk", "1-4094", "-", "77", "web7"],
    ]
    assert lines[9] == "" and " ".join(" ".join(lines[10:]).split()) == (
        f"sw1: its tap is gone: no link sw1 with ifindex {index}; pyqemu-ifctl gc removes it "
        "web1: mtu is 1400, wanted 1500 "
        "x: it is of another network namespace"
    )
    assert codes == [1, 0, 0, 0, 1, 1, 0]
    assert one.returncode == 0 and one.stdout.startswith("tap          sw0\nstate        ok\n")
    assert gone.returncode == 0 and "\nstate        stale\n" in gone.stdout
    assert (none.returncode, none.stdout, none.stderr) == (
        69,
        "",
        "pyqemu-ifctl: no tap of this network namespace, and nothing of ours, is called "
        "y; pyqemu-ifctl status lists them all\n",
    )


@pytest.mark.usefixtures("bridges")
def test_what_the_policy_says_now(netns: Namespace, ovs: OpenVSwitch, hooks: Hooks) -> None:
    write_policy(hooks, ovs)
    taps = [netns.tap(name) for name in ("web0", "sw0")]
    for tap in taps:
        assert hooks.up(tap.name).returncode == 0
    try:
        assert states(hooks) == {"web0": "ok", "sw0": "ok"}
        write_policy(hooks, ovs, lan=", mtu: 1400, isolated: true")
        now = hooks.ctl_json("status", "web0")["taps"][0]
        hooks.write_policy("version: 1\nbridge: br0\n")
        invalid = hooks.ctl("status")
        assert hooks.ctl("status", "--exit-code").returncode == 65
        parsed = hooks.ctl_json("status")
        hooks.policy.unlink()
        absent = hooks.ctl("status")
        unknown = hooks.ctl("status", "--exit-code")
    finally:
        write_policy(hooks, ovs)
        for tap in taps:
            assert hooks.down(tap.name).returncode == 0
            tap.close()
    assert (now["state"], now["differences"]) == (
        "differs",
        [
            {"setting": "isolated", "wanted": "true", "is": "false", "because": None},
            {"setting": "mtu", "wanted": "1400", "is": "1500", "because": None},
        ],
    )
    assert invalid.returncode == 0
    assert [line.split()[:3] for line in invalid.stdout.splitlines()[1:]] == [
        ["sw0", "ok", "br-int"],
        ["web0", "ok", "br0"],
    ]
    assert invalid.stderr == (
        f"pyqemu-ifctl: what is wanted is not known: policy invalid: {hooks.policy}:2:1: the "
        "policy has no key bridge; bridge belongs to a network; run pyqemu-ifctl check\n"
    )
    assert [row["differences"] for row in parsed["taps"]] == [None, None]
    assert (absent.returncode, unknown.returncode) == (0, 66)
    assert absent.stderr == (
        f"pyqemu-ifctl: what is wanted is not known: {hooks.policy}: it does not exist\n"
    )


@pytest.mark.usefixtures("bridges")
@pytest.mark.parametrize("fault", ["dead", "mute"])
def test_a_database_that_fails_does_not_hide_the_rest(
    netns: Namespace, ovs: OpenVSwitch, hooks: Hooks, fault: str
) -> None:
    write_policy(hooks, ovs)
    taps = [netns.tap(name) for name in ("web0", "sw0", "a")]
    for tap in taps[:2]:
        assert hooks.up(tap.name).returncode == 0
    if fault == "mute":
        ovs.server.stop()
    else:
        ovs.server.kill()
    try:
        done, gc = hooks.ctl("status", "--exit-code"), hooks.ctl("gc")
    finally:
        if fault == "mute":
            ovs.server.cont()
        else:
            (ovs.dir / "db.sock").unlink()
            ovs.start_server()
        for tap in taps:
            assert hooks.down(tap.name).returncode == 0
            tap.close()
    assert done.returncode == gc.returncode == (75 if fault == "mute" else 69)
    # NOTE: on the userspace datapath br-int is a tap, known as Open vSwitch's by its row alone.
    table = [line.split()[:3] for line in done.stdout.split("\n\n")[0].splitlines()[1:]]
    assert [words for words in table if words[0] != "br-int"] == [
        ["a", "?", "-"],
        ["sw0", "?", "br-int"],
        ["web0", "ok", "br0"],
    ]
    assert done.stderr.count("\n") == gc.stderr.count("\n") == 1
    assert ovs.db in done.stderr and ovs.db in gc.stderr
    assert "timeout:" not in done.stderr


def test_names_and_aliases_of_any_bytes(netns: Namespace, hooks: Hooks) -> None:
    hooks.write_policy("version: 1\nnetworks: {lan: {bridge: br0}}\n")
    with netns.enter():
        subprocess.run([b"ip", b"tuntap", b"add", b"mode", b"tap", b"name", b"a\xffb"], check=True)
        subprocess.run([b"ip", b"link", b"set", b"a\xffb", b"alias", b"\xfe\xc3\xbc"], check=True)
    try:
        done, parsed = hooks.ctl("status"), hooks.ctl_json("status")
    finally:
        with netns.enter():
            subprocess.run([b"ip", b"link", b"del", b"dev", b"a\xffb"], check=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[:2] == ["a\\udcffb", "loose"]
    assert parsed["taps"][0]["tap"] == "a?b"


@pytest.mark.parametrize("words", [("status", "--watch"), ("apply",)])
def test_an_exit_code_that_nobody_would_see(hooks: Hooks, words: tuple[str, ...]) -> None:
    done = hooks.ctl(*words, "--exit-code")
    assert (done.returncode, done.stdout) == (64, "")
    assert "--exit-code" in done.stderr


def test_nothing_to_show(netns: Namespace, hooks: Hooks) -> None:
    hooks.write_policy("version: 1\nnetworks: {lan: {bridge: br0}}\n")
    assert hooks.ctl("status").stdout == "no taps\n"
    assert hooks.ctl_json("status") == {"version": 1, "taps": []}
