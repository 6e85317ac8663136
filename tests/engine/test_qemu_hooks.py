"""The hooks as a real QEMU calls them, on Linux bridges and on Open vSwitch.

No guest is booted: QEMU stands with its machine stopped or without one, and where frames are
wanted a Station sends them through QEMU's own tap.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest

from lab.agent import Agent
from lab.events import LinkEvents
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import NOBODY, as_user, public_folder, publish
from lab.qemu import Qemu, QmpError, end_daemon
from lab.sites import FLAT, HOME, OTHER, Site
from lab.spellings import HOOK, SPELLINGS, Spelling
from lab.station import Station
from lab.taps import Tap, frame, holds, mac
from pyqemu_ifup.deadline import GRACE

SOON = 10.0
"""Seconds after which an agent has not seen what it must see."""


@pytest.fixture
def linux(netns: Namespace, tmp_path: Path, served: Callable[..., Hooks]) -> Site:
    """Two Linux bridges, without Open vSwitch."""
    require("qemu")
    return Site("linux", netns, served(Hooks(tmp_path / "hooks", netns.name)))


@pytest.fixture
def openvswitch(ovs: OpenVSwitch, tmp_path: Path, served: Callable[..., Hooks]) -> Site:
    """An Open vSwitch bridge, and a Linux one."""
    require("qemu")
    hooks = served(Hooks(tmp_path / "hooks", ovs.namespace.name))
    return Site("openvswitch", ovs.namespace, hooks, ovs)


@pytest.fixture(params=["linux", "openvswitch"])
def site(request: pytest.FixtureRequest, way: str) -> Site:
    """Each of the two in turn, with a policy that plugs each tap into HOME."""
    # NOTE: `way` is here since a fixture that is asked for by name cannot bring it.
    found: Site = request.getfixturevalue(request.param)
    if found.ovs is not None:
        # NOTE: so that what the test leaves in the database is looked for.
        request.node.funcargs["ovs"] = found.ovs
    found.all_on(HOME)
    return found


def start(site: Site, *args: str, **env: str) -> Qemu:
    """Start QEMU with `args` in the site, its hooks reading the site's policy."""
    return Qemu(*args, netns=site.netns.name, env={**site.hooks.environ(), **env})


def hooks_ran(stderr: str) -> list[str]:
    """Return which hook came to its end for which tap, from what they tell with debugging on."""
    told = r"^pyqemu-(ifup|ifdown): (\S+): ip link set dev \S+ (?:alias ''|up)$"
    return [f"{hook} {tap}" for hook, tap in re.findall(told, stderr, re.MULTILINE)]


def our_lines(stderr: str) -> list[str]:
    """Return the lines that our hooks have written."""
    return [line for line in stderr.splitlines() if line.startswith("pyqemu-")]


DEBUG = {"PYQEMU_IFUP_DEBUG": "1"}


# Who is asking decides, on the real attachment.


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.title)
def test_spelling_decides(spelling: Spelling, site: Site) -> None:
    known = {"vm": spelling.vm, "netdev": spelling.netdev, "mac": spelling.mac}
    match = {key: value for key, value in known.items() if value is not None}
    site.write_policy(
        # What is unknown matches nothing, not even a star.
        *(
            {"tap": spelling.tap, key: "*", "deny": f"{key} is known"}
            for key, value in known.items()
            if value is None
        ),
        {"tap": spelling.tap, "user": "root", **match, "network": HOME},
        {"tap": spelling.tap, "deny": "not known"},
        {"tap": "*", "network": OTHER},
    )
    argv = list(spelling.argv)
    for quote in ("", '"', "'"):
        colon, comma = (": ", ", ") if quote else ("=", ",")
        pair = f"{quote}{{}}{quote}{colon}{quote}{{}}{quote}".format
        old = pair("script", HOOK) + comma + pair("downscript", "no")
        new = pair("script", site.hooks.ifup) + comma + pair("downscript", site.hooks.ifdown)
        argv = [word.replace(old, new) for word in argv]
    argv += ["-S", "-global", "virtio-net-pci.romfile="]
    with Qemu(
        *argv, netns=site.netns.name, machine="q35", env={**site.hooks.environ(), **DEBUG}
    ) as qemu:
        if spelling.starts:
            assert qemu.greeting
            assert site.network_of(spelling.tap) == HOME
            assert qemu.quit() == 0
        else:
            assert qemu.wait() == 1
        ran = hooks_ran(qemu.stderr)
        assert len(ran) == 2 * spelling.taps
        assert {f"ifup {spelling.tap}", f"ifdown {spelling.tap}"} <= set(ran)
    assert site.is_clean(spelling.tap)


def test_hook_named_after_a_network(site: Site) -> None:
    site.write_policy({"tap": "*", "deny": "the rules are not asked"})
    script = site.hooks.on_network(OTHER)
    netdev = f"tap,id=n0,ifname=web0,script={script},downscript={site.hooks.ifdown}"
    with start(site, "-netdev", netdev) as qemu:
        assert qemu.greeting
        assert site.network_of("web0") == OTHER
        assert qemu.quit() == 0
    assert site.is_clean("web0")


def test_hot_plug(site: Site) -> None:
    site.write_policy(
        {"tap": "web7", "netdev": "*", "deny": "a hot-plugged netdev is unknown"},
        {"vm": "web", "network": HOME},
    )
    plug = {"type": "tap", "id": "n7", "ifname": "web7"}
    plug |= {"script": site.hooks.ifup, "downscript": site.hooks.ifdown}
    with start(site, "-name", "web", *site.qemu_arguments("web0"), **DEBUG) as qemu:
        qemu.execute("netdev_add", plug)
        assert site.network_of("web7") == site.network_of("web0") == HOME
        qemu.execute("netdev_del", {"id": "n7"})
        assert site.is_clean("web7") and site.network_of("web0") == HOME
        assert hooks_ran(qemu.stderr) == ["ifup web0", "ifup web7", "ifdown web7"]
        # As often as one likes.
        qemu.execute("netdev_add", plug)
        assert site.network_of("web7") == HOME
        assert qemu.quit() == 0
    assert site.is_clean("web0") and site.is_clean("web7")


def test_denied_hot_plug_keeps_qemu(site: Site) -> None:
    site.write_policy({"tap": "web0", "network": HOME})
    plug = {"type": "tap", "id": "n7", "ifname": "web7"}
    plug |= {"script": site.hooks.ifup, "downscript": site.hooks.ifdown}
    with start(site, *site.qemu_arguments("web0")) as qemu:
        with pytest.raises(QmpError, match=r"failed with status 19712$"):
            qemu.execute("netdev_add", plug)
        assert "web7" not in site.netns.links() and site.is_clean("web7")
        assert site.network_of("web0") == HOME
        assert qemu.quit() == 0
    assert site.is_clean("web0")


def test_queues(site: Site) -> None:
    with start(site, *site.qemu_arguments("web0", more=",queues=4"), **DEBUG) as qemu:
        assert qemu.hmp("info network").count("ifname=web0") == 4
        assert site.network_of("web0") == HOME
        assert qemu.quit() == 0
        assert hooks_ran(qemu.stderr) == ["ifup web0", "ifdown web0"]
    assert site.is_clean("web0")


# The ways in which QEMU ends.

ENDS = [None, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
CRASHES = [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT]


@pytest.mark.parametrize("number", ENDS, ids=["quit", "TERM", "INT", "HUP"])
def test_end(site: Site, number: signal.Signals | None) -> None:
    # A persistent tap, so that down has to undo what elsewhere goes with the tap.
    site.netns.run(["ip", "tuntap", "add", "dev", "web0", "mode", "tap"])
    before = site.netns.link("web0")["address"]
    with start(site, *site.qemu_arguments("web0"), **DEBUG) as qemu:
        assert qemu.greeting
        assert site.network_of("web0") == HOME
        assert (qemu.quit() if number is None else qemu.signal(number)) == 0
        assert hooks_ran(qemu.stderr) == ["ifup web0", "ifdown web0"]
    assert site.is_clean("web0")
    assert site.netns.link("web0")["address"] == before
    site.netns.ip("link", "del", "web0")


@pytest.mark.parametrize("number", CRASHES, ids=["KILL", "SEGV", "ABRT"])
def test_crash(site: Site, number: signal.Signals) -> None:
    with start(site, *site.qemu_arguments("web0"), **DEBUG) as qemu:
        assert qemu.greeting
        assert site.network_of("web0") == HOME
        assert qemu.signal(number) == -number
        assert hooks_ran(qemu.stderr) == ["ifup web0"]
    assert "web0" not in site.netns.links()
    # The kernel takes the tap from a Linux bridge; what is in a database stays there, but for an
    # agent that sees it.
    if site.hooks.agent:
        end = time.monotonic() + SOON
        while not site.is_clean("web0"):
            assert time.monotonic() < end, "the agent leaves it there"
    assert site.is_clean("web0") is (site.kind == "linux" or bool(site.hooks.agent))
    done = site.hooks.ctl("gc", "web0")
    assert done.returncode == 0, done.stderr
    assert site.is_clean("web0")


def test_crash_leaves_a_persistent_tap(site: Site) -> None:
    site.netns.run(["ip", "tuntap", "add", "dev", "web0", "mode", "tap"])
    with start(site, *site.qemu_arguments("web0")) as qemu:
        assert qemu.greeting
        assert qemu.signal(signal.SIGKILL) == -signal.SIGKILL
    assert site.network_of("web0") == HOME
    site.all_on(OTHER)
    with start(site, *site.qemu_arguments("web0")) as qemu:
        assert qemu.greeting
        assert site.network_of("web0") == OTHER
        assert qemu.quit() == 0
    assert site.is_clean("web0")
    site.netns.ip("link", "del", "web0")


@pytest.fixture
def neighbours(openvswitch: Site) -> dict[str, Tap]:
    """A tap in each of the networks, to listen and to talk there."""
    netns, ovs = openvswitch.netns, openvswitch.ovs
    assert ovs is not None
    taps = {name: netns.tap(name, up=True) for name in (HOME, OTHER, FLAT)}
    ovs.add_port("br-int", HOME, "tag=100", "vlan_mode=access")
    ovs.add_port("br-int", OTHER, "tag=200", "vlan_mode=access")
    netns.ip("link", "set", "dev", FLAT, "master", "br0")
    for name in (HOME, OTHER):
        ovs.wait_until("Interface", name, "link_state=up")
    return taps


def talks_only_in(network: str, station: Station, neighbours: dict[str, Tap]) -> None:
    """Check that frames of the guest come to `network` and no other, and those to it from there."""
    others = [tap for name, tap in neighbours.items() if name != network]
    station.send(frame(mac(1), payload=b"from the guest"))
    assert neighbours[network].recv(5, holds(b"from the guest"))
    for other in others:
        assert other.recv(0.1, holds(b"from the guest")) is None
        other.send(frame(mac(3), payload=b"to the guest, astray"))
    neighbours[network].send(frame(mac(2), payload=b"to the guest, right"))
    heard = station.recv(5, holds(b"to the guest"))
    assert heard is not None and b"right" in heard
    assert station.recv(0.1, holds(b"astray")) is None


@pytest.mark.alone("the agent collects it at once")
@pytest.mark.parametrize("network", [OTHER, FLAT])
def test_restart_after_a_crash_is_in_the_new_network(
    network: str, openvswitch: Site, ovs: OpenVSwitch, neighbours: dict[str, Tap]
) -> None:
    site = openvswitch
    site.all_on(HOME)
    with Station(site.netns) as station:
        argv = [*site.qemu_arguments("web0"), *station.arguments("n0")]
        with start(site, *argv) as qemu:
            assert qemu.greeting
            talks_only_in(HOME, station, neighbours)
            assert qemu.signal(signal.SIGKILL) == -signal.SIGKILL
        assert ovs.row("Port", "web0")["tag"] == 100, "the row has outlived the tap"
        site.all_on(network)
        with start(site, *argv) as qemu:
            assert qemu.greeting
            assert site.network_of("web0") == network
            talks_only_in(network, station, neighbours)
            assert qemu.quit() == 0
    assert site.is_clean("web0")


@contextmanager
def port_updates(ovs: OpenVSwitch) -> Iterator[IO[str]]:
    """Yield a line of JSON for each update of the Port rows from now on."""
    columns = "name,tag,vlan_mode,trunks"
    argv = ["ovsdb-client", "--format=json", "monitor", ovs.db, "Open_vSwitch", "Port", columns]
    with ovs.namespace.popen(argv) as monitor:
        assert monitor.stdout is not None
        try:
            assert "br-int" in monitor.stdout.readline(), "what was there comes first"
            yield monitor.stdout
        finally:
            monitor.kill()


def test_stale_row_is_let_go_before_the_new_one_comes(
    openvswitch: Site, ovs: OpenVSwitch, neighbours: dict[str, Tap]
) -> None:
    site = openvswitch
    site.all_on(HOME)
    with Station(site.netns) as station, port_updates(ovs) as updates:
        argv = [*site.qemu_arguments("web0"), *station.arguments("n0")]
        with start(site, *argv) as qemu:
            assert qemu.greeting
            # NOTE: first of all, for an agent lets the row go as soon as the tap is gone.
            ovs.vswitchd.stop()
            assert qemu.signal(signal.SIGKILL) == -signal.SIGKILL
        assert json.loads(updates.readline())["data"][0][1:3] == ["insert", "web0"]
        site.all_on(OTHER)
        with start(site, *argv) as qemu:
            assert json.loads(updates.readline())["data"][0][1:3] == ["delete", "web0"]
            assert not select.select([updates], [], [], 0.5)[0], "ovs-vswitchd is waited for"
            ovs.vswitchd.cont()
            assert qemu.greeting
            talks_only_in(OTHER, station, neighbours)
            assert qemu.quit() == 0
    assert site.is_clean("web0")


# Failures.


def test_denied(site: Site) -> None:
    site.write_policy({"tap": "web0", "deny": "ask the network team"})
    with start(site, *site.qemu_arguments("web0")) as qemu:
        assert qemu.wait() == 1
        assert qemu.stdout == b""
        ours, theirs = qemu.stderr.splitlines()
    number = site.hooks.policy.read_text().splitlines().index(' "rules": [') + 2
    assert ours == (
        "pyqemu-ifup: web0: denied: ask the network team; "
        f"see the rule at {site.hooks.policy}:{number}"
    )
    assert theirs.endswith(f": network script {site.hooks.ifup} failed with status 19712")
    assert "web0" not in site.netns.links() and site.is_clean("web0")


def test_second_tap_denied(site: Site) -> None:
    site.write_policy({"tap": "web0", "network": HOME})
    second = site.qemu_arguments("web1", id="n1")
    with start(site, *site.qemu_arguments("web0"), *second, **DEBUG) as qemu:
        assert qemu.wait() == 1
        assert hooks_ran(qemu.stderr) == ["ifup web0", "ifdown web0"]
        assert "pyqemu-ifup: web1: denied: no rule of " in qemu.stderr
    assert not {"web0", "web1"} & site.netns.links().keys()
    assert site.is_clean("web0") and site.is_clean("web1")


def test_later_fault_of_qemu(site: Site) -> None:
    with start(site, *site.qemu_arguments("web0"), "-device", "nosuch", **DEBUG) as qemu:
        assert qemu.wait() == 1
        assert hooks_ran(qemu.stderr) == ["ifup web0", "ifdown web0"]
    assert site.is_clean("web0")


def test_vhost_missing(site: Site) -> None:
    with start(site, *site.qemu_arguments("web0", more=",vhost=on"), **DEBUG) as qemu:
        if os.path.exists("/dev/vhost-net"):
            assert qemu.quit() == 0
        else:
            # NOTE: QEMU 7.2 calls down and dies of an assertion of its own.
            assert qemu.wait() in (1, -signal.SIGABRT)
        assert hooks_ran(qemu.stderr) == ["ifup web0", "ifdown web0"]
    assert "web0" not in site.netns.links() and site.is_clean("web0")


@pytest.fixture
def held(site: Site) -> str:
    """A persistent tap that somebody else has put on a Linux bridge; its master."""
    master = "br1" if site.kind == "linux" else "br0"
    # NOTE: QEMU itself turns vnet_hdr on.
    site.netns.run(["ip", "tuntap", "add", "dev", "web0", "mode", "tap", "vnet_hdr"])
    site.netns.ip("link", "set", "dev", "web0", "mtu", "1400", "master", master, "up")
    return master


def test_tap_of_another_bridge_is_not_stolen(site: Site, held: str) -> None:
    with start(site, *site.qemu_arguments("web0")) as qemu:
        assert qemu.wait() == 1
        (line,) = our_lines(qemu.stderr)
        assert "failed with status 19712" in qemu.stderr
    assert line.startswith(f"pyqemu-ifup: web0: somebody else's tap: {held} holds it; ")
    link = site.netns.link("web0")
    assert (link["master"], link["mtu"]) == (held, 1400) and "UP" in link["flags"]


def test_name_of_a_foreign_row_is_not_stolen(openvswitch: Site, ovs: OpenVSwitch) -> None:
    site = openvswitch
    ovs.vsctl(
        *("add-port", "br-int", "web0", "tag=300", "--"),
        *("set", "Interface", "web0", "type=internal", "external_ids:vm-name=theirs"),
    )
    ovs.vsctl("set", "Interface", "web0", "type=system")
    for network in (HOME, FLAT):
        site.all_on(network)
        with start(site, *site.qemu_arguments("web0")) as qemu:
            assert qemu.wait() == 1
            (line,) = our_lines(qemu.stderr)
        assert line.startswith(
            "pyqemu-ifup: web0: Open vSwitch has a port of this name that is not ours: "
            f"on bridge br-int of {ovs.db}, vm theirs; "
        )
        assert ovs.row("Port", "web0")["tag"] == 300
    ovs.del_port("web0")


# No frame before its policy.


def test_join_comes_before_up(linux: Site) -> None:
    linux.all_on(HOME)
    bridge = linux.netns.link("br0")["ifindex"]
    with LinkEvents(linux.netns) as events, start(linux, *linux.qemu_arguments("web0")) as qemu:
        assert qemu.greeting
        before = events.of("web0")
        assert qemu.quit() == 0
    assert before[-1].up and before[-1].master == bridge
    assert all(event.master == bridge for event in before if event.up)
    assert [event for event in before if event.master == bridge and not event.up]


def test_tap_that_is_up_is_taken_down_first(linux: Site) -> None:
    linux.all_on(HOME)
    linux.netns.run(["ip", "tuntap", "add", "dev", "web0", "mode", "tap"])
    linux.netns.ip("link", "set", "dev", "web0", "up")
    with LinkEvents(linux.netns) as events, start(linux, *linux.qemu_arguments("web0")) as qemu:
        assert qemu.greeting
        seen = events.of("web0")
        assert qemu.quit() == 0
    joined = next(number for number, event in enumerate(seen) if event.master is not None)
    assert not seen[joined].up and seen[-1].up
    linux.netns.ip("link", "del", "web0")


def test_port_comes_with_its_vlan(openvswitch: Site, ovs: OpenVSwitch) -> None:
    site = openvswitch
    site.all_on(HOME)
    with port_updates(ovs) as updates:
        with start(site, *site.qemu_arguments("web0")) as qemu:
            assert qemu.greeting
            assert site.network_of("web0") == HOME
            assert qemu.quit() == 0
        inserted, deleted = (json.loads(updates.readline()) for _ in range(2))
    (row,) = inserted["data"]
    assert row[1:] == ["insert", "web0", 100, "access", ["set", []]]
    assert deleted["data"][0][1:3] == ["delete", "web0"]


# Open vSwitch that does not do its part.


@pytest.mark.alone("the agent leaves another namespace to the hook")
def test_port_that_openvswitch_cannot_use(openvswitch: Site, ovs: OpenVSwitch) -> None:
    # The tap is in a namespace where ovs-vswitchd is not: `ovs-vsctl add-port` would end 0.
    site = openvswitch
    site.write_policy({"tap": "*", "network": HOME, "mtu": 1500})
    with Namespace() as elsewhere:
        argv = site.qemu_arguments("web0")
        with Qemu(*argv, netns=elsewhere.name, env=site.hooks.environ()) as qemu:
            assert qemu.wait() == 1
            (line,) = our_lines(qemu.stderr)
            assert "failed with status 18176" in qemu.stderr
        assert "web0" not in elsewhere.links()
    assert line.startswith(
        "pyqemu-ifup: web0: br-int cannot use the tap: "
        "could not open network device web0 (No such device); "
    )
    assert ovs.find("Port", "web0") is None and ovs.find("Interface", "web0") is None


def test_mute_vswitchd(openvswitch: Site, ovs: OpenVSwitch) -> None:
    site = openvswitch
    site.all_on(HOME, timeout=1)
    ovs.vswitchd.stop()
    begun = time.monotonic()
    with LinkEvents(site.netns) as events:
        with start(site, *site.qemu_arguments("web0")) as qemu:
            assert qemu.wait() == 1
            (line,) = our_lines(qemu.stderr)
            assert "failed with status 19200" in qemu.stderr
        seen = events.of("web0")
        assert seen and not any(event.up for event in seen)
    # QEMU blocks SIGALRM; the deadline and what may come after it hold none the less.
    assert 1.0 < time.monotonic() - begun < 1.0 + GRACE + 3.0
    assert line.startswith("pyqemu-ifup: web0: not done after 1 s: ovs-vswitchd does not answer")
    assert ovs.find("Port", "web0") is None, "what was committed is taken back"
    ovs.vswitchd.cont()
    ovs.vsctl("set", "Open_vSwitch", ".", "external_ids:waited=1")
    assert "web0" not in ovs.appctl("vswitchd", "dpif/show")
    assert site.is_clean("web0")


# QEMU's own options about its children.


def test_daemonized(site: Site, tmp_path: Path) -> None:
    site.netns.run(["ip", "tuntap", "add", "dev", "web0", "mode", "tap"])
    pidfile = tmp_path / "pid"
    argv = [*site.qemu_arguments("web0"), "-daemonize", "-pidfile", str(pidfile), "-name", "web"]
    site.write_policy({"vm": "web", "netdev": "n0", "network": HOME})
    with Qemu(*argv, netns=site.netns.name, qmp=None, env=site.hooks.environ()) as qemu:
        assert qemu.wait() == 0
        assert our_lines(qemu.stderr) == []
        assert site.network_of("web0") == HOME
        end_daemon(int(pidfile.read_text()), signal.SIGTERM)
    assert site.is_clean("web0")
    site.netns.ip("link", "del", "web0")


def test_daemonized_failure_reaches_the_caller(site: Site) -> None:
    site.write_policy({"tap": "web0", "deny": "ask the network team"})
    argv = [*site.qemu_arguments("web0"), "-daemonize"]
    with Qemu(*argv, netns=site.netns.name, qmp=None, env=site.hooks.environ()) as qemu:
        assert qemu.wait() == 1
        (line,) = our_lines(qemu.stderr)
        assert line.startswith("pyqemu-ifup: web0: denied: ask the network team; ")
    assert site.is_clean("web0")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can read."""
    with public_folder() as folder:
        yield folder


def test_runas(site: Site, public: Path) -> None:
    site.hooks = publish(site.hooks, public)
    if site.ovs is not None:
        site.ovs.dir.chmod(0o755)
    with start(site, *site.qemu_arguments("web0"), "-runas", "nobody", **DEBUG) as qemu:
        assert qemu.greeting
        assert site.network_of("web0") == HOME
        assert qemu.quit() == 0
        down = [line for line in our_lines(qemu.stderr) if line.startswith("pyqemu-ifdown: ")]
        assert down, "it was run and ended 0, since QEMU says nothing of it"
        assert "failed with status" not in qemu.stderr
    assert "web0" not in site.netns.links()
    if site.ovs is not None and not site.hooks.agent:
        assert site.ovs.row("Port", "web0")["tag"] == 100, "it could not"
        assert site.hooks.ctl("gc").returncode == 0
    assert site.is_clean("web0")


def test_unprivileged_qemu_with_a_tap_of_its_own(linux: Site, public: Path) -> None:
    site = linux
    # The policy is refused where others own it, so it is root's, and plugs it in.
    site.all_on(HOME)
    site.hooks = publish(site.hooks, public)
    site.netns.run(["ip", "tuntap", "add", "dev", "web0", "mode", "tap", "user", "nobody"])
    before = site.netns.link("web0")
    # NOTE: /dev/net/tun is for all users on most hosts, for root alone on some.
    tun = public / "tun"
    os.mknod(tun, 0o020666, os.stat("/dev/net/tun").st_rdev)
    tun.chmod(0o666)
    share = 'mount --bind "$0" /dev/net/tun && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", share, str(tun), *as_user(NOBODY))
    env = site.hooks.environ()
    with ExitStack() as stack:
        if site.hooks.agent:
            users = stack.enter_context(Agent(site.netns, site.hooks.policy, users=True))
            env["PYQEMU_IFUP_SOCKET"] = users.path
        qemu = stack.enter_context(
            Qemu(*site.qemu_arguments("web0"), netns=site.netns.name, prefix=prefix, env=env)
        )
        assert qemu.wait() == 1
        (line,) = our_lines(qemu.stderr)
        if site.hooks.agent:
            assert line.startswith("pyqemu-ifup: web0: user nobody may not use network home: ")
        else:
            assert line.startswith("pyqemu-ifup: web0: ip link set dev web0 alias ")
            assert "the kernel refuses it (Operation not permitted); the agent does it for" in line
        assert "failed with status 19712" in qemu.stderr
    after = site.netns.link("web0")
    assert (after["address"], after["mtu"], after["flags"]) == (
        before["address"],
        before["mtu"],
        before["flags"],
    )
    assert site.is_clean("web0")
    # QEMU as root may use it too.
    with start(site, *site.qemu_arguments("web0")) as qemu:
        assert qemu.greeting
        assert site.network_of("web0") == HOME
        assert qemu.quit() == 0
    assert site.is_clean("web0")
    assert site.netns.link("web0")["linkinfo"]["info_data"]["user"] == "nobody"
    site.netns.ip("link", "del", "web0")


SANDBOX = "on,obsolete=deny,elevateprivileges=deny,resourcecontrol=deny"


@pytest.mark.parametrize("options", ["on", SANDBOX])
def test_sandbox(site: Site, options: str) -> None:
    with start(site, *site.qemu_arguments("web0"), "-sandbox", options, **DEBUG) as qemu:
        assert qemu.greeting
        status = Path(f"/proc/{qemu.pid}/status").read_text()
        assert "NoNewPrivs:\t1\n" in status and "Seccomp:\t2\n" in status
        assert site.network_of("web0") == HOME
        assert qemu.quit() == 0
        assert hooks_ran(qemu.stderr) == ["ifup web0", "ifdown web0"]
    assert site.is_clean("web0")


def test_sandbox_without_children(site: Site) -> None:
    argv = [*site.qemu_arguments("web0"), "-sandbox", "on,spawn=deny"]
    with start(site, *argv, **DEBUG) as qemu:
        assert qemu.wait() == -signal.SIGSYS
        assert our_lines(qemu.stderr) == []
    assert "web0" not in site.netns.links() and site.is_clean("web0")


# QMP on stdio.


def conversation(site: Site, *args: str, **env: str) -> bytes:
    """Return all that QEMU writes to stdout in a short QMP session, its clock left out."""
    with start(site, *args, **env) as qemu:
        assert qemu.execute("query-status")["running"] is True
        qemu.execute("netdev_add", {"type": "user", "id": "u0"})
        assert qemu.quit() == 0
        assert qemu.stdout.count(b"\n") == qemu.stdout.count(b"\r\n") > 4
        return re.sub(rb'"timestamp": \{[^}]*\}', b"", qemu.stdout)


@pytest.mark.parametrize("env", [{}, DEBUG], ids=["quiet", "debugging"])
def test_qmp_is_unharmed(site: Site, env: dict[str, str]) -> None:
    bare = conversation(site, "-netdev", "tap,id=n0,ifname=web0,script=no,downscript=no")
    assert conversation(site, *site.qemu_arguments("web0"), **env) == bare


# Names.

ODD_NAMES = [
    ("abcdefghijklmnop", "abcdefghijklmno"),
    ("-rf", "-rf"),
    ("--help", "--help"),
    ("a;id>x", "a;id>x"),
    ("$(id)`id`", "$(id)`id`"),
    ("'\"\\", "'\"\\"),
    ("*", "*"),
    ("q%d", "q0"),
    ("...", "..."),
    ("a,b=c", "a,b=c"),
]


@pytest.mark.parametrize(("asked", "tap"), ODD_NAMES, ids=[asked for asked, _ in ODD_NAMES])
def test_odd_name(site: Site, asked: str, tap: str) -> None:
    glob = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in tap)
    site.write_policy({"tap": glob, "netdev": "n0", "network": HOME})
    with start(site, *site.qemu_arguments(asked)) as qemu:
        assert qemu.greeting
        assert site.network_of(tap) == HOME
        assert qemu.quit() == 0
        assert our_lines(qemu.stderr) == []
    assert site.is_clean(tap)


@pytest.mark.parametrize("name", [b"\xff\xfe", "\u20ac".encode(), b"a\x01", b"\x7f"], ids=ascii)
def test_name_refused(site: Site, name: bytes) -> None:
    with start(site, *site.qemu_arguments(os.fsdecode(name))) as qemu:
        assert qemu.wait() == 1
        (line,) = our_lines(qemu.stderr)
        assert "failed with status 16384" in qemu.stderr
    assert line.startswith(f"pyqemu-ifup: {os.fsdecode(name)!a}: ")
    assert line.isascii() and line.isprintable()


# Many at once.


def test_eight_at_once(site: Site) -> None:
    site.write_policy({"tap": "a*", "network": HOME}, {"tap": "b*", "network": OTHER}, timeout=60)
    taps = {
        f"{letter}{number}": network
        for letter, network in (("a", HOME), ("b", OTHER))
        for number in range(4)
    }
    with ExitStack() as stack, ThreadPoolExecutor(len(taps)) as pool:
        qemus = [stack.enter_context(start(site, *site.qemu_arguments(tap))) for tap in taps]
        for qemu in qemus:
            assert qemu.greeting
        assert {tap: site.network_of(tap) for tap in taps} == taps
        assert list(pool.map(Qemu.quit, qemus)) == [0] * len(taps)
        assert [our_lines(qemu.stderr) for qemu in qemus] == [[]] * len(taps)
    assert all(map(site.is_clean, taps))


# QEMU killed while up runs.


def child_of(pid: int) -> int:
    """Return the only child of a process."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def test_qemu_killed_while_up_runs(openvswitch: Site, ovs: OpenVSwitch) -> None:
    site = openvswitch
    site.all_on(HOME)
    ovs.vswitchd.stop()
    with start(site, *site.qemu_arguments("web0")) as qemu:
        ovs.vsctl("--no-wait", "wait-until", "Port", "web0", "tag=100")
        hook = os.pidfd_open(child_of(qemu.pid))
        try:
            assert qemu.signal(signal.SIGKILL) == -signal.SIGKILL
            # No EBUSY: the hook does not hold the tap, whatever it still has to do.
            assert "web0" not in site.netns.links()
            again = site.netns.tap("web0")
            index = site.netns.link("web0")["ifindex"]
            ovs.vswitchd.cont()
            assert select.select([hook], [], [], 10)[0], "the hook has not ended"
        finally:
            os.close(hook)
        (line,) = our_lines(qemu.stderr)
    assert line.startswith("pyqemu-ifup: web0: stopped: the calling process ")
    # What was begun for the old tap is gone, and the new one of that name was not touched.
    assert site.is_clean("web0")
    assert site.netns.link("web0")["ifindex"] == index
    again.close()
    with start(site, *site.qemu_arguments("web0")) as second:
        assert second.greeting
        assert site.network_of("web0") == HOME
        assert second.quit() == 0
    assert site.is_clean("web0")
