"""pyqemu-ifctl apply on real taps, bridges, Open vSwitch and QEMU: what changes, and what stays."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pyqemu_ifctl.in_force
import pyqemu_ifup.change
import pyqemu_ifup.made
import pyqemu_ifup.steps
from lab.agent import Agent
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.ovsdb_proxy import Proxy, give
from lab.plug import UNTAGGED, break_after_each, crossing, meddle, reapply, unplug
from lab.qemu import Qemu
from lab.snapshot import Snapshot, diff
from lab.storm import Storm, native, spelled, trunk, vlan
from lab.told import run_told
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Policy
from pyqemu_ifctl.in_force import Guest, Outcome, find_guests
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.linux import JoinBridge
from pyqemu_ifup.kinds.openvswitch import AddPort, SetPort
from pyqemu_ifup.ops import Op, SetDown, SetMtu, SetUp
from pyqemu_ifup.system.lock import Lock, lock_tap
from pyqemu_ifup.task import Task, finish

BRIDGE_MAC, OTHER_MAC, HWADDR = "02:00:00:00:00:0b", "02:00:00:00:00:0c", "02:00:00:00:00:0a"
LATER = 20.0
"""Seconds that may pass until something is so."""


@dataclass
class Site:
    """A host with the Linux bridges br0 and br1, and Open vSwitch's br-int."""

    netns: Namespace
    ovs: OpenVSwitch

    def policy(self, *rules: str, timeout: int = 20, **networks: str) -> Policy:
        """Return a policy with the networks lan, other and tenants, and these rules.

        `networks` replace or add some, as flow mappings.
        """
        text = self.text(*rules, timeout=timeout, **networks)
        return parse_policy([Source("policy.yaml", text.encode())])

    def text(self, *rules: str, timeout: int = 20, **networks: str) -> str:
        """Return such a policy as text."""
        ovsdb = f"kind: openvswitch, ovsdb: '{self.ovs.db}'"
        given = {
            "lan": "{bridge: br0}",
            "other": "{bridge: br1}",
            "tenants": f"{{bridge: br-int, {ovsdb}}}",
            **networks,
        }
        lines = ["version: 1", f"timeout: {timeout}", "networks:"]
        lines += [f"  {name}: {settings}" for name, settings in given.items()]
        lines += ["rules:", *(f"  - {{{rule}}}" for rule in rules)]
        return "\n".join(lines) + "\n"

    def agent(self, folder: Path, *rules: str, timeout: int = 20) -> Agent:
        """Return an agent with such a policy in a file."""
        file = folder / "policy.yaml"
        file.write_text(self.text(*rules, timeout=timeout))
        file.chmod(0o644)
        return Agent(self.netns, file)

    def apply(self, *rules: str, taps: tuple[str, ...] = ()) -> dict[str, Outcome]:
        """Put the policy with these rules in force; return what became of each tap."""
        found = reapply(self.netns, self.policy(*rules), *taps)
        return {outcome.guest.tap: outcome for outcome in found}

    def plug(self, tap: str, rule: str) -> None:
        """Attach a tap by a rule of its own."""
        assert results(self.apply(f"tap: {tap}, {rule}", taps=(tap,))) == {tap: "changed"}

    def snapshot(self) -> Snapshot:
        """Look at everything."""
        return Snapshot.take(self.netns, self.ovs)

    def build(self) -> Site:
        """Make the bridges, their MACs and MTUs pinned."""
        self.add_bridge("br0", BRIDGE_MAC)
        self.add_bridge("br1", OTHER_MAC)
        self.ovs.add_bridge("br-int", hwaddr=HWADDR, mtu=1500)
        return self

    def add_bridge(self, name: str, address: str) -> None:
        """Make a Linux bridge whose MTU does not follow its ports'."""
        self.netns.add_bridge(name, mac=address)
        for mtu in ("1499", "1500"):
            self.netns.ip("link", "set", "dev", name, "mtu", mtu)


@pytest.fixture
def site(netns: Namespace, ovs_netdev: OpenVSwitch) -> Site:
    return Site(netns, ovs_netdev).build()


@pytest.fixture
def own_site() -> Iterator[Site]:
    """A site in a namespace of its own, for a test that makes its bridges anew."""
    require("root", "tun", "ip", "ovs")
    with Namespace() as netns, OpenVSwitch(netns) as ovs:
        yield Site(netns, ovs).build()


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[Op]:
    """The steps that are taken, told as they are."""
    steps: list[Op] = []
    real = Host.run

    async def run(self: Host, step: Op) -> None:
        steps.append(step)
        await real(self, step)

    monkeypatch.setattr(Host, "run", run)
    return steps


def results(outcomes: dict[str, Outcome]) -> dict[str, str]:
    return {tap: outcome.result for tap, outcome in outcomes.items()}


def failure_of(outcome: Outcome) -> Failure:
    assert outcome.failure is not None
    return outcome.failure


def wait(done: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LATER
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def settings(site: Site, tap: str) -> dict[str, Any]:
    """Return what `pyqemu-ifctl apply` may change of a tap."""
    link = site.netns.link(tap)
    row = site.ovs.find("Port", tap)
    found = {
        "up": "UP" in link["flags"],
        "master": link.get("master"),
        "mtu": link["mtu"],
        "txqlen": link["txqlen"],
        "alias": link.get("ifalias"),
    }
    if row is not None:
        found |= {name: row[name] for name in ("tag", "trunks", "vlan_mode", "protected")}
    return found


def test_what_differs_is_told_and_put_in_force(site: Site, tmp_path: Path) -> None:
    """By the program itself: the dry run, the diff, JSON, and that it is done the second time."""
    site.netns.tap("web0")
    site.plug("web0", "network: tenants, vlan: 10")
    hooks = Hooks(tmp_path / "hooks", netns=site.netns.name)
    hooks.write_policy(site.text("tap: web*, network: tenants, vlan: 20, mtu: 1400"))
    before = site.snapshot()
    dry = hooks.ctl("apply", "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    coded = hooks.ctl("apply", "--dry-run", "--exit-code")
    assert (coded.returncode, coded.stdout) == (1, dry.stdout)
    assert diff(before, site.snapshot()) == []
    # NOTE: the place in the policy, a long path here, may have a line of its own.
    head, _, rest = dry.stdout.partition("\n  - ")
    assert "".join(head.split()) == f"web0(pid{os.getpid()}):{hooks.policy}:8"
    shown = [head, *f"  - {rest}".splitlines()]
    assert shown[1:6] == [
        "  - vlan  10",
        "  + vlan  20",
        "  - mtu   1500",
        "  + mtu   1400",
        "  its link would go down and up",
    ]
    assert shown[6:8] == ["  $ ip link set dev web0 down", "  $ ip link set dev web0 mtu 1400"]
    assert shown[8].startswith(
        f"  $ ovs-vsctl --db={site.ovs.db} set port web0 vlan_mode=access "
        "tag=20 'trunks=[]' protected=false other_config:transient=true"
    )
    assert shown[9:] == ["  $ ip link set dev web0 up", "", "1 tap would be changed"]
    answer = hooks.ctl_json("apply")
    assert answer["version"] == 1
    (told,) = answer["taps"]
    commands = told.pop("commands")
    assert commands == [line.removeprefix("  $ ") for line in shown if "  $ " in line]
    assert told == {
        "tap": "web0",
        "vm": None,
        "pid": os.getpid(),
        "network": "tenants",
        "rule": f"{hooks.policy}:8",
        "result": "changed",
        "link_down": True,
        "because": None,
        "guest_told": None,
        "differences": [
            {"setting": "vlan", "wanted": "20", "is": "10", "because": None},
            {"setting": "mtu", "wanted": "1400", "is": "1500", "because": None},
        ],
    }
    assert settings(site, "web0")["tag"] == 20
    assert site.netns.link("web0")["mtu"] == 1400
    again = hooks.ctl("apply")
    assert (again.returncode, again.stdout, again.stderr) == (0, "1 tap as the policy says\n", "")
    assert hooks.ctl_json("status", "web0")["taps"][0]["state"] == "ok"
    # The printed commands do the same.
    site.apply("tap: web0, network: tenants, vlan: 10, mtu: 1500")
    for command in commands:
        site.netns.run(["sh", "-c", command])
    again = hooks.ctl("apply", "web0", "--dry-run", "--exit-code")
    assert (again.returncode, again.stdout, again.stderr) == (0, "1 tap as the policy says\n", "")
    unplug(site.netns, "web0")


def test_a_host_without_guests(site: Site, tmp_path: Path) -> None:
    hooks = Hooks(tmp_path / "hooks", netns=site.netns.name)
    done = hooks.ctl("apply")
    assert (done.returncode, done.stdout) == (66, "")
    hooks.write_policy(site.text("tap: '*', network: lan"))
    done = hooks.ctl("apply")
    assert (done.returncode, done.stdout, done.stderr) == (0, "no taps of running guests\n", "")
    done = hooks.ctl("apply", "web0")
    assert (done.returncode, done.stdout) == (69, "1 tap not changed\n")
    assert done.stderr == (
        "pyqemu-ifctl: web0: there is no such tap in this network namespace; "
        "pyqemu-ifctl status lists them all\n"
    )
    done = hooks.ctl("apply", "a/b")
    assert done.returncode == 64


IN_PLACE: list[tuple[str, str, dict[str, Any]]] = [
    ("lan", "mtu: 1400", {"mtu": 1400}),
    ("lan", "txqueuelen: 77", {"txqlen": 77}),
    ("lan", "isolated: true", {}),
    ("tenants", "vlan: 10, mtu: 1400", {"mtu": 1400}),
    ("tenants", "vlan: 10, isolated: true", {"protected": True}),
    ("tenants", "vlan: 10, external_ids: {iface-id: a1}", {}),
]


@pytest.mark.parametrize(
    ("network", "setting", "found"),
    IN_PLACE,
    ids=[f"{network}, {setting}" for network, setting, _ in IN_PLACE],
)
def test_link_stays_up_where_the_network_stays(
    site: Site, stepped: list[Op], network: str, setting: str, found: dict[str, Any]
) -> None:
    site.netns.tap("web0")
    vlan = ", vlan: 10" if network == "tenants" else ""
    site.apply(f"tap: web0, network: {network}, mtu: 1500, txqueuelen: 1000{vlan}", taps=("web0",))
    stepped.clear()
    outcome = site.apply(f"tap: web0, network: {network}, {setting}")["web0"]
    assert (outcome.result, outcome.moves) == ("changed", False)
    assert not any(isinstance(step, SetDown) for step in stepped)
    assert found.items() <= settings(site, "web0").items()
    assert site.apply(f"tap: web0, network: {network}, {setting}")["web0"].result == ("unchanged")
    unplug(site.netns, "web0")


def test_moves(site: Site) -> None:
    """From each kind of bridge to each, with frames to tell where it is."""
    web0 = site.netns.tap("web0")
    peers = {
        "br0": site.netns.tap("peer0", up=True, master="br0"),
        "br1": site.netns.tap("peer1", up=True, master="br1"),
        "br-int": site.netns.tap("peer2", up=True),
    }
    site.ovs.add_port("br-int", "peer2", "tag=10")
    site.ovs.wait_up("peer2")
    places = {"lan": "br0", "other": "br1", "tenants": "br-int"}
    order = ["lan", "other", "lan", "tenants", "lan", "tenants", "other"]
    for network in order:
        vlan = ", vlan: 10" if network == "tenants" else ""
        outcome = site.apply(f"tap: web0, network: {network}{vlan}", taps=("web0",))["web0"]
        assert (outcome.result, outcome.moves) == ("changed", True), outcome.failure
        alias = site.netns.link("web0")["ifalias"]
        assert f" network={network} " in alias and f" bridge={places[network]} " in alias
        assert f" pid={os.getpid()} " in alias
        for bridge, peer in peers.items():
            wanted = UNTAGGED if bridge == places[network] else None
            assert crossing(web0, peer, {UNTAGGED: wanted}) == {UNTAGGED: wanted}, (network, bridge)
        assert (site.ovs.find("Port", "web0") is not None) == (network == "tenants")
    site.ovs.del_port("peer2")
    unplug(site.netns, "web0")


BREAKS = {
    "another VLAN": (
        "network: tenants, vlan: 10, isolated: true, external_ids: {a: b}",
        "network: tenants, vlan: {trunk: [20, 30]}, mtu: 1400, txqueuelen: 9, external_ids: {c: d}",
    ),
    "from Linux to OVS": ("network: lan, isolated: true, mtu: 1400", "network: tenants, vlan: 20"),
    "from OVS to Linux": (
        "network: tenants, vlan: {native: 10, trunk: [20]}, isolated: true",
        "network: lan, txqueuelen: 9",
    ),
    "to another Linux bridge": ("network: lan", "network: other, isolated: true, mtu: 1400"),
}


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """Return what differs, but for the names that the database gives its rows."""
    uuids = re.compile(r"row .* (_uuid|interfaces|ports): ")
    return [line for line in diff(before, after) if not uuids.match(line)]


@pytest.mark.parametrize(("old", "new"), BREAKS.values(), ids=BREAKS)
def test_all_or_nothing(site: Site, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """Broken after each step, it is attached as it was, by everything that can be looked at."""
    site.netns.tap("web0")
    site.plug("web0", old)
    before = site.snapshot()
    done = False

    def attempt() -> None:
        nonlocal done
        outcome = site.apply(f"tap: web0, {new}")["web0"]
        done = outcome.result == "changed"
        if outcome.failure is not None:
            raise outcome.failure

    def check() -> None:
        end = time.monotonic() + LATER
        while lines := changes(before, site.snapshot()):
            assert time.monotonic() < end, lines
        assert "UP" in site.netns.link("web0")["flags"]

    names = break_after_each(monkeypatch, attempt, check)
    # NOTE: with the last step, which brings the link up, all is done, whatever is told of it.
    assert done and len(names) >= 5, names
    unplug(site.netns, "web0")


def test_loose_tap_that_is_named_is_attached_or_left(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.netns.tap("web0", up=True)
    before = site.snapshot()
    assert site.apply("tap: web0, network: lan") == {}

    def attempt() -> None:
        outcome = site.apply("tap: web0, network: lan, mtu: 1400", taps=("web0",))["web0"]
        if outcome.failure is not None:
            raise outcome.failure

    names = break_after_each(monkeypatch, attempt, lambda: expect(diff(before, site.snapshot())))
    assert "JoinBridge" in names
    assert site.netns.link("web0")["master"] == "br0"
    unplug(site.netns, "web0")


@pytest.mark.parametrize("rule", ["network: lan, mtu: 1400", "network: tenants, txqueuelen: 9"])
def test_persistent_tap_that_it_attaches_is_given_back(site: Site, rule: str) -> None:
    """What it was before stands in its mark, as if a hook had attached it; but it stays root's."""
    site.netns.ip("tuntap", "add", "dev", "web0", "mode", "tap", "user", "root")
    site.netns.tap("web0", up=True)
    before = site.snapshot()
    site.plug("web0", rule)
    unplug(site.netns, "web0")
    assert diff(before, site.snapshot()) == []
    site.netns.ip("link", "del", "dev", "web0")


def expect(lines: list[str]) -> None:
    assert lines == []


def test_one_that_fails_does_not_keep_the_others(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        site.netns.tap(f"web{number}")
        site.plug(f"web{number}", "network: lan")
    site.netns.ip("link", "set", "dev", "web1", "nomaster")
    site.netns.ip("link", "set", "dev", "web1", "master", "br1")
    outcomes = site.apply("tap: web*, network: lan, mtu: 1400")
    assert results(outcomes) == {"web0": "changed", "web1": "failed", "web2": "changed"}
    failure = failure_of(outcomes["web1"])
    assert failure.status is Status.DENIED
    assert str(failure) == (
        "somebody else's tap: br1 holds it; if it shall go, take it out: "
        "ip link set dev web1 nomaster"
    )
    assert site.netns.link("web1")["master"] == "br1"
    site.netns.ip("link", "set", "dev", "web1", "nomaster")
    assert results(site.apply("tap: web*, network: lan, mtu: 1400")) == {
        "web0": "unchanged",
        "web1": "changed",
        "web2": "unchanged",
    }
    # A tap that goes while it is changed; a bridge that is not there.
    meddle(monkeypatch, SetMtu, lambda: site.netns.ip("link", "del", "web0"))
    policy = site.policy(
        "tap: web0, network: lan, mtu: 1300",
        "tap: web1, network: nowhere",
        "tap: web2, network: lan",
        nowhere="{bridge: br9}",
    )
    outcomes = {each.guest.tap: each for each in reapply(site.netns, policy)}
    assert results(outcomes) == {"web0": "failed", "web1": "failed", "web2": "changed"}
    assert failure_of(outcomes["web1"]).status is Status.UNAVAILABLE
    assert site.netns.link("web1")["master"] == "br0"
    for tap in ("web1", "web2"):
        unplug(site.netns, tap)


def test_denied_by_now(site: Site, tmp_path: Path) -> None:
    site.netns.tap("web0")
    site.plug("web0", "network: lan")
    before = site.snapshot()
    hooks = Hooks(tmp_path / "hooks", netns=site.netns.name)
    hooks.write_policy(site.text("tap: web0, deny: closed", "tap: '*', network: lan"))
    done = hooks.ctl("apply")
    assert (done.returncode, done.stdout) == (77, "1 tap denied\n")
    assert done.stderr == (
        "pyqemu-ifctl: web0: denied by now, and left as it is, on br0: closed; cut it off: "
        "pyqemu-ifctl apply --cut web0; or end its QEMU, or mend the policy\n"
    )
    assert diff(before, site.snapshot()) == []
    (told,) = hooks.ctl_json("apply")["taps"]
    assert (told["result"], told["network"]) == ("denied", None)
    site.netns.ip("link", "set", "dev", "web0", "master", "br1")
    assert "left as it is, on br1: closed; cut it off: " in hooks.ctl("apply").stderr
    site.netns.ip("link", "set", "dev", "web0", "nomaster")
    assert "left as it is, on no bridge: closed; cut it off: " in hooks.ctl("apply").stderr
    done = hooks.ctl("apply", "--cut")
    assert (done.returncode, done.stderr) == (
        0,
        "pyqemu-ifctl: web0: cut off, its link is down: denied: closed\n",
    )
    assert "left as it is, on no bridge, down: closed; end its" in hooks.ctl("apply").stderr
    unplug(site.netns, "web0")


def test_one_without_a_mark_is_denied_where_it_is_and_nothing_cuts_it_off(
    site: Site, tmp_path: Path
) -> None:
    require("qemu")
    hooks = Hooks(tmp_path / "hooks", netns=site.netns.name)
    hooks.write_policy(site.text("tap: web0, deny: closed", "tap: '*', network: lan"))
    netdev = "tap,id=n0,ifname=web0,script=no,downscript=no"
    with Qemu("-S", "-netdev", netdev, netns=site.netns.name) as qemu:
        assert qemu.greeting
        for place, words in (("br0", ("master", "br0")), ("no bridge", ("nomaster",))):
            site.netns.ip("link", "set", "dev", "web0", "up", *words)
            done = hooks.ctl("apply", "web0")
            assert (done.returncode, done.stderr) == (
                77,
                f"pyqemu-ifctl: web0: denied by now, and left as it is, on {place}: closed; "
                "end its QEMU, or mend the policy\n",
            )
        assert qemu.quit() == 0


def mark_anew(site: Site, tap: str, words: str) -> None:
    alias = site.netns.link(tap)["ifalias"]
    site.netns.ip("link", "set", "dev", tap, "alias", f"{alias} {words}")


def test_by_name_and_for_a_user(site: Site) -> None:
    """Who asked for a network by its name stays there; a user's tap is judged as the agent does."""
    for tap in ("web0", "web1", "web2"):
        site.netns.tap(tap)
        site.plug(tap, "network: lan")
    mark_anew(site, "web0", "by=name")
    mark_anew(site, "web1", "uid=4242 by=name")
    mark_anew(site, "web2", "uid=4242")
    users = "{bridge: br0, users: ['4242'], mtu: 1400}"
    rule = "tap: web*, network: other"
    policy = site.policy(rule, lan=users)
    outcomes = {each.guest.tap: each for each in reapply(site.netns, policy)}
    assert results(outcomes) == {"web0": "changed", "web1": "changed", "web2": "denied"}
    assert str(failure_of(outcomes["web2"])).startswith(
        "user 4242 may not use network other; it is left as it is, on br0: neither the user"
    )
    for tap, words in (("web0", " by=name"), ("web1", " uid=4242 by=name")):
        link = site.netns.link(tap)
        assert (link["master"], link["mtu"]) == ("br0", 1400)
        assert f"{words} " in link["ifalias"] + " "
    policy = site.policy(rule, lan="{bridge: br0}", other="{bridge: br1, users: ['4242']}")
    outcomes = {each.guest.tap: each for each in reapply(site.netns, policy)}
    assert results(outcomes) == {"web0": "changed", "web1": "denied", "web2": "changed"}
    assert site.netns.link("web2")["master"] == "br1"
    assert " uid=4242 " in site.netns.link("web2")["ifalias"]
    gone = parse_policy([Source("p.yaml", b"version: 1\nnetworks: {other: {bridge: br1}}\n")])
    outcomes = {each.guest.tap: each for each in reapply(site.netns, gone)}
    assert results(outcomes) == dict.fromkeys(("web0", "web1", "web2"), "denied")
    for tap in ("web0", "web1", "web2"):
        unplug(site.netns, tap)


def remake(site: Site) -> None:
    site.netns.ip("link", "del", "br0")
    site.add_bridge("br0", BRIDGE_MAC)
    site.ovs.vsctl("del-br", "br-int")
    site.ovs.add_bridge("br-int", hwaddr=HWADDR, mtu=1500)


RULES = ("tap: lan*, network: lan", "tap: ten*, network: tenants, vlan: 10")


def test_bridges_that_were_made_anew_get_their_guests_back(own_site: Site) -> None:
    site = own_site
    taps = {name: site.netns.tap(name) for name in ("lan0", "lan1", "ten0", "ten1")}
    assert set(results(site.apply(*RULES, taps=tuple(taps))).values()) == {"changed"}
    remake(site)
    assert results(site.apply(*RULES)) == dict.fromkeys(taps, "changed")
    site.ovs.wait_up("ten0", "ten1")
    for a, b in (("lan0", "lan1"), ("ten0", "ten1")):
        assert crossing(taps[a], taps[b], {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    assert crossing(taps["lan0"], taps["ten1"], {UNTAGGED: None}) == {UNTAGGED: None}
    # Without the bridge it fails, and nothing else changes.
    site.netns.ip("link", "del", "br0")
    outcomes = site.apply(*RULES)
    assert results(outcomes) == {
        "lan0": "failed",
        "lan1": "failed",
        "ten0": "unchanged",
        "ten1": "unchanged",
    }
    assert failure_of(outcomes["lan0"]).status is Status.UNAVAILABLE
    assert "UP" in site.netns.link("lan0")["flags"]
    site.add_bridge("br0", BRIDGE_MAC)
    for tap in taps:
        unplug(site.netns, tap)


def test_mute_vswitchd(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be done in time is 75; in the database it is what it was."""
    site.netns.tap("ten0")
    site.plug("ten0", "network: tenants, vlan: 10")
    row = site.ovs.row("Port", "ten0")
    policy = parse_policy(
        [
            Source(
                "p.yaml",
                site.text("tap: ten0, network: tenants, vlan: 20")
                .replace("timeout: 20", "timeout: 1")
                .encode(),
            )
        ]
    )
    monkeypatch.setattr("pyqemu_ifctl.in_force.SETTLE", 0.1)
    site.ovs.vswitchd.stop()
    try:
        (outcome,) = reapply(site.netns, policy)
    finally:
        site.ovs.vswitchd.cont()
    assert failure_of(outcome).status is Status.TRY_AGAIN
    assert site.ovs.row("Port", "ten0")["tag"] == row["tag"] == 10
    (outcome,) = reapply(site.netns, policy)
    assert outcome.result == "changed"
    assert settings(site, "ten0")["tag"] == 20 and settings(site, "ten0")["up"]
    unplug(site.netns, "ten0")


def test_ports_changed_by_somebody_else_meanwhile(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.netns.tap("ten0")
    site.plug("ten0", "network: tenants, vlan: 10")
    with monkeypatch.context() as patch:
        meddle(patch, SetPort, lambda: site.ovs.vsctl("--no-wait", "del-port", "ten0"))
        outcome = site.apply("tap: ten0, network: tenants, vlan: 20")["ten0"]
    assert failure_of(outcome).status is Status.REFUSED
    assert "has gone again" in str(outcome.failure)
    # What others have added to the row stays there, and a port that somebody took out comes back.
    assert settings(site, "ten0")["tag"] == 10
    site.ovs.vsctl(
        "set",
        "interface",
        "ten0",
        "external_ids:ovn-installed=true",
        "--",
        "set",
        "port",
        "ten0",
        "other_config:theirs=1",
    )
    assert results(site.apply("tap: ten0, network: tenants, vlan: 30")) == {"ten0": "changed"}
    assert site.ovs.row("Interface", "ten0")["external_ids"]["ovn-installed"] == "true"
    assert site.ovs.row("Port", "ten0")["other_config"] == {"transient": "true", "theirs": "1"}
    unplug(site.netns, "ten0")


def policy_file(site: Site, hooks: Hooks, *rules: str) -> None:
    hooks.write_policy(site.text(*rules))


def test_running_qemu(site: Site, tmp_path: Path) -> None:
    """Its name, netdev and MAC are those of the process that holds the tap, whoever calls."""
    require("qemu")
    hooks = Hooks(tmp_path / "hooks", netns=site.netns.name)
    scripts = f"script={hooks.ifup},downscript={hooks.ifdown}"
    policy_file(site, hooks, "tap: '*', network: lan")
    args = ["-name", "db1", "-netdev", f"tap,id=n0,ifname=web0,{scripts}"]
    args += ["-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01"]
    args += ["-netdev", f"tap,id=n1,ifname=web1,{scripts}"]
    args += ["-netdev", "tap,id=n2,ifname=web2,script=no,downscript=no"]
    with Qemu(*args, netns=site.netns.name, machine="q35", env=hooks.environ()) as qemu:
        assert qemu.greeting
        assert [settings(site, tap)["master"] for tap in ("web0", "web1")] == ["br0", "br0"]
        policy_file(
            site,
            hooks,
            "mac: '52:54:00:00:00:01', vm: db*, network: tenants, vlan: 10",
            "netdev: n1, network: other",
            "tap: '*', network: lan",
        )
        site.netns.ip("link", "set", "dev", "web2", "up")
        answer = {each["tap"]: each for each in hooks.ctl_json("apply")["taps"]}
        assert {tap: each["result"] for tap, each in answer.items()} == {
            "web0": "changed",
            "web1": "changed",
            "web2": "left",
        }
        assert (answer["web0"]["vm"], answer["web0"]["pid"]) == ("db1", qemu.pid)
        assert answer["web2"]["because"].endswith("attach it: pyqemu-ifctl apply web2")
        assert settings(site, "web0")["tag"] == 10
        assert settings(site, "web1")["master"] == "br1"
        alias = site.netns.link("web0")["ifalias"]
        assert f" pid={qemu.pid} " in alias and alias.endswith(" vm=db1")
        # A bare tap that is named; a mark that is lost, or that names a process which has ended.
        run_told(hooks, answer["web2"]["because"])
        assert settings(site, "web2")["master"] == "br0"
        site.netns.ip("link", "set", "dev", "web1", "alias", "")
        site.netns.ip("link", "set", "dev", "web1", "nomaster")
        site.netns.ip(
            "link",
            "set",
            "dev",
            "web0",
            "alias",
            re.sub(r"pid=\d+ start=\d+", "pid=1 start=2", alias),
        )
        assert {each["tap"]: each["result"] for each in hooks.ctl_json("apply")["taps"]} == {
            "web0": "changed",
            "web1": "changed",
            "web2": "unchanged",
        }
        assert site.netns.link("web0")["ifalias"] == alias
        assert settings(site, "web1")["master"] == "br1"
        assert qemu.quit() == 0
    assert site.ovs.find("Port", "web0") is None


def memory_of_card(qemu: Qemu) -> int:
    """Return where the guest's e1000 is in its memory, 0 until the firmware has put it there."""
    told = qemu.hmp("info pci").partition("8086:100e")[2]
    found = re.search(r"BAR0: 32 bit memory at (0x[0-9a-f]+) ", told)
    at = int(found[1], 16) if found is not None else 0
    # NOTE: while it asks for the size, all the upper bits are ones.
    return at if at < 0xFF000000 else 0


def link_is_up(qemu: Qemu, register: int) -> bool:
    """Tell whether the guest's e1000 has its link: bit 1 of its register STATUS."""
    return bool(int(qemu.hmp(f"xp /1wx {register}").split(":")[1], 16) & 2)


def test_guest_is_told_of_another_network(site: Site, tmp_path: Path) -> None:
    """Its own card sees the link go down and up; not where the network stays what it was."""
    require("qemu")
    hooks = Hooks(tmp_path / "hooks", netns=site.netns.name)
    scripts = f"script={hooks.ifup},downscript={hooks.ifdown}"
    policy_file(site, hooks, "tap: '*', network: tenants, vlan: 10")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        args = ["-netdev", f"tap,id=n0,ifname=web0,{scripts}", "-device", "e1000,netdev=n0"]
        args += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
        with Qemu(*args, netns=site.netns.name, machine="pc", env=hooks.environ()) as qemu:
            assert qemu.greeting
            wait(lambda: memory_of_card(qemu), "the firmware does not find the card")
            register = memory_of_card(qemu) + 8
            wait(lambda: link_is_up(qemu, register), "the card has no link")
            for settings, told in (("vlan: 20", True), ("vlan: 20, mtu: 1400", None)):
                policy_file(site, hooks, f"tap: '*', network: tenants, {settings}")
                with ThreadPoolExecutor() as pool:
                    answer = pool.submit(hooks.ctl_json, "apply")
                    seen = {link_is_up(qemu, register)}
                    while not answer.done():
                        seen.add(link_is_up(qemu, register))
                (each,) = answer.result()["taps"]
                assert (each["result"], each["guest_told"]) == ("changed", told)
                assert seen == ({True, False} if told else {True})
                wait(lambda: link_is_up(qemu, register), "the link does not come up again")
            # Somebody else is connected: it is said.
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(f"{folder}/qmp")
                assert other.recv(4096)
                policy_file(site, hooks, "tap: '*', network: tenants, vlan: 30")
                done = hooks.ctl("apply")
            assert done.returncode == 0
            assert "the guest was not told: its QMP socket" in " ".join(done.stdout.split())
            assert qemu.quit() == 0


def test_scripts_at_work_are_waited_for(site: Site, tmp_path: Path) -> None:
    """A QEMU whose script still runs: the tap is in its hands until that has ended."""
    require("qemu")
    hooks = Hooks(tmp_path / "hooks", netns=site.netns.name)
    policy_file(site, hooks, "tap: '*', network: lan")
    gate = tmp_path / "gate"
    script = tmp_path / "slow"
    script.write_text(
        f'#!/bin/sh\nwhile ! [ -e {gate} ]; do sleep 0.05; done\nexec {hooks.ifup} "$1"\n'
    )
    script.chmod(0o755)
    args = ["-netdev", f"tap,id=n0,ifname=web0,script={script},downscript={hooks.ifdown}"]
    with Qemu(*args, netns=site.netns.name, env=hooks.environ()) as qemu:
        wait(lambda: "web0" in site.netns.links(), "QEMU does not open its tap")
        done = hooks.ctl("apply", "web0")
        assert (done.returncode, done.stdout) == (75, "1 tap not changed\n")
        assert done.stderr.startswith(f"pyqemu-ifctl: web0: in other hands: its QEMU {qemu.pid} ")
        assert "UP" not in site.netns.link("web0")["flags"]
        gate.touch()
        assert qemu.greeting
        assert hooks.ctl("apply", "web0").stdout == "1 tap as the policy says\n"
        assert qemu.quit() == 0


def test_agent_and_apply_do_not_fight(own_site: Site, tmp_path: Path) -> None:
    """Bridges made anew under an agent, and apply at the same time, over and over."""
    site = own_site
    taps = [site.netns.tap(name) for name in ("lan0", "lan1", "ten0", "ten1")]
    names = tuple(tap.name for tap in taps)
    with site.agent(tmp_path, *RULES) as agent:
        assert set(results(site.apply(*RULES, taps=names)).values()) == {"changed"}
        for number in range(6):
            remake(site)
            # NOTE: the agent looks 0.3 s after a bridge has come.
            end = time.monotonic() + 0.1 * number
            while True:
                outcomes = site.apply(*RULES)
                assert set(results(outcomes).values()) <= {"changed", "unchanged"}, [
                    each.failure for each in outcomes.values()
                ]
                if time.monotonic() > end:
                    break
            wait(lambda: all_there(site, names), "guests are lost")
        # A policy that the agent does not know of yet: it leaves what is attached.
        moved = ("tap: lan*, network: other", "tap: ten*, network: lan")
        assert set(results(site.apply(*moved)).values()) == {"changed"}
        time.sleep(1)
        assert set(results(site.apply(*moved)).values()) == {"unchanged"}
        for name in names:
            assert agent.down(name).status == 0
    for tap in taps:
        tap.close()


def lock(site: Site, tap: str) -> Lock:
    """Take the lock on a tap; raise Failure where somebody has it."""
    with site.netns.enter():
        return finish(lock_tap(site.netns.link(tap)["ifindex"], Deadline(0.1)), time.sleep)


def test_agent_and_apply_wait_for_who_has_a_tap_in_hand(own_site: Site, tmp_path: Path) -> None:
    site = own_site
    taps = {name: site.netns.tap(name) for name in ("lan0", "lan1", "ten0", "ten1")}
    others = ("lan1", "ten1")
    hasty = site.policy(*RULES, timeout=1)
    with site.agent(tmp_path, *RULES), ExitStack() as held:
        assert set(results(site.apply(*RULES, taps=tuple(taps))).values()) == {"changed"}
        for name in ("lan0", "ten0"):
            held.enter_context(lock(site, name))
        remake(site)
        wait(lambda: all_there(site, others), "the agent waits for another's tap")
        (outcome,) = reapply(site.netns, hasty, "lan0", dry_run=True)
        assert outcome.result == "would change"
        for name in ("lan0", "ten0"):
            (outcome,) = reapply(site.netns, hasty, name)
            told = str(failure_of(outcome))
            assert told.startswith(f"not done after 3 s: process {os.getpid()} (")
            assert told.endswith(
                ") has this tap in hand; try again, or raise timeout: in the policy"
            )
            assert failure_of(outcome).status is Status.TRY_AGAIN
            found = settings(site, name)
            assert (found["master"], found.get("tag"), found["up"]) == (None, None, True)
        held.close()
        wait(lambda: all_there(site, tuple(taps)), "guests are lost")
    for tap in taps.values():
        tap.close()


def is_locked(site: Site, tap: str) -> bool:
    try:
        lock(site, tap).close()
    except Failure as failure:
        assert failure.status is Status.TRY_AGAIN
        return True
    return False


def test_agent_has_the_tap_for_itself_while_it_brings_the_guest_back(
    own_site: Site, tmp_path: Path
) -> None:
    """Its switch is slow; apply gives up in time, and finds nothing to do when it is done."""
    site = own_site
    tap = site.netns.tap("ten0")
    hasty = site.policy(*RULES, timeout=1)
    with site.agent(tmp_path, *RULES, timeout=60):
        assert results(site.apply(*RULES, taps=("ten0",))) == {"ten0": "changed"}
        site.ovs.vswitchd.stop()
        try:
            site.ovs.vsctl(
                "--no-wait",
                "del-br",
                "br-int",
                "--",
                "add-br",
                "br-int",
                "--",
                "set",
                "bridge",
                "br-int",
                "datapath_type=netdev",
            )
            wait(lambda: is_locked(site, "ten0"), "the agent does not lock it")
            (outcome,) = reapply(site.netns, hasty, "ten0")
        finally:
            site.ovs.vswitchd.cont()
        assert failure_of(outcome).status is Status.TRY_AGAIN
        assert "has this tap in hand" in str(outcome.failure)
        outcomes = site.apply(*RULES)
        assert results(outcomes) == {"ten0": "unchanged"}, outcomes["ten0"].failure
        assert not is_locked(site, "ten0")
    tap.close()


def test_apply_has_the_tap_for_itself_while_it_changes_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.netns.tap("ten0")
    site.plug("ten0", "network: tenants, vlan: 10")
    seen = []
    with monkeypatch.context() as patch:
        meddle(patch, SetPort, lambda: seen.append(is_locked(site, "ten0")))
        outcomes = site.apply("tap: ten0, network: tenants, vlan: 20")
    assert (results(outcomes), seen) == ({"ten0": "changed"}, [True])
    assert not is_locked(site, "ten0")
    unplug(site.netns, "ten0")


def test_what_was_done_until_the_tap_was_ours_is_seen(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another apply does it all, right before this one gets the lock."""
    site.netns.tap("ten0")
    rule = "tap: ten0, network: tenants, vlan: 20"

    def overtake() -> None:
        assert results(site.apply(rule, taps=("ten0",))) == {"ten0": "changed"}

    overtaken(monkeypatch, overtake)
    assert results(site.apply(rule)) == {"ten0": "unchanged"}
    unplug(site.netns, "ten0")


def overtaken(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have somebody else `act` right before the next apply gets its first lock."""
    real = lock_tap

    def lock_late(index: int, deadline: Deadline) -> Task[Lock]:
        monkeypatch.setattr(pyqemu_ifctl.in_force, "lock_tap", real)
        act()
        return real(index, deadline)

    monkeypatch.setattr(pyqemu_ifctl.in_force, "lock_tap", lock_late)


def test_tap_that_is_made_anew_before_it_is_ours_is_left(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = site.netns.tap("lan0")

    def replace_it() -> None:
        first.close()
        site.netns.tap("lan0")

    overtaken(monkeypatch, replace_it)
    (outcome,) = site.apply("tap: lan*, network: lan", taps=("lan0",)).values()
    assert failure_of(outcome).status is Status.TRY_AGAIN
    assert "made anew" in str(outcome.failure)
    assert settings(site, "lan0")["master"] is None


@pytest.mark.parametrize("persist", [False, True])
def test_guest_that_ends_while_its_lock_is_waited_for_is_no_failure(
    site: Site, monkeypatch: pytest.MonkeyPatch, persist: bool
) -> None:
    """Its downscript has been there; a persistent tap is there still."""
    tap = site.netns.tap("lan0", persist=persist)
    site.plug("lan0", "network: lan")

    def end() -> None:
        unplug(site.netns, "lan0")
        tap.close()

    overtaken(monkeypatch, end)
    assert site.apply("tap: lan*, network: lan") == {}
    if persist:
        assert settings(site, "lan0")["master"] is None
        site.netns.ip("link", "del", "lan0")


@pytest.mark.parametrize(
    ("taps", "wanted"),
    [((), {"lan1": "unchanged"}), (("lan0",), {"lan0": "failed"})],
    ids=["of all", "asked for"],
)
def test_guest_that_ends_meanwhile_is_no_failure(
    site: Site, monkeypatch: pytest.MonkeyPatch, taps: tuple[str, ...], wanted: dict[str, str]
) -> None:
    """It is one where its tap was asked for."""
    rule = "tap: lan*, network: lan"

    def ending(*args: Any) -> list[Guest]:
        found = find_guests(*args)
        gone.close()
        return found

    gone, _ = site.netns.tap("lan0"), site.netns.tap("lan1")
    assert set(results(site.apply(rule, taps=("lan0", "lan1"))).values()) == {"changed"}
    with monkeypatch.context() as patch:
        patch.setattr(pyqemu_ifctl.in_force, "find_guests", ending)
        assert results(site.apply(rule, taps=taps)) == wanted
    site.netns.close_kept()


def all_there(site: Site, names: tuple[str, ...]) -> bool:
    found = [settings(site, name) for name in names]
    return all(each["up"] and (each["master"] == "br0" or each.get("tag") == 10) for each in found)


def test_network_with_nat_is_made_for_who_comes_and_goes_with_who_leaves(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("dnsmasq")
    site.netns.tap("web0")
    site.plug("web0", "network: lan")
    before = site.snapshot()
    nat = "{bridge: natbr0, nat: {ipv4: 192.168.77.1/24, outbound: false}}"

    def apply(network: str, *, dry_run: bool = False, nat: str = nat) -> Outcome:
        policy = site.policy(f"tap: web0, network: {network}", nat=nat)
        (outcome,) = reapply(site.netns, policy, dry_run=dry_run)
        return outcome

    dry = apply("nat", dry_run=True)
    assert dry.result == "would change" and dry.commands[0].startswith("ip link add name natbr0 ")
    assert diff(before, site.snapshot()) == []
    with monkeypatch.context() as patch:
        meddle_fails(patch)
        assert apply("nat").result == "failed"
    assert "natbr0" not in site.netns.links()
    assert diff(before, site.snapshot()) == []
    assert apply("nat").result == "changed"
    assert settings(site, "web0")["master"] == "natbr0"
    assert apply("nat").result == "unchanged"
    other = "{bridge: natbr0, nat: {ipv4: 192.168.77.1/24, outbound: false, dns: {domain: x.test}, "
    other += "forward: [{from: 2222/tcp, to: '192.168.77.2:22'}]}}"
    made = site.snapshot()
    dry = apply("nat", dry_run=True, nat=other)
    assert (dry.result, dry.moves) == ("would change", False)
    # See test_explain_nat.py for what these lead to.
    told = [line.partition(" /proc/sys/net/")[2] for line in dry.commands]
    assert [each for each in told if each] == [
        "ipv4/conf/natbr0/route_localnet", "ipv4/ip_forward",
    ]  # fmt: skip
    assert [each.setting for each in dry.differences] == ["nat"]
    assert dry.differences[0].found == (
        "net.ipv4.conf.natbr0.route_localnet is 0, not 1; net.ipv4.ip_forward is 0, not 1; "
        "the nft table inet pyqemu-ifup-nat is not as the policy says; "
        "its dnsmasq does not run as the policy says"
    )
    assert diff(made, site.snapshot()) == []
    done = apply("nat", nat=other)
    assert (done.result, done.moves, done.differences) == ("changed", False, dry.differences)
    assert apply("nat", nat=other).result == "unchanged"
    site.netns.ip("link", "add", "natbr1", "type", "bridge")
    another_s = apply("nat", dry_run=True, nat=other.replace("natbr0", "natbr1"))
    assert another_s.failure is not None and another_s.failure.status is Status.DENIED
    site.netns.ip("link", "del", "natbr1")
    assert apply("lan").result == "changed"
    assert "natbr0" not in site.netns.links()
    # Its rule stands on another line by now.
    (mark,) = diff(before, site.snapshot())
    assert mark.startswith("link web0: ifalias: ") and mark.endswith("rule=policy.yaml:9'")
    unplug(site.netns, "web0")


def test_a_network_that_a_tap_has_left_and_that_stays_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require("dnsmasq")
    hooks = Hooks(tmp_path / "hooks", netns=site.netns.name)
    site.netns.tap("web0")
    nat = "{bridge: natbr0, nat: {ipv4: 192.168.77.1/24, outbound: false}}"
    hooks.write_policy(site.text("tap: web0, network: nat", nat=nat))
    assert hooks.up("web0").returncode == 0
    policy_file(site, hooks, "tap: web0, network: lan")
    lines: list[str] = []

    async def refuse(*_: object) -> None:
        raise Failure(Status.REFUSED, "refused by the test")

    with monkeypatch.context() as patch:
        patch.setattr(pyqemu_ifup.made, "leave", refuse)
        patch.setattr(pyqemu_ifctl.in_force, "log", lambda _, line: lines.append(line))
        assert site.apply("tap: web0, network: lan")["web0"].result == "changed"
    (told,) = [line for line in lines if line.startswith("web0: its network is left: ")]
    assert "natbr0" in site.netns.links()
    (printed,) = run_told(hooks, told)
    assert printed == "took away network nat and its bridge natbr0: no tap is on it\n"
    assert "natbr0" not in site.netns.links()
    assert "pyqemu-ifup-nat" not in site.netns.run(["nft", "list", "tables"]).stdout
    unplug(site.netns, "web0")


@pytest.mark.parametrize(("old", "new"), [("lan", "other"), ("lan", "tenants")])
def test_what_is_not_taken_back_is_told_with_what_tries_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str
) -> None:
    hooks = Hooks(tmp_path / "hooks", netns=site.netns.name)
    site.netns.tap("web0")
    site.plug("web0", f"network: {old}")
    policy_file(site, hooks, f"tap: web0, network: {new}")
    lines: list[str] = []
    real = Host.run
    refused: list[Op] = []

    async def refuse(self: Host, step: Op) -> None:
        if isinstance(step, SetUp) or refused:
            refused.append(step)
            raise Failure(Status.REFUSED, "refused by the test")
        await real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Host, "run", refuse)
        patch.setattr(pyqemu_ifup.steps, "log", lambda _, line: lines.append(line))
        assert site.apply(f"tap: web0, network: {new}")["web0"].result == "failed"
    told = [line for line in lines if line.startswith("web0: not taken back: ")]
    assert "UP" not in site.netns.link("web0")["flags"]
    run_told(hooks, told[0])
    (row,) = hooks.ctl_json("status")["taps"]
    assert (row["state"], row["network"]) == ("ok", new)
    unplug(site.netns, "web0")


def test_one_whose_database_talks_nonsense_in_the_middle_is_told_that_it_is_down(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is the kernel's is as it was."""
    site.netns.tap("web0")
    site.ovs.add_bridge("br-two", hwaddr="52:54:00:ff:00:02", mtu=1500)
    hooks = Hooks(tmp_path / "hooks", netns=site.netns.name)
    lines: list[str] = []
    with Proxy(site.ovs.db) as proxy:

        def policy(network: str) -> str:
            both = {
                name: f"{{bridge: {bridge}, ovsdb: '{proxy.address}', mtu: {mtu}}}"
                for name, bridge, mtu in (("one", "br-int", 1500), ("two", "br-two", 1400))
            }
            return site.text(f"tap: web0, network: {network}", timeout=20, **both)

        def apply(network: str) -> Outcome:
            wanted = parse_policy([Source("policy.yaml", policy(network).encode())])
            (found,) = reapply(site.netns, wanted, "web0")
            return found

        def talk_nonsense() -> None:
            proxy.spoil = lambda session, message: session.give({**message, "result": []})

        assert apply("one").result == "changed"
        before = settings(site, "web0")
        with monkeypatch.context() as patch:
            meddle(patch, AddPort, talk_nonsense)
            patch.setattr(pyqemu_ifup.change, "log", lambda _, line: lines.append(line))
            patch.setattr(pyqemu_ifup.attach, "log", lambda _, line: lines.append(line))
            patch.setattr(pyqemu_ifup.steps, "log", lambda _, line: lines.append(line))
            assert apply("two").result == "failed"
        now = settings(site, "web0")
        assert (now["up"], now["mtu"], now["alias"]) == (False, 1500, before["alias"])
        assert not [line for line in lines if "gc web0" in line], lines
        (told,) = [line for line in lines if line.startswith("web0: its link stays down: ")]
        proxy.spoil = give
        hooks.write_policy(policy("two"))
        run_told(hooks, told)
        assert settings(site, "web0")["up"]
        assert site.ovs.row("Port", "web0")
        unplug(site.netns, "web0")
    site.ovs.vsctl("del-br", "br-two")


def meddle_fails(patch: pytest.MonkeyPatch) -> None:
    """Have each bridge refuse to be joined, once."""

    def refuse() -> None:
        raise Failure(Status.REFUSED, "refused by the test")

    meddle(patch, JoinBridge, refuse)


STORM = [
    vlan(10),
    vlan(20),
    trunk(20, 30),
    native(10, 30),
    None,
    trunk(10, 40),
    native(40, 20, 30),
    vlan(30),
]


def test_two_hundred_changes_under_traffic(site: Site) -> None:
    """Not one frame in a VLAN that neither the old policy nor the new one allows."""
    with Storm(site.netns) as storm:
        for vid, tap in storm.sniffers.items():
            site.ovs.add_port("br-int", tap.name, f"tag={vid}" if vid else "vlan_mode=access")
        site.ovs.wait_up(*(tap.name for tap in storm.sniffers.values()))
        storm.run(
            [
                (vlan, site.policy(f"tap: web0, network: tenants, vlan: {spelled(vlan)}"))
                for vlan in STORM
            ],
            200,
        )
        for tap in storm.sniffers.values():
            site.ovs.del_port(tap.name)
        unplug(site.netns, "web0")
    assert storm.wrong() == []
    assert storm.quiet() < 20
