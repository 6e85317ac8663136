"""pyqemu-ifctl explain: whole answers as tables; then its commands run, and nobody's view."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab.hooks import CHECKOUT, Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import NOBODY, as_user
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Attach, Caller, decide, port_on
from pyqemu_ifctl.explanation import Explanation, View, explain_port
from pyqemu_ifctl.verbs.explain import as_object, as_text
from pyqemu_ifup.kinds import tap_kinds
from pyqemu_ifup.look import Link, OvsPort, Seen
from pyqemu_ifup.mark import Here

POLICY = """\
version: 1
networks:
  lan: {bridge: br0}
  sw: {bridge: br-int, mtu: 8950, ovsdb: "unix:/run/db"}
  fixed: {bridge: br-int, kind: openvswitch, mtu: 1500}
rules:
  - {tap: db*, deny: ask the network team}
  - {vm: fw-*, mac: "52:54:00:*", network: sw, vlan: {native: 10, trunk: [20, 30-39]}}
  - {tap: [sw*, tr*], network: sw, vlan: 100, isolated: true, external_ids: {owner: a b}}
  - {tap: fix*, network: fixed, txqueuelen: 500}
  - {tap: vlan*, network: lan, vlan: 100}
  - {tap: ids*, network: lan, external_ids: {a: b}}
  - {tap: web*, network: lan}
"""
HERE = Here("b007-1d", "4:42")
TAP = Link(
    index=7,
    name="web0",
    kind="tun",
    tap=True,
    up=False,
    mtu=1500,
    mac="52:54:00:aa:bb:cc",
    txqueuelen=1000,
    master=None,
    alias="",
    carrier=True,
    ipv6_disabled=False,
    addrgenmode=0,
)
BR0 = replace(
    TAP, index=2, name="br0", kind="bridge", tap=False, up=True, mtu=1450, vlan_filtering=False
)
VLAN_BR0 = replace(BR0, vlan_filtering=True, default_pvid=1)
BR_INT = replace(TAP, index=3, name="br-int", kind="openvswitch", tap=False)
STALE = OvsPort(
    ovsdb="unix:/run/db",
    bridge="br-old",
    name="sw0",
    tag=1,
    trunks=(),
    vlan_mode="access",
    protected=False,
    transient=True,
    external_ids=(
        ("pyqemu-boot-id", "b007-1d"),
        ("pyqemu-ifindex", "6"),
        ("pyqemu-ifup", "1"),
        ("pyqemu-netns", "4:42"),
    ),
    ofport=1,
    error=None,
    ifindex=6,
    link_state="up",
)
UNASKED = frozenset({"unix:/run/db"})


def view(
    *,
    tap: Link | None = None,
    bridge: Link | None = None,
    master: Link | None = None,
    ports: tuple[OvsPort, ...] = (),
    ovs: tuple[str, ...] = (),
    unasked: frozenset[str] = frozenset(),
) -> View:
    seen = Seen(tap, master, bridge, ports=ports, ovs_bridges=ovs)
    remarks = tuple(f"could not tell: {address} may not be used" for address in sorted(unasked))
    databases = frozenset({"unix:/run/db", DEFAULT_OVSDB} - unasked)
    return View(seen, HERE, unasked, True, remarks, databases)


def explained(caller: Caller, seen: View) -> Explanation:
    policy = parse_policy([Source("policy.yaml", POLICY.encode())])
    decision = decide(policy, caller)
    if not isinstance(decision, Attach):
        return Explanation(caller, decision)
    return explain_port(caller, decision, seen)


MAC = "fe\"$(ip -br link show dev {} | awk '{{print substr($3, 3)}}')\""
SW_ALIAS = (
    "ip link set dev sw0 alias 'pyqemu-ifup/1 network=sw kind=openvswitch bridge=br-int pid=0 "
    "start=0 rule=policy.yaml:8 mac=52:54:00:00:00:01 ovsdb=unix:/run/db vm=fw-1'"
)
WEB_ALIAS = (
    "ip link set dev web0 alias 'pyqemu-ifup/1 network=lan kind=linux bridge=br0 pid=0 start=0 "
    "rule=policy.yaml:13"
)
WANTED_WEB = """\
wanted:
  network       lan
  bridge        br0
  kind          linux
  ovsdb         none: a Linux bridge has no database
  mtu           1450: that of br0
  vlan          none: the bridge's untagged network
  isolated      false
  external_ids  none
  txqueuelen    left alone
"""
WEB_RULES = """\
rules passed over:
  policy.yaml:7: tap db* does not match web0
  policy.yaml:8: vm is unknown
  policy.yaml:9: none of tap sw*, tr* matches web0
  policy.yaml:10: tap fix* does not match web0
  policy.yaml:11: tap vlan* does not match web0
  policy.yaml:12: tap ids* does not match web0
"""
HINT = "what is unknown matches nothing; the guest's own can be given: "

TEXTS = [
    (
        "a fresh tap on a Linux bridge",
        Caller("web0"),
        view(bridge=BR0),
        f"""\
web0: attached to network lan by policy.yaml:13

{WEB_RULES}
{WANTED_WEB}\
  mac           fe: and the other five bytes of the tap's own
  addrgenmode   none
  disable_ipv6  true
  link          up

commands, br0 being a Linux bridge:
  {WEB_ALIAS}'
  ip link set dev web0 address {MAC.format("web0")}
  ip link set dev web0 mtu 1450
  ip link set dev web0 addrgenmode none
  echo 1 > /proc/sys/net/ipv6/conf/web0/disable_ipv6
  ip link set dev web0 master br0
  ip link set dev web0 up

note: {HINT}--vm, --mac
""",
    ),
    (
        "a tap that is there",
        Caller("web0", vm="x", mac="52:54:00:00:00:01"),
        view(tap=TAP, bridge=VLAN_BR0),
        f"""\
web0: attached to network lan by policy.yaml:13

{WEB_RULES.replace("vm is unknown", "vm fw-* does not match x")}
{WANTED_WEB}\
  mac           fe:54:00:aa:bb:cc
  addrgenmode   none
  disable_ipv6  true
  link          up

commands, br0 being a Linux bridge:
  {WEB_ALIAS} mac=52:54:00:00:00:01 vm=x'
  ip link set dev web0 address fe:54:00:aa:bb:cc
  ip link set dev web0 mtu 1450
  ip link set dev web0 addrgenmode none
  echo 1 > /proc/sys/net/ipv6/conf/web0/disable_ipv6
  ip link set dev web0 master br0
  bridge vlan del dev web0 vid 1-4094
  bridge vlan add dev web0 vid 1 pvid untagged
  ip link set dev web0 up
""",
    ),
    (
        "denied by a rule",
        Caller("db0"),
        view(),
        "db0: denied by policy.yaml:7: ask the network team\n",
    ),
    (
        "denied by no rule",
        Caller("x", vm="a", mac="52:54:00:00:00:01"),
        view(),
        """\
x: denied: no rule of the policy matches; add one

rules passed over:
  policy.yaml:7: tap db* does not match x
  policy.yaml:8: vm fw-* does not match a
  policy.yaml:9: none of tap sw*, tr* matches x
  policy.yaml:10: tap fix* does not match x
  policy.yaml:11: tap vlan* does not match x
  policy.yaml:12: tap ids* does not match x
  policy.yaml:13: tap web* does not match x
""",
    ),
    (
        "Open vSwitch, a stale port to replace",
        Caller("sw0", vm="fw-1", mac="52:54:00:00:00:01"),
        view(bridge=BR_INT, ports=(STALE,), ovs=("unix:/run/db",)),
        f"""\
sw0: attached to network sw by policy.yaml:8

rules passed over:
  policy.yaml:7: tap db* does not match sw0

wanted:
  network       sw
  bridge        br-int
  kind          openvswitch
  ovsdb         unix:/run/db
  mtu           8950
  vlan          native 10 trunk 20,30-39
  isolated      false
  external_ids  none
  txqueuelen    left alone
  mac           fe: and the other five bytes of the tap's own
  addrgenmode   none
  disable_ipv6  true
  link          up

commands, br-int being an Open vSwitch bridge:
  {SW_ALIAS}
  ovs-vsctl --db=unix:/run/db --if-exists del-port sw0
  ip link set dev sw0 down
  ip link set dev sw0 address {MAC.format("sw0")}
  ip link set dev sw0 mtu 8950
  ip link set dev sw0 addrgenmode none
  echo 1 > /proc/sys/net/ipv6/conf/sw0/disable_ipv6
  ovs-vsctl --db=unix:/run/db add-port br-int sw0 vlan_mode=native-untagged tag=10 \
trunks=20,30,31,32,33,34,35,36,37,38,39 protected=false other_config:transient=true -- \
set interface sw0 external_ids:pyqemu-boot-id=b007-1d external_ids:pyqemu-ifup=1 \
'external_ids:pyqemu-netns="4:42"' external_ids:pyqemu-network=sw external_ids:vm-name=fw-1 \
external_ids:vm-pid=0
  ovs-vsctl --db=unix:/run/db set interface sw0 external_ids:pyqemu-ifindex=\
"$(ip -o link show dev sw0 | cut -d: -f1)"
  ip link set dev sw0 up
""",
    ),
]


def command_lines(caller: Caller, seen: View) -> list[str]:
    commands: list[str] = json.loads(as_object(explained(caller, seen)))["commands"]
    return commands


@pytest.mark.parametrize(
    ("caller", "seen", "text"), [row[1:] for row in TEXTS], ids=[row[0] for row in TEXTS]
)
def test_text(caller: Caller, seen: View, text: str) -> None:
    explanation = explained(caller, seen)
    assert as_text(explanation) == text


SW = Caller("sw0", vm="x")
NO_BRIDGE = "ip link add name br0 up type bridge or ovs-vsctl add-br br0"
NOTES = [
    (
        "a bridge that is down",
        Caller("web0", vm="x"),
        view(bridge=replace(BR0, up=False)),
        ["linux"],
        [
            "an up would fail now (69): the bridge br0 is down: it passes no frame; bring it up: "
            "ip link set dev br0 up"
        ],
    ),
    (
        "a bridge that does not filter",
        Caller("vlan0", vm="x"),
        view(bridge=BR0),
        ["linux"],
        [
            "an up would fail now (71): br0 does not filter VLANs: vlan 100 is wanted; "
            "turn it on: ip link set dev br0 type bridge vlan_filtering 1"
        ],
    ),
    (
        "no bridge and no kind: both forms",
        Caller("web0", vm="x"),
        view(),
        ["linux", "openvswitch"],
        [
            f"an up would fail now (69): there is no bridge br0: network lan names it; make it "
            f"({NO_BRIDGE}) or correct the policy",
            "whether br0 is a Linux bridge or an Open vSwitch bridge cannot be told, and network "
            "lan gives no kind:; both forms follow",
        ],
    ),
    (
        "no database to ask and no kind: both forms",
        SW,
        view(unasked=UNASKED),
        ["linux", "openvswitch"],
        [
            "could not tell: unix:/run/db may not be used",
            "whether br-int is a Linux bridge or an Open vSwitch bridge cannot be told, and "
            "network sw gives no kind:; both forms follow",
        ],
    ),
    (
        "no database to ask, but a Linux bridge is seen",
        Caller("web0", vm="x"),
        view(bridge=BR0, unasked=UNASKED),
        ["linux"],
        ["could not tell: unix:/run/db may not be used"],
    ),
    (
        "no database to ask, but the link is of Open vSwitch's",
        SW,
        view(bridge=BR_INT, unasked=UNASKED),
        ["openvswitch"],
        ["could not tell: unix:/run/db may not be used"],
    ),
    (
        "kind: given",
        Caller("fix0", vm="x"),
        view(unasked=frozenset({"unix:/run/openvswitch/db.sock"})),
        ["openvswitch"],
        ["could not tell: unix:/run/openvswitch/db.sock may not be used"],
    ),
    (
        "kind: given, and wrong",
        Caller("fix0", vm="x"),
        view(bridge=replace(BR0, name="br-int")),
        ["openvswitch"],
        [
            "an up would fail now (71): br-int is a Linux bridge: the policy says kind: "
            "openvswitch for network fixed; correct its kind or its bridge"
        ],
    ),
    (
        "external_ids cannot be on a Linux bridge",
        Caller("ids0", vm="x"),
        view(bridge=BR0),
        ["linux"],
        [
            "an up would fail now (71): br0 is a Linux bridge: it has no place for external_ids; "
            "take external_ids: from network lan, or from its rule"
        ],
    ),
    (
        "somebody else's tap",
        Caller("web0", vm="x"),
        view(tap=replace(TAP, alias="mine"), bridge=BR0),
        ["linux"],
        [
            "an up would fail now (77): somebody else's tap: its alias is mine; if it is not, "
            "remove it: ip link set dev web0 alias ''"
        ],
    ),
]


TITLES: dict[str, str] = {kind.name: kind.title for kind in tap_kinds()}


@pytest.mark.parametrize(
    ("caller", "seen", "kinds", "notes"), [row[1:] for row in NOTES], ids=[r[0] for r in NOTES]
)
def test_notes_and_forms(caller: Caller, seen: View, kinds: list[str], notes: list[str]) -> None:
    explanation = explained(caller, seen)
    assert [form.title for form in explanation.forms] == [TITLES[kind] for kind in kinds]
    assert list(explanation.notes) == notes


def test_both_forms_are_labelled_in_json() -> None:
    policy = POLICY.replace("lan: {bridge: br0}", "lan: {bridge: br0, txqueuelen: 9}")
    parsed = parse_policy([Source("policy.yaml", policy.encode())])
    decision = decide(parsed, Caller("web0"))
    assert isinstance(decision, Attach)
    explanation = explain_port(Caller("web0"), decision, view())
    own = r"ip -o link show dev br0 | sed 's/.* mtu \([0-9]*\).*/\1/'"
    mtu = f'ip link set dev web0 mtu "$({own})"'
    alias = "ip link set dev web0 alias 'pyqemu-ifup/1 network=lan kind={} bridge=br0 pid=0 "
    db = "unix:/run/openvswitch/db.sock"
    common = [
        f"ip link set dev web0 address {MAC.format('web0')}",
        mtu,
        "ip link set dev web0 txqueuelen 9",
        "ip link set dev web0 addrgenmode none",
        "echo 1 > /proc/sys/net/ipv6/conf/web0/disable_ipv6",
    ]
    answer = json.loads(as_object(explanation))
    assert answer == {
        "version": 1,
        "tap": "web0",
        "decision": "attach",
        "rule": "policy.yaml:13",
        "passed_over": [
            {"rule": str(passed.rule.position), "because": passed.because}
            for passed in decision.passed_over
        ],
        "port": {
            "network": "lan",
            "bridge": "br0",
            "kind": None,
            "ovsdb": db,
            "mtu": None,
            "vlan": None,
            "isolated": False,
            "external_ids": {},
            "txqueuelen": 9,
            "mac": None,
            "addrgenmode": "none",
            "disable_ipv6": True,
            "link": "up",
        },
        "commands": [
            "# commands, br0 being a Linux bridge",
            alias.format("linux") + "start=0 rule=policy.yaml:13'",
            *common,
            "ip link set dev web0 master br0",
            "ip link set dev web0 up",
            "# commands, br0 being an Open vSwitch bridge",
            alias.format("openvswitch") + f"start=0 rule=policy.yaml:13 ovsdb={db}'",
            *common,
            f"ovs-vsctl --db={db} add-port br0 web0 vlan_mode=access protected=false "
            "other_config:transient=true -- set interface web0 "
            "external_ids:pyqemu-boot-id=b007-1d external_ids:pyqemu-ifup=1 "
            "'external_ids:pyqemu-netns=\"4:42\"' external_ids:pyqemu-network=lan "
            "external_ids:vm-pid=0",
            f"ovs-vsctl --db={db} set interface web0 external_ids:pyqemu-ifindex="
            '"$(ip -o link show dev web0 | cut -d: -f1)"',
            "ip link set dev web0 up",
        ],
    }


def test_json_of_a_denied_tap() -> None:
    assert json.loads(as_object(explained(Caller("db0"), view()))) == {
        "version": 1,
        "tap": "db0",
        "decision": "deny",
        "rule": "policy.yaml:7",
        "passed_over": [],
        "port": None,
        "commands": [],
    }


def test_json_of_a_trunk() -> None:
    caller = Caller("sw0", vm="fw-1", mac="52:54:00:00:00:01")
    answer = json.loads(as_object(explained(caller, view(bridge=BR_INT, ovs=("unix:/run/db",)))))
    assert answer["port"]["vlan"] == {"native": 10, "trunk": [20, "30-39"]}


def test_a_form_that_cannot_be_says_why() -> None:
    lines = command_lines(Caller("ids0", vm="x"), view(bridge=BR0))
    assert lines == [
        "# cannot be on a Linux bridge: br0 is a Linux bridge: it has no place for external_ids; "
        "take external_ids: from network lan, or from its rule"
    ]


def test_the_program_s_own_name_decides() -> None:
    policy = parse_policy([Source("policy.yaml", POLICY.encode())])
    port = port_on(policy, "lan", "db0")
    text = as_text(explain_port(Caller("db0"), Attach(port, None), view(bridge=BR0)))
    assert text.startswith("db0: attached to network lan by the name of pyqemu-ifup@lan\n\nwanted:")
    assert text.endswith("  ip link set dev db0 up\n")


def test_names_that_a_shell_would_take_apart() -> None:
    policy = POLICY.replace("tap: web*", 'tap: "*"')
    parsed = parse_policy([Source("policy.yaml", policy.encode())])
    decision = decide(parsed, Caller("a;id>x$(y)"))
    assert isinstance(decision, Attach)
    for form in explain_port(Caller("a;id>x$(y)"), decision, view()).forms:
        for line in form.commands:
            words = subprocess.run(
                [
                    "sh",
                    "-c",
                    f"ip() {{ :; }}; set -- {line.replace(' > ', ' ')}; printf '%s\\n' \"$@\"",
                ],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.splitlines()
            named = [word for word in words if "id>x" in word]
            assert named in (
                ["a;id>x$(y)"],
                ["a;id>x$(y)"] * 2,
                ["/proc/sys/net/ipv6/conf/a;id>x$(y)/disable_ipv6"],
            ), line


# ---------------------------------------------------------------------------- on the real thing


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path) -> Hooks:
    return Hooks(tmp_path / "hooks", netns=netns.name)


def run_commands(netns: Namespace, hooks: Hooks, tap: str, *options: str) -> None:
    """Run what explain says, as a person would paste it into a shell."""
    lines = hooks.ctl_json("explain", tap, *options)["commands"]
    netns.run(["sh", "-ec", "\n".join(lines)])


def check_as_up_does(netns: Namespace, hooks: Hooks, tap: str, vlan: object) -> None:
    row = hooks.ctl_json("status", tap)["taps"][0]
    assert (row["state"], row["differences"], row["vlan"]) == ("ok", [], vlan)
    assert row["pid"] is None
    assert hooks.down(tap).returncode == 0
    assert hooks.ctl_json("status", tap)["taps"][0]["state"] == "loose"


def test_its_commands_do_what_up_does_on_a_linux_bridge(netns: Namespace, hooks: Hooks) -> None:
    netns.ip("link", "add", "br0", "up", "type", "bridge")
    netns.ip("link", "set", "br0", "address", "52:54:00:00:00:01", "mtu", "1450", "up")
    hooks.write_policy(
        "version: 1\n"
        "networks: {lan: {bridge: br0, isolated: true, txqueuelen: 50}}\n"
        'rules: [{tap: "*", network: lan}]\n'
    )
    name = "a;b'c$(d)\"e"
    run_commands_on = netns.tap(name)
    try:
        with_explain = hooks.ctl_json("explain", name)
        assert with_explain["port"]["kind"] == "linux"
        assert with_explain["port"]["mtu"] == 1450
        run_commands(netns, hooks, name)
        link = netns.link(name)
        assert (link["mtu"], link["txqlen"], link["master"]) == (1450, 50, "br0")
        assert link["linkinfo"]["info_slave_data"]["isolated"] is True
        check_as_up_does(netns, hooks, name, None)
    finally:
        run_commands_on.close()
        netns.ip("link", "del", "br0")


@pytest.mark.parametrize(
    ("words", "vlan"),
    [
        ("mtu: 1400", None),
        ("vlan: 100", 100),
        (
            "vlan: {trunk: [20, 30-39]}, external_ids: {o: 'a \"b\" $c'}",
            {"native": None, "trunk": [20, "30-39"]},
        ),
        ("vlan: {native: 10, trunk: [20]}, isolated: true", {"native": 10, "trunk": [20]}),
    ],
)
def test_its_commands_do_what_up_does_on_open_vswitch(
    netns: Namespace, ovs: OpenVSwitch, hooks: Hooks, words: str, vlan: object
) -> None:
    ovs.add_bridge("br-int", mtu=1500)
    hooks.write_policy(
        "version: 1\n"
        f"networks: {{sw: {{bridge: br-int, ovsdb: '{ovs.db}', {words}}}}}\n"
        'rules: [{tap: "*", network: sw}]\n'
    )
    tap = netns.tap("sw0")
    try:
        # NOTE: made before the tap is there, with what only the kernel knows left to the shell.
        lines = hooks.ctl_json("explain", "later")["commands"]
        tap_later = netns.tap("later")
        netns.run(["sh", "-ec", "\n".join(lines)])
        check_as_up_does(netns, hooks, "later", vlan)
        tap_later.close()
        run_commands(netns, hooks, "sw0")
        assert ovs.row("Port", "sw0")["other_config"] == {"transient": "true"}
        check_as_up_does(netns, hooks, "sw0", vlan)
    finally:
        tap.close()
        ovs.vsctl("del-br", "br-int")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can read."""
    with tempfile.TemporaryDirectory(prefix="pyqemu-ifctl-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def without_privilege() -> list[str]:
    """Return the words that drop all privilege; to nobody, where nobody can read the checkout."""
    nobody = as_user(NOBODY)
    probe = f"import sys; sys.path.insert(0, {str(CHECKOUT / 'ifup')!r}); import pyqemu_ifup"
    can = subprocess.run(
        [*nobody, sys.executable, "-I", "-c", probe], capture_output=True, check=False
    )
    return nobody if can.returncode == 0 else ["setpriv", "--bounding-set=-all"]


def unprivileged(hooks: Hooks, *words: str) -> subprocess.CompletedProcess[str]:
    argv = hooks.argv("pyqemu-ifctl", *words)
    inside, launcher = argv[:4], argv[4:]
    return subprocess.run(
        [*inside, *without_privilege(), *launcher],
        env=hooks.environ(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_it_needs_no_privilege(netns: Namespace, ovs: OpenVSwitch, public: Path) -> None:
    os.chmod(ovs.dir, 0)
    hooks = Hooks(public / "hooks", netns=netns.name)
    hooks.write_policy(
        "version: 1\n"
        "networks:\n"
        "  lan: {bridge: br0}\n"
        f"  sw: {{bridge: br-int, ovsdb: '{ovs.db}'}}\n"
        "rules: [{tap: web*, network: lan}, {tap: sw*, network: sw}, {tap: '*', deny: no}]\n"
    )
    netns.ip("link", "add", "br0", "up", "type", "bridge")
    tap = netns.tap("web0")
    try:
        lan, sw, denied = (unprivileged(hooks, "explain", name) for name in ("web0", "sw0", "x"))
        as_json = unprivileged(hooks, "explain", "x", "--json")
        table = unprivileged(hooks, "status")
        gc = unprivileged(hooks, "gc")
    finally:
        tap.close()
        netns.ip("link", "del", "br0")
        os.chmod(ovs.dir, 0o700)
    cannot = (
        f"cannot look for Open vSwitch at {ovs.db}: Permission denied; see which capability root "
        "lacks here (capabilities(7)), or in dmesg(1) what AppArmor or SELinux denies"
    )
    assert (lan.returncode, lan.stderr) == (0, "")
    assert "commands, br0 being a Linux bridge:\n" in lan.stdout
    assert lan.stdout.endswith(f"\nnote: could not tell: {cannot}\n")
    assert (sw.returncode, sw.stderr) == (0, "")
    assert "commands, br-int being a Linux bridge:\n" in sw.stdout
    assert "commands, br-int being an Open vSwitch bridge:\n" in sw.stdout
    assert f"\nnote: could not tell: {cannot}\n" in sw.stdout
    assert (denied.returncode, denied.stderr) == (77, "")
    assert denied.stdout.startswith(f"x: denied by {hooks.policy}:5: no\n")
    assert (as_json.returncode, as_json.stderr) == (
        77,
        f"pyqemu-ifctl: x: denied by {hooks.policy}:5: no\n",
    )
    assert json.loads(as_json.stdout)["decision"] == "deny"
    assert (table.returncode, table.stderr) == (77, f"pyqemu-ifctl: {cannot}\n")
    assert table.stdout.splitlines()[0].split()[:2] == ["TAP", "STATE"]
    assert ["web0", "?"] in [line.split()[:2] for line in table.stdout.splitlines()]
    assert (gc.returncode, gc.stderr) == (77, f"pyqemu-ifctl: {cannot}\n")


def test_it_touches_nothing(netns: Namespace, ovs: OpenVSwitch, hooks: Hooks) -> None:
    """The snapshot around each test shows it; this one has a tap for it to touch."""
    ovs.add_bridge("br-int")
    hooks.write_policy(
        "version: 1\n"
        f"networks: {{sw: {{bridge: br-int, ovsdb: '{ovs.db}'}}}}\n"
        'rules: [{tap: "*", network: sw}]\n'
    )
    tap = netns.tap("sw0")
    try:
        assert hooks.up("sw0").returncode == 0
        before = (netns.link("sw0"), ovs.rows("Port", "Bridge"), ovs.row("Interface", "sw0"))
        assert hooks.ctl("explain", "sw0").returncode == 0
        after = (netns.link("sw0"), ovs.rows("Port", "Bridge"), ovs.row("Interface", "sw0"))
        for _, _, interface in (before, after):
            del interface["statistics"]
        for link, _, _ in (before, after):
            link.pop("stats64", None)
        assert before == after
        assert hooks.down("sw0").returncode == 0
    finally:
        tap.close()
        ovs.vsctl("del-br", "br-int")


def test_a_user_s_rules_that_do_not_count(netns: Namespace, tmp_path: Path) -> None:
    hooks = Hooks(tmp_path / "hooks", netns=netns.name)
    hooks.write_policy("""\
version: 1
networks:
  lan: {bridge: br0, users: [nobody]}
rules:
  - {vm: mgmt*, network: lan, mtu: 1400}
  - {tap: own*, network: lan, mtu: 1300}
  - {tap: "*", network: lan}
""")
    path = hooks.policy
    by_vm = {"rule": f"{path}:5", "because": "it changes mtu by vm, which counts for no "
             "unprivileged user"}  # fmt: skip
    by_tap = {"rule": f"{path}:6", "because": "it changes mtu by tap, which counts for no "
              "unprivileged user but on a tap that root has made"}  # fmt: skip
    netns.ip("tuntap", "add", "dev", "own1", "mode", "tap", "user", "nobody")
    for user, tap, rule, passed in (
        ("nobody", "own0", 7, [by_vm, by_tap]),
        ("nobody", "own1", 6, [by_vm]),
        ("65533", "own0", 7, [by_vm, by_tap]),
        ("nosuchuser", "own1", 7, [by_vm, by_tap]),
        ("root", "own0", 5, []),
        ("0", "own0", 5, []),
    ):
        told = hooks.ctl_json("explain", tap, "--vm", "mgmt1", "--user", user)
        assert (told["rule"], told["passed_over"]) == (f"{path}:{rule}", passed), user
    said = hooks.ctl("explain", "own0", "--user", "65533").stdout
    assert "note: an up would fail now (77): user 65533 may not use network lan: " in said
    netns.ip("link", "del", "own1")
