"""The steps that change a tap which is attached, and those back, as tables; pure."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_plan import (
    ATTACHED,
    BRIDGE,
    DEL_ROW,
    DOWN,
    FILTERING,
    HERE,
    IPV6,
    LEAVE,
    MARK,
    OVS_ATTACHED,
    OVS_MARK,
    PORT,
    ROW,
    UP,
    seen,
    vlans,
)

from lab.ports import giving
from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.policy import Kind, Port, Vlan
from pyqemu_ifup import kinds
from pyqemu_ifup.kinds.linux import JoinBridge, SetIsolated, SetVlans
from pyqemu_ifup.kinds.openvswitch import AddPort, SetPort
from pyqemu_ifup.look import Seen, Vid
from pyqemu_ifup.mark import format_alias
from pyqemu_ifup.ops import Op, SetAlias, SetDown, SetIpv6, SetMac, SetMtu, SetTxQueueLen, SetUp
from pyqemu_ifup.plan import plan_back, plan_change, plan_up

pytestmark = pytest.mark.each_python

ACCESS = Vid(100, pvid=True, untagged=True)
ON_FILTERING = replace(ATTACHED, master=FILTERING, bridge=FILTERING, vids=(ACCESS,))
IN_100 = giving(PORT, vlan=Vlan(100))
RENAMED = replace(PORT, network="office")
RENAMED_MARK = SetAlias("web0", 7, format_alias(replace(MARK, network="office")))


def set_port(
    *,
    vlan: tuple[str | None, int | None, tuple[int, ...]] = ("access", None, ()),
    protected: bool = False,
    more: tuple[tuple[str, str], ...] = (),
) -> SetPort:
    ids = tuple(sorted((*ROW.external_ids, *more)))
    return SetPort(DEFAULT_OVSDB, "web0", ROW.external_ids, *vlan, protected, True, ids)


LINUX_KIND, OVS_KIND = kinds.load("linux"), kinds.load("openvswitch")
LINUX: list[tuple[str, Port, Seen, tuple[Op, ...]]] = [
    ("as it is", PORT, ATTACHED, ()),
    ("mtu", giving(PORT, mtu=1400), ATTACHED, (SetMtu("web0", 7, 1400),)),
    (
        "the bridge's mtu",
        PORT,
        replace(ATTACHED, bridge=replace(BRIDGE, mtu=9000)),
        (SetMtu("web0", 7, 9000),),
    ),
    ("txqueuelen", giving(PORT, txqueuelen=5), ATTACHED, (SetTxQueueLen("web0", 7, 5),)),
    ("isolated", giving(PORT, isolated=True), ATTACHED, (SetIsolated("web0", 7, True),)),
    ("no more isolated", PORT, seen(ATTACHED, isolated=True), (SetIsolated("web0", 7, False),)),
    ("a network of another name, all else alike", RENAMED, ATTACHED, (RENAMED_MARK,)),
    (
        "MAC and IPv6 that somebody changed",
        PORT,
        seen(ATTACHED, mac="16:00:00:00:00:07", ipv6_disabled=False, addrgenmode=3),
        (SetMac("web0", 7, "fe:00:00:00:00:07"), IPV6),
    ),
    ("IPv6 that gives no address by itself", PORT, seen(ATTACHED, ipv6_disabled=False), ()),
    ("an older up's, whose switch alone is off", PORT, seen(ATTACHED, addrgenmode=0), ()),
    ("a link that is down", PORT, seen(ATTACHED, up=False), (UP,)),
    ("its VLAN", IN_100, ON_FILTERING, ()),
    (
        "another VLAN",
        giving(PORT, vlan=Vlan(20)),
        ON_FILTERING,
        (DOWN, vlans(Vid(20, pvid=True, untagged=True)), UP),
    ),
    (
        "another VLAN and more",
        giving(RENAMED, vlan=Vlan(None, (20,)), mtu=1400, isolated=True),
        ON_FILTERING,
        (
            DOWN,
            RENAMED_MARK,
            SetMtu("web0", 7, 1400),
            vlans(Vid(20)),
            SetIsolated("web0", 7, True),
            UP,
        ),
    ),
    (
        "a VLAN too many",
        IN_100,
        replace(ON_FILTERING, vids=(Vid(1), ACCESS)),
        (DOWN, vlans(ACCESS), UP),
    ),
]
OVS: list[tuple[str, Port, Seen, tuple[Op, ...]]] = [
    ("as it is", PORT, OVS_ATTACHED, ()),
    ("mtu", giving(PORT, mtu=1400), OVS_ATTACHED, (SetMtu("web0", 7, 1400),)),
    ("isolated", giving(PORT, isolated=True), OVS_ATTACHED, (set_port(protected=True),)),
    (
        "external_ids",
        giving(PORT, external_ids=(("iface-id", "a"),)),
        OVS_ATTACHED,
        (set_port(more=(("iface-id", "a"),)),),
    ),
    (
        "not transient",
        PORT,
        replace(OVS_ATTACHED, ports=(replace(ROW, transient=False),)),
        (set_port(),),
    ),
    ("another VLAN", IN_100, OVS_ATTACHED, (DOWN, set_port(vlan=("access", 100, ())), UP)),
    (
        "a trunk of every VLAN",
        PORT,
        replace(OVS_ATTACHED, ports=(replace(ROW, vlan_mode=None),)),
        (DOWN, set_port(), UP),
    ),
]


@pytest.mark.parametrize(
    ("port", "now", "plan"), [row[1:] for row in LINUX], ids=[row[0] for row in LINUX]
)
def test_change_on_a_linux_bridge(port: Port, now: Seen, plan: tuple[Op, ...]) -> None:
    mark = replace(MARK, network=port.network)
    assert plan_change(port, LINUX_KIND, now, mark, HERE) == plan


@pytest.mark.parametrize(
    ("port", "now", "plan"), [row[1:] for row in OVS], ids=[row[0] for row in OVS]
)
def test_change_on_open_vswitch(port: Port, now: Seen, plan: tuple[Op, ...]) -> None:
    assert plan_change(port, OVS_KIND, now, OVS_MARK, HERE) == plan


ELSEWHERE: list[tuple[str, Kind, Seen]] = [
    ("no bridge", "linux", replace(seen(ATTACHED, master=None), master=None)),
    ("another bridge", "linux", replace(ATTACHED, bridge=replace(BRIDGE, index=4, name="br1"))),
    ("a row of ours beside it", "linux", replace(ATTACHED, ports=(ROW,))),
    ("no row", "openvswitch", replace(OVS_ATTACHED, ports=())),
    (
        "another bridge's row",
        "openvswitch",
        replace(OVS_ATTACHED, ports=(replace(ROW, bridge="br1"),)),
    ),
    (
        "a row that does not work",
        "openvswitch",
        replace(OVS_ATTACHED, ports=(replace(ROW, ofport=-1, error="could not"),)),
    ),
    (
        "an earlier tap's row",
        "openvswitch",
        replace(OVS_ATTACHED, ports=(replace(ROW, ifindex=6),)),
    ),
    ("two rows", "openvswitch", replace(OVS_ATTACHED, ports=(ROW, replace(ROW, ovsdb="unix:/b")))),
]


@pytest.mark.parametrize(
    ("kind", "now"), [row[1:] for row in ELSEWHERE], ids=[row[0] for row in ELSEWHERE]
)
def test_what_is_elsewhere_is_attached_anew(kind: Kind, now: Seen) -> None:
    mark = MARK if kind == "linux" else OVS_MARK
    found = kinds.load(kind)
    assert not found.is_in_place(PORT, now, HERE)
    plan = plan_change(PORT, found, now, mark, HERE)
    assert plan == plan_up(PORT, found, now, mark, HERE)
    assert plan[-1] == SetUp("web0", 7)


@pytest.mark.parametrize(
    ("port", "what"),
    [
        (giving(PORT, external_ids=(("a", "b"),)), "br0 is a Linux bridge"),
        (IN_100, "br0 does not filter VLANs"),
    ],
)
def test_what_the_bridge_cannot_do_is_refused(port: Port, what: str) -> None:
    with pytest.raises(Failure) as caught:
        plan_change(port, LINUX_KIND, ATTACHED, MARK, HERE)
    assert caught.value.what == what


LOST = replace(seen(ATTACHED, master=None), master=None)
LOOSE = seen(LOST, alias="", ipv6_disabled=False, addrgenmode=0)
BR1 = replace(BRIDGE, index=4, name="br1")
ON_BR1 = replace(
    seen(ATTACHED, master=4, alias=format_alias(replace(MARK, bridge="br1")), up=False), master=BR1
)
OLD_MARK = SetAlias("web0", 7, format_alias(MARK))
BACK: list[tuple[str, Seen, Seen, tuple[Op, ...]]] = [
    ("nothing was done", ATTACHED, ATTACHED, ()),
    ("it was taken down", ATTACHED, seen(ATTACHED, up=False), (UP,)),
    (
        "its settings were changed",
        ATTACHED,
        seen(ATTACHED, mtu=1400, txqueuelen=3, isolated=True),
        (SetMtu("web0", 7, 1500), SetTxQueueLen("web0", 7, 1000), SetIsolated("web0", 7, False)),
    ),
    (
        "its VLANs were changed",
        ON_FILTERING,
        replace(ON_FILTERING, vids=(Vid(20),)),
        (DOWN, vlans(ACCESS), UP),
    ),
    (
        "it has left",
        seen(ON_FILTERING, isolated=True),
        replace(seen(LOST, up=False), bridge=FILTERING),
        (JoinBridge("web0", 7, "br0", 3), vlans(ACCESS), SetIsolated("web0", 7, True), UP),
    ),
    (
        "it is on the other bridge",
        ATTACHED,
        ON_BR1,
        (replace(LEAVE, bridge="br1"), OLD_MARK, JoinBridge("web0", 7, "br0", 3), UP),
    ),
    ("it is on the bridge that it had lost", LOST, ATTACHED, (DOWN, LEAVE, UP)),
    (
        "it was loose",
        LOOSE,
        seen(ATTACHED, up=False),
        (LEAVE, SetIpv6("web0", 7, False, 0), SetAlias("web0", 7, ""), UP),
    ),
    (
        "its row was changed",
        OVS_ATTACHED,
        replace(OVS_ATTACHED, ports=(replace(ROW, tag=100, protected=True),)),
        (DOWN, set_port(), UP),
    ),
    (
        "keys of the policy came to its row",
        OVS_ATTACHED,
        replace(
            OVS_ATTACHED,
            ports=(
                replace(ROW, external_ids=(*ROW.external_ids, ("iface-id", "a"), ("theirs", "b"))),
            ),
        ),
        (
            SetPort(
                DEFAULT_OVSDB,
                "web0",
                (*ROW.external_ids, ("iface-id", "a"), ("theirs", "b")),
                "access",
                None,
                (),
                False,
                True,
                ROW.external_ids,
                ("iface-id",),
            ),
        ),
    ),
    (
        "its row has gone",
        replace(OVS_ATTACHED, ports=(replace(ROW, tag=5),)),
        replace(seen(OVS_ATTACHED, up=False, master=None), ports=(), master=None),
        (AddPort(DEFAULT_OVSDB, "br0", "web0", 7, Vlan(5), False, ROW.external_ids), UP),
    ),
    (
        "a row that was not of our making in all has gone",
        replace(OVS_ATTACHED, ports=(replace(ROW, vlan_mode=None, tag=5),)),
        replace(seen(OVS_ATTACHED, up=False, master=None), ports=(), master=None),
        (
            AddPort(DEFAULT_OVSDB, "br0", "web0", 7, Vlan(5), False, ROW.external_ids),
            set_port(vlan=(None, 5, ())),
            UP,
        ),
    ),
    (
        "a row has come",
        LOST,
        replace(
            seen(
                LOST, up=False, master=2, alias=OVS_ATTACHED.tap.alias if OVS_ATTACHED.tap else ""
            ),
            ports=(ROW,),
            master=OVS_ATTACHED.master,
        ),
        (DEL_ROW, DOWN, OLD_MARK, UP),
    ),
    ("the tap has gone, its row not", OVS_ATTACHED, Seen(None, ports=(ROW,)), (DEL_ROW,)),
]


@pytest.mark.parametrize(
    ("before", "now", "plan"), [row[1:] for row in BACK], ids=[row[0] for row in BACK]
)
def test_way_back(before: Seen, now: Seen, plan: tuple[Op, ...]) -> None:
    port = giving(PORT, external_ids=(("iface-id", "a"),))
    assert plan_back(port, before, now, HERE) == plan


def test_commands_of_set_port() -> None:
    op = SetPort(
        "unix:/run/db", "web0", (), "native-untagged", 10, (20, 30), True, True, (("a", "b c"),)
    )
    assert op.commands() == (
        "ovs-vsctl --db=unix:/run/db set port web0 vlan_mode=native-untagged tag=10 trunks=20,30 "
        "protected=true other_config:transient=true -- set interface web0 "
        "'external_ids:a=\"b c\"'",
    )
    op = SetPort("unix:/run/db", "web0", (), None, None, (), False, False, (), ("k",))
    assert op.commands() == (
        "ovs-vsctl --db=unix:/run/db set port web0 'vlan_mode=[]' 'tag=[]' 'trunks=[]' "
        "protected=false -- remove port web0 other_config transient -- remove interface web0 "
        "external_ids k",
    )


@pytest.mark.parametrize(
    "plan",
    [plan for _, _, _, plan in (*LINUX, *OVS) if SetDown("web0", 7) in plan],
    ids=[name for name, _, _, plan in (*LINUX, *OVS) if SetDown("web0", 7) in plan],
)
def test_down_comes_before_all_else_where_the_vlan_changes(plan: tuple[Op, ...]) -> None:
    if any(isinstance(op, (SetVlans, SetPort)) for op in plan):
        assert plan[0] == SetDown("web0", 7)
