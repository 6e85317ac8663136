"""A guest that has taken over its QEMU: it writes what it likes into its memory and command line.

It runs as a user without privilege (-runas), as a QEMU that is worth taking over does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.argv import rewrite_argv
from lab.clinic import until
from lab.holder import Holder
from lab.hooks import Hooks
from lab.needs import QEMU, require
from lab.netns import Namespace
from lab.public import NOBODY
from lab.qemu import Qemu
from lab.told import run_told

MAC, OTHER_MAC = "52:54:00:00:00:01", "52:54:00:00:00:99"
POLICY = f"""\
version: 1
timeout: 30
networks: {{lan: {{bridge: br0}}, fw: {{bridge: br1}}, secret: {{bridge: br2}}}}
rules:
  - {{vm: fw-*, network: fw}}
  - {{netdev: secret*, network: secret}}
  - {{mac: "{OTHER_MAC}", network: secret}}
  - {{user: nobody, network: secret}}
  - {{vm: web*, netdev: n0, mac: "{MAC}", network: lan, isolated: true}}
"""


def line(vm: str = "web1", netdev: str = "n0", mac: str = MAC, script: str = "/x/a") -> list[str]:
    """Return the part of a command line that tells who a guest is."""
    return [
        "-name",
        vm,
        "-netdev",
        f"tap,id={netdev},ifname=web0,script={script}",
        "-device",
        f"virtio-net-pci,netdev={netdev},mac={mac}",
    ]


ATTACKS = {
    "name": (line(vm="fw-1"), "vm fw-1 (its mark: web1)"),
    "command": (line(vm="$(id)"), "vm '$(id)' (its mark: web1)"),
    "script": (line(script="/x/pyqemu-ifup@secret"), "network secret (its mark: none)"),
    "netdev": (line(netdev="secret0"), "netdev secret0 (its mark: n0)"),
    "mac": (line(mac=OTHER_MAC), f"mac {OTHER_MAC} (its mark: {MAC})"),
    "nothing": (["-S"], ""),
    "too much": (["-name", "fw-1", "-netdev", "tap" + ",ifname=web0" * 30], "vm fw-1"),
}


@dataclass
class Place:
    """A host with the three bridges, and a QEMU of nobody's whose tap web0 is on lan."""

    netns: Namespace
    hooks: Hooks
    qemu: Qemu

    @property
    def bridge(self) -> str | None:
        """The bridge that the tap is on."""
        master = self.netns.link("web0").get("master")
        assert master is None or isinstance(master, str)
        return master

    def write(self, words: list[str]) -> None:
        """Have the QEMU say something else of itself."""
        rewrite_argv(self.qemu.pid, QEMU, *words)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    require("root", "tun", "ip", "qemu")
    with Namespace() as netns:
        for number in range(3):
            netns.add_bridge(f"br{number}", mac=f"02:00:00:00:00:0{number}")
        hooks = Hooks(tmp_path, netns=netns.name)
        hooks.write_policy(POLICY)
        words = line(script=f"{hooks.ifup},downscript={hooks.ifdown}")
        # NOTE: room to write in.
        words += ["-runas", "nobody", "-fw_cfg", f"name=opt/x,string={'x' * 700}"]
        with Qemu(*words, netns=netns.name, machine="q35", env=hooks.environ()) as qemu:
            assert qemu.greeting
            place = Place(netns, hooks, qemu)
            assert place.bridge == "br0"
            uids = Path(f"/proc/{qemu.pid}/status").read_text().partition("Uid:")[2].split()
            assert uids[0] == "65534"
            yield place


def test_what_it_writes_over_its_command_line_moves_it_nowhere(place: Place) -> None:
    mark = place.netns.link("web0")["ifalias"]
    for words, told in ATTACKS.values():
        place.write(words)
        done = place.hooks.ctl("apply")
        assert (done.returncode, done.stdout) == (0, "1 tap as the policy says\n"), done.stderr
        assert told in done.stderr
        assert place.bridge == "br0" and place.netns.link("web0")["ifalias"] == mark
    words, told = ATTACKS["script"]
    place.write(words)
    done = place.hooks.ctl("apply", "--dry-run", "web0")
    assert (done.returncode, done.stdout) == (0, "1 tap as the policy says\n"), done.stderr
    (tap,) = place.hooks.ctl_json("status")["taps"]
    assert (tap["state"], tap["network"], tap["vm"]) == ("ok", "lan", "web1")
    assert tap["differences"] == []
    assert tap["otherwise"] == [{"setting": "network", "mark": None, "says": "secret"}]
    # One who asks about the tap is told.
    assert told in " ".join(place.hooks.ctl("status", "web0").stdout.split())
    found = place.hooks.ctl_json("doctor")["findings"]
    (what,) = [each["what"] for each in found if each["check"] == "qemu-otherwise"]
    assert told in what


def test_what_it_writes_brings_it_back_nowhere_else(place: Place) -> None:
    before = place.netns.link("web0")["ifalias"]
    with Agent(place.netns, place.hooks.policy):
        for attack in ("name", "script", "netdev", "mac"):
            place.write(ATTACKS[attack][0])
            place.netns.ip("link", "del", "br0")
            place.netns.add_bridge("br0", mac="02:00:00:00:00:00")
            until(lambda: place.bridge is not None, "the tap comes back")
            until(lambda: "UP" in place.netns.link("web0")["flags"], "its link comes up")
            assert place.bridge == "br0" and place.netns.link("web0")["ifalias"] == before


def test_it_gains_nothing_by_what_its_mark_had_no_room_for(place: Place) -> None:
    """An older mark says nothing of the netdev: the tap stays, and that is told."""
    place.write(line(netdev="secret0"))
    mark = place.netns.link("web0")["ifalias"]
    words = [
        word for word in mark.split(" ") if word.partition("=")[0] not in ("rule", "mac", "netdev")
    ]
    older = " ".join(words)
    place.netns.ip("link", "set", "dev", "web0", "alias", older)
    try:
        done = place.hooks.ctl("apply")
        assert (done.returncode, done.stdout) == (0, "1 tap left alone\n")
        assert "asks for netdev, which the tap's mark does not say" in done.stderr
        assert place.bridge == "br0" and place.netns.link("web0")["ifalias"] == older
        shown = " ".join(place.hooks.ctl("status", "web0").stdout.split())
        assert "asks for netdev, which the tap's mark does not say" in shown
    finally:
        place.netns.ip("link", "set", "dev", "web0", "alias", mark)


@dataclass
class Taken:
    """A process that root had web0 put on lan for, and that has dropped to nobody since."""

    netns: Namespace
    hooks: Hooks
    holder: Holder

    def says(self, script: str) -> None:
        """Have it say what a QEMU of web1's would, with this script."""
        rewrite_argv(self.holder.process.pid, QEMU, *line(script=script))

    def link(self) -> tuple[str | None, bool, str]:
        """Return the tap's master, whether it is up, and its mark."""
        link = self.netns.link("web0")
        return link.get("master"), "UP" in link["flags"], link.get("ifalias", "")


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Taken]:
    require("root", "tun", "ip")
    with Namespace() as netns:
        for name in ("br0", "br2"):
            netns.add_bridge(name, mac=f"02:00:00:00:00:0{name[2]}")
        hooks = Hooks(tmp_path, netns=netns.name)
        hooks.write_policy(POLICY)
        with Agent(netns, hooks.policy, users=True) as agent:
            env = {**hooks.environ(), "PYQEMU_IFUP_SOCKET": agent.path, "TUN": "/dev/net/tun"}
            with Holder(netns, 0, env) as holder:
                taken = Taken(netns, hooks, holder)
                assert holder("open_it('web0')") is None
                taken.says(hooks.ifup)
                up = "import subprocess; status = subprocess.call([{!r}, 'web0'])"
                holder(f"exec({up.format(hooks.ifup)!r}, globals())")
                assert holder("status") == 0
                assert holder(f"os.setgid({NOBODY}) or os.setuid({NOBODY})") is None
                assert taken.link()[:2] == ("br0", True)
                yield taken


def test_its_own_down_frees_it_of_nothing(taken: Taken) -> None:
    mark = taken.link()[2]
    assert taken.holder("hook('down', 'web0', '')").startswith("=0 ")
    assert taken.link() == (None, False, mark), "it is off, and root's word stands"
    taken.says("/x/pyqemu-ifup@secret")
    done = taken.hooks.ctl("apply")
    assert done.returncode == 0 and "1 tap changed" in done.stdout, done
    assert taken.link() == ("br0", True, mark)


def test_without_a_mark_it_gets_no_more_than_its_user_may_ask_for(taken: Taken) -> None:
    taken.netns.ip("link", "set", "dev", "web0", "down", "alias", "")
    taken.netns.ip("link", "set", "dev", "web0", "nomaster")
    taken.says("/x/pyqemu-ifup@secret")
    done = taken.hooks.ctl("apply")
    assert (done.returncode, done.stdout) == (0, "1 tap left alone\n"), done
    assert f"web0: left alone: it has no mark of ours, and user {NOBODY}" in done.stderr
    told = done.stderr
    done = taken.hooks.ctl("apply", "web0")
    assert done.returncode == 77, done
    assert "user nobody may not use network secret" in done.stderr
    assert taken.link() == (None, False, "")
    taken.hooks.write_policy(POLICY.replace("bridge: br2", "bridge: br2, users: [nobody]"))
    run_told(taken.hooks, told)
    master, up, mark = taken.link()
    assert (master, up) == ("br2", True) and f" uid={NOBODY} by=name " in mark
