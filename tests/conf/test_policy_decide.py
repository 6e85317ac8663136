"""What a policy decides: globs, rules from the top, and the Port that comes of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.globs import glob_fault, matches
from pyqemu_ifconf.kinds.bridge import BridgePlace
from pyqemu_ifconf.kinds.openvswitch import OvsPlace
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import (
    LEAVE_IS_ROOTS,
    MATCH_KEYS,
    Attach,
    Caller,
    Decision,
    Deny,
    Leave,
    MatchKey,
    Network,
    Policy,
    Port,
    PortSettings,
    Position,
    Rule,
    Vlan,
    choose,
    decide,
    is_left,
    policy_asks,
    port_on,
    why_not,
)

pytestmark = pytest.mark.each_python

GLOBS = [
    # glob, what it matches, what it does not
    ("web0", ["web0"], ["web", "web00", "Web0", ""]),
    ("web*", ["web", "web0", "web*"], ["we", "xweb", "WEB"]),
    ("*", ["", "a", "ab"], []),
    ("*0", ["0", "web0", "00"], ["", "web01"]),
    ("w*b*0", ["wb0", "web0", "wbb00"], ["w0", "wb"]),
    ("?", ["a", "?"], ["", "ab"]),
    ("web?", ["web0"], ["web", "web10"]),
    ("web[0-9]", ["web0", "web9"], ["web", "weba", "web10"]),
    ("web[!0-9]", ["weba", "web!"], ["web5", "web"]),
    ("[abc]x", ["ax", "cx"], ["dx", "x"]),
    ("[a-]x", ["ax", "-x"], ["bx"]),
    ("[-a]x", ["ax", "-x"], ["bx"]),
    ("[!-a]x", ["bx"], ["ax", "-x"]),
    ("[a-c-e]", ["b", "-", "e"], ["d"]),
    ("[^a]", ["^", "a"], ["b"]),
    ("[a!]", ["a", "!"], ["b"]),
    ("[!!]", ["a"], ["!"]),
    ("[[]x", ["[x"], ["x"]),
    ("x]", ["x]"], ["x"]),
    ("*[*]?", ["*a", "b*a"], ["aa"]),
    ("a.b", ["a.b"], ["axb"]),
    ("a\\*", ["a\\", "a\\b"], ["a*", "a"]),
    ("{a,b}", ["{a,b}"], ["a"]),
    ("52:54:*", ["52:54:00:12:34:56"], ["52:55:00:12:34:56"]),
]


@pytest.mark.parametrize(("glob", "yes", "no"), GLOBS, ids=[row[0] for row in GLOBS])
def test_glob(glob: str, yes: list[str], no: list[str]) -> None:
    assert glob_fault(glob) is None
    assert [text for text in yes + no if matches(glob, text)] == yes


@settings(deadline=None)
@given(st.text("ab*?", max_size=12), st.text("ab*?", max_size=20))
def test_stars_match_as_everywhere(glob: str, text: str) -> None:
    assert matches(glob, text) == fnmatch.fnmatchcase(text, glob)


@settings(deadline=None)
@given(st.text("abc*?[]!-^", max_size=12), st.text("abc[]!-^", max_size=8))
def test_well_formed_globs_match_without_a_fault(glob: str, text: str) -> None:
    if glob_fault(glob) is None:
        assert matches(glob, text) in (True, False)


def test_many_stars_are_matched_in_time() -> None:
    assert not matches("*a" * 100 + "b", "a" * 5000)


@pytest.mark.parametrize(
    ("glob", "fault"),
    [
        ("web[0-9", "its [ has no ]; to match a [ itself, write [[]"),
        ("[]x", "[] is an empty set"),
        ("a[!]", "[!] is an empty set"),
        ("a[!9-0]b", "the range 9-0 in [!9-0] runs backwards"),
    ],
)
def test_glob_fault(glob: str, fault: str) -> None:
    assert glob_fault(glob) == fault


POLICY = """\
version: 1
networks:
  lan: {bridge: br0}
  tenants:
    bridge: br-int
    kind: openvswitch
    ovsdb: tcp:127.0.0.1:6640
    mtu: 8950
    vlan: {native: 10, trunk: [30-32, 20]}
    isolated: true
    txqueuelen: 500
    external_ids: {owner: net, team: a}
rules:
  - {tap: web*, network: tenants}
  - {tap: bare*, network: tenants, mtu: none, vlan: none, isolated: none, txqueuelen: none,
     external_ids: none}
  - {tap: own*, network: tenants, mtu: bridge, vlan: 7, isolated: false, txqueuelen: 0,
     external_ids: {owner: none, team: b, role: "none"}}
  - {vm: [fw-*, gw], mac: [52:54:00:*, "AA:*"], network: lan}
  - {netdev: uplink, user: root, network: lan}
  - {tap: "*9", deny: ends with nine}
  - {user: "*", deny: some user}
"""


def policy_of(text: str) -> Policy:
    return parse_policy([Source("policy.yaml", text.encode())])


def port(tap: str, line: int) -> Port:
    return Port(tap, "lan", BridgePlace("br0"), Position("policy.yaml", line, 5))


def test_a_tap_is_left_alone_for_root_only() -> None:
    rules = "[{tap: own*, vm: fw, leave: true}, {tap: own*, deny: no}]"
    policy = policy_of(f"version: 1\nrules: {rules}")
    who = Caller("own0", vm="fw")
    assert decide(policy, who) == choose(policy, who) == Leave(policy.rules[0])
    assert is_left(policy_of("version: 1\nrules: [{tap: own*, leave: true}]"), "own0")
    assert not is_left(policy, "own0"), "its guest's name is not known"


@pytest.mark.parametrize("root_made", [False, True], ids=["of its own", "of root's making"])
@pytest.mark.parametrize("way", [decide, choose])
def test_a_tap_of_a_user_s_is_not_left_alone(
    way: Callable[[Policy, Caller], Decision], root_made: bool
) -> None:
    policy = policy_of("version: 1\nrules: [{tap: own*, vm: fw, leave: true}]")
    user = Caller("own0", vm="fw", unprivileged=True, root_made=root_made)
    assert way(policy, user) == Deny(LEAVE_IS_ROOTS, policy.rules[0])


TENANTS = Port(
    "web0",
    "tenants",
    OvsPlace("br-int", "tcp:127.0.0.1:6640"),
    Position("policy.yaml", 14, 5),
    PortSettings(
        mtu=8950,
        vlan=Vlan(10, (20, 30, 31, 32)),
        isolated=True,
        external_ids=(("owner", "net"), ("team", "a")),
        txqueuelen=500,
    ),
)
BARE = Port(
    "bare0", "tenants", OvsPlace("br-int", "tcp:127.0.0.1:6640"), Position("policy.yaml", 15, 5)
)
OWN = Port(
    "own0",
    "tenants",
    OvsPlace("br-int", "tcp:127.0.0.1:6640"),
    Position("policy.yaml", 17, 5),
    PortSettings(
        mtu=None,
        vlan=Vlan(7),
        isolated=False,
        external_ids=(("team", "b"), ("role", "none")),
        txqueuelen=0,
    ),
)
MAC = "52:54:00:12:34:56"

DECISIONS = [
    ("the network's settings", Caller("web0"), TENANTS, None),
    ("none unsets", Caller("bare0"), BARE, None),
    ("the rule overrides", Caller("own0"), OWN, None),
    ("two keys", Caller("t0", vm="fw-1", mac=MAC), port("t0", 19), None),
    ("second of a list", Caller("t0", vm="gw", mac="aa:00:00:00:00:01"), port("t0", 19), None),
    ("upper-case MAC", Caller("t0", vm="gw", mac="AA:0B:00:00:00:01"), port("t0", 19), None),
    ("one key of two", Caller("t0", vm="fw-1", mac="52:54:01:00:00:00"), None, "no rule matches"),
    ("one key unknown", Caller("t0", vm="fw-1"), None, "no rule matches"),
    ("netdev and user", Caller("t0", netdev="uplink", user="root"), port("t0", 20), None),
    ("a deny rule", Caller("t9"), None, "ends with nine"),
    ("the first decides", Caller("web9"), TENANTS, None),
    ("a star matches what is known", Caller("t0", user="1000"), None, "some user"),
    ("a star does not match the unknown", Caller("t0"), None, "no rule matches"),
    ("case matters", Caller("Web0"), None, "no rule matches"),
]


@pytest.mark.parametrize(
    ("caller", "wanted", "because"), [row[1:] for row in DECISIONS], ids=[r[0] for r in DECISIONS]
)
def test_decide(caller: Caller, wanted: Port | None, because: str | None) -> None:
    decision = decide(policy_of(POLICY), caller)
    if wanted is None:
        assert isinstance(decision, Deny)
        assert decision.because == because
    else:
        assert isinstance(decision, Attach)
        assert decision.port == replace(wanted, tap=caller.tap)
        assert decision.rule is not None and decision.rule.position == decision.port.position


def test_passed_over_says_why() -> None:
    decision = decide(policy_of(POLICY), Caller("t9", vm="gw", mac="00:00:00:00:00:01"))
    assert [(over.rule.position.line, over.because) for over in decision.passed_over] == [
        (14, "tap web* does not match t9"),
        (15, "tap bare* does not match t9"),
        (17, "tap own* does not match t9"),
        (19, "none of mac 52:54:00:*, AA:* matches 00:00:00:00:00:01"),
        (20, "netdev is unknown"),
    ]
    assert decision.rule is not None and decision.rule.position.line == 21


def test_no_rules_deny() -> None:
    assert decide(policy_of("version: 1"), Caller("web0")) == Deny("no rule matches", None)


def test_of_many_rules_the_right_one_decides() -> None:
    rules = "".join(
        f"- {{tap: '*w{i}', network: lan, vlan: {i % 4094 + 1}}}\n" for i in range(5000)
    )
    policy = policy_of(f"version: 1\nnetworks: {{lan: {{bridge: br0}}}}\nrules:\n{rules}")
    decision = decide(policy, Caller("w4999"))
    assert isinstance(decision, Attach)
    assert (decision.port.settings.vlan, len(decision.passed_over)) == (Vlan(906), 4999)


def test_port_on_a_network_by_name() -> None:
    policy = policy_of(POLICY)
    assert port_on(policy, "lan", "x9") == Port(
        "x9", "lan", BridgePlace("br0"), Position("policy.yaml", 3, 3)
    )
    named = port_on(policy, "tenants", "web0")
    assert (named.settings.vlan, named.settings.external_ids) == (
        TENANTS.settings.vlan,
        TENANTS.settings.external_ids,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (POLICY, "network dmz: the policy does not define it; the networks are lan, tenants"),
        (
            "version: 1",
            "network dmz: the policy does not define it; the policy defines no network at all",
        ),
    ],
)
def test_port_on_an_unknown_network(text: str, message: str) -> None:
    with pytest.raises(Failure) as caught:
        port_on(policy_of(text), "dmz", "web0")
    assert (caught.value.status, str(caught.value)) == (Status.DENIED, message)


def test_a_network_may_unset_what_it_does_not_have() -> None:
    policy = policy_of(
        "version: 1\nnetworks: {l: {bridge: b, vlan: none, external_ids: {a: none}}}"
    )
    assert port_on(policy, "l", "t") == Port(
        "t", "l", BridgePlace("b"), Position("policy.yaml", 2, 12)
    )


def test_policy_asks_only_for_what_a_rule_looks_at() -> None:
    policy = policy_of(POLICY)
    assert [key for key in MATCH_KEYS if policy_asks(policy, key)] == list(MATCH_KEYS)
    policy = policy_of("version: 1\nrules: [{tap: a, vm: b, deny: c}]")
    assert [key for key in MATCH_KEYS if policy_asks(policy, key)] == ["tap", "vm"]


WORDS = st.text("abA0:-", max_size=3)
GLOB = st.lists(
    st.one_of(WORDS, st.sampled_from(["*", "?", "[ab]", "[!a]"])), min_size=1, max_size=3
).map("".join)
RULE = st.fixed_dictionaries(
    {}, optional={key: st.lists(GLOB.filter(bool), min_size=1, max_size=2) for key in MATCH_KEYS}
).filter(bool)
CALLER = st.builds(
    Caller,
    st.text("abA0:-", min_size=1, max_size=5),
    *[st.none() | st.text("abA0:-", max_size=5) for _ in MATCH_KEYS[1:]],
)


@settings(deadline=None, max_examples=300)
@given(st.lists(RULE, max_size=8), st.lists(CALLER, min_size=1, max_size=4))
def test_the_quick_choice_is_the_decision(
    rules: list[dict[MatchKey, list[str]]], callers: list[Caller]
) -> None:
    position = Position("policy.yaml", 1, 1)
    policy = Policy(
        ("policy.yaml",),
        {"lan": Network("lan", position, BridgePlace("br0"))},
        tuple(
            Rule(
                replace(position, line=line),
                {key: tuple(globs) for key, globs in rule.items()},
                *(("lan", None) if line % 2 else (None, "no")),
            )
            for line, rule in enumerate(rules)
        ),
    )
    for caller in callers:
        assert choose(policy, caller) == replace(decide(policy, caller), passed_over=())
    for key in MATCH_KEYS:
        assert policy_asks(policy, key) == any(key in rule for rule in rules)


def test_of_many_rules_few_are_looked_at() -> None:
    rules = "".join(f"  - {{vm: guest-{number}-*, network: lan}}\n" for number in range(5000))
    text = f"version: 1\nnetworks:\n  lan: {{bridge: br0}}\nrules:\n{rules}"
    policy = policy_of(text + "  - {tap: '*', deny: unknown}\n")
    values: dict[MatchKey, str | None] = dict.fromkeys(MATCH_KEYS)
    assert policy.index.candidates({**values, "tap": "tap0"}) == [5000]
    assert policy.index.candidates({**values, "tap": "tap0", "vm": "guest-4321-a"}) == [4321, 5000]


USERS = """\
version: 1
networks:
  lan: {bridge: br0, users: [bob], isolated: true, vlan: 5}
rules:
  - {vm: gone, deny: never}
  - {vm: mgmt*, network: lan, isolated: false}
  - {netdev: n9, network: lan, vlan: none}
  - {mac: "52:*", network: lan, mtu: 1400}
  - {tap: own*, network: lan, vlan: 7}
  - {tap: own*, vm: x, network: lan, vlan: 8}
  - {vm: same, network: lan, isolated: true, vlan: 5}
  - {user: bob, vm: v9, network: lan, vlan: 9}
  - {tap: tap1, network: lan, vlan: 10}
  - {tap: "*", network: lan}
vms:
  web: {nics: [{network: lan, tap: web-0, vlan: 11}]}
"""


@pytest.mark.parametrize(
    ("column", "unprivileged", "root_made"),
    [(0, False, False), (1, True, False), (2, True, True)],
    ids=["root", "a user", "a user with a tap of root's"],
)
@pytest.mark.parametrize(
    ("caller", "lines"),
    [
        # The line of the rule that decides: for root, a user, and a user with a tap of root's.
        (Caller("tap0", vm="mgmt1", user="bob"), (6, 14, 14)),
        (Caller("tap0", netdev="n9", user="bob"), (7, 14, 14)),
        (Caller("tap0", mac="52:54:00:00:00:01", user="bob"), (8, 14, 14)),
        (Caller("own0", user="bob"), (9, 14, 9)),
        (Caller("own0", vm="x", user="bob"), (9, 14, 9)),
        (Caller("own0", vm="mgmt1", user="bob"), (6, 14, 9)),
        (Caller("tap0", vm="same", user="bob"), (11, 11, 11)),
        (Caller("tap0", vm="v9", user="bob"), (12, 12, 12)),
        (Caller("tap1", user="bob"), (13, 14, 13)),
        (Caller("web-0", vm="mgmt1", user="bob"), (16, 16, 16)),
        (Caller("tap0", vm="gone", user="bob"), (5, 5, 5)),
    ],
    ids=[
        "a vm",
        "a netdev",
        "a MAC",
        "a tap",
        "a tap and a vm",
        "a tap, and a vm before it",
        "a vm with its network's own settings",
        "a user's vm",
        "a tap after a user's vm",
        "a NIC of a guest",
        "a denial",
    ],
)
def test_what_a_user_can_make_up_changes_no_settings(
    caller: Caller, lines: tuple[int, int, int], column: int, unprivileged: bool, root_made: bool
) -> None:
    policy = parse_policy([Source("p.yaml", USERS.encode())])
    who = replace(caller, unprivileged=unprivileged, root_made=root_made)
    decision = decide(policy, who)
    assert decision.rule is not None
    assert decision.rule.position.line == lines[column]
    assert choose(policy, who).rule is decision.rule
    for passed in decision.passed_over:
        assert ("counts for no unprivileged user" in passed.because) is (
            why_not(passed.rule, who) is None
        )
