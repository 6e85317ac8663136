"""Rules that leave a tap as it is: nothing of it is touched but an old mark of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.agent import Agent
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import NOBODY, as_user, public_folder, publish
from lab.qemu import Qemu

POLICY = """\
version: 1
networks:
  lan: {bridge: br0}
rules:
  - {tap: own*, leave: true}
  - {vm: fw-*, leave: true}
  - {tap: "*", network: lan}
"""
WITHOUT = POLICY.replace("leave: true", "network: lan")
MAC = "02:00:00:00:00:01"


@dataclass
class Place:
    """A namespace of the test's own, which goes with all that is in it."""

    netns: Namespace


@pytest.fixture
def place() -> Iterator[Place]:
    """A namespace with nothing in it."""
    require("root", "tun", "ip", "qemu")
    with Namespace() as netns:
        yield Place(netns)


@pytest.fixture
def hooks(way: str, place: Place, tmp_path: Path) -> Iterator[Hooks]:
    """The hooks in a namespace with the bridge br0, and own0, which its launcher has set up."""
    netns = place.netns
    netns.add_bridge("br0", mac=MAC)
    netns.ip("tuntap", "add", "dev", "own0", "mode", "tap")
    netns.ip("link", "set", "dev", "own0", "address", "02:00:00:00:00:07", "mtu", "1400", "up")
    netns.ip("address", "add", "192.0.2.1/24", "dev", "own0")
    found = Hooks(tmp_path / "hooks", netns=netns.name)
    found.write_policy(POLICY)
    with ExitStack() as stack:
        if way == "agent":
            agent = stack.enter_context(Agent(netns, found.policy))
            found.agent, found.agent_pid = agent.path, agent.pid
        yield found


def own(netns: Namespace) -> tuple[object, ...]:
    """Return all of own0 that somebody could have touched."""
    (link,) = netns.ip("address", "show", "dev", "own0")
    switch = netns.run(["cat", "/proc/sys/net/ipv6/conf/own0/disable_ipv6"]).stdout
    addresses = sorted(each["local"] for each in link["addr_info"] if each["family"] == "inet")
    return (
        link["address"],
        link["mtu"],
        link.get("txqlen"),
        "UP" in link["flags"],
        link.get("master"),
        link.get("ifalias"),
        addresses,
        switch,
    )


@contextmanager
def qemu(hooks: Hooks, tap: str, *args: str) -> Iterator[Qemu]:
    """A QEMU that has the tap, once our hook is done."""
    words = f"tap,id=n0,ifname={tap},script={hooks.ifup},downscript={hooks.ifdown}"
    with Qemu("-netdev", words, *args, netns=hooks.netns, env=hooks.environ()) as guest:
        assert guest.greeting and "pyqemu" not in guest.stderr
        yield guest
        assert "pyqemu" not in guest.stderr


def told(hooks: Hooks, *words: str) -> Any:
    return json.loads(hooks.ctl_warm(*words, "--json").stdout)


def state(hooks: Hooks) -> str | None:
    (row,) = [each for each in told(hooks, "status")["taps"] if each["tap"] == "own0"]
    assert row["differences"] == []
    found: str | None = row["state"]
    return found


def test_it_stays_as_it_is(hooks: Hooks, place: Place) -> None:
    netns = place.netns
    before = own(netns)
    assert state(hooks) == "left"
    with qemu(hooks, "own0", "-name", "vm1") as guest:
        assert own(netns) == before
        assert state(hooks) == "left"
        shown = hooks.ctl_warm("info").stdout
        assert "vm1, pid " in shown and " ! " not in shown
        for verb in (("apply",), ("apply", "--cut"), ("gc",)):
            done = hooks.ctl_warm(*verb)
            assert done.returncode == 0 and "own0" not in done.stdout, done
        done = hooks.ctl_warm("apply", "own0")
        assert done.returncode == 0 and "1 tap left alone\n" in done.stdout, done
        assert f"left alone: the rule at {hooks.policy}:5 leaves it as it is" in done.stdout
        assert own(netns) == before
        assert guest.quit() == 0
    assert own(netns) == before


def test_a_guest_s_name_may_decide(hooks: Hooks, place: Place) -> None:
    netns = place.netns
    netns.ip("tuntap", "add", "dev", "any0", "mode", "tap")
    with qemu(hooks, "any0", "-name", "fw-1"):
        link = netns.link("any0")
        assert "master" not in link and "ifalias" not in link and "UP" not in link["flags"]
        # NOTE: status knows of no guest, and cannot tell.
        shown = hooks.ctl_warm("info").stdout
        assert "fw-1, pid " in shown and " ! " not in shown, shown
    with qemu(hooks, "any0", "-name", "web"):
        assert netns.link("any0")["master"] == "br0"


@pytest.mark.parametrize(
    ("rule", "script"),
    [
        ("{netdev: n*, leave: true}", "no"),
        ("{user: root, tap: any*, leave: true}", "no"),
        ("{vm: fw-*, leave: true}", ""),
    ],
    ids=["netdev", "user", "vm"],
)
@pytest.mark.alone("info and doctor look themselves")
def test_what_a_guest_s_rule_leaves_is_no_fault(
    hooks: Hooks, place: Place, rule: str, script: str
) -> None:
    """A tap that its launcher has made and addressed, and of which QEMU calls no script of ours."""
    hooks.write_policy(POLICY.replace("{vm: fw-*, leave: true}", rule))
    place.netns.ip("tuntap", "add", "dev", "any0", "mode", "tap")
    given = "script=no,downscript=no" if script else f"script={hooks.ifup}"
    with Qemu(
        "-name",
        "fw-1",
        "-netdev",
        f"tap,id=n0,ifname=any0,{given}",
        netns=place.netns.name,
        env=hooks.environ(),
    ) as guest:
        assert guest.greeting
        shown = hooks.ctl_warm("info").stdout
        assert "fw-1, pid " in shown and " ! " not in shown, shown
        found = json.loads(hooks.ctl("doctor", "--json").stdout)["findings"]
        assert "qemu-downscript" not in {each["check"] for each in found}


def test_an_old_mark_goes_first(hooks: Hooks, place: Place) -> None:
    """Of a guest that was killed, and with it the tap's place on our bridge."""
    netns = place.netns
    hooks.write_policy(WITHOUT)
    with qemu(hooks, "own0") as guest:
        assert netns.link("own0")["master"] == "br0"
        hooks.write_policy(POLICY)
        said = hooks.ctl_warm("status", "own0").stdout
        assert "wanted none because left alone from its next start on" in " ".join(said.split())
        assert hooks.ctl_warm("apply").returncode == 0
        assert netns.link("own0")["master"] == "br0"
        guest.process.kill()
        guest.wait()
    explained = told(hooks, "explain", "own0")
    assert explained["decision"] == "leave" and explained["rule"] == f"{hooks.policy}:5"
    if "ifalias" in netns.link("own0"):
        assert "ip link set dev own0 nomaster" in explained["commands"]
    with qemu(hooks, "own0"):
        link = netns.link("own0")
        assert "master" not in link and "ifalias" not in link
        assert (link["address"], link["mtu"]) == ("02:00:00:00:00:07", 1400)
    assert told(hooks, "explain", "own0")["commands"] == []


@pytest.mark.alone("the agent takes the mark of a process that has ended away before")
def test_a_mark_alone_goes_and_the_link_stays(hooks: Hooks, place: Place) -> None:
    netns = place.netns
    mark = "pyqemu-ifup/1 network=lan kind=linux bridge=br0 pid=1 start=1 rule=policy.yaml:1"
    before = own(netns)
    netns.ip("link", "set", "dev", "own0", "alias", mark)
    assert hooks.up("own0").returncode == 0
    assert own(netns) == before


def test_not_while_it_serves_another_guest(hooks: Hooks, place: Place) -> None:
    netns = place.netns
    hooks.write_policy(WITHOUT)
    with qemu(hooks, "own0"):
        hooks.write_policy(POLICY)
        done = hooks.up("own0")
        assert done.returncode == 77 and "in use: attached to br0 for process" in done.stderr
        assert netns.link("own0")["master"] == "br0"


@pytest.mark.alone("of the databases, an agent knows what this one does")
def test_a_port_of_ours_that_a_dead_tap_has_left(hooks: Hooks, place: Place) -> None:
    """The frames of its old VLAN would reach the tap that has its name."""
    require("ovs")
    with OpenVSwitch(place.netns) as ovs:
        dead_tap(hooks, place.netns, ovs)


def dead_tap(hooks: Hooks, netns: Namespace, ovs_netdev: OpenVSwitch) -> None:
    ovs_netdev.add_bridge("br-int")
    lan = f"{{bridge: br-int, kind: openvswitch, ovsdb: '{ovs_netdev.db}', vlan: 7}}"
    hooks.write_policy(WITHOUT.replace("{bridge: br0}", lan))
    with qemu(hooks, "own0") as guest:
        assert ovs_netdev.find("Port", "own0") is not None
        guest.process.kill()
        guest.wait()
    netns.ip("link", "del", "dev", "own0")
    netns.ip("tuntap", "add", "dev", "own0", "mode", "tap")
    hooks.write_policy(POLICY.replace("{bridge: br0}", lan))
    ovs_netdev.vsctl("add-port", "br-int", "own1")
    assert hooks.up("own0").returncode == 0
    assert ovs_netdev.find("Port", "own0") is None
    # What a launcher has plugged in itself stays.
    netns.ip("tuntap", "add", "dev", "own1", "mode", "tap")
    assert hooks.up("own1").returncode == 0
    assert ovs_netdev.find("Port", "own1") is not None


@pytest.mark.alone("the agent takes the mark of a process that has ended away before")
def test_explain_asks_the_database_that_an_old_mark_names(hooks: Hooks, place: Place) -> None:
    require("ovs")
    with OpenVSwitch(place.netns) as ovs:
        ovs.add_bridge("br-int")
        lan = f"{{bridge: br-int, kind: openvswitch, ovsdb: '{ovs.db}'}}"
        hooks.write_policy(WITHOUT.replace("{bridge: br0}", lan))
        with qemu(hooks, "own0") as guest:
            guest.process.kill()
            guest.wait()
        hooks.write_policy(POLICY)
        assert any("del-port" in line for line in told(hooks, "explain", "own0")["commands"])


@pytest.mark.alone("explain asks no agent")
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_explain_says_which_database_it_could_not_ask(
    hooks: Hooks, place: Place, form: tuple[str, ...]
) -> None:
    lan = "{bridge: br-int, kind: openvswitch, ovsdb: 'tcp:127.0.0.1:9'}"
    hooks.write_policy(POLICY.replace("{bridge: br0}", lan))
    done = hooks.ctl("explain", "own0", *form)
    said = done.stderr if form else done.stdout
    assert "could not tell: " in said and "tcp:127.0.0.1:9" in said, done
    assert not form or json.loads(done.stdout)["decision"] == "leave"


def test_what_is_not_there_is_not_left(hooks: Hooks) -> None:
    done = hooks.up("own9")
    assert done.returncode == 71
    assert "own9: there is no such tap in this network namespace; " in done.stderr
    assert hooks.down("own9").returncode == 0


@pytest.mark.alone("who has no privilege asks another agent: see test_policy_decide")
def test_it_is_a_denial_for_who_is_not_root(place: Place) -> None:
    """The hook of a QEMU of his own: no network is no reason to let it start."""
    netns = place.netns
    netns.ip("tuntap", "add", "dev", "own0", "mode", "tap", "user", str(NOBODY))
    with public_folder() as folder:
        hooks = publish(Hooks(folder / "first"), folder)
        hooks.write_policy(POLICY)
        words = [*as_user(NOBODY), hooks.ifup, "own0"]
        done = netns.run(words, env=hooks.environ(), check=False)
    assert done.returncode == 77
    assert "own0: denied: leave: is for taps of root's alone " in done.stderr
    assert "; see the rule at" in done.stderr


def test_doctor_leaves_it_alone(place: Place, tmp_path: Path) -> None:
    """A launcher that gives no script= has QEMU's own, which is no business of ours then."""
    netns = place.netns
    netns.add_bridge("br0", mac=MAC)
    hooks = Hooks(tmp_path / "hooks", netns=netns.name)
    stock = tmp_path / "stock"
    stock.write_text("#!/bin/sh\n")
    stock.chmod(0o755)
    mount = 'mount --bind "$0" /etc/qemu-ifup && exec "$@"'
    with Qemu(
        "-netdev",
        "tap,id=n0,ifname=own0,downscript=no",
        netns=netns.name,
        prefix=["unshare", "-m", "sh", "-c", mount, str(stock)],
    ) as guest:
        assert guest.greeting
        checks = {}
        for policy in (POLICY, WITHOUT):
            hooks.write_policy(policy)
            checks[policy] = {
                each["check"]
                for each in json.loads(hooks.ctl("doctor", "--json").stdout)["findings"]
            }
        assert "qemu-script" in checks[WITHOUT] and "qemu-script" not in checks[POLICY]
