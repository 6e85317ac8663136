"""What a guest on a persistent tap leaves behind is nobody's, and gc takes it away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.plug import port_of, unplug
from lab.race import Guest, wait
from lab.taps import Tap
from pyqemu_ifconf.policy import Vlan
from pyqemu_ifup.system import holders

KINDS = ["linux", "openvswitch"]


@pytest.fixture
def hooks(netns: Namespace, ovs: OpenVSwitch, tmp_path: Path) -> Iterator[Hooks]:
    """Programs on a host with br0 and br-int."""
    ovs.add_bridge("br-int", mtu=1500)
    netns.add_bridge("br0")
    made = Hooks(tmp_path / "hooks", netns=netns.name)
    made.write_policy(
        f"version: 1\nnetworks: {{sw: {{bridge: br-int, ovsdb: '{ovs.db}'}}}}\n"
        'rules: [{tap: "*", network: sw}]\n'
    )
    yield made
    ovs.vsctl("del-br", "br-int")
    netns.ip("link", "del", "br0")


@pytest.fixture
def decoy() -> Iterator[ExitStack]:
    """What is made beside it, and taken away at the end."""
    with ExitStack() as stack:
        yield stack


def guest_on(netns: Namespace, ovs: OpenVSwitch, kind: str) -> Guest:
    if kind == "linux":
        port = port_of("web0", "br0")
    else:
        port = port_of("web0", "br-int", vlan=Vlan(10), kind="openvswitch", ovsdb=ovs.db)
    return Guest(netns, port, persist=True)


def kill(guest: Guest) -> None:
    os.kill(guest.pid, signal.SIGKILL)
    wait(guest.pid)
    os.close(guest.life)


@pytest.mark.parametrize("kind", KINDS)
def test_persistent_tap_of_nobody_is_taken_from_its_bridge(
    netns: Namespace, ovs: OpenVSwitch, hooks: Hooks, kind: str, decoy: ExitStack
) -> None:
    """And whoever holds a tap of this name in another network namespace does not hold this one."""
    guest = guest_on(netns, ovs, kind)
    assert all(each["tap"] != "web0" for each in hooks.ctl_json("gc")["removed"])
    kill(guest)
    elsewhere = decoy.enter_context(Namespace())
    elsewhere.tap("web0")
    bridge = guest.port.place.name
    because = f"its process {guest.pid} has ended, and nobody holds it"
    dry = hooks.ctl("gc", "--dry-run")
    assert (dry.returncode, dry.stdout) == (0, f"would remove web0 from {bridge}: {because}\n")
    assert "UP" in netns.link("web0")["flags"]
    answer = hooks.ctl_json("gc")
    assert answer["removed"] == [{"tap": "web0", "bridge": bridge, "because": because}]
    link = netns.link("web0")
    assert "UP" not in link["flags"] and "master" not in link and not link.get("ifalias")
    assert ovs.find("Port", "web0") is None
    assert hooks.ctl("gc").stdout == "nothing to remove\n"
    netns.ip("link", "del", "web0")


@pytest.mark.parametrize("kind", KINDS)
def test_tap_that_somebody_holds_stays(
    netns: Namespace, ovs: OpenVSwitch, hooks: Hooks, kind: str
) -> None:
    """Its process has ended; another has it by now, though gc cannot see which."""
    guest = guest_on(netns, ovs, kind)
    kill(guest)
    with netns.enter(), Tap("web0") as tap:
        unseen = ["unshare", "--fork", "--pid", "--mount-proc", sys.executable, "-I"]
        program = hooks.argv("pyqemu-ifctl", "gc", "--json")
        done = netns.run(
            [*unseen, *program[4:]],
            env={**hooks.environ(), "PYQEMU_IFUP_POLICY": str(hooks.policy)},
        )
        assert '"removed": []' in done.stdout
        assert "UP" in netns.link("web0")["flags"]
        unplug(netns, "web0")
        tap.set_persist(False)


def test_who_ends_while_it_is_asked_for_holds_nothing(
    netns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tap of the same name in another network namespace, whose process ends in the middle."""
    netns.ip("tuntap", "add", "web0", "mode", "tap")
    with Namespace() as elsewhere, elsewhere.tap("web0") as tap:
        other = subprocess.Popen(["sleep", "600"], pass_fds=[tap.fd])
        tap.close()
        real = holders._find_elsewhere

        def ending(*words: Any) -> Any:
            other.kill()
            other.wait()
            return real(*words)

        with netns.enter():
            assert holders.all_holders().of("web0") == ()
            monkeypatch.setattr(holders, "_find_elsewhere", ending)
            assert holders.all_holders().of("web0") == ()
    netns.ip("link", "del", "web0")
