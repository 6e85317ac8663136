"""The policy that the agent keeps: read again when its files change, the last good one in force."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.agent_site import Site
from lab.netns import Namespace
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifd.keeper import SMALL, PolicyKeeper

LATER = 20.0
"""Seconds after which a change that must be seen has not been."""
HEAD = "version: 1\nnetworks: {{{}: {{bridge: br0}}}}\n"


def policy(network: str) -> str:
    return HEAD.format(network)


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)


def settle(keeper: PolicyKeeper) -> bool:
    """Wait until the keeper has heard of a change; tell whether it concerns the policy."""
    assert select.select([keeper], [], [], LATER)[0], "no change was seen"
    changed = keeper.drain()
    if changed:
        keeper.load()
    return changed


def networks(keeper: PolicyKeeper) -> list[str]:
    return list(keeper.get().networks)


def wait_for(keeper: PolicyKeeper, *names: str) -> None:
    """Wait until these are the networks in force."""
    end = time.monotonic() + LATER
    while keeper.policy is None or networks(keeper) != list(names):
        assert time.monotonic() < end, keeper.failure
        settle(keeper)


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """A folder that is to be the policy's, and is not there yet."""
    tmp_path.chmod(0o755)
    return tmp_path / "etc" / "pyqemu-ifup"


@pytest.fixture
def keeper(etc: Path) -> Iterator[PolicyKeeper]:
    """A keeper of the policy in `etc`, which has the network lan."""
    etc.mkdir(parents=True)
    write(etc / "policy.yaml", policy("lan"))
    keeper = PolicyKeeper(None, str(etc))
    yield keeper
    keeper.close()


def test_edit(keeper: PolicyKeeper, etc: Path) -> None:
    assert networks(keeper) == ["lan"]
    before = keeper.loaded
    write(etc / "policy.yaml", policy("dmz"))
    wait_for(keeper, "dmz")
    assert keeper.loaded > before


def test_atomic_rename(keeper: PolicyKeeper, etc: Path) -> None:
    write(etc / ".new", policy("dmz"))
    (etc / ".new").rename(etc / "policy.yaml")
    wait_for(keeper, "dmz")
    write(etc / ".new", policy("lan"))
    (etc / ".new").rename(etc / "policy.yaml")
    wait_for(keeper, "lan")


@pytest.mark.parametrize("name", ["", "policy.yaml", "policy.d", "policy.d/a.yaml"])
def test_what_a_link_leads_to(etc: Path, tmp_path: Path, name: str) -> None:
    """As NixOS, stow and Kubernetes have it: the link stays, and what it leads over changes."""
    etc = tmp_path / "etc"
    for generation in ("one", "two"):
        policy_d = tmp_path / generation / "policy.d"
        policy_d.mkdir(parents=True, mode=0o755)
        write(tmp_path / generation / "policy.yaml", policy(generation))
        write(policy_d / "a.yaml", policy(f"{generation}-a"))
    (tmp_path / "now").symlink_to("one")
    fixed = tmp_path / "fixed"
    (fixed / "policy.d").mkdir(parents=True, mode=0o755)
    write(fixed / "policy.yaml", policy("fixed"))
    write(fixed / "policy.d" / "a.yaml", policy("fixed-a"))
    fixed.rename(etc)
    (etc / name).rename(tmp_path / "away")
    up = "../" * (name.count("/") + bool(name))
    Path(os.path.normpath(etc / name)).symlink_to(f"{up}now/{name}")

    def wanted(generation: str) -> list[str]:
        fixed = {"": (generation, generation), "policy.yaml": ("fixed", generation)}
        drop_in, main = fixed.get(name, (generation, "fixed"))
        return [f"{drop_in}-a", main]

    keeper = PolicyKeeper(None, str(etc))
    try:
        assert networks(keeper) == wanted("one")
        for generation in ("two", "one", "two"):
            (tmp_path / "next").symlink_to(generation)
            (tmp_path / "next").rename(tmp_path / "now")
            wait_for(keeper, *wanted(generation))
        watches = len(keeper._watched)
        # In the place where it leads, and where it leads to nothing for a while.
        text = "main" if name in ("", "policy.yaml") else "drop-in"
        last = "policy.yaml" if text == "main" else "policy.d/a.yaml"
        (tmp_path / "two" / last).unlink()
        write(tmp_path / "two" / last, policy("anew"))
        while "anew" not in networks(keeper):
            settle(keeper)
        (tmp_path / "two").rename(tmp_path / "old")
        while keeper.failure is None:
            settle(keeper)
        (tmp_path / "old").rename(tmp_path / "two")
        while keeper.failure is not None:
            settle(keeper)
        assert len(keeper._watched) == watches, "what is no longer on the way is watched no more"
    finally:
        keeper.close()


def test_drop_ins(keeper: PolicyKeeper, etc: Path) -> None:
    (etc / "policy.d").mkdir(mode=0o755)
    write(etc / "policy.d" / "10.yaml", policy("dmz"))
    wait_for(keeper, "dmz", "lan")
    write(etc / "policy.d" / "20.yaml", policy("wan"))
    wait_for(keeper, "dmz", "wan", "lan")
    write(etc / "policy.d" / "20.yaml", policy("far"))
    wait_for(keeper, "dmz", "far", "lan")
    (etc / "policy.d" / "10.yaml").unlink()
    wait_for(keeper, "far", "lan")
    (etc / "policy.d").rename(etc / "gone")
    wait_for(keeper, "lan")


def test_folder_that_comes_later(etc: Path) -> None:
    keeper = PolicyKeeper(None, str(etc))
    try:
        with pytest.raises(Failure) as failure:
            keeper.get()
        assert failure.value.status is Status.NO_POLICY
        etc.mkdir(parents=True, mode=0o755)
        write(etc / "policy.yaml", policy("lan"))
        wait_for(keeper, "lan")
        assert keeper.failure is None
        # And once more, as a package manager may replace it.
        etc.rename(etc.parent / "old")
        etc.mkdir(mode=0o755)
        write(etc / "policy.yaml", policy("dmz"))
        wait_for(keeper, "dmz")
        write(etc / "policy.yaml", policy("wan"))
        wait_for(keeper, "wan")
    finally:
        keeper.close()


def test_one_file_in_a_folder_that_comes_later(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    file = tmp_path / "a" / "b" / "policy.yaml"
    keeper = PolicyKeeper(str(file))
    try:
        assert keeper.policy is None
        file.parent.mkdir(parents=True)
        write(file, policy("lan"))
        wait_for(keeper, "lan")
        write(file, policy("dmz"))
        wait_for(keeper, "dmz")
    finally:
        keeper.close()


def test_what_else_changes_beside_it_does_not_count(keeper: PolicyKeeper, etc: Path) -> None:
    write(etc.parent / "passwd", "x")
    assert not settle(keeper)


@pytest.mark.parametrize("text", ["version: 1\nnetwork: {}\n", "", "version: [\n", "\0"])
def test_broken_edit_keeps_the_last_good_policy(keeper: PolicyKeeper, etc: Path, text: str) -> None:
    loaded = keeper.loaded
    write(etc / "policy.yaml", text)
    while keeper.failure is None:
        settle(keeper)
    assert networks(keeper) == ["lan"] and keeper.loaded == loaded
    assert keeper.failure.status is Status.POLICY_INVALID
    assert f"{etc}/policy.yaml:" in str(keeper.failure)
    write(etc / "policy.yaml", policy("dmz"))
    wait_for(keeper, "dmz")
    assert keeper.failure is None


def test_policy_that_is_taken_away(keeper: PolicyKeeper, etc: Path) -> None:
    (etc / "policy.yaml").unlink()
    while keeper.failure is None:
        settle(keeper)
    assert keeper.failure.status is Status.NO_POLICY and networks(keeper) == ["lan"]


@pytest.mark.parametrize("what", ["file", "folder", "owner"])
def test_policy_that_others_can_write(keeper: PolicyKeeper, etc: Path, what: str) -> None:
    if what == "owner":
        os.chown(etc / "policy.yaml", 4242, -1)
    else:
        (etc / "policy.yaml" if what == "file" else etc).chmod(0o777)
    while keeper.failure is None:
        settle(keeper)
    assert keeper.failure.status is Status.UNSAFE and networks(keeper) == ["lan"]
    if what == "owner":
        os.chown(etc / "policy.yaml", 0, -1)
    else:
        (etc / "policy.yaml").chmod(0o644)
        etc.chmod(0o755)
    while keeper.failure is not None:
        settle(keeper)


def test_no_watch_left_keeps_the_last_good_policy(
    keeper: PolicyKeeper, etc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Libc:
        """A kernel without a free inotify watch: the limit is the whole host's."""

        def inotify_add_watch(self, *_words: object) -> int:
            """Fail."""
            ctypes.set_errno(errno.ENOSPC)
            return -1

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "_libc", Libc())
        write(etc / "policy.yaml", policy("dmz"))
        keeper.load()
    assert networks(keeper) == ["lan"]
    assert keeper.failure is not None and keeper.failure.status is Status.REFUSED
    assert "max_user_watches" in str(keeper.failure)
    keeper.load()
    assert networks(keeper) == ["dmz"] and keeper.failure is None


def test_no_way_to_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Libc:
        """A kernel without a free inotify instance."""

        def inotify_init1(self, flags: int) -> int:
            """Fail."""
            return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *args, **more: Libc())
    with pytest.raises(Failure) as failure:
        PolicyKeeper(str(tmp_path / "policy.yaml"))
    assert failure.value.status is Status.REFUSED
    assert "fs.inotify.max_user_instances" in str(failure.value)


@pytest.fixture
def agent(netns: Namespace, tmp_path: Path) -> Iterator[Agent]:
    """An agent whose policy has the network lan for taps that begin so."""
    site = Site(netns, tmp_path / "policy.yaml")
    site.build()
    with site.start() as agent:
        yield agent


def wait_for_error(agent: Agent, there: bool) -> None:
    end = time.monotonic() + LATER
    while (agent.report()["policy"]["error"] is not None) != there:
        assert time.monotonic() < end
        time.sleep(0.01)


def large(*names: str) -> str:
    """Return a policy with these networks that is read by a process of its own."""
    lines = "".join(f"  {name}: {{bridge: br0}}\n" for name in names)
    return f"version: 1\nnetworks:\n{lines}" + "# \n" * SMALL


def take(keeper: PolicyKeeper) -> None:
    """Wait for the reader's end."""
    end = time.monotonic() + LATER
    while not keeper.take():
        assert time.monotonic() < end, "the reader does not end"
        select.select([keeper], [], [], 0.1)


def test_a_large_policy_is_read_where_nobody_waits(keeper: PolicyKeeper, etc: Path) -> None:
    write(etc / "policy.yaml", large("one", "two"))
    assert not keeper.load()
    assert networks(keeper) == ["lan"], "the one before is in force"
    write(etc / "policy.yaml", large("three"))
    assert not keeper.load(), "it is read once more when this one is done"
    take(keeper)
    take(keeper)
    assert networks(keeper) == ["three"] and keeper.failure is None


def test_a_large_policy_that_is_broken_is_told(keeper: PolicyKeeper, etc: Path) -> None:
    write(etc / "policy.yaml", large("one") + "what: is this\n")
    assert not keeper.load()
    take(keeper)
    assert networks(keeper) == ["lan"]
    assert keeper.failure is not None and keeper.failure.status is Status.POLICY_INVALID
    assert "no key what" in str(keeper.failure)


def test_a_reader_that_dies_leaves_the_last_good_policy(
    keeper: PolicyKeeper, etc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(etc / "policy.yaml", large("one"))
    with monkeypatch.context() as patch:
        patch.setattr(keeper, "_read", signal.pause)
        assert not keeper.load()
    assert keeper._reader is not None
    os.kill(keeper._reader[0], signal.SIGKILL)
    take(keeper)
    assert networks(keeper) == ["lan"]
    assert keeper.failure is not None and keeper.failure.status is Status.TRY_AGAIN
    write(etc / "policy.yaml", HEAD.format("small"))
    assert keeper.load() and networks(keeper) == ["small"] and keeper.failure is None


def test_what_the_agent_holds_is_not_held_by_its_reader(keeper: PolicyKeeper, etc: Path) -> None:
    write(etc / "policy.yaml", large("one"))
    ours, theirs = os.pipe()
    assert not keeper.load()
    assert keeper._reader is not None
    os.close(theirs)
    assert select.select([ours], [], [], LATER)[0] and os.read(ours, 1) == b""
    os.close(ours)
    take(keeper)


def test_the_agent_puts_a_large_policy_in_force(agent: Agent, netns: Namespace) -> None:
    """And it serves a hook while that one is read."""
    before = agent.report()["policy"]["loaded"]
    netns.tap("lan0")
    good = agent.policy.read_text()
    write(agent.policy, large("one", "lan") + "rules: [{tap: lan*, deny: not by now}]\n")
    os.kill(agent.pid, signal.SIGHUP)
    assert agent.up("lan0").status == 0
    end = time.monotonic() + LATER
    while agent.report()["policy"]["loaded"] == before:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert agent.up("lan0").status == 77
    assert agent.down("lan0").status == 0
    write(agent.policy, good)


def test_agent_reads_it_again(agent: Agent, netns: Namespace) -> None:
    netns.tap("lan0")
    netns.tap("dmz0")
    assert [agent.up(tap).status for tap in ("lan0", "dmz0")] == [0, 77]
    good = agent.policy.read_text()
    write(agent.policy, "version: 1\nrules: {}\n")
    wait_for_error(agent, True)
    told = agent.report()["policy"]
    assert told["error"].startswith("policy invalid: ") and told["files"] == [str(agent.policy)]
    assert [agent.up(tap).status for tap in ("lan0", "dmz0")] == [0, 77]
    write(agent.policy, good.replace("lan*", "dmz*"))
    wait_for_error(agent, False)
    assert [agent.up(tap).status for tap in ("lan0", "dmz0")] == [77, 0]
    assert agent.report()["policy"]["loaded"] > told["loaded"]
    assert [agent.down(tap).status for tap in ("lan0", "dmz0")] == [0, 0]


def test_agent_reads_it_again_when_told_to(agent: Agent, tmp_path: Path) -> None:
    """SIGHUP, for file systems whose changes the kernel does not tell."""
    loaded = agent.report()["policy"]["loaded"]
    os.kill(agent.pid, 1)
    assert agent.report()["policy"]["error"] is None
    # Nothing has changed, so the policy in force is the one from before.
    assert agent.report()["policy"]["loaded"] == loaded
