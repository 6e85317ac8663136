"""Who may plug what in: users and groups, deny_users, bridge.conf, names and numbers of taps."""

from __future__ import annotations

import os
import pwd
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqemu_ifconf.bridge_conf import FILES_MAX, NOTHING, SIZE_MAX, BridgeConf, read_bridge_conf
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Attach, Caller, Network, Policy, choose, port_on
from pyqemu_ifconf.shell import readable
from pyqemu_ifup.access import User, find_user, may_use
from pyqemu_ifup.entitled import (
    check_owner,
    check_quota,
    find_network,
    pick_name,
    refuse_bridge_name,
    taps_of,
)
from pyqemu_ifup.look import Link
from pyqemu_ifup.mark import Mark, format_alias

POLICY = parse_policy([Source("p.yaml", b"""\
version: 1
networks:
  lan: {bridge: br0, users: [alice, "@staff"], deny_users: [bob, "@guests"]}
  web: {bridge: br-int, users: [alice], vlan: 100, tap_name: web%d, max_taps: 1}
  fw: {bridge: br-int, users: ["@staff"], vlan: {trunk: [20]}}
  nobody: {bridge: br1, vlan: 5}
  trunk: {bridge: br2, vlan: {native: 1, trunk: [2]}}
  br3: {bridge: br4, users: [alice]}
  other: {bridge: br3, users: [alice]}
  odd: {bridge: br5, users: [alice]}
  plain: {bridge: br6, deny_users: [bob], isolated: false, vlan: none, mtu: 1400}
  access: {bridge: br6, vlan: 5}
  iso: {bridge: br7, isolated: true}
vms:
  vm: {users: [alice], nics: [{network: lan, tap: vm.1}, {network: odd, tap: a;b}]}
rules:
  - {tap: [db*, "adm?"], network: nobody}
  - {tap: no*, deny: never}
  - {tap: "l*", network: lan}
  - {tap: "*", vm: x, network: nobody}
  - {tap: "**", deny: no rule for it}
""")])  # fmt: skip


def denied(call: object) -> str:
    """Return the text of the Failure (77) that the call raises."""
    assert callable(call)
    with pytest.raises(Failure) as caught:
        call()
    assert caught.value.status is Status.DENIED
    return str(caught.value)


@pytest.mark.parametrize(
    ("network", "uid", "login", "groups", "text"),
    [
        ("lan", 1000, "alice", (), None),
        ("lan", 1001, "carol", ("staff",), None),
        ("lan", 1001, "carol", ("kvm",), "user carol may not use network lan: neither the user "
         "nor one of the user's groups is among its users (p.yaml:3); whoever keeps the policy "
         "can add carol to its users"),
        ("lan", 1002, "bob", ("staff",), "user bob may not use network lan: bob is among its "
         "deny_users (p.yaml:3); ask who keeps the policy"),
        ("lan", 1000, "alice", ("guests",), "user alice may not use network lan: @guests is among "
         "its deny_users (p.yaml:3); ask who keeps the policy"),
        ("lan", 1003, "staff", (), "user staff may not use network lan"),
        ("lan", 1003, "x", ("alice",), "user x may not use network lan"),
        ("lan", 1003, "@staff", (), "user @staff may not"),
        ("lan", 1003, "Alice", (), "user Alice may not"),
        ("nobody", 1000, "alice", ("staff",), "user alice may not use network nobody"),
        ("nobody", 0, "root", (), None),
        ("lan", 0, "bob", ("guests",), None),
    ],
)  # fmt: skip
def test_may_use(
    network: str, uid: int, login: str, groups: tuple[str, ...], text: str | None
) -> None:
    if text is None:
        may_use(POLICY.networks[network], uid, login, groups)
        return
    said = denied(lambda: may_use(POLICY.networks[network], uid, login, groups))
    assert said.startswith(text) if not text.endswith(":") else said == text


@pytest.mark.parametrize(
    ("name", "login", "groups", "found"),
    [
        ("lan", "alice", (), "lan"),
        ("br0", "alice", (), "lan"),
        ("br-int", "alice", (), "web"),
        ("br-int", "carol", ("staff",), "fw"),
        ("br3", "alice", (), "br3"),
        ("br4", "alice", (), "br3"),
    ],
)
def test_a_network_before_a_bridge(
    name: str, login: str, groups: tuple[str, ...], found: str
) -> None:
    assert find_network(POLICY, name, 1000, login, groups).name == found


@pytest.mark.parametrize(
    ("name", "uid", "login", "groups", "text"),
    [
        (
            "br-int",
            1000,
            "alice",
            ("staff",),
            "bridge br-int is not enough: the networks web and fw are on it; give the name of one, "
            "as in br=web",
        ),
        ("br-int", 0, "root", (), "bridge br-int is not enough: the networks web and fw are on it"),
        ("br-int", 1001, "carol", (), "user carol may use no network on bridge br-int: neither"),
        ("br1", 1001, "carol", (), "user carol may not use network nobody: "),
        ("br9", 1000, "alice", (), "no network and no bridge br9: p.yaml names none; "),
        ("br\n9", 0, "root", (), "no network and no bridge 'br\\n9': "),
        ("web", 1001, "carol", (), "user carol may not use network web: "),
        ("br3", 1001, "carol", (), "user carol may not use network br3: "),
    ],
)
def test_no_network(name: str, uid: int, login: str, groups: tuple[str, ...], text: str) -> None:
    assert denied(lambda: find_network(POLICY, name, uid, login, groups)).startswith(text)


def conf(allowed: str = "", denied: str = "") -> BridgeConf:
    return BridgeConf(frozenset(allowed.split()), frozenset(denied.split()))


@pytest.mark.parametrize(
    ("network", "login", "bridge_conf", "text"),
    [
        ("plain", "eve", conf("br6"), None),
        ("plain", "eve", conf("all"), None),
        ("plain", "eve", conf("br0"), "neither the user nor"),
        ("plain", "eve", conf("br6", "br6"), "bridge.conf denies its bridge br6"),
        ("plain", "eve", conf("br6", "all"), "bridge.conf denies its bridge br6"),
        ("lan", "alice", conf("", "br0"), "bridge.conf denies its bridge br0"),
        ("lan", "alice", conf("", "br1"), None),
        ("plain", "bob", conf("br6"), "bob is among its deny_users"),
        (
            "lan",
            "eve",
            conf("br0"),
            "and that bridge.conf allows br0 admits to no network with users:",
        ),
        ("nobody", "eve", conf("br1"), "admits to no network with vlan:"),
        ("trunk", "eve", conf("all"), "admits to no network with vlan:"),
        ("fw", "eve", conf("br-int"), "admits to no network with users:"),
        ("iso", "eve", conf("all"), "admits to no network with isolated:"),
    ],
)
def test_bridge_conf_is_a_further_source(
    network: str, login: str, bridge_conf: BridgeConf, text: str | None
) -> None:
    if text is None:
        may_use(POLICY.networks[network], 1000, login, (), bridge_conf)
    else:
        assert text in denied(
            lambda: may_use(POLICY.networks[network], 1000, login, (), bridge_conf)
        )
    may_use(POLICY.networks[network], 0, "root", (), bridge_conf)


SETTINGS_OF_RULES = parse_policy([Source("p.yaml", b"""\
version: 1
networks:
  lan: {bridge: br0}
  all: {bridge: br0, vlan: {trunk: [20]}}
  iso: {bridge: br0, isolated: true}
rules:
  - {tap: fw*, network: lan, vlan: {native: 1, trunk: [2]}}
  - {tap: one*, network: lan, vlan: 20}
  - {tap: iso*, network: lan, isolated: true}
  - {tap: un*, network: all, vlan: none}
  - {tap: is*, network: iso, isolated: false}
  - {tap: mtu*, network: lan, mtu: 1400}
  - {tap: "*", network: lan}
""")])  # fmt: skip


def admit(tap: str) -> None:
    decision = choose(SETTINGS_OF_RULES, Caller(tap))
    assert isinstance(decision, Attach)
    network = SETTINGS_OF_RULES.networks[decision.port.network]
    may_use(network, 1000, "eve", (), conf("br0"), decision.port)


@pytest.mark.parametrize("tap", ["tap0", "mtu0"])
def test_bridge_conf_admits_to_settings_that_reach_nobody_else(tap: str) -> None:
    admit(tap)


@pytest.mark.parametrize(
    ("tap", "text"),
    [
        ("fw0", "admits to no network with vlan: (p.yaml:7)"),
        ("one0", "admits to no network with vlan: (p.yaml:8)"),
        ("iso0", "admits to no network with isolated: (p.yaml:9)"),
        ("un0", "admits to no network with vlan: (p.yaml:10)"),
        ("is0", "admits to no network with isolated: (p.yaml:11)"),
    ],
)
def test_bridge_conf_admits_to_no_settings_of_a_rule(tap: str, text: str) -> None:
    assert text in denied(lambda: admit(tap))


def test_bridge_conf_admits_to_no_settings_of_a_network() -> None:
    trunk = port_on(SETTINGS_OF_RULES, "all", "one0")
    network = SETTINGS_OF_RULES.networks["all"]
    assert "admits to no network with vlan:;" in denied(
        lambda: may_use(network, 1000, "eve", (), conf("br0"), trunk)
    )


def test_bridge_conf_leaves_the_one_network_that_is_all_of_a_bridge() -> None:
    assert find_network(POLICY, "br6", 1000, "eve", (), conf("br6")).name == "plain"


@pytest.mark.parametrize(
    ("network", "wish", "uid", "got"),
    [
        ("lan", "", 1000, "tap%d"),
        ("web", "", 1000, "web%d"),
        ("lan", "tap7", 1000, "tap7"),
        ("web", "web0", 1000, "web0"),
        ("lan", "vm.1", 1000, "vm.1"),
        ("lan", "vm.1", 0, "vm.1"),
        ("lan", "db1", 0, "db1"),
        ("lan", "a;b", 0, "a;b"),
        ("lan", "mine", 1000, None),
        ("lan", "l0", 1000, None),
        ("lan", "db1", 1000, None),
        ("lan", "adm1", 1000, None),
        ("lan", "web0", 1000, None),
        ("web", "tap0", 1000, None),
        ("web", "vm.1", 1000, None),
        ("nobody", "db1", 1000, None),
        ("lan", "wg0", 1000, None),
        ("lan", "docker0", 1000, None),
        ("lan", "ens9", 1000, None),
    ],
)
def test_a_user_s_tap_has_a_name_of_its_network_s(
    network: str, wish: str, uid: int, got: str | None
) -> None:
    user = User(uid, "alice", ())
    if got is not None:
        name, found = pick_name(POLICY, POLICY.networks[network], wish, user)
        assert (name, found is not None) == (got, wish == "vm.1")
    else:
        text = denied(lambda: pick_name(POLICY, POLICY.networks[network], wish, user))
        assert text.startswith(f"the name {wish} is not for network {network}: its tap_name is ")


def test_a_guest_s_tap_is_for_its_users_alone() -> None:
    lan = POLICY.networks["lan"]
    text = denied(lambda: pick_name(POLICY, lan, "vm.1", User(1001, "carol", ("staff",))))
    assert text.startswith("user carol may not have the taps of guest vm: ")


@pytest.mark.parametrize("network", ["lan", "odd"])
@pytest.mark.parametrize("wish", ["--help", "-x", "$(id)", "a;b", "a&b", ".a", "_a", "a+b", "'"])
def test_a_user_s_tap_has_a_name_that_no_shell_minds(wish: str, network: str) -> None:
    net = POLICY.networks[network]
    text = denied(lambda: pick_name(POLICY, net, wish, User(1000, "alice", ())))
    assert text.startswith(f"{readable(wish)} is no name for a user's tap: it has letters, ")
    assert pick_name(POLICY, net, wish, User(0, "root", ()))[0] == wish


@pytest.mark.parametrize("uid", [0, 1000])
def test_no_tap_has_the_name_of_a_bridge(uid: int) -> None:
    text = "the name br1 is not for a tap: it is that of the bridge of network nobody (p.yaml:6)"
    fixed = replace(POLICY.networks["lan"], tap_name="br1")
    lan, user = POLICY.networks["lan"], User(uid, "alice", ())
    assert denied(lambda: pick_name(POLICY, lan, "br1", user)).startswith(text)
    assert denied(lambda: pick_name(POLICY, fixed, "", user)).startswith(text)
    refuse_bridge_name(POLICY, "br70")


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("wish", ["a/b", "..", "x" * 16, "tap%d", "a b", "\udcff", "é"])
def test_what_is_no_name_is_usage(wish: str, uid: int) -> None:
    with pytest.raises(Failure) as caught:
        pick_name(POLICY, POLICY.networks["lan"], wish, User(uid, "alice", ()))
    assert caught.value.status is Status.USAGE


LINK = Link(7, "tap0", "tun", True, True, 1500, "", 1000, None, "", True)


@pytest.mark.parametrize(
    ("owner", "uid", "good"), [(1000, 1000, True), (1000, 1001, False), (None, 1000, False),
                               (0, 1000, False), (None, 0, True), (1000, 0, True)]
)  # fmt: skip
def test_check_owner(owner: int | None, uid: int, good: bool) -> None:
    link = replace(LINK, owner=owner, persistent=True)
    if good:
        check_owner(link, uid, "lan")
    else:
        whose = "nobody" if owner is None else f"user {owner}"
        text = denied(lambda: check_owner(link, uid, "lan"))
        assert text.startswith(f"somebody else's tap: {whose} owns it, not user {uid}; ")


def test_the_mark_tells_whose_a_tap_is_and_without_it_the_owner() -> None:
    def link(name: str, network: str, uid: int | None, owner: int | None) -> Link:
        mark = Mark(network, "linux", "br0", "", 1, 1, None, uid)
        return replace(LINK, name=name, alias=format_alias(mark), owner=owner)

    links = [
        link("given-away", "lan", 1000, 1001),
        link("kept", "lan", 1000, 1000),
        link("persistent", "lan", None, 1000),
        link("another's", "lan", 1001, 1001),
        link("elsewhere", "web", 1000, 1000),
        link("root's", "lan", None, None),
        replace(LINK, name="loose", owner=1000),
    ]
    assert taps_of(links, "lan", 1000) == {"given-away", "kept", "persistent"}
    assert taps_of(links, "lan", 1001) == {"another's"}


def test_check_quota() -> None:
    network: Network = POLICY.networks["web"]
    check_quota(network, 1000, "alice", set())
    check_quota(network, 0, "root", {"web0", "web1"})
    assert denied(lambda: check_quota(network, 1000, "alice", {"web0"})) == (
        "user alice has 1 tap on network web already: max_taps is 1 (p.yaml:4); end a QEMU that "
        "has one"
    )


def test_who_a_user_is() -> None:
    entry = pwd.getpwuid(os.getuid())
    user = find_user(os.getuid())
    login, groups = user.login, user.groups
    assert login == entry.pw_name
    assert len(groups) >= 1
    uid = next(uid for uid in range(3_000_000_000, 3_000_000_100) if find_user(uid).groups == ())
    assert find_user(uid) == User(uid, str(uid), ())


def reading(files: dict[str, str]) -> BridgeConf:
    def read(path: str) -> bytes | None:
        text = files.get(path)
        return None if text is None else text.encode("utf-8", "surrogateescape")

    return read_bridge_conf("/b", read)


@pytest.mark.parametrize(
    ("files", "allowed", "denied"),
    [
        ({}, "", ""),
        ({"/b": ""}, "", ""),
        ({"/b": "allow br0"}, "br0", ""),
        ({"/b": "allow br0\r\n"}, "br0", ""),
        ({"/b": "# allow br0\n  \t# x\n\n \v\nallow\tbr0\n"}, "br0", ""),
        ({"/b": "  allow   br0  \ndeny br1\nallow all\ndeny all\n"}, "br0 all", "br1 all"),
        ({"/b": "include /c\nallow br0\n", "/c": "deny br0\n"}, "br0", "br0"),
        ({"/b": "include /nowhere\nallow br0\n"}, "br0", ""),
        ({"/b": "include /b\nallow br0\n"}, "br0", ""),
        ({"/b": "include /c\n", "/c": "include /b\nallow br0"}, "br0", ""),
    ],
)
def test_bridge_conf(files: dict[str, str], allowed: str, denied: str) -> None:
    assert reading(files) == conf(allowed, denied)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"/b": "allow"}, "/b:1: '' is not the name of a bridge, nor all"),
        ({"/b": "\nallow br0 # mine"}, "/b:2: 'br0 # mine' is not the name of a bridge, nor all"),
        ({"/b": "deny \n"}, "/b:1: '' is not the name of a bridge, nor all"),
        ({"/b": "allow br0 br1"}, "/b:1: 'br0 br1' is not the name of a bridge"),
        ({"/b": "allow\tbr0 x"}, "/b:1: 'allow\\tbr0' is not allow, deny or include"),
        ({"/b": "Allow br0"}, "/b:1: 'Allow' is not allow"),
        ({"/b": "allow abcdefghijklmnop"}, "/b:1: 'abcdefghijklmnop' is not the name"),
        ({"/b": "allow \udcff"}, "/b:1: '\\udcff' is not the name"),
        ({"/b": "include c.conf"}, "/b:1: 'c.conf' is not the absolute path of a file"),
        ({"/b": "include /c\n", "/c": "nonsense x"}, "/c:1: 'nonsense' is not allow"),
        ({"/b": "#" * (SIZE_MAX + 1)}, f"/b: it has more than {SIZE_MAX} bytes"),
        ({"/b": "".join(f"include /{n}\n" for n in range(FILES_MAX))},
         f"/b: it includes more than {FILES_MAX} files"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:30],
)  # fmt: skip
def test_bridge_conf_that_says_nothing_sensible(files: dict[str, str], text: str) -> None:
    with pytest.raises(Failure) as caught:
        reading(files)
    assert caught.value.status is Status.POLICY_INVALID
    assert str(caught.value).startswith(text)


LINE = st.one_of(
    st.text(max_size=20),
    st.builds("{}{}{}".format, st.sampled_from(["allow", "deny", "include", "#"]),
              st.sampled_from([" ", "\t", "  ", ""]), st.sampled_from(["br0", "all", "/b", "/c"])),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(LINE, max_size=8), st.lists(LINE, max_size=8))
def test_any_bridge_conf_is_read_or_refused(first: list[str], second: list[str]) -> None:
    files = {"/b": "\n".join(first), "/c": "\n".join(second)}
    try:
        found = reading({k: v.encode("utf-8", "replace").decode() for k, v in files.items()})
    except Failure as failure:
        assert failure.status is Status.POLICY_INVALID
        return
    for bridge in ("br0", "br1"):
        assert not (found.allows(bridge) and found.denies(bridge))
        words = [line.split() for text in files.values() for line in text.split("\n")]
        assert not found.denies(bridge) or any(word[:1] == ["deny"] for word in words)
        assert not found.allows(bridge) or any(word[:1] == ["allow"] for word in words)


def test_nothing_is_allowed_without_a_file() -> None:
    assert reading({}) == NOTHING
    assert not NOTHING.allows("br0") and not NOTHING.denies("br0")


def test_the_default_of_a_network_is_nobody() -> None:
    policy: Policy = parse_policy([Source("p", b"version: 1\nnetworks: {lan: {bridge: br0}}\n")])
    assert "may not use" in denied(lambda: may_use(policy.networks["lan"], 1, "daemon", ("x",)))
