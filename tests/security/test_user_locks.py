"""A user who has a network's lock has it for a while only; root, who waits for it, is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lab.needs import require
from lab.netns import Namespace
from lab.plug import attach_now, port_of, unplug
from lab.public import NOBODY
from lab.race import fork, wait
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Caller, Nat, Port
from pyqemu_ifup.attach import attach
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.holder import Holder
from pyqemu_ifup.host import Host, Runnable
from pyqemu_ifup.kinds.linux import JoinBridge
from pyqemu_ifup.made import lock
from pyqemu_ifup.system.lock import lock_file, open_lock
from pyqemu_ifup.task import Task, finish, pause, step

LONG = 60.0


@pytest.fixture
def port() -> Port:
    """A tap's place on a network with `nat:`."""
    require("dnsmasq")
    nat = Nat(ipv4="192.168.78.1/24", outbound=False)
    return replace(port_of("root0", "labbr0"), made=nat)


def keep_it(netns: Namespace, port: Port) -> None:
    """Do a user's up, which gets as far as the bridge and no further before its time is up."""
    real = Host.run

    async def run(self: Host, op: Runnable) -> None:
        while isinstance(op, JoinBridge):
            self.deadline.check("a user's up stands still")
            await pause(0.01)
        await real(self, op)

    Host.run = run  # type: ignore[method-assign]
    with netns.enter(), Host(port.tap, Deadline(LONG), lambda _: None, brief=True) as host:
        try:
            host.finish(attach(host, port, Holder(Caller(port.tap), os.getppid(), NOBODY)))
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


def up(netns: Namespace, port: Port, seconds: float = LONG) -> None:
    with netns.enter():
        attach_now(port, Caller(port.tap), os.getpid(), [], Deadline(seconds), lambda _: None)


def test_root_has_the_network_when_a_user_has_had_it_long_enough(
    netns: Namespace, port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HOLD", 1.0)
    netns.tap("root0")
    with having_it(netns, port):
        up(netns, port)
    assert netns.link("root0")["master"] == "labbr0"
    # What the user's up had begun is taken back: all but the network, which is root's now.
    theirs = netns.link("user0")
    assert "master" not in theirs and not theirs.get("ifalias") and "UP" not in theirs["flags"]
    unplug(netns, "root0")
    assert "labbr0" not in netns.links()


def test_users_who_come_and_leave_do_not_pass_root(tmp_path: Path) -> None:
    """Who waits for a lock looks again from time to time; a user who comes between waits, too."""

    def locking(*, last: bool = False) -> tuple[int, Task[None]]:
        descriptor = open_lock(str(tmp_path / "lock"))
        return descriptor, lock_file(descriptor, Deadline(LONG), "network lan", last=last)

    def has_it(work: Task[None]) -> bool:
        return step(work) is None

    first, having = locking(last=True)
    assert has_it(having)
    user, waiting = locking(last=True)
    root, coming = locking()
    another_root, coming_too = locking()
    assert not any(map(has_it, (waiting, coming, coming_too)))
    os.close(first)
    assert not has_it(waiting) and not has_it(coming_too) and has_it(coming)
    late_user, too_late = locking(last=True)
    os.close(root)
    assert not has_it(too_late) and not has_it(waiting) and has_it(coming_too)
    os.close(another_root)
    assert not has_it(too_late) and has_it(waiting)
    os.close(user)
    assert has_it(too_late)
    os.close(late_user)


def test_who_is_first_in_line_is_named(tmp_path: Path) -> None:
    """One that waits and stands still keeps those behind it waiting, as one that has the lock."""
    path = str(tmp_path / "lock")

    holder = open_lock(path)
    assert step(lock_file(holder, Deadline(LONG), "network lan")) is None
    read, write = os.pipe()

    def stand_still() -> None:
        step(lock_file(open_lock(path), Deadline(LONG), "network lan"))
        os.write(write, b".")
        time.sleep(LONG)

    pid = fork(stand_still)
    assert os.read(read, 1) == b"."
    os.close(holder)
    try:
        with pytest.raises(Failure) as caught:
            finish(lock_file(open_lock(path), Deadline(0.1), "network lan"), time.sleep)
        assert f"process {pid} (" in str(caught.value)
    finally:
        os.kill(pid, 9)
        wait(pid)


def test_root_is_told_who_has_the_network(
    netns: Namespace, port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HOLD", 1.0)
    netns.tap("root0")
    with having_it(netns, port) as user, pytest.raises(Failure) as caught:
        up(netns, port, 0.1)
    assert caught.value.status is Status.TRY_AGAIN
    assert f"process {user} (" in str(caught.value)
    assert ") has network lan in hand; " in str(caught.value)
    assert "labbr0" not in netns.links()
