"""From wanted and seen to steps, as tables; nothing here touches the system."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyqemu_ifup.mark
from lab.ports import giving
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB, BridgePlace
from pyqemu_ifconf.kinds.linux import LinuxPlace
from pyqemu_ifconf.kinds.openvswitch import OvsPlace
from pyqemu_ifconf.policy import Caller, Kind, Port, Position, Vlan
from pyqemu_ifup import kinds
from pyqemu_ifup.claims import refuse_foreign_ports, refuse_shared, refuse_strangers
from pyqemu_ifup.drivers.links import NO_ADDRESS
from pyqemu_ifup.holder import Holder
from pyqemu_ifup.kinds.base import TapKind
from pyqemu_ifup.kinds.linux import JoinBridge, LeaveBridge, SetIsolated, SetVlans
from pyqemu_ifup.kinds.openvswitch import AddPort, DelPort, vlan_columns, vlan_of_columns
from pyqemu_ifup.look import Link, OvsPort, Seen, Vid, ranges, show_vlan, vlan_of_vids, wanted_vids
from pyqemu_ifup.mark import (
    ALIAS_MAX,
    Here,
    Mark,
    Was,
    find_here,
    format_alias,
    is_alive,
    is_anothers,
    parse_alias,
    row_ids,
)
from pyqemu_ifup.ops import Op, SetAlias, SetDown, SetIpv6, SetMac, SetMtu, SetTxQueueLen, SetUp
from pyqemu_ifup.plan import (
    check_bridge_mtu,
    differences,
    plan_down,
    plan_leave,
    plan_undo,
    plan_up,
)

pytestmark = pytest.mark.each_python

HERE = Here("boot-1", "4:7")
PLACE = Position("/etc/pyqemu-ifup/policy.yaml", 7, 5)
PORT = Port("web0", "lan", BridgePlace("br0"), PLACE)
ON_LINUX = replace(PORT, place=LinuxPlace("br0"))
OVS_PORT = replace(PORT, place=OvsPlace("br0"))
VLAN = Vlan(100)
NATIVE = Vlan(10, (20, 30, 31))

MARK = Mark("lan", "linux", "br0", "web", 42, 4200, rule="p.yaml:7")
OVS_MARK = replace(MARK, kind="openvswitch", ovsdb=DEFAULT_OVSDB)
ALIAS = "pyqemu-ifup/1 network=lan kind=linux bridge=br0 pid=42 start=4200 rule=p.yaml:7 vm=web"
OVS_ALIAS = (
    "pyqemu-ifup/1 network=lan kind=openvswitch bridge=br0 pid=42 start=4200 rule=p.yaml:7 "
    "ovsdb=unix:/run/openvswitch/db.sock vm=web"
)
OLD_ALIAS = "pyqemu-ifup/1 network=lan kind=linux bridge=br0 vm=web pid=42 start=4200"
"""As the marks were before they told the rule."""

TAP = Link(
    7,
    "web0",
    "tun",
    tap=True,
    up=False,
    mtu=1500,
    mac="16:00:00:00:00:07",
    txqueuelen=1000,
    master=None,
    alias="",
    carrier=True,
    ipv6_disabled=False,
    addrgenmode=0,
)
BRIDGE = replace(
    TAP,
    index=3,
    name="br0",
    kind="bridge",
    tap=False,
    up=True,
    mac="02:00:00:00:00:03",
    vlan_filtering=False,
    default_pvid=1,
)
FILTERING = replace(BRIDGE, vlan_filtering=True)
NO_PVID = replace(FILTERING, default_pvid=0)
NO_KERNEL = replace(BRIDGE, vlan_filtering=None, default_pvid=None)
OVS_BRIDGE = replace(BRIDGE, kind="openvswitch", vlan_filtering=None, default_pvid=None)
OVS_SYSTEM = replace(OVS_BRIDGE, index=2, name="ovs-system")

FRESH = Seen(TAP, bridge=BRIDGE)
OVS_FRESH = Seen(TAP, bridge=OVS_BRIDGE, ovs_bridges=(DEFAULT_OVSDB,))

IDS = row_ids(OVS_MARK, 7, HERE)
ROW = OvsPort(
    DEFAULT_OVSDB,
    "br0",
    "web0",
    tag=None,
    trunks=(),
    vlan_mode="access",
    protected=False,
    transient=True,
    external_ids=tuple(sorted(IDS.items())),
    ofport=4,
    error=None,
    ifindex=7,
    link_state="up",
)
DEL_ROW = DelPort(DEFAULT_OVSDB, "br0", "web0", ROW.external_ids)

DONE = replace(
    TAP,
    up=True,
    mac="fe:00:00:00:00:07",
    alias=ALIAS,
    master=3,
    isolated=False,
    ipv6_disabled=True,
    addrgenmode=NO_ADDRESS,
)
ATTACHED = Seen(DONE, master=BRIDGE, bridge=BRIDGE)
OVS_DONE = replace(DONE, alias=OVS_ALIAS, master=2, isolated=None)
OVS_ATTACHED = replace(OVS_FRESH, tap=OVS_DONE, master=OVS_SYSTEM, ports=(ROW,))

# The steps that are the same for nearly all, in their order.
DOWN, UP = SetDown("web0", 7), SetUp("web0", 7)
SET_MARK, UNMARK = SetAlias("web0", 7, ALIAS), SetAlias("web0", 7, "")
MAC, MTU = SetMac("web0", 7, "fe:00:00:00:00:07"), SetMtu("web0", 7, 1500)
IPV6 = SetIpv6("web0", 7, True, NO_ADDRESS)
JOIN, LEAVE = JoinBridge("web0", 7, "br0", 3), LeaveBridge("web0", 7, "br0")
BEGIN, END = (SET_MARK, MAC, MTU, IPV6), (UP,)
LINUX, OVS = kinds.load("linux"), kinds.load("openvswitch")


def vlans(*vids: Vid) -> SetVlans:
    return SetVlans("web0", 7, vids)


def seen(seen: Seen, **tap: Any) -> Seen:
    assert seen.tap is not None
    return replace(seen, tap=replace(seen.tap, **tap))


ACCESS = Vid(100, pvid=True, untagged=True)
FILTERS = replace(FRESH, bridge=FILTERING)
LINUX_PLANS: list[tuple[str, Port, Seen, tuple[Op, ...]]] = [
    ("bare", PORT, FRESH, (*BEGIN, JOIN, *END)),
    ("kind given", ON_LINUX, FRESH, (*BEGIN, JOIN, *END)),
    ("no filtering in the kernel", PORT, replace(FRESH, bridge=NO_KERNEL), (*BEGIN, JOIN, *END)),
    (
        "isolated",
        giving(PORT, isolated=True),
        FRESH,
        (*BEGIN, JOIN, SetIsolated("web0", 7, True), *END),
    ),
    (
        "mtu",
        giving(PORT, mtu=9000),
        FRESH,
        (SET_MARK, MAC, SetMtu("web0", 7, 9000), IPV6, JOIN, *END),
    ),
    (
        "the bridge's mtu",
        PORT,
        replace(FRESH, bridge=replace(BRIDGE, mtu=8950)),
        (SET_MARK, MAC, SetMtu("web0", 7, 8950), IPV6, JOIN, *END),
    ),
    (
        "txqueuelen",
        giving(PORT, txqueuelen=0),
        FRESH,
        (SET_MARK, MAC, MTU, SetTxQueueLen("web0", 7, 0), IPV6, JOIN, *END),
    ),
    (
        "no IPv6 in the kernel",
        PORT,
        seen(FRESH, ipv6_disabled=None, addrgenmode=None),
        (SET_MARK, MAC, MTU, JOIN, *END),
    ),
    (
        "IPv6 off already",
        PORT,
        seen(FRESH, ipv6_disabled=True, addrgenmode=NO_ADDRESS),
        (SET_MARK, MAC, MTU, JOIN, *END),
    ),
    (
        "its switch is off already",
        PORT,
        seen(FRESH, ipv6_disabled=True),
        (SET_MARK, MAC, MTU, SetIpv6("web0", 7, None, NO_ADDRESS), JOIN, *END),
    ),
    (
        "no address by itself already",
        PORT,
        seen(FRESH, addrgenmode=NO_ADDRESS),
        (SET_MARK, MAC, MTU, SetIpv6("web0", 7, True, None), JOIN, *END),
    ),
    (
        "/proc/sys is read-only",
        PORT,
        replace(FRESH, sysctl=False),
        (SET_MARK, MAC, MTU, SetIpv6("web0", 7, None, NO_ADDRESS), JOIN, *END),
    ),
    (
        "/proc/sys is read-only, once more",
        PORT,
        replace(seen(FRESH, addrgenmode=NO_ADDRESS), sysctl=False),
        (SET_MARK, MAC, MTU, JOIN, *END),
    ),
    (
        "too small for IPv6",
        giving(PORT, mtu=1279),
        FRESH,
        (SET_MARK, MAC, SetMtu("web0", 7, 1279), JOIN, *END),
    ),
    (
        "was too small for IPv6",
        PORT,
        seen(FRESH, mtu=68, ipv6_disabled=None, addrgenmode=None),
        (*BEGIN, JOIN, *END),
    ),
    (
        "its MAC is high already",
        PORT,
        seen(FRESH, mac="fe:00:00:00:00:07"),
        (SET_MARK, MTU, IPV6, JOIN, *END),
    ),
    ("up: down first", PORT, seen(FRESH, up=True), (SET_MARK, DOWN, MAC, MTU, IPV6, JOIN, *END)),
    ("again", PORT, ATTACHED, (DOWN, LEAVE, SET_MARK, MTU, JOIN, *END)),
    (
        "moved from another bridge of ours",
        PORT,
        replace(
            seen(ATTACHED, alias=ALIAS.replace("br0", "br1")),
            master=replace(BRIDGE, index=4, name="br1"),
        ),
        (DOWN, LeaveBridge("web0", 7, "br1"), SET_MARK, MTU, JOIN, *END),
    ),
    (
        "moved from Open vSwitch",
        PORT,
        replace(OVS_ATTACHED, bridge=BRIDGE),
        (DOWN, DEL_ROW, DOWN, SET_MARK, MTU, JOIN, *END),
    ),
    (
        "a stale row of ours",
        PORT,
        replace(FRESH, ports=(ROW,)),
        (SET_MARK, DEL_ROW, DOWN, MAC, MTU, IPV6, JOIN, *END),
    ),
    (
        "filtering: the bridge's PVID",
        PORT,
        FILTERS,
        (*BEGIN, JOIN, vlans(Vid(1, True, True)), *END),
    ),
    (
        "filtering, its PVID is 7",
        PORT,
        replace(FRESH, bridge=replace(FILTERING, default_pvid=7)),
        (*BEGIN, JOIN, vlans(Vid(7, True, True)), *END),
    ),
    ("vlan", giving(PORT, vlan=VLAN), FILTERS, (*BEGIN, JOIN, vlans(ACCESS), *END)),
    (
        "vlan, no default PVID",
        giving(PORT, vlan=VLAN),
        replace(FRESH, bridge=NO_PVID),
        (*BEGIN, JOIN, vlans(ACCESS), *END),
    ),
    (
        "trunk",
        giving(PORT, vlan=Vlan(None, (20, 30))),
        FILTERS,
        (*BEGIN, JOIN, vlans(Vid(20), Vid(30)), *END),
    ),
    (
        "native and trunk, isolated",
        giving(PORT, vlan=Vlan(20, (10, 20)), isolated=True),
        FILTERS,
        (*BEGIN, JOIN, vlans(Vid(10), Vid(20, True, True)), SetIsolated("web0", 7, True), *END),
    ),
]


@pytest.mark.parametrize(
    ("port", "found", "plan"), [row[1:] for row in LINUX_PLANS], ids=[row[0] for row in LINUX_PLANS]
)
def test_up_on_a_linux_bridge(port: Port, found: Seen, plan: tuple[Op, ...]) -> None:
    assert plan_up(port, LINUX, found, MARK, HERE) == plan


OVS_BEGIN = (SetAlias("web0", 7, OVS_ALIAS), MAC, MTU, IPV6)


def add(vlan: Vlan | None = None, protected: bool = False, **more: str) -> AddPort:
    ids = tuple(sorted({**IDS, **more}.items()))
    return AddPort(DEFAULT_OVSDB, "br0", "web0", 7, vlan, protected, ids)


OVS_PLANS: list[tuple[str, Port, Seen, tuple[Op, ...]]] = [
    ("bare", OVS_PORT, OVS_FRESH, (*OVS_BEGIN, add(), *END)),
    ("vlan", giving(OVS_PORT, vlan=VLAN), OVS_FRESH, (*OVS_BEGIN, add(VLAN), *END)),
    (
        "native and trunk, isolated",
        giving(OVS_PORT, vlan=NATIVE, isolated=True),
        OVS_FRESH,
        (*OVS_BEGIN, add(NATIVE, True), *END),
    ),
    (
        "external_ids",
        giving(OVS_PORT, external_ids=(("team", "a"),)),
        OVS_FRESH,
        (*OVS_BEGIN, add(team="a"), *END),
    ),
    (
        "external_ids do not change our mark",
        giving(OVS_PORT, external_ids=(("pyqemu-ifindex", "8"),)),
        OVS_FRESH,
        (*OVS_BEGIN, add(), *END),
    ),
    (
        "mtu, with no bridge to see",
        giving(OVS_PORT, mtu=1400),
        replace(OVS_FRESH, bridge=None),
        (OVS_BEGIN[0], MAC, SetMtu("web0", 7, 1400), IPV6, add(), *END),
    ),
    ("again", OVS_PORT, OVS_ATTACHED, (DOWN, DEL_ROW, DOWN, OVS_BEGIN[0], MTU, add(), *END)),
    (
        "rows in two databases",
        OVS_PORT,
        replace(OVS_ATTACHED, ports=(ROW, replace(ROW, ovsdb="unix:/other", bridge=None))),
        (
            DOWN,
            DEL_ROW,
            replace(DEL_ROW, ovsdb="unix:/other", bridge=None),
            DOWN,
            OVS_BEGIN[0],
            MTU,
            add(),
            *END,
        ),
    ),
    (
        "moved from a Linux bridge",
        OVS_PORT,
        replace(ATTACHED, bridge=OVS_BRIDGE, master=replace(BRIDGE, name="br0")),
        (DOWN, LEAVE, OVS_BEGIN[0], MTU, add(), *END),
    ),
]


@pytest.mark.parametrize(
    ("port", "found", "plan"), [row[1:] for row in OVS_PLANS], ids=[row[0] for row in OVS_PLANS]
)
def test_up_on_open_vswitch(port: Port, found: Seen, plan: tuple[Op, ...]) -> None:
    assert plan_up(port, OVS, found, OVS_MARK, HERE) == plan


@pytest.mark.parametrize(
    ("row", "kind", "mark"),
    [(row, LINUX, MARK) for row in LINUX_PLANS] + [(row, OVS, OVS_MARK) for row in OVS_PLANS],
    ids=[f"Linux bridge, {row[0]}" for row in LINUX_PLANS]
    + [f"Open vSwitch, {row[0]}" for row in OVS_PLANS],
)
def test_the_link_comes_up_last_and_only_when_proven(
    row: tuple[str, Port, Seen, tuple[Op, ...]], kind: TapKind, mark: Mark
) -> None:
    _, port, found, _ = row
    plan = plan_up(port, kind, found, mark, HERE)
    assert [op for op in plan if op.opens] == [plan[-1]] == [UP]
    joins = [i for i, op in enumerate(plan) if isinstance(op, JoinBridge | AddPort)]
    assert len(joins) == 1
    downs = [i for i, op in enumerate(plan) if isinstance(op, SetDown)]
    if found.tap is not None and found.tap.up:
        assert downs and downs[0] < joins[0]
    # Only what a switch port has of its own comes after the joining.
    after = plan[joins[0] + 1 : -1]
    assert all(isinstance(op, SetVlans | SetIsolated) for op in after)


@pytest.mark.parametrize("row", LINUX_PLANS, ids=[row[0] for row in LINUX_PLANS])
def test_the_mark_is_there_from_the_first_change_to_the_last(
    row: tuple[str, Port, Seen, tuple[Op, ...]],
) -> None:
    _, port, found, _ = row
    assert found.tap is not None
    state = simulate(found, plan_up(port, LINUX, found, MARK, HERE))
    assert all(each.tap is not None and each.tap.mark is not None for each in state[1:])


def simulate(found: Seen, plan: tuple[Op, ...]) -> list[Seen]:
    """Return what is seen before the plan and after each of its ops, on a Linux bridge."""
    states = [found]
    masters = {link.index: link for link in (found.master, found.bridge) if link is not None}
    for op in plan:
        now = states[-1]
        tap = now.tap
        assert tap is not None
        if isinstance(op, SetAlias):
            now = seen(now, alias=op.alias)
        elif isinstance(op, SetDown | SetUp):
            now = seen(now, up=isinstance(op, SetUp))
        elif isinstance(op, SetMac):
            now = seen(now, mac=op.mac)
        elif isinstance(op, SetMtu):
            old, now = now, seen(now, mtu=op.mtu)
            if op.mtu < 1280:
                now = seen(now, ipv6_disabled=None, addrgenmode=None)
            elif old.tap is not None and old.tap.mtu < 1280:
                now = seen(now, ipv6_disabled=False, addrgenmode=0)
        elif isinstance(op, SetTxQueueLen):
            now = seen(now, txqueuelen=op.length)
        elif isinstance(op, SetIpv6):
            if op.disabled is not None:
                now = seen(now, ipv6_disabled=op.disabled)
            if op.addrgenmode is not None:
                now = seen(now, addrgenmode=op.addrgenmode)
        elif isinstance(op, JoinBridge):
            now = replace(seen(now, master=op.master, isolated=False), master=masters[op.master])
            if now.bridge is not None and now.bridge.vlan_filtering and now.bridge.default_pvid:
                now = replace(now, vids=wanted_vids(Vlan(now.bridge.default_pvid)))
        elif isinstance(op, LeaveBridge):
            now = replace(seen(now, master=None, isolated=None), master=None, vids=())
        elif isinstance(op, SetVlans):
            now = replace(now, vids=op.vids)
        elif isinstance(op, SetIsolated):
            now = seen(now, isolated=op.isolated)
        elif isinstance(op, DelPort):
            now = replace(
                seen(now, master=None),
                ports=(),
                master=None if now.master and now.master.kind == "openvswitch" else now.master,
            )
        states.append(now)
    return states


@pytest.mark.parametrize("row", LINUX_PLANS, ids=[row[0] for row in LINUX_PLANS])
def test_undo_from_the_state_after_every_op(row: tuple[str, Port, Seen, tuple[Op, ...]]) -> None:
    _, _port, before, plan = row
    assert before.tap is not None
    for now in simulate(before, plan):
        after = simulate(now, plan_undo(before, now, HERE))[-1]
        clean = seen(before, up=False, master=None, isolated=None, alias="")
        assert after == replace(clean, master=None, ports=())


@pytest.mark.parametrize("row", LINUX_PLANS, ids=[row[0] for row in LINUX_PLANS])
def test_up_again_from_the_state_after_every_op_is_never_refused(
    row: tuple[str, Port, Seen, tuple[Op, ...]],
) -> None:
    # NOTE: as when the hook is killed there.
    _, port, before, plan = row
    whole = simulate(before, plan)[-1]
    for now in simulate(before, plan):
        refuse_strangers("web0", now, parent=1)
        assert simulate(now, plan_up(port, LINUX, now, MARK, HERE))[-1] == whole


@pytest.mark.parametrize("row", LINUX_PLANS, ids=[row[0] for row in LINUX_PLANS])
def test_down_from_the_state_after_every_op_takes_it_all_away(
    row: tuple[str, Port, Seen, tuple[Op, ...]],
) -> None:
    _, _port, before, plan = row
    for now in simulate(before, plan)[1:]:
        steps = plan_down(now, HERE)
        after = simulate(now, steps)[-1]
        assert after.tap is not None
        assert (after.tap.alias, after.tap.master, after.tap.up) == ("", None, False)
        assert after.ports == () and after.vids == ()
        assert steps[-1] == UNMARK


@pytest.mark.parametrize(
    "now", [None, replace(TAP, index=9, up=True)], ids=["nothing", "another tap"]
)
def test_undo_of_a_tap_that_has_gone_removes_its_row_only(now: Link | None) -> None:
    older = replace(ROW, external_ids=tuple(row_ids(OVS_MARK, 6, HERE).items()))
    foreign = replace(ROW, external_ids=())
    gone = Seen(now, ports=(ROW, older, foreign))
    assert plan_undo(OVS_FRESH, gone, HERE) == (DEL_ROW,)


LEAVES: list[tuple[str, Seen, tuple[Op, ...]]] = [
    ("nothing there", Seen(None), ()),
    ("a fresh tap", FRESH, ()),
    ("a tap that is up", seen(FRESH, up=True), (DOWN,)),
    ("on a Linux bridge", ATTACHED, (DOWN, LEAVE)),
    ("on a Linux bridge, down", seen(ATTACHED, up=False), (LEAVE,)),
    ("on Open vSwitch", OVS_ATTACHED, (DOWN, DEL_ROW, DOWN)),
    ("a row without its tap", Seen(None, ports=(ROW,)), (DEL_ROW,)),
    ("a foreign row", Seen(None, ports=(replace(ROW, external_ids=()),)), ()),
    (
        "a row of another namespace",
        Seen(
            None,
            ports=(
                replace(
                    ROW,
                    external_ids=(
                        ("pyqemu-ifup", "1"),
                        ("pyqemu-boot-id", "boot-1"),
                        ("pyqemu-netns", "4:8"),
                    ),
                ),
            ),
        ),
        (),
    ),
    (
        "a row of an earlier boot",
        Seen(
            None,
            ports=(
                replace(
                    ROW,
                    external_ids=(
                        ("pyqemu-boot-id", "boot-0"),
                        ("pyqemu-ifup", "1"),
                        ("pyqemu-netns", "4:8"),
                    ),
                ),
            ),
        ),
        (
            replace(
                DEL_ROW,
                external_ids=(
                    ("pyqemu-boot-id", "boot-0"),
                    ("pyqemu-ifup", "1"),
                    ("pyqemu-netns", "4:8"),
                ),
            ),
        ),
    ),
    (
        "a row of an earlier boot of another host",
        Seen(
            None,
            ports=(
                replace(
                    ROW,
                    ovsdb="tcp:192.0.2.1:6640",
                    external_ids=(
                        ("pyqemu-boot-id", "boot-0"),
                        ("pyqemu-ifup", "1"),
                        ("pyqemu-netns", "4:8"),
                    ),
                ),
            ),
        ),
        (),
    ),
]


@pytest.mark.parametrize(
    ("found", "plan"), [row[1:] for row in LEAVES], ids=[row[0] for row in LEAVES]
)
def test_leave(found: Seen, plan: tuple[Op, ...]) -> None:
    assert plan_leave(found, HERE) == plan


DOWNS: list[tuple[str, Seen, tuple[Op, ...]]] = [
    ("nothing there", Seen(None), ()),
    ("a tap without our mark", seen(FRESH, up=True), ()),
    ("somebody else's tap on a bridge", seen(ATTACHED, alias=""), ()),
    ("a foreign alias", seen(ATTACHED, alias="uplink"), ()),
    ("attached", ATTACHED, (DOWN, LEAVE, UNMARK)),
    ("attached by a hook that was killed early", seen(FRESH, alias=ALIAS), (UNMARK,)),
    (
        "moved by somebody to another bridge",
        replace(ATTACHED, master=replace(BRIDGE, index=4, name="virbr0")),
        (UNMARK,),
    ),
    (
        "moved by somebody to a VRF",
        replace(ATTACHED, master=replace(BRIDGE, index=4, name="br0", kind="vrf")),
        (UNMARK,),
    ),
    ("on Open vSwitch", OVS_ATTACHED, (DOWN, DEL_ROW, DOWN, UNMARK)),
    ("a stale row of a fresh tap", replace(FRESH, ports=(ROW,)), (DEL_ROW,)),
    (
        "a foreign row",
        replace(ATTACHED, ports=(replace(ROW, external_ids=()),)),
        (DOWN, LEAVE, UNMARK),
    ),
]


@pytest.mark.parametrize(
    ("found", "plan"), [row[1:] for row in DOWNS], ids=[row[0] for row in DOWNS]
)
def test_down(found: Seen, plan: tuple[Op, ...]) -> None:
    assert plan_down(found, HERE) == plan


def kind_of(port: Port, found: Seen) -> object:
    return kinds.find(port, found)


def plan_linux(port: Port, found: Seen) -> object:
    return plan_up(port, LINUX, found, MARK, HERE)


def plan_ovs(port: Port, found: Seen) -> object:
    return plan_up(port, OVS, found, OVS_MARK, HERE)


def strangers(port: Port, found: Seen) -> object:
    return refuse_strangers(port.tap, found, parent=1)


def shared(port: Port, found: Seen) -> None:
    assert found.tap is not None
    refuse_shared(found.tap, 1000)


def foreign_ports(port: Port, found: Seen) -> None:
    refuse_foreign_ports(found, HERE)


def bridge_mtu(kind: Kind, before: int, after: int) -> Any:
    def check(port: Port, found: Seen) -> None:
        assert found.bridge is not None
        was = replace(found, bridge=replace(found.bridge, mtu=before))
        now = replace(found, bridge=replace(found.bridge, mtu=after))
        check_bridge_mtu(port, kinds.load(kind), was, now)

    return check


BOTH = replace(FRESH, ovs_bridges=(DEFAULT_OVSDB,))
FAILURES: list[tuple[Any, Port, Seen, Status, str]] = [
    (
        kind_of,
        PORT,
        replace(FRESH, bridge=None),
        Status.UNAVAILABLE,
        "there is no bridge br0: network lan names it; make it (ip link add name br0 up type "
        "bridge "
        "or ovs-vsctl add-br br0) or correct the policy",
    ),
    (
        kind_of,
        ON_LINUX,
        replace(FRESH, bridge=None),
        Status.UNAVAILABLE,
        "there is no bridge br0: network lan names it; make it (ip link add name br0 up type "
        "bridge) "
        "or correct the policy",
    ),
    (
        kind_of,
        giving(ON_LINUX, vlan=VLAN),
        replace(FRESH, bridge=None),
        Status.UNAVAILABLE,
        "there is no bridge br0: network lan names it; make it "
        "(ip link add name br0 up type bridge vlan_filtering 1) or correct the policy",
    ),
    (
        plan_linux,
        PORT,
        replace(FRESH, bridge=replace(BRIDGE, up=False)),
        Status.UNAVAILABLE,
        "the bridge br0 is down: it passes no frame; bring it up: ip link set dev br0 up",
    ),
    (
        kind_of,
        OVS_PORT,
        replace(FRESH, bridge=None),
        Status.UNAVAILABLE,
        "there is no bridge br0: network lan names it; make it (ovs-vsctl add-br br0) or correct "
        "the policy",
    ),
    (
        kind_of,
        PORT,
        replace(FRESH, bridge=replace(TAP, kind="veth", tap=False)),
        Status.REFUSED,
        "br0 is not a bridge: it is a veth interface; correct bridge: of network lan",
    ),
    (
        kind_of,
        ON_LINUX,
        replace(FRESH, bridge=replace(TAP, kind=None)),
        Status.REFUSED,
        "br0 is not a bridge: it is a network card; correct bridge: of network lan",
    ),
    (
        kind_of,
        PORT,
        BOTH,
        Status.REFUSED,
        "br0 is both a Linux bridge and an Open vSwitch bridge; say kind: linux or "
        "kind: openvswitch for network lan",
    ),
    (
        kind_of,
        OVS_PORT,
        FRESH,
        Status.REFUSED,
        "br0 is a Linux bridge: the policy says kind: openvswitch for network lan; correct its "
        "kind or its bridge",
    ),
    (
        kind_of,
        ON_LINUX,
        OVS_FRESH,
        Status.REFUSED,
        "br0 is an Open vSwitch bridge: the policy says kind: linux for network lan; correct its "
        "kind or its bridge",
    ),
    (
        kind_of,
        replace(PORT, place=BridgePlace("br0", "unix:/other")),
        replace(OVS_FRESH, bridge=None),
        Status.UNAVAILABLE,
        "there is no bridge br0: network lan names it; make it (ip link add name br0 up type "
        "bridge "
        "or ovs-vsctl --db=unix:/other add-br br0) or correct the policy",
    ),
    (
        strangers,
        PORT,
        Seen(None),
        Status.REFUSED,
        "there is no such tap in this network namespace; the caller must open it first, as QEMU "
        "does",
    ),
    (
        strangers,
        PORT,
        seen(FRESH, tap=False),
        Status.DENIED,
        "not a tap but a tun interface; give the name of a tap",
    ),
    (
        strangers,
        PORT,
        seen(FRESH, tap=False, kind=None),
        Status.DENIED,
        "not a tap but a network card; give the name of a tap",
    ),
    (
        strangers,
        PORT,
        seen(FRESH, alias="vm 'x'\n"),
        Status.DENIED,
        r"somebody else's tap: its alias is 'vm '\''x'\''\n'; if it is not, remove it: "
        "ip link set dev web0 alias ''",
    ),
    (
        strangers,
        PORT,
        replace(FRESH, master=replace(BRIDGE, index=9, name="br9")),
        Status.DENIED,
        "somebody else's tap: br9 holds it; if it shall go, take it out: "
        "ip link set dev web0 nomaster",
    ),
    (
        strangers,
        PORT,
        replace(FRESH, master=OVS_SYSTEM),
        Status.DENIED,
        "somebody else's tap: ovs-system holds it; if it shall go, take it out: "
        "ovs-vsctl del-port web0",
    ),
    (
        strangers,
        PORT,
        replace(ATTACHED, master=replace(BRIDGE, name="virbr0")),
        Status.DENIED,
        "somebody else's tap: virbr0 holds it; if it shall go, take it out: "
        "ip link set dev web0 nomaster",
    ),
    (
        shared,
        PORT,
        seen(FRESH, multi_queue=True, owner=1001),
        Status.DENIED,
        "shared with others: user 1001 may open a queue of this multi-queue tap too; make it anew "
        "without an owner: ip tuntap del dev web0 mode tap multi_queue",
    ),
    (
        shared,
        PORT,
        seen(FRESH, multi_queue=True, owner=1000, group=5),
        Status.DENIED,
        "shared with others: group 5 may open a queue of this multi-queue tap too; make it anew "
        "without an owner: ip tuntap del dev web0 mode tap multi_queue",
    ),
    (
        foreign_ports,
        PORT,
        replace(FRESH, ports=(replace(ROW, external_ids=()),)),
        Status.DENIED,
        "Open vSwitch has a port of this name that is not ours: on bridge br0 of "
        "unix:/run/openvswitch/db.sock; if it shall go: "
        "ovs-vsctl --db=unix:/run/openvswitch/db.sock del-port web0",
    ),
    (
        foreign_ports,
        PORT,
        replace(
            FRESH,
            ports=(
                replace(
                    ROW,
                    bridge=None,
                    external_ids=(
                        ("pyqemu-boot-id", "boot-1"),
                        ("pyqemu-ifup", "1"),
                        ("pyqemu-netns", "4:8"),
                        ("vm-name", "db"),
                    ),
                ),
            ),
        ),
        Status.DENIED,
        "Open vSwitch has a port of this name from another network namespace: on no bridge of "
        "unix:/run/openvswitch/db.sock, vm db; if it shall go: "
        "ovs-vsctl --db=unix:/run/openvswitch/db.sock del-port web0",
    ),
    (
        plan_linux,
        giving(PORT, vlan=VLAN),
        FRESH,
        Status.REFUSED,
        "br0 does not filter VLANs: vlan 100 is wanted; turn it on: "
        "ip link set dev br0 type bridge vlan_filtering 1",
    ),
    (
        plan_linux,
        giving(PORT, vlan=NATIVE),
        replace(FRESH, bridge=NO_KERNEL),
        Status.REFUSED,
        "br0 does not filter VLANs: vlan native 10 trunk 20,30-31 is wanted; this kernel cannot "
        "(CONFIG_BRIDGE_VLAN_FILTERING)",
    ),
    (
        plan_linux,
        PORT,
        replace(FRESH, bridge=NO_PVID),
        Status.REFUSED,
        "br0 has no default PVID: and the policy gives no vlan; set vlan: for network lan, or: "
        "ip link set dev br0 type bridge vlan_default_pvid 1",
    ),
    (
        plan_linux,
        giving(PORT, external_ids=(("a", "b"),)),
        FRESH,
        Status.REFUSED,
        "br0 is a Linux bridge: it has no place for external_ids; take external_ids: from network "
        "lan, or from its rule",
    ),
    (
        plan_ovs,
        OVS_PORT,
        replace(OVS_FRESH, bridge=None),
        Status.REFUSED,
        "the MTU of br0 cannot be told: it has no interface in this network namespace; give "
        "network lan an mtu of its own",
    ),
    (
        bridge_mtu("linux", 1500, 1499),
        PORT,
        FRESH,
        Status.REFUSED,
        "the tap's MTU would lower that of br0 from 1500 to 1499: its other ports would lose "
        "longer frames; pin it: ip link set dev br0 mtu 1499 && ip link set dev br0 mtu 1500",
    ),
    (
        bridge_mtu("linux", 1500, 1400),
        PORT,
        FRESH,
        Status.REFUSED,
        "the tap's MTU would lower that of br0 from 1500 to 1400: its other ports would lose "
        "longer frames; pin it: ip link set dev br0 mtu 1499 && ip link set dev br0 mtu 1500",
    ),
    (
        bridge_mtu("openvswitch", 1500, 1400),
        PORT,
        OVS_FRESH,
        Status.REFUSED,
        "the tap's MTU would lower that of br0 from 1500 to 1400: its other ports would lose "
        "longer frames; pin it: ovs-vsctl set interface br0 mtu_request=1500",
    ),
]


@pytest.mark.parametrize(
    ("call", "port", "found", "status", "text"), FAILURES, ids=[row[4][:70] for row in FAILURES]
)
def test_each_refusal_is_told_whole(
    call: Any, port: Port, found: Seen, status: Status, text: str
) -> None:
    with pytest.raises(Failure) as caught:
        call(port, found)
    assert (caught.value.status, str(caught.value)) == (status, text)


KINDS: list[tuple[Port, Seen, Kind]] = [
    (PORT, FRESH, "linux"),
    (PORT, OVS_FRESH, "openvswitch"),
    (PORT, replace(OVS_FRESH, bridge=None), "openvswitch"),
    (ON_LINUX, BOTH, "linux"),
    (OVS_PORT, BOTH, "openvswitch"),
    (replace(PORT, place=BridgePlace("br0", "unix:/other")), BOTH, "linux"),
]


@pytest.mark.parametrize(("port", "found", "kind"), KINDS)
def test_the_kind_is_looked_up(port: Port, found: Seen, kind: Kind) -> None:
    assert kinds.find(port, found).name == kind


def test_a_bridge_that_keeps_or_raises_its_mtu_is_well() -> None:
    bridge_mtu("linux", 1500, 1500)(PORT, FRESH)
    bridge_mtu("linux", 1500, 9000)(PORT, FRESH)
    check_bridge_mtu(PORT, OVS, replace(OVS_FRESH, bridge=None), OVS_FRESH)


DIFFERENCES: list[tuple[str, Port, Kind, Seen, list[str]]] = [
    ("linux: none", PORT, "linux", ATTACHED, []),
    ("ovs: none", OVS_PORT, "openvswitch", OVS_ATTACHED, []),
    ("gone", PORT, "linux", Seen(None), ["tap is gone, wanted there"]),
    (
        "fresh",
        PORT,
        "linux",
        FRESH,
        [
            "bridge is none, wanted br0",
            "mac is 16:00:00:00:00:07, wanted fe:00:00:00:00:07",
            "disable_ipv6 is false, wanted true",
            "link is down, wanted up",
        ],
    ),
    (
        "another bridge",
        PORT,
        "linux",
        replace(ATTACHED, master=replace(BRIDGE, name="br9")),
        ["bridge is br9, wanted br0"],
    ),
    ("mtu", giving(PORT, mtu=1400), "linux", ATTACHED, ["mtu is 1500, wanted 1400"]),
    (
        "the bridge's mtu",
        PORT,
        "linux",
        replace(ATTACHED, bridge=replace(BRIDGE, mtu=9000)),
        ["mtu is 1500, wanted 9000"],
    ),
    ("txqueuelen", giving(PORT, txqueuelen=0), "linux", ATTACHED, ["txqueuelen is 1000, wanted 0"]),
    (
        "isolated",
        giving(PORT, isolated=True),
        "linux",
        ATTACHED,
        ["isolated is false, wanted true"],
    ),
    (
        "not isolated",
        PORT,
        "linux",
        seen(ATTACHED, isolated=True),
        ["isolated is true, wanted false"],
    ),
    (
        "filtering is off",
        giving(PORT, vlan=VLAN),
        "linux",
        ATTACHED,
        [
            "vlan is none, wanted 100: br0 does not filter VLANs: vlan 100 is wanted; turn it on: "
            "ip link set dev br0 type bridge vlan_filtering 1"
        ],
    ),
    (
        "the bridge is down",
        PORT,
        "linux",
        replace(ATTACHED, bridge=replace(BRIDGE, up=False)),
        ["bridge link is down, wanted up"],
    ),
    (
        "a VID too many",
        giving(PORT, vlan=VLAN),
        "linux",
        replace(ATTACHED, bridge=FILTERING, master=FILTERING, vids=(Vid(1), ACCESS)),
        ["vlan is native 100 trunk 1, wanted 100"],
    ),
    (
        "flags",
        giving(PORT, vlan=VLAN),
        "linux",
        replace(ATTACHED, bridge=FILTERING, vids=(Vid(100, untagged=True),)),
        ["vlan is 100 untagged, wanted 100"],
    ),
    (
        "no VID",
        giving(PORT, vlan=VLAN),
        "linux",
        replace(ATTACHED, bridge=FILTERING),
        ["vlan is none, wanted 100"],
    ),
    (
        "ovs: no row",
        OVS_PORT,
        "openvswitch",
        replace(OVS_ATTACHED, ports=()),
        ["bridge is none, wanted br0"],
    ),
    (
        "ovs: another database's row",
        OVS_PORT,
        "openvswitch",
        replace(OVS_ATTACHED, ports=(replace(ROW, ovsdb="unix:/other"),)),
        ["bridge is none, wanted br0"],
    ),
]
ROWS: list[tuple[dict[str, Any], list[str]]] = [
    ({"bridge": "br9"}, ["bridge is br9, wanted br0"]),
    ({"bridge": None}, ["bridge is none, wanted br0"]),
    ({"tag": 100}, ["vlan is 100, wanted none"]),
    ({"vlan_mode": None}, ["vlan is trunk 1-4094, wanted none"]),
    ({"vlan_mode": "trunk", "trunks": (20,)}, ["vlan is trunk 20, wanted none"]),
    ({"trunks": (20,)}, ["vlan is none (vlan_mode access, trunks 20), wanted none"]),
    (
        {"vlan_mode": "native-tagged", "tag": 1, "trunks": (2,)},
        ["vlan is native 1 trunk 2, wanted none"],
    ),
    ({"protected": True}, ["isolated is true, wanted false"]),
    ({"transient": False}, ["transient is false, wanted true"]),
    ({"external_ids": (*ROW.external_ids, ("ovn-installed", "true"))}, []),
    ({"error": "No such device"}, ["error is No such device, wanted none"]),
    ({"ofport": -1}, ["ofport is false, wanted true"]),
    ({"ofport": None}, ["ofport is false, wanted true"]),
    ({"ifindex": 8}, ["ifindex is 8, wanted 7"]),
    ({"link_state": "down"}, ["link_state is down, wanted up"]),
]
DIFFERENCES += [
    (
        f"ovs: {' '.join(row)} {number}",
        OVS_PORT,
        "openvswitch",
        replace(OVS_ATTACHED, ports=(replace(ROW, **row),)),
        texts,
    )
    for number, (row, texts) in enumerate(ROWS)
]


@pytest.mark.parametrize(
    ("port", "kind", "found", "texts"),
    [row[1:] for row in DIFFERENCES],
    ids=[row[0] for row in DIFFERENCES],
)
def test_differences(port: Port, kind: Kind, found: Seen, texts: list[str]) -> None:
    assert [str(each) for each in differences(port, kinds.load(kind), found, up=True)] == texts


def test_a_link_that_is_down_counts_only_once_it_shall_be_up() -> None:
    assert differences(PORT, LINUX, seen(ATTACHED, up=False), up=False) == ()
    unopened = replace(seen(OVS_ATTACHED, carrier=False), ports=(replace(ROW, link_state="down"),))
    assert differences(OVS_PORT, OVS, unopened, up=True) == ()


COMMANDS: list[tuple[Op, tuple[str, ...]]] = [
    (SET_MARK, (f"ip link set dev web0 alias '{ALIAS}'",)),
    (UNMARK, ("ip link set dev web0 alias ''",)),
    (DOWN, ("ip link set dev web0 down",)),
    (UP, ("ip link set dev web0 up",)),
    (MAC, ("ip link set dev web0 address fe:00:00:00:00:07",)),
    (MTU, ("ip link set dev web0 mtu 1500",)),
    (SetTxQueueLen("web0", 7, 500), ("ip link set dev web0 txqueuelen 500",)),
    (
        IPV6,
        (
            "ip link set dev web0 addrgenmode none",
            "echo 1 > /proc/sys/net/ipv6/conf/web0/disable_ipv6",
        ),
    ),
    (
        SetIpv6("a b", 7, False, 2),
        (
            "ip link set dev 'a b' addrgenmode stable_secret",
            "echo 0 > '/proc/sys/net/ipv6/conf/a b/disable_ipv6'",
        ),
    ),
    (SetIpv6("a b", 7, None, 3), ("ip link set dev 'a b' addrgenmode random",)),
    (JOIN, ("ip link set dev web0 master br0",)),
    (LEAVE, ("ip link set dev web0 nomaster",)),
    (SetIsolated("web0", 7, True), ("bridge link set dev web0 isolated on",)),
    (SetIsolated("web0", 7, False), ("bridge link set dev web0 isolated off",)),
    (
        vlans(*wanted_vids(NATIVE)),
        (
            "bridge vlan del dev web0 vid 1-4094",
            "bridge vlan add dev web0 vid 10 pvid untagged",
            "bridge vlan add dev web0 vid 20",
            "bridge vlan add dev web0 vid 30-31",
        ),
    ),
    (DEL_ROW, ("ovs-vsctl --db=unix:/run/openvswitch/db.sock --if-exists del-port web0",)),
    (
        AddPort(
            "unix:/a b", "br0", "-rf", 7, NATIVE, True, (("note", 'it\'s "5" \\'), ("vm-pid", "42"))
        ),
        (
            "ovs-vsctl '--db=unix:/a b' add-port br0 -rf vlan_mode=native-untagged tag=10 "
            "trunks=20,30,31 protected=true other_config:transient=true -- set interface -rf "
            r"""'external_ids:note="it'\''s \"5\" \\"' external_ids:vm-pid=42""",
        ),
    ),
    (SetUp("$(x);'", 7), (r"ip link set dev '$(x);'\''' up",)),
]


@pytest.mark.parametrize(("op", "words"), COMMANDS)
def test_commands(op: Op, words: tuple[str, ...]) -> None:
    assert op.commands() == words


VLANS: list[tuple[Vlan | None, str, tuple[Vid, ...], tuple[str, int | None, tuple[int, ...]]]] = [
    (None, "none", (), ("access", None, ())),
    (VLAN, "100", (ACCESS,), ("access", 100, ())),
    (
        Vlan(None, (20, 30, 31)),
        "trunk 20,30-31",
        (Vid(20), Vid(30), Vid(31)),
        ("trunk", None, (20, 30, 31)),
    ),
    (
        Vlan(10, (20,)),
        "native 10 trunk 20",
        (Vid(10, True, True), Vid(20)),
        ("native-untagged", 10, (20,)),
    ),
]


@pytest.mark.parametrize(("vlan", "words", "vids", "columns"), VLANS)
def test_a_vlan_is_the_same_on_each_switch(
    vlan: Vlan | None, words: str, vids: tuple[Vid, ...], columns: Any
) -> None:
    assert show_vlan(vlan) == words
    assert vlan_of_vids(vids) == vlan
    if vlan is not None:
        assert wanted_vids(vlan) == vids
    assert vlan_columns(vlan) == columns
    mode, tag, trunks = columns
    assert vlan_of_columns(replace(ROW, vlan_mode=mode, tag=tag, trunks=trunks)) == vlan


@given(st.frozensets(st.integers(1, 4094), max_size=40))
def test_ranges_hold_just_the_numbers(numbers: frozenset[int]) -> None:
    found = ranges(numbers)
    assert [n for first, last in found for n in range(first, last + 1)] == sorted(numbers)
    assert all(after[0] > before[1] + 1 for before, after in itertools.pairwise(found))


# The mark

# What a command line may hold: any bytes but NUL, as os.fsdecode makes text of them.
NAMES = st.binary(max_size=300).map(lambda name: os.fsdecode(name.replace(b"\0", b"x")))
MARKS = st.builds(
    Mark,
    network=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True),
    kind=st.sampled_from(("linux", "openvswitch")),
    bridge=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=15),
    vm=NAMES,
    pid=st.integers(1, 4194304),
    start=st.integers(0, 2**63),
    ovsdb=st.none() | st.just(DEFAULT_OVSDB) | st.just("tcp:[::1]:6640"),
    uid=st.none() | st.integers(1, 2**32),
    by_name=st.booleans(),
    rule=st.from_regex(r"[a-z~]{1,20}\.yaml:[1-9][0-9]{0,3}", fullmatch=True),
    mac=st.none() | st.just("52:54:00:12:34:56"),
    netdev=st.none() | NAMES.filter(bool),
    was=st.none()
    | st.builds(
        Was,
        st.integers(68, 65535),
        st.integers(0, 2**32),
        st.just("0a"),
        st.booleans(),
        st.none() | st.integers(0, 3),
        st.booleans(),
    ),
    unsaid=st.frozensets(st.just("user")),
)


@given(MARKS)
def test_an_alias_gives_its_mark_back(mark: Mark) -> None:
    alias = format_alias(mark)
    assert alias.isascii() and alias.isprintable() and len(alias) <= ALIAS_MAX
    parsed = parse_alias(alias)
    assert parsed is not None
    kept = {
        name: getattr(mark, name)
        for name in ("network", "kind", "bridge", "pid", "start", "ovsdb", "uid", "by_name", "was")
    }
    assert kept == {name: getattr(parsed, name) for name in kept}
    assert parsed.unsaid >= mark.unsaid or not parsed.rule
    # What is not as it was is told to be unsaid, and nothing is that had room.
    with patch.object(pyqemu_ifup.mark, "ALIAS_MAX", 10_000):
        whole = len(format_alias(replace(mark, vm=""))) + (len(" vm=~") if mark.vm else 0)
    for name in ("vm", "netdev", "mac"):
        if getattr(parsed, name) != getattr(mark, name):
            assert name in parsed.unsaid
            assert len(alias) > ALIAS_MAX - 12 if name == "vm" else whole > ALIAS_MAX
    assert parsed.vm == mark.vm or "vm" in parsed.unsaid
    assert mark.vm.startswith(parsed.vm)
    assert parse_alias(format_alias(parsed)) == parsed


@given(st.text(max_size=300) | st.builds(lambda rest: f"pyqemu-ifup/1 {rest}", st.text()))
def test_no_alias_breaks_the_reader(alias: str) -> None:
    mark = parse_alias(alias)
    assert mark is None or mark.kind in ("linux", "openvswitch")


@pytest.mark.parametrize(
    ("was", "found"),
    [("1500,9,0a,1", Was(1500, 9, "0a", True)), ("1500,9,0a,1,3", Was(1500, 9, "0a", True, 3))],
)
def test_an_older_mark_says_nothing_of_addrgenmode(was: str, found: Was) -> None:
    mark = parse_alias(f"{OLD_ALIAS} was={was}")
    assert mark is not None and mark.was == found


@pytest.mark.parametrize("was", ["1500,9,0a,1", "1500,9,0a,1,3"])
@pytest.mark.parametrize("more", [",x", ",-1", ",256", ",,down", ","])
def test_a_mark_with_a_mode_that_is_none_is_no_mark(was: str, more: str) -> None:
    assert parse_alias(f"{OLD_ALIAS} was={was}{more}") is None


@pytest.mark.parametrize("mode", [None, 1])
def test_a_mark_tells_of_the_link_too(mode: int | None) -> None:
    was = Was(1500, 9, "0a", True, mode, up=True)
    found = parse_alias(format_alias(replace(MARK, was=was)))
    assert found is not None and found.was == was


def test_a_name_is_cut_between_letters() -> None:
    mark = replace(MARK, vm="ü" * 200)
    alias = format_alias(mark)
    parsed = parse_alias(alias)
    letters = (ALIAS_MAX - len(ALIAS) + len("web") - len("~")) // len("%C3%BC")
    assert parsed == replace(MARK, vm="ü" * letters, unsaid=frozenset({"vm"}))
    assert alias.endswith("%BC~") and parsed.guest == "ü" * letters + "~"
    assert "vm-name" not in row_ids(parsed, 7, HERE)


def test_a_long_name_leaves_room_for_the_others() -> None:
    """The order of sacrifice: the guest's name, the netdev, and at the last all but the place."""
    named = replace(MARK, mac="52:54:00:12:34:56", netdev="n0", vm="v" * 255)
    parsed = parse_alias(format_alias(named))
    assert (
        parsed is not None
        and parsed.unsaid == {"vm"}
        and (parsed.netdev, parsed.mac) == ("n0", "52:54:00:12:34:56")
    )
    long = replace(named, netdev="n" * 255)
    parsed = parse_alias(format_alias(long))
    assert parsed is not None and parsed.unsaid == {"vm", "netdev"} and parsed.mac == named.mac
    assert parsed.vm and parsed.netdev is None
    far = replace(long, kind="openvswitch", ovsdb="unix:/" + "x" * 160)
    parsed = parse_alias(format_alias(far))
    assert parsed is not None and parsed.unsaid == {"vm", "netdev", "mac", "user"}
    assert (parsed.ovsdb, parsed.mac, parsed.rule) == (far.ovsdb, None, "")


@pytest.mark.parametrize("name", ["web~", "~", "w~b", "%7E"])
def test_a_real_tilde_is_no_cut(name: str) -> None:
    mark = replace(MARK, vm=name, netdev=name)
    assert parse_alias(format_alias(mark)) == mark


@pytest.mark.parametrize("length", [200, 1500, 960_000])
def test_a_name_of_any_length_is_cut_at_once(length: int) -> None:
    parsed = parse_alias(format_alias(replace(MARK, vm="é" * length)))
    assert parsed is not None and parsed.unsaid == {"vm"}


def test_an_older_mark_says_what_it_says() -> None:
    older = parse_alias(OLD_ALIAS)
    assert older == replace(MARK, rule="", unsaid=frozenset({"netdev", "mac", "user"}))
    assert older is not None and parse_alias(format_alias(older)) == older
    by_name = parse_alias(f"{OLD_ALIAS} uid=1000 by=name")
    assert by_name is not None and by_name.by_name and by_name.unsaid == {"netdev", "mac"}
    # It cut a name without a word about it.
    cut = parse_alias(OLD_ALIAS.replace("web", "w" * (255 - len(OLD_ALIAS) + 3)))
    assert cut is not None and "vm" in cut.unsaid


def test_an_alias_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(Failure) as caught:
        format_alias(replace(OVS_MARK, ovsdb="unix:/" + "x" * 200))
    length = len(OVS_ALIAS) - len(" rule=p.yaml:7 vm=web") - len(DEFAULT_OVSDB) + 206
    assert (caught.value.status, str(caught.value)) == (
        Status.REFUSED,
        f"the tap's ifalias would be too long: {length} bytes of at most 254; give the network "
        "a shorter name, or the OVSDB socket a shorter path",
    )


@pytest.mark.parametrize(
    "alias",
    [
        "",
        "uplink",
        "pyqemu-ifup/1",
        "pyqemu-ifup/2" + ALIAS[13:],
        "x" + ALIAS,
        ALIAS.replace("pid=42", "pid=x"),
        ALIAS.replace("pid=42 ", ""),
        ALIAS.replace("kind=linux", "kind=vpp"),
        ALIAS.replace(" network=lan", ""),
    ],
)
def test_what_is_not_of_our_making_is_no_mark(alias: str) -> None:
    assert parse_alias(alias) is None


def test_a_mark_names_a_process_by_its_start_too() -> None:
    mark = Holder(Caller("web0", vm="web"), os.getpid()).mark_for(PORT, LINUX)
    assert is_alive(mark)
    assert not is_anothers(mark, os.getpid())
    assert is_anothers(mark, os.getppid())
    reused = replace(mark, start=mark.start + 1)
    assert not is_alive(reused) and not is_anothers(reused, 1)
    assert not is_alive(replace(mark, start=0))


def test_a_row_carries_the_mark_in_full() -> None:
    assert row_ids(replace(OVS_MARK, vm="w\udcff"), 7, HERE) == {
        "pyqemu-ifup": "1",
        "pyqemu-network": "lan",
        "pyqemu-ifindex": "7",
        "pyqemu-boot-id": "boot-1",
        "pyqemu-netns": "4:7",
        "vm-name": "w\ufffd",
        "vm-pid": "42",
    }
    assert "vm-name" not in row_ids(replace(OVS_MARK, vm=""), 7, HERE)


def test_here_is_this_boot_and_namespace() -> None:
    here = find_here()
    assert len(here.boot_id) == 36
    assert here.netns.endswith(f":{os.stat('/proc/self/ns/net').st_ino}")


@pytest.mark.parametrize(
    ("multi_queue", "owner", "group"),
    [(False, 1001, 5), (True, None, None), (True, 0, None), (True, 1000, None)],
)
def test_a_tap_that_nobody_else_can_open_meanwhile_is_not_shared(
    multi_queue: bool, owner: int | None, group: int | None
) -> None:
    refuse_shared(replace(TAP, multi_queue=multi_queue, owner=owner, group=group), 1000)
