"""A user of a network asks for what is not his: names, settings, and what others' pids stand for.

Each is asked of the real agent, by processes of that user's.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.agent import Agent
from lab.clinic import until
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.pids import reuse_pid
from lab.public import NOBODY, as_user, publish, python
from lab.qemu import Qemu

ASK = """\
import array, json, os, socket, subprocess, sys

def ask(descriptor, *fields):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(os.environ["PYQEMU_IFUP_SOCKET"])
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    connection.sendmsg([b"\\0".join(map(os.fsencode, ["pyqemu-ifup/1", *fields]))], rights)
    packets, held = [], []
    while True:
        data, more, _, _ = socket.recv_fds(connection, 65536, 8)
        packets.append(os.fsdecode(data))
        held += more
        if data[:1] in (b"=", b"?", b""):
            return packets, held

# Each argument is a request for a tap: network and name, with a colon between; with another
# behind it, the tap is brought up by the rules too, and how its port is comes last.
said = []
place = os.open("/proc/self/ns/net", os.O_RDONLY)
for word in sys.argv[1:]:
    network, name, *more = word.split(":")
    packets, held = ask(place, "tap", network, name, "1", "", "")
    if more and held:
        # NOTE: by a child, as a QEMU has it done that has the tap.
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, json.dumps(ask(held[0], "up", name, "", "")[0]).encode())
            os._exit(0)
        os.wait()
        packets = json.loads(os.read(read, 65536))
        packets.append(subprocess.check_output(
            ["bridge", "-d", "-j", "link", "show", "dev", name], text=True))
    said.append([word, packets])
    for each in held:
        os.close(each)
print(json.dumps(said))
"""

OTHERS = [
    "wg0", "docker0", "ens9", "virbr0-nic", "eth0", "lo", "br0", "all", "tap0", "web0", "hers.0",
    "ten", "ten01", "ten-1", "tenX", "xten0",
]  # fmt: skip
HOSTILE = [
    "--help", "-rf", "$(id)", ";touch${IFS}x;", "a;b", "`id`", "a&b", "|sh", ">x", "'", '"', "\\",
    "~root", "!1", "#x", "*", "?", "[a]", "{a,b}", ".ten0", "_ten0", "ten0;", "ten0$", "a=b", "%d",
    "ten%d",
]  # fmt: skip

NETWORKS: dict[str, dict[str, Any]] = {
    "lan": {"bridge": "br0", "users": ["nobody"], "tap_name": "ten%d", "isolated": True},
    "web": {"bridge": "br0", "users": ["root"], "tap_name": "web%d"},
    "plain": {"bridge": "br0", "users": ["nobody"]},
}
VMS = {
    "mine": {"users": ["nobody"], "nics": [{"network": "lan", "tap": "mine.0", "txqueuelen": 77}]},
    "hers": {"users": ["root"], "nics": [{"network": "lan", "tap": "hers.0"}]},
    "odd": {"nics": [{"network": "lan", "tap": "a;b"}]},
}


@dataclass
class Host:
    """A namespace with the bridge br0 and an agent; `tun` is a /dev/net/tun for everybody."""

    netns: Namespace
    agent: Agent
    hooks: Hooks
    tun: Path

    def env(self) -> dict[str, str]:
        """Return the environment of callers."""
        return {**self.hooks.environ(), "HOME": "/"}

    def taps(self) -> dict[str, Any]:
        """Return all taps by name."""
        return {
            name: link
            for name, link in self.netns.links().items()
            if link.get("linkinfo", {}).get("info_kind") == "tun"
        }

    def ask_for(self, *words: str) -> dict[str, list[str]]:
        """Ask for taps, each NETWORK:NAME, as nobody; return what the agent answers to each."""
        code = [*as_user(NOBODY), python(), "-I", "-c", ASK, *words]
        return dict(json.loads(self.netns.run(code, env=self.env()).stdout))

    def qemu(self, *args: str, tap: str) -> Qemu:
        """Start a QEMU of nobody's that has our hook called for `tap`."""
        mount = f'mount --bind {self.tun} /dev/net/tun && exec "$@"'
        prefix = ["unshare", "-m", "sh", "-c", mount, "sh", *as_user(NOBODY)]
        netdev = f"tap,id=n,ifname={tap},script={self.hooks.ifup},downscript={self.hooks.ifdown}"
        return Qemu(
            *args,
            "-netdev",
            netdev,
            netns=self.netns.name,
            prefix=prefix,
            env=self.env(),
            machine="none",
        )


def write_policy(path: Path, rules: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(
        {"version": 1, "networks": NETWORKS, "rules": rules, "vms": VMS}))  # fmt: skip
    path.chmod(0o644)


@pytest.fixture
def host(netns: Namespace, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host; the test's parameter may have the policy's `rules`, and what an Agent does `before`.

    Without rules, every tap is lan's.
    """
    more = getattr(request, "param", {})
    require("qemu")
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    policy = tmp_path / "policy.yaml"
    write_policy(policy, more.get("rules", [{"tap": "*", "network": "lan"}]))
    with Agent(netns, policy, users=True, before=more.get("before", "")) as agent:
        hooks = publish(Hooks(agent.folder / "bin", agent=agent.path), agent.folder)
        node = agent.folder / "tun"
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(10, 200))
        node.chmod(0o666)
        yield Host(netns, agent, hooks, node)
    netns.ip("link", "del", "br0")


def test_a_user_gets_no_name_but_those_of_the_network(host: Host) -> None:
    """Another's name is root's to give, and none that is granted means anything to a shell."""
    answers = host.ask_for(*(f"lan:{name}" for name in [*OTHERS, *HOSTILE]))
    granted = {word for word, packets in answers.items() if packets[-1] == "=0"}
    assert granted == set()
    for name in OTHERS:
        assert answers[f"lan:{name}"][-1] == "=77", answers
    for name in HOSTILE:
        assert answers[f"lan:{name}"][-1] in ("=77", "=64"), answers
    own = host.ask_for("lan:ten0", "lan:ten12", "lan:mine.0", "lan:", "plain:tap0", "plain:")
    assert [packets[-1] for packets in own.values()] == ["=0"] * 6, own
    assert host.taps() == {}


SAID = [
    {"vm": "mgmt*", "network": "lan", "isolated": False},
    {"netdev": "n", "tap": "*", "network": "lan", "isolated": False},
    {"tap": "ten*", "network": "lan", "isolated": False},
    {"user": "nobody", "tap": "theirs*", "network": "lan", "isolated": False},
    {"tap": "roots*", "network": "lan", "isolated": False},
    {"tap": "*", "network": "lan"},
]


@pytest.mark.parametrize("host", [{"rules": SAID}], indirect=True, ids=["rules"])
def test_what_a_user_makes_up_changes_no_settings(host: Host) -> None:
    """The network isolates its ports: neither a QEMU's own words nor a tap of ours undo that."""
    for name, isolated in (("own0", True), ("theirs0", False), ("roots0", False)):
        host.netns.ip("tuntap", "add", "dev", name, "mode", "tap", "user", "nobody")
        with host.qemu("-name", "mgmt1", tap=name) as qemu:
            assert qemu.greeting
            link = host.netns.link(name)
            assert link["master"] == "br0"
            assert link["linkinfo"]["info_slave_data"]["isolated"] is isolated, name
            assert qemu.quit() == 0
        host.netns.ip("link", "del", name)
    ((_, (*_, end, port)),) = host.ask_for("lan:ten0:up").items()
    assert (end, json.loads(port)[0]["isolated"]) == ("=0", True)


ANOTHER = 65533
"""Somebody whose process comes to have the pid of one of nobody's."""

LEAVES_ITS_CHILD = """\
import array, os, socket, sys
# Connects, and leaves it to its child to ask for a tap for this process, which ends.
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(os.environ["PYQEMU_IFUP_SOCKET"])
if os.fork():
    os._exit(0)
place = os.open("/proc/self/ns/net", os.O_RDONLY)
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [place]))]
fields = ["pyqemu-ifup/1", "tap", "lan", "ten0", "1", "", ""]
connection.sendmsg([b"\\0".join(map(os.fsencode, fields))], rights)
while packet := connection.recv(65536):
    print(os.fsdecode(packet), flush=True)
    if packet[:1] == b"=":
        sys.stdin.read()
        break
"""

ASKS_BY_ITS_CHILD = """\
import array, os, socket, sys, time
# Its child, which holds own0, asks for it for this process, and does not hang up.
if os.fork():
    time.sleep(60)
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(os.environ["PYQEMU_IFUP_SOCKET"])
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [int(sys.argv[1])]))]
fields = ["pyqemu-ifup/1", "up", "own0", "", ""]
connection.sendmsg([b"\\0".join(map(os.fsencode, fields))], rights)
while packet := connection.recv(65536):
    print(os.fsdecode(packet), flush=True)
    if packet[:1] == b"=":
        break
"""

SLOW_DIRECTORY = """
import os, pwd, time
folder = os.path.dirname(sys.argv[sys.argv.index("--socket") + 1])
real = pwd.getpwuid
def getpwuid(uid):
    open(folder + "/asked", "w").close()
    while os.path.exists(folder + "/hold"):
        time.sleep(0.01)
    return real(uid)
pwd.getpwuid = getpwuid
"""


SLOW = {"before": SLOW_DIRECTORY}


def test_a_client_whose_pid_is_another_s_gets_no_tap(host: Host) -> None:
    """Its mark would be as good as the other's process, and go with that one only."""
    words = [*as_user(NOBODY), python(), "-I", "-c", LEAVES_ITS_CHILD]
    os.kill(host.agent.pid, signal.SIGSTOP)
    try:
        client = host.netns.popen(words, env=host.env(), stdin=subprocess.PIPE)
        client.wait(timeout=30)
        other = reuse_pid(client.pid, ["sleep", "60"], user=ANOTHER)
    finally:
        os.kill(host.agent.pid, signal.SIGCONT)
    with client, other:
        assert client.stdout is not None and client.stdin is not None
        said: list[str] = []
        while not said or said[-1][:1] != "=":
            said.append(client.stdout.readline().strip())
        taps = host.taps()
        client.stdin.close()
        other.kill()
    assert taps == {}
    assert said[-1] == "=75" and "stopped: the client has ended" in said[-2], said


@pytest.mark.parametrize("host", [SLOW], indirect=True, ids=["slow"])
def test_a_parent_whose_pid_is_another_s_has_no_tap_attached(host: Host) -> None:
    """It was there when the request came, and is gone when its turn comes."""
    hold, asked = host.agent.folder / "hold", host.agent.folder / "asked"
    hold.touch()
    tap = host.netns.tap("own0")
    tap.set_owner(NOBODY)
    words = [*as_user(NOBODY), python(), "-I", "-c", ASKS_BY_ITS_CHILD, str(tap.fd)]
    parent = host.netns.popen(words, env=host.env(), pass_fds=[tap.fd])
    until(asked.exists, "nobody is asked for")
    parent.kill()
    parent.wait(timeout=30)
    other = reuse_pid(parent.pid, ["sleep", "60"], user=ANOTHER)
    with parent, other:
        hold.unlink()
        said, _ = parent.communicate(timeout=30)
        link = host.netns.link("own0")
        other.kill()
    tap.close()
    assert ("master" in link, "ifalias" in link) == (False, False), (said, link)
    assert said.splitlines()[-1] == "=75"
    assert f"stopped: the calling process {parent.pid} has ended" in said
