"""What the agent does unasked: takes away what dead taps leave, and brings guests back."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.agent_site import HELD, INT_MAC, LAN_MAC, VID, Site
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.plug import UNTAGGED, crossing
from lab.taps import Tap
from lab.told import run_told
from pyqemu_ifd.cache import SMALL
from pyqemu_ifd.reconcile import DELAY
from pyqemu_ifup.drivers.tun import set_owner

LATER = 20.0
SOON = 1.0
"""Seconds within which a dead tap's row must be gone."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site with both bridges, in a namespace of its own: its tests make them anew."""
    require("root", "tun", "ip", "ovs")
    with Namespace() as netns, OpenVSwitch(netns) as ovs:
        site = Site(netns, tmp_path / "policy.yaml", ovs, before=HELD)
        site.build()
        yield site


@pytest.fixture
def agent(site: Site) -> Iterator[Agent]:
    """An agent on `site`, connected to its database."""
    with site.start() as agent:
        wait(lambda: connected(agent), "the agent is not connected")
        yield agent


def connected(agent: Agent) -> bool:
    return all(each["connected"] for each in agent.report()["databases"])


def wait(done: Callable[[], object], what: str, seconds: float = LATER) -> None:
    """Wait until it is so; fail the test where it is not in time."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def wait_for_guests(site: Site, *taps: str) -> None:
    wait(lambda: all(map(site.is_attached, taps)), f"{taps} are not back")


def ports(site: Site) -> set[str]:
    assert site.ovs is not None
    return {row["name"] for row in site.ovs.rows("Port")["Port"]}


def test_tap_that_dies_without_a_down(agent: Agent, site: Site) -> None:
    for _ in range(3):
        guest = site.tap("ten0")
        assert agent.up("ten0", descriptor=guest.fd).status == 0
        guest.close()
        died = time.monotonic()
        wait(lambda: site.row("ten0") is None, "the row is still there")
        # NOTE: with the time that ovs-vsctl takes to tell it.
        assert time.monotonic() - died < SOON


def test_many_taps_that_die_at_once(agent: Agent, site: Site) -> None:
    guests = [site.tap(f"ten{number}") for number in range(16)]
    for guest in guests:
        assert agent.up(guest.name).status == 0
    for guest in guests[:-1]:
        guest.close()
    wait(lambda: ports(site) == {"br-int", "ten15"}, "rows are still there")
    assert agent.down("ten15").status == 0


def test_tap_that_dies_while_the_database_is_mute(agent: Agent, site: Site) -> None:
    assert site.ovs is not None
    guest = site.tap("ten0")
    assert agent.up("ten0").status == 0
    site.ovs.server.stop()
    try:
        guest.close()
        agent.report()
    finally:
        site.ovs.server.cont()
    wait(lambda: site.row("ten0") is None, "the row is still there")


def test_tap_that_dies_while_the_server_is_away(agent: Agent, site: Site) -> None:
    assert site.ovs is not None
    guest = site.tap("ten0")
    assert agent.up("ten0").status == 0
    site.ovs.server.kill()
    guest.close()
    wait(lambda: not connected(agent), "the agent has not seen it")
    site.ovs.start_server()
    wait(lambda: connected(agent), "the agent does not connect again")
    wait(lambda: site.row("ten0") is None, "the row is still there")


def test_what_is_there_when_it_starts(site: Site) -> None:
    guests = {name: site.tap(name) for name in ("ten0", "ten1", "lan0")}
    with site.start() as agent:
        for name in guests:
            assert agent.up(name).status == 0
        agent.kill()
        guests["ten0"].close()
        site.netns.ip("link", "set", "dev", "lan0", "nomaster")
        assert site.row("ten0") is not None
        agent.start()
        wait(lambda: site.row("ten0") is None, "the row is still there")
        wait_for_guests(site, "lan0")
        assert site.is_attached("ten1")
        assert [agent.down(name).status for name in ("ten1", "lan0")] == [0, 0]


def test_not_ours(agent: Agent, site: Site) -> None:
    """A row of somebody else's stays without a tap; a tap of somebody else's stays where it is."""
    assert site.ovs is not None
    site.ovs.vsctl("--no-wait", "add-port", "br-int", "theirs")
    site.tap("loose")
    site.netns.ip("link", "set", "dev", "loose", "up")
    named = site.tap("alias")
    site.netns.ip("link", "set", "dev", "alias", "up", "alias", "libvirt")
    site.ovs.vsctl("--no-wait", "add-port", "br-int", "gone")
    dead = site.tap("gone")
    dead.close()
    guest = site.tap("ten0")
    assert agent.up("ten0").status == 0
    guest.close()
    wait(lambda: site.row("ten0") is None, "the row is still there")
    # A bridge that comes makes it look at everything.
    site.netns.add_bridge("br9")
    site.ovs.add_bridge("br-9")
    guest = site.tap("ten1")
    assert agent.up("ten1").status == 0
    guest.close()
    wait(lambda: site.row("ten1") is None, "the row is still there")
    assert {"theirs", "gone"} <= ports(site)
    assert "master" not in site.netns.link("loose")
    assert site.netns.link("alias")["ifalias"] == "libvirt" and named.fd >= 0
    site.netns.ip("link", "del", "br9")
    for words in (["del-br", "br-9"], ["del-port", "theirs"], ["del-port", "gone"]):
        site.ovs.vsctl("--no-wait", *words)


def test_what_serves_nobody_is_not_brought_back(agent: Agent, site: Site) -> None:
    """A tap whose process has ended, or that is down, has lost nothing."""
    for name in ("lan0", "lan1"):
        site.netns.tap(name, persist=True)
    parent = subprocess.Popen(["sleep", "60"])
    try:
        assert agent.up("lan1").status == 0
        alias = site.netns.link("lan1")["ifalias"]
        start = Path(f"/proc/{parent.pid}/stat").read_text().rpartition(")")[2].split()[19]
        words = [
            f"pid={parent.pid}"
            if word.startswith("pid=")
            else f"start={start}"
            if word.startswith("start=")
            else word
            for word in alias.split()
        ]
    finally:
        parent.kill()
        parent.wait()
    site.netns.ip("link", "set", "dev", "lan0", "up", "alias", " ".join(words))
    site.netns.ip("link", "set", "dev", "lan1", "down")
    site.netns.ip("link", "set", "dev", "lan1", "nomaster")
    remake_bridge(site)
    guest = site.tap("lan2")
    assert agent.up("lan2").status == 0
    site.netns.ip("link", "set", "dev", "lan2", "nomaster")
    remake_bridge(site)
    wait_for_guests(site, "lan2")
    for name in ("lan0", "lan1"):
        assert "master" not in site.netns.link(name)
        site.netns.ip("link", "del", name)
    agent.down("lan2")
    guest.close()


def remake_bridge(site: Site) -> None:
    site.netns.ip("link", "del", "br0")
    site.netns.add_bridge("br0", mac=LAN_MAC)


def remake_ovs_bridge(site: Site) -> None:
    assert site.ovs is not None
    site.ovs.vsctl("--no-wait", "del-br", "br-int")
    site.ovs.add_bridge("br-int", hwaddr=INT_MAC)


def restart_server(site: Site) -> None:
    assert site.ovs is not None
    site.ovs.server.kill()
    site.ovs.start_server()


def restart_vswitchd(site: Site) -> None:
    assert site.ovs is not None
    site.ovs.vswitchd.kill()
    site.ovs.start_vswitchd()


def restart_as_the_service_does(site: Site) -> None:
    """As ovs-ctl: what is transient is deleted before ovs-vswitchd starts."""
    assert site.ovs is not None
    site.ovs.vswitchd.end()
    restart_server(site)
    for row in site.ovs.rows("Port")["Port"]:
        if row["other_config"].get("transient") == "true":
            site.ovs.vsctl("--no-wait", "del-port", row["name"])
    site.ovs.start_vswitchd()


def delete_port(site: Site) -> None:
    assert site.ovs is not None
    site.ovs.vsctl("del-port", "ten0")


@pytest.mark.parametrize(
    "lose",
    [remake_ovs_bridge, restart_server, restart_vswitchd, restart_as_the_service_does, delete_port],
    ids=lambda lose: lose.__name__,
)
def test_guests_on_open_vswitch_are_back(
    agent: Agent, site: Site, lose: Callable[[Site], None]
) -> None:
    assert site.ovs is not None
    ten0, ten1, lan0 = (site.tap(name) for name in ("ten0", "ten1", "lan0"))
    for guest in (ten0, ten1, lan0):
        assert agent.up(guest.name).status == 0
    assert crossing(ten0, ten1, {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    lose(site)
    wait_for_guests(site, "ten0", "ten1", "lan0")
    site.ovs.wait_up("ten0", "ten1")
    assert crossing(ten0, ten1, {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    # And the agent serves them as before.
    for guest in (ten0, ten1, lan0):
        assert agent.down(guest.name).status == 0
        assert site.is_clean(guest.name)


def test_guests_on_a_linux_bridge_are_back(agent: Agent, site: Site) -> None:
    lan0, lan1 = site.tap("lan0"), site.tap("lan1")
    assert agent.up("lan0").status == agent.up("lan1").status == 0
    assert crossing(lan0, lan1, {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    remake_bridge(site)
    wait_for_guests(site, "lan0", "lan1")
    assert crossing(lan0, lan1, {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    # A bridge of another name that is renamed is a bridge that comes, too.
    site.netns.ip("link", "del", "br0")
    site.netns.add_bridge("other", mac=LAN_MAC)
    assert "master" not in site.netns.link("lan0")
    site.netns.ip("link", "set", "dev", "other", "name", "br0")
    wait_for_guests(site, "lan0", "lan1")
    # One that comes up is one that comes: until then it takes in nobody.
    site.netns.ip("link", "del", "br0")
    site.netns.ip("link", "add", "br0", "address", LAN_MAC, "type", "bridge")
    time.sleep(2 * DELAY)
    assert "master" not in site.netns.link("lan0")
    assert "UP" in site.netns.link("lan0")["flags"]
    site.netns.ip("link", "set", "br0", "up")
    wait_for_guests(site, "lan0", "lan1")
    assert crossing(lan0, lan1, {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    assert agent.down("lan0").status == agent.down("lan1").status == 0


def test_tap_that_is_taken_from_its_bridge(agent: Agent, site: Site) -> None:
    """By whoever else manages links; taking the link down, as apply --cut does, is what lasts."""
    lan0, lan1 = site.tap("lan0"), site.tap("lan1")
    assert agent.up("lan0").status == agent.up("lan1").status == 0
    for _ in range(3):
        site.netns.ip("link", "set", "dev", "lan0", "nomaster")
        wait_for_guests(site, "lan0")
    assert crossing(lan0, lan1, {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    site.netns.ip("link", "set", "dev", "lan0", "nomaster", "down")
    site.netns.ip("link", "set", "dev", "lan1", "nomaster")
    wait_for_guests(site, "lan1")
    assert "master" not in site.netns.link("lan0")
    site.netns.ip("link", "set", "dev", "lan0", "up")
    wait_for_guests(site, "lan0")
    assert agent.down("lan0").status == agent.down("lan1").status == 0


def test_a_down_is_no_loss(agent: Agent, site: Site) -> None:
    """Of our own, by the agent or by a hook that does without it: it stays detached."""
    for _ in range(3):
        for name in ("lan0", "ten0"):
            guest = site.tap(name)
            assert agent.up(name).status == 0
            assert agent.down(name).status == 0
            guest.close()
    site.tap("ten0")
    site.tap("ten1")
    assert agent.up("ten0").status == agent.up("ten1").status == 0
    assert agent.down("ten0").status == 0
    remake_ovs_bridge(site)
    wait_for_guests(site, "ten1")
    assert site.is_clean("ten0")
    assert agent.down("ten1").status == 0


def test_what_cannot_be_brought_back_is_tried_again(agent: Agent, site: Site) -> None:
    """ovs-vswitchd stays away longer than an up may take."""
    assert site.ovs is not None
    site.write_policy(timeout=1)
    site.tap("ten0")
    wait(lambda: agent.up("denied").seconds == 1, "the policy is not in force")
    assert agent.up("ten0").status == 0
    alias = site.netns.link("ten0")["ifalias"]
    site.ovs.vswitchd.stop()
    try:
        site.ovs.vsctl("--no-wait", "del-port", "ten0")
        wait(
            lambda: "ten0: not done after 1 s" in (agent.report()["last_error"] or ""),
            "it was not tried",
        )
        # As it was, but for the port that it has lost.
        link = site.netns.link("ten0")
        assert "UP" in link["flags"] and link["ifalias"] == alias
    finally:
        site.ovs.vswitchd.cont()
    wait_for_guests(site, "ten0")
    site.ovs.wait_up("ten0")
    assert agent.down("ten0").status == 0


@pytest.mark.parametrize("made", [False, True], ids=["of its QEMU's", "of the agent's"])
def test_bridge_that_vswitchd_makes_late(agent: Agent, site: Site, made: bool) -> None:
    """Its row is there, its interface later than an up may take; the tap comes back by itself.

    One of the agent's making keeps its mark when it is not attached.
    """
    assert site.ovs is not None
    site.write_policy(timeout=1)
    tap = site.tap("ten0")
    wait(lambda: is_in_force(agent, 1), "the policy is not in force")
    assert agent.up("ten0").status == 0
    alias = site.netns.link("ten0")["ifalias"]
    if made:
        set_owner(tap.fd, 0)
        alias = alias.replace(" rule=", " made=1 rule=")
        site.netns.ip("link", "set", "dev", "ten0", "alias", alias)
    site.ovs.vsctl("del-br", "br-int")
    site.ovs.vswitchd.stop()
    try:
        site.ovs.vsctl(
            "--no-wait", "add-br", "br-int", "--", "set", "Bridge", "br-int", "datapath_type=netdev"
        )
        wait(lambda: "ten0: " in (agent.report()["last_error"] or ""), "it was not tried")
        link = site.netns.link("ten0")
        assert "UP" in link["flags"] and link["ifalias"] == alias
        assert agent.report()["last_error"] == (
            "ten0: not done after 1 s: ovs-vswitchd has not made br-int yet "
            f"({site.ovs.db}); it is tried again"
        )
    finally:
        site.ovs.vswitchd.cont()
    wait_for_guests(site, "ten0")
    assert agent.down("ten0").status == 0


def test_bug_in_a_bringing_back(agent: Agent, site: Site) -> None:
    """It is told, and the guest has not lost its network for it."""
    site.tap("lan0")
    assert agent.up("lan0").status == 0
    alias = site.netns.link("lan0")["ifalias"]
    bug = agent.folder / "before-lan0-JoinBridge-bug"
    bug.touch()
    remake_bridge(site)
    wait(
        lambda: "lan0: internal error: LookupError" in (agent.report()["last_error"] or ""),
        "it is not told",
    )
    # It is as it was, but for moments: it is tried again later, and later each time.
    wait(lambda: is_as_it_was(site, alias), "it is not as it was")
    tries, end = 0, time.monotonic() + 2.5
    was_up = True
    while time.monotonic() < end:
        is_up = "UP" in site.netns.link("lan0")["flags"]
        tries += was_up and not is_up
        was_up = is_up
    assert tries <= 2
    bug.unlink()
    wait_for_guests(site, "lan0")
    assert agent.down("lan0").status == 0


def is_as_it_was(site: Site, alias: str) -> bool:
    link = site.netns.link("lan0")
    return "UP" in link["flags"] and link.get("ifalias") == alias


def is_isolated(site: Site, tap: str) -> bool:
    return bool(site.netns.link(tap)["linkinfo"]["info_slave_data"]["isolated"])


def test_policy_of_now(agent: Agent, site: Site) -> None:
    """A guest that is brought back gets what the policy says by now, on its own network."""
    site.tap("lan0")
    assert agent.up("lan0").status == 0
    site.write_policy(rules=[{"tap": "lan*", "network": "lan", "isolated": True}], timeout=9)
    wait(lambda: agent.up("denied").seconds == 9, "the policy is not in force")
    assert not is_isolated(site, "lan0")
    remake_bridge(site)
    wait_for_guests(site, "lan0")
    assert is_isolated(site, "lan0")
    assert agent.down("lan0").status == 0


def is_in_force(agent: Agent, timeout: int) -> bool:
    return agent.up("none").seconds == timeout


def test_guest_that_is_denied_by_now_stays_lost(agent: Agent, site: Site) -> None:
    """Or that is on another network; one whose network was asked for by name is brought back."""
    for name in ("lan0", "ten0"):
        site.tap(name)
    assert agent.up("lan0").status == agent.up("ten0", "lan").status == 0
    assert " by=name " in site.netns.link("ten0")["ifalias"]
    assert "by=name" not in site.netns.link("lan0")["ifalias"]
    for timeout, rule in enumerate(({"deny": "closed"}, {"network": "tenants"}), 11):
        site.write_policy(rules=[{"tap": "*", **rule}], timeout=timeout)
        wait(partial(is_in_force, agent, timeout), "the policy is not in force")
        remake_bridge(site)
        wait(lambda: site.netns.link("ten0").get("master") == "br0", "ten0 is not back")
        # The taps are looked at in their order: lan0 has been refused already.
        link = site.netns.link("lan0")
        assert "master" not in link and "UP" in link["flags"] and site.row("lan0") is None
    site.write_policy()
    wait_for_guests(site, "lan0")
    assert agent.down("lan0").status == agent.down("ten0").status == 0


COUNTED = (
    HELD
    + """
from pyqemu_ifd import reconcile

def sweep(self, sweep=reconcile.Reconciler._sweep):
    with open(f"{folder}/sweeps", "a") as file:
        file.write(".")
    return sweep(self)

reconcile.Reconciler._sweep = sweep
"""
)


@pytest.mark.parametrize("size", [0, 2 * SMALL], ids=["small", "large"])
def test_when_told_to_read_an_unchanged_policy_it_looks_at_every_tap(site: Site, size: int) -> None:
    """A larger one is read beside the agent, and is there in a later turn."""
    with site.policy.open("a") as file:
        file.write(f"\n# {'x' * size}\n")
    with site.start(before=COUNTED) as agent:
        sweeps = agent.folder / "sweeps"
        wait(lambda: connected(agent) and sweeps.exists(), "the agent is not connected")
        before = ""
        while sweeps.read_text() != before:
            before = sweeps.read_text()
            time.sleep(4 * DELAY)
        os.kill(agent.pid, signal.SIGHUP)
        wait(lambda: sweeps.read_text() != before, "it has not looked")


LOGGED = (
    HELD
    + """
from pyqemu_ifd import reconcile

def log(priority, line, log=reconcile.log):
    with open(f"{folder}/log", "a") as file:
        file.write(line + "\\n")
    log(priority, line)

reconcile.log = log
"""
)


def test_that_it_stays_lost_is_told_once(site: Site) -> None:
    """Whatever has every tap looked at again: a bridge, or a log beside the policy."""
    with site.start(before=LOGGED) as agent:
        wait(lambda: connected(agent), "the agent is not connected")
        taps = [site.tap("lan0"), site.tap("lan1")]
        assert agent.up("lan0").status == agent.up("lan1").status == 0
        rules = [{"tap": "lan0", "deny": "closed"}, {"tap": "lan1", "network": "lan"}]
        site.write_policy(rules=rules, timeout=11)
        wait(partial(is_in_force, agent, 11), "the policy is not in force")
        for number in range(3):
            remake_bridge(site)
            site.policy.with_name("a.log").write_text(f"{number}")
            # The taps are looked at in their order: lan0 has been refused already.
            wait_for_guests(site, "lan1")
        lines = (agent.folder / "log").read_text().splitlines()
        assert len([line for line in lines if "lan0: not brought back to br0: denied" in line]) == 1
        assert len([line for line in lines if "lan1: attached" in line]) == 3
        for tap in taps:
            assert agent.down(tap.name).status == 0


def test_where_the_policy_has_it_elsewhere_by_now_what_moves_it_is_told(
    site: Site, tmp_path: Path
) -> None:
    hooks = Hooks(tmp_path / "hooks", netns=site.netns.name)
    with site.start(before=LOGGED) as agent:
        wait(lambda: connected(agent), "the agent is not connected")
        tap = site.tap("lan0")
        assert agent.up("lan0").status == 0
        site.write_policy(rules=[{"tap": "lan0", "network": "tenants"}], timeout=11)
        wait(partial(is_in_force, agent, 11), "the policy is not in force")
        hooks.write_policy(site.policy.read_text())
        remake_bridge(site)
        log = agent.folder / "log"

        def told() -> list[str]:
            lines = log.read_text().splitlines() if log.exists() else []
            return [line for line in lines if line.startswith("lan0: not brought back to br0: ")]

        wait(told, "nothing is told")
        assert "has it on network tenants by now" in told()[0]
        run_told(hooks, told()[0])
        (row,) = hooks.ctl_json("status")["taps"]
        assert (row["state"], row["network"]) == ("ok", "tenants")
        assert agent.down(tap.name).status == 0


def test_user_who_may_not_by_now_stays_lost(agent: Agent, site: Site) -> None:
    lan0, lan1 = site.tap("lan0"), site.tap("lan1")
    for guest in (lan0, lan1):
        assert agent.up(guest.name).status == 0
    alias = site.netns.link("lan0")["ifalias"]
    site.netns.ip("link", "set", "dev", "lan0", "alias", f"{alias} uid=4242")
    remake_bridge(site)
    wait_for_guests(site, "lan1")
    assert "master" not in site.netns.link("lan0")
    site.write_policy(
        networks={"lan": {"bridge": "br0", "users": ["4242"]}},
        rules=[{"tap": "lan*", "network": "lan"}],
    )
    wait_for_guests(site, "lan0")
    assert " uid=4242 " in site.netns.link("lan0")["ifalias"]
    assert agent.down("lan0").status == agent.down("lan1").status == 0


def test_port_whose_name_no_link_can_have(agent: Agent, site: Site) -> None:
    assert site.ovs is not None
    name = "patch-to-the-other-1"
    assert len(name) == 20
    site.ovs.vsctl(
        "--no-wait",
        "add-port",
        "br-int",
        name,
        "--",
        "set",
        "Interface",
        name,
        "type=patch",
        "options:peer=nobody",
    )
    site.ovs.vsctl("--no-wait", "del-port", name)
    guest = site.tap("ten0")
    assert agent.up("ten0").status == 0
    site.ovs.vsctl("del-port", "ten0")
    wait_for_guests(site, "ten0")
    assert agent.report()["last_error"] is None
    assert agent.down("ten0", descriptor=guest.fd).status == 0


BLIND = """
import pyqemu_ifup.kinds as kinds
from pyqemu_ifconf.failure import Failure, Status

seeing = kinds.judge

def judge(*words):
    if os.path.exists(f"{folder}/blind"):
        raise ERROR
    return seeing(*words)

kinds.judge = judge
"""


@pytest.mark.parametrize(
    "error", ["Failure(Status.REFUSED, 'cannot see')", "OSError('cannot see')"]
)
def test_what_cannot_be_looked_at_is_looked_at_later(site: Site, error: str) -> None:
    """And nothing that is there ends the agent."""
    with site.start(before=HELD + BLIND.replace("ERROR", error)) as agent:
        wait(lambda: connected(agent), "the agent is not connected")
        guest = site.tap("ten0")
        assert agent.up("ten0").status == 0
        (agent.folder / "blind").touch()
        guest.close()
        wait(lambda: "cannot see" in (agent.report()["last_error"] or ""), "it did not look")
        (agent.folder / "blind").unlink()
        wait(lambda: site.row("ten0") is None, "the row is still there")


def test_agent_without_open_vswitch_finds_it_later(site: Site) -> None:
    ovs = site.ovs
    assert ovs is not None
    ovs.vswitchd.kill()
    ovs.server.kill()
    os.unlink(ovs.dir / "db.sock")
    with site.start() as agent:
        assert agent.report()["databases"] == []
        guest = site.tap("lan0")
        assert agent.up("lan0").status == 0
        ovs.start_server()
        ovs.start_vswitchd()
        ten = site.tap("ten0")
        assert agent.up("ten0").status == 0
        assert connected(agent)
        assert agent.down("ten0").status == agent.down("lan0").status == 0
        ten.close()
        guest.close()


def test_a_tap_that_comes_again_at_once(agent: Agent, site: Site) -> None:
    """The clean-up of the old one does not touch the new one of the same name."""
    for _ in range(10):
        guest = site.tap("ten0")
        assert agent.up("ten0").status == 0
        guest.close()
        guest = site.tap("ten0")
        assert agent.up("ten0").status == 0
        assert site.is_attached("ten0")
        row = site.row("ten0")
        assert row is not None and row["tag"] == VID
        guest.close()
    wait(lambda: site.row("ten0") is None, "the row is still there")


def test_frames_of_a_guest_that_was_brought_back_stay_in_its_vlan(agent: Agent, site: Site) -> None:
    assert site.ovs is not None
    ten: Tap = site.tap("ten0")
    stranger = site.tap("other")
    site.netns.ip("link", "set", "dev", "other", "up")
    assert agent.up("ten0").status == 0
    remake_ovs_bridge(site)
    site.ovs.add_port("br-int", "other", "tag=7")
    wait_for_guests(site, "ten0")
    site.ovs.wait_up("ten0", "other")
    assert crossing(ten, stranger, {UNTAGGED: None}) == {UNTAGGED: None}
    site.ovs.vsctl("set", "Port", "other", f"tag={VID}")
    assert crossing(ten, stranger, {UNTAGGED: UNTAGGED}) == {UNTAGGED: UNTAGGED}
    site.ovs.del_port("other")
    assert agent.down("ten0").status == 0
