"""Networks with nat:, on real bridges, nftables and dnsmasq: made, shared, taken away, and used."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from lab import boot
from lab.calls import Calls, Ended, at_op
from lab.dns import servers
from lab.hooks import Hooks
from lab.needs import lack, require
from lab.netns import Namespace
from lab.qemu import Qemu
from lab.snapshot import Snapshot, leftovers
from lab.told import run_told
from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers import bolt, dnsmasq
from pyqemu_ifup.drivers import nft_program as nft
from pyqemu_ifup.drivers.programs import Run
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.host import Host
from pyqemu_ifup.made import bridge
from pyqemu_ifup.made import network as made_network
from pyqemu_ifup.made.base import WantedNetwork
from pyqemu_ifup.made.names import bridge_mac
from pyqemu_ifup.made.nat import needs as nat_needs
from pyqemu_ifup.made.nat.rules import ruleset
from pyqemu_ifup.made.nat.server import dnsmasq_settings
from pyqemu_ifup.task import finish

LAB: dict[str, Any] = {
    "ipv4": "192.168.76.1/24",
    "ipv6": "fd00:76::1/64",
    "dhcp": {"range": "192.168.76.100-199", "hosts": {
        "52:54:00:aa:00:01": "192.168.76.10", "52:54:00:aa:00:02": "192.168.76.11"}},
    "dns": {"domain": "lab.test"},
    "forward": [{"from": "0.0.0.0:2222/tcp", "to": "192.168.76.10:22"}],
}  # fmt: skip
TABLE = "pyqemu-ifup-lab"
OUTSIDE = "203.0.113.2"
PUBLIC = "203.0.113.1"


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path, served: Callable[..., Hooks]) -> Hooks:
    require("dnsmasq")
    found = Hooks(tmp_path / "hooks", netns.name)
    write_policy(found)
    return served(found)


def write_policy(hooks: Hooks, more: dict[str, Any] | None = None, **networks: Any) -> None:
    nat = {**LAB, **(more or {})}
    given = {"lab": {"bridge": "labbr0", "nat": {k: v for k, v in nat.items() if v is not None}}}
    rules = [{"tap": "*", "network": "lab"}]
    hooks.write_policy(
        json.dumps({"version": 1, "timeout": 60, "networks": {**given, **networks}, "rules": rules})
    )


def tables(netns: Namespace) -> list[str]:
    return netns.run(["nft", "list", "tables"]).stdout.splitlines()


def settings(netns: Namespace) -> str:
    """Return the settings that its dnsmasq has."""
    return Path(f"/run/pyqemu-ifup/lab@{netns.inode}/{dnsmasq.SETTINGS}").read_text()


def is_whole(netns: Namespace) -> bool:
    """Tell whether the network is there: bridge, filter and dnsmasq."""
    link = netns.links().get("labbr0")
    return (
        link is not None
        and "UP" in link["flags"]
        and f"table inet {TABLE}" in tables(netns)
        and len(servers(netns)) == 1
    )


def is_gone(netns: Namespace) -> bool:
    return (
        "labbr0" not in netns.links()
        and not tables(netns)
        and not servers(netns)
        and not list(Path("/run/pyqemu-ifup").glob(f"*@{netns.inode}"))
    )


def wait_gone(netns: Namespace) -> None:
    end = time.monotonic() + 20
    while not is_gone(netns):
        assert time.monotonic() < end, (netns.links().keys(), tables(netns), servers(netns))
        time.sleep(0.05)


def test_it_is_made_for_the_first_tap_and_goes_with_the_last(
    hooks: Hooks, netns: Namespace
) -> None:
    one, two = netns.tap("web0"), netns.tap("web1")
    done = hooks.up("web0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert is_whole(netns)
    link = netns.link("labbr0")
    assert (link["address"], link["ifalias"]) == (
        bridge_mac("lab"),
        "pyqemu-ifup/1 bridge network=lab",
    )
    assert netns.link("web0")["master"] == "labbr0"
    told = netns.run(["ip", "-j", "address", "show", "dev", "labbr0"]).stdout
    own = {f"{each['local']}/{each['prefixlen']}" for each in json.loads(told)[0]["addr_info"]}
    assert {"192.168.76.1/24", "fd00:76::1/64"} <= own
    (server,) = servers(netns)
    status = Path(f"/proc/{server}/status").read_text()
    assert "\nUid:\t0\t" not in status, "it is a user of its own"
    fds = [os.readlink(path) for path in Path(f"/proc/{server}/fd").iterdir()]
    assert not [path for path in fds if "tun" in path], "it holds no tap"
    assert hooks.up("web1").returncode == 0
    assert servers(netns) == [server], "the second tap makes nothing anew"
    assert [row["state"] for row in hooks.ctl_json("status")["taps"]] == ["ok", "ok"]
    assert hooks.ctl("gc").stdout == "nothing to remove\n"
    assert hooks.down("web0").returncode == 0
    assert is_whole(netns)
    assert hooks.down("web1").returncode == 0
    assert is_gone(netns)
    one.close()
    two.close()


def test_a_change_of_the_policy_is_put_in_force_with_the_next_up(
    hooks: Hooks, netns: Namespace
) -> None:
    one, two = netns.tap("web0"), netns.tap("web1")
    assert hooks.up("web0").returncode == 0
    (server,) = servers(netns)
    write_policy(hooks, {"forward": None, "dns": False, "outbound": False})
    assert hooks.up("web1").returncode == 0
    rules = netns.run(["nft", "list", "ruleset"]).stdout
    assert "dnat" not in rules and 'iifname "labbr0" drop' in rules
    (another,) = servers(netns)
    assert another != server
    assert "port=0" in settings(netns).splitlines()
    for tap in ("web0", "web1"):
        assert hooks.down(tap).returncode == 0
    assert is_gone(netns)
    one.close()
    two.close()


def test_what_it_refuses_is_refused_before_anything_is_made(hooks: Hooks, netns: Namespace) -> None:
    tap = netns.tap("web0")
    before = Snapshot.take(netns)
    netns.ip("link", "add", "eth0", "type", "veth", "peer", "name", "peer0")
    netns.ip("link", "set", "eth0", "up")
    netns.ip("address", "add", "192.168.76.9/28", "dev", "eth0")
    done = hooks.up("web0")
    assert done.returncode == 71
    assert done.stderr == (
        "pyqemu-ifup: web0: subnet 192.168.76.0/24 of network lab is in use: eth0 has "
        "192.168.76.9/28; give network lab another subnet\n"
    )
    assert is_gone(netns)
    netns.ip("address", "flush", "dev", "eth0")
    netns.ip("link", "add", "labbr0", "type", "bridge")
    done = hooks.up("web0")
    assert (done.returncode, "labbr0 is somebody else's: network lab has nat:" in done.stderr) == (
        77,
        True,
    )
    netns.ip("link", "del", "labbr0")
    assert is_gone(netns)
    netns.run(["nft", "add", "table", "inet", TABLE])
    done = hooks.up("web0")
    assert (done.returncode, f"table inet {TABLE} is somebody else's" in done.stderr) == (77, True)
    netns.run(["nft", "delete", "table", "inet", TABLE])
    netns.ip("link", "del", "eth0")
    assert leftovers(before, netns) == []
    tap.close()


def test_a_tap_of_a_crash_is_down_where_its_network_cannot_be_made(
    hooks: Hooks, netns: Namespace
) -> None:
    """Its QEMU was killed, and it is on the bridge that the policy had it on before."""
    tap = netns.tap("web0", persist=True)
    netns.add_bridge("br0")
    netns.add_bridge("br1")
    netns.ip("address", "add", "192.168.76.9/28", "dev", "br1")
    policy = hooks.policy.read_text()
    hooks.write_policy(
        "version: 1\nnetworks: {flat: {bridge: br0}}\nrules: [{tap: '*', network: flat}]\n"
    )
    assert hooks.up("web0").returncode == 0
    link = netns.link("web0")
    assert link["master"] == "br0" and "UP" in link["flags"] and link["ifalias"]
    hooks.write_policy(policy)
    done = hooks.up("web0")
    assert done.returncode == 71 and "network lab is in use" in done.stderr, done.stderr
    link = netns.link("web0")
    assert "UP" not in link["flags"] and "master" not in link and not link.get("ifalias")
    assert is_gone(netns)
    tap.close()
    for name in ("web0", "br0", "br1"):
        netns.ip("link", "del", name)


NO_DNSMASQ = 'mount --bind /dev/null {} && exec "$@"'


@pytest.mark.parametrize(("nat", "status", "says"), [
    ({"dhcp": False, "dns": False, "ipv6": None}, 0, ""),
    ({"dhcp": False, "dns": False}, 69, ": ipv6: of network lab needs it; "),
    ({"dhcp": False, "ipv6": None}, 69, ": dns: of network lab needs it; "),
])  # fmt: skip
def test_dnsmasq_is_asked_for_where_it_is_needed(
    netns: Namespace, tmp_path: Path, nat: dict[str, Any], status: int, says: str
) -> None:
    require("dnsmasq")
    hooks = Hooks(tmp_path / "hooks", netns.name)
    write_policy(hooks, nat)
    tap = netns.tap("web0")
    hide = NO_DNSMASQ.format(os.path.realpath(shutil.which("dnsmasq") or ""))
    words = ["unshare", "--mount", "sh", "-c", hide, "sh", hooks.ifup, "web0"]
    done = netns.run(words, env=hooks.environ(), check=False)
    assert done.returncode == status and says in done.stderr, done.stderr
    if not status:
        assert hooks.down("web0").returncode == 0
    assert is_gone(netns)
    tap.close()


def test_a_link_s_name_in_any_bytes_is_no_reason_to_fail(netns: Namespace) -> None:
    netns.ip("link", "add", "gr\xfc", "type", "veth", "peer", "name", "peer0")
    for name in ("gr\xfc", "peer0"):
        netns.ip("link", "set", name, "up")
    netns.ip("route", "add", "2001:db8:5::/64", "dev", "gr\xfc")
    with netns.enter():
        assert "gr\xfc" in Path("/proc/net/ipv6_route").read_text()
        assert nat_needs._by_advertisement() == []
    netns.ip("link", "del", "gr\xfc")


@pytest.mark.alone("a switch of the namespace's own, turned on by whoever comes first")
@pytest.mark.parametrize("lifetime", [1800, 0])
def test_ipv6_by_advertisements_is_not_given_up(
    hooks: Hooks, netns: Namespace, lifetime: int
) -> None:
    """Neither a default route by a router's own advertisement nor, without one, an address."""
    tap = netns.tap("web0")
    with Namespace() as router:
        netns.ip(*"link add eth0 type veth peer name eth0 netns".split(), router.name)
        netns.ip("link", "set", "eth0", "up")
        router.ip("address", "add", "2001:db8:9::1/64", "dev", "eth0", "nodad")
        router.ip("link", "set", "eth0", "up")
        words = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0",
                 "--interface=eth0", "--bind-interfaces", "--enable-ra", "--leasefile-ro",
                 "--pid-file=", "--dhcp-range=2001:db8:9::,ra-only,64",
                 f"--ra-param=eth0,high,4,{lifetime}"]  # fmt: skip
        sender = router.popen(words)
        try:
            end = time.monotonic() + 30
            show = ["ip", "-6", "address", "show", "dev", "eth0"]
            while "2001:db8:9:" not in netns.run(show).stdout:
                assert time.monotonic() < end, "no advertisement has come"
                time.sleep(0.1)
            done = hooks.up("web0")
            assert done.returncode == 71
            assert "eth0 lives by router advertisements" in done.stderr
            assert "echo 2 > /proc/sys/net/ipv6/conf/eth0/accept_ra" in done.stderr
            assert is_gone(netns), "nothing is left of it, its folder neither"
            netns.run(["sh", "-c", "echo 2 >/proc/sys/net/ipv6/conf/eth0/accept_ra"])
            assert hooks.up("web0").returncode == 0
        finally:
            sender.terminate()
            sender.communicate()
        assert hooks.down("web0").returncode == 0
        netns.ip("link", "del", "eth0")
    assert is_gone(netns)
    tap.close()


def test_first_taps_at_once_make_one_network_and_the_last_downs_take_it_away_once(
    hooks: Hooks, netns: Namespace
) -> None:
    for _ in range(3):
        taps = [netns.tap(f"web{number}") for number in range(6)]
        with ThreadPoolExecutor(6) as pool:
            ups = list(pool.map(hooks.up, [tap.name for tap in taps]))
            assert [done.returncode for done in ups] == [0] * 6, ups
            assert is_whole(netns)
            downs = list(pool.map(hooks.down, [tap.name for tap in taps]))
            assert [done.returncode for done in downs] == [0] * 6, downs
        # The agent may be looking at it, too, and have its folder for a moment.
        wait_gone(netns)
        netns.close_kept()


def test_what_a_crash_left_is_removed_by_gc(hooks: Hooks, netns: Namespace, way: str) -> None:
    tap = netns.tap("web0")
    assert hooks.up("web0").returncode == 0
    tap.close()
    if way == "alone":
        assert is_whole(netns)
        dry = hooks.ctl("gc", "--dry-run")
        assert "would take away network lab and its bridge labbr0: no tap is on it\n" in dry.stdout
        assert is_whole(netns)
        done = hooks.ctl("gc")
        assert (done.returncode, done.stdout) == (
            0,
            "took away network lab and its bridge labbr0: no tap is on it\n",
        )
        assert hooks.ctl("gc").stdout == "nothing to remove\n"
    # NOTE: an agent sees the tap go.
    wait_gone(netns)


def test_tap_that_is_taken_from_its_bridge_is_on_it_again(
    hooks: Hooks, netns: Namespace, way: str
) -> None:
    """The network is not taken for one that nobody is on; without an agent apply mends it."""
    tap = netns.tap("web0")
    assert hooks.up("web0").returncode == 0
    netns.ip("link", "set", "dev", "web0", "nomaster")
    if way == "alone":
        assert hooks.ctl_warm("apply").returncode == 0
    end = time.monotonic() + 20
    while netns.link("web0").get("master") != "labbr0":
        assert time.monotonic() < end, "it is not back"
        time.sleep(0.05)
    assert is_whole(netns)
    assert hooks.down("web0").returncode == 0
    wait_gone(netns)
    tap.close()


@pytest.mark.alone("no hook is called in vain")
def test_what_is_not_ours_is_left_alone(hooks: Hooks, netns: Namespace) -> None:
    """A table under a name like ours."""
    netns.run(["nft", "add", "table", "inet", "pyqemu-ifup-other"])
    tap = netns.tap("web0")
    assert hooks.up("web0").returncode == 0
    assert hooks.down("web0").returncode == 0
    assert "labbr0" not in netns.links() and not servers(netns)
    assert hooks.ctl("gc").stdout == "nothing to remove\n"
    assert tables(netns) == ["table inet pyqemu-ifup-other"]
    netns.run(["nft", "delete", "table", "inet", "pyqemu-ifup-other"])
    tap.close()


def test_no_tap_lowers_the_bridge_s_mtu(hooks: Hooks, netns: Namespace) -> None:
    tap = netns.tap("web0")
    networks = {"lab": {"bridge": "labbr0", "mtu": 1490, "nat": {"ipv4": "10.77.0.1/24"}}}
    rules = [{"tap": "*", "network": "lab", "mtu": 1400}]
    hooks.write_policy(json.dumps({"version": 1, "networks": networks, "rules": rules}))
    done = hooks.up("web0")
    assert (done.returncode, done.stderr) == (0, "")
    assert (netns.link("labbr0")["mtu"], netns.link("web0")["mtu"]) == (1490, 1400)
    assert len(servers(netns)) == 1 and "dhcp-option=option:mtu,1490" in settings(netns)
    assert hooks.down("web0").returncode == 0
    assert is_gone(netns)
    tap.close()


def before_call(
    call: int, act: Callable[[], object], *doors: tuple[Any, str]
) -> Callable[[], None]:
    """Return what has the process `act` before the `call`-th use of these."""

    def change() -> None:
        count = 0

        def counting(real: Any) -> Any:
            def run(*words: Any, **more: Any) -> Any:
                nonlocal count
                count += 1
                if count == call:
                    act()
                return real(*words, **more)

            return run

        for place, name in doors:
            setattr(place, name, counting(getattr(place, name)))

    return change


def kill_self(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def mortal_at(call: int, *doors: tuple[Any, str]) -> Callable[[], None]:
    """Return what has the process be killed before the `call`-th use of these."""
    return before_call(call, lambda: kill_self(signal.SIGKILL), *doors)


def signalled(call: int, *doors: tuple[Any, str]) -> Callable[[], None]:
    """Return what has the process get a SIGTERM before the `call`-th use of these."""
    return before_call(call, lambda: kill_self(signal.SIGTERM), *doors)


MAKES: list[tuple[Any, str]] = [
    (os, "mkdir"), (nft, "run_program"), (bridge, "write_sysctl"), (bolt, "shut"),
    *((dnsmasq, name) for name in ("look", "_end", "_start", "_record", "_let_go")),
    *((Netlink, name) for name in ("add_bridge", "add_address", "run")),
]  # fmt: skip
"""Through these goes all that makes a network, and the tap's joining it."""


@pytest.fixture
def calls(inside: Namespace, tmp_path: Path) -> Iterator[Calls]:
    """Calls of the hooks in a namespace that has no network yet, with a policy for one."""
    require("dnsmasq")
    made = Calls(Hooks(tmp_path / "hooks"))
    write_policy(made.hooks)
    yield made
    made.close()


@pytest.mark.alone("stops the hook itself")
@pytest.mark.parametrize("call", range(1, 30))
def test_a_crash_at_each_step_leaves_what_gc_or_the_next_up_mends(
    calls: Calls, inside: Namespace, call: int
) -> None:
    change = mortal_at(call, *MAKES)
    inside.tap("web0")
    assert calls.start("pyqemu-ifup", "web0", change=change).wait().status == -signal.SIGKILL
    assert calls.up("web0").status == 0
    assert is_whole(inside)
    assert calls.down("web0").status == 0
    assert is_gone(inside)
    assert calls.start("pyqemu-ifup", "web0", change=change).wait().status == -signal.SIGKILL
    if inside.link("web0").get("master") is None:
        assert calls.hooks.ctl("gc").returncode == 0
    else:
        assert calls.down("web0").status == 0
    assert is_gone(inside)


ENDS: list[tuple[Any, str]] = [
    (dnsmasq, "_end"), (dnsmasq, "_end_process"), (made_network, "forget"),
    *((nft, name) for name in ("read_table", "run_program")),
    (Netlink, "delete_link"), (os, "unlink"), (os, "rmdir"),
]  # fmt: skip
"""Through these goes all that takes a network away."""


@pytest.mark.alone("stops the hook itself")
@pytest.mark.parametrize("call", range(1, 14))
def test_a_crash_at_each_step_of_the_last_down_leaves_what_gc_removes(
    calls: Calls, inside: Namespace, call: int
) -> None:
    """Killed before each of what it does: dnsmasq's end, the bridge, the table, each file."""
    inside.tap("web0")
    assert calls.up("web0").status == 0

    change = mortal_at(call, *ENDS)
    ended = calls.start("pyqemu-ifdown", "web0", change=change).wait()
    assert ended.status == -signal.SIGKILL, ended
    assert not is_gone(inside), "it was killed before its end"
    assert calls.hooks.ctl("gc").returncode == 0
    assert is_gone(inside)


@pytest.mark.alone("stops the hook itself")
def test_gc_takes_nothing_from_under_a_guest_whatever_else_is_left(
    calls: Calls, inside: Namespace
) -> None:
    """It may have seen no bridge yet: what is there once it has the lock decides."""
    inside.tap("web0")
    assert calls.up("web0").status == 0
    with Host(None, Deadline(10), lambda command: None) as host:
        assert host.finish(made_network.find_left(host)) == []
        assert host.finish(made_network.leave(host, "lab")) is False
    assert is_whole(inside)
    assert calls.down("web0").status == 0
    assert is_gone(inside)


@pytest.mark.alone("stops the hook itself")
def test_a_tap_that_cannot_join_leaves_no_network(calls: Calls, inside: Namespace) -> None:
    inside.tap("web0")
    before = Snapshot.take(inside)
    ended = calls.up("web0", at_op(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert ended.status == 75
    assert is_gone(inside)
    assert leftovers(before, inside) == []


LEFT = "pyqemu-ifctl gc web0 removes what is left"


@pytest.mark.alone("stops the hook itself")
def test_a_signal_before_each_program_of_an_up_leaves_nothing(
    calls: Calls, inside: Namespace
) -> None:
    """The last of them asks for other firewalls, once the network is made."""
    inside.tap("web0")
    before = Snapshot.take(inside)
    doors = [(nft, "run_program"), (dnsmasq, "_start"), (dnsmasq, "_let_go")]
    call = 1
    while (ended := calls.up("web0", signalled(call, *doors))).status != 0:
        assert (ended.status, ended.stderr) == (
            75,
            "pyqemu-ifup: web0: stopped: received SIGTERM; nothing is left of it\n",
        ), call
        assert is_gone(inside), call
        assert leftovers(before, inside) == [], call
        call += 1
    assert call > 6
    assert calls.down("web0").status == 0


@pytest.mark.alone("stops the hook itself")
def test_a_signal_before_each_step_of_a_down_is_told_truly_and_the_next_down_mends(
    calls: Calls, inside: Namespace
) -> None:
    """What has been begun of the network's end is brought to its end all the same."""
    inside.tap("web0")
    doors = [(Netlink, "run"), (Host, "look"), *ENDS]
    statuses = []
    for call in range(1, 20):
        assert calls.up("web0").status == 0
        ended = calls.down("web0", signalled(call, *doors))
        statuses.append(ended.status)
        if ended.status != 0:
            assert (ended.status, ended.stderr) == (
                75,
                f"pyqemu-ifdown: web0: stopped: received SIGTERM; {LEFT}\n",
            ), call
            assert calls.down("web0").status == 0
        assert is_gone(inside), call
    assert sorted(statuses, reverse=True) == statuses and {0, 75} == set(statuses), statuses


SLOW = ["sh", "-c", 'sleep 0.5; exec "$@"', "sh"]
NOTHING = "nothing is left of it"
PROMISED = 2.0
"""Seconds that a way back has."""
STALL = 1.5
"""Seconds that a busy machine may add to them: less than the way back has."""
GOES = 3
"""How often it may add more."""


def hold_up(*, after: Callable[[tuple[str, ...]], bool], slow: bool = False) -> Callable[[], None]:
    """Return what has nft(8) not end from the call on of whose words `after` is true.

    With `slow` each call from there on takes 0.5 s more.
    """

    def change() -> None:
        real = getattr(nft, "run_program")  # noqa: B009  mypy: it does not export that
        muted: list[bool] = []

        def run(words: Any, deadline: Deadline, text: str = "") -> Any:
            if muted or after((*words, text)):
                muted.append(True)
                return (
                    real([*SLOW, *words], deadline, text)
                    if slow
                    else real(["sleep", "100"], deadline)
                )
            return real(words, deadline, text)

        setattr(nft, "run_program", run)  # noqa: B010  mypy lets no function be assigned

    return change


@pytest.mark.alone("stops the hook itself")
def test_a_way_back_that_nft_holds_up_ends_in_time_and_the_cause_is_told(
    calls: Calls, inside: Namespace
) -> None:
    """Bridge and dnsmasq go all the same, and what is left is found by the next down."""
    inside.tap("web0")
    before = Snapshot.take(inside)
    taken_back_in_time(calls, inside, NOTHING, slow=True)
    assert is_gone(inside)
    assert leftovers(before, inside) == []
    ended = taken_back_in_time(calls, inside, LEFT, slow=False)
    told = [line for line in ended.log if "network lab: not taken back: not done after 2 s" in line]
    assert "labbr0" not in inside.links() and not servers(inside) and tables(inside)
    assert calls.down("web0").status == 0
    assert is_gone(inside)
    assert leftovers(before, inside) == []
    for text in (told[0], ended.stderr):
        taken_back_in_time(calls, inside, LEFT, slow=False)
        assert not is_gone(inside)
        run_told(calls.hooks, text)
        assert is_gone(inside)
        assert leftovers(before, inside) == []


@pytest.mark.alone("stops the hook itself")
def test_what_other_guests_are_not_given_back_is_told_with_what_mends_it(
    calls: Calls, inside: Namespace
) -> None:
    """An up after an edit of the policy that is stopped, and whose way back nft holds up."""
    inside.tap("web0")
    inside.tap("web1")
    assert calls.up("web0").status == 0
    write_policy(calls.hooks, {"dns": {"domain": "new.test"}, "forward": None})

    def stop() -> None:
        stopped: list[bool] = []
        hold_up(after=lambda words: bool(stopped))()

        def begin() -> None:
            stopped.append(True)
            kill_self(signal.SIGTERM)

        at_op(3, begin)()

    ended = calls.up("web1", stop)
    assert ended.status == 75
    told = [line for line in ended.log if "network lab: not taken back: " in line]
    run_told(calls.hooks, told[0])
    assert is_whole(inside)
    (row,) = [
        each for each in calls.hooks.ctl_json("apply", "--dry-run")["taps"] if each["tap"] == "web0"
    ]
    assert row["result"] == "unchanged", row
    assert calls.down("web0").status == 0
    assert is_gone(inside)


def taken_back_in_time(calls: Calls, inside: Namespace, said: str, *, slow: bool) -> Ended:
    """Stop an up whose network is made, have nft hold up its way back, and return how it ended.

    At the least once in GOES it has `said` so, and in time.
    """
    clock = calls.hooks.folder / "stopped"

    def be_stopped() -> None:
        clock.write_text(f"{time.monotonic()}")
        kill_self(signal.SIGTERM)

    def stop() -> None:
        # NOTE: what asks for the firewalls stops the up.
        before_call(1, be_stopped, (nft, "find_dropping_chains"))()
        hold_up(after=lambda words: "ruleset" in words, slow=slow)()

    found = []
    for _ in range(GOES):
        ended = calls.up("web0", stop)
        seconds = time.monotonic() - float(clock.read_text())
        assert ended.status == 75
        assert NOTHING not in ended.stderr or is_gone(inside), ended
        whole = ended.stderr == f"pyqemu-ifup: web0: stopped: received SIGTERM; {said}\n"
        if whole and seconds < PROMISED + STALL:
            return ended
        found.append((seconds, ended))
        assert calls.down("web0").status == 0
        assert is_gone(inside)
    raise AssertionError(found)


def test_what_lasts_heeds_a_signal_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    deadline = Deadline(10.0, lambda: reasons[0] if reasons else None).lasting()
    deadline.check()
    reasons.append("received SIGTERM")
    deadline.check()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 2.1)
    with pytest.raises(Failure, match="stopped"):
        deadline.check()


@pytest.mark.alone("stops the hook itself")
def test_a_refused_up_forgets_no_dnsmasq_of_an_earlier_one(calls: Calls, inside: Namespace) -> None:
    """Its bridge has been deleted under it; what it still holds would keep the next one out."""
    tap = inside.tap("web0")
    assert calls.up("web0").status == 0
    tap.close()
    inside.ip("link", "del", "labbr0")
    assert len(servers(inside)) == 1
    inside.tap("web0")
    change = signalled(1, (nft, "run_program"))
    assert calls.up("web0", change).status == 75
    assert calls.up("web0").status == 0
    assert is_whole(inside)
    assert calls.down("web0").status == 0
    assert is_gone(inside)


@pytest.mark.alone("looks beside the hook")
def test_a_dnsmasq_that_starts_while_doctor_looks_takes_nobody_s_ports(
    calls: Calls, inside: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside.tap("web0")
    network = parse_policy([Source("p", calls.hooks.policy.read_bytes())]).networks["lab"]
    assert network.made is not None
    real, found = nat_needs._is_taken, list[bool]()

    def is_taken(*of: Any) -> bool:
        if not found:
            assert calls.up("web0", monkeypatch.undo).status == 0
        found.append(real(*of))
        return found[-1]

    monkeypatch.setattr(nat_needs, "_is_taken", is_taken)
    with Host(None, Deadline(60), print) as host:
        wanted = WantedNetwork("lab", "labbr0", network.made)
        assert [str(each) for each in host.finish(nat_needs.find_unmet(host, wanted))] == []
    assert any(found)
    assert calls.down("web0").status == 0
    assert is_gone(inside)


@pytest.mark.parametrize("mode", ["0", "1", "3"])
def test_explain_sets_how_the_bridge_gets_its_addresses_where_up_does(
    hooks: Hooks, netns: Namespace, mode: str
) -> None:
    """A host's own way to make an address of IPv6, as by chance (3), is left to a bridge too."""
    default = "/proc/sys/net/ipv6/conf/default/addr_gen_mode"
    before = netns.run(["cat", default]).stdout.strip()
    netns.run(["sh", "-c", f"echo {mode} >{default}"])
    told = " addrgenmode eui64" in hooks.ctl("explain", "web0").stdout
    tap = netns.tap("web0")
    assert hooks.up("web0").returncode == 0
    now = netns.run(["cat", "/proc/sys/net/ipv6/conf/labbr0/addr_gen_mode"]).stdout.strip()
    assert (now, told) == (mode if mode != "1" else "0", mode == "1")
    assert hooks.down("web0").returncode == 0
    tap.close()
    netns.run(["sh", "-c", f"echo {before} >{default}"])


def test_settings_that_dnsmasq_refuses_are_no_fault_of_systemd_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("dnsmasq")
    monkeypatch.setattr(dnsmasq, "_under_systemd", lambda: True)
    finish(dnsmasq.try_settings(["port=0"], Deadline(60)), time.sleep)
    with pytest.raises(Failure) as refused:
        finish(dnsmasq.try_settings(["no-such-setting"], Deadline(60)), time.sleep)
    assert str(refused.value) == (
        "dnsmasq does not start: dnsmasq: bad command line options: try --help; see syslog, and "
        "how it was built: dnsmasq --version"
    )


@pytest.mark.parametrize(
    ("state", "job", "verbs"),
    [
        ("inactive", "42", ["show", "stop"]),
        ("activating", "42", ["show", "stop"]),
        ("inactive", "0", ["show"]),
        ("failed", "", ["show"]),
    ],
    ids=["its job is to come", "it has yet to fork", "it has ended", "it has failed"],
)
def test_a_unit_whose_start_was_given_up_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, job: str, verbs: list[str]
) -> None:
    """Its job is still to come, or it has yet to fork: then it would be there once nobody looks."""
    asked: list[str] = []

    async def run(words: list[str], deadline: Deadline, text: str = "") -> Run:
        asked.append(words[1])
        return Run(0, f"LoadState=loaded\nActiveState={state}\nJob={job}\n", "")

    monkeypatch.setattr(dnsmasq, "_under_systemd", lambda: True)
    monkeypatch.setattr(dnsmasq, "run_program", run)
    finish(dnsmasq.end(str(tmp_path), Deadline(10)), time.sleep)
    assert asked == verbs


EDITS: list[tuple[str, dict[str, Any]]] = [
    ("join", {"dns": {"domain": "new.test"}, "forward": None}),
    ("join", {"ipv4": "192.168.77.1/24", "dhcp": False, "forward": None}),
    ("join", {"ipv6": None}),
    ("join", {"dns": False, "dhcp": False}),
    ("dnsmasq", {"dns": {"domain": "new.test"}, "forward": None}),
]
"""What is changed of the network, and where the up fails."""


@pytest.mark.alone("stops the hook itself")
@pytest.mark.parametrize(
    ("where", "edit"), EDITS, ids=["dns", "ipv4", "ipv6", "nothing served", "dnsmasq"]
)
def test_an_up_that_fails_after_an_edit_takes_nothing_from_other_guests(
    calls: Calls, inside: Namespace, where: str, edit: dict[str, Any]
) -> None:
    def look() -> tuple[str, list[str], str, list[str], int]:
        text = inside.run(["nft", "-s", "list", "table", "inet", TABLE]).stdout
        told = json.loads(inside.run(["ip", "-j", "address", "show", "dev", "labbr0"]).stdout)[0]
        own = sorted(f"{each['local']}/{each['prefixlen']}" for each in told["addr_info"])
        sysctls = [
            Path(f"/proc/sys/net/{family}/conf/labbr0/{name}").read_text()
            for family, names in (
                ("ipv6", ("disable_ipv6", "accept_ra", "autoconf", "addr_gen_mode")),
                ("ipv4", ("route_localnet", "accept_source_route")),
            )
            for name in names
        ]
        return text, own, settings(inside), sysctls, len(servers(inside))

    inside.tap("web0")
    inside.tap("web1")
    assert calls.up("web0").status == 0
    before = look()
    write_policy(calls.hooks, edit)
    if where == "join":
        change = at_op(3, lambda: kill_self(signal.SIGTERM))
    else:
        change = signalled(1, (dnsmasq, "serve"), (dnsmasq, "end"))
    assert calls.up("web1", change).status == 75
    assert look() == before
    assert is_whole(inside)
    assert calls.up("web1").status == 0
    assert look() != before
    for tap in ("web0", "web1"):
        assert calls.down(tap).status == 0
    assert is_gone(inside)


@pytest.mark.alone("stops the hook itself")
def test_a_dnsmasq_that_was_asked_to_end_is_none_that_serves(
    calls: Calls, inside: Namespace
) -> None:
    """It takes its time, so that the up's way back finds it still there."""
    inside.tap("web0")
    inside.tap("web1")
    assert calls.up("web0").status == 0
    (asked,) = servers(inside)
    before = settings(inside)
    os.kill(asked, signal.SIGSTOP)
    write_policy(calls.hooks, {"dns": {"domain": "new.test"}, "forward": None})
    ended = calls.up("web1", signalled(1, (dnsmasq, "serve"), (dnsmasq, "end")))
    assert ended.status == 75 and NOTHING in ended.stderr, ended
    with suppress(ProcessLookupError):
        os.kill(asked, signal.SIGCONT)
    end = time.monotonic() + 20
    while asked in servers(inside):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert is_whole(inside) and settings(inside) == before
    assert calls.down("web0").status == 0
    assert is_gone(inside)


def test_explain_knows_the_network_and_its_commands_make_it(hooks: Hooks, netns: Namespace) -> None:
    told = hooks.ctl_json("explain", "web0")
    assert told["port"]["kind"] == "linux"
    assert told["port"]["nat"]["forward"] == ["0.0.0.0:2222/tcp to 192.168.76.10:22"]
    text = hooks.ctl("explain", "web0").stdout
    assert "  nat           made where it is not there: 192.168.76.1/24, fd00:76::1/64, " in text
    tap = netns.tap("web0")
    # NOTE: beside an agent, which takes away what is made for taps and has none.
    # NOTE: as a person sees and pastes them.
    script = text[text.index("\ncommands, ") :].partition(":\n")[2].partition("\nnote: ")[0]
    netns.run(["sh", "-euc", script])
    assert is_whole(netns) and netns.link("web0")["master"] == "labbr0"
    assert hooks.down("web0").returncode == 0
    tap.close()
    wait_gone(netns)


def test_a_firewall_that_drops_is_told_of(calls: Calls, inside: Namespace) -> None:
    inside.run(["nft", "add table ip filter; add chain ip filter FORWARD "
                "{ type filter hook forward priority filter; policy drop; }"])  # fmt: skip
    inside.tap("web0")
    ended = calls.up("web0")
    assert ended.status == 0
    assert any(
        "network lab: the chain ip filter FORWARD drops what it does not know" in line
        and """nft 'insert rule ip filter FORWARD iifname "labbr0" accept'""" in line
        for line in ended.log
    ), ended.log
    assert calls.down("web0").status == 0
    inside.run(["nft", "delete", "table", "ip", "filter"])


@pytest.mark.parametrize("dropped", [True, False])
def test_a_firewall_that_drops_by_its_last_rule_is_told_of_where_it_does(
    calls: Calls, inside: Namespace, *, dropped: bool
) -> None:
    """A network's own table, and one for IPv6 where a network has none, drop nothing of its."""
    drop = "counter drop" if dropped else "ct state invalid drop"
    inside.run(["nft", "add table ip filter; add chain ip filter FORWARD "
                "{ type filter hook forward priority filter; }; "
                f"add rule ip filter FORWARD {drop}; "
                "add table ip6 filter; add chain ip6 filter FORWARD "
                "{ type filter hook forward priority filter; policy drop; }"])  # fmt: skip
    write_policy(calls.hooks, {"ipv6": None})
    inside.tap("web0")
    ended = calls.up("web0")
    assert ended.status == 0
    told = [line for line in ended.log if "drops what it does not know" in line]
    assert [line.partition(": the chain ")[2].partition(" drops")[0] for line in told] == (
        ["ip filter FORWARD"] if dropped else []
    ), ended.log
    assert calls.down("web0").status == 0
    for family in ("ip", "ip6"):
        inside.run(["nft", "delete", "table", family, "filter"])


class NoIpv6(socket.socket):
    """A socket of a kernel that was booted with ipv6.disable=1."""

    def __init__(self, family: int = socket.AF_INET, *more: Any, **named: Any) -> None:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        super().__init__(family, *more, **named)


class NoFreebind(socket.socket):
    """A socket of a kernel that does not know IPV6_FREEBIND, from before 4.15."""

    def setsockopt(self, level: int, name: int, *value: Any) -> None:
        if (level, name) == (socket.IPPROTO_IPV6, nat_needs.IPV6_FREEBIND):
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
        super().setsockopt(level, name, *value)


@pytest.mark.alone("changes what its sockets do")
@pytest.mark.parametrize(("kernel", "why"), [
    (NoIpv6, "this kernel has no IPv6: network lab has ipv6:, and an IPv6 socket cannot be opened; "
     "boot without ipv6.disable=1, or take ipv6: from network lab"),
    (NoFreebind, "cannot tell whether port 53 of fd00:76::1 is free: [Errno 92] Protocol not "
     "available; see dmesg(1)"),
])  # fmt: skip
def test_a_kernel_that_lacks_ipv6_is_told_of(
    calls: Calls, inside: Namespace, kernel: type[socket.socket], why: str
) -> None:
    def change() -> None:
        setattr(socket, "socket", kernel)  # noqa: B010  mypy lets no type be assigned

    inside.tap("web0")
    ended = calls.up("web0", change)
    assert (ended.status, ended.stderr) == (71, f"pyqemu-ifup: web0: {why}\n")
    assert is_gone(inside)


@pytest.mark.alone("holds its nft up")
def test_an_up_waits_for_no_firewall_that_cannot_be_read(calls: Calls, inside: Namespace) -> None:
    """Who else drops is a hint: the network is made and proven already."""
    inside.tap("web0")
    ended = calls.up("web0", hold_up(after=lambda words: "ruleset" in words or "chains" in words))
    assert (ended.status, ended.stderr) == (0, "")
    assert is_whole(inside)
    assert any("network lab: cannot tell whether another firewall drops" in line
               for line in ended.log), ended.log  # fmt: skip
    assert calls.down("web0").status == 0
    assert is_gone(inside)


# Pure


def nat_of(text: str) -> Any:
    policy = f"version: 1\nnetworks: {{lab: {{bridge: labbr0, nat: {text}}}}}\n"
    return parse_policy([Source("p", policy.encode())]).networks["lab"].made


SETTINGS = [
    ("{ipv4: 10.0.0.1/24}",
     ["dhcp-range=10.0.0.2,10.0.0.254,255.255.255.0,1h", "no-hosts"]),
    ("{ipv4: 10.0.0.254/24, dns: false}",
     ["dhcp-range=10.0.0.1,10.0.0.253,255.255.255.0,1h", "dhcp-option=option:dns-server",
      "port=0"]),
    ("{ipv4: 10.0.0.9/24, dhcp: {range: 10.0.0.20-29}, outbound: false}",
     ["dhcp-range=10.0.0.20,10.0.0.29,255.255.255.0,1h", "dhcp-option=option:router",
      "no-hosts", "no-resolv"]),
    ("{ipv4: 10.0.0.1/24, dhcp: false, dns: {domain: lab.test}}",
     ["domain=lab.test", "local=/lab.test/", "no-hosts"]),
    ("{ipv6: 'fd00::1/64', dns: false, outbound: false}",
     ["dhcp-range=fd00::,ra-only,64", "ra-param=labbr0,high,60,0", "enable-ra",
      "dhcp-option=option6:dns-server", "port=0"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), SETTINGS, ids=[row[0] for row in SETTINGS])
def test_settings_of_dnsmasq(text: str, words: list[str]) -> None:
    found = dnsmasq_settings("labbr0", nat_of(text), "/run/x", "dnsmasq")
    assert found[:7] == [
        "interface=labbr0",
        "except-interface=lo",
        "bind-dynamic",
        "user=dnsmasq",
        "dhcp-leasefile=/run/x/leases",
        "no-ping",
        "dhcp-authoritative",
    ]
    assert found[7:] == words


RULES = [
    ("{ipv4: 10.0.0.1/24, outbound: false}", ["masquerade"], ['oifname "labbr0" drop']),
    ("{ipv4: 10.0.0.1/24}", ["dnat ip", "route"], [
        "ip saddr 10.0.0.0/24 ip daddr != { 10.0.0.0/24, 224.0.0.0/4, 255.255.255.255 } masquerade",
        'oifname != { "labbr0", "lo" } ip saddr 10.0.0.0/24 drop',
        'iifname != { "labbr0", "lo" } ip daddr 10.0.0.1 drop',
        'iifname "labbr0" ip saddr != { 0.0.0.0, 10.0.0.0/24 } drop',
        'iifname "labbr0" ip daddr { 100.100.100.200, 127.0.0.0/8, 168.63.129.16, 169.254.0.0/16 }',
    ]),
    ("{ipv4: 10.0.0.1/24, forward: [{from: 192.0.2.1:53/udp, to: 10.0.0.2:5353}]}", [], [
        "\tip daddr 192.0.2.1 udp dport 53 dnat ip to 10.0.0.2:5353",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "absent", "present"), RULES, ids=[row[0] for row in RULES])
def test_rules(text: str, absent: list[str], present: list[str]) -> None:
    found = ruleset("lab", "labbr0", nat_of(text))
    assert found.startswith(f"table inet {TABLE}\ndelete table inet {TABLE}\n")
    for rule in present:
        assert rule in found
    for word in absent:
        assert word not in found


# Real guests


@pytest.fixture
def outside(netns: Namespace) -> Iterator[Namespace]:
    """A namespace beside the host's, which does not know of the guests' subnets."""
    with Namespace() as other:
        netns.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", other.name)
        netns.ip("address", "add", f"{PUBLIC}/24", "dev", "eth0")
        netns.ip("address", "add", "2001:db8::1/64", "dev", "eth0", "nodad")
        netns.ip("link", "set", "eth0", "up")
        netns.ip("route", "add", "default", "via", OUTSIDE)
        other.ip("address", "add", f"{OUTSIDE}/24", "dev", "eth0")
        other.ip("address", "add", "2001:db8::2/64", "dev", "eth0", "nodad")
        other.ip("link", "set", "eth0", "up")
        yield other
        netns.ip("link", "del", "eth0")


def reach(netns: Namespace, address: str, port: int) -> bytes:
    """Return what answers there, tried until something does."""
    end = time.monotonic() + boot.PATIENCE
    while True:
        try:
            with netns.enter(), socket.create_connection((address, port), 5) as connection:
                connection.settimeout(10)
                said = connection.recv(100)
        except OSError:
            said = b""
        if said or time.monotonic() > end:
            return said
        time.sleep(0.2)


@pytest.mark.timeout(300)
def test_real_guests_on_it(hooks: Hooks, netns: Namespace, outside: Namespace, way: str) -> None:
    """An address, a name, the outside by IPv4; a forward from outside, the host and a guest."""
    require("qemu")
    reason = boot.setup()
    if reason is not None:
        lack(reason)
    scripts = f"script={hooks.ifup},downscript={hooks.ifdown}"

    def start(number: int, console: boot.Console, **more: Any) -> Qemu:
        card = f"virtio-net-pci,netdev=n0,mac=52:54:00:aa:00:0{number}"
        guest = boot.guest_arguments(console, ip="dhcp", hold=True, **more)
        netdev = f"tap,id=n0,ifname=web{number},{scripts}"
        return Qemu(*guest, "-netdev", netdev, "-device", card, netns=netns.name, machine="pc",
                    env=hooks.environ())  # fmt: skip

    with ExitStack() as stack:
        first = stack.enter_context(boot.Console())
        second = stack.enter_context(boot.Console())
        one = stack.enter_context(start(1, first, name="web1", ping=OUTSIDE, serve=22))
        assert first.wait("lease") == "lease 192.168.76.10 mtu 1500"
        assert first.wait("ping") == f"ping {OUTSIDE} answered"
        assert first.wait("ready")
        for place, address in ((outside, PUBLIC), (netns, PUBLIC), (netns, "127.0.0.1")):
            assert reach(place, address, 2222) == b"GUEST serves 22\n", (place.name, address)
        two = stack.enter_context(
            start(2, second, look="web1.lab.test", ping="2001:db8::2", fetch=f"{PUBLIC}:2222")
        )
        assert second.wait("lease") == "lease 192.168.76.11 mtu 1500"
        assert second.wait("look") == "look web1.lab.test 192.168.76.10"
        assert second.wait("ping") == "ping 2001:db8::2 answered"
        assert second.wait("fetch") == f"fetch {PUBLIC}:2222 GUEST serves 22"
        assert one.quit() == 0
        assert is_whole(netns)
        assert two.quit() == 0
    assert is_gone(netns)


@pytest.mark.alone("the agent has a mount namespace of its own")
@pytest.mark.timeout(120)
def test_a_guest_resolves_what_the_host_s_name_server_knows(
    hooks: Hooks, netns: Namespace, outside: Namespace, tmp_path: Path
) -> None:
    """The hook runs where /etc/resolv.conf names a server outside."""
    require("qemu")
    reason = boot.setup()
    if reason is not None:
        lack(reason)
    resolv = tmp_path / "resolv.conf"
    resolv.write_text(f"nameserver {OUTSIDE}\n")
    script = tmp_path / "script"
    script.write_text(
        "#!/bin/sh\nexec unshare --mount sh -c "
        f'\'mount --bind {resolv} /etc/resolv.conf && exec "$@"\' sh {hooks.ifup} "$@"\n'
    )
    script.chmod(0o755)
    server = outside.popen([
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
        "--pid-file=", f"--listen-address={OUTSIDE}", "--bind-interfaces",
        "--address=/far.example/198.51.100.7",
    ])  # fmt: skip
    try:
        with ExitStack() as stack:
            console = stack.enter_context(boot.Console())
            guest = boot.guest_arguments(console, ip="dhcp", look="far.example")
            netdev = f"tap,id=n0,ifname=web1,script={script},downscript={hooks.ifdown}"
            qemu = stack.enter_context(Qemu(
                *guest, "-netdev", netdev, "-device", "virtio-net-pci,netdev=n0",
                netns=netns.name, machine="pc", env=hooks.environ(),
            ))  # fmt: skip
            assert console.wait("look") == "look far.example 198.51.100.7"
            assert qemu.wait() == 0
    finally:
        server.terminate()
        server.communicate()
    assert is_gone(netns)


def test_a_flow_follows_a_change_of_its_forward(
    hooks: Hooks, netns: Namespace, outside: Namespace
) -> None:
    """A sender that goes on sending to the same port, as a name server is asked, is led anew."""
    one, two = netns.tap("web0"), netns.tap("web1")

    def forward_to(last: int | None) -> None:
        forward = [] if last is None else [{"from": "5353/udp", "to": f"192.168.76.{last}:53"}]
        write_policy(hooks, {"forward": forward, "dhcp": False, "dns": False, "ipv6": None})

    macs = {10: "52:54:00:aa:00:01", 11: "52:54:00:aa:00:02"}

    def up(tap: str) -> None:
        assert hooks.up(tap).returncode == 0
        for last, mac in macs.items():
            netns.ip("neigh", "replace", f"192.168.76.{last}", "lladdr", mac, "dev", "labbr0")

    def arrives(ask: bytes, last: int) -> bool:
        own = bytes.fromhex(macs[last].replace(":", ""))

        def is_it(frame: bytes) -> bool:
            return frame[:6] == own and frame.endswith(ask)

        sender.sendto(ask, (PUBLIC, 5353))
        return bool(one.recv(1, is_it) or two.recv(1, is_it))

    with outside.enter():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        sender.bind((OUTSIDE, 4444))
        sender.sendto(b"asked 1", (PUBLIC, 5353))
        forward_to(10)
        up("web0")
        assert arrives(b"asked 2", 10), "what was the host's own before"
        forward_to(11)
        up("web1")
        assert arrives(b"asked 3", 11)
        forward_to(None)
        up("web1")
        assert not arrives(b"asked 4", 11)
    for tap in ("web0", "web1"):
        assert hooks.down(tap).returncode == 0
    assert is_gone(netns)
    one.close()
    two.close()


@pytest.mark.timeout(300)
def test_guests_that_come_and_go_at_random(hooks: Hooks, netns: Namespace, way: str) -> None:
    """20 of them, 10 times over, some killed: the network is under each that runs."""
    require("qemu")
    luck = random.Random(76)
    stop = threading.Event()
    torn: list[str] = []
    attached: set[str] = set()
    lock = threading.Lock()

    def watch() -> None:
        while not stop.is_set():
            with lock:
                names = set(attached)
            links = netns.links()
            for name in names:
                if links.get(name, {}).get("master") != "labbr0":
                    with lock:
                        if name in attached:
                            torn.append(name)
            time.sleep(0.01)

    def live(number: int) -> None:
        own = random.Random(number)
        for _ in range(10):
            name = f"web{number}"
            scripts = f"script={hooks.ifup},downscript={hooks.ifdown}"
            with Qemu("-netdev", f"tap,id=n0,ifname={name},{scripts}", netns=netns.name,
                      env=hooks.environ()) as qemu:  # fmt: skip
                assert qemu.greeting
                with lock:
                    attached.add(name)
                time.sleep(own.random() / 20)
                with lock:
                    attached.discard(name)
                if own.random() < 0.3:
                    qemu.signal(signal.SIGKILL)
                else:
                    assert qemu.quit() == 0
            time.sleep(own.random() / 20)

    write_policy(hooks, {"forward": None})
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(live, luck.sample(range(20), 20)))
    finally:
        stop.set()
        watcher.join()
    assert torn == []
    assert hooks.ctl("gc").returncode == 0
    wait_gone(netns)
