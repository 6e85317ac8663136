"""Root puts a policy in force, or stops the agent, while guests end: what is done stays done."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.agent_site import Site, asking
from lab.collide import DOERS, HOOKS, SWITCHES, Place, points
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.plug import ALLOWED, attach_now, detach_now, port_of, reapply
from lab.race import Guest, fork, has_stopped, stop_at, wait
from pyqemu_ifconf.kinds.openvswitch import OvsPlace
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Caller, Policy, Port, Vlan
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.links import LinkEvents

SHORT = 0.06
"""Seconds in which a down that waits for nobody has ended, but on a busy machine."""


def a_policy(bridge: str) -> Policy:
    text = f"version: 1\nnetworks: {{lan: {{{bridge}}}}}\nrules: [{{tap: '*', network: lan}}]\n"
    return parse_policy([Source("policy.yaml", text.encode())])


def race(netns: Namespace, port: Port, policy: Policy, number: int) -> bool:
    """Stop an apply at one moment of its work, end the guest, and let it go on.

    Tells whether it came to that moment; the tap, which is persistent, is there then.
    """
    guest = Guest(netns, port, persist=True)

    def apply() -> None:
        os.close(guest.life)
        stop_at(number)
        reapply(netns, policy)

    pid = fork(apply)
    came = has_stopped(pid)
    down = guest.end()
    ended = wait(down, SHORT) if came else None
    if ended is not None:
        # NOTE: it closes its tap before apply goes on.
        wait(guest.pid)
    if came:
        os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 0
    if ended is None:
        ended = wait(down)
        wait(guest.pid)
    assert ended == 0
    return came


def left(netns: Namespace, ovs: OpenVSwitch, port: Port) -> list[str]:
    """Return what is left of a guest on its tap, and take it all away."""
    link = netns.links()[port.tap]
    row = ovs.find("Port", port.tap) if isinstance(port.place, OvsPlace) else None
    found = ["up"] if "UP" in link["flags"] else []
    found += ["master"] if link.get("master") else []
    found += ["mark"] if link.get("ifalias") else []
    found += ["row"] if row is not None else []
    if row is not None:
        ovs.del_port(port.tap)
    netns.ip("link", "del", port.tap)
    return found


@pytest.fixture
def bridges(netns: Namespace, ovs: OpenVSwitch) -> Iterator[OpenVSwitch]:
    """An Open vSwitch with br-int, and the Linux bridges br0 and br1."""
    ovs.add_bridge("br-int", mtu=1500)
    for name in ("br0", "br1"):
        netns.add_bridge(name)
    yield ovs
    ovs.vsctl("del-br", "br-int")
    for name in ("br0", "br1"):
        netns.ip("link", "del", name)


@pytest.mark.parametrize("kind", ["linux", "openvswitch"])
def test_apply_that_stands_still_anywhere_undoes_no_down(
    netns: Namespace, bridges: OpenVSwitch, kind: str
) -> None:
    """It stands before each of its steps in turn; then the guest ends, its down with it."""
    if kind == "linux":
        port, policy = port_of("web0", "br0"), a_policy("bridge: br1")
    else:
        port = port_of("web0", "br-int", vlan=Vlan(10), kind="openvswitch", ovsdb=bridges.db)
        policy = a_policy(f"bridge: br-int, kind: openvswitch, ovsdb: '{bridges.db}', vlan: 20")
    wrong: dict[int, list[str]] = {}
    number = 0
    while race(netns, port, policy, number):
        wrong[number] = left(netns, bridges, port)
        number += 1
    assert left(netns, bridges, port) == []
    assert number > 20
    assert {at: found for at, found in wrong.items() if found} == {}


SAMPLE = 199
"""Every so many system calls; `python -m lab.collide` does all of them."""


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("who", DOERS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_apply_agent_and_gc_stopped_at_a_system_call_leave_what_a_hook_says(
    netns: Namespace, bridges: OpenVSwitch, switch: str, who: str, hook: str
) -> None:
    """The hook runs while one of them stands still, or waits until that goes on."""
    place = Place(netns, bridges, switch)
    found = dict(points(place, who, hook, SAMPLE, first=17))
    assert len(found) > 1
    assert {at: wrong for at, wrong in found.items() if wrong} == {}


STANDS = """
import os, signal
import pyqemu_ifup.system.lock

real = pyqemu_ifup.system.lock.open_lock
folder = os.path.dirname(sys.argv[sys.argv.index("--socket") + 1])

def stand(path):
    if os.path.exists(f"{folder}/stand"):
        os.unlink(f"{folder}/stand")
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(path)

pyqemu_ifup.system.lock.open_lock = stand
"""
"""An agent that stops right before it takes the lock on a tap."""


@pytest.mark.parametrize("verb", ["up", "down"])
def test_agent_that_stood_still_leaves_alone_what_was_done_without_it(
    netns: Namespace, tmp_path: Path, verb: str
) -> None:
    """Its client has hung up, and done the work itself; after a down, the next up has come, too."""
    site = Site(netns, tmp_path / "policy.yaml", before=STANDS)
    site.build()
    tap = site.tap("lan0")
    port, caller, parent = port_of("lan0", "br0"), Caller("lan0"), os.getppid()
    fields = ("up", "lan0", "", "") if verb == "up" else ("down", "lan0", "")
    with netns.enter(), site.start() as agent:
        if verb == "down":
            attach_now(port, caller, parent, [], Deadline(ALLOWED), print)
        (agent.folder / "stand").touch()
        with asking(agent, *fields):
            agent.wait_stopped()
        if verb == "down":
            detach_now("lan0", parent, Deadline(ALLOWED), print)
        attach_now(port, caller, parent, [], Deadline(ALLOWED), print)
        events = LinkEvents()
        os.kill(agent.pid, signal.SIGCONT)
        assert agent.report()["requests"][verb]
        assert not events.drain()
        events.close()
        assert site.is_attached("lan0")
        detach_now("lan0", parent, Deadline(ALLOWED), print)
    tap.close()
    netns.ip("link", "del", "br0")
