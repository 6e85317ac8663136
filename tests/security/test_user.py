"""A user who has been given a tap keeps it, or passes it on, when his right to it has ended.

Each is done by processes of that user's, against the real agent, and frames tell who reaches whom.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.holder import Holder, tun_for_all
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.public import NOBODY, public_folder
from lab.taps import frame, holds, mac

OTHER = 65533
MULTI_QUEUE, PLAIN = 0x1102, 0x1002
DENIED = "Operation not permitted"


@dataclass
class Lan:
    """A namespace with the network `lan` on br0, an agent, and a station on the bridge."""

    netns: Namespace
    hooks: Hooks
    tun: str
    agent: Agent | None = None
    """Root's, which does what nobody has asked for."""

    def allow(self, *users: str) -> None:
        """Put a policy in force that lets just these users have taps on the network."""
        lan = {"bridge": "br0", "tap_name": "ten%d", "users": list(users)}
        rules = [{"tap": "*", "network": "lan"}]
        self.hooks.write_policy(
            json.dumps({"version": 1, "networks": {"lan": lan}, "rules": rules})
        )

    def holder(self, uid: int, *prefix: str) -> Holder:
        """Start a process of a user's."""
        env = {**self.hooks.environ(), "TUN": self.tun, "HOME": "/"}
        return Holder(self.netns, uid, env, *prefix)

    def reaches(self, holder: Holder) -> bool:
        """Tell whether a frame of the process's first tap comes out on the bridge."""
        payload = b"from a user %d" % holder.process.pid
        raw = self.netns.raw("br0")
        holder(f"send({frame(mac(9), payload=payload).hex()!r})")
        return raw.recv(1.0, holds(payload)) is not None


@pytest.fixture
def lan(netns: Namespace) -> Iterator[Lan]:
    """The network, open to nobody and to one without a name, with both agents."""
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    with public_folder() as folder:
        hooks = Hooks(folder / "bin", netns=netns.name)
        place = Lan(netns, hooks, tun_for_all(folder))
        place.allow("nobody", str(OTHER))
        policy = Path(hooks.policy)
        with Agent(netns, policy, users=True) as agent, Agent(netns, policy) as root:
            hooks.agent, hooks.agent_pid, place.agent = agent.path, agent.pid, root
            yield place
    netns.ip("link", "del", "br0")


def test_nobody_opens_a_tap_of_ours_again(lan: Lan) -> None:
    """Neither a persistent one that is closed, nor another queue of one that is held."""
    with lan.holder(NOBODY) as user, lan.holder(OTHER) as other:
        assert user('tap("lan", "ten0", 2)') == "=0"
        assert lan.netns.link("ten0")["linkinfo"]["info_data"]["user"] == "root"
        assert lan.reaches(user)
        for each in (user, other):
            assert each(f'open_it("ten0", {MULTI_QUEUE})') == DENIED
        user("control(PERSIST, 1)")
        user("close()")
        for each in (user, other):
            assert each(f'open_it("ten0", {MULTI_QUEUE})') == DENIED
        assert user('tap("lan", "ten1")') == "=0"
        user("control(PERSIST, 1)")
        user("close()")
        assert user(f'open_it("ten1", {PLAIN})') == DENIED
    for name in ("ten0", "ten1"):
        # NOTE: the agent may be doing the same just now.
        lan.netns.run(["ip", "link", "del", name], check=False)


def test_a_tap_of_ours_is_whose_its_mark_says(lan: Lan) -> None:
    """It is brought up again for the user, for nobody else, and goes with its down."""
    with lan.holder(NOBODY) as user, lan.holder(OTHER) as other:
        assert user('tap("lan", "ten0")') == "=0"
        other("listen()")
        user("pass_on()")
        other("fetch()")
        assert user('tap("lan", "ten1")') == "=0"
        assert other('hook("up", "ten0", "", "")').startswith("=77")
        index = lan.netns.link("ten1")["ifindex"]
        user("give()")
        assert user('hook("up", "ten1", "", "")').startswith("=0")
        link = lan.netns.link("ten1")
        assert link["ifindex"] == index and " made=1" in link["ifalias"]
        assert lan.reaches(user)
        assert user('hook("down", "ten1", "")').startswith("=0")
        assert "ten1" not in lan.netns.links()
        assert user("send('00' * 60)") == "File descriptor in bad state"


@pytest.mark.parametrize("owner", [NOBODY, OTHER])
def test_a_tap_that_its_holder_gives_away_is_his_no_more(lan: Lan, owner: int) -> None:
    with lan.holder(NOBODY) as user:
        assert user('tap("lan", "ten0")') == "=0"
        user("give()")
        user(f"control(OWNER, {owner})")
        said = user('hook("up", "ten0", "", "")')
        assert said.startswith("=77") and "its right has ended" in said, said
        # An up that fails leaves the mark, without which it would be a tap of root's making.
        assert " made=1" in lan.netns.link("ten0")["ifalias"]


def gone(lan: Lan, tap: str) -> bool:
    """Tell whether the agent takes a tap away, in reasonable time."""
    end = time.monotonic() + 40
    while tap in lan.netns.links():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def persistent(user: Holder, tap: str = "ten0", queues: int = 1) -> None:
    """Have the user get a tap, and keep it from going with its process."""
    assert user(f'tap("lan", {tap!r}, {queues})') == "=0"
    assert user("control(PERSIST, 1)") == 0


@pytest.mark.parametrize("trick", ["", "control(OWNER, os.getuid())", "control(CARRIER, bytes(4))"])
def test_a_persistent_tap_goes_with_its_process(lan: Lan, trick: str) -> None:
    """The attack that was seen: it was opened again, after its user was out of `users`."""
    with lan.holder(NOBODY) as user:
        persistent(user)
        assert lan.reaches(user)
        assert not trick or user(trick) == 0
    lan.allow(str(OTHER))
    assert gone(lan, "ten0")
    with lan.holder(NOBODY) as again:
        assert again('open_it("ten0")') == DENIED


def test_a_tap_that_another_user_has_by_now_goes(lan: Lan) -> None:
    """Neither is it for the other, nor does it stay when the first has ended without closing it."""
    with lan.holder(OTHER) as other:
        other("listen()")
        with lan.holder(NOBODY) as user:
            persistent(user)
            user("pass_on()")
            other("fetch()")
            assert lan.reaches(other)
        assert gone(lan, "ten0")
        assert not lan.reaches(other)


def test_a_tap_that_the_user_still_holds_stays(lan: Lan) -> None:
    """As `run` under -daemonize: the process of the mark has ended, its child has the tap."""
    with lan.holder(NOBODY) as user:
        persistent(user)
        pid = user("give()")
        assert f" pid={pid} " not in lan.netns.link("ten0")["ifalias"]
        found = lan.hooks.ctl_json("gc")
        assert found["removed"] == []
        assert lan.agent is not None
        # Its own look, too, which a change of the link brings on.
        lan.netns.ip("link", "set", "dev", "ten0", "down")
        lan.netns.ip("link", "set", "dev", "ten0", "up")
        time.sleep(1.5)
        assert lan.reaches(user)
    assert gone(lan, "ten0")


def test_gc_does_it_without_an_agent(lan: Lan) -> None:
    assert lan.agent is not None
    with lan.holder(OTHER) as other:
        other("listen()")
        with lan.holder(NOBODY) as user:
            persistent(user, "ten0")
            user("close()")
            persistent(user, "ten1")
            user("pass_on()")
            other("fetch()")
            os.kill(lan.agent.pid, signal.SIGSTOP)
            assert lan.hooks.ctl_json("gc")["removed"] == [], "its process lives"
            pid = user.process.pid
        before = lan.netns.links().keys()
        told = lan.hooks.ctl("gc", "--dry-run").stdout
        assert told.startswith(
            f"would remove ten0 from br0: its process {pid} has ended, and nobody holds it\n"
            f"would remove ten1 from br0: its process {pid} has ended, and process "
            f"{other.process.pid} of user {OTHER}, not of user {NOBODY} holds it\n"
        ), told
        assert lan.netns.links().keys() == before
        assert [each["tap"] for each in lan.hooks.ctl_json("gc")["removed"]] == ["ten0", "ten1"]
        assert not {"ten0", "ten1"} & lan.netns.links().keys()
        assert lan.hooks.ctl_json("gc")["removed"] == []
    os.kill(lan.agent.pid, signal.SIGCONT)


def test_a_tap_that_root_gave_a_user_is_detached_and_stays(lan: Lan) -> None:
    lan.netns.ip("tuntap", "add", "dev", "own0", "mode", "tap", "user", "nobody")
    with lan.holder(NOBODY) as user:
        assert user('open_it("own0")') is None
        assert user('hook("up", "own0", "", "")').startswith("=0")
        assert lan.reaches(user)
        user.kill()
    end = time.monotonic() + 40
    while "master" in lan.netns.link("own0"):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not lan.netns.link("own0").get("ifalias")
    with lan.holder(NOBODY) as again:
        assert again('open_it("own0")') is None
        assert not lan.reaches(again)
    lan.netns.ip("link", "del", "own0")


def told(lan: Lan, why: str, command: str) -> None:
    """Assert that status and doctor call the tap by name, and say what mends it."""
    (row,) = lan.hooks.ctl_json("status")["taps"]
    assert (row["tap"], row["state"]) == ("ten0", "differs")
    (right,) = [each for each in row["differences"] if each["setting"] == "right"]
    assert right["is"] == "ended" and right["because"].startswith(why), right
    assert f"mend it: {command}" in " ".join(lan.hooks.ctl("status").stdout.split())
    done = lan.hooks.ctl("doctor", "--json")
    (found,) = [e for e in json.loads(done.stdout)["findings"] if e["check"] == "tap-right"]
    assert done.returncode == 1
    assert found["what"].startswith(f"the tap ten0 has no right to br0 any more: {why}")
    assert found["command"] == command


def test_what_the_policy_denies_by_now_is_told_and_cut(lan: Lan) -> None:
    """Whoever holds it, and wherever: from another network namespace it was no guest of apply's."""
    with lan.holder(NOBODY) as user:
        persistent(user)
        assert user("__import__('ctypes').CDLL(None).unshare(0x50000000)") == 0
        user("give()")
        lan.allow(str(OTHER))
        assert lan.reaches(user)
        told(lan, "user nobody may not use network lan: ", "pyqemu-ifctl apply --cut ten0")
        done = lan.hooks.ctl("apply")
        assert (done.returncode, done.stdout) == (77, "1 tap denied\n")
        assert done.stderr.startswith(
            "pyqemu-ifctl: ten0: user nobody may not use network lan; it is left as it is, on br0: "
        ), done.stderr
        assert "cut it off: pyqemu-ifctl apply --cut ten0; " in done.stderr
        done = lan.hooks.ctl("apply", "--dry-run", "--cut")
        assert (done.returncode, done.stdout) == (0, "1 tap would be cut off\n")
        (row,) = lan.hooks.ctl_json("apply", "--dry-run", "--cut")["taps"]
        assert (row["result"], row["commands"]) == ("would cut", ["ip link set dev ten0 down"])
        assert lan.reaches(user)
        done = lan.hooks.ctl("apply", "--cut")
        assert (done.returncode, done.stdout) == (0, "1 tap cut off\n")
        assert "ten0: cut off, its link is down: user nobody may not" in done.stderr
        assert not lan.reaches(user)
        assert lan.hooks.ctl("apply").returncode == 77
        (row,) = lan.hooks.ctl_json("apply", "--cut")["taps"]
        assert row["result"] == "cut"
        lan.allow("nobody")
        assert lan.hooks.ctl("apply").returncode == 0
        assert lan.reaches(user)


def test_apply_deals_with_a_tap_that_nobody_holds(lan: Lan) -> None:
    assert lan.agent is not None
    with lan.holder(NOBODY) as user:
        persistent(user)
        os.kill(lan.agent.pid, signal.SIGSTOP)
    lan.hooks.agent_pid = 0
    assert lan.hooks.ctl("apply").stdout == "1 tap as the policy says\n"
    lan.allow(str(OTHER))
    done = lan.hooks.ctl("apply")
    assert (done.returncode, done.stdout) == (77, "1 tap denied\n")
    told(lan, "its process ", "pyqemu-ifctl gc ten0")
    lan.hooks.ctl("gc", "ten0")
    assert "ten0" not in lan.netns.links()
    os.kill(lan.agent.pid, signal.SIGCONT)


def test_apply_cuts_a_tap_whose_holder_gave_it_away(lan: Lan) -> None:
    with lan.holder(NOBODY) as user:
        assert user('tap("lan", "ten0")') == "=0"
        assert user(f"control(OWNER, {OTHER})") == 0
        told(lan, "its right has ended: whoever held it", "pyqemu-ifctl apply --cut ten0")
        done = lan.hooks.ctl("apply")
        assert (done.returncode, done.stdout) == (77, "1 tap denied\n")
        assert f"whoever held it has given it to user {OTHER}, and it was root's" in done.stderr
        assert lan.hooks.ctl("apply", "--cut").stdout == "1 tap cut off\n"
        assert not lan.reaches(user)


def test_a_tap_that_is_given_away_is_not_brought_back(lan: Lan) -> None:
    """When its bridge has lost it: the other user could open it again there."""
    with lan.holder(NOBODY) as user, lan.holder(OTHER) as other:
        assert user('tap("lan", "ten0")') == "=0"
        assert user(f"control(OWNER, {OTHER})") == 0
        assert other('tap("lan", "ten1")') == "=0"
        for name in ("ten0", "ten1"):
            lan.netns.ip("link", "set", "dev", name, "nomaster")
        # A bridge that comes makes it look at everything.
        lan.netns.add_bridge("br9")
        end = time.monotonic() + 40
        while "master" not in lan.netns.link("ten1"):
            assert time.monotonic() < end, "nothing is brought back"
            time.sleep(0.1)
        assert "master" not in lan.netns.link("ten0")
    lan.netns.ip("link", "del", "br9")


def test_a_guest_of_root_s_does_not_become_the_user_s_own(lan: Lan) -> None:
    """A QEMU under -runas, taken over: it gives its tap to the user, who may use the network."""
    with lan.holder(0) as qemu:
        qemu("open_it('t0')")
        env = {**lan.hooks.environ(), "PYQEMU_IFUP_POLICY": str(lan.hooks.policy)}
        assert qemu(f"os.spawnve(os.P_WAIT, {lan.hooks.ifup!r}, ['ifup', 't0'], {env!r})") == 0
        mark = lan.netns.link("t0")["ifalias"]
        qemu(f"os.setresuid({NOBODY}, {NOBODY}, {NOBODY})")
        assert qemu(f"control(OWNER, {NOBODY})") == 0
        said = qemu('hook("up", "t0", "", "")')
        assert said.startswith("=77") and "root's tap" in said, said
        assert lan.netns.link("t0")["ifalias"] == mark
