"""Any local user opens a tap of root's, which the kernel lets everybody where it has no owner.

It takes a /dev/net/tun that everybody may open, as most hosts have it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.holder import Holder, tun_for_all
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.public import NOBODY, as_user, public_folder, python
from lab.taps import frame, mac
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup import taps as taps_module
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.drivers.tun import set_owner
from pyqemu_ifup.hook import read_tap_name
from pyqemu_ifup.taps import ATTEMPTS, close_all, open_taps

QUEUE, PLAIN = 0x1102, 0x1002
DENIED = "Operation not permitted"
ALONE, AGENT = "alone", "agent"
each_way = pytest.mark.parametrize("lan", [ALONE, AGENT], indirect=True)


@dataclass
class Lan:
    """Root's network `lan` on br0, open to nobody else, and a user who is in no policy."""

    netns: Namespace
    hooks: Hooks
    nobody: Holder
    env: dict[str, str]
    """The environment of that user's processes."""

    def opens(self, tap: str, flags: int) -> bool:
        """Tell whether the user opens the tap; the only other answer is the kernel's no."""
        answer = self.nobody(f"open_it({tap!r}, {flags})")
        assert answer in (None, DENIED), answer
        return answer is None

    def owner(self, tap: str) -> str | None:
        """Return the name of the user whom the tap is, None where it is nobody's."""
        owner = self.netns.link(tap)["linkinfo"]["info_data"].get("user")
        assert owner is None or isinstance(owner, str)
        return owner


@pytest.fixture
def lan(request: pytest.FixtureRequest, netns: Namespace) -> Iterator[Lan]:
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    with public_folder() as folder:
        hooks = Hooks(folder / "bin", netns=netns.name)
        rules = [{"tap": "*", "network": "lan"}]
        hooks.write_policy(
            json.dumps({"version": 1, "networks": {"lan": {"bridge": "br0"}}, "rules": rules})
        )
        env = {"TUN": tun_for_all(folder), "HOME": "/"}
        with Holder(netns, NOBODY, env) as nobody:
            if getattr(request, "param", ALONE) == ALONE:
                yield Lan(netns, hooks, nobody, env)
            else:
                with Agent(netns, Path(hooks.policy)) as agent:
                    hooks.agent = agent.path
                    yield Lan(netns, hooks, nobody, env)
    netns.ip("link", "del", "br0")


@each_way
def test_nobody_adds_a_queue_to_a_tap_of_root_s(lan: Lan) -> None:
    """QEMU opens its first queue, calls the hook, and opens the others."""
    lan.netns.tap("t0", multi_queue=True)
    done = lan.hooks.up("t0")
    assert (done.returncode, done.stderr) == (0, "")
    assert not lan.opens("t0", QUEUE)
    assert lan.owner("t0") == "root"
    more = lan.netns.tap("t0", multi_queue=True)
    more.send(frame(mac(9), payload=b"the guest's"))
    assert lan.netns.link("t0")["linkinfo"]["info_data"]["numqueues"] == 2
    assert lan.hooks.up("t0").returncode == 0


@pytest.mark.parametrize(("lan", "owner"), [(ALONE, None), (AGENT, 0)], indirect=["lan"])
def test_who_has_a_queue_before_the_hook_comes_is_found(lan: Lan, owner: int | None) -> None:
    """And hides it by what root would have set."""
    lan.netns.tap("t0", multi_queue=True)
    assert lan.opens("t0", QUEUE)
    assert owner is None or lan.nobody(f"control(OWNER, {owner})") == 0
    done = lan.hooks.up("t0")
    assert done.returncode == 77 and "in other hands" in done.stderr, done.stderr
    assert "master" not in lan.netns.link("t0") and "UP" not in lan.netns.link("t0")["flags"]
    lan.nobody("close()")


def test_a_guest_that_runs_is_told_from_who_has_joined_it(lan: Lan) -> None:
    """By a hook that a person calls, and by apply, which gives an owner to what has none yet."""
    with Holder(lan.netns, 0, {"TUN": "/dev/net/tun"}) as guest:
        for _ in range(2):
            guest(f"open_it('t0', {QUEUE})")
        done = lan.hooks.up("t0")
        assert (done.returncode, done.stderr) == (0, "")
        # As an older version has left one.
        mark = lan.netns.link("t0")["ifalias"]
        guest(f"open_it('t1', {QUEUE})")
        lan.netns.ip("link", "set", "t1", "master", "br0", "alias", mark, "up")
        assert lan.hooks.ctl("apply", "--dry-run", "t1").returncode == 0
        assert lan.owner("t1") is None
        assert lan.hooks.ctl("apply", "t1").returncode == 0
        assert lan.owner("t1") == "root" and not lan.opens("t1", QUEUE)
        for tap in ("t2", "t3"):
            guest(f"open_it({tap!r}, {QUEUE})")
            assert lan.opens(tap, QUEUE)
        assert lan.hooks.up("t2").returncode == 77
        assert lan.hooks.ctl("apply", "t3").returncode == 77
        lan.nobody("close()")
        assert "master" not in lan.netns.link("t3")


@pytest.mark.parametrize(("lan", "held"), [(ALONE, False), (AGENT, True)], indirect=["lan"])
def test_nobody_opens_a_persistent_tap_of_root_s(lan: Lan, held: bool) -> None:
    """Neither before its QEMU does nor after that has ended, and is still on the bridge."""
    tap = lan.netns.tap("t0", persist=True)
    if held:
        # As QEMU starts it, with the tap's descriptor.
        argv, env = [lan.hooks.ifup, "t0"], lan.hooks.environ()
        with lan.netns.popen(argv, env=env, pass_fds=[tap.fd]) as hook:
            assert hook.communicate(timeout=60) == ("", "")
    else:
        tap.close()
        assert lan.hooks.up("t0").stderr == ""
    assert lan.owner("t0") == "root" and lan.netns.link("t0")["master"] == "br0"
    tap.close()
    assert not lan.opens("t0", PLAIN)
    again = lan.netns.tap("t0", persist=True)
    again.send(frame(mac(9), payload=b"the guest's"))
    lan.hooks.down("t0")
    again.set_persist(False)


def test_a_tap_that_a_group_may_open_stays_its(lan: Lan) -> None:
    lan.netns.ip("tuntap", "add", "t0", "mode", "tap", "group", "3")
    assert lan.hooks.up("t0").returncode == 0
    assert lan.owner("t0") is None
    lan.netns.ip("link", "del", "t0")


SPIN = """
import fcntl, os, struct
request = struct.pack("16sH22x", b"web0", 0x1102)
print("spins", flush=True)
while True:
    descriptor = os.open(os.environ["TUN"], os.O_RDWR)
    try:
        while True:
            try:
                fcntl.ioctl(descriptor, 0x400454CA, request)
                break
            except OSError:
                continue
        fcntl.ioctl(descriptor, 0x400454CB, 1)
        print("opened", flush=True)
    except OSError:
        os.close(descriptor)
"""


def test_nobody_is_there_before_us_when_we_make_a_tap(lan: Lan) -> None:
    """Who opens its name again and again gets no queue, so that it is not taken either."""
    argv = [*as_user(NOBODY), python(), "-I", "-c", SPIN]
    tries = [lan.netns.popen(argv, env=lan.env) for _ in range(2)]
    try:
        for each in tries:
            assert each.stdout is not None and each.stdout.readline() == "spins\n"
        with lan.netns.enter(), Netlink() as kernel:
            for _ in range(20):
                name, taps = open_taps(kernel, "web0", 3, False)
                queues = lan.netns.link("web0")["linkinfo"]["info_data"]["numqueues"]
                close_all(taps)
                assert (name, queues) == ("web0", 3)
    finally:
        for each in tries:
            each.kill()
            assert each.communicate()[0] == ""
    assert "web0" not in lan.netns.links()


@pytest.mark.parametrize("times", [1, ATTEMPTS])
def test_a_tap_that_somebody_else_has_opened_is_deleted(
    lan: Lan, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And made anew: the name is not blocked by one that the other keeps from going."""
    won: list[str | None] = []

    def set_owner_late(descriptor: int, uid: int) -> None:
        if len(won) < times:
            won.append(read_tap_name(descriptor))
            assert lan.opens(won[-1] or "", QUEUE)
            lan.nobody("control(PERSIST, 1)")
            lan.nobody("close()")
        set_owner(descriptor, uid)

    monkeypatch.setattr(taps_module, "set_owner", set_owner_late)
    with lan.netns.enter(), Netlink() as kernel:
        before = lan.netns.links().keys()
        if times < ATTEMPTS:
            name, taps = open_taps(kernel, "web%d", 2, False)
            assert name == "web0" and lan.owner("web0") == "root"
            close_all(taps)
        else:
            with pytest.raises(Failure) as caught:
                open_taps(kernel, "web%d", 2, False)
            assert caught.value.status is Status.TRY_AGAIN
        assert lan.netns.links().keys() == before
