"""Three callers whose way is not the plain one: each comes to the right end, on the real thing.

A down under -runas has lost its privilege; under -daemonize a tap of `run`'s goes on under another
pid; the root of a container is none of the host's. The programs find the agents where they are on
any host, in /run/pyqemu-ifup.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lab.agent import Agent
from lab.calls import Syslog
from lab.hooks import Hooks
from lab.needs import lack, require
from lab.netns import Namespace, entered
from lab.ovs import OpenVSwitch
from lab.public import NOBODY, as_user, public_folder, publish
from lab.qemu import Qemu, end_daemon

PATIENCE = 40.0
SOON = "import pyqemu_ifd.reconcile; pyqemu_ifd.reconcile.ENDS = 0.5"
"""An agent that looks at taps' processes more often."""
ROOT, USERS = "agent.sock", "users.sock"
DEVICES = {"null": (1, 3), "zero": (1, 5), "random": (1, 8), "urandom": (1, 9), "tun": (10, 200)}
AS_ON_A_HOST = """\
mount --bind "$0/dev" /dev
mount --bind "$0/etc" /etc
mount --bind "$0/run" /run/pyqemu-ifup
exec "$@"
"""
"""Everybody may open /dev/net/tun there, /dev/log is the test's, and /run/pyqemu-ifup too."""


@dataclass
class Host:
    """A host with br0 and br-int, its programs, and those agents that serve there."""

    netns: Namespace
    folder: Path
    log: Syslog
    hooks: Hooks
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)
    was_late: bool = False

    @contextmanager
    def serving(self, *sockets: str, before: str = "") -> Iterator[list[Agent]]:
        """Have those agents serve whose sockets are named, where the programs look for them."""
        with ExitStack() as stack:
            agents = []
            for name in sockets:
                agent = Agent(self.netns, self.hooks.policy, users=name == USERS, before=before)
                agent.wrapper = self.prefix
                agents.append(stack.enter_context(agent))
                (self.folder / "run" / name).symlink_to(agent.path)
            yield agents

    @property
    def prefix(self) -> list[str]:
        """The command that executes another on this host."""
        return ["unshare", "-m", "sh", "-euc", AS_ON_A_HOST, str(self.folder)]

    def env(self, *, alone: bool = False) -> dict[str, str]:
        """Return the environment of programs; `alone`: of those that ask no agent."""
        if alone:
            return {**self.hooks.environ(), "HOME": "/"}
        left_out = ("PYQEMU_IFUP_SOCKET", "PYQEMU_IFUP_POLICY")
        return {key: it for key, it in os.environ.items() if key not in left_out} | {"HOME": "/"}

    def qemu(self, *args: str, prefix: Sequence[str], **others: Any) -> Qemu:
        """Start QEMU on this host."""
        return Qemu(*args, netns=self.netns.name, prefix=[*self.prefix, *prefix], **others)

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run pyqemu-ifctl as root."""
        program = str(self.hooks.folder / "pyqemu-ifctl")
        env = {**self.env(), "PYQEMU_IFUP_POLICY": str(self.hooks.policy)}
        return self.netns.run([*self.prefix, program, *words], env=env, check=False)

    def gc(self) -> list[str]:
        """Run gc, until it has had the time for all; return the taps that the last has dealt with.

        `was_late`: there was another before, which has not said what it has dealt with.
        """
        self.was_late = False
        for _ in range(6):
            done = self.ctl("gc", "--json")
            if done.returncode != 75:
                break
            self.was_late = True
        assert done.returncode == 0, done.stderr
        return [each["tap"] for each in json.loads(done.stdout)["removed"]]

    def is_loose(self, tap: str) -> bool:
        """Tell whether a tap is there, down, on no bridge and without our mark."""
        return is_loose(self.netns.link(tap))


def is_loose(link: dict[str, Any]) -> bool:
    return "master" not in link and not link.get("ifalias") and "UP" not in link["flags"]


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def host(netns: Namespace, tmp_path: Path) -> Iterator[Host]:
    """The host without an agent, and without Open vSwitch; everybody's network is lan."""
    require("qemu")
    os.makedirs("/run/pyqemu-ifup", exist_ok=True)
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    log = Syslog(tmp_path)
    with public_folder() as folder:
        for name in ("run", "dev/net", "etc/pyqemu-ifup"):
            (folder / name).mkdir(parents=True)
        for name, numbers in DEVICES.items():
            node = folder / "dev" / ("net/tun" if name == "tun" else name)
            os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(*numbers))
            node.chmod(0o666)
        (folder / "dev" / "log").symlink_to(log.path)
        for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
            if os.path.exists(f"/etc/{name}"):
                shutil.copy(f"/etc/{name}", folder / "etc")
        hooks = publish(Hooks(folder / "bin", netns=netns.name), folder)
        place = Host(netns, folder, log, hooks)
        place.networks["lan"] = {"bridge": "br0", "users": ["nobody"], "max_taps": 1}
        write_policy(place, hooks.policy)
        yield place
    log.close()
    netns.ip("link", "del", "br0")


def write_policy(host: Host, path: Path) -> None:
    rules = [{"tap": f"{name}*", "network": name} for name in host.networks]
    text = json.dumps({"version": 1, "networks": host.networks, "rules": rules})
    path.write_text(text)
    path.chmod(0o644)


@pytest.fixture
def both(ovs: OpenVSwitch, host: Host) -> Iterator[Host]:
    """The same with Open vSwitch, and the network int on it."""
    ovs.add_bridge("br-int", hwaddr="02:00:00:00:00:09", mtu=1500)
    host.networks["int"] = {
        "bridge": "br-int",
        "ovsdb": ovs.db,
        "vlan": 100,
        "users": ["nobody"],
        "tap_name": "int%d",
    }
    write_policy(host, host.hooks.policy)
    yield host
    ovs.vsctl("del-br", "br-int")


def has_gone(ovs: OpenVSwitch, port: str) -> bool:
    return ovs.find("Port", port) is None


@pytest.mark.parametrize(
    ("by", "sockets"), [("users", (ROOT, USERS)), ("root", (ROOT,)), ("gc", ())]
)
def test_a_down_under_runas(both: Host, ovs: OpenVSwitch, by: str, sockets: Sequence[str]) -> None:
    """It is done by the users' agent; else what it may not is left to root's, or to gc.

    So is the mark, which is root's word.
    """
    both.netns.ip("tuntap", "add", "dev", "lan0", "mode", "tap")
    scripts = f"script={both.hooks.ifup},downscript={both.hooks.ifdown}"
    words = ["-name", "web", "-runas", "nobody"]
    for tap in ("lan0", "int0"):
        words += ["-netdev", f"tap,id=n-{tap},ifname={tap},{scripts}"]
    with both.serving(*sockets, before=SOON) as agents:
        with both.qemu(*words, prefix=(), env=both.env(alone=not agents)) as qemu:
            assert qemu.greeting
            link = both.netns.link("lan0")
            assert (link["master"], ovs.row("Port", "int0")["tag"]) == ("br0", 100)
            assert " uid=" not in link["ifalias"]
            for agent in agents[:1]:
                assert agent.report()["requests"]["up"]["count"] == 2
                os.kill(agent.pid, signal.SIGSTOP)
            assert qemu.quit() == 0
            assert "failed with status" not in qemu.stderr
            assert "pyqemu-ifdown" not in qemu.stderr
        assert "int0" not in both.netns.links()
        told = [text for _, text in both.log.of("[") if "left to pyqemu-ifctl gc " in text]
        if by == "users":
            assert told == []
            left = both.netns.link("lan0")
            assert left.pop("ifalias") == link["ifalias"]
            assert is_loose(left) and has_gone(ovs, "int0")
        else:
            assert {text.split()[1] for text in told} == {"lan0:", "int0:"}, told
            assert all(text.startswith("pyqemu-ifdown[") for text in told), told
            assert both.netns.link("lan0")["master"] == "br0", "it could not"
            assert not has_gone(ovs, "int0"), "it could not"
        for agent in agents[:1]:
            os.kill(agent.pid, signal.SIGCONT)
            wait_until(lambda: both.is_loose("lan0") and has_gone(ovs, "int0"))
        dealt_with = set(both.gc())
        assert both.was_late or dealt_with == ({"lan0", "int0"} if by == "gc" else set())
        assert both.is_loose("lan0") and has_gone(ovs, "int0")
    both.netns.ip("link", "del", "lan0")


def test_a_tap_of_run_under_daemonize(both: Host, ovs: OpenVSwitch) -> None:
    """The process of its mark ends at once; who has it by now is the user still, and keeps it."""
    (both.folder / "pid").mkdir(mode=0o777)
    (both.folder / "pid").chmod(0o777)
    pidfile = both.folder / "pid" / "qemu"
    program = str(both.hooks.folder / "pyqemu-ifctl")
    run = [*as_user(NOBODY), program, "run", "--nic", "lan", "--nic", "int", "--"]
    words = ["-name", "web", "-daemonize", "-pidfile", str(pidfile)]
    with both.serving(ROOT, USERS) as (root, _):
        with both.qemu(*words, prefix=run, qmp=None, env=both.env()) as qemu:
            assert qemu.wait() == 0, qemu.stderr
            first = qemu.pid
        pid = int(pidfile.read_text())
        try:
            for tap in ("tap0", "int0"):
                mark = both.netns.link(tap)["ifalias"]
                assert f" pid={first} " in mark and f" uid={NOBODY} by=name made=1 " in mark
            assert pid != first
            mine = {tap: both.netns.link(tap)["ifindex"] for tap in ("tap0", "int0")}

            def stay() -> None:
                links = both.netns.links()
                assert {tap: links[tap]["ifindex"] for tap in mine} == mine
                assert links["tap0"]["master"] == "br0" and "UP" in links["tap0"]["flags"]
                assert not has_gone(ovs, "int0")

            assert both.gc() == []
            stay()
            # The agent's own look, which a change of the link brings on.
            for tap in mine:
                both.netns.ip("link", "set", "dev", tap, "down")
                both.netns.ip("link", "set", "dev", tap, "up")
            time.sleep(1.5)
            stay()
            # It counts as the user's, and is as it should be.
            done = both.netns.run([*both.prefix, *run, "true"], env=both.env(), check=False)
            assert done.returncode == 77 and "max_taps is 1" in done.stderr, done.stderr
            rows = json.loads(both.ctl("status", "--json").stdout)["taps"]
            assert {row["tap"]: row["state"] for row in rows} == dict.fromkeys(mine, "ok"), rows
            # A guest that runs: the agent brings it back.
            index = both.netns.link("br0")["ifindex"]
            both.netns.ip("link", "del", "br0")
            again = ["up", "index", str(index), "address", "02:00:00:00:00:01"]
            both.netns.ip("link", "add", "br0", *again, "type", "bridge")
            wait_until(lambda: both.netns.link("tap0").get("master") == "br0")
            wait_until(lambda: "UP" in both.netns.link("tap0")["flags"])
            stay()
            assert f" pid={first} " in both.netns.link("tap0")["ifalias"]
            # apply knows who has it by now, and the mark says so from then on.
            assert both.ctl("apply").returncode == 0
            for tap in mine:
                mark = both.netns.link(tap)["ifalias"]
                assert f" pid={pid} " in mark and f" uid={NOBODY} by=name made=1 " in mark
            assert both.ctl("apply").stdout == "2 taps as the policy says\n"
            assert both.gc() == []
            stay()
            assert root.report()["requests"].get("down") is None
        finally:
            end_daemon(pid, signal.SIGTERM)
        wait_until(lambda: not mine.keys() & both.netns.links().keys() and has_gone(ovs, "int0"))
        assert both.gc() == []


CONTAINER = """\
case $0 in
    fresh) mount -t tmpfs run /run ;;
    read-only) mount -t tmpfs -o ro run /run ;;
esac
ip link add br0 up type bridge
ip tuntap add dev lan0 mode tap
exec "$@"
"""


@pytest.mark.parametrize(
    ("uid", "run"), [(NOBODY, "of the host"), (NOBODY, "fresh"), (NOBODY, "read-only"),
                     (0, "of the host")],
)  # fmt: skip
def test_the_root_of_a_container(host: Host, uid: int, run: str) -> None:
    """It asks neither agent, or is told that it is not for it, and does the work itself."""
    if subprocess.run([*as_user(NOBODY), "unshare", "-Urnm", "true"]).returncode != 0:
        lack("no user namespace for an unprivileged user")
    host.networks["lan"] = {"bridge": "br0"}
    place = host.folder / "etc" / "pyqemu-ifup"
    write_policy(host, place / "policy.yaml")
    for path in (place, place / "policy.yaml"):
        os.chown(path, uid, uid)
    scripts = f"script={host.hooks.ifup},downscript={host.hooks.ifdown}"
    container = [*as_user(uid), "unshare", "-Urnm", "sh", "-euc", CONTAINER, run]
    env = {**host.env(), "PYQEMU_IFUP_DEBUG": "1"}
    words = ["-name", "web", "-netdev", f"tap,id=n,ifname=lan0,{scripts}"]
    with host.serving(ROOT, USERS) as agents:
        with host.qemu(*words, prefix=container, env=env) as qemu:
            assert qemu.greeting
            inside = os.open(f"/proc/{qemu.pid}/ns/net", os.O_RDONLY)
            try:
                link = link_in(inside)
                assert (link["master"], "UP" in link["flags"]) == ("br0", True)
                assert f"network=lan kind=linux bridge=br0 pid={qemu.pid} " in link["ifalias"]
                assert qemu.quit() == 0
                assert is_loose(link_in(inside))
            finally:
                os.close(inside)
            assert "failed with status" not in qemu.stderr
            told = [line for line in qemu.stderr.splitlines() if line.startswith("pyqemu-")]
            assert {line.split()[2] for line in told} == {"#", "ip", "echo"}, told
        for agent in agents:
            report = agent.report()
            assert report["refused"] == 0, report
            asked = {verb: it["count"] for verb, it in report["requests"].items()}
            assert not {"up", "down"} & {verb for verb, count in asked.items() if count}, report


def link_in(namespace: int) -> dict[str, Any]:
    """Return lan0 of the network namespace with this descriptor."""
    with entered(Path(f"/proc/self/fd/{namespace}")):
        words = ["ip", "-d", "-j", "link", "show", "dev", "lan0"]
        done = subprocess.run(words, capture_output=True, check=True)
    link: dict[str, Any] = json.loads(done.stdout)[0]
    return link
