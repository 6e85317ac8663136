"""The kinds of network: what each says of itself, and that a new one is a module and a row."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, cast, get_args

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from test_policy_schema import plain_data

from lab.checkout import ROOT
from pyqemu_ifconf import kinds
from pyqemu_ifconf.failure import Failure, PolicyInvalid, Status
from pyqemu_ifconf.field import Field
from pyqemu_ifconf.fields import PORT_SETTINGS, fields_of, lacking
from pyqemu_ifconf.kinds.base import KindName, KindSpec, Place, SettingName, place_of
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB, BridgePlace
from pyqemu_ifconf.kinds.linux import LinuxPlace
from pyqemu_ifconf.kinds.openvswitch import OvsPlace
from pyqemu_ifconf.load import Source, _compose, parse_policy
from pyqemu_ifconf.nodes import Errors
from pyqemu_ifconf.policy import Attach, Caller, Network, Policy, Vlan, decide, nic_port, port_on
from pyqemu_ifconf.schema import policy_schema
from pyqemu_ifconf.values import Choice, Text

pytestmark = pytest.mark.each_python

CONF = ROOT / "conf" / "pyqemu_ifconf"
PAGE = ROOT / "conf" / "pyqemu-ifup-policy.5"

GIVEN = {
    "mtu": "1400",
    "vlan": "7",
    "isolated": "true",
    "external_ids": "{a: b}",
    "txqueuelen": "10",
    "macs": "nic",
}
"""Each port setting with a value."""
KEYS = {"bridge": "br0", "ovsdb": "unix:/run/db", "parent": "eth1", "mode": "vepa"}
"""Each key of a kind's own with a value."""


def errors_of(text: str) -> list[str]:
    """Return the errors of a policy as `LINE:COLUMN: message`, none where it is right."""
    try:
        parse_policy([Source("p", text.encode())])
    except PolicyInvalid as invalid:
        return [str(error).removeprefix("p:") for error in invalid.errors]
    return []


def is_in_schema(text: str) -> bool:
    """Tell whether the schema lets this policy pass."""
    data = plain_data(_compose(text, Errors("p")))
    return bool(Draft202012Validator(policy_schema()).is_valid(data))


def network_of(body: str, rest: str = "") -> Network:
    """Return the network `lan` with these keys."""
    return parse_policy([Source("p", policy(body, rest).encode())]).networks["lan"]


def policy(body: str, rest: str = "") -> str:
    """Return a policy whose network `lan`, on line 3 from column 9 on, has these keys."""
    return f"version: 1\nnetworks:\n  lan: {{{body}}}\n{rest}"


# What each kind says of itself

each_kind = pytest.mark.parametrize("spec", kinds.SPECS, ids=lambda spec: spec.name)


def test_each_name_is_of_one_kind() -> None:
    assert [spec.name for spec in kinds.SPECS] == list(get_args(KindName))
    for spec in kinds.SPECS:
        assert kinds.spec_of(spec.name) is spec


def test_each_setting_is_a_field_and_some_kind_gives_it() -> None:
    assert set(get_args(SettingName)) == PORT_SETTINGS == set(GIVEN)
    assert set().union(*(spec.settings for spec in kinds.SPECS)) == PORT_SETTINGS


@each_kind
def test_a_kind_is_whole(spec: KindSpec) -> None:
    assert re.fullmatch(r"an? \w.*", spec.title) and spec.label in spec.title
    assert spec.key in spec.own_keys
    assert all(field.where == "network" and not field.required for field in spec.fields())
    assert {field.name for field in fields(spec.place)} <= spec.own_keys
    assert kinds.owners(spec.key) == kinds.named_by(spec.key)
    others = [other for other in kinds.named_by(spec.key) if other is not spec]
    assert all(other.found is spec.found for other in others)
    assert (spec.found is not None) == bool(others) == (spec in kinds.said())
    assert [other.place for other in kinds.SPECS].count(spec.place) == 1


@each_kind
def test_what_is_looked_up_has_all_that_the_kind_needs(spec: KindSpec) -> None:
    if spec.found is not None:
        place = place_of(spec.found, KEYS)
        assert place is not None and kinds.spec_at(place) is None
        assert kinds.spec_at(place_of(spec.place, vars(place)) or place) is spec


def test_a_place_lacks_nothing_that_it_must_have() -> None:
    assert place_of(OvsPlace, {"ovsdb": "unix:/run/db"}) is None
    assert place_of(OvsPlace, {"bridge": "br0", "mtu": 68}) == OvsPlace("br0", DEFAULT_OVSDB)


PLACES: list[tuple[str, Place, str | None]] = [
    ("bridge: br0", BridgePlace("br0"), None),
    ("bridge: br0, ovsdb: unix:/run/db", BridgePlace("br0", "unix:/run/db"), None),
    ("bridge: br0, kind: linux", LinuxPlace("br0"), "linux"),
    ("bridge: br0, kind: openvswitch", OvsPlace("br0"), "openvswitch"),
    (
        "kind: openvswitch, bridge: br0, ovsdb: unix:/run/db",
        OvsPlace("br0", "unix:/run/db"),
        "openvswitch",
    ),
    ("bridge: br0, nat: {ipv4: 192.168.7.1/24}", LinuxPlace("br0"), "linux"),
]


@pytest.mark.parametrize(("body", "place", "kind"), PLACES)
def test_where_the_ports_of_a_network_are(body: str, place: Place, kind: str | None) -> None:
    network = network_of(body)
    assert (network.place, network.kind) == (place, kind)
    assert place.databases == ((place.ovsdb,) if isinstance(place, (BridgePlace, OvsPlace)) else ())
    assert (network.made is not None) == ("nat" in body)
    port = port_on(Policy(("p",), {"lan": network}, ()), "lan", "t0")
    assert (port.place, port.made) == (place, network.made)
    assert (place.noun, place.name) == ("bridge", "br0")


# What a kind has not

WITH_KIND = [spec for spec in kinds.SPECS if spec in kinds.said()]


@pytest.mark.parametrize("spec", WITH_KIND, ids=lambda spec: spec.name)
@pytest.mark.parametrize("setting", GIVEN)
def test_a_setting_is_given_or_refused(spec: KindSpec, setting: SettingName) -> None:
    said = f"{spec.key}: {KEYS[spec.key]}, kind: {spec.name}"
    given = f"{setting}: {GIVEN[setting]}"
    network = policy(f"{said}, {given}")
    rule = policy(said, f"rules:\n  - {{tap: a, network: lan, {given}}}\n")
    nic = policy(said, f"vms:\n  a: {{nics: [{{network: lan, {given}}}]}}\n")
    whose = [each.label for each in kinds.SPECS if setting in each.settings]
    verb = "are" if setting.endswith("s") else "is"
    why = f"{setting} {verb} for {' and '.join(whose)}, but network lan"
    told = f"has kind: {spec.name}; remove one"
    expected = [
        [f"3:{11 + len(said)}: {why} {told}"],
        [f"5:28: {why} (p:3) {told}"],
        [f"5:29: {why} (p:3) {told}"],
    ]
    right = setting in spec.settings
    found = [errors_of(text) for text in (network, rule, nic)]
    assert found == ([[], [], []] if right else expected)
    assert is_in_schema(network) == right
    unset = policy(f"{said}, {setting}: none")
    assert errors_of(unset) == [] and is_in_schema(unset)


@pytest.mark.parametrize("spec", WITH_KIND, ids=lambda spec: spec.name)
@pytest.mark.parametrize("key", [key for key in KEYS if {*kinds.owners(key)} & {*WITH_KIND}])
def test_a_key_of_another_kind_is_refused(spec: KindSpec, key: str) -> None:
    said = f"{spec.key}: {KEYS[spec.key]}, kind: {spec.name}"
    text = policy(said if key == spec.key else f"{said}, {key}: {KEYS[key]}")
    whose = " and ".join(each.label for each in kinds.owners(key))
    why = f"{key} is for {whose}, but network lan has kind: {spec.name}; remove one"
    right = key in spec.own_keys
    assert errors_of(text) == ([] if right else [f"3:{11 + len(said)}: {why}"])
    assert is_in_schema(text) == right


NAMED = "its ports have the VLANs that are named; write vlan: VID, or a trunk"


@pytest.mark.parametrize("said", ["", ", kind: linux", ", kind: openvswitch"])
def test_no_bridge_takes_any_vlan(said: str) -> None:
    words = "kind:" + said.partition("kind:")[2] if said else "bridge:"
    found = errors_of(policy(f"bridge: br0{said}, vlan: any"))
    assert found == [f"3:{22 + len(said)}: network lan has {words}, and {NAMED}"]
    rule = "rules:\n  - {tap: a, network: lan, vlan: any}\n"
    assert errors_of(policy(f"bridge: br0{said}", rule)) == [
        f"5:28: network lan (p:3) has {words}, and {NAMED}"
    ]


ALONE: list[tuple[str, list[str]]] = [
    ("parent: eth1", []),
    ("parent: eth1, mode: vepa, vlan: 7, mtu: 1400, txqueuelen: 10, macs: nic", []),
    ("parent: eth1, vlan: any, macs: none", []),
    (
        "parent: eth1, bridge: br0",
        ["3:23: network lan has both parent and bridge; keep one of them"],
    ),
    ("parent: eth1, kind: linux", ["3:23: kind is for bridge:; remove one"]),
    ("parent: eth1, ovsdb: unix:/run/db", ["3:23: ovsdb is for bridge:; remove one"]),
    ("parent: eth1, nat: {ipv4: 192.168.7.1/24}", ["3:23: nat is for bridge:; remove one"]),
    ("bridge: br0, mode: vepa", ["3:22: mode is for parent:; remove one"]),
    ("bridge: br0, macs: nic", ["3:22: network lan has bridge:, and so no macs; remove it"]),
    (
        "parent: eth1, isolated: true",
        ["3:23: network lan has parent:, and so no isolated; remove it"],
    ),
    (
        "parent: eth1, vlan: {trunk: [7]}",
        [
            "3:23: network lan has parent:, and its guests are in one VLAN, or in all; write vlan: "
            "VID, or vlan: any"
        ],
    ),
    (
        "parent: eth1, mtu: bridge",
        [
            "3:23: network lan has parent:, and there is no bridge; without mtu, a guest has the "
            "parent's"
        ],
    ),
    ("parent: eth1, mode: hairpin", [
        "3:29: mode must be bridge, vepa, private or passthru, not hairpin"
    ]),
    ("mtu: 1400", ["3:3: network lan has none of bridge and parent; give one of them"]),
]  # fmt: skip


@pytest.mark.parametrize(("body", "errors"), ALONE, ids=[body for body, _ in ALONE])
def test_what_a_network_on_an_interface_may_say(body: str, errors: list[str]) -> None:
    assert errors_of(policy(body)) == errors
    if not errors:
        assert is_in_schema(policy(body))


# A kind that only this test knows


@dataclass(frozen=True)
class TunnelPlace(Place):
    """A tunnel to a peer."""

    noun: ClassVar[str] = "peer"
    peer: str
    speed: str = "fast"

    @property
    def name(self) -> str:
        return self.peer


def tunnel_fields() -> tuple[Field, ...]:
    peer = Text("the name of a peer", str.isalnum, "^[A-Za-z0-9]+$")
    return (
        Field("peer", "network", peer, "The peer."),
        Field("speed", "network", Choice(("fast", "safe")), "How; fast."),
    )


def tunnel_faults(settings: Mapping[str, object]) -> Iterable[tuple[SettingName, str]]:
    vlan = settings.get("vlan")
    if vlan is None:
        yield "vlan", "its ports must be on a VLAN; write vlan: VID"
    elif isinstance(vlan, Vlan) and vlan.trunk:
        yield "vlan", "its ports are on one VLAN; write vlan: VID"


TUNNEL = KindSpec(
    name=cast(KindName, "tunnel"),
    title="a tunnel",
    label="tunnels",
    endpoint="macvtap",
    key="peer",
    place=TunnelPlace,
    fields=tunnel_fields,
    settings=frozenset({"mtu", "vlan"}),
)


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """One more row of SPECS."""
    yield from with_row(monkeypatch, replace(TUNNEL, faults=tunnel_faults))


@pytest.fixture
def of_taps(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """One more row, whose ports are taps."""
    yield from with_row(monkeypatch, replace(TUNNEL, endpoint="tap"))


def with_row(monkeypatch: pytest.MonkeyPatch, spec: KindSpec) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(kinds, "SPECS", (*kinds.SPECS, spec))
    for known in (fields_of, lacking):
        known.cache_clear()
    yield monkeypatch
    for known in (fields_of, lacking):
        known.cache_clear()


TUNNELS: list[tuple[str, list[str]]] = [
    ("peer: a", []),
    ("peer: a, speed: safe, mtu: 1400, vlan: 7", []),
    ("bridge: br0, kind: linux, isolated: true", []),
    ("bridge: br0, nat: {ipv4: 192.168.7.1/24}", []),
    ("mtu: 1400", ["3:3: network lan has none of bridge, parent and peer; give one of them"]),
    ("peer: a, bridge: br0", ["3:18: network lan has both peer and bridge; keep one of them"]),
    ("bridge: br0, peer: a", ["3:22: network lan has both bridge and peer; keep one of them"]),
    ("peer: a, ovsdb: unix:/run/db", ["3:18: ovsdb is for bridge:; remove one"]),
    ("peer: a, kind: linux", ["3:18: kind is for bridge:; remove one"]),
    ("bridge: br0, speed: safe", ["3:22: speed is for peer:; remove one"]),
    (
        "bridge: br0, nat: {ipv4: 192.168.7.1/24}, speed: safe",
        ["3:51: speed is for peer:; remove one"],
    ),
    ("peer: a, nat: {ipv4: 192.168.7.1/24}", ["3:18: nat is for bridge:; remove one"]),
    (
        "peer: a, isolated: true",
        ["3:18: network lan has peer:, and so no isolated; remove it"],
    ),
    (
        "peer: a, external_ids: {a: b}",
        ["3:18: network lan has peer:, and so no external_ids; remove it"],
    ),
    ("peer: a, kind: tunnel", [
        "3:18: kind is for bridge:; remove one",
        "3:24: kind must be linux or openvswitch, not tunnel",
    ]),
    ("peer: a.b", ["3:15: peer must be the name of a peer, not a.b"]),
    ("peer: a, pear: b", ["3:18: network lan has no key pear; did you mean peer?"]),
]  # fmt: skip


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize(("body", "errors"), TUNNELS, ids=[body for body, _ in TUNNELS])
def test_a_third_kind_is_read_and_so_is_the_schema(body: str, errors: list[str]) -> None:
    assert errors_of(policy(body)) == errors
    assert is_in_schema(policy(body)) == (not errors)


@pytest.mark.usefixtures("third")
def test_a_third_kind_has_its_own_place() -> None:
    network = network_of("peer: a, vlan: 7")
    assert (network.place, network.kind) == (TunnelPlace("a"), TUNNEL.name)
    assert (network.place.name, network.place.databases, network.made) == ("a", (), None)
    assert network_of("bridge: br0").place == BridgePlace("br0")


@pytest.fixture
def with_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """One more row, whose ports have a setting unless the network says otherwise."""
    yield from with_row(monkeypatch, replace(TUNNEL, defaults={"mtu": 1400}))


@pytest.mark.usefixtures("with_default")
@pytest.mark.parametrize(
    ("body", "rest", "mtu"),
    [
        ("peer: a", "", 1400),
        ("peer: a, mtu: 1300", "", 1300),
        ("peer: a, mtu: none", "", None),
        ("peer: a", ", mtu: none", None),
        ("peer: a, mtu: none", ", mtu: 1200", 1200),
    ],
)
def test_what_a_kind_gives_by_default(body: str, rest: str, mtu: int | None) -> None:
    vms = f"vms:\n  a:\n    nics:\n      - {{network: lan{rest}}}\n"
    found = parse_policy([Source("p", policy(body, vms).encode())])
    assert nic_port(found, found.vms["a"].nics[0]).settings.mtu == mtu


@pytest.mark.usefixtures("third")
def test_what_is_no_network_is_told_of_all_that_names_one() -> None:
    text = "version: 1\nnetworks: {lan: br0}\n"
    assert errors_of(text) == [
        "2:17: network lan must be a mapping with bridge, parent or peer, not br0"
    ]


NO_TAP = "network lan (p:3) has peer:, and a tap cannot be plugged in; name it in a NIC of vms:"


@pytest.mark.usefixtures("third")
def test_a_tap_cannot_be_plugged_in_where_qemu_is_given_something_else() -> None:
    rule = "rules:\n  - {tap: a, network: lan}\n"
    assert errors_of(policy("peer: a, vlan: 7", rule)) == [f"5:23: {NO_TAP}"]
    alone = parse_policy([Source("p", policy("peer: a, vlan: 7").encode())])
    with pytest.raises(Failure) as refused:
        port_on(alone, "lan", "t0")
    assert (refused.value.status, str(refused.value)) == (Status.REFUSED, NO_TAP)


@pytest.mark.usefixtures("third")
def test_a_nic_is_on_a_network_of_any_kind() -> None:
    vms = "vms:\n  a:\n    nics:\n      - {network: lan, vlan: 9}\n"
    found = parse_policy([Source("p", policy("peer: a, vlan: 7", vms).encode())])
    port = nic_port(found, found.vms["a"].nics[0])
    assert (port.place, port.settings.vlan) == (TunnelPlace("a"), Vlan(9))


ONE = "network lan has peer:, and its ports are on one VLAN; write vlan: VID"
NONE = "network lan (p:3) has peer:, and its ports must be on a VLAN; write vlan: VID"
TRUNK = "vlan: {trunk: [7]}"
FAULTS = [
    # What the network says of vlan, what the NIC does, and the errors.
    ("", ", vlan: 7", []),
    (", vlan: 7", "", []),
    (f", {TRUNK}", ", vlan: 7", [f"3:18: {ONE}"]),
    (f", {TRUNK}", "", [f"3:18: {ONE}"]),
    ("", "", [f"7:19: {NONE}"]),
    (", vlan: 7", ", vlan: none", [f"7:24: {NONE}"]),
    ("", f", {TRUNK}", [f"7:24: {ONE.replace('lan has', 'lan (p:3) has')}"]),
]


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize(("network", "nic", "errors"), FAULTS)
def test_what_a_kind_cannot_give_together(network: str, nic: str, errors: list[str]) -> None:
    vms = f"vms:\n  a:\n    nics:\n      - {{network: lan{nic}}}\n"
    assert errors_of(policy(f"peer: a{network}", vms)) == errors


@pytest.mark.usefixtures("of_taps")
def test_a_rule_leads_to_a_third_kind_whose_ports_are_taps() -> None:
    rule = "rules:\n  - {tap: a, network: lan}\n"
    found = parse_policy([Source("p", policy("peer: a", rule).encode())])
    decision = decide(found, Caller("a"))
    assert isinstance(decision, Attach) and decision.port.place == TunnelPlace("a")


# Who names a kind


def named_in(tree: ast.AST) -> list[str]:
    """Return the texts of a module that name a kind, its docstrings apart."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words = re.compile(rf"\b({'|'.join(get_args(KindName))})\b")
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
        and words.search(node.value)
    ]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""linux"""', 0),
        ('kind == "linux"', 1),
        ('f"{a} has kind: linux"', 1),
        ('KINDS = ("linux", "openvswitch")', 2),
        ('"linuxen"', 0),
    ],
)
def test_each_way_to_name_a_kind_is_seen(source: str, count: int) -> None:
    assert len(named_in(ast.parse(source))) == count


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_names_a_kind_but_the_kinds(path: Path) -> None:
    if path.parent != CONF / "kinds":
        assert named_in(ast.parse(path.read_text())) == []


# The man page


def rows_of_the_table() -> list[list[str]]:
    """Return the cells of the table of what a setting means on each kind, as plain text."""
    after = PAGE.read_text().partition(".SS What a setting means")[2]
    body = after.partition(".TS\n")[2].partition(".TE\n")[0].partition("lx.\n")[2]
    body = re.sub(r"T\{\n(.*?)\nT\}", r"\1", body, flags=re.DOTALL)
    body = re.sub(r"\\f.", "", body)
    return [line.split("|") for line in body.splitlines()]


def test_the_page_s_table_is_the_kinds() -> None:
    head, *rows = rows_of_the_table()
    assert head == ["setting", *(spec.label for spec in kinds.SPECS)]
    settings = {re.sub("^no ", "", row[0]).partition(":")[0].partition(",")[0] for row in rows}
    # NOTE: a trunk has rows of its own.
    assert settings == {*GIVEN, "trunk", "native"}
    for name, *cells in rows:
        if name in GIVEN:
            for spec, cell in zip(kinds.SPECS, cells, strict=True):
                assert (cell == "refused") == (name not in spec.settings), (name, spec.name)


@each_kind
def test_the_page_has_each_key_and_each_kind(spec: KindSpec) -> None:
    networks = PAGE.read_text().partition(".SH NETWORKS\n")[2].partition(".SH ")[0]
    for key in spec.own_keys:
        assert f".TP\n.B {key}\n" in networks
    if spec in kinds.said():
        entry = networks.partition(".TP\n.B kind\n")[2].partition(".TP\n")[0]
        assert re.search(rf"^\.BR? {spec.name}\b", entry, flags=re.MULTILINE)
    assert spec.title in networks
