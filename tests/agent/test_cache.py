"""The policy that the agent keeps: read again when its files change, the last good one in force."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.agent_site import Site
from lab.fuse import file_server
from lab.netns import Namespace
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Policy
from pyqemu_ifd.cache import EVERY, SETTLE, SETTLE_MAX, SMALL, PolicyCache
from pyqemu_ifd.snapshot import PATIENCE

LATER = 20.0
"""Seconds after which a change that must be seen has not been."""
HEAD = "version: 1\nnetworks: {{{}: {{bridge: br0}}}}\n"


def policy(network: str) -> str:
    return HEAD.format(network)


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)


def settle(cached: PolicyCache) -> bool:
    """Do as the agent's loop until nothing is left to be read; tell whether anything was read."""
    reads, end = cached.reads, time.monotonic() + LATER
    while True:
        cached.look()
        while cached.due is None:
            select.select([cached], [], [], 0.1)
            cached.take()
            assert time.monotonic() < end, "the reader does not end"
        if cached._change is None:
            return cached.reads != reads
        assert time.monotonic() < end, "the policy does not come to rest"
        time.sleep(max(0.0, cached.due - time.monotonic()))


def networks(cached: PolicyCache) -> list[str]:
    return list(cached.get().networks)


def seen(cached: PolicyCache) -> list[str]:
    """Return the networks that are in force after a change."""
    assert settle(cached), "no change was seen"
    return networks(cached)


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
    settle(cached)
    yield cached
    cached.close()


def test_edit(cached: PolicyCache, etc: Path) -> None:
    assert networks(cached) == ["lan"]
    before = cached.loaded
    write(etc / "policy.yaml", policy("dmz"))
    assert seen(cached) == ["dmz"]
    assert cached.loaded > before


def test_atomic_rename(cached: PolicyCache, etc: Path) -> None:
    write(etc / ".new", policy("dmz"))
    (etc / ".new").rename(etc / "policy.yaml")
    assert seen(cached) == ["dmz"]
    write(etc / ".new", policy("lan"))
    (etc / ".new").rename(etc / "policy.yaml")
    assert seen(cached) == ["lan"]


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
            assert seen(cached) == wanted(generation)
        assert cached._known is not None
        looked_at = len(cached._known.marks)
        # In the place where it leads, and where it leads to nothing for a while.
        text = "main" if name in ("", "policy.yaml") else "drop-in"
        last = "policy.yaml" if text == "main" else "policy.d/a.yaml"
        (tmp_path / "two" / last).unlink()
        write(tmp_path / "two" / last, policy("anew"))
        assert "anew" in seen(cached)
        (tmp_path / "two").rename(tmp_path / "old")
        assert settle(cached) and cached.failure is not None
        (tmp_path / "old").rename(tmp_path / "two")
        assert settle(cached) and cached.failure is None
        assert len(cached._known.marks) == looked_at, "only what is on the way is looked at"
    finally:
        cached.close()


def test_drop_ins(cached: PolicyCache, etc: Path) -> None:
    (etc / "policy.d").mkdir(mode=0o755)
    write(etc / "policy.d" / "10.yaml", policy("dmz"))
    assert seen(cached) == ["dmz", "lan"]
    write(etc / "policy.d" / "20.yaml", policy("wan"))
    assert seen(cached) == ["dmz", "wan", "lan"]
    write(etc / "policy.d" / "20.yaml", policy("far"))
    assert seen(cached) == ["dmz", "far", "lan"]
    (etc / "policy.d" / "10.yaml").unlink()
    assert seen(cached) == ["far", "lan"]
    (etc / "policy.d").rename(etc / "gone")
    assert seen(cached) == ["lan"]


def test_folder_that_comes_later(etc: Path) -> None:
    cached = PolicyCache(None, str(etc))
    try:
        with pytest.raises(Failure) as failure:
            cached.get()
        assert failure.value.status is Status.NO_POLICY
        etc.mkdir(parents=True, mode=0o755)
        write(etc / "policy.yaml", policy("lan"))
        assert seen(cached) == ["lan"]
        assert cached.failure is None
        # And once more, as a package manager may replace it.
        etc.rename(etc.parent / "old")
        etc.mkdir(mode=0o755)
        write(etc / "policy.yaml", policy("dmz"))
        assert seen(cached) == ["dmz"]
        write(etc / "policy.yaml", policy("wan"))
        assert seen(cached) == ["wan"]
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
        assert seen(cached) == ["lan"]
        write(file, policy("dmz"))
        assert seen(cached) == ["dmz"]
    finally:
        cached.close()


@pytest.mark.parametrize("name", ["passwd", "pyqemu-ifup/a.log", "pyqemu-ifup/.policy.yaml.swp"])
def test_what_else_changes_beside_it_does_not_count(
    cached: PolicyCache, etc: Path, name: str
) -> None:
    write(etc.parent / name, "x")
    assert not settle(cached)


@pytest.mark.parametrize("text", ["version: 1\nnetwork: {}\n", "", "version: [\n", "\0"])
def test_broken_edit_keeps_the_last_good_policy(cached: PolicyCache, etc: Path, text: str) -> None:
    loaded = cached.loaded
    write(etc / "policy.yaml", text)
    assert settle(cached) and cached.failure is not None
    assert networks(cached) == ["lan"] and cached.loaded == loaded
    assert cached.failure.status is Status.POLICY_INVALID
    assert f"{etc}/policy.yaml:" in str(cached.failure)
    write(etc / "policy.yaml", policy("dmz"))
    assert seen(cached) == ["dmz"]
    assert cached.failure is None


def test_policy_that_is_taken_away(cached: PolicyCache, etc: Path) -> None:
    (etc / "policy.yaml").unlink()
    assert settle(cached) and cached.failure is not None
    assert cached.failure.status is Status.NO_POLICY and networks(cached) == ["lan"]


@pytest.mark.parametrize("what", ["file", "folder", "owner"])
def test_policy_that_others_can_write(cached: PolicyCache, etc: Path, what: str) -> None:
    if what == "owner":
        os.chown(etc / "policy.yaml", 4242, -1)
    else:
        (etc / "policy.yaml" if what == "file" else etc).chmod(0o777)
    assert settle(cached) and cached.failure is not None
    assert cached.failure.status is Status.UNSAFE and networks(cached) == ["lan"]
    if what == "owner":
        os.chown(etc / "policy.yaml", 0, -1)
    else:
        (etc / "policy.yaml").chmod(0o644)
        etc.chmod(0o755)
    assert settle(cached) and cached.failure is None


def test_what_has_not_changed_is_not_read_again(cached: PolicyCache) -> None:
    for _ in range(3):
        assert not settle(cached)


def test_same_size_and_same_time(cached: PolicyCache, etc: Path) -> None:
    """As `cp -p` and rsync leave it: what was changed last is told by the change time alone."""
    file = etc / "policy.yaml"
    before = file.stat()
    write(file, policy("dmz"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert seen(cached) == ["dmz"]


def test_half_written(cached: PolicyCache, etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written bit by bit is read at the end, however good a bit of it may look."""
    monkeypatch.setattr("pyqemu_ifd.cache.SETTLE", 0.5)
    good = policy("dmz") + "rules:\n- {tap: dmz*, network: dmz}\n- {tap: lan*, deny: closed}\n"
    reads = cached.reads
    with open(etc / "policy.yaml", "w") as file:
        for line in good.splitlines(keepends=True):
            file.write(line)
            file.flush()
            cached.look()
            assert networks(cached) == ["lan"] and cached.failure is None
    assert seen(cached) == ["dmz"]
    assert len(cached.get().rules) == 2 and cached.reads == reads + 1


def test_what_goes_on_changing_is_read_now_and_then(
    cached: PolicyCache, etc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyqemu_ifd.cache.SETTLE", 0.5)
    began = time.monotonic()
    while networks(cached) != ["dmz"]:
        assert time.monotonic() < began + LATER
        write(etc / "policy.yaml", policy("dmz") + f"# {time.monotonic()}\n")
        cached.look()
    assert time.monotonic() >= began + SETTLE_MAX


def test_a_clock_that_is_ahead(cached: PolicyCache, etc: Path) -> None:
    """As a file server's may be."""
    write(etc / "policy.yaml", policy("dmz"))
    os.utime(etc / "policy.yaml", (time.time() + 9999, time.time() + 9999))
    began = time.monotonic()
    assert seen(cached) == ["dmz"]
    assert SETTLE <= time.monotonic() - began < SETTLE_MAX
    assert not settle(cached)


def test_written_just_before_the_start(etc: Path) -> None:
    """A write after it may bear the same time: the clock of a file system has coarse steps."""
    etc.mkdir(parents=True)
    write(etc / "policy.yaml", policy("lan"))
    cached = PolicyCache(None, str(etc))
    try:
        assert networks(cached) == ["lan"]
        assert settle(cached), "it is read once more"
        assert not settle(cached)
    finally:
        cached.close()


def test_a_change_while_it_is_read(
    cached: PolicyCache, etc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of what may be half of each is ever in force."""
    (etc / "policy.d").mkdir(mode=0o755)
    write(etc / "policy.d/10.yaml", policy("old-a"))
    write(etc / "policy.yaml", policy("old-b"))
    in_force = [seen(cached)]
    read, put = cached._read, cached._put

    def changed_between() -> Policy | Failure:
        """Read the drop-in of before, and the main file of after."""
        patch.undo()
        patch.setattr(cached, "_put", put_too)
        found = read()
        write(etc / "policy.d/10.yaml", policy("new-a"))
        return found

    def put_too(found: Policy | Failure) -> None:
        put(found)
        in_force.append(networks(cached))

    with monkeypatch.context() as patch:
        patch.setattr(cached, "_read", changed_between)
        patch.setattr(cached, "_put", put_too)
        write(etc / "policy.yaml", policy("new-b"))
        assert settle(cached)
    assert in_force == [["old-a", "old-b"], ["new-a", "new-b"]]


@dataclass
class Far:
    """A policy that lies on a file server: a link leads there. The server's files are `source`."""

    etc: Path
    source: Path
    server: subprocess.Popen[str]

    @contextmanager
    def dead(self) -> Iterator[None]:
        """Have the server answer nothing while the block runs."""
        self.server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.server.send_signal(signal.SIGCONT)


@pytest.fixture
def far(etc: Path, tmp_path: Path) -> Iterator[Far]:
    """A policy on a file server, which has the network lan."""
    place, source = tmp_path / "far", tmp_path / "source"
    for folder in (place, source, etc):
        folder.mkdir(mode=0o755, parents=True)
    write(source / "policy.yaml", policy("lan"))
    (etc / "policy.yaml").symlink_to(place / "policy.yaml")
    with file_server(source, place) as server:
        yield Far(etc, source, server)


@pytest.fixture
def cached_far(far: Far) -> Iterator[PolicyCache]:
    """A cache of that policy."""
    cached = PolicyCache(None, str(far.etc))
    settle(cached)
    yield cached
    cached.close()


def test_a_file_server(cached_far: PolicyCache, far: Far) -> None:
    assert networks(cached_far) == ["lan"]
    assert not settle(cached_far)
    write(far.source / "policy.yaml", policy("dmz"))
    assert seen(cached_far) == ["dmz"]
    (far.source / "policy.yaml").unlink()
    assert settle(cached_far) and cached_far.failure is not None
    assert cached_far.failure.status is Status.NO_POLICY


def test_a_file_server_that_is_dead(cached_far: PolicyCache, far: Far) -> None:
    """Only the first look waits for it, and not for long."""
    with far.dead():
        began = time.monotonic()
        cached_far.look()
        assert PATIENCE <= time.monotonic() - began < PATIENCE + 1
        assert networks(cached_far) == ["lan"]
        assert str(cached_far.failure) == (
            "cannot look whether the policy has changed: its files do not answer; see whether the "
            "file server that they are on does"
        )
        for look in (cached_far.look, cached_far.reload):
            began = time.monotonic()
            look()
            assert time.monotonic() - began < PATIENCE
        assert cached_far.due is not None and cached_far.due > began, "it is not tried all the time"
    end = time.monotonic() + LATER
    while cached_far.failure is not None:
        assert time.monotonic() < end
        time.sleep(0.01)
        cached_far.look()
    write(far.source / "policy.yaml", policy("dmz"))
    assert seen(cached_far) == ["dmz"]


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


def begin(cached: PolicyCache) -> None:
    """Have the cache look until it has a process read the policy."""
    cached.look()
    while cached.due is not None:
        assert cached._change is not None, "no change was seen"
        time.sleep(max(0.0, cached.due - time.monotonic()))
        cached.look()


def take(cached: PolicyCache) -> None:
    """Wait for the reader's end."""
    end = time.monotonic() + LATER
    while cached.due is None:
        assert time.monotonic() < end, "the reader does not end"
        select.select([cached], [], [], 0.1)
        cached.take()


def test_a_large_policy_is_read_where_nobody_waits(cached: PolicyCache, etc: Path) -> None:
    write(etc / "policy.yaml", large("one", "two"))
    begin(cached)
    assert networks(cached) == ["lan"], "the one before is in force"
    write(etc / "policy.yaml", large("three"))
    cached.reload()
    take(cached)
    begin(cached)
    take(cached)
    assert networks(cached) == ["three"] and cached.failure is None


def test_a_large_policy_that_is_broken_is_told(cached: PolicyCache, etc: Path) -> None:
    write(etc / "policy.yaml", large("one") + "what: is this\n")
    begin(cached)
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
        begin(cached)
    assert cached._reader is not None
    os.kill(cached._reader[0], signal.SIGKILL)
    take(cached)
    assert networks(cached) == ["lan"]
    assert cached.failure is not None and cached.failure.status is Status.TRY_AGAIN
    write(etc / "policy.yaml", HEAD.format("small"))
    assert seen(cached) == ["small"] and cached.failure is None


def test_what_the_agent_holds_is_not_held_by_its_reader(cached: PolicyCache, etc: Path) -> None:
    write(etc / "policy.yaml", large("one"))
    ours, theirs = os.pipe()
    begin(cached)
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


def test_who_asks_after_a_change_is_answered_by_what_is_new(agent: Agent, netns: Namespace) -> None:
    """At once: nobody waits until the agent has heard of it."""
    netns.tap("lan0")
    good = agent.policy.read_text()
    for number in range(5):
        write(agent.policy, good.replace("lan*", "dmz*") + f"# {number}\n")
        assert agent.up("lan0").status == 77
        write(agent.policy, good)
        assert agent.up("lan0").status == 0
    assert agent.down("lan0").status == 0


def test_an_agent_whose_file_server_is_dead_serves_on(netns: Namespace, far: Far) -> None:
    """By the last good policy, and it does what is to be done unasked."""
    site = Site(netns, far.source / "policy.yaml")
    site.build()
    tap = netns.tap("lan0")
    with Agent(netns, far.etc / "policy.yaml") as agent:
        assert agent.up("lan0").status == 0
        with far.dead():
            first, *others = [_seconds(agent) for _ in range(5)]
            assert first < PATIENCE + 1 and min(others) < PATIENCE
            told = agent.report()["policy"]["error"]
            assert told.startswith("cannot look whether the policy has changed: ")
            netns.ip("link", "set", "lan0", "nomaster")
            _wait_for_master(netns, "lan0", "br0")
        wait_for_error(agent, False)
        site.write_policy(rules=[{"tap": "*", "deny": "closed"}])
        assert agent.up("lan0").status == 77
        assert agent.down("lan0").status == 0
    tap.close()
    netns.ip("link", "del", "br0")


def _seconds(agent: Agent) -> float:
    """Return how long an up takes."""
    began = time.monotonic()
    assert agent.up("lan0").status == 0
    return time.monotonic() - began


def _wait_for_master(netns: Namespace, tap: str, bridge: str) -> None:
    end = time.monotonic() + LATER
    while netns.link(tap).get("master") != bridge:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_agent_that_nobody_asks_takes_it_in(
    agent: Agent, netns: Namespace, tmp_path: Path
) -> None:
    """It brings back a tap that the policy has let it by now."""
    tap = netns.tap("lan0")
    assert agent.up("lan0").status == 0
    good = agent.policy.read_text()
    write(agent.policy, good.replace("lan*", "dmz*"))
    netns.ip("link", "set", "lan0", "nomaster")
    time.sleep(2 * EVERY)
    assert "master" not in netns.link("lan0")
    write(agent.policy, good)
    _wait_for_master(netns, "lan0", "br0")
    assert agent.down("lan0").status == 0
    tap.close()


def test_agent_reads_it_again_when_told_to(agent: Agent, tmp_path: Path) -> None:
    """SIGHUP, whatever its files are like."""
    loaded = agent.report()["policy"]["loaded"]
    os.kill(agent.pid, 1)
    assert agent.report()["policy"]["error"] is None
    # Nothing has changed, so the policy in force is the one from before.
    assert agent.report()["policy"]["loaded"] == loaded
