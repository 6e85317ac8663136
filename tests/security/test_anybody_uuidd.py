"""Anybody holds up who makes UUIDs of the time: neither a hook, nor the agent, nor a verb waits.

libuuid asks uuidd for those, at a socket that everybody may open and say nothing at; without
uuidd it waits for whoever holds the lock of its clock file (uuidd(8), libuuid's gen_uuid.c).
"""

from __future__ import annotations

import fcntl
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import python

MUTE = """\
mount -t tmpfs none /run && mkdir /run/uuidd && ln -s {uuidd} /run/uuidd/request &&
mount -t tmpfs none /var/lib && mkdir /var/lib/libuuid &&
ln -s {clock} /var/lib/libuuid/clock.txt && exec "$@"
"""
MAKES_ONE = "import uuid; uuid._generate_time_safe()"
ENDS = 40.0
"""Seconds in which a program has ended that waits for nobody, on a host that is busy too."""


@pytest.fixture(params=["uuidd is mute", "the clock is locked"])
def mute(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    """What runs a command where time-based UUIDs cannot be had."""
    uuidd, clock = tmp_path / "uuidd", tmp_path / "clock"
    with socket.socket(socket.AF_UNIX) as listener, clock.open("w") as file:
        if request.param == "uuidd is mute":
            listener.bind(str(uuidd))
            listener.listen()
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield ["unshare", "-m", "sh", "-c", MUTE.format(uuidd=uuidd, clock=clock), "sh"]


@pytest.fixture
def hooks(inside: Namespace, ovs_netdev: OpenVSwitch, tmp_path: Path) -> Hooks:
    """Hooks with a policy for a Linux bridge, and for one of Open vSwitch."""
    inside.add_bridge("br0", mac="02:00:00:00:00:01")
    ovs_netdev.add_bridge("br-int", hwaddr="02:00:00:00:00:02")
    hooks = Hooks(tmp_path / "hooks")
    tenants = {"bridge": "br-int", "ovsdb": ovs_netdev.db}
    hooks.write_policy(
        json.dumps(
            {
                "version": 1,
                "networks": {"lan": {"bridge": "br0"}, "tenants": tenants},
                "rules": [{"tap": "lan*", "network": "lan"}, {"tap": "ten*", "network": "tenants"}],
            }
        )
    )
    return hooks


def test_nothing_waits_for_a_uuid_of_the_time(
    inside: Namespace, hooks: Hooks, mute: list[str]
) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        inside.run([*mute, python(), "-I", "-c", MAKES_ONE], timeout=0.5)
    taps = [inside.tap("lan0"), inside.tap("ten0")]

    def run(program: str, *arguments: str) -> str:
        argv = [*mute, *hooks.argv(program, *arguments)]
        done = inside.run(argv, env=hooks.environ(), timeout=ENDS)
        assert done.stderr == "", done
        return done.stdout

    for tap in taps:
        run("pyqemu-ifup", tap.name)
    told = json.loads(run("pyqemu-ifctl", "status", "--json"))
    assert {each["tap"]: each["state"] for each in told["taps"]} == {"lan0": "ok", "ten0": "ok"}
    run("pyqemu-ifdown", "ten0")
    run("pyqemu-ifctl", "gc")
    agent = Agent(inside, hooks.policy)
    agent.wrapper = mute
    with agent:
        assert agent.up("ten0").status == 0
        assert all(agent.down(tap.name).status == 0 for tap in taps)
