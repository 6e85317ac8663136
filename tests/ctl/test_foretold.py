"""What an up would fail for: explain and doctor foretell it in its own words, and what mends it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_ifctl_doctor import let_go, own_mounts

from lab.clinic import Clinic
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import NOBODY

LAB = "networks: {lab: {bridge: labbr0, nat: {ipv4: 192.168.76.1/24}}}\n"
LAB6 = LAB.replace("192.168.76.1/24", "192.168.76.1/24, ipv6: 'fd00:76::1/64'")
LAN = "networks: {lan: {bridge: br0}}\n"


@pytest.fixture
def clinic(netns: Namespace, tmp_path: Path) -> Clinic:
    require("nft", "dnsmasq")
    return Clinic(netns, Hooks(tmp_path / "hooks", netns=netns.name), tmp_path)


def policy(clinic: Clinic, networks: str) -> None:
    name = "lab" if networks in (LAB, LAB6) else "lan"
    clinic.policy(f'{networks}rules: [{{tap: "*", network: {name}}}]\n')


State = Callable[[Clinic, ExitStack], None]
"""What puts a host into it; the stack takes away what is not mended."""


def mounts(script: str) -> State:
    """Return a state of mounts of the host's own, made by a script."""

    def make(clinic: Clinic, stack: ExitStack) -> None:
        stack.callback(let_go, own_mounts(clinic, script.format(folder=clinic.folder)))

    return make


def listening(kind: socket.SocketKind, port: int) -> State:
    def make(clinic: Clinic, stack: ExitStack) -> None:
        with clinic.netns.enter():
            taken = stack.enter_context(socket.socket(socket.AF_INET, kind))
        taken.bind(("0.0.0.0", port))
        if kind == socket.SOCK_STREAM:
            taken.listen()

    return make


def both_ports(clinic: Clinic, stack: ExitStack) -> None:
    for port in (53, 67):
        listening(socket.SOCK_DGRAM, port)(clinic, stack)


def an_other_s_bridge(clinic: Clinic, stack: ExitStack) -> None:
    clinic.netns.add_bridge("labbr0")
    stack.callback(clinic.ip, "link", "del", "labbr0")


def another_name(clinic: Clinic, stack: ExitStack) -> None:
    clinic.netns.add_bridge("br1")
    stack.callback(clinic.ip, "link", "del", "br1")
    clinic.ip("link", "property", "add", "dev", "br1", "altname", "labbr0")


def an_other_s_table(clinic: Clinic, stack: ExitStack) -> None:
    clinic.netns.run(["nft", "add", "table", "inet", "pyqemu-ifup-lab"])
    stack.callback(clinic.netns.run, ["nft", "flush", "ruleset"])


def an_other_s_subnet(clinic: Clinic, stack: ExitStack) -> None:
    clinic.ip("link", "add", "eth0", "type", "veth", "peer", "name", "far")
    stack.callback(clinic.ip, "link", "del", "eth0")
    clinic.ip("address", "add", "192.168.76.9/28", "dev", "eth0")


def external_ids(clinic: Clinic, stack: ExitStack) -> None:
    policy(clinic, "networks: {lan: {bridge: br0, external_ids: {a: b}}}\n")


def vlan(clinic: Clinic, stack: ExitStack) -> None:
    policy(clinic, "networks: {lan: {bridge: br0, vlan: 10}}\n")


def no_open_vswitch(clinic: Clinic, stack: ExitStack) -> None:
    policy(clinic, "networks: {lan: {bridge: br0, kind: openvswitch, ovsdb: 'unix:/run/no'}}\n")


def without(program: str) -> State:
    """Return the state of a host without a program, which its package manager can install."""

    def make(clinic: Clinic, stack: ExitStack) -> None:
        path = os.path.realpath(shutil.which(program) or "")
        mounts(f"mount --bind /dev/null {path}")(clinic, stack)
        clinic.program("apt-get", f"umount {path}")

    return make


READ_ONLY = "mount --bind {path} {path}; mount -o remount,bind,ro {path}"
NO_ACCOUNT = """
sed '/^dnsmasq:/d; /^nobody:/d' /etc/passwd >{folder}/passwd
mount --bind {folder}/passwd /etc/passwd
echo 'passwd: files' >{folder}/nsswitch.conf
mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf
"""
NO_NAT = """
nft=$(readlink -f $(command -v nft))
cp "$nft" {folder}/nft
cat >{folder}/fake <<'END'
#!/bin/sh
for word; do
    [ "$word" = -f ] && echo 'Error: Could not process rule: Not supported' >&2 && exit 1
done
exec {folder}/nft "$@"
END
chmod 755 {folder}/fake
mount --bind {folder}/fake "$nft"
"""
NO_LIBRARY = """
path=$(readlink -f $(command -v dnsmasq))
printf '#!/bin/sh\\necho "dnsmasq: error while loading" >&2; exit 127\\n' >{folder}/fake
chmod 755 {folder}/fake
mount --bind {folder}/fake "$path"
"""
NO_SERVER = """
mkdir -p /run/openvswitch
mount -t tmpfs none /run/openvswitch
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("/run/openvswitch/db.sock")'
"""


@dataclass(frozen=True)
class Row:
    """A state, a part of what is said, the status, doctor's check; `mends`: its command does."""

    name: str
    networks: str
    make: State
    says: str
    status: int
    check: str
    mends: bool = False


ROWS = (
    Row("bridge", LAB, an_other_s_bridge, "labbr0 is somebody else's", 77, "nat-needs"),
    Row("name", LAB, another_name, "labbr0 is another name of br1", 77, "nat-needs"),
    Row("table", LAB, an_other_s_table, "pyqemu-ifup-lab is somebody else's", 77, "nat-needs"),
    Row("subnet", LAB, an_other_s_subnet, "eth0 has 192.168.76.9/28", 71, "nat-needs"),
    Row(
        "dnsmasq",
        LAB,
        without("dnsmasq"),
        "dhcp: and dns: of network lab needs it",
        69,
        "nat-needs",
        True,
    ),
    Row("nft", LAB, without("nft"), "nat: of network lab needs it", 69, "nat-needs", True),
    Row("account", LAB, mounts(NO_ACCOUNT), "there is no user for dnsmasq", 69, "nat-needs"),
    Row(
        "udp",
        LAB,
        listening(socket.SOCK_DGRAM, 53),
        "port 53/udp of 192.168.76.1 is taken",
        71,
        "nat-needs",
    ),
    Row(
        "tcp",
        LAB,
        listening(socket.SOCK_STREAM, 53),
        "port 53/tcp of 192.168.76.1 is taken",
        71,
        "nat-needs",
    ),
    Row(
        "dhcp",
        LAB,
        listening(socket.SOCK_DGRAM, 67),
        "port 67/udp of 0.0.0.0 is taken",
        71,
        "nat-needs",
    ),
    Row(
        "ports",
        LAB,
        both_ports,
        "port 53/udp of 192.168.76.1 and port 67/udp of 0.0.0.0 are taken",
        71,
        "nat-needs",
    ),
    Row(
        "sysctl",
        LAB6,
        mounts(READ_ONLY.replace("{path}", "/proc/sys")),
        "Read-only file system; "
        "have whoever starts this container give it --sysctl net.ipv4.ip_forward=1 "
        "--sysctl net.ipv6.conf.all.forwarding=1\n",
        71,
        "nat-needs",
    ),
    Row(
        "run",
        LAB,
        mounts("mkdir -p /run/pyqemu-ifup; " + READ_ONLY.replace("{path}", "/run/pyqemu-ifup")),
        "cannot use /run/pyqemu-ifup/lab@",
        71,
        "nat-needs",
    ),
    Row("kernel", LAB, mounts(NO_NAT), "nft does not do it", 71, "nat-needs"),
    Row(
        "library",
        LAB,
        mounts(NO_LIBRARY),
        "dnsmasq does not start: dnsmasq: error while",
        71,
        "nat-needs",
    ),
    Row("ids", LAN, external_ids, "it has no place for external_ids", 71, "bridge-refuses"),
    Row("vlan", LAN, vlan, "br0 does not filter VLANs", 71, "vlan-filtering"),
    Row(
        "server",
        LAN,
        mounts(NO_SERVER),
        "nothing answers at unix:/run/openvswitch/db.sock",
        69,
        "ovs-down",
    ),
    Row("socket", LAN, no_open_vswitch, "no socket at unix:/run/no", 69, "ovs-down"),
)


def explain(clinic: Clinic, *words: str) -> str:
    """Return what explain prints, by a program that is cold only in mounts of its own."""
    if not clinic.through:
        return clinic.hooks.ctl_warm("explain", *words).stdout
    return clinic.run([str(clinic.hooks.folder / "pyqemu-ifctl"), "explain", *words]).stdout


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_what_up_ends_with_is_foretold(row: Row, clinic: Clinic) -> None:
    up = [str(clinic.hooks.folder / "pyqemu-ifup"), "web0"]
    policy(clinic, row.networks)
    tap = clinic.netns.tap("web0")
    clinic.netns.add_bridge("br0", mac="02:00:00:00:00:01")
    with ExitStack() as stack:
        stack.callback(clinic.ip, "link", "del", "br0")
        assert not [each for each in clinic.look()["findings"] if each["severity"] == "error"]
        row.make(clinic, stack)
        done = clinic.run(up)
        assert done.returncode == row.status and row.says in done.stderr, done.stderr
        told = done.stderr.strip().removeprefix("pyqemu-ifup: web0: ")
        assert f"note: an up would fail now ({row.status}): {told}\n" in explain(clinic, "web0")
        findings = clinic.find(row.check)
        assert findings
        if row.check in ("nat-needs", "bridge-refuses"):
            assert f"{findings[0]['what']}; {findings[0]['command'] or findings[0]['do']}" == told
        if row.mends:
            clinic.mend(findings[0]["command"])
            assert clinic.find(row.check) == []
            assert clinic.run(up).returncode == 0
            assert clinic.run([str(clinic.hooks.folder / "pyqemu-ifdown"), "web0"]).returncode == 0
    tap.close()


def test_somebody_else_s_bridge_is_not_mended(clinic: Clinic) -> None:
    """What is wrong with it is its owner's; that it has the network's name is all that is told."""
    policy(clinic, LAB)
    assert clinic.look()["ok"]
    with ExitStack() as stack:
        an_other_s_bridge(clinic, stack)
        clinic.ip("link", "set", "labbr0", "down")
        clinic.ip("link", "add", "eth0", "up", "type", "veth", "peer", "name", "far")
        stack.callback(clinic.ip, "link", "del", "eth0")
        clinic.ip("address", "add", "192.0.2.9/24", "dev", "eth0")
        clinic.ip("link", "set", "eth0", "master", "labbr0")
        of_it = [each for each in clinic.look()["findings"] if "labbr0" in each["what"]]
        assert [each["check"] for each in of_it] == ["nat-needs"]
        clinic.ip("link", "set", "eth0", "nomaster")
        of_it = [each for each in clinic.look()["findings"] if "labbr0" in each["what"]]
        assert [each["check"] for each in of_it] == ["nat-needs"]
        clinic.ip("link", "del", "labbr0")
        clinic.ip("link", "add", "labbr0", "type", "veth", "peer", "name", "labfar")
        of_it = [each for each in clinic.look()["findings"] if "labbr0" in each["what"]]
        assert [each["check"] for each in of_it] == ["nat-needs"]


def test_explain_names_the_folder_that_up_makes(clinic: Clinic) -> None:
    policy(clinic, LAB)
    tap = clinic.netns.tap("web0")
    said = explain(clinic, "web0")
    (folder,) = (line.split()[2] for line in said.splitlines() if "mkdir -p" in line)
    assert clinic.run([clinic.hooks.ifup, "web0"]).returncode == 0
    assert Path(folder, "dnsmasq.conf").exists()
    assert f"dhcp-leasefile={folder}/leases" in said
    assert clinic.run([clinic.hooks.ifdown, "web0"]).returncode == 0
    tap.close()


def test_a_user_s_taps_are_counted_and_the_tap_s_owner_looked_at(clinic: Clinic) -> None:
    clinic.policy("""\
networks: {lan: {bridge: br0, users: [nobody], max_taps: 1}}
rules: [{tap: "*", network: lan}]
""")
    clinic.netns.add_bridge("br0", mac="02:00:00:00:00:01")
    clinic.ip("tuntap", "add", "dev", "own0", "mode", "tap", "user", "nobody")
    clinic.ip("tuntap", "add", "dev", "root0", "mode", "tap", "user", "0")
    clinic.ip("tuntap", "add", "dev", "all0", "mode", "tap", "user", "nobody", "multi_queue")

    def notes(tap: str, *words: str) -> str:
        return explain(clinic, tap, *words).partition("\nnote: ")[2]

    mark = f"pyqemu-ifup/1 network=lan kind=linux bridge=br0 pid=1 start=1 uid={NOBODY} made=1"
    assert notes("own0", "--user", "nobody") == ""
    assert "(77): somebody else's tap: user 0 owns it" in notes("root0", "--user", "nobody")
    assert "(77): shared with others: user 65534 may open a queue" in notes("all0")
    clinic.ip("link", "set", "dev", "own0", "alias", mark)
    assert "(77): user nobody has 1 tap on network lan already" in notes("x", "--user", "nobody")
    for name in ("own0", "root0", "all0", "br0"):
        clinic.ip("link", "del", name)


def test_a_dead_vswitchd_is_told_of_before_an_up_waits_for_it(
    clinic: Clinic, ovs: OpenVSwitch
) -> None:
    ovs.add_bridge("br-int", hwaddr="02:00:00:00:00:0c", mtu=1500)
    clinic.policy(
        f"networks: {{sw: {{bridge: br-int, ovsdb: '{ovs.db}'}}}}\n"
        'rules: [{tap: "*", network: sw}]\n'
    )
    assert "\nnote: " not in explain(clinic, "web0")
    ovs.vswitchd.stop()
    try:
        said = explain(clinic, "web0")
    finally:
        ovs.vswitchd.cont()
    pid = ovs.vswitchd.pid
    assert (
        f"note: an up would wait until its deadline (75): ovs-vswitchd is stopped, process {pid} "
        f"({ovs.db}); kill -CONT {pid}\n"
    ) in said
    ovs.vswitchd.kill()
    assert "(75): ovs-vswitchd does not run (" in explain(clinic, "web0")
    ovs.start_vswitchd()
    ovs.vsctl("del-br", "br-int")
