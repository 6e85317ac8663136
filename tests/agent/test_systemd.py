"""The units for systemd: well-formed, hardened, and with the agent at work under them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lab.dns import ask, family, flood, guest, servers
from lab.hooks import CHECKOUT
from lab.needs import lack, require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import python
from lab.systemd import LAB, SYSTEMD, UNITS, Systemd

SERVICE = "pyqemu-ifd.service"
SOCKET = "pyqemu-ifd.socket"
USERS_SERVICE, USERS_SOCKET = "pyqemu-ifd-users.service", "pyqemu-ifd-users.socket"
LATER = 20.0
"""Seconds after which what must happen soon has not happened."""
GC = "pyqemu-ifup-gc.service"
TIMER = "pyqemu-ifup-gc.timer"
OLDEST = 252
EXPOSURE = 3.1
"""The most that `systemd-analyze security` may find: from 0, nothing exposed, to 10."""
HIDDEN = ("/home/", "/root/", "/run/user/")
"""Where ProtectHome= lets no program be run."""

POLICY = """\
version: 1
networks:
  lan: {bridge: br0, isolated: true}
  tenants: {bridge: br-int, vlan: 100, users: ["12345"]}
rules:
  - {vm: web1, network: lan}
  - {vm: web2, network: tenants}
"""


def analyze(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze; skip the test where there is none that is new enough."""
    program = shutil.which("systemd-analyze")
    if program is None:
        lack("no systemd-analyze in PATH")
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    if int(told.stdout.split()[1]) < OLDEST:
        lack(f"systemd is older than {OLDEST}")
    return subprocess.run([program, *words], capture_output=True, text=True, check=False)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units in a folder, with programs for them to start."""
    for program in ("pyqemu-ifd", "pyqemu-ifctl", "dnsmasq"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    for unit in UNITS.iterdir():
        (tmp_path / unit.name).write_text(unit.read_text().replace("@bin@", str(tmp_path)))
    return tmp_path


def test_systemd_finds_no_fault(units: Path) -> None:
    # NOTE: not the man page, which may not be installed.
    done = analyze("verify", "--man=no", *(units / unit.name for unit in sorted(UNITS.iterdir())))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("service", [unit.name for unit in UNITS.glob("*.service")])
def test_what_systemd_says_of_the_hardening(units: Path, service: str) -> None:
    done = analyze("security", "--offline=true", "--no-pager", units / service)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    print(found.group())
    assert float(found.group(1)) <= EXPOSURE, done.stdout


@pytest.fixture
def place(netns: Namespace, tmp_path: Path) -> Path:
    """A folder for a systemd of the test's own, where one can be run."""
    require("root", "tun", "ip")
    if not SYSTEMD.exists() or shutil.which("systemctl") is None:
        lack("no systemd to run")
    if python().startswith(HIDDEN):
        lack(f"ProtectHome= hides {python()}")
    if "cgroup2" not in Path("/proc/filesystems").read_text():
        lack("the kernel has no cgroup2")
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    netns.ip("link", "set", "dev", "br0", "mtu", "1400")
    return tmp_path / "systemd"


def report(systemd: Systemd) -> Any:
    """Return what pyqemu-ifctl agent tells, as an object."""
    end = time.monotonic() + LATER
    while (done := systemd.hook("pyqemu-ifctl", "agent", "--json")).returncode == 75:
        # NOTE: it is about to start, on a machine that has more to do.
        assert time.monotonic() < end, done.stderr
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_a_hook_starts_the_agent_which_attaches_to_a_linux_bridge(
    place: Path, netns: Namespace
) -> None:
    with Systemd(netns, place, POLICY) as systemd:
        systemd.ctl("start", SOCKET)
        assert systemd.property(SERVICE, "ActiveState") == "inactive"
        netns.tap("t0")
        done = systemd.hook("pyqemu-ifup", "t0", qemu=("-name", "web1"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert systemd.property(SERVICE, "ActiveState") == "active"
        link = netns.link("t0")
        assert (link["master"], link["mtu"], "UP" in link["flags"]) == ("br0", 1400, True)
        assert link["linkinfo"]["info_slave_data"]["isolated"] is True
        ipv6 = netns.run(["cat", "/proc/sys/net/ipv6/conf/t0/disable_ipv6"])
        assert ipv6.stdout == "1\n"
        # NOTE: where that has taken it long, the hook did the work itself.
        systemd.ctl("start", SERVICE)
        assert systemd.hook("pyqemu-ifdown", "t0").returncode == 0
        assert "master" not in netns.link("t0")
        requests = report(systemd)["requests"]
        assert (requests["down"]["count"], requests["down"]["failed"]) == (1, 0)


NAT = """\
version: 1
networks: {lab: {bridge: labbr0, nat: {ipv4: 192.168.76.1/24, ipv6: "fd00:76::1/64"}}}
rules: [{tap: "*", network: lab}]
"""


def test_a_network_s_dnsmasq_is_a_unit_of_its_own(place: Path, netns: Namespace) -> None:
    """It outlives the agent, starts again after a crash, and goes with the network."""
    require("dnsmasq", "nft")
    unit = f"pyqemu-ifup-dnsmasq@lab@{netns.inode}.service"
    with Systemd(netns, place, NAT) as systemd:
        systemd.ctl("start", SERVICE)
        netns.tap("t0")
        done = systemd.hook("pyqemu-ifup", "t0", qemu=("-name", "web1"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert netns.link("t0")["master"] == "labbr0"
        assert systemd.property(unit, "ActiveState") == "active"
        (server,) = servers(netns)
        assert unit in Path(f"/proc/{server}/cgroup").read_text()
        assert "\nUid:\t0\t" not in Path(f"/proc/{server}/status").read_text()
        systemd.ctl("restart", SERVICE)
        assert servers(netns) == [server]
        done = systemd.hook("pyqemu-ifup", "t0", qemu=("-name", "web1"))
        assert (done.returncode, done.stderr, servers(netns)) == (0, "", [server])
        os.kill(server, signal.SIGKILL)
        end = time.monotonic() + 20
        while servers(netns) in ([], [server]):
            assert time.monotonic() < end
            time.sleep(0.05)
        done = systemd.hook("pyqemu-ifdown", "t0")
        assert (done.returncode, done.stderr) == (0, "")
        assert "labbr0" not in netns.links() and not servers(netns)
        assert systemd.property(unit, "ActiveState") == "inactive"
        assert report(systemd)["requests"]["down"]["failed"] == 0


def test_a_guest_s_tcp_connections_fill_nothing_but_its_network_s_dnsmasq(
    place: Path, netns: Namespace
) -> None:
    """Those of a guest to the name server, each of which is a process there."""
    require("dnsmasq", "nft")
    with Systemd(netns, place, NAT) as systemd, ExitStack() as stack:
        systemd.ctl("start", SERVICE)
        netns.tap("t0")
        assert systemd.hook("pyqemu-ifup", "t0").returncode == 0
        other = stack.enter_context(guest(netns, "labbr0", "192.168.76.5/24"))
        stack.enter_context(flood(other, "192.168.76.1", 150))
        (server,) = servers(netns)
        end = time.monotonic() + 20
        while len(family(server)) < 20:
            assert time.monotonic() < end
            time.sleep(0.05)
        (cgroup,) = {Path(f"/proc/{pid}/cgroup").read_text() for pid in family(server)}
        assert "/pyqemu-ifup-dnsmasq@lab@" in cgroup
        assert ask(other, "192.168.76.1", "x", tcp=False) is not None
        netns.tap("t1")
        assert systemd.hook("pyqemu-ifup", "t1").returncode == 0
        assert systemd.hook("pyqemu-ifdown", "t1").returncode == 0
        assert systemd.hook("pyqemu-ifdown", "t0").returncode == 0
        netns.ip("link", "set", "dev", f"p{other.inode}", "nomaster")
        assert systemd.hook("pyqemu-ifctl", "gc").returncode == 0
        assert not servers(netns)


ON_INTERFACE = """\
version: 1
networks: {dmz: {parent: v0}}
"""
DROP_IN = (UNITS.parent / "macvtap.conf").read_text()


@pytest.mark.parametrize("settings", ["", DROP_IN], ids=("without", "with"))
def test_the_drop_in_lets_the_agent_open_macvtaps(
    settings: str, place: Path, netns: Namespace
) -> None:
    require("macvtap", "netdev-chains")
    lines = ("link add v0 up type veth peer name v1", "link set v1 up")
    netns.run(["ip", "-batch", "-"], input="\n".join(lines))
    netns.kept.callback(netns.ip, "link", "del", "v0")
    with Systemd(netns, place, ON_INTERFACE, settings=settings) as systemd:
        systemd.ctl("start", SERVICE)
        run = ("run", "--nic", "dmz,mac=52:54:00:aa:00:01", "--", "true")
        done = systemd.hook("pyqemu-ifctl", *run)
        if settings:
            assert (done.returncode, done.stderr) == (0, "")
        else:
            assert done.returncode == 77
            assert "give the agent's unit the drop-in macvtap.conf" in done.stderr
        # NOTE: the agent sees the process end.
        end = time.monotonic() + LATER
        while "tap0" in netns.links() or netns.run(["nft", "list", "ruleset"]).stdout:
            assert time.monotonic() < end
            time.sleep(0.05)


OTHER = 12345
"""A user that is not root and has no name."""


@pytest.fixture
def ovs_of_another(ovs_netdev: OpenVSwitch) -> OpenVSwitch:
    """An Open vSwitch with br-int, to which root without CAP_DAC_OVERRIDE has no access.

    As where ovsdb-server runs as `openvswitch`.
    """
    ovs_netdev.add_bridge("br-int")
    for path in (ovs_netdev.dir, ovs_netdev.dir / "db.sock"):
        os.chown(path, OTHER, OTHER)
        path.chmod(0o700)
    return ovs_netdev


HELPER = """
import fcntl, socket, subprocess, sys
ours, theirs = socket.socketpair()
code = "import sys; sys.path[:0] = {roots!r}; from pyqemu_ifd.bridge_helper import main; main()"
words = [sys.executable, "-I", "-c", code, "--br={network}", f"--fd={{theirs.fileno()}}"]
subprocess.run(words, pass_fds=[theirs.fileno()], check=True)
theirs.close()
_, [tap], _, _ = socket.recv_fds(ours, 16, 1)
print(fcntl.ioctl(tap, 0x800454D2, bytes(40))[:16].rstrip(bytes(1)).decode(), flush=True)
sys.stdin.read()
"""


def helped(systemd: Systemd, network: str, then: str = "") -> subprocess.Popen[str]:
    """Start what the helper makes a tap on the network for; it is OTHER's, and tells the name.

    It ends with its standard input, and does `then` before.
    """
    return subprocess.Popen(
        systemd.argv(
            "setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups",
            "--inh-caps=-all", "--bounding-set=-all", systemd.python, "-I", "-c",
            HELPER.format(roots=systemd.path, network=network) + then,
        ),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


HOLDING = """
import socket, sys
place = socket.socket(socket.AF_UNIX)
place.bind(chr(0) + "taps")
place.listen()
print("listens", flush=True)
taps = []
while True:
    taps += socket.recv_fds(place.accept()[0], 1, 1)[1]
"""
PASSING = """
passing = socket.socket(socket.AF_UNIX)
passing.connect(chr(0) + "taps")
fcntl.ioctl(tap, 0x400454CB, 1)
socket.send_fds(passing, [b"x"], [tap])
"""


def test_a_user_s_tap_that_another_user_has_by_now_goes(place: Path, netns: Namespace) -> None:
    """By gc's unit as by the agent's: other users' processes are no secret to them."""
    policy = POLICY.replace("isolated: true", f"users: ['{OTHER}']")
    with Systemd(netns, place, policy) as systemd, ExitStack() as stack:
        systemd.ctl("start", USERS_SERVICE)
        words = (
            "setpriv",
            f"--reuid={OTHER + 1}",
            f"--regid={OTHER}",
            "--clear-groups",
            systemd.python,
            "-I",
            "-c",
            HOLDING,
        )
        holder = subprocess.Popen(systemd.argv(*words), stdout=subprocess.PIPE, text=True)
        stack.enter_context(holder)
        stack.callback(holder.kill)
        assert holder.stdout is not None and holder.stdout.readline() == "listens\n"
        for unit in (GC, SERVICE):
            # Who had it has another process, which has another tap.
            with helped(systemd, "lan", PASSING) as user, helped(systemd, "lan") as other:
                assert user.stdout is not None and other.stdout is not None
                tap = user.stdout.readline().strip()
                other.stdout.readline()
                user.communicate()
                assert netns.link(tap)["master"] == "br0"
                systemd.ctl("start", unit)
                end = time.monotonic() + LATER
                while tap in netns.links():
                    assert time.monotonic() < end, unit
                    time.sleep(0.05)
                other.communicate()


def test_a_network_that_a_user_comes_to_first(place: Path, netns: Namespace) -> None:
    """The users' agent makes it, and root's takes it away."""
    require("dnsmasq", "nft")
    with Systemd(netns, place, NAT.replace("labbr0,", f"labbr0, users: ['{OTHER}'],")) as systemd:
        systemd.ctl("start", SERVICE, USERS_SERVICE)
        with helped(systemd, "lab") as guest:
            assert guest.stdout is not None
            assert guest.stdout.readline() == "tap0\n"
            assert netns.link("tap0")["master"] == "labbr0"
            (server,) = servers(netns)
            assert "/pyqemu-ifup-dnsmasq@lab@" in Path(f"/proc/{server}/cgroup").read_text()
            guest.communicate()
        assert guest.returncode == 0
        end = time.monotonic() + LATER
        # NOTE: the rules go last.
        while servers(netns) or netns.run(["nft", "list", "tables"]).stdout:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert "labbr0" not in netns.links()


def test_open_vswitch_of_another_user_and_a_tap_for_one(
    place: Path, netns: Namespace, ovs_of_another: OpenVSwitch
) -> None:
    with Systemd(netns, place, POLICY, ovs=ovs_of_another) as systemd:
        systemd.ctl("start", SERVICE, USERS_SERVICE)
        netns.tap("t0")
        done = systemd.hook("pyqemu-ifup", "t0", qemu=("-name", "web2"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        port = ovs_of_another.find("Port", "t0")
        assert port is not None and (port["tag"], port["vlan_mode"]) == (100, "access")
        assert systemd.hook("pyqemu-ifdown", "t0").returncode == 0
        assert ovs_of_another.find("Port", "t0") is None
        own = ovs_of_another.vsctl("get", "Bridge", "br-int", "ports").stdout.strip()
        with helped(systemd, "tenants") as guest:
            assert guest.stdout is not None
            assert guest.stdout.readline() == "tap0\n"
            port = ovs_of_another.find("Port", "tap0")
            assert port is not None and (port["tag"], port["vlan_mode"]) == (100, "access")
            guest.communicate()
        assert guest.returncode == 0
        # The agent has seen the tap's end.
        ovs_of_another.wait_until("Bridge", "br-int", f"ports={own}")
        assert report(systemd)["last_error"] is None


STALE = ("pyqemu-ifup=1", "pyqemu-network=tenants", "pyqemu-ifindex=9", "pyqemu-boot-id=earlier")
GUEST = """\
[Unit]
After=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
"""


def test_what_an_earlier_boot_has_left_is_gone_before_any_guest_starts(
    place: Path, netns: Namespace, ovs_of_another: OpenVSwitch
) -> None:
    """Both at boot, as the enabled service and a unit of the administrator's."""
    # NOTE: without a device of the name, newer ones end with 65, the row committed.
    ovs_of_another.vsctl(
        "add-port",
        "br-int",
        "web2",
        "--",
        "set",
        "Interface",
        "web2",
        *(f"external_ids:{pair}" for pair in (*STALE, f"pyqemu-netns={netns_of(netns)}")),
        check=False,
    )
    assert ovs_of_another.find("Port", "web2") is not None
    machine = Systemd(netns, place, POLICY, ovs=ovs_of_another)
    units = place / "units"
    (units / "guest.service").write_text(GUEST)
    (units / "network.target").write_text("[Unit]\n")
    (units / "lab.target.wants").mkdir()
    for unit in (GC, TIMER, "guest.service", "network.target"):
        (units / "lab.target.wants" / unit).symlink_to(f"../{unit}")
    with machine as systemd:
        assert ovs_of_another.find("Port", "web2") is None
        moments = [
            int(systemd.property(unit, f"ExecMain{moment}TimestampMonotonic"))
            for unit, moment in ((GC, "Exit"), ("guest.service", "Start"))
        ]
        assert 0 < moments[0] <= moments[1]
        assert systemd.property(GC, "Result") == "success"
        # NOTE: the timer starts it again only because it does not stay active.
        assert systemd.property(GC, "ActiveState") == "inactive"
        assert systemd.property(TIMER, "ActiveState") == "active"
        assert systemd.property(TIMER, "Unit") == GC
        assert systemd.property(TIMER, "NextElapseUSecRealtime") not in ("", "0", "n/a")


def netns_of(netns: Namespace) -> str:
    """Return a namespace as our mark names it."""
    stat = netns.path.stat()
    return f"{stat.st_dev}:{stat.st_ino}"


def main_pid(systemd: Systemd) -> int:
    """Return the agent's process, as its systemd counts."""
    return int(systemd.property(SERVICE, "MainPID"))


def test_an_agent_that_is_killed_is_started_again_and_its_socket_stays(
    place: Path, netns: Namespace
) -> None:
    with Systemd(netns, place, POLICY) as systemd:
        systemd.ctl("start", SERVICE)
        before = main_pid(systemd)
        systemd.ctl("kill", "--signal=KILL", SERVICE)
        assert report(systemd)["requests"] == {}
        assert main_pid(systemd) not in (0, before)
        assert systemd.property(SERVICE, "NRestarts") == "1"


def test_the_watchdog(place: Path, netns: Namespace) -> None:
    """It leaves a living agent alone, and ends one that stands still."""
    with Systemd(netns, place, POLICY, settings="WatchdogSec=1\nWatchdogSignal=KILL") as systemd:
        systemd.ctl("start", SERVICE)
        before = main_pid(systemd)
        # NOTE: that it is not ended has no event.
        time.sleep(2.5)
        assert main_pid(systemd) == before
        systemd.ctl("kill", f"--signal={signal.SIGSTOP.value}", SERVICE)
        assert report(systemd)["requests"] == {}
        assert main_pid(systemd) not in (0, before)
        assert systemd.property(SERVICE, "NRestarts") == "1"


def test_a_stop_ends_it_well_and_takes_the_socket_away(place: Path, netns: Namespace) -> None:
    with Systemd(netns, place, POLICY) as systemd:
        systemd.ctl("start", SERVICE)
        assert report(systemd)["policy"]["error"] is None
        systemd.ctl("reload", SERVICE)
        assert report(systemd)["policy"]["error"] is None
        systemd.ctl("stop", SOCKET)
        assert systemd.property(SERVICE, "Result") == "success"
        assert systemd.property(SERVICE, "ActiveState") == "inactive"
        done = systemd.hook("pyqemu-ifctl", "agent")
        assert (done.returncode, done.stdout) == (69, "")
        assert done.stderr == (
            "pyqemu-ifctl: no agent listens at /run/pyqemu-ifup/agent.sock: No such file or "
            "directory; start it: systemctl start pyqemu-ifd, or pyqemu-ifd; the hooks do without\n"
        )


UNIT_COMMAND = re.compile(r"systemctl (?:re)?start pyqemu-[a-z.-]*[a-z]")
NO_AGENT = """\
#!{python} -I
import os, socket
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
    ready.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
place = socket.socket(fileno=3)
while True:
    asked = place.accept()[0]
    asked.recv(4096)
    asked.send(b"?no such version")
"""
"""An agent of another version, which takes no request of this one."""


def follow(systemd: Systemd, done: subprocess.CompletedProcess[str], status: int, why: str) -> None:
    """Run what a program which says `why` has told, one command for each agent that it is about."""
    assert done.returncode == status and why in done.stderr, done
    commands = UNIT_COMMAND.findall(done.stderr)
    assert commands, done
    for command in commands:
        told = systemd.run("sh", "-c", command)
        assert (told.returncode, told.stderr) == (0, ""), (command, told)


def test_what_is_told_of_an_agent_brings_it_back(place: Path, netns: Namespace) -> None:
    """Of one that is not there, is mute, of another version, or older than what is installed."""
    machine = Systemd(netns, place, POLICY)
    program, copy = place / "bin" / "pyqemu-ifd", place / "bin" / "ifd"
    shutil.copytree(CHECKOUT / "ifd", copy)
    text = program.read_text().replace(f"'{LAB}/checkout/ifd'", f"'{LAB}/bin/ifd'")
    program.write_text(text)
    with machine as systemd:
        follow(systemd, systemd.hook("pyqemu-ifctl", "agent"), 69, "no agent listens at ")
        assert report(systemd)["pid"] == main_pid(systemd)
        systemd.ctl("kill", f"--signal={signal.SIGSTOP.value}", SERVICE)
        follow(systemd, systemd.hook("pyqemu-ifctl", "agent"), 75, "does not answer: waited ")
        assert report(systemd)["pid"] == main_pid(systemd)
        for file in (copy / "pyqemu_ifd").glob("*.py"):
            shutil.copy2(file, f"{file}.new")
            os.replace(f"{file}.new", file)
        follow(systemd, systemd.hook("pyqemu-ifctl", "agent"), 0, "is older than what is installed")
        told = report(systemd)
        assert (told["outdated"], told["users"]["outdated"]) == (False, False)
        program.write_text(NO_AGENT.format(python=systemd.python))
        systemd.ctl("restart", SERVICE)
        program.write_text(text)
        done = systemd.hook("pyqemu-ifctl", "agent")
        follow(systemd, done, 71, "is no agent of this version: no such version")
        assert report(systemd)["pid"] == main_pid(systemd)


CALLING = f"""
import fcntl, os, struct, subprocess, sys
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"t1", 0x1002))
os.setgroups([]), os.setgid({OTHER}), os.setuid({OTHER})
sys.exit(subprocess.run(["{LAB}/bin/pyqemu-ifup", "t1"], pass_fds=[tap]).returncode)
"""
"""As a user's QEMU calls its script for its tap; who opens /dev/net/tun is the host's affair."""


@pytest.mark.parametrize(
    ("who", "status", "why"),
    [
        ("run", 69, "no agent at /run/pyqemu-ifup/users.sock: "),
        ("a hook", 77, "the agent does it for you: let root start it "),
    ],
    ids=["run", "a hook"],
)
def test_what_a_user_is_told_where_no_agent_is_has_it_do_the_work(
    place: Path, netns: Namespace, who: str, status: int, why: str
) -> None:
    policy = POLICY.replace("isolated: true", f"users: ['{OTHER}']")
    as_other = (
        "setpriv",
        f"--reuid={OTHER}",
        f"--regid={OTHER}",
        "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
        "sh",
        "-c",
        'exec "$0" "$@"',
    )
    run = (*as_other, f"{LAB}/bin/pyqemu-ifctl", "run", "--nic", "lan", "--", "true")
    hook = ("-I", "-c", CALLING, "-name", "web1")
    netns.ip("tuntap", "add", "dev", "t1", "mode", "tap", "user", str(OTHER))
    with Systemd(netns, place, policy) as systemd:
        words = run if who == "run" else (systemd.python, *hook)
        follow(systemd, systemd.run(*words), status, why)
        done = systemd.run(*words)
        assert (done.returncode, done.stderr) == (0, ""), done
    assert netns.link("t1").get("master") == (None if who == "run" else "br0")
    netns.ip("link", "del", "t1")


def test_each_socket_is_for_whom_it_is_for(place: Path, netns: Namespace) -> None:
    """Also where an earlier version's unit, which made the one socket everybody's, is in force."""
    machine = Systemd(netns, place, POLICY)
    drop_in = place / "units" / f"{SOCKET}.d"
    drop_in.mkdir()
    (drop_in / "old.conf").write_text("[Socket]\nSocketMode=0666\n")
    with machine as systemd:
        systemd.ctl("start", SOCKET)
        modes = "stat", "-c", "%a", "/run/pyqemu-ifup/agent.sock", "/run/pyqemu-ifup/users.sock"
        assert systemd.run(*modes).stdout == "666\n666\n", "users.sock comes with the other"
        systemd.ctl("start", SERVICE, USERS_SERVICE)
        assert systemd.run(*modes).stdout == "600\n666\n"
        told = report(systemd)
        assert told["users"]["policy"]["error"] is None
        as_other = (
            "setpriv",
            f"--reuid={OTHER}",
            f"--regid={OTHER}",
            "--clear-groups",
            "--inh-caps=-all",
            "--bounding-set=-all",
        )
        done = systemd.run(*as_other, f"{LAB}/bin/pyqemu-ifctl", "agent")
        assert (done.returncode, done.stderr) == (0, "")
        assert "/run/pyqemu-ifup/users.sock" in done.stdout and "agent.sock" not in done.stdout
        for name in ("CPUWeight", "TasksMax", "LimitNOFILE", "MemoryMax"):
            less, more = (systemd.property(unit, name) for unit in (USERS_SERVICE, SERVICE))
            assert int(less) < (int(more) if more.isdigit() else 100), name
