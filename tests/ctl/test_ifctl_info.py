"""pyqemu-ifctl info: real QEMUs, asked over QMP, beside what this host has."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.hooks import Hooks
from lab.needs import QEMU, require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import NOBODY, as_user, publish
from lab.qemu import Qemu
from lab.taps import frame, holds, mac
from lab.versions import VERSIONS, qemu_of
from pyqemu_ifctl.qemu.cards import Card, Side
from pyqemu_ifctl.qemu.qmp import Address, nic_of, read_network
from pyqemu_ifctl.qemu.running import is_qemu, monitors_of
from pyqemu_ifctl.taps import Row
from pyqemu_ifctl.verbs.info import _card_lines, _entry
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.look import Counters
from pyqemu_ifup.system.holders import all_holders

MAC = "52:54:00:00:00:01"
CARD = f"virtio-net-pci,netdev=n0,id=lan0,mac={MAC}"


class Place:
    """A namespace with the bridge br0, hooks, and a short folder for QMP sockets."""

    def __init__(self, netns: Namespace, hooks: Hooks, folder: Path) -> None:
        self.netns = netns
        self.hooks = hooks
        self.folder = folder

    @property
    def qmp(self) -> str:
        """The path of a QMP socket."""
        return str(self.folder / "qmp.sock")

    def monitor(self) -> list[str]:
        """Return QEMU's arguments for a QMP socket there."""
        return ["-qmp", f"unix:{self.qmp},server=on,wait=off"]

    def tap(self, tap: str = "web0", more: str = "") -> list[str]:
        """Return QEMU's arguments for a tap that the hooks attach."""
        scripts = f"script={self.hooks.ifup},downscript={self.hooks.ifdown}"
        return ["-netdev", f"tap,id=n0,ifname={tap},{scripts}{more}"]

    def start(self, *words: str, machine: str = "q35", program: str = "", **more: Any) -> Qemu:
        """Start a QEMU whose guest does not run."""
        return Qemu(
            "-S",
            *words,
            netns=self.netns.name,
            machine=machine,
            env=self.hooks.environ(),
            program=program or QEMU,
            **more,
        )

    def guests(self, *words: str, status: int = 0) -> list[dict[str, Any]]:
        """Return what info tells as JSON."""
        done = self.hooks.ctl("info", "--json", *words)
        assert done.returncode == status, done
        told = json.loads(done.stdout)
        assert told["version"] == 1
        found: list[dict[str, Any]] = told["guests"]
        return found


@pytest.fixture
def place(netns: Namespace, tmp_path: Path) -> Iterator[Place]:
    require("qemu")
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    hooks = Hooks(tmp_path / "hooks", netns.name)
    write_policy(hooks, {"tap": "*", "network": "lan"})
    folder = Path(tempfile.mkdtemp(prefix="info-", dir="/tmp"))
    folder.chmod(0o755)
    yield Place(netns, hooks, folder)
    shutil.rmtree(folder)
    netns.ip("link", "del", "br0")


def write_policy(hooks: Hooks, *rules: Any, **more: Any) -> None:
    networks = {"lan": {"bridge": "br0"}, **more.pop("networks", {})}
    hooks.write_policy(json.dumps({"version": 1, "networks": networks, "rules": rules, **more}))


@pytest.mark.each_python
@pytest.mark.parametrize("version", VERSIONS)
def test_both_sides_of_each_nic(place: Place, version: str) -> None:
    words = [
        *("-name", "web1"),
        *place.monitor(),
        *place.tap(more=",queues=4"),
        *("-device", f"{CARD},mq=on,vectors=10,addr=0x8"),
        *("-netdev", "user,id=u0,hostfwd=tcp:127.0.0.1:2222-:22"),
        *("-device", "e1000,netdev=u0,mac=52:54:00:00:00:02,addr=0x9.1"),
        *("-nic", "user,model=rtl8139"),
    ]
    with place.start(*words, program=qemu_of(version)) as qemu:
        assert qemu.greeting
        (guest,) = place.guests("web1")
        assert (guest["vm"], guest["pid"], guest["missing"]) == ("web1", qemu.pid, None)
        assert guest["qmp"].endswith(place.qmp)
        nics = {nic["model"]: nic for nic in guest["nics"]}
        assert list(nics) == ["rtl8139", "virtio-net-pci", "e1000"], "in the order of the bus"
        lan = nics["virtio-net-pci"]
        index = place.netns.link("web0")["ifindex"]
        nothing = {"packets": 0, "bytes": 0, "dropped": 0}
        for way in ("received", "sent"):
            assert set(lan["host"].pop(way)) == set(nothing)
        assert lan == {
            "nic": "lan0",
            "model": "virtio-net-pci",
            "mac": MAC,
            "bus": "pcie.0",
            "addr": "08.0",
            "host_mtu": None,
            "hub": None,
            "backends": [{"id": "n0", "type": "tap", "queues": 4}],
            "tap": "web0",
            "host": {
                "tap": "web0",
                "ifindex": index,
                "kind": "linux",
                "bridge": "br0",
                "network": "lan",
                "vlan": None,
                "mtu": 1500,
                "state": "ok",
            },
            "faults": [],
        }
        assert (nics["e1000"]["addr"], nics["e1000"]["tap"], nics["e1000"]["faults"]) == (
            "09.1",
            None,
            [],
        )
        assert nics["rtl8139"]["backends"][0]["type"] == "user"
        done = place.hooks.ctl("info")
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert max(map(len, lines)) <= 80
        assert lines[0].startswith(f"web1, pid {qemu.pid}, QMP ")
        assert f"  lan0: virtio-net-pci {MAC} at pcie.0 08.0" in lines
        assert "    netdev n0, tap, 4 queues" in lines
        assert "    web0 on br0, mtu 1500, network lan" in lines
        assert qemu.quit() == 0


def test_counters_are_the_guest_s(inside: Namespace) -> None:
    """What the host sends to the tap, the guest receives."""
    tap = inside.tap("web0", up=True)
    with Netlink() as kernel:
        index = inside.link("web0")["ifindex"]
        before = kernel.counters(index)
        tap.send(frame(mac(1), payload=b"from the guest"))
        inside.raw("web0").send(frame(mac(2), payload=b"to the guest"))
        assert tap.recv(5, holds(b"to the guest"))
        after = kernel.counters(index)
        assert kernel.counters(9999) is None
    assert before is not None and after is not None
    assert after.rx_packets == before.rx_packets + 1
    assert after.tx_packets >= before.tx_packets + 1
    side = Side(Row("web0", "ok", index), Counters(1, 2, 10, 20, 3, 4))
    lines = "\n".join(_card_lines(Card(None, "web0", side, ())))
    assert (
        "the guest received 2 packets, 20 bytes (4 dropped), sent 1 packet, 10 bytes (3 dropped)"
    ) in lines
    entry: Any = _entry(Card(None, "web0", side, ()))
    assert entry["host"]["received"] == {"packets": 2, "bytes": 20, "dropped": 4}
    assert entry["host"]["sent"] == {"packets": 1, "bytes": 10, "dropped": 3}


def test_a_tagged_port_of_openvswitch(ovs: OpenVSwitch, tmp_path: Path, place: Place) -> None:
    ovs.add_bridge("br-int", hwaddr="02:00:00:00:00:09", mtu=1500)
    networks = {"tagged": {"bridge": "br-int", "ovsdb": ovs.db, "vlan": {"trunk": [20, "30-39"]}}}
    write_policy(place.hooks, {"tap": "*", "network": "tagged"}, networks=networks)
    with place.start(*place.monitor(), *place.tap(), "-device", CARD) as qemu:
        assert qemu.greeting
        host = place.guests()[0]["nics"][0]["host"]
        assert (host["kind"], host["bridge"], host["state"]) == ("openvswitch", "br-int", "ok")
        assert host["vlan"] == {"native": None, "trunk": [20, "30-39"]}
        assert "web0 on br-int, vlan trunk 20,30-39, mtu" in place.hooks.ctl("info").stdout
        assert qemu.quit() == 0
    ovs.vsctl("del-br", "br-int")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_old_form_on_a_hub(place: Place, version: str) -> None:
    scripts = f"script={place.hooks.ifup},downscript={place.hooks.ifdown}"
    words = ["-net", "nic,model=e1000", "-net", f"tap,ifname=web0,{scripts}"]
    with place.start(*place.monitor(), *words, machine="pc", program=qemu_of(version)) as qemu:
        assert qemu.greeting
        (guest,) = place.guests()
        (nic,) = guest["nics"]
        assert (guest["vm"], nic["model"], nic["tap"]) == (None, "e1000", "web0")
        assert (nic["host"]["state"], nic["faults"]) == ("ok", [])
        assert qemu.quit() == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_two_taps_on_a_hub(place: Place, version: str) -> None:
    """Each NIC is told once, and the hub that joins their taps."""
    ends = ["-net", "tap,ifname=web0,script=no", "-netdev", "tap,id=n1,ifname=web1,script=no"]
    ends += ["-netdev", "hubport,id=h1,hubid=5,netdev=n1", "-netdev", "hubport,id=h2,hubid=5"]
    ends += ["-netdev", "hubport,id=h3,hubid=0,netdev=h2", "-net", "nic,model=e1000"]
    words = ["-net", "nic,model=rtl8139", *ends]
    with place.start(*place.monitor(), *words, machine="pc", program=qemu_of(version)) as qemu:
        assert qemu.greeting
        (guest,) = place.guests()
        told = [(nic["model"], nic["hub"], nic["tap"]) for nic in guest["nics"]]
        assert sorted(told[:2]) == [("e1000", 0, None), ("rtl8139", 0, None)]
        assert sorted(told[2:]) == [(None, None, "web0"), (None, None, "web1")]
        for nic in guest["nics"][:2]:
            (fault,) = nic["faults"]
            assert sorted(fault.partition(": ")[0].split()[3::2]) == ["web0", "web1"]
            assert fault.startswith("hub 0 joins web")
        for nic in guest["nics"][2:]:
            assert nic["faults"] == [f"{nic['tap']} is on no bridge"]
        assert place.hooks.ctl("info").stdout.count("    hub 0\n") == 2
        qemu.signal(signal.SIGKILL)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_hub_without_a_nic_that_was_made_while_the_guest_runs(place: Place, version: str) -> None:
    words = [word for n in range(2) for word in ("-netdev", f"tap,id=n{n},ifname=web{n},script=no")]
    with place.start(*place.monitor(), *words, program=qemu_of(version)) as qemu:
        for n in range(2):
            qemu.execute(
                "netdev_add", {"type": "hubport", "id": f"h{n}", "hubid": 3, "netdev": f"n{n}"}
            )
        (guest,) = place.guests()
        hub, *taps = guest["nics"]
        assert (hub["hub"], hub["nic"], hub["tap"]) == (3, None, None)
        assert sorted(each["id"] for each in hub["backends"]) == ["n0", "n1"]
        (fault,) = hub["faults"]
        assert fault.startswith("hub 3 joins web")
        assert sorted(each["tap"] for each in taps) == ["web0", "web1"]
        assert "  hub 3, without a NIC\n    netdev n" in place.hooks.ctl("info").stdout
        qemu.signal(signal.SIGKILL)


def test_a_tap_on_a_hub_with_user_mode(place: Place) -> None:
    words = ["-net", "nic,model=e1000", "-net", "tap,ifname=web0,script=no", "-net", "user"]
    with place.start(*place.monitor(), *words, machine="pc") as qemu:
        assert qemu.greeting
        ((nic,),) = [guest["nics"] for guest in place.guests()]
        assert (nic["hub"], nic["tap"], len(nic["backends"])) == (0, "web0", 2)
        assert [fault for fault in nic["faults"] if fault.startswith("hub 0 joins ")]
        qemu.signal(signal.SIGKILL)


OPEN = """\
import fcntl, os, struct, sys
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"web0", 0x5002))
os.set_inheritable(fd, True)
os.execvp(sys.argv[1], [word.replace("FD", str(fd)) for word in sys.argv[1:]])
"""


def test_a_tap_by_descriptor_is_known_and_a_guest_without_a_nic(place: Place) -> None:
    words = [*place.monitor(), "-netdev", "tap,id=n0,fd=FD", "-device", CARD]
    with place.start(*words, prefix=[sys.executable, "-c", OPEN]) as qemu:
        assert qemu.greeting
        (nic,) = place.guests()[0]["nics"]
        assert (nic["nic"], nic["tap"]) == ("lan0", "web0")
        assert nic["faults"] == ["web0 is on no bridge"]
        assert qemu.quit() == 0
    with place.start(*place.monitor()) as qemu:
        assert qemu.greeting
        assert place.guests()[0]["nics"] == []
        assert "  no NIC\n" in place.hooks.ctl("info").stdout
        assert qemu.quit() == 0


def test_what_does_not_fit_together(place: Place) -> None:
    vms = {"web1": {"nics": [{"network": "lan", "tap": "web0", "mac": "52:54:00:00:00:99",
                              "model": "e1000"}]}}  # fmt: skip
    write_policy(place.hooks, {"tap": "*", "network": "lan"}, vms=vms)
    words = [
        *place.monitor(),
        *place.tap(more=",queues=2"),
        "-device",
        f"{CARD},host_mtu=1400",
        *("-netdev", "tap,id=n1,ifname=loose0,script=,downscript="),
        *("-device", f"e1000,netdev=n1,id=twin,mac={MAC}"),
        *("-netdev", "tap,id=n2,ifname=idle0,script=,downscript="),
    ]
    with place.start(*words) as qemu:
        assert qemu.greeting
        # NOTE: QEMU itself has no name, but the policy knows the tap.
        (guest,) = place.guests("web1")
        place.netns.ip("link", "set", "web0", "mtu", "1300")
        (guest,) = place.guests()
        faults = {nic["nic"] or nic["tap"]: nic["faults"] for nic in guest["nics"]}
        assert faults == {
            "lan0": [
                "its netdev has 2 queues, and it uses one; add mq=on",
                "it tells the guest of an MTU of 1400, its tap has 1300",
                f"its MAC is {MAC}, the policy has 52:54:00:00:00:99 ({place.hooks.policy}:1)",
                f"it is a virtio-net-pci, the policy has e1000 ({place.hooks.policy}:1)",
                f"twin of process {qemu.pid} has the same MAC",
            ],
            "twin": ["loose0 is on no bridge", f"lan0 of process {qemu.pid} has the same MAC"],
            "idle0": ["no NIC of the guest is on it", "idle0 is on no bridge"],
        }
        text = place.hooks.ctl("info").stdout
        assert "    ! its netdev has 2 queues, and it uses one; add mq=on\n" in text
        assert qemu.quit() == 0


def test_a_socket_that_somebody_else_uses(place: Place) -> None:
    with place.start(*place.monitor(), *place.tap(), "-device", CARD) as qemu:
        assert qemu.greeting
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(place.qmp)
            assert b"QMP" in other.recv(4096)
            (guest,) = place.guests()
            assert guest["missing"].startswith("its QMP socket ")
            assert "somebody else may be connected" in guest["missing"]
            assert [(nic["nic"], nic["tap"], nic["host"]["state"]) for nic in guest["nics"]] == [
                (None, "web0", "ok")
            ]
            text = " ".join(place.hooks.ctl("info").stdout.split())
            assert " not known of its NICs: its QMP socket /" in text
        assert place.guests()[0]["missing"] is None
        assert qemu.quit() == 0


def test_sockets_that_are_mute_gone_or_none(place: Place) -> None:
    with place.start("-name", "web1", *place.tap(), "-device", CARD) as qemu:
        assert qemu.greeting
        assert place.guests()[0]["missing"].startswith("it has no QMP socket: give it -qmp ")
        (guest,) = place.guests("web1", "--qmp", place.qmp)
        assert "cannot be asked: No such file or directory" in guest["missing"]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(place.qmp)
            (guest,) = place.guests("web1", "--qmp", place.qmp)
            assert "cannot be asked: Connection refused" in guest["missing"]
            listener.listen()
            (guest,) = place.guests("web1", "--qmp", place.qmp)
            assert "does not answer: waited 3 s" in guest["missing"]
        assert qemu.quit() == 0


def test_which_guests_are_shown(place: Place) -> None:
    one = place.start("-name", "web1", "-qmp", f"unix:{place.folder}/1,server=on,wait=off")
    two = place.start("-name", "db1", "-qmp", f"unix:{place.folder}/2,server=on,wait=off")
    with one, two:
        assert one.greeting and two.greeting
        assert {guest["vm"] for guest in place.guests()} == {"web1", "db1"}
        assert [guest["pid"] for guest in place.guests("db1")] == [two.pid]
        done = place.hooks.ctl("info", "web2")
        assert (done.returncode, done.stdout) == (69, "")
        assert done.stderr.startswith("pyqemu-ifctl: no QEMU that runs here is called web2: ")
        done = place.hooks.ctl("info", "--qmp", "/x")
        assert (done.returncode, done.stdout) == (64, "")
        assert "--qmp is of one guest, and 2 QEMUs would be shown" in done.stderr
        assert one.quit() == two.quit() == 0
    assert place.hooks.ctl("info").stdout == "no QEMU runs here\n"


def test_without_privilege_it_says_what_it_could_not_see(place: Place) -> None:
    hooks = publish(place.hooks, place.folder)
    with place.start(*place.monitor(), *place.tap(), "-device", CARD) as qemu:
        assert qemu.greeting
        words = [*as_user(NOBODY), str(hooks.folder / "pyqemu-ifctl"), "info"]
        env = {**hooks.environ(), "PYQEMU_IFUP_POLICY": str(hooks.policy)}
        done = place.netns.run(words, env=env, check=False)
        assert done.returncode == 0, done
        assert "who holds web0 cannot be seen: " in done.stderr and "; run as root" in done.stderr
        assert f"process {qemu.pid}, pid {qemu.pid}" in done.stdout
        assert qemu.quit() == 0


def test_holders(netns: Namespace) -> None:
    tap = netns.tap("onlyhere0")
    assert all_holders().of("onlyhere0") == (), "it is in another network namespace"
    with netns.enter():
        found = all_holders()
    assert os.getpid() in found.of("onlyhere0")
    assert (os.getpid(), tap.fd, "onlyhere0") in [
        (held.pid, held.descriptor, held.tap) for held in found.held
    ]
    netns.close_kept()
    with netns.enter():
        assert all_holders().of("onlyhere0") == ()


MONITORS: list[tuple[list[str], list[Address]]] = [
    (["-qmp", "unix:/run/a,server=on,wait=off"], ["/run/a"]),
    (["--qmp", "unix:b.sock,server,nowait"], ["b.sock"]),
    (["-qmp-pretty", "tcp:127.0.0.1:4444,server=on"], [("127.0.0.1", 4444)]),
    (["-qmp", "tcp:[::1]:4444,server=on"], [("::1", 4444)]),
    (["-qmp", "tcp::4444,server=on"], [("localhost", 4444)]),
    (["-qmp", "stdio"], []),
    (["-qmp", "unix:/run/a,,b,server=on"], ["/run/a,b"]),
    (["-chardev", "socket,id=q,path=/run/q,server=on", "-mon", "chardev=q,mode=control"],
     ["/run/q"]),
    (["-mon", "q,mode=control", "-chardev", "socket,id=q,host=h,port=1,server=on"], [("h", 1)]),
    (["-chardev", "socket,id=q,path=/run/q,server=on", "-mon", "chardev=q,mode=readline"], []),
    (["-monitor", "unix:/run/m,server=on"], []),
]  # fmt: skip


@pytest.mark.parametrize(("words", "found"), MONITORS, ids=[" ".join(row[0]) for row in MONITORS])
def test_monitors_of_a_command_line(words: list[str], found: list[Address]) -> None:
    assert monitors_of(["qemu-system-x86_64", *words]) == found


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        ("qemu-system-x86_64", True),
        ("/usr/bin/qemu-system-aarch64 -S", True),
        ("kvm", True),
        ("/usr/libexec/qemu-kvm", True),
        ("/lib/ld-linux-x86-64.so.2 /x/qemu-system-arm", True),
        ("bash", False),
        ("/usr/lib/qemu/qemu-bridge-helper", False),
        ("qemu-img", False),
        ("vim qemu", False),
    ],
)
def test_which_programs_are_qemus(words: str, is_one: bool) -> None:
    assert is_qemu(words.split()) is is_one


HUBS = """\
hub 0
 \\ hub0port1: tap.0: index=0,type=tap,ifname=web0,script=/x,downscript=/y
 \\ hub0port0: e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56
rtl8139.0: index=0,type=nic,model=rtl8139,macaddr=52:54:00:12:34:57
 \\ #net027: index=0,type=user,net=10.0.2.0,restrict=off
nic0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:01
 \\ n0: index=0,type=tap,fd=4
nic0: index=1,type=nic,
 \\ n0: index=1,type=tap,fd=5
"""


def test_info_network_is_read() -> None:
    network = read_network(HUBS)
    assert len(network) == 8
    values = {"type": "e1000", "netdev": "hub0port0", "mac": "x", "addr": 16,
              "parent_bus": "/machine/i440fx/pci.0"}  # fmt: skip
    nic = nic_of("/machine/unattached/device[1]", values, network)
    assert (nic.name, nic.bus, nic.addr) == ("e1000.0", "pci.0", "02.0")
    assert [(end.id, end.ifname, end.queues) for end in nic.backends] == [("tap.0", "web0", 1)]
    nic = nic_of("/machine/peripheral/nic0", {**values, "netdev": "n0"}, network)
    assert [(nic.name, end.descriptor, end.queues) for end in nic.backends] == [("nic0", 4, 2)]
    nic = nic_of("/machine/unattached/device[2]", {**values, "netdev": "#net027"}, network)
    assert (nic.name, nic.backends[0].type) == ("rtl8139.0", "user")
    nic = nic_of("/machine/peripheral-anon/device[0]", {**values, "netdev": "", "addr": -1}, [])
    assert (nic.addr, nic.backends) == (None, ())
