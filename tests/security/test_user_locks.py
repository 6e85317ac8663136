"""A user who has a network's lock has it for a while only; root, who waits for it, is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from lab.needs import require
from lab.netns import Namespace
from lab.plug import port_of, unplug
from lab.public import NOBODY
from lab.race import fork, wait
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Caller, Nat, Port
from pyqemu_ifup import nat_network
from pyqemu_ifup.attach import attach, attaching
from pyqemu_ifup.host import Host
from pyqemu_ifup.manners import Watch
from pyqemu_ifup.plan import JoinBridge, Step
from pyqemu_ifup.work import Work

LONG = 60.0


@pytest.fixture
def port() -> Port:
    """A tap's place on a network with `nat:`."""
    require("dnsmasq")
    nat = Nat(ipv4="192.168.78.1/24", outbound=False)
    return replace(port_of("root0", "labbr0"), nat=nat)


def keep_it(netns: Namespace, port: Port) -> None:
    """Do a user's up, which gets as far as the bridge and no further before its time is up."""
    real = Host.run

    def run(self: Host, step: Step, watch: Watch, patience: float | None = None) -> Work[bool]:
        while isinstance(step, JoinBridge):
            watch.check("a user's up stands still")
            yield 0.01
        return (yield from real(self, step, watch, patience))

    Host.run = run  # type: ignore[method-assign]
    with netns.enter(), Host(port.tap, Watch(LONG), lambda _: None, brief=True) as host:
        try:
            host.finish(attaching(host, port, Caller(port.tap), os.getppid(), [], NOBODY))
        except Failure as failure:
            assert failure.status is Status.TRY_AGAIN, failure
            return
    raise AssertionError("it has come through")


@contextmanager
def having_it(netns: Namespace, port: Port) -> Iterator[int]:
    """Yield the process of a user's up that has the network's lock, and stands still."""
    netns.tap("user0")
    theirs = replace(port, tap="user0")
    pid = fork(lambda: keep_it(netns, theirs))
    end = time.monotonic() + LONG
    while "labbr0" not in netns.links():
        assert time.monotonic() < end
        time.sleep(0.01)
    yield pid
    assert wait(pid) == 0


def up(netns: Namespace, port: Port) -> None:
    with netns.enter():
        attach(port, Caller(port.tap), os.getpid(), [], Watch(LONG), lambda _: None)


def test_root_has_the_network_when_a_user_has_had_it_long_enough(
    netns: Namespace, port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nat_network, "HOLD", 1.0)
    netns.tap("root0")
    with having_it(netns, port):
        up(netns, port)
    assert netns.link("root0")["master"] == "labbr0"
    # What the user's up had begun is taken back: all but the network, which is root's now.
    theirs = netns.link("user0")
    assert "master" not in theirs and not theirs.get("ifalias") and "UP" not in theirs["flags"]
    unplug(netns, "root0")
    assert "labbr0" not in netns.links()


def test_root_is_told_who_has_the_network(
    netns: Namespace, port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nat_network, "HOLD", 1.0)
    monkeypatch.setattr(nat_network, "WAIT", 0.1)
    netns.tap("root0")
    with having_it(netns, port) as user, pytest.raises(Failure) as caught:
        up(netns, port)
    assert caught.value.status is Status.TRY_AGAIN
    assert f"process {user} (" in str(caught.value)
    assert ") has network lan in hand; " in str(caught.value)
    assert "labbr0" not in netns.links()
