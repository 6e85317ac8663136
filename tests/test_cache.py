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
from pyqemu_ifd.cache import SMALL, PolicyCache

LATER = 20.0
"""Seconds after which a change that must be seen has not been."""
HEAD = "version: 1\nnetworks: {{{}: {{bridge: br0}}}}\n"


def policy(network: str) -> str:
    return HEAD.format(network)


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)


def settle(cached: PolicyCache) -> bool:
    """Wait until the cache has heard of a change; tell whether it concerns the policy."""
    assert select.select([cached], [], [], LATER)[0], "no change was seen"
    changed = cached.drain()
    if changed:
        cached.load()
    return changed


def networks(cached: PolicyCache) -> list[str]:
    return list(cached.get().networks)


def wait_for(cached: PolicyCache, *names: str) -> None:
    """Wait until these are the networks in force."""
    end = time.monotonic() + LATER
    while cached.policy is None or networks(cached) != list(names):
        assert time.monotonic() < end, cached.failure
        settle(cached)


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """A folder that is to be the policy's, and is not there yet."""
    tmp_path.chmod(0o755)
    return tmp_path / "etc" / "pyqemu-ifup"


@pytest.fixture
def cached(etc: Path) -> Iterator[PolicyCache]:
    """A cache of the policy in `etc`, which has the network lan."""
    etc.mkdir(parents=True)
    write(etc / "policy.yaml", policy("lan"))
    cached = PolicyCache(None, str(etc))
    yield cached
    cached.close()


def test_edit(cached: PolicyCache, etc: Path) -> None:
    assert networks(cached) == ["lan"]
    before = cached.loaded
    write(etc / "policy.yaml", policy("dmz"))
    wait_for(cached, "dmz")
    assert cached.loaded > before


def test_atomic_rename(cached: PolicyCache, etc: Path) -> None:
    write(etc / ".new", policy("dmz"))
    (etc / ".new").rename(etc / "policy.yaml")
    wait_for(cached, "dmz")
    write(etc / ".new", policy("lan"))
    (etc / ".new").rename(etc / "policy.yaml")
    wait_for(cached, "lan")


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

    cached = PolicyCache(None, str(etc))
    try:
        assert networks(cached) == wanted("one")
        for generation in ("two", "one", "two"):
            (tmp_path / "next").symlink_to(generation)
            (tmp_path / "next").rename(tmp_path / "now")
            wait_for(cached, *wanted(generation))
        watches = len(cached._watched)
        # In the place where it leads, and where it leads to nothing for a while.
        text = "main" if name in ("", "policy.yaml") else "drop-in"
        last = "policy.yaml" if text == "main" else "policy.d/a.yaml"
        (tmp_path / "two" / last).unlink()
        write(tmp_path / "two" / last, policy("anew"))
        while "anew" not in networks(cached):
            settle(cached)
        (tmp_path / "two").rename(tmp_path / "old")
        while cached.failure is None:
            settle(cached)
        (tmp_path / "old").rename(tmp_path / "two")
        while cached.failure is not None:
            settle(cached)
        assert len(cached._watched) == watches, "what is no longer on the way is watched no more"
    finally:
        cached.close()


def test_drop_ins(cached: PolicyCache, etc: Path) -> None:
    (etc / "policy.d").mkdir(mode=0o755)
    write(etc / "policy.d" / "10.yaml", policy("dmz"))
    wait_for(cached, "dmz", "lan")
    write(etc / "policy.d" / "20.yaml", policy("wan"))
    wait_for(cached, "dmz", "wan", "lan")
    write(etc / "policy.d" / "20.yaml", policy("far"))
    wait_for(cached, "dmz", "far", "lan")
    (etc / "policy.d" / "10.yaml").unlink()
    wait_for(cached, "far", "lan")
    (etc / "policy.d").rename(etc / "gone")
    wait_for(cached, "lan")


def test_folder_that_comes_later(etc: Path) -> None:
    cached = PolicyCache(None, str(etc))
    try:
        with pytest.raises(Failure) as failure:
            cached.get()
        assert failure.value.status is Status.NO_POLICY
        etc.mkdir(parents=True, mode=0o755)
        write(etc / "policy.yaml", policy("lan"))
        wait_for(cached, "lan")
        assert cached.failure is None
        # And once more, as a package manager may replace it.
        etc.rename(etc.parent / "old")
        etc.mkdir(mode=0o755)
        write(etc / "policy.yaml", policy("dmz"))
        wait_for(cached, "dmz")
        write(etc / "policy.yaml", policy("wan"))
        wait_for(cached, "wan")
    finally:
        cached.close()


def test_one_file_in_a_folder_that_comes_later(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    file = tmp_path / "a" / "b" / "policy.yaml"
    cached = PolicyCache(str(file))
    try:
        assert cached.policy is None
        file.parent.mkdir(parents=True)
        write(file, policy("lan"))
        wait_for(cached, "lan")
        write(file, policy("dmz"))
        wait_for(cached, "dmz")
    finally:
        cached.close()


def test_what_else_changes_beside_it_does_not_count(cached: PolicyCache, etc: Path) -> None:
    write(etc.parent / "passwd", "x")
    assert not settle(cached)


@pytest.mark.parametrize("text", ["version: 1\nnetwork: {}\n", "", "version: [\n", "\0"])
def test_broken_edit_keeps_the_last_good_policy(cached: PolicyCache, etc: Path, text: str) -> None:
    loaded = cached.loaded
    write(etc / "policy.yaml", text)
    while cached.failure is None:
        settle(cached)
    assert networks(cached) == ["lan"] and cached.loaded == loaded
    assert cached.failure.status is Status.POLICY_INVALID
    assert f"{etc}/policy.yaml:" in str(cached.failure)
    write(etc / "policy.yaml", policy("dmz"))
    wait_for(cached, "dmz")
    assert cached.failure is None


def test_policy_that_is_taken_away(cached: PolicyCache, etc: Path) -> None:
    (etc / "policy.yaml").unlink()
    while cached.failure is None:
        settle(cached)
    assert cached.failure.status is Status.NO_POLICY and networks(cached) == ["lan"]


@pytest.mark.parametrize("what", ["file", "folder", "owner"])
def test_policy_that_others_can_write(cached: PolicyCache, etc: Path, what: str) -> None:
    if what == "owner":
        os.chown(etc / "policy.yaml", 4242, -1)
    else:
        (etc / "policy.yaml" if what == "file" else etc).chmod(0o777)
    while cached.failure is None:
        settle(cached)
    assert cached.failure.status is Status.UNSAFE and networks(cached) == ["lan"]
    if what == "owner":
        os.chown(etc / "policy.yaml", 0, -1)
    else:
        (etc / "policy.yaml").chmod(0o644)
        etc.chmod(0o755)
    while cached.failure is not None:
        settle(cached)


def test_no_watch_left_keeps_the_last_good_policy(
    cached: PolicyCache, etc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Libc:
        """A kernel without a free inotify watch: the limit is the whole host's."""

        def inotify_add_watch(self, *_words: object) -> int:
            """Fail."""
            ctypes.set_errno(errno.ENOSPC)
            return -1

    with monkeypatch.context() as patch:
        patch.setattr(cached, "_libc", Libc())
        write(etc / "policy.yaml", policy("dmz"))
        cached.load()
    assert networks(cached) == ["lan"]
    assert cached.failure is not None and cached.failure.status is Status.REFUSED
    assert "max_user_watches" in str(cached.failure)
    cached.load()
    assert networks(cached) == ["dmz"] and cached.failure is None


def test_no_way_to_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Libc:
        """A kernel without a free inotify instance."""

        def inotify_init1(self, flags: int) -> int:
            """Fail."""
            return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *args, **more: Libc())
    with pytest.raises(Failure) as failure:
        PolicyCache(str(tmp_path / "policy.yaml"))
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


def take(cached: PolicyCache) -> None:
    """Wait for the reader's end."""
    end = time.monotonic() + LATER
    while not cached.take():
        assert time.monotonic() < end, "the reader does not end"
        select.select([cached], [], [], 0.1)


def test_a_large_policy_is_read_where_nobody_waits(cached: PolicyCache, etc: Path) -> None:
    write(etc / "policy.yaml", large("one", "two"))
    assert not cached.load()
    assert networks(cached) == ["lan"], "the one before is in force"
    write(etc / "policy.yaml", large("three"))
    assert not cached.load(), "it is read once more when this one is done"
    take(cached)
    take(cached)
    assert networks(cached) == ["three"] and cached.failure is None


def test_a_large_policy_that_is_broken_is_told(cached: PolicyCache, etc: Path) -> None:
    write(etc / "policy.yaml", large("one") + "what: is this\n")
    assert not cached.load()
    take(cached)
    assert networks(cached) == ["lan"]
    assert cached.failure is not None and cached.failure.status is Status.POLICY_INVALID
    assert "no key what" in str(cached.failure)


def test_a_reader_that_dies_leaves_the_last_good_policy(
    cached: PolicyCache, etc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(etc / "policy.yaml", large("one"))
    with monkeypatch.context() as patch:
        patch.setattr(cached, "_read", signal.pause)
        assert not cached.load()
    assert cached._reader is not None
    os.kill(cached._reader[0], signal.SIGKILL)
    take(cached)
    assert networks(cached) == ["lan"]
    assert cached.failure is not None and cached.failure.status is Status.TRY_AGAIN
    write(etc / "policy.yaml", HEAD.format("small"))
    assert cached.load() and networks(cached) == ["small"] and cached.failure is None


def test_what_the_agent_holds_is_not_held_by_its_reader(cached: PolicyCache, etc: Path) -> None:
    write(etc / "policy.yaml", large("one"))
    ours, theirs = os.pipe()
    assert not cached.load()
    assert cached._reader is not None
    os.close(theirs)
    assert select.select([ours], [], [], LATER)[0] and os.read(ours, 1) == b""
    os.close(ours)
    take(cached)


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
