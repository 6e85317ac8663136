"""The agent's requests: answered side by side, in time, rolled back, and after a crash."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.agent import Agent, Client
from lab.agent_site import HELD, Site, asking, held, told
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import NOBODY
from lab.race import fork, wait
from lab.taps import Tap
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import DEFAULT_TIMEOUT
from pyqemu_ifd import thin, wire

STRANGER = 4242
LATER = 20.0
"""Seconds after which what must happen soon has not happened."""
UP = {
    "lan0": ["SetAlias", "SetMac", "SetMtu", "SetIpv6", "JoinBridge", "SetUp"],
    "ten0": ["SetAlias", "SetMac", "SetMtu", "SetIpv6", "AddPort", "SetUp"],
}
"""For a tap of each kind of bridge, the steps of its up."""
DOWN = {"lan0": ["SetDown", "LeaveBridge", "SetAlias"], "ten0": ["SetDown", "DelPort", "SetAlias"]}
STEPS = [
    (tap, step, moment)
    for tap, steps in UP.items()
    for step in steps
    for moment in ("before", "after")
]


@pytest.fixture
def site(netns: Namespace, tmp_path: Path) -> Site:
    """A site without Open vSwitch."""
    site = Site(netns, tmp_path / "policy.yaml", before=HELD)
    site.build()
    return site


@pytest.fixture
def both(netns: Namespace, ovs: OpenVSwitch, tmp_path: Path) -> Site:
    """A site with Open vSwitch too."""
    site = Site(netns, tmp_path / "policy.yaml", ovs, before=HELD)
    site.build()
    return site


@pytest.fixture
def agent(site: Site) -> Iterator[Agent]:
    """An agent on `site`."""
    with site.start() as agent:
        yield agent


@pytest.fixture
def agent_on_both(both: Site) -> Iterator[Agent]:
    """An agent on `both`, connected to its database."""
    with both.start() as agent:
        wait_connected(agent)
        yield agent


def wait_connected(agent: Agent) -> None:
    """Wait until the agent is connected to all databases."""
    end = time.monotonic() + LATER
    while not all(each["connected"] for each in agent.report()["databases"]):
        assert time.monotonic() < end, agent.report()
        time.sleep(0.01)


def wait_for_status(client: Client, status: int) -> None:
    answer = client.answer()
    assert answer.status == status, answer


# One after the other


@pytest.mark.each_python
@pytest.mark.parametrize("tap", ["lan0", "ten0"])
def test_up_and_down(agent_on_both: Agent, both: Site, tap: str) -> None:
    guest = both.tap(tap)
    answer = agent_on_both.up(tap, descriptor=guest.fd)
    assert (answer.status, answer.lines, answer.seconds) == (0, [], 10)
    assert both.is_attached(tap)
    answer = agent_on_both.down(tap, descriptor=guest.fd)
    assert (answer.status, answer.lines, answer.seconds) == (0, [], 10)
    assert both.is_clean(tap)


def test_each_step_is_told_to_who_wants_it(agent: Agent, site: Site) -> None:
    site.tap("lan0")
    up = agent.ask("up", "lan0", "", "debug")
    assert "pyqemu-ifup: lan0: ip link set dev lan0 master br0" in up.lines
    down = agent.ask("down", "lan0", "debug")
    assert "pyqemu-ifdown: lan0: ip link set dev lan0 nomaster" in down.lines
    assert all(line.startswith("pyqemu-ifdown: lan0: ") for line in down.lines)


def test_network_by_name(agent_on_both: Agent, both: Site) -> None:
    both.tap("ten0")
    assert agent_on_both.up("ten0", "lan").status == 0
    assert both.netns.link("ten0")["master"] == "br0"
    answer = agent_on_both.up("ten0", "nowhere")
    assert answer.status == 77
    assert told(answer).startswith("pyqemu-ifup: ten0: network nowhere: the policy does not")
    agent_on_both.down("ten0")


@pytest.mark.parametrize(
    ("tap", "status", "text"),
    [
        ("lan0", 71, "there is no such tap in this network namespace"),
        ("other", 77, "denied: no rule of "),
        ("br0", 77, "denied: no rule of "),
        ("a/b", 64, ""),
        ("", 64, ""),
        ("x" * 16, 64, ""),
        ("lan\n0", 64, ""),
        ("lan\udcff", 64, ""),
    ],
)
def test_failures(agent: Agent, tap: str, status: int, text: str) -> None:
    answer = agent.up(tap)
    assert answer.status == status
    (line,) = answer.lines
    assert line.startswith("pyqemu-ifup: ") and line.isprintable()
    assert text in line


def test_descriptor_of_another_tap(agent: Agent, site: Site) -> None:
    site.tap("lan0")
    other = site.tap("lan1")
    answer = agent.up("lan0", descriptor=other.fd)
    assert answer.status == 77 and "its descriptor is of lan1" in told(answer)
    assert site.is_clean("lan0")


def test_broken_policy_from_the_start(site: Site) -> None:
    site.policy.write_text("version: 2\n")
    with site.start() as agent:
        site.tap("lan0")
        assert agent.up("lan0").status == 65
        assert agent.up("a/b").status == 64
        assert agent.down("lan0").status == 0
        report = agent.report()
        assert report["policy"]["files"] is None and "policy.yaml:1:" in report["policy"]["error"]
        assert "policy.yaml:1:" in report["last_error"] or "a/b" in report["last_error"]


def test_no_policy(site: Site) -> None:
    site.policy.unlink()
    with site.start() as agent:
        assert agent.up("lan0").status == 66


# Side by side


def test_different_taps_at_once(agent: Agent, site: Site) -> None:
    site.tap("lan0")
    site.tap("lan1")
    with held(agent, "lan0", "SetMtu") as reached, asking(agent, "up", "lan0", "", "") as first:
        reached()
        assert agent.up("lan1").status == 0
        assert site.is_attached("lan1")
        assert "master" not in site.netns.link("lan0")
        (agent.folder / "before-lan0-SetMtu").unlink()
        wait_for_status(first, 0)
    assert site.is_attached("lan0")
    assert [agent.down(tap).status for tap in ("lan0", "lan1")] == [0, 0]


def test_one_tap_in_order(agent: Agent, site: Site) -> None:
    site.tap("lan0")
    with held(agent, "lan0", "SetUp") as reached, ExitStack() as stack:
        up = stack.enter_context(asking(agent, "up", "lan0", "", ""))
        reached()
        down = stack.enter_context(asking(agent, "down", "lan0", ""))
        again = stack.enter_context(asking(agent, "up", "lan0", "", ""))
        # Its deadline runs from the beginning, and is told then.
        assert down.packet()[0] == b"!10" and again.packet()[0] == b"!10"
        assert "UP" not in site.netns.link("lan0")["flags"]
        (agent.folder / "before-lan0-SetUp").unlink()
        wait_for_status(up, 0)
        wait_for_status(down, 0)
        wait_for_status(again, 0)
    assert site.is_attached("lan0")
    agent.down("lan0")


def test_deadline_of_one_that_waits_for_its_turn(agent: Agent, site: Site) -> None:
    site.tap("lan0")
    with held(agent, "lan0", "SetUp") as reached, asking(agent, "up", "lan0", "", "") as up:
        reached()
        site.write_policy(timeout=1)
        wait_for_timeout(agent, 1)
        answer = agent.up("lan0")
        assert (answer.status, answer.seconds) == (75, 1)
        assert "not done after 1 s: other work on this tap is under way" in told(answer)
        (agent.folder / "before-lan0-SetUp").unlink()
        wait_for_status(up, 0)
    assert site.is_attached("lan0")
    agent.down("lan0")


def test_policy_of_when_its_turn_comes(agent: Agent, site: Site) -> None:
    site.tap("lan0")
    with (
        held(agent, "lan0", "SetUp") as reached,
        asking(agent, "up", "lan0", "", "") as first,
        asking(agent, "up", "lan0", "", "") as second,
    ):
        reached()
        assert second.packet()[0] == b"!10"
        site.write_policy(rules=[{"tap": "lan*", "deny": "closed"}], timeout=9)
        wait_for_timeout(agent, 9)
        (agent.folder / "before-lan0-SetUp").unlink()
        wait_for_status(first, 0)
        answer = second.answer()
    assert answer.status == 77 and "closed" in told(answer)
    agent.down("lan0")


def test_down_of_a_tap_whose_name_another_has_by_now(agent: Agent, site: Site) -> None:
    guest = site.tap("lan0")
    assert agent.up("lan0").status == 0
    alias = site.netns.link("lan0")["ifalias"]
    with (
        held(agent, "lan0", "SetDown") as reached,
        asking(agent, "down", "lan0", "") as first,
        agent.connect() as late,
    ):
        reached()
        late.ask("down", "lan0", "", descriptors=[guest.fd])
        assert late.packet()[0] == b"!10"
        guest.close()
        other = site.tap("lan0")
        site.netns.ip("link", "set", "dev", "lan0", "master", "br0", "up", "alias", alias)
        (agent.folder / "before-lan0-SetDown").unlink()
        first.answer()
        wait_for_status(late, 0)
    assert site.is_attached("lan0")
    assert agent.down("lan0", descriptor=other.fd).status == 0
    assert site.is_clean("lan0")


def test_tap_that_was_made_is_named(agent: Agent, site: Site) -> None:
    site.write_policy(networks={"lan": {"bridge": "missing"}}, timeout=9)
    wait_for_timeout(agent, 9)
    answer = agent.ask("tap", "lan", "new0", "1", "", "")
    assert answer.status not in (0, 70)
    assert told(answer).startswith("pyqemu-bridge-helper: new0: ")


def wait_for_timeout(agent: Agent, seconds: int) -> None:
    """Wait until an up is given so many seconds, by the policy in force."""
    end = time.monotonic() + LATER
    while agent.up("denied").seconds != seconds:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_mute_database_delays_no_linux_bridge(agent_on_both: Agent, both: Site) -> None:
    agent, ovs = agent_on_both, both.ovs
    assert ovs is not None
    for tap in ("lan0", "lan1", "ten0"):
        both.tap(tap)
    ovs.server.stop()
    try:
        with asking(agent, "up", "ten0", "", "") as waits:
            assert waits.packet()[0] == b"!10"
            assert agent.up("lan0").status == 0
            assert agent.up("lan1").status == 0
            assert agent.down("lan1").status == 0
            assert both.netns.link("lan0")["master"] == "br0"
            assert "UP" not in both.netns.link("ten0")["flags"]
            ovs.server.cont()
            wait_for_status(waits, 0)
    finally:
        ovs.server.cont()
    assert both.is_attached("ten0") and both.is_attached("lan0") and both.is_clean("lan1")
    assert agent.down("ten0").status == agent.down("lan0").status == 0


@pytest.mark.parametrize("daemon", ["server", "vswitchd"])
def test_deadline(both: Site, daemon: str) -> None:
    ovs = both.ovs
    assert ovs is not None
    both.write_policy(timeout=1)
    guest = both.tap("ten0")
    with both.start() as agent:
        wait_connected(agent)
        stopped = ovs.server if daemon == "server" else ovs.vswitchd
        stopped.stop()
        try:
            answer = agent.up("ten0", descriptor=guest.fd)
        finally:
            stopped.cont()
        assert (answer.status, answer.seconds) == (75, 1)
        assert told(answer).startswith("pyqemu-ifup: ten0: not done after 1 s: ")
        link = both.netns.link("ten0")
        assert "UP" not in link["flags"] and not link.get("ifalias")
        # The server has the commit still, and makes it now: the agent takes it back then.
        wait_until_clean(both, "ten0")
        assert agent.up("ten0").status == 0
        assert agent.down("ten0").status == 0


def wait_until_clean(site: Site, tap: str) -> None:
    end = time.monotonic() + LATER
    while not site.is_clean(tap):
        assert time.monotonic() < end, site.row(tap)
        time.sleep(0.02)


def test_256_at_once(site: Site, tmp_path: Path) -> None:
    names = [f"lan{number}" for number in range(256)]
    with site.start() as agent, ExitStack() as taps:
        with site.netns.enter():
            for name in names:
                taps.enter_context(Tap(name))
        with ThreadPoolExecutor(len(names)) as pool:
            ups = list(pool.map(agent.up, names))
        assert {answer.status for answer in ups} == {0}
        links = site.netns.links()
        assert {links[name].get("master") for name in names} == {"br0"}
        assert all("UP" in links[name]["flags"] for name in names)
        print(json.dumps(agent.report()["requests"]))
        with ThreadPoolExecutor(len(names)) as pool:
            downs = list(pool.map(agent.down, names))
        assert {answer.status for answer in downs} == {0}


def test_many_at_once_on_open_vswitch(agent_on_both: Agent, both: Site) -> None:
    names = [f"ten{number}" for number in range(48)]
    for name in names:
        both.tap(name)
    with ThreadPoolExecutor(len(names)) as pool:
        assert {answer.status for answer in pool.map(agent_on_both.up, names)} == {0}
    assert both.ovs is not None
    tags = {row["name"]: row["tag"] for row in both.ovs.rows("Port")["Port"]}
    assert {tags.get(name) for name in names} == {100}
    print(json.dumps(agent_on_both.report()["requests"]))
    with ThreadPoolExecutor(len(names)) as pool:
        assert {answer.status for answer in pool.map(agent_on_both.down, names)} == {0}


FEW, MANY = 32, 128
GROWTH = 1.4
"""How many times the work for one of FEW that for one of MANY may be; of the square it is more."""
GOES = 3
"""How often it may be more, for what the machine does else is felt in the processor's caches."""


def test_the_work_for_one_grows_with_one_on_open_vswitch(agent_on_both: Agent, both: Site) -> None:
    both.write_policy(timeout=120)
    wait_for_timeout(agent_on_both, 120)
    # NOTE: the first one of all has the agent load what it needs.
    ups_and_downs(agent_on_both, both, 1)
    found = []
    for _ in range(GOES):
        few = [ups_and_downs(agent_on_both, both, FEW) for _ in range(3)]
        many = ups_and_downs(agent_on_both, both, MANY)
        found.append(
            [many[at] / MANY / (sum(each[at] for each in few) / len(few) / FEW) for at in (0, 1)]
        )
        if max(found[-1]) < GROWTH:
            return
    raise AssertionError(found)


def ups_and_downs(agent: Agent, site: Site, number: int) -> tuple[float, float]:
    """Return the agent's processor seconds for so many ups at once, and for as many downs."""
    names = [f"ten{at}" for at in range(number)]
    with ExitStack() as taps, ThreadPoolExecutor(number) as pool:
        with site.netns.enter():
            for name in names:
                taps.enter_context(Tap(name))
        times = [processor_seconds(agent)]
        for ask in (agent.up, agent.down):
            assert {answer.status for answer in pool.map(ask, names)} == {0}
            times.append(processor_seconds(agent))
    return times[1] - times[0], times[2] - times[1]


SLOW = """
import time
from pyqemu_ifup.host import Host

real = Host.run

async def run(self, step):
    if type(step).__name__ in ("JoinBridge", "AddPort"):
        time.sleep(0.3)
    return await real(self, step)

Host.run = run
"""
"""An agent that does nothing else for so long with each tap."""


@pytest.mark.parametrize(("on", "timeout"), [("lan", 1), ("ten", 3)])
def test_who_waits_for_its_turn_is_told_so(
    request: pytest.FixtureRequest, tmp_path: Path, on: str, timeout: int
) -> None:
    """On Open vSwitch a tap comes several times to its turn."""
    site: Site = request.getfixturevalue("site" if on == "lan" else "both")
    names = [f"{on}{number}" for number in range(24)]
    site.write_policy(timeout=timeout)
    with site.start(before=SLOW) as agent:
        began = time.monotonic()
        with hooks_at_once(agent, site, tmp_path, names) as ups:
            said = [up.communicate(timeout=60)[1] for up in ups]
        # NOTE: longer than one of them may take, with what a hook waits beyond that.
        assert time.monotonic() > began + timeout + thin.MARGIN
        assert set(said) == {""} and {up.returncode for up in ups} == {0}, said
        assert agent.report()["requests"]["up"]["count"] == len(names)


def test_the_time_of_the_policy_is_heeded_by_agent_and_hook(
    agent_on_both: Agent, both: Site, tmp_path: Path
) -> None:
    """More of it than a policy gives that says nothing of it."""
    agent, ovs = agent_on_both, both.ovs
    assert ovs is not None
    both.write_policy(timeout=120)
    wait_for_timeout(agent, 120)
    ovs.vswitchd.stop()
    try:
        with hooks_at_once(agent, both, tmp_path, ["ten0", "ten1", "ten2"]) as ups:
            time.sleep(DEFAULT_TIMEOUT + thin.MARGIN + 0.5)
            ended = [up.poll() for up in ups]
            ovs.vswitchd.cont()
            said = [up.communicate(timeout=60)[1] for up in ups]
    finally:
        ovs.vswitchd.cont()
    assert set(ended) == {None} and set(said) == {""} and {up.returncode for up in ups} == {0}, said


@contextmanager
def hooks_at_once(
    agent: Agent, site: Site, folder: Path, names: list[str]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Open these taps, and run the hook on all of them; each ends before the block does."""
    hooks = Hooks(folder / "hooks", agent=agent.path)
    with ExitStack() as stack:
        with site.netns.enter():
            for name in names:
                stack.enter_context(Tap(name))
            ups = [
                stack.enter_context(subprocess.Popen(
                    [hooks.ifup, name], env=hooks.environ(), stderr=subprocess.PIPE, text=True
                ))
                for name in names
            ]  # fmt: skip
        yield ups


# What happens meanwhile


def test_server_that_restarts_meanwhile(agent_on_both: Agent, both: Site) -> None:
    agent, ovs = agent_on_both, both.ovs
    assert ovs is not None
    both.tap("ten0")
    with held(agent, "ten0", "AddPort") as reached, asking(agent, "up", "ten0", "", "") as client:
        reached()
        ovs.server.kill()
        (agent.folder / "before-ten0-AddPort").unlink()
        ovs.start_server()
        wait_for_status(client, 0)
    assert both.is_attached("ten0")
    assert agent.down("ten0").status == 0


def test_vswitchd_that_restarts_meanwhile(agent_on_both: Agent, both: Site) -> None:
    agent, ovs = agent_on_both, both.ovs
    assert ovs is not None
    both.tap("ten0")
    with held(agent, "ten0", "AddPort") as reached, asking(agent, "up", "ten0", "", "") as client:
        reached()
        ovs.vswitchd.kill()
        (agent.folder / "before-ten0-AddPort").unlink()
        ovs.vswitchd.start()
        wait_for_status(client, 0)
    assert both.is_attached("ten0")
    assert ovs.row("Interface", "ten0")["link_state"] == "up"
    assert agent.down("ten0").status == 0


@pytest.mark.parametrize(
    ("moment", "words", "status", "text"),
    [
        ("before", "add-port br-int ten0 tag=7", 77, "a port of this name that is not ours"),
        ("after", "del-port ten0", 71, "what was read back differs: "),
        ("before", "del-br other", 69, "there is no bridge other: it has been deleted meanwhile"),
    ],
)
def test_database_that_others_change_meanwhile(
    agent_on_both: Agent, both: Site, moment: str, words: str, status: int, text: str
) -> None:
    agent, ovs = agent_on_both, both.ovs
    assert ovs is not None
    ovs.add_bridge("other")
    both.write_policy(
        networks={"x": {"bridge": "other" if "other" in words else "br-int", "ovsdb": ovs.db}},
        rules=[{"tap": "ten0", "network": "x"}],
    )
    os.kill(agent.pid, 1)
    both.tap("ten0")
    with (
        held(agent, "ten0", "AddPort", moment) as reached,
        asking(agent, "up", "ten0", "", "") as client,
    ):
        reached()
        ovs.vsctl("--no-wait", *words.split())
        (agent.folder / f"{moment}-ten0-AddPort").unlink()
        answer = client.answer()
    assert answer.status == status
    assert text in told(answer)
    row = both.row("ten0")
    assert (row is not None and row["tag"] == 7) == ("add-port" in words)
    link = both.netns.link("ten0")
    assert "UP" not in link["flags"] and not link.get("ifalias")
    ovs.vsctl("--if-exists", "del-port", "ten0", "--", "--if-exists", "del-br", "other")


@pytest.mark.parametrize("step", UP["lan0"])
def test_tap_or_bridge_that_goes_meanwhile(agent: Agent, site: Site, step: str) -> None:
    guest = site.tap("lan0")
    with held(agent, "lan0", step) as reached, asking(agent, "up", "lan0", "", "") as client:
        reached()
        guest.close()
        (agent.folder / f"before-lan0-{step}").unlink()
        assert client.answer().status == 71
    assert "lan0" not in site.netns.links()
    # Another tap of this name is another tap.
    guest = site.tap("lan0")
    with held(agent, "lan0", step) as reached, asking(agent, "up", "lan0", "", "") as client:
        reached()
        guest.close()
        guest = site.tap("lan0")
        before = site.netns.link("lan0")
        (agent.folder / f"before-lan0-{step}").unlink()
        assert client.answer().status == 71
    assert site.netns.link("lan0") == before
    assert agent.up("lan0").status == 0
    assert agent.down("lan0").status == 0


# A client that goes


@pytest.mark.parametrize(("tap", "step", "moment"), STEPS, ids=map("-".join, STEPS))
def test_client_that_stops_or_goes(
    agent_on_both: Agent, both: Site, tap: str, step: str, moment: str
) -> None:
    agent = agent_on_both
    both.tap(tap)
    with held(agent, tap, step, moment) as reached, asking(agent, "up", tap, "", "") as client:
        reached()
        client.stop()
        answer = client.answer()
    assert answer.status == 75
    assert told(answer) == (
        f"pyqemu-ifup: {tap}: stopped: the client has hung up; nothing is left of it"
    )
    assert both.is_clean(tap)
    with held(agent, tap, step, moment) as reached:
        with asking(agent, "up", tap, "", ""):
            reached()
        # It waits for what the one before it leaves.
        assert agent.down(tap).status == 0
    assert both.is_clean(tap)
    assert agent.up(tap).status == 0
    assert both.is_attached(tap)
    assert agent.down(tap).status == 0


def test_client_that_goes_at_once(agent: Agent, site: Site) -> None:
    site.tap("lan0")
    for _ in range(20):
        with asking(agent, "up", "lan0", "", ""):
            continue
    assert agent.down("lan0").status == 0
    assert site.is_clean("lan0")
    assert agent.report()["connections"] == 1


def test_client_that_sends_once_more(agent: Agent, site: Site) -> None:
    site.tap("lan0")
    with held(agent, "lan0", "SetMtu") as reached, asking(agent, "up", "lan0", "", "") as client:
        reached()
        client.ask("up", "lan0", "", "", namespace=site.netns)
        assert client.answer().status == 75
    assert site.is_clean("lan0")


def test_client_that_does_not_read(agent: Agent, site: Site) -> None:
    """What it is told fills its socket: then it counts as gone."""
    site.tap("lan0")
    (agent.folder / "before-lan0-SetMtu-flood").touch()
    with asking(agent, "up", "lan0", "", "debug"):
        assert agent.down("lan0").status == 0
        assert site.is_clean("lan0")
        assert "the client has hung up" in agent.report()["last_error"]
    (agent.folder / "before-lan0-SetMtu-flood").unlink()
    assert agent.up("lan0").status == 0
    assert agent.down("lan0").status == 0


# Another network namespace


@pytest.mark.parametrize("passed", [True, False], ids=["with the tap's descriptor", "without"])
def test_another_namespace(agent: Agent, passed: bool) -> None:
    with Namespace() as other:
        guest = other.tap("lan0")
        descriptors = [guest.fd] if passed else None
        with agent.connect() as client:
            client.ask("up", "lan0", "", "", descriptors=descriptors, namespace=other)
            answer = client.answer()
        assert (answer.status, answer.elsewhere) == (None, "another network namespace")
        assert answer.lines == [] and answer.seconds is None
        assert "UP" not in other.link("lan0")["flags"]


# An agent that ends


def test_sigterm_finishes_what_has_begun(site: Site) -> None:
    site.tap("lan0")
    site.tap("lan1")
    with site.start() as agent:
        with held(agent, "lan0", "SetMtu") as reached, asking(agent, "up", "lan0", "", "") as up:
            reached()
            with agent.connect() as waits, asking(agent, "down", "lan0", "") as queued:
                assert queued.packet()[0] == b"!10"
                os.kill(agent.pid, 15)
                agent.wait_told("STOPPING=1")
                waits.ask("up", "lan1", "", "", namespace=site.netns)
                assert waits.answer().elsewhere == "the agent ends"
                (agent.folder / "before-lan0-SetMtu").unlink()
                wait_for_status(up, 0)
                wait_for_status(queued, 0)
        assert agent.wait() == 0
        assert not Path(agent.path).exists()
        assert site.is_clean("lan0") and site.is_clean("lan1")
        with pytest.raises(FileNotFoundError):
            agent.connect()


def test_sigterm_hangs_up_on_who_asks_for_nothing(site: Site) -> None:
    with site.start() as agent, agent.connect() as client:
        agent.report()
        assert agent.stop() == 0
        assert client.answer().status is None


def test_socket_of_an_agent_that_was_killed(site: Site) -> None:
    site.tap("lan0")
    with site.start() as agent:
        agent.kill()
        assert Path(agent.path).is_socket()
        agent.start()
        assert agent.up("lan0").status == 0
        assert agent.down("lan0").status == 0


@pytest.mark.parametrize("has_syslog", [False, True])
def test_it_speaks_in_the_foreground_where_there_is_no_syslog(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], has_syslog: bool
) -> None:
    """As in a container: what it listens at, its policy, what it did, and what went wrong."""
    tap = site.tap("lan0")
    where = f"import pyqemu_ifup.hook; pyqemu_ifup.hook.LOG_SOCKET = '{tmp_path}/log'"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        if has_syslog:
            reader.bind(f"{tmp_path}/log")
        with site.start(before=where) as agent:
            path = agent.path
            assert [agent.up(name).status for name in ("lan0", "other0")] == [0, 77]
            assert agent.down("lan0").status == 0
            assert agent.stop() == 0
    tap.close()
    said = capsys.readouterr().err.splitlines()
    if has_syslog:
        assert said == []
        return
    assert f"pyqemu-ifd: listening at {path}" in said
    assert "pyqemu-ifd: policy: 1 networks, 1 rules in force" in said
    assert any(line.startswith("pyqemu-ifd: lan0: attached to br0, ") for line in said)
    assert any(line.startswith("pyqemu-ifd: other0: denied: ") for line in said)
    assert len(said) == len(set(said))


FULL = """
import os
reading, writing = os.pipe()
os.set_blocking(writing, False)
try:
    while True:
        os.write(writing, bytes(4096))
except BlockingIOError:
    os.set_blocking(writing, True)
os.dup2(writing, 2)
from pyqemu_ifup import hook
hook.LOG_SOCKET = "/nowhere/log"
def say(line, patience=hook.PATIENCE, real=hook.say):
    if patience:
        os._exit(99)
    real(line, patience)
hook.say = say
"""
"""Without syslog, and with a standard error that nobody reads; it ends if it waits for that."""


def test_who_reads_nothing_of_it_delays_nothing(site: Site) -> None:
    tap = site.tap("lan0")
    with site.start(before=FULL) as agent:
        assert agent.up("lan0").status == 0
        assert agent.down("lan0").status == 0
        assert agent.stop() == 0
    tap.close()


def test_second_agent(agent: Agent, site: Site) -> None:
    done = site.netns.run(agent.argv(), check=False)
    assert done.returncode == 75
    assert done.stderr == (f"pyqemu-ifd: an agent listens at {agent.path} already; stop it first\n")
    assert agent.report()["connections"] == 1


@pytest.mark.parametrize("what", ["file", "folder"])
def test_something_else_in_the_socket_s_place(site: Site, what: str) -> None:
    agent = site.start()
    try:
        if what == "file":
            Path(agent.path).write_text("mine")
        else:
            Path(agent.path).mkdir()
        done = site.netns.run(agent.argv(), check=False)
        assert done.returncode == 71
        assert done.stderr.startswith(f"pyqemu-ifd: cannot listen at {agent.path}: ")
        assert Path(agent.path).exists()
    finally:
        agent.close()


def test_anyone_may_connect_to_the_users_agent(site: Site) -> None:
    with site.start(users=True) as agent:
        assert os.stat(agent.path).st_mode & 0o777 == 0o666
        os.seteuid(STRANGER)
        try:
            report = agent.report()
        finally:
            os.seteuid(0)
        assert report["last_error"] is None


HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", WATCHDOG_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_under_a_supervisor(site: Site) -> None:
    site.tap("lan0")
    agent = site.start()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(agent.path)
        listener.listen(16)
        # Who connects before it runs is served.
        with asking(agent, "up", "lan0", "", "") as early:
            agent.wrapper = [sys.executable, "-I", "-c", HAND_OVER, str(listener.fileno())]
            agent.start(env={"WATCHDOG_USEC": "200000"}, pass_fds=[listener.fileno()])
            wait_for_status(early, 0)
        assert agent.told[0] == "READY=1"
        agent.wait_told("WATCHDOG=1")
        agent.told.clear()
        agent.wait_told("WATCHDOG=1")
        agent.down("lan0")
        agent.told.clear()
        os.kill(agent.pid, 15)
        agent.wait_told("STOPPING=1")
        assert agent.wait() == 0
        # The socket is the supervisor's, and goes on to listen.
        assert Path(agent.path).is_socket()
        with asking(agent, "up", "lan0", "", "") as early:
            agent.start(env={"WATCHDOG_USEC": "0"}, pass_fds=[listener.fileno()])
            wait_for_status(early, 0)
        agent.down("lan0")
        assert agent.stop() == 0
        assert "WATCHDOG=1" not in agent.told
    finally:
        listener.close()
        agent.close()


def test_supervisor_that_hands_over_something_else(site: Site) -> None:
    agent = site.start()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            agent.wrapper = [sys.executable, "-I", "-c", HAND_OVER, str(stream.fileno())]
            process = site.netns.popen(agent.argv(), pass_fds=[stream.fileno()])
            _, said = process.communicate(timeout=LATER)
        assert process.returncode == 71
        assert said.startswith("pyqemu-ifd: cannot serve on what the supervisor hands over: ")
    finally:
        agent.close()


def test_arguments(site: Site) -> None:
    agent = site.start()
    try:
        done = site.netns.run([*agent.argv(), "--fast"], check=False)
        assert done.returncode == 64
        assert done.stderr.startswith("pyqemu-ifd: unrecognized arguments: --fast; see ")
    finally:
        agent.close()


# A crash


@pytest.mark.parametrize("verb", ["up", "down"])
@pytest.mark.parametrize("tap", ["lan0", "ten0"])
def test_crash_in_the_middle(both: Site, verb: str, tap: str) -> None:
    """At each step, before and after it: the next agent and its up and down set it right."""
    fields = ["up", tap, "", ""] if verb == "up" else ["down", tap, ""]
    with both.start() as agent:
        for step in (UP if verb == "up" else DOWN)[tap]:
            for moment in ("before", "after"):
                guest = both.tap(tap)
                wait_connected(agent)
                if verb == "down":
                    assert agent.up(tap).status == 0
                with held(agent, tap, step, moment) as reached, asking(agent, *fields) as client:
                    reached()
                    agent.kill()
                    answer = client.answer()
                    assert answer.status is None and answer.elsewhere is None
                # The tap is down, or complete.
                link = both.netns.link(tap)
                assert "UP" not in link["flags"] or both.is_attached(tap) or verb == "down"
                agent.start()
                wait_connected(agent)
                assert agent.up(tap).status == 0
                assert both.is_attached(tap)
                assert agent.down(tap).status == 0
                assert both.is_clean(tap)
                guest.close()


def test_crash_and_the_guest_s_end(both: Site) -> None:
    """What of a tap is left when both are killed, the next agent takes away as it starts."""
    with both.start() as agent:
        for step, moment in (("AddPort", "after"), ("SetUp", "before"), ("SetUp", "after")):
            guest = both.tap("ten0")
            wait_connected(agent)
            with held(agent, "ten0", step, moment) as reached, asking(agent, "up", "ten0", "", ""):
                reached()
                agent.kill()
            guest.close()
            assert both.row("ten0") is not None
            agent.start()
            wait_until_clean(both, "ten0")


def is_killed_at(agent: Agent, step: str) -> bool:
    """Kill the agent at a step on a tap that it makes; tell whether there was that step."""
    with (
        held(agent, "tap0", step) as reached,
        asking(agent, "tap", "tenants", "", "1", "", "") as client,
    ):
        try:
            reached()
        except TimeoutError:
            client.answer().close()
            return False
        agent.kill()
        answer = client.answer()
        assert answer.status is None and answer.tap is None
        return True


@pytest.mark.parametrize("step", UP["ten0"])
def test_crash_while_it_makes_a_tap(both: Site, step: str) -> None:
    with both.start() as agent:
        wait_connected(agent)
        while not is_killed_at(agent, step):
            # NOTE: one in 64 of the kernel's MACs begins as ours do, and is left as it is.
            assert step == "SetMac"
            wait_until_clean(both, "tap0")
        # The agent alone held it.
        assert "tap0" not in both.netns.links()
        agent.start()
        wait_until_clean(both, "tap0")
        wait_connected(agent)
        answer = agent.ask("tap", "tenants", "", "1", "", "")
        assert answer.status == 0 and answer.tap == "tap0"
        answer.close()
        wait_until_clean(both, "tap0")


def test_bug_in_one_request(agent: Agent, site: Site) -> None:
    site.tap("lan0")
    site.tap("lan1")
    (agent.folder / "before-lan0-SetMtu-bug").touch()
    answer = agent.up("lan0")
    assert answer.status == 70
    assert told(answer).startswith("pyqemu-ifup: lan0: internal error: LookupError: injected")
    assert site.is_clean("lan0")
    assert agent.up("lan1").status == 0
    (agent.folder / "before-lan0-SetMtu-bug").unlink()
    assert agent.up("lan0").status == 0
    report = agent.report()
    assert "injected" in report["last_error"]
    assert (report["requests"]["up"]["count"], report["requests"]["up"]["failed"]) == (3, 1)
    assert [agent.down(tap).status for tap in ("lan0", "lan1")] == [0, 0]


# The wire


def open_place() -> int:
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


NO_REQUESTS = [
    # packet, descriptors, what the agent says
    (b"x", 0, "it does not begin with pyqemu-ifup/1"),
    (b"\0", 0, "it does not begin with pyqemu-ifup/1"),
    (b"GET / HTTP/1.1\r\n\r\n", 0, "it does not begin with pyqemu-ifup/1"),
    (b"\xff" * 100, 0, "it does not begin with pyqemu-ifup/1"),
    (b"pyqemu-ifup/1", 0, "its verb is unknown"),
    (b"pyqemu-ifup/1\0", 0, "its verb is unknown"),
    (b"pyqemu-ifup/1\0UP\0lan0\0\0", 1, "its verb is unknown"),
    (b"pyqemu-ifup/1\0up", 1, "up takes 3 fields, not 0"),
    (b"pyqemu-ifup/1\0up\0lan0\0", 1, "up takes 3 fields, not 2"),
    (b"pyqemu-ifup/1\0up\0lan0\0\0\0", 1, "up takes 3 fields, not 4"),
    (b"pyqemu-ifup/1\0down\0lan0", 1, "down takes 2 fields, not 1"),
    (b"pyqemu-ifup/1\0tap\0lan", 1, "tap takes 5 fields, not 1"),
    (b"pyqemu-ifup/1\0agent\0", 0, "agent takes 0 fields, not 1"),
    (b"pyqemu-ifup/1\0agent", 1, "agent takes 0 descriptors, not 1"),
    (b"pyqemu-ifup/1\0up\0lan0\0\0", 0, "up takes 1 descriptors, not 0"),
    (b"pyqemu-ifup/1\0up\0lan0\0\0", 2, "up takes 1 descriptors, not 2 or more"),
    (b"pyqemu-ifup/1\0up\0lan0\0\0", 20, "up takes 1 descriptors, not 3 or more"),
    (b"pyqemu-ifup/1\0up\0" + b"x" * 4096 + b"\0\0", 1, "it has more than 4096 bytes"),
    (b"pyqemu-ifup/1\0up\0" + b"x" * 100000 + b"\0\0", 1, "it has more than 4096 bytes"),
]


def test_what_is_no_request(agent: Agent) -> None:
    before = count_descriptors(agent)
    for packet, count, text in NO_REQUESTS:
        places = [open_place() for _ in range(count)]
        try:
            with agent.connect() as client:
                client.send(packet, places)
                answer = client.answer()
        finally:
            for place in places:
                os.close(place)
        assert answer.status == 64, packet
        (line,) = answer.lines
        assert line == f"pyqemu-ifd: not a request: {text}; see docs/agent.md"
    wait_for_descriptors(agent, before)


@pytest.mark.parametrize("path", ["/dev/null", "/proc/self/ns/mnt", "/etc/passwd", "/dev/net/tun"])
def test_descriptor_of_something_else(agent: Agent, path: str) -> None:
    descriptor = os.open(path, os.O_RDWR if path.startswith("/dev") else os.O_RDONLY)
    try:
        answer = agent.up("lan0", descriptor=descriptor)
    finally:
        os.close(descriptor)
    assert answer.status == 64
    assert "its descriptor is neither a tap's nor a network namespace's" in told(answer)


def test_descriptor_of_a_socket(agent: Agent) -> None:
    with socket.socket() as other:
        assert agent.up("lan0", descriptor=other.fileno()).status == 64


def test_descriptor_of_a_terminal_that_has_hung_up(agent: Agent) -> None:
    """Whatever is asked of it is EIO."""
    master, slave = os.openpty()
    os.close(master)
    try:
        answer = agent.up("lan0", descriptor=slave)
    finally:
        os.close(slave)
    assert answer.status == 64 and "neither a tap's nor" in told(answer)
    assert agent.report()["connections"] == 1


def test_bug_in_what_takes_a_request(site: Site) -> None:
    bug = "import pyqemu_ifd.wire as wire; wire.place_of = lambda *_, **__: {}[0]"
    with site.start(before=HELD + bug) as agent:
        answer = agent.up("lan0")
        assert answer.status == 70 and "internal error: KeyError" in told(answer)
        report = agent.report()
        assert "KeyError" in report["last_error"] and report["connections"] == 1


def test_long_line_is_cut(agent: Agent) -> None:
    answer = agent.up("x" * 3000)
    assert answer.status == 64
    (line,) = answer.lines
    assert len(line) == 2000


@pytest.mark.parametrize(
    "packet",
    [b"pyqemu-ifup/2", b"pyqemu-ifup/2\0up\0x", b"pyqemu-ifup/"],
    ids=["nothing more", "an up", "no number"],
)
def test_another_version(agent: Agent, packet: bytes) -> None:
    with agent.connect() as client:
        client.send(packet)
        assert client.answer().elsewhere == "another version of the wire"


def test_empty_request(agent: Agent) -> None:
    with agent.connect() as client:
        client.send(b"")
        answer = client.answer()
    assert (answer.status, answer.elsewhere, answer.lines) == (None, None, [])


def test_who_says_nothing_is_hung_up_on(site: Site) -> None:
    quick = "import pyqemu_ifd.server as server; server.SILENCE = 0.2"
    with site.start(before=HELD + quick) as agent, ExitStack() as stack:
        site.tap("lan0")
        with held(agent, "lan0", "SetMtu") as reached:
            busy = stack.enter_context(asking(agent, "up", "lan0", "", ""))
            reached()
            silent = [stack.enter_context(agent.connect()) for _ in range(10)]
            assert [client.answer().status for client in silent] == [None] * 10
        # Who has asked may wait as long as it takes.
        wait_for_status(busy, 0)
        agent.down("lan0")


@settings(deadline=None)
@given(st.binary(max_size=5000), st.integers(0, 3))
def test_any_bytes_are_a_request_or_not(data: bytes, descriptors: int) -> None:
    check_parse(data, descriptors)


FIELD = st.sampled_from([b"pyqemu-ifup/1", b"up", b"down", b"tap", b"agent", b"lan0", b"", b"1"])


@settings(deadline=None)
@given(st.lists(FIELD | st.binary(max_size=8), max_size=8), st.integers(0, 2))
def test_any_fields_are_a_request_or_not(fields: list[bytes], descriptors: int) -> None:
    check_parse(b"\0".join([b"pyqemu-ifup/1", *fields]), descriptors)


def check_parse(data: bytes, descriptors: int) -> None:
    try:
        request = wire.parse_request(data, descriptors)
    except Failure as failure:
        assert failure.status is Status.USAGE
    except wire.Elsewhere:
        assert data.startswith(b"pyqemu-ifup/")
    else:
        fields = [b"pyqemu-ifup/1", request.verb.encode(), *map(os.fsencode, request.fields)]
        assert b"\0".join(fields) == data
        assert descriptors == (request.verb != "agent")


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.one_of(
        st.binary(max_size=5000),
        st.lists(FIELD | st.binary(max_size=8), max_size=8).map(
            lambda fields: b"\0".join([b"pyqemu-ifup/1", *fields])
        ),
    ),
    st.integers(0, 3),
)
def test_any_packet_is_answered(agent: Agent, packet: bytes, count: int) -> None:
    """By the verbs' own rules, refused, or closed; and the agent serves on."""
    places = [open_place() for _ in range(count)]
    try:
        with agent.connect() as client:
            client.send(packet, places)
            answer = client.answer()
            answer.close()
    finally:
        for place in places:
            os.close(place)
    assert answer.status in (None, *map(int, Status)) and answer.status != 70, answer
    assert all(line.isprintable() for line in answer.lines)
    assert agent.report()["connections"] == 1


# Limits


def count_descriptors(agent: Agent) -> int:
    """Return how many descriptors the agent has open when it has nothing to do."""
    while Path(f"/proc/{agent.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.001)
    return len(os.listdir(f"/proc/{agent.pid}/fd"))


def wait_for_descriptors(agent: Agent, number: int) -> None:
    """Wait until the agent has so many open: it answers before it closes them."""
    end = time.monotonic() + LATER
    while (found := count_descriptors(agent)) != number:
        assert time.monotonic() < end, f"{found} descriptors, not {number}"
        time.sleep(0.01)


def resident(agent: Agent) -> int:
    """Return the agent's memory in MB."""
    status = Path(f"/proc/{agent.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) // 1024


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process open 12,000 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(12000, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ten_thousand_connections(site: Site, many_files: None) -> None:
    site.tap("lan0")
    with site.start(limits=["--nofile=4096"]) as agent:
        before = count_descriptors(agent)
        memory = resident(agent)
        with ExitStack() as stack:
            clients = [stack.enter_context(agent.connect()) for _ in range(10_000)]
            # The first ones, which have asked for nothing, have been hung up on for others.
            assert clients[0].answer().status is None
            assert count_descriptors(agent) <= before + 1024
            assert resident(agent) < memory + 50
            for client in clients[:100]:
                client.close()
            end = time.monotonic() + LATER
            while (answer := try_up(agent)) is None:
                assert time.monotonic() < end
            assert answer == 0
        assert agent.down("lan0").status == 0
        assert agent.report()["refused"] >= 10_000 - 1024
        wait_for_descriptors(agent, before)


def try_up(agent: Agent) -> int | None:
    """Return the status of an up, None where the agent does not take the connection."""
    try:
        return agent.up("lan0").status
    except BrokenPipeError:
        return None


def test_too_few_descriptors_for_so_many_connections(site: Site) -> None:
    """It serves on when it has them again, and uses no processor meanwhile."""
    site.tap("lan0")
    quick = "import pyqemu_ifd.server as server; server.SILENCE = 1.0"
    with site.start(limits=["--nofile=40"], before=HELD + quick) as agent:
        with ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(agent.connect())
            with agent.connect() as waits:
                waits.ask("agent")
                answer = waits.answer()
                assert answer.status == 0
        assert agent.up("lan0").status == 0
        assert agent.down("lan0").status == 0
        assert processor_seconds(agent) < 3


def processor_seconds(agent: Agent) -> float:
    fields = Path(f"/proc/{agent.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def of_users(site: Site) -> Iterator[Agent]:
    """The users' agent on `site`."""
    with site.start(users=True) as agent:
        yield agent


def test_connections_of_one_user(of_users: Agent) -> None:
    agent = of_users
    with ExitStack() as stack:
        os.seteuid(STRANGER)
        try:
            clients = [stack.enter_context(agent.connect()) for _ in range(65)]
        finally:
            os.seteuid(0)
        assert clients[64].answer().status is None
        # Another user, and root, are served; and the others of this one.
        assert agent.report()["refused"] == 1
        for client in clients[:64]:
            client.ask("agent")
            assert client.answer().status == 0
    assert agent.report()["connections"] == 1


@contextmanager
def stranger() -> Iterator[None]:
    """Be another user than root, who is the agent."""
    os.seteuid(STRANGER)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def lingering() -> Iterator[int]:
    """Yield a descriptor whose last close(2) waits, as long as the block lasts; closes it."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        sender = socket.create_connection(listener.getsockname())
        receiver, _ = listener.accept()
        with receiver:
            sender.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    sender.send(bytes(65536))
            sender.setblocking(True)
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
            yield sender.detach()


@pytest.mark.parametrize(
    ("way", "status"),
    [
        ("request", 64),
        ("no request", 64),
        ("three", 64),
        ("after its request", 77),
        ("too many connections", None),
    ],
)
def test_descriptor_whose_close_waits_keeps_nobody_else_waiting(
    of_users: Agent, site: Site, way: str, status: int | None
) -> None:
    """It is told from others, and closed, without a wait of the agent's own thread."""
    agent = of_users
    request = b"\0".join([wire.VERSION, b"up", b"lan0", b"", b""])
    before = count_descriptors(agent)
    with ExitStack() as stack:
        with stranger():
            clients = [stack.enter_context(agent.connect()) for _ in range(64)]
        os.kill(agent.pid, signal.SIGSTOP)
        with stranger():
            client = clients[0]
            if way == "too many connections":
                client = stack.enter_context(agent.connect())
        with site.netns.enter():
            descriptor = stack.enter_context(lingering())
            if way == "after its request":
                client.ask("up", "lan0", "", "")
        count = 3 if way == "three" else 1
        client.send(b"x" if way == "no request" else request, [descriptor] * count)
        # NOTE: now the agent's is the last one, whose close waits.
        os.close(descriptor)
        client.socket.settimeout(1)
        began = time.monotonic()
        os.kill(agent.pid, signal.SIGCONT)
        assert agent.report()["version"] == 1
        assert client.answer().status == status
        for _ in range(3):
            agent.report()
        assert time.monotonic() - began < 5
    wait_for_descriptors(agent, before)


def test_no_descriptor_is_lost(both: Site) -> None:
    with both.start() as agent:
        wait_connected(agent)
        before = count_descriptors(agent)
        for tap in ("lan0", "ten0"):
            guest = both.tap(tap)
            for _ in range(5):
                assert agent.up(tap, descriptor=guest.fd).status == 0
                assert agent.up(tap, "nowhere", descriptor=guest.fd).status == 77
                assert agent.down(tap, descriptor=guest.fd).status == 0
            guest.close()
        for _ in range(5):
            answer = agent.ask("tap", "lan", "", "3", "vnet_hdr", "")
            assert answer.status == 0 and len(answer.descriptors) == 3
            answer.close()
            assert agent.ask("tap", "nowhere", "", "1", "", "").status == 77
            assert agent.ask("tap", "lan", "", "65", "", "").status == 64
        wait_until_clean(both, "tap0")
        wait_for_descriptors(agent, before)
        assert len(os.listdir("/proc/self/fd")) < 100


def test_memory_with_a_thousand_taps(tmp_path: Path) -> None:
    with Namespace() as netns:
        site = Site(netns, tmp_path / "policy.yaml")
        site.build()
        names = [f"lan{number}" for number in range(1000)]
        with netns.enter():
            for name in names:
                Tap(name, persist=True).close()
        with site.start() as agent:
            with ThreadPoolExecutor(8) as pool:
                assert {answer.status for answer in pool.map(agent.up, names)} == {0}
            memory = resident(agent)
            print(f"{memory} MB", json.dumps(agent.report()["requests"]))
            assert memory < 120
            links = netns.links()
            assert sum(links[name].get("master") == "br0" for name in names) == 1000


def test_answers_of_a_policy_with_5000_rules(site: Site) -> None:
    """It looks at few of them: see test_of_many_rules_few_are_looked_at for which."""
    rules = [{"tap": f"x{number}-*", "network": "lan"} for number in range(4999)]
    site.write_policy(rules=[*rules, {"tap": "lan*", "network": "lan"}])
    site.tap("lan0")
    with site.start() as agent:
        assert agent.up("lan0").status == 0
        assert agent.down("lan0").status == 0


BRIEF = """
from contextlib import asynccontextmanager
from pyqemu_ifup.made import lock, network
real = lock.hold
@asynccontextmanager
async def hold(host, name):
    async with real(host, name) as folder:
        with open({log!r}, "a") as file:
            print(host.tap, host.deadline.remaining() <= lock.HOLD, file=file)
        yield folder
network.hold = hold
"""
"""Notes for whose tap a network's lock was had, and whether for a while only."""


def as_nobody(work: Callable[[], object]) -> None:
    """Run `work` in a process of the user nobody's whose parent is nobody's too."""

    def become() -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        assert wait(fork(work)) == 0

    assert wait(fork(become)) == 0


def test_a_user_has_a_network_s_lock_for_a_while_and_root_as_long_as_it_takes(
    netns: Namespace, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    nat = {"ipv4": "192.168.79.1/24", "dhcp": False, "dns": False, "outbound": False}
    networks = {"lab": {"bridge": "labbr0", "nat": nat, "users": ["nobody"]}}
    policy.write_text(
        json.dumps(
            {
                "version": 1,
                "timeout": 60,
                "networks": networks,
                "rules": [{"tap": "*", "network": "lab"}],
            }
        )
    )
    logs = [tmp_path / "root", tmp_path / "users"]

    def up_and_down(agent: Agent, tap: Tap) -> None:
        for verb in (agent.up, agent.down):
            answer = verb(tap.name, descriptor=tap.fd)
            assert answer.status == 0, answer

    def ask_for_tap() -> None:
        place = os.open("/proc/self/ns/net", os.O_RDONLY)
        answer = users.ask("tap", "lab", "", "1", "", "", descriptors=[place])
        os.close(place)
        assert answer.status == 0, answer
        answer.close()

    with (
        netns.enter(),
        Agent(netns, policy, before=BRIEF.format(log=str(logs[0]))) as root,
        Agent(netns, policy, before=BRIEF.format(log=str(logs[1])), users=True) as users,
    ):
        theirs, ours = netns.tap("user0"), netns.tap("root0")
        theirs.set_owner(NOBODY)
        up_and_down(root, ours)
        as_nobody(partial(up_and_down, users, theirs))
        as_nobody(ask_for_tap)
        until_gone(netns, "labbr0")
    had = [[line.split() for line in log.read_text().splitlines()] for log in logs]
    assert had[1] == [["user0", "True"], ["user0", "True"], ["tap0", "True"]]
    # NOTE: root's agent also takes away what users leave.
    assert [brief for tap, brief in had[0] if tap == "root0"] == ["False", "False"]


def until_gone(netns: Namespace, link: str) -> None:
    """Wait until the agent has taken a link away."""
    end = time.monotonic() + LATER
    while link in netns.links():
        assert time.monotonic() < end
        time.sleep(0.01)
