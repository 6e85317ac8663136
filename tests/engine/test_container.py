"""Where root may little: a container with a read-only root and /proc/sys, and rootless.

Nobody logs there, no agent serves, and no systemd runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from lab.container import LITTLE, USUAL, Container, Rootless, Run
from lab.hooks import Hooks
from lab.nat_site import drain
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import as_user, public_folder, publish
from lab.qemu import Qemu
from lab.taps import Tap


class Job:
    """The programs, as they run in a container with the policy's network `lan`."""

    def __init__(self, place: Any, hooks: Hooks, lan: dict[str, Any]) -> None:
        self.place, self.hooks = place, hooks
        hooks.write_policy(json.dumps({
            "version": 1, "networks": {"lan": lan}, "rules": [{"tap": "*", "network": "lan"}],
        }))  # fmt: skip
        place.env = {"PYQEMU_IFUP_POLICY": str(hooks.policy), "PYQEMU_IFUP_SOCKET": ""}

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one of the programs inside, to its end."""
        done: subprocess.CompletedProcess[str] = self.place.run(
            str(self.hooks.folder / program), *words
        )
        return done

    def ctl(self, *words: str, status: int = 0) -> str:
        """Return what pyqemu-ifctl prints inside, which ends so and says nothing else."""
        done = self.run("pyqemu-ifctl", *words)
        assert (done.returncode, done.stderr) == (status, ""), done
        return done.stdout

    def qemu(self, *words: str) -> Qemu:
        """Start QEMU inside, with the tap web0."""
        scripts = f"script={self.hooks.ifup},downscript={self.hooks.ifdown}"
        return Qemu(
            "-name",
            "web",
            "-netdev",
            f"tap,id=n,ifname=web0,{scripts}",
            *words,
            prefix=self.place.argv(),
            env=self.place.env,
        )


def addresses(netns: Namespace, link: str) -> list[str]:
    return [each["local"] for it in netns.ip("-6", "address", "show", "dev", link)
            for each in it.get("addr_info", ())]  # fmt: skip


def test_the_main_job_in_a_container(netns: Namespace, tmp_path: Path) -> None:
    require("qemu")
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    with Container(netns, "read-only") as place:
        job = Job(place, Hooks(tmp_path / "hooks"), {"bridge": "br0"})
        assert place.run("touch", "/x", "/proc/sys/net/ipv4/ip_forward").returncode != 0
        with job.qemu() as qemu:
            assert qemu.greeting
            link = netns.link("web0")
            assert (link["master"], "UP" in link["flags"]) == ("br0", True)
            assert (link["inet6_addr_gen_mode"], addresses(netns, "web0")) == ("none", [])
            (row,) = json.loads(job.ctl("status", "--json"))["taps"]
            assert (row["state"], row["vm"], row["differences"]) == ("ok", "web", []), row
            assert " addrgenmode none\n" not in job.ctl("explain", "web0")
            assert job.ctl("explain", "other0").count(" addrgenmode none\n") == 1
            assert "/proc/sys/net/ipv6/conf" not in job.ctl("explain", "other0")
            assert job.ctl("apply") == "1 tap as the policy says\n"
            assert "web" in job.ctl("info")
            assert job.ctl("gc") == "nothing to remove\n"
            assert json.loads(job.run("pyqemu-ifctl", "doctor", "--json").stdout)["version"] == 1
            assert (qemu.quit(), "network script" in qemu.stderr) == (0, False)
    netns.ip("link", "del", "br0")


NAT = {"ipv4": "192.168.76.1/24", "host": "any"}
USER = 4711
ROUTER, MAC = "fe80::aaaa", "52:54:00:00:00:0a"


def advertisement() -> bytes:
    """Return the frame by which a guest advertises a prefix, and itself, as routers do."""
    from scapy.layers.inet6 import ICMPv6ND_RA, ICMPv6NDOptPrefixInfo, IPv6
    from scapy.layers.l2 import Ether

    prefix = ICMPv6NDOptPrefixInfo(prefix="2001:db8:bad::", prefixlen=64, L=1, A=1)
    router = IPv6(src=ROUTER, dst="ff02::1", hlim=255) / ICMPv6ND_RA(routerlifetime=1800) / prefix
    return bytes(Ether(src=MAC, dst="33:33:00:00:00:01") / router)


def advertise(tap: Tap) -> None:
    """Have the guest on `tap` advertise, and wait until its network's gateway has heard it."""
    from scapy.layers.l2 import ARP, Ether

    tap.send(advertisement())
    # NOTE: frames of one tap are dealt with in their order.
    ask = ARP(hwsrc=MAC, psrc="192.168.76.10", pdst="192.168.76.1")
    tap.send(bytes(Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / ask))
    end = time.monotonic() + 20
    while not any(frame[12:14] == b"\x08\x06" for frame in drain(tap)):
        assert time.monotonic() < end, "the gateway does not answer"
        time.sleep(0.01)


def test_what_a_guest_on_the_userspace_datapath_advertises(
    netns: Namespace, ovs_netdev: OpenVSwitch, tmp_path: Path
) -> None:
    """The host takes in its frames there. That it may get an address, status tells."""
    ovs_netdev.add_bridge("br-int", hwaddr="02:00:00:00:00:09", mtu=1500)
    with Container(netns, "read-only") as place:
        lan = {"bridge": "br-int", "ovsdb": ovs_netdev.db}
        job = Job(place, Hooks(tmp_path / "hooks"), lan)
        for off in (False, True):
            netns.run(["sysctl", "-qw", f"net.ipv6.conf.default.disable_ipv6={int(off)}"])
            tap = netns.tap("web0")
            done = job.run("pyqemu-ifup", "web0")
            assert (done.returncode, done.stderr) == (0, "")
            (row,) = json.loads(job.ctl("status", "--json"))["taps"]
            assert (row["state"], [each["setting"] for each in row["differences"]]) == (
                ("ok", []) if off else ("differs", ["disable_ipv6"])
            )
            told = [
                each["do"]
                for each in json.loads(job.ctl("doctor", "tap-ipv6", "--json"))["findings"]
            ]
            assert told == [] if off else "--sysctl net.ipv6.conf.default." in told[0]
            tap.send(advertisement())
            end = time.monotonic() + 20
            while not off and not addresses(netns, "web0"):
                assert time.monotonic() < end, "this kernel keeps it away by itself"
                time.sleep(0.01)
            assert job.run("pyqemu-ifdown", "web0").returncode == 0
            assert not off or addresses(netns, "web0") == []
            tap.close()
    netns.run(["sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=0"])
    ovs_netdev.vsctl("del-br", "br-int")


def is_foretold(job: Job, told: str) -> None:
    """Check that explain and doctor say of the tap's network what its up has ended with, 77."""
    assert f"note: an up would fail now (77): {told}" in job.ctl("explain", "web0")
    said = json.loads(job.run("pyqemu-ifctl", "doctor", "--json", "nat-needs").stdout)
    assert [f"{each['what']}; {each['do']}\n" for each in said["findings"]] == [told]


def test_a_network_with_nat_in_a_container(netns: Namespace, tmp_path: Path) -> None:
    """All that is needed of its starter is told, with the options; with those it is made."""
    hooks = Hooks(tmp_path / "hooks")
    tap = netns.tap("web0")
    with Container(netns, "read-only") as place:
        job = Job(place, hooks, {"bridge": "labbr0", "nat": {**NAT, "ipv6": "fd00:76::1/64"}})
        done = job.run("pyqemu-ifup", "web0")
        told = done.stderr.removeprefix("pyqemu-ifup: web0: ")
        assert done.returncode == 77 and told.endswith(
            "; have whoever starts this container give it --cap-add=SETGID --cap-add=SETUID "
            "--cap-add=NET_BIND_SERVICE --cap-add=NET_RAW --tmpfs /run --sysctl "
            "net.ipv4.ip_forward=1 --sysctl net.ipv6.conf.all.forwarding=1\n"
        ), done
        is_foretold(job, told)
    with Container(netns, "tmpfs", USUAL) as place:
        job = Job(place, hooks, {"bridge": "labbr0", "nat": NAT})
        done = job.run("pyqemu-ifup", "web0")
        assert (done.returncode, done.stderr) == (
            71,
            "pyqemu-ifup: web0: cannot write 1 to /proc/sys/net/ipv4/ip_forward: Read-only "
            "file system; have whoever starts this container give it --sysctl "
            "net.ipv4.ip_forward=1\n",
        )
        assert netns.links().keys() == {"lo", "web0"}
        netns.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
        for nat, own in (
            (NAT, set()),
            ({**NAT, "ipv6": "fd00:76::1/64", "outbound": False}, {"fd00:76::1"}),
        ):
            job = Job(place, hooks, {"bridge": "labbr0", "nat": nat})
            done = job.run("pyqemu-ifup", "web0")
            assert (done.returncode, done.stderr) == (0, ""), nat
            advertise(tap)
            found = {each for each in addresses(netns, "labbr0") if not each.startswith("fe80:")}
            assert found == own and (own or addresses(netns, "labbr0") == [])
            assert not [route for route in netns.ip("-6", "route") if route["dst"] == "default"]
            assert json.loads(job.ctl("status", "--json"))["taps"][0]["state"] == "ok"
            assert job.run("pyqemu-ifdown", "web0").returncode == 0
            assert netns.links().keys() == {"lo", "web0"}
    refusals: list[tuple[Run, tuple[str, ...], str]] = [
        ("read-only", USUAL, "; have whoever starts this container give it --tmpfs /run\n"),
        ("tmpfs", LITTLE, "; have whoever starts this container give it --cap-add=SETGID "
                          "--cap-add=SETUID --cap-add=NET_BIND_SERVICE --cap-add=NET_RAW\n"),
    ]  # fmt: skip
    for run, capabilities, told in refusals:
        with Container(netns, run, capabilities) as place:
            done = Job(place, hooks, {"bridge": "labbr0", "nat": NAT}).run("pyqemu-ifup", "web0")
            assert done.returncode in (71, 77) and done.stderr.endswith(told), done.stderr
    assert netns.links().keys() == {"lo", "web0"}
    netns.run(["sysctl", "-qw", "net.ipv4.ip_forward=0"])


@pytest.fixture
def rootless(tmp_path: Path) -> Iterator[Hooks]:
    """The programs where every user can run them, in a folder of that user's."""
    with public_folder() as folder:
        hooks = publish(Hooks(tmp_path / "hooks"), folder)
        os.chown(hooks.folder, USER, USER)
        yield hooks


def test_the_main_job_rootless(rootless: Hooks) -> None:
    """In an ordinary user's own namespaces, on a host that has Open vSwitch, and a policy."""
    require("qemu")
    hooks = rootless
    with Rootless(USER, hooks.folder.parent) as place:
        job = Job(place, hooks, {"bridge": "br0"})
        os.chown(hooks.policy, USER, USER)
        place.run("ip", "link", "add", "br0", "up", "type", "bridge", check=True)
        with job.qemu() as qemu:
            assert qemu.greeting
            link = json.loads(place.run("ip", "-d", "-j", "link", "show", "web0").stdout)[0]
            assert (link["master"], "UP" in link["flags"]) == ("br0", True)
            (row,) = json.loads(job.ctl("status", "--json"))["taps"]
            assert (row["state"], row["vm"], row["differences"]) == ("ok", "web", []), row
            assert job.ctl("explain", "web0").startswith("web0: attached to network lan by ")
            assert job.ctl("gc") == "nothing to remove\n"
            assert job.ctl("apply") == "1 tap as the policy says\n"
            assert "web, pid " in job.ctl("info")
            done = job.run("pyqemu-ifctl", "doctor")
            assert "run as root" not in done.stdout + done.stderr
            assert (qemu.quit(), "network script" in qemu.stderr) == (0, False)
        assert job.ctl("status") == "no taps\n"
        # What is another's is said to be so, and what can be done about it there.
        os.chown(hooks.policy, 0, 0)
        done = job.run("pyqemu-ifctl", "check")
        assert (done.returncode, done.stderr) == (
            78,
            f"pyqemu-ifctl: {hooks.policy}: a user whom this user namespace does not have owns "
            "it, and could change the policy; have a policy of one's own, in a folder where "
            "nobody else can write, and name it: PYQEMU_IFUP_POLICY=FILE\n",
        )
        assert "PYQEMU_IFUP_POLICY=FILE" in job.run("pyqemu-ifctl", "doctor").stdout


ALONE = """\
import sys, time
sys.path[:0] = sys.argv[2:]
from pyqemu_ifup.drivers import dnsmasq
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.task import finish
folder, user = sys.argv[1], dnsmasq.account().name
settings = [f"user={user}", "group=", "port=0"]
finish(dnsmasq.serve(folder, settings, Deadline(60)), time.sleep)
print(finish(dnsmasq.look(folder, Deadline(60)), time.sleep).settings == tuple(settings))
finish(dnsmasq.end(folder, Deadline(60)), time.sleep)
"""


def test_dnsmasq_of_a_user_whom_nothing_gives_a_name(rootless: Hooks) -> None:
    """As a container's may be: a number that is in no directory of users."""
    require("dnsmasq")
    folder = rootless.folder / "network"
    folder.mkdir()
    os.chown(folder, USER, USER)
    done = subprocess.run(
        [
            *as_user(USER),
            "unshare",
            "--user",
            "--map-current-user",
            "--keep-caps",
            "--net",
            rootless.python,
            "-I",
            "-c",
            ALONE,
            folder,
            *rootless.roots,
            *rootless.libraries,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n", done.stdout


def test_a_network_with_nat_rootless(rootless: Hooks) -> None:
    """It needs a /run to write to, which an ordinary user makes with namespaces of his own."""
    hooks = rootless
    lan = {"bridge": "labbr0", "nat": NAT}
    runs: list[Literal["", "tmpfs"]] = ["", "tmpfs"]
    for run in runs:
        with Rootless(USER, hooks.folder.parent, run) as place:
            job = Job(place, hooks, lan)
            os.chown(hooks.policy, USER, USER)
            place.run("ip", "tuntap", "add", "web0", "mode", "tap", check=True)
            done = job.run("pyqemu-ifup", "web0")
            if not run:
                assert done.returncode == 77 and done.stderr.endswith(
                    "have a /run of one's own: unshare -Urnm, and in it: mount -t tmpfs run /run\n"
                ), done
                is_foretold(job, done.stderr.removeprefix("pyqemu-ifup: web0: "))
                continue
            assert (done.returncode, done.stderr) == (0, "")
            assert json.loads(job.ctl("status", "--json"))["taps"][0]["state"] == "ok"
            assert "192.168.76.1/24" in place.run("ip", "-br", "address").stdout
            assert job.run("pyqemu-ifdown", "web0").returncode == 0
            assert "labbr0" not in place.run("ip", "-br", "link").stdout
