"""What a hook leaves half-made is mended by the very command that it tells.

The tap is a persistent one and its caller lives on, as a QEMU does whose hot-plugged NIC came to
nothing: neither the tap nor its caller's end takes anything away.
"""

from __future__ import annotations

import codecs
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.calls import Calls, Change, at_op, on_ops, stop
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import NOBODY
from lab.snapshot import Snapshot, diff
from lab.taps import Tap
from lab.told import run_told
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Seen
from pyqemu_ifup.ops import LinkOp, Op, SetUp
from pyqemu_ifup.system.lock import TAPS

pytestmark = pytest.mark.alone("changes the hook's own process")
POLICY = """\
version: 1
timeout: 1
networks: {lan: {bridge: %s, mtu: 1400}}
rules: [{tap: "*", network: lan}]
"""
BECAUSE = f"nobody holds it, though its process {os.getpid()} runs"
UP, DOWN_OPS = 5, 3
"""The number of the op of an up that brings the link up, and how many those of a down are."""


@pytest.fixture
def calls(inside: Namespace, tmp_path: Path) -> Iterator[Calls]:
    inside.add_bridge("br0", mac="02:00:00:00:00:01")
    inside.ip("link", "set", "br0", "mtu", "1400")
    calls = Calls(Hooks(tmp_path))
    calls.hooks.write_policy(POLICY % "br0")
    yield calls
    calls.close()
    inside.ip("link", "del", "br0")


@pytest.fixture
def tap(inside: Namespace) -> Iterator[Tap]:
    """A persistent tap t0, held as long as it is open."""
    with Tap("t0", persist=True, owner=0) as tap:
        # NOTE: one that the kernel has drawn may be what an up makes of it, an op less.
        inside.ip("link", "set", "t0", "address", "02:00:00:00:00:10")
        yield tap
    inside.ip("link", "del", "t0")


def refusing(first: int) -> Change:
    """Return what has the kernel refuse the hook's ops from this number on."""

    def act(number: int, op: LinkOp, done: bool) -> None:
        if not done and number >= first:
            raise Failure(Status.REFUSED, "the kernel refuses it", "a test says so", "try again")

    return on_ops(act)


def mended(
    calls: Calls,
    netns: Namespace,
    before: Snapshot,
    told: str,
    bridge: str = "br0",
    ovs: OpenVSwitch | None = None,
) -> None:
    """Run what was told, and see that the tap is what it was and that its next up works."""
    assert diff(before, Snapshot.take(netns, ovs))
    (printed,) = run_told(calls.hooks, told)
    assert printed == f"removed t0 from {bridge}: {BECAUSE}\n"
    assert diff(before, Snapshot.take(netns, ovs)) == []
    with Tap("t0"):
        assert calls.up("t0").status == 0
        assert calls.down("t0").status == 0
    assert diff(before, Snapshot.take(netns, ovs)) == []


def test_a_hard_end(calls: Calls, inside: Namespace, tap: Tap) -> None:
    """As long as somebody holds the tap it stays as it is: a guest may be on it."""
    before = Snapshot.take(inside)

    def hang(number: int, op: LinkOp, done: bool) -> None:
        if number >= UP:
            signal.pause()

    ended = calls.up("t0", on_ops(hang))
    assert ended.status == 75
    assert "what was begun could not be taken back; pyqemu-ifctl gc t0 will" in ended.stderr
    made = Snapshot.take(inside)
    (printed,) = run_told(calls.hooks, ended.stderr)
    assert printed == f"kept t0 on br0: process {os.getpid()} holds it\nnothing to remove\n"
    assert diff(made, Snapshot.take(inside)) == []
    tap.close()
    dry = calls.hooks.ctl("gc", "--dry-run")
    assert dry.stdout == f"would remove t0 from br0: {BECAUSE}\n"
    mended(calls, inside, before, ended.stderr)


def test_a_step_that_is_not_taken_back(calls: Calls, inside: Namespace, tap: Tap) -> None:
    before = Snapshot.take(inside)
    ended = calls.up("t0", refusing(UP))
    tap.close()
    assert ended.status == 71
    told = [line for line in ended.log if ": not taken back: " in line]
    mended(calls, inside, before, told[0])


@pytest.mark.parametrize("number", range(DOWN_OPS))
def test_a_down_that_was_stopped(calls: Calls, inside: Namespace, tap: Tap, number: int) -> None:
    """Before its first step too, when the link is up; a gc of all taps lets that one be."""
    before = Snapshot.take(inside)
    assert calls.up("t0").status == 0

    def stop(at: int, op: LinkOp, done: bool) -> None:
        if (at, done) == (number - 1, True):
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_first() -> None:
        look = Host.look

        def stop_looking(self: Host, tap: str, bridge: str | None) -> Seen:
            os.kill(os.getpid(), signal.SIGTERM)
            return look(self, tap, bridge)

        setattr(Host, "look", stop_looking)  # noqa: B010  mypy lets no method be assigned

    ended = calls.down("t0", on_ops(stop) if number else stop_first)
    tap.close()
    assert ended.status == 75, ended
    assert ended.stderr.endswith("; pyqemu-ifctl gc t0 removes what is left\n")
    if not number:
        assert calls.hooks.ctl("gc").stdout == "nothing to remove\n"
    mended(calls, inside, before, ended.stderr)


def test_a_down_without_privilege(calls: Calls, inside: Namespace, tap: Tap) -> None:
    """Its link is still up."""
    # NOTE: Python loads it when it is wanted, and nobody may be unable to read where Python is.
    codecs.lookup("ascii")
    before = Snapshot.take(inside)
    assert calls.up("t0").status == 0

    def drop() -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)

    ended = calls.down("t0", drop)
    tap.close()
    told = [line for line in ended.log if "]: t0: left to " in line]
    assert ended.status == 0 and told, ended
    mended(calls, inside, before, told[0])


DYING = """
import os, time
from pyqemu_ifup.ops import LinkOp, SetUp

async def run(self, host, run=LinkOp.run):
    if isinstance(self, SetUp):
        open("{folder}/there", "w").close()
        while not os.path.exists("{folder}/go"):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    await run(self, host)

LinkOp.run = run
"""
"""Has an agent end in the middle of an up, once it may."""


def test_an_agent_that_ends_while_an_up_is_stopped(
    calls: Calls, inside: Namespace, tap: Tap, tmp_path: Path
) -> None:
    before = Snapshot.take(inside)
    calls.hooks.write_policy(POLICY.replace("timeout: 1", "timeout: 60") % "br0")
    with Agent(inside, calls.hooks.policy, before=DYING.format(folder=tmp_path)) as agent:
        calls.hooks.agent = agent.path
        call = calls.start("pyqemu-ifup", "t0")
        end = time.monotonic() + 60
        while not (tmp_path / "there").exists():
            assert time.monotonic() < end, call.stderr
            time.sleep(0.01)
        os.kill(call.pid, signal.SIGTERM)
        (tmp_path / "go").touch()
        ended = call.wait()
        assert agent.wait() == -signal.SIGKILL
    calls.hooks.agent = ""
    tap.close()
    assert (ended.status, ended.stderr) == (
        75,
        "pyqemu-ifup: t0: stopped: received SIGTERM; the agent has ended, pyqemu-ifctl gc t0 "
        "removes what is left\n",
    )
    mended(calls, inside, before, ended.stderr)


def test_gc_leaves_a_tap_alone_that_is_attached_for_who_comes(
    calls: Calls, inside: Namespace, tap: Tap
) -> None:
    """A launcher attaches it before its QEMU opens it, which calls no script."""
    tap.close()
    assert calls.up("t0").status == 0
    attached = Snapshot.take(inside)
    assert calls.hooks.ctl("gc").stdout == "nothing to remove\n"
    assert diff(attached, Snapshot.take(inside)) == []
    with Tap("t0"):
        inside.ip("link", "set", "t0", "down")
        attached = Snapshot.take(inside)
        for words in (["gc"], ["gc", "t0"]):
            assert calls.hooks.ctl(*words).stdout.endswith("nothing to remove\n")
        assert diff(attached, Snapshot.take(inside)) == []
        assert calls.down("t0").status == 0


@pytest.mark.parametrize("words", [("gc",), ("gc", "t0")], ids=" ".join)
def test_gc_waits_for_an_up_that_is_under_way(
    calls: Calls, inside: Namespace, tap: Tap, words: tuple[str, ...]
) -> None:
    """Of a tap that nobody holds yet, and that has our mark and is down: then it is attached."""
    tap.close()
    calls.hooks.write_policy(POLICY.replace("timeout: 1", "timeout: 60") % "br0")
    call = calls.start("pyqemu-ifup", "t0", change=at_op(UP, stop))
    assert call.wait_stopped()
    env = {**calls.hooks.environ(), "PYQEMU_IFUP_POLICY": str(calls.hooks.policy)}
    with subprocess.Popen(
        calls.hooks.argv("pyqemu-ifctl", *words), env=env, stdout=subprocess.PIPE, text=True
    ) as gc:
        end = time.monotonic() + 60
        while not is_waiting(gc.pid):
            assert time.monotonic() < end and gc.poll() is None, gc.communicate()
            time.sleep(0.01)
        call.go_on()
        assert call.wait().status == 0
        said = gc.communicate(timeout=60)[0]
    assert (gc.returncode, said.endswith("nothing to remove\n")) == (0, True), said
    link = inside.link("t0")
    assert link["master"] == "br0" and "UP" in link["flags"]
    assert calls.down("t0").status == 0


def is_waiting(pid: int) -> bool:
    """Tell whether a process has the file open in which the locks of taps are."""
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if os.readlink(file) == TAPS:
                return True
    return False


def test_a_port_that_is_not_taken_back(
    calls: Calls, inside: Namespace, ovs: OpenVSwitch, tap: Tap
) -> None:
    ovs.add_bridge("br-int", hwaddr="02:00:00:00:00:0c", mtu=1400)
    bridge = f"br-int, ovsdb: '{ovs.db}'"
    calls.hooks.write_policy(POLICY.replace("timeout: 1", "timeout: 20") % bridge)
    before = Snapshot.take(inside, ovs)

    def change() -> None:
        run = Host.run
        refused: list[Op] = []

        async def refuse(self: Host, step: Op) -> None:
            if isinstance(step, SetUp) or refused:
                refused.append(step)
                raise Failure(Status.REFUSED, "the switch refuses it", "a test says so", "")
            await run(self, step)

        setattr(Host, "run", refuse)  # noqa: B010  mypy lets no method be assigned

    ended = calls.up("t0", change)
    tap.close()
    assert ended.status == 71, ended
    told = [line for line in ended.log if ": not taken back: " in line]
    assert ovs.find("Port", "t0") is not None
    mended(calls, inside, before, told[0], "br-int", ovs)
    ovs.vsctl("del-br", "br-int")
