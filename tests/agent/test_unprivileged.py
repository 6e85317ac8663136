"""A real QEMU without privilege, served by the real agent; and those whom the agent refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.agent import Agent
from lab.hooks import Hooks
from lab.needs import QEMU, require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import NOBODY, as_user, mute_directory, publish, python
from lab.qemu import Qemu
from pyqemu_ifconf.failure import Failure
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.entitled import check_owner

STRANGER = 65533
AS_NOBODY, AS_STRANGER = as_user(NOBODY), as_user(STRANGER)
BY_SHELL = ("sh", "-c", '"$0" "$@"; exit $?')

ASK = """\
import array, fcntl, os, socket, struct, sys
# The arguments are the request's fields; HELD is the tap, or the file, that comes with it.
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(os.environ["PYQEMU_IFUP_SOCKET"])
held = os.environ["HELD"]
if held.startswith("/"):
    descriptor = os.open(held, os.O_RDONLY)
else:
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH22x", held.encode(), 0x1002))
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
connection.sendmsg([b"\\0".join(map(os.fsencode, ["pyqemu-ifup/1", *sys.argv[1:]]))], rights)
while packet := connection.recv(65536):
    print(os.fsdecode(packet))
    if packet[:1] in (b"=", b"?"):
        break
"""


@dataclass
class Place:
    """A namespace with the bridge br0 and the users' agent, beside root's; `tun` is a
    /dev/net/tun for everybody."""

    netns: Namespace
    agent: Agent
    hooks: Hooks
    tun: Path

    @property
    def helper(self) -> str:
        """The path of our bridge helper."""
        return str(self.hooks.folder / "pyqemu-bridge-helper")

    def env(self) -> dict[str, str]:
        """Return the environment of callers."""
        return {**self.hooks.environ(), "HOME": "/"}

    def qemu(self, *args: str, prefix: Sequence[str] = AS_NOBODY, machine: str = "none") -> Qemu:
        """Start QEMU, as nobody."""
        return Qemu(*args, netns=self.netns.name, prefix=prefix, env=self.env(), machine=machine)

    def with_tun(self, prefix: Sequence[str]) -> list[str]:
        """Return `prefix`, in a mount namespace where everybody may open /dev/net/tun."""
        mount = f'mount --bind {self.tun} /dev/net/tun && exec "$@"'
        return ["unshare", "-m", "sh", "-c", mount, "sh", *prefix]

    def ask(self, *fields: str, held: str, parent: Sequence[str] = BY_SHELL) -> list[str]:
        """Ask the agent as a user does, with a tap or a file `held`; return what it answers.

        `parent` is the command that starts the asking program, none where that is its own parent.
        """
        code = [*parent, python(), "-I", "-c", ASK, *fields]
        words = [*self.with_tun(AS_NOBODY), *code]
        done = self.netns.run(words, env={**self.env(), "HELD": held})
        return done.stdout.splitlines()

    def run(
        self, *words: str, prefix: Sequence[str] = AS_NOBODY
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the programs to its end, as nobody."""
        program = str(self.hooks.folder / words[0])
        return self.netns.run([*prefix, program, *words[1:]], env=self.env(), check=False)

    def taps(self) -> set[str]:
        """Return the names of all taps."""
        return {
            name
            for name, link in self.netns.links().items()
            if link.get("linkinfo", {}).get("info_kind") == "tun"
        }


def write_policy(path: Path, networks: dict[str, dict[str, Any]], rules: list[Any]) -> None:
    path.write_text(json.dumps({"version": 1, "networks": networks, "rules": rules}))
    path.chmod(0o644)


PLAIN: dict[str, dict[str, Any]] = {
    "lan": {"bridge": "br0", "users": ["nobody"], "max_taps": 1},
    "db": {"bridge": "br0"},
}
RULES = [{"tap": "db*", "network": "db"}, {"tap": "*", "network": "lan"}]


@pytest.fixture
def place(netns: Namespace, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    """The bridge br0 with the networks lan, open to nobody, and db; and where the test asks for
    Open vSwitch, br-int with the network tagged, VLAN 100."""
    require("qemu")
    networks = dict(PLAIN)
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    if "ovs" in request.fixturenames:
        switch: OpenVSwitch = request.getfixturevalue("ovs")
        networks["tagged"] = {
            "bridge": "br-int", "ovsdb": switch.db, "vlan": 100, "users": ["nobody"],
            "tap_name": "ten%d",
        }  # fmt: skip
    policy = tmp_path / "policy.yaml"
    write_policy(policy, networks, RULES)
    with Agent(netns, policy, users=True) as agent, Agent(netns, policy):
        hooks = publish(Hooks(agent.folder / "bin", agent=agent.path), agent.folder)
        node = agent.folder / "tun"
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(10, 200))
        node.chmod(0o666)
        yield Place(netns, agent, hooks, node)
    netns.ip("link", "del", "br0")


@pytest.fixture
def tagged(ovs: OpenVSwitch, place: Place) -> Iterator[Place]:
    """The same with Open vSwitch."""
    ovs.add_bridge("br-int", hwaddr="02:00:00:00:00:09", mtu=1500)
    yield place
    ovs.vsctl("del-br", "br-int")


WAYS = {"directly": "{helper}", "by a shell": "{helper} --use-vnet"}


@pytest.mark.parametrize("nics", [1, 2])
def test_info_tells_no_fault_of_what_a_helper_brought(place: Place, nics: int) -> None:
    """QEMU names no such tap: of one it is clear which it is, of two it is not."""
    folder = place.agent.folder / "monitor"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    words = ["-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
    for number in range(nics):
        words += ["-netdev", f"tap,id=n{number},br=lan,helper={place.helper}"]
        words += ["-device", f"e1000,netdev=n{number},mac=52:54:00:00:00:0{number},romfile="]
    with place.qemu("-S", *words, machine="pc", prefix=()) as qemu:
        assert qemu.greeting
        done = place.run("pyqemu-ifctl", "info", "--json", prefix=())
        (guest,) = json.loads(done.stdout)["guests"]
        text = place.run("pyqemu-ifctl", "info", prefix=()).stdout
        assert [nic["faults"] for nic in guest["nics"] if nic["faults"]] == []
        assert "!" not in text
        told = [(nic["nic"] is not None, nic["tap"]) for nic in guest["nics"]]
        if nics == 1:
            assert told == [(True, "tap0")]
            assert guest["nics"][0]["host"]["bridge"] == "br0"
        else:
            assert told[:2] == [(True, None)] * 2
            assert sorted(told[2:]) == [(False, "tap0"), (False, "tap1")]
            assert text.count("    which tap it is on is not known\n") == 2
        assert qemu.quit() == 0


def test_two_by_helper_on_one_hub_are_refused(place: Place) -> None:
    """A helper knows no netdev: the tap may be any that a helper brings."""
    ends = ("-net", "nic", "-net", f"tap,br=br0,helper={place.helper}") * 2
    with place.qemu("-S", *ends, machine="pc") as qemu:
        assert qemu.wait() == 1
        assert "on one hub with a -net tap: QEMU's hub passes " in qemu.stderr
        assert "let root mend it" not in qemu.stderr, "the command line is the user's own"
    assert place.taps() == set()


def test_a_user_s_run_needs_the_agent(place: Place) -> None:
    gone = ("env", "PYQEMU_IFUP_SOCKET=/nowhere/agent.sock")
    words = ("run", "--nic", "lan", "--", "true")
    done = place.run("pyqemu-ifctl", *words, prefix=(*AS_NOBODY, *gone))
    assert (done.returncode, done.stderr) == (
        69,
        "pyqemu-ifctl: lan: no agent at /nowhere/agent.sock: No such file or directory; start "
        "one: systemctl start pyqemu-ifd-users.socket\n",
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_user_gets_a_tap_on_a_plain_bridge(place: Place, way: str) -> None:
    helper = WAYS[way].format(helper=place.helper)
    with place.qemu("-name", "web1", "-netdev", f"tap,id=n,br=br0,helper={helper}") as qemu:
        assert qemu.greeting
        assert place.taps() == {"tap0"}
        link = place.netns.link("tap0")
        assert (link["master"], "UP" in link["flags"]) == ("br0", True)
        info = link["linkinfo"]["info_data"]
        assert (info["user"], info["persist"], info["vnet_hdr"]) == ("root", False, True)
        assert f"network=lan kind=linux bridge=br0 pid={qemu.pid} " in link["ifalias"]
        assert link["ifalias"].endswith(" vm=web1")
        with open(f"/proc/{qemu.pid}/status") as status:
            words = dict(line.split(":", 1) for line in status)
        assert words["Uid"].split() == [str(NOBODY)] * 4
        assert int(words["CapEff"], 16) == 0
        assert qemu.quit() == 0
    assert place.taps() == set()


def test_a_mute_directory_of_users_keeps_nobody_else_waiting(
    netns: Namespace, tmp_path: Path
) -> None:
    """Who cannot be looked up is told so in time; root's tap is attached meanwhile."""
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    policy = tmp_path / "policy.yaml"
    policy.write_text(json.dumps(
        {"version": 1, "timeout": 3, "networks": PLAIN, "rules": RULES}))  # fmt: skip
    with Agent(netns, policy, before=mute_directory(f"uid == {NOBODY}"), users=True) as agent:
        hooks = publish(Hooks(agent.folder / "bin", agent=agent.path), agent.folder)
        run = [str(hooks.folder / "pyqemu-ifctl"), "run", "--nic", "lan,id=n", "--", "false"]
        words = [*AS_NOBODY, *run]
        asked = time.monotonic()
        waiting = netns.popen(words, env={**hooks.environ(), "HOME": "/"})
        while len(os.listdir(f"/proc/{agent.pid}/task")) == 1:
            assert time.monotonic() < asked + 20, "nobody has been asked for"
            time.sleep(0.01)
        tap = netns.tap("db1")
        with netns.enter():
            begun = time.monotonic()
            done = subprocess.run(
                [hooks.ifup, "db1"],
                env=hooks.environ(),
                capture_output=True,
                text=True,
                check=False,
            )
        assert (done.returncode, done.stderr) == (0, "")
        assert waiting.poll() is None and time.monotonic() - begun < 2
        _, said = waiting.communicate(timeout=30)
        assert waiting.returncode == 75
        assert f"the directory of users does not say who user {NOBODY} is" in said
        assert 2 < time.monotonic() - asked < 10
        tap.close()
    netns.ip("link", "del", "br0")


def test_a_user_gets_a_tap_on_a_tagged_port(tagged: Place, ovs: OpenVSwitch) -> None:
    netdev = f"tap,id=n,br=br-int,helper={tagged.helper}"
    with tagged.qemu("-name", "web1", "-netdev", netdev) as qemu:
        assert qemu.greeting
        port, interface = ovs.row("Port", "ten0"), ovs.row("Interface", "ten0")
        assert (port["tag"], port["vlan_mode"]) == (100, "access")
        assert interface["external_ids"]["vm-pid"] == str(qemu.pid)
        assert interface["link_state"] == "up"
        qemu.process.kill()
        qemu.wait()
    # The agent sees the tap go, and removes the port.
    ovs.wait_until("Bridge", "br-int", f"ports={ovs.row('Port', 'br-int')['_uuid']}")
    assert ovs.find("Port", "ten0") is None


def test_run_gives_a_sandboxed_qemu_its_queues(place: Place) -> None:
    run = [str(place.hooks.folder / "pyqemu-ifctl"), "run", "--nic", "lan,tap=tap7,id=n,queues=2"]
    device = ["-device", "virtio-net-pci,netdev=n,mq=on"]
    sandbox = ["-sandbox", "on,spawn=deny,elevateprivileges=deny"]
    prefix = [*AS_NOBODY, *run, "--"]
    with place.qemu("-name", "web1", *sandbox, *device, prefix=prefix, machine="q35") as qemu:
        assert qemu.greeting
        link = place.netns.link("tap7")
        info = link["linkinfo"]["info_data"]
        assert (link["master"], info["multi_queue"], info["vnet_hdr"]) == ("br0", True, True)
        # NOTE: QEMU turns all but the first off, until a guest wants them.
        assert info["numqueues"] + info["numdisabled"] == 2
        assert f" pid={qemu.pid} " in link["ifalias"]
        assert link["ifalias"].endswith(" vm=web1")
        assert qemu.quit() == 0
    assert place.taps() == set()


def test_run_gives_a_guest_of_the_policy_s_its_nics(place: Place) -> None:
    """Each with its own settings, and nobody else's by asking without the name of its tap."""
    nics = [{"network": "lan", "tap": "web1-0", "queues": 2, "txqueuelen": 77, "addr": "0x9"},
            {"user": {"hostname": "web1"}, "model": "e1000"}]  # fmt: skip
    networks = {**PLAIN, "lan": {**PLAIN["lan"], "max_taps": 2, "tap_name": "web1-%d"}}
    policy = {"version": 1, "networks": networks, "rules": RULES, "vms": {"web1": {"nics": nics}}}
    place.hooks.write_policy(json.dumps(policy))
    place.agent.policy.write_text(json.dumps(policy))
    os.kill(place.agent.pid, signal.SIGHUP)
    run = [str(place.hooks.folder / "pyqemu-ifctl"), "run"]
    env = {"PYQEMU_IFUP_POLICY": str(place.hooks.policy)}
    prefix = [*AS_NOBODY, "env", *(f"{name}={it}" for name, it in env.items()), *run, "web1", "--"]
    with place.qemu("-name", "web1", prefix=prefix, machine="q35") as qemu:
        assert qemu.greeting
        link = place.netns.link("web1-0")
        assert (link["master"], link["txqlen"], "UP" in link["flags"]) == ("br0", 77, True)
        assert f" uid={NOBODY} made=1 rule=" in link["ifalias"]
        told = qemu.hmp("info network")
        assert "nic-net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:" in told
        assert told.count(" \\ net0: ") == 2, told
        assert "nic-net1: index=0,type=nic,model=e1000,macaddr=52:54:00:" in told
        assert re.search(r"addr = 0*9\.0\b", qemu.hmp("info qtree"))
        assert qemu.quit() == 0
    prefix[-1:] = ["--nic", "lan", "--"]
    with place.qemu("-name", "web1", prefix=prefix, machine="q35") as qemu:
        assert qemu.greeting
        assert "\nnet2: index=0,type=tap" in f"\n{qemu.hmp('info network')}".replace("\r", "")
        assert qemu.quit() == 0
    with place.qemu("-netdev", f"tap,id=n,br=lan,helper={place.helper}") as qemu:
        assert qemu.greeting
        assert place.netns.link("web1-0")["txqlen"] == 1000
        assert qemu.quit() == 0
    assert place.taps() == set()


def helper_says(place: Place, br: str, prefix: Sequence[str] = AS_NOBODY) -> str:
    """Return what QEMU and our helper say where the helper gives no tap."""
    with place.qemu("-netdev", f"tap,id=n,br={br},helper={place.helper}", prefix=prefix) as qemu:
        with pytest.raises(EOFError):
            assert not qemu.greeting
        assert qemu.wait() == 1
        return qemu.stderr


REFUSED = [
    ("lan", AS_STRANGER, "user 65533 may not use network lan: neither the user nor one of "),
    ("db", AS_NOBODY, "user nobody may not use network db: neither the user nor one of "),
    ("br9", AS_NOBODY, "no network and no bridge br9: "),
]


@pytest.mark.parametrize(("br", "prefix", "text"), REFUSED, ids=[row[2] for row in REFUSED])
def test_who_is_not_allowed_is_told_why(
    place: Place, br: str, prefix: Sequence[str], text: str
) -> None:
    said = helper_says(place, br, prefix)
    assert text in said
    assert "bridge helper failed" in said or "failed to recv file descriptor" in said
    assert place.taps() == set()


def test_who_is_over_the_limit_is_told_so_until_a_qemu_has_ended(place: Place) -> None:
    netdev = f"tap,id=n,br=lan,helper={place.helper}"
    with place.qemu("-netdev", netdev) as qemu:
        assert qemu.greeting
        said = helper_says(place, "lan")
        assert "user nobody has 1 tap on network lan already: max_taps is 1" in said
        assert qemu.quit() == 0
    with place.qemu("-netdev", netdev) as qemu:
        assert qemu.greeting
        assert qemu.quit() == 0


def test_who_is_in_another_namespace_is_refused(place: Place) -> None:
    words = ["unshare", "-n", *AS_NOBODY]
    assert "the agent is not for this process: " in helper_says(place, "lan", words)
    done = place.run("pyqemu-ifctl", "run", "--nic", "lan", "--", QEMU, prefix=words)
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr.startswith("pyqemu-ifctl: lan: the agent is not for this process: ")
    assert place.taps() == set()


def test_who_asks_for_a_name_of_others_is_refused(place: Place) -> None:
    done = place.run("pyqemu-ifctl", "run", "--nic", "lan,tap=db0", "--", QEMU)
    assert done.returncode == 77
    assert done.stderr.startswith("pyqemu-ifctl: lan: ")
    assert "the name db0 is not for network lan: its tap_name is tap%d, " in done.stderr
    done = place.run("pyqemu-ifctl", "run", "--nic", "lan,tap=br0", "--", QEMU)
    assert done.returncode == 77
    assert "the name br0 is not for a tap" in done.stderr
    assert place.taps() == set()


@pytest.fixture
def persistent(place: Place) -> Iterator[Place]:
    """The same with two persistent taps: own0 is nobody's, root0 only root may open."""
    place.netns.ip("tuntap", "add", "dev", "own0", "mode", "tap", "user", "nobody")
    place.netns.ip("tuntap", "add", "dev", "root0", "mode", "tap")
    yield place
    for name in ("own0", "root0"):
        place.netns.ip("link", "del", name)


LIES = [
    (("up", "root0", "lan", ""), "own0", "not the tap that was handed over: its descriptor is of "
     "own0"),
    (("up", "own0", "lan", ""), "/proc/self/ns/net", "user 65534 has not handed over the tap"),
    (("down", "own0", ""), "/proc/self/ns/net", "user 65534 has not handed over the tap"),
    (("up", "own0", "db", ""), "own0", "user nobody may not use network db"),
    (("up", "own0", "nope", ""), "own0", "network nope: the policy does not define it"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "held", "text"), LIES, ids=[row[2][:45] for row in LIES])
def test_who_lies_is_refused(
    persistent: Place, fields: Sequence[str], held: str, text: str
) -> None:
    before = persistent.netns.links()
    *lines, end = persistent.ask(*fields, held=held)
    assert end == "=77"
    assert any(line.startswith("-") and text in line for line in lines), lines
    after = persistent.netns.links()
    for name in ("own0", "root0"):
        assert after[name].get("ifalias") is None
        assert after[name].get("master") == before[name].get("master") is None


def test_who_holds_another_s_tap_has_it_not_attached(persistent: Place) -> None:
    # NOTE: opened as root, and kept over setpriv: a descriptor that somebody has handed on.
    code = ASK.replace(
        "connection.sendmsg",
        "os.setgid(65534); os.setuid(65534)\n"
        "if os.fork(): raise SystemExit(os.wait()[1])\n"
        "connection.close()\n"
        "connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "connection.connect(os.environ['PYQEMU_IFUP_SOCKET'])\n"
        "connection.sendmsg",
    )
    done = persistent.netns.run(
        [sys.executable, "-I", "-c", code, "up", "root0", "lan", ""],
        env={**persistent.env(), "HELD": "root0"},
    )
    assert "somebody else's tap: nobody owns it, not user 65534" in done.stdout
    assert done.stdout.endswith("=77\n")
    assert "master" not in persistent.netns.link("root0")


def test_a_tap_is_for_a_process_of_the_user_s_own(persistent: Place) -> None:
    # NOTE: executed, not started, by what was root's: its parent is the test.
    for verb in (("up", "own0", "lan", ""), ("down", "own0", "")):
        line, end = [x for x in persistent.ask(*verb, held="own0", parent=()) if x[0] != "!"]
        assert f"is not user {NOBODY}'s: it is user 0's; let the user's own QEMU" in line
        assert end == "=77"
    link = persistent.netns.link("own0")
    assert ("master" in link, "ifalias" in link) == (False, False)


def test_hooks_of_a_user_s_qemu_attach_a_persistent_tap_of_its_own(place: Place) -> None:
    place.netns.ip("tuntap", "add", "dev", "own0", "mode", "tap", "user", "nobody")
    scripts = f"script={place.hooks.ifup},downscript={place.hooks.ifdown}"
    prefix = place.with_tun(AS_NOBODY)
    with place.qemu("-netdev", f"tap,id=n,ifname=own0,{scripts}", prefix=prefix) as qemu:
        assert qemu.greeting
        link = place.netns.link("own0")
        assert (link["master"], f" uid={NOBODY} " in link["ifalias"]) == ("br0", True)
        assert qemu.quit() == 0
        assert "network script" not in qemu.stderr
    link = place.netns.link("own0")
    assert ("master" in link, "ifalias" in link) == (False, False)
    place.netns.ip("link", "del", "own0")
    requests = place.agent.report()["requests"]
    assert {verb: (it["count"], it["failed"]) for verb, it in requests.items()
            if verb in ("up", "down")} == {"up": (1, 0), "down": (1, 0)}  # fmt: skip


CAP_NET_ADMIN = 1 << 12


def test_a_qemu_with_a_right_of_its_own_is_sent_to_the_agent(place: Place) -> None:
    """It makes the tap itself, by a capability of its file, and no user owns that."""
    qemu = place.agent.folder / "qemu"
    shutil.copyfile(shutil.which(QEMU) or "", qemu)
    qemu.chmod(0o755)
    # NOTE: struct vfs_cap_data of linux/capability.h: revision 2, effective.
    os.setxattr(qemu, "security.capability", struct.pack("<5I", 0x02000001, CAP_NET_ADMIN, 0, 0, 0))
    netdev = f"tap,id=n,ifname=cap0,script={place.hooks.ifup},downscript=no"
    words = [*place.with_tun(AS_NOBODY), str(qemu), "-M", "none", "-display", "none"]
    done = place.netns.run([*words, "-netdev", netdev], env=place.env(), check=False)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("pyqemu-ifup: cap0: "))
    assert "nobody owns it, not user 65534: whoever holds it has made it" in line
    assert "its maker" not in line and "by pyqemu-ifctl run --nic lan, or" in line
    # What it says: the agent makes the tap, and QEMU needs no right.
    netdev = f"tap,id=n,br=lan,helper={place.helper}"
    with place.qemu("-netdev", netdev) as started:
        assert started.greeting
        assert started.quit() == 0


def test_what_root_makes_anew_for_a_user_is_the_user_s(place: Place) -> None:
    place.netns.ip("tuntap", "add", "dev", "own0", "mode", "tap", "user", "0")
    scripts = f"script={place.hooks.ifup},downscript={place.hooks.ifdown}"
    with place.netns.enter(), Netlink() as kernel:
        link = kernel.look_up("own0")
    assert link is not None
    with pytest.raises(Failure) as caught:
        check_owner(link, NOBODY, "lan")
    place.netns.run(["sh", "-ec", caught.value.remedy.partition(": ")[2]])
    assert place.netns.link("own0")["ifindex"] != link.index
    netdev = f"tap,id=n,ifname=own0,{scripts}"
    with place.qemu("-netdev", netdev, prefix=place.with_tun(AS_NOBODY)) as qemu:
        assert qemu.greeting
        assert qemu.quit() == 0
    place.netns.ip("link", "del", "own0")


def test_what_only_root_can_mend_is_said_to_be_root_s(place: Place) -> None:
    place.netns.ip("link", "set", "br0", "name", "br1")
    done = place.run("pyqemu-ifctl", "run", "--nic", "lan", "--", "true")
    assert done.returncode == 69
    assert ": network lan names it; let root mend it: make it (" in done.stderr
    place.netns.ip("link", "set", "br1", "name", "br0")


def test_a_down_under_runas_is_done_by_the_agent(tagged: Place, ovs: OpenVSwitch) -> None:
    scripts = f"script={tagged.hooks.on_network('tagged')},downscript={tagged.hooks.ifdown}"
    netdev = f"tap,id=n,ifname=web0,{scripts}"
    with tagged.qemu("-runas", "nobody", "-netdev", netdev, prefix=()) as qemu:
        assert qemu.greeting
        assert ovs.row("Port", "web0")["tag"] == 100
        assert qemu.quit() == 0
        assert "network script" not in qemu.stderr
    assert ovs.find("Port", "web0") is None
    assert tagged.agent.report()["requests"]["down"]["failed"] == 0
