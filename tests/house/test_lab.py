"""The laboratory itself: its taps, switches and snapshots tell the truth; facts they rest on."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from lab.checkout import ROOT
from lab.netns import RUN_NETNS, Namespace
from lab.ovs import OpenVSwitch
from lab.snapshot import Snapshot, diff, leftovers
from lab.taps import Tap, carries, frame, holds, mac, tags, vid
from lab.warm import Warm

pytestmark = pytest.mark.host("it leaves things on the host, to see that they are found")

HWADDR = "52:54:00:ff:00:01"


# Frames


@pytest.mark.parametrize(
    ("vids", "told"), [((), None), ((10,), 10), ((0,), 0), ((10, 20), [10, 20]), ((0, 20), [0, 20])]
)
def test_tags_are_told(vids: tuple[int, ...], told: int | list[int] | None) -> None:
    built = frame(mac(1), payload=b"x", vids=vids)
    assert vid(built) == told
    assert tags(built) == vids


# Namespaces


def test_thread_enters_and_comes_back(netns: Namespace) -> None:
    before = os.readlink("/proc/thread-self/ns/net")
    with netns.enter():
        assert os.stat("/proc/thread-self/ns/net").st_ino == netns.inode
        assert [name for _index, name in socket.if_nameindex()] == ["lo"]
    assert os.readlink("/proc/thread-self/ns/net") == before


def test_command_that_fails_says_why(netns: Namespace) -> None:
    with pytest.raises(RuntimeError, match=r"`ip -d -j link show dev no0` ended 1: Device .*no0"):
        netns.link("no0")


@pytest.mark.parametrize("vnet_hdr", [False, True])
def test_bridge_carries_frames_between_taps(netns: Namespace, vnet_hdr: bool) -> None:
    netns.add_bridge("br0", mac=HWADDR)
    a = netns.tap("a", vnet_hdr=vnet_hdr, up=True, master="br0")
    b = netns.tap("b", vnet_hdr=vnet_hdr, up=True, master="br0")
    assert carries(a, b, b"hello") is not None
    assert a.recv(0.1, holds(b"hello")) is None
    netns.ip("link", "del", "br0")


@pytest.mark.parametrize("vids", [(), (10,), (10, 20)], ids=["untagged", "one tag", "two tags"])
def test_packet_socket_sees_tags(netns: Namespace, vids: tuple[int, ...]) -> None:
    netns.ip("link", "add", "v0", "type", "veth", "peer", "name", "v1")
    for name in ("v0", "v1"):
        netns.ip("link", "set", name, "up")
    v0, v1 = netns.raw("v0"), netns.raw("v1")
    sent = frame(mac(1), payload=b"seen", vids=vids)
    v0.send(sent)
    assert v1.recv(1, holds(b"seen")) == sent
    netns.ip("link", "del", "v0")


def test_persistent_tap_outlives_its_descriptor(netns: Namespace) -> None:
    with netns.enter(), Tap("keep0", persist=True):
        assert "keep0" in netns.links()
    assert netns.link("keep0")["linkinfo"]["info_data"]["persist"]
    netns.ip("link", "del", "keep0")


# Snapshots


def test_nothing_done_is_no_difference(netns: Namespace, ovs: OpenVSwitch) -> None:
    ovs.add_bridge("br-int", hwaddr=HWADDR)
    before = Snapshot.take(netns, ovs)
    assert leftovers(before, netns, ovs) == []
    ovs.vsctl("del-br", "br-int")


def test_each_leftover_is_seen(netns: Namespace, ovs: OpenVSwitch) -> None:
    ovs.add_bridge("br-int", hwaddr=HWADDR)
    netns.add_bridge("br0", mac=HWADDR)
    before = Snapshot.take(netns, ovs)

    def seen() -> list[str]:
        return [line.split(": ")[0] for line in diff(before, Snapshot.take(netns, ovs))]

    tap = netns.tap("t0")
    assert seen() == ["link t0"]
    netns.ip("link", "set", "t0", "master", "br0")
    assert {line.split()[0] for line in seen()} >= {"link"}
    netns.run(["bridge", "fdb", "add", "52:54:00:00:00:09", "dev", "t0", "master", "static"])
    assert "fdb t0 52:54:00:00:00:09 vlan none" in seen()
    tap.close()
    assert seen() == []

    ovs.add_port("br-int", "br-int-x", "tag=10")
    assert {"row Bridge br-int", "row Interface br-int-x", "row Port br-int-x"} <= set(seen())
    ovs.del_port("br-int-x")
    assert seen() == []

    netns.run(["nft", "add", "table", "inet", "left"])
    assert [line.split(" handle")[0] for line in seen()] == ["nft table inet left"]
    netns.run(["nft", "delete", "table", "inet", "left"])

    netns.ip("link", "set", "br0", "mtu", "1400", "alias", "somebody's")
    assert diff(before, Snapshot.take(netns, ovs)) == [
        'link br0: ifalias: None -> "somebody\'s"',
        "link br0: mtu: 1500 -> 1400",
    ]
    netns.ip("link", "del", "br0")
    ovs.vsctl("del-br", "br-int")


def test_process_is_seen_wherever_it_went(netns: Namespace) -> None:
    before = Snapshot.take(netns)
    script = "import os, signal; os.setsid(); print(os.getpid(), flush=True); signal.pause()"
    # NOTE: its parent ends at once, and it runs in the host's namespace: only the mark is left.
    with subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" &', sys.executable, script], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
    (line,) = diff(before, Snapshot.take(netns))
    assert line.startswith(f"process {pid}: left behind: {sys.executable}")
    os.kill(pid, signal.SIGKILL)
    assert leftovers(before, netns) == []


def test_empty_bridge_may_change_the_mac_that_nobody_set(netns: Namespace) -> None:
    netns.ip("link", "add", "loose", "up", "type", "bridge")
    netns.add_bridge("pinned", mac=HWADDR)
    before = Snapshot.take(netns)
    macs = {name: netns.link(name)["address"] for name in ("loose", "pinned")}
    for bridge in macs:
        with netns.tap(f"t-{bridge}", up=True, master=bridge):
            assert diff(before, Snapshot.take(netns)) != []
    assert leftovers(before, netns) == []
    assert netns.link("loose")["address"] != macs["loose"]
    assert netns.link("pinned")["address"] == macs["pinned"]
    netns.ip("link", "set", "pinned", "address", "52:54:00:ff:00:02")
    assert "link pinned: address" in diff(before, Snapshot.take(netns))[0]
    netns.ip("link", "del", "loose")
    netns.ip("link", "del", "pinned")


# Open vSwitch


def test_access_port_tags_frames(netns: Namespace, ovs_netdev: OpenVSwitch) -> None:
    ovs_netdev.add_bridge("br-int", hwaddr=HWADDR)
    access, trunk, other = (netns.tap(name, up=True) for name in ("access", "trunk", "other"))
    ovs_netdev.add_port("br-int", "access", "tag=10", "vlan_mode=access")
    ovs_netdev.add_port("br-int", "trunk", "trunks=10,20", "vlan_mode=trunk")
    ovs_netdev.add_port("br-int", "other", "tag=20", "vlan_mode=access")
    ovs_netdev.wait_up("access", "trunk", "other")

    seen = carries(access, trunk, b"from access")
    assert seen is not None and vid(seen) == 10
    assert other.recv(0.2, holds(b"from access")) is None
    seen = carries(trunk, access, b"from trunk", (10,))
    assert seen is not None and vid(seen) is None
    assert carries(trunk, access, b"wrong vlan", (30,)) is None
    for name in ("access", "trunk", "other"):
        ovs_netdev.del_port(name)
    ovs_netdev.vsctl("del-br", "br-int")


def test_rows_are_plain(ovs: OpenVSwitch) -> None:
    ovs.add_bridge("br-int", hwaddr=HWADDR, mtu=1400)
    ovs.vsctl("set", "Port", "br-int", "trunks=10,20", "external_ids:a=b")
    row = ovs.row("Port", "br-int")
    assert (row["trunks"], row["tag"], row["external_ids"]) == ([10, 20], [], {"a": "b"})
    assert ovs.row("Interface", "br-int")["mtu_request"] == 1400
    assert ovs.find("Port", "nobody") is None
    with pytest.raises(LookupError, match="no Port nobody in unix:/tmp/ovs-"):
        ovs.row("Port", "nobody")
    ovs.vsctl("del-br", "br-int")


def test_tcp_address_serves_too(netns: Namespace, ovs: OpenVSwitch) -> None:
    assert ovs.tcp_db is not None
    netns.run(["ovs-vsctl", f"--db={ovs.tcp_db}", "--timeout=5", "show"])


def test_daemons_can_be_stopped_killed_and_started_again(ovs: OpenVSwitch) -> None:
    ovs.vswitchd.stop()
    mute = ovs.vsctl("--timeout=1", "add-br", "br-late", check=False)
    assert mute.returncode == -signal.SIGALRM
    ovs.vswitchd.cont()
    ovs.vsctl("del-br", "br-late")

    ovs.server.kill()
    assert ovs.vsctl("--timeout=1", "show", check=False).returncode != 0
    ovs.start_server()
    ovs.add_bridge("br-again", hwaddr=HWADDR)
    ovs.vswitchd.kill()
    ovs.start_vswitchd()
    ovs.vsctl("del-br", "br-again")


# Facts of others that the project's behaviour rests on


def test_timed_out_add_is_committed(netns: Namespace, ovs: OpenVSwitch) -> None:
    """Facts A.2: a row whose ovs-vsctl gave up goes live when ovs-vswitchd comes back."""
    ovs.add_bridge("br-int", hwaddr=HWADDR)
    netns.tap("web0", up=True)
    ovs.vswitchd.stop()
    done = ovs.vsctl("--timeout=1", "add-port", "br-int", "web0", check=False)
    assert done.returncode == -signal.SIGALRM
    assert ovs.find("Port", "web0") is not None
    ovs.vswitchd.cont()
    ovs.wait_up("web0")
    ovs.vsctl("del-br", "br-int")


def test_may_exist_keeps_the_old_tag(netns: Namespace, ovs: OpenVSwitch) -> None:
    """Facts A.3: `--may-exist add-port` on a port that is there changes nothing, and succeeds."""
    ovs.add_bridge("br-int", hwaddr=HWADDR)
    netns.tap("web0", up=True)
    ovs.add_port("br-int", "web0", "tag=10")
    ovs.vsctl("--may-exist", "add-port", "br-int", "web0", "tag=20")
    assert ovs.row("Port", "web0")["tag"] == 10
    ovs.vsctl("del-br", "br-int")


def test_stale_row_is_a_black_hole_for_a_new_tap(netns: Namespace, ovs_netdev: OpenVSwitch) -> None:
    """Facts A.4, A.5: userspace keeps the row; the new tap of that name cannot send.

    Deleting and adding in one transaction does not mend it; two transactions do.
    """
    ovs = ovs_netdev
    ovs.add_bridge("br-int", hwaddr=HWADDR)
    peer = netns.tap("peer", up=True)
    ovs.add_port("br-int", "peer", "tag=10")
    old = netns.tap("web0", up=True)
    ovs.add_port("br-int", "web0", "tag=10")
    ovs.wait_up("web0", "peer")
    assert carries(old, peer, b"old") is not None

    old.close()
    ovs.wait_until("Interface", "web0", "link_state=down")
    row = ovs.row("Interface", "web0")
    assert (row["error"], row["ofport"] > 0) == ([], True)
    new = netns.tap("web0", up=True)
    ovs.wait_up("web0")
    assert ovs.row("Port", "web0")["tag"] == 10
    assert carries(new, peer, b"new") is None
    assert carries(peer, new, b"back") is not None

    ovs.vsctl("del-port", "web0", "--", "add-port", "br-int", "web0", "tag=20")
    assert carries(new, peer, b"one") is None
    ovs.vsctl("set", "Port", "peer", "tag=20")
    assert carries(new, peer, b"one transaction") is None
    ovs.del_port("web0")
    ovs.add_port("br-int", "web0", "tag=20")
    ovs.wait_up("web0")
    assert carries(new, peer, b"two transactions") is not None
    ovs.vsctl("del-br", "br-int")


def test_tap_that_is_up_leaks_before_its_isolation(netns: Namespace) -> None:
    """Facts A.6, with the isolation that this kernel has: up and joined, then isolated, leaks."""
    netns.add_bridge("br0", mac=HWADDR)
    peer = netns.tap("peer", up=True, master="br0")
    netns.run(["bridge", "link", "set", "dev", "peer", "isolated", "on"])

    early = netns.tap("early", up=True, master="br0")
    assert carries(early, peer, b"leak") is not None
    netns.run(["bridge", "link", "set", "dev", "early", "isolated", "on"])
    assert carries(early, peer, b"early") is None

    late = netns.tap("late", master="br0")
    with pytest.raises(OSError, match="Input/output error"):
        late.send(frame(mac(1), payload=b"late"))
    netns.run(["bridge", "link", "set", "dev", "late", "isolated", "on"])
    netns.ip("link", "set", "late", "up")
    assert carries(late, peer, b"late") is None
    netns.ip("link", "del", "br0")


def test_netlink_master_steals(netns: Namespace) -> None:
    """Facts A.10: RTM_SETLINK moves a tap from another's bridge without a word."""
    netns.add_bridge("br0", mac=HWADDR)
    netns.add_bridge("br1", mac="52:54:00:ff:00:02")
    netns.tap("web0", master="br0")
    with netns.enter(), IPRoute() as route:
        (index,) = route.link_lookup(ifname="br1")
        (tap,) = route.link_lookup(ifname="web0")
        route.link("set", index=tap, master=index)
    assert netns.link("web0")["master"] == "br1"
    netns.ip("link", "del", "br0")
    netns.ip("link", "del", "br1")


# Warm processes

TELLS = """
import json, os, resource, signal, sys
json.dump([
    __name__, sys.argv, sys.flags.isolated, dict(os.environ), os.getcwd(),
    os.listdir("/proc/self/fd"),
    [os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).split(":")[0] for fd in range(3)],
    os.readlink("/proc/self/ns/net"), resource.getrlimit(resource.RLIMIT_NOFILE),
    [str(signal.getsignal(each)) for each in range(1, 32)],
    [name for name in sys.modules if name.startswith(("pyqemu", "lab"))],
], sys.stderr, default=str)
raise SystemExit(7)
"""


def test_a_warm_process_is_like_one_that_is_started(netns: Namespace) -> None:
    env = {"LC_ALL": "C.UTF-8", "A": "b"}
    cold = netns.popen([sys.executable, "-I", "-c", TELLS, "x"], env=env, stdout=subprocess.DEVNULL)
    _, wanted = cold.communicate(timeout=30)
    with netns.enter():
        warm = Warm(TELLS, ["x"], env)
    _, said = warm.communicate(timeout=30)
    assert (said, warm.returncode) == (wanted, cold.returncode) and warm.returncode == 7


def test_a_warm_process_is_there_until_it_is_waited_for(inside: Namespace) -> None:
    warm = Warm("import signal; signal.pause()", [], os.environ)
    handle = os.pidfd_open(warm.pid)
    warm.kill()
    assert select.select([handle], [], [], 30)[0] == [handle]
    os.close(handle)
    warm.terminate()
    warm.communicate(timeout=30)
    assert warm.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(warm.pid, 0)


# The rules that conftest.py keeps

RULES = """
import os, subprocess, sys
import pytest
from lab import needs

def test_link(netns):
    netns.tap("closed0")
    netns.add_bridge("left0")

def test_process(netns):
    netns.popen([sys.executable, "-c", "import signal; signal.pause()"], stdout=None, stderr=None)

def test_row(ovs):
    ovs.add_bridge("br-left")

def test_host():
    os.mkdir(f"/run/netns/ifup-{os.getpid()}-left")

def test_failing(netns):
    netns.add_bridge("left1")
    assert False

def test_lacking():
    needs.lack("no such thing")

@pytest.mark.parametrize("again", [1, 2])
def test_clean(netns, ovs, again):
    netns.add_bridge("br0")
    netns.ip("link", "del", "br0")
"""


def run_rules(folder: Path, *argv: str, ci: bool = False) -> str:
    """Run the tests of RULES in a pytest of their own and return what it printed."""
    (folder / "test_rules.py").write_text(RULES)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "CI": str(ci).lower()}
    options = ["-c", os.devnull, "-p", "conftest", "-p", "no:cacheprovider", "-rN", "--tb=short"]
    options += ["--rootdir", str(folder), "--color=no", "-v", "-W", "ignore::ResourceWarning"]
    command = [sys.executable, "-m", "pytest", *options, *argv, str(folder)]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True).stdout


def verdicts(printed: str) -> list[tuple[str, str]]:
    """Return each test's name and verdict from what `pytest -v` printed."""
    return re.findall(r"::(\w+(?:\[\d\])?) ([A-Z]+)", printed)


def test_what_is_left_behind_fails_the_test(netns: Namespace, tmp_path: Path) -> None:
    printed = run_rules(tmp_path)
    for left in RUN_NETNS.glob("ifup-*-left"):
        left.rmdir()
    assert verdicts(printed) == [
        ("test_link", "FAILED"),
        ("test_process", "FAILED"),
        ("test_row", "FAILED"),
        ("test_host", "PASSED"),
        ("test_host", "ERROR"),
        ("test_failing", "FAILED"),
        ("test_lacking", "SKIPPED"),
        ("test_clean[1]", "PASSED"),
        ("test_clean[2]", "PASSED"),
    ], printed
    assert "closed0" not in printed
    for line in (
        r"the test leaves behind:\nlink left0: left behind: ",
        r"the test leaves behind:\nprocess \d+: left behind: ",
        r"\nrow Bridge br-left: left behind: ",
        r"the test leaves on the host: netns ifup-\d+-left\n",
        r"-+ Captured left behind call -+\nlink left1: left behind: ",
        r"=+ 1 skipped =+\ntest_rules.py::test_lacking: no such thing\n",
    ):
        assert re.search(line, printed), (line, printed)


def test_what_is_missing_fails_where_all_must_be_there(tmp_path: Path) -> None:
    printed = run_rules(tmp_path, "-k", "lacking", ci=True)
    assert verdicts(printed) == [("test_lacking", "FAILED")]
    assert "needed where CI=true: no such thing" in printed
