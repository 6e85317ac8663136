"""The dialect: plain scalars are text until the schema gives them a type."""

from __future__ import annotations

import pytest
import yaml

from pyqemu_ifconf import load
from pyqemu_ifconf.failure import PolicyInvalid
from pyqemu_ifconf.kinds.bridge import BridgePlace
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import DEFAULT_TIMEOUT, Network, Policy, Rule, Vlan

pytestmark = pytest.mark.each_python

LOADERS = {"c": getattr(yaml, "CSafeLoader", yaml.SafeLoader), "python": yaml.SafeLoader}


@pytest.fixture(params=LOADERS, autouse=True)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LOADER", LOADERS[request.param])


def policy_of(text: str) -> Policy:
    return parse_policy([Source("policy.yaml", text.encode())])


def network_of(settings: str) -> Network:
    return policy_of(f"version: 1\nnetworks:\n  lan: {{bridge: br0, {settings}}}").networks["lan"]


def rule_of(match: str) -> Rule:
    return policy_of(f"version: 1\nrules:\n  - {{{match}, deny: x}}").rules[0]


# What PyYAML makes a number, a boolean, a date, nothing, or a MAC in base 60.
WORDS = [
    "no", "yes", "on", "off", "true", "null", "~", "0123", "0x10", "1_000", "1e3", "1.5", "1:30",
    "2001-01-01", "52:54:00:12:34:56", "52:54:00:ab:cd:ef", "-1", "+1", ".inf", "１０", "=",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("quotes", ["", '"', "'"])
def test_words_are_text(word: str, quotes: str) -> None:
    assert rule_of(f"vm: {quotes}{word}{quotes}").match == {"vm": (word,)}


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ("mtu: 68", "mtu", 68),
        ("mtu: 65521", "mtu", 65521),
        ("mtu: bridge", "mtu", "bridge"),
        ("mtu: none", "mtu", None),
        ('mtu: "none"', "mtu", None),
        ("txqueuelen: 0", "txqueuelen", 0),
        ("txqueuelen: 1000000", "txqueuelen", 1_000_000),
        ("isolated: true", "isolated", True),
        ("isolated: false", "isolated", False),
        ("vlan: 1", "vlan", Vlan(1)),
        ("vlan: 4094", "vlan", Vlan(4094)),
        ("vlan: none", "vlan", None),
        ("vlan: {trunk: [20]}", "vlan", Vlan(None, (20,))),
        ("vlan: {trunk: [30-32, 20, 4094-4094]}", "vlan", Vlan(None, (20, 30, 31, 32, 4094))),
        ('vlan: {trunk: ["30-31"]}', "vlan", Vlan(None, (30, 31))),
        ("vlan: {trunk: [1-4094], native: 5}", "vlan", Vlan(5, tuple(range(1, 4095)))),
        ("external_ids: {a: 01, b: none, c: 'none', 7: no}", "external_ids",
         (("a", "01"), ("b", None), ("c", "none"), ("7", "no"))),
        ("external_ids: none", "external_ids", None),
    ],
)  # fmt: skip
def test_setting(settings: str, name: str, value: object) -> None:
    given = network_of(settings).settings.given
    assert given == {name: value}
    assert type(given[name]) is type(value)


@pytest.mark.parametrize(
    "address",
    [
        "unix:/run/openvswitch/db.sock",
        "tcp:127.0.0.1:6640",
        "tcp:[::1]:6640",
        "tcp:[fe80::1%eth0]:1",
        "tcp:10.0.0.1:65535",
    ],
)
def test_ovsdb_address(address: str) -> None:
    assert network_of(f'ovsdb: "{address}"').place.databases == (address,)


@pytest.mark.parametrize(
    "address",
    [
        "unix:",
        "unix:db.sock",
        "unix:/a b",
        "tcp:127.0.0.1",
        "tcp:127.0.0.1:0",
        "tcp:127.0.0.1:65536",
        "tcp:127.0.0.01:1",
        "tcp:::1:6640",
        "tcp:[127.0.0.1]:1",
        "tcp:[::1%a b]:1",
        "tcp:host:1",
        "ptcp:6640",
        "ssl:127.0.0.1:6640",
    ],
)
def test_not_an_ovsdb_address(address: str) -> None:
    with pytest.raises(PolicyInvalid) as caught:
        network_of(f'ovsdb: "{address}"')
    assert [error.message for error in caught.value.errors] == [
        f'ovsdb must be unix:/PATH or tcp:ADDRESS:PORT, not "{address}"; the address is a number '
        "such as 127.0.0.1 or [::1], the port 1 to 65535"
    ]


def test_defaults() -> None:
    policy = policy_of("version: 1\nnetworks: {lan: {bridge: br0}}")
    assert (policy.timeout, policy.rules) == (DEFAULT_TIMEOUT, ())
    network = policy.networks["lan"]
    assert (network.place, network.settings.given) == (BridgePlace("br0"), {})


@pytest.mark.parametrize(
    "text",
    [
        "version: 1",
        "\ufeffversion: 1\n",
        "version: 1\r\n# x\r\n",
        "--- \nversion: 1\n...\n",
        '{"version": 1}',
        "# 日本\t\nversion: 1 #\tx\n",
    ],
)
def test_good_as_a_file(text: str) -> None:
    assert policy_of(text).rules == ()


def test_json_is_a_policy_too() -> None:
    text = '{"version": 1, "networks": {"l": {"bridge": "b", "vlan": {"trunk": [1, "3-4"]}}}}'
    assert policy_of(text).networks["l"].settings.given == {"vlan": Vlan(None, (1, 3, 4))}


def test_place_is_of_the_rule_and_of_the_network() -> None:
    policy = policy_of("version: 1\nnetworks:\n\n  e: {bridge: b}\n")
    assert str(policy.networks["e"].position) == "policy.yaml:4"
    rule = rule_of("tap: a")
    assert (str(rule.position), rule.position.column) == ("policy.yaml:3", 5)
