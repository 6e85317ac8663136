"""What becomes of a network with nat: when root flushes the ruleset, by mistake or by a script."""

from __future__ import annotations

import functools
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.agent import Agent
from lab.nat_site import (
    GATEWAY,
    GUEST,
    LINGER,
    OUTSIDE,
    SUBNET,
    TABLE,
    Listener,
    NatSite,
    drain,
    is_source,
    seen,
)
from lab.netns import Namespace
from lab.taps import Tap

FORWARDS = {"forward": [{"from": "2222/tcp", "to": f"{GUEST}:22"}]}
"""One from this host's loopback addresses too."""


@pytest.fixture
def site(netns: Namespace, tmp_path: Path, way: str) -> Iterator[NatSite]:
    """A host with the network, and an agent where that is the way."""
    with Namespace() as outside:
        found = NatSite(netns, outside, tmp_path, FORWARDS)
        try:
            if way == "agent":
                with Agent(netns, found.hooks.policy) as agent:
                    found.serve(agent)
                    yield found
            else:
                yield found
        finally:
            outside.close_kept()


UNDOINGS = [
    "flush ruleset", f"delete table inet {TABLE}", f"flush table inet {TABLE}",
    f"flush chain inet {TABLE} left", f"insert rule inet {TABLE} guard accept",
    f"add chain inet {TABLE} forward {{ policy drop; }}",
    f"add table inet {TABLE} {{ flags dormant; }}",
    f"add chain inet {TABLE} more {{ type filter hook input priority 0; }}",
]  # fmt: skip
"""What root may do to the table in one command."""


@pytest.fixture
def told(netns: Namespace, tmp_path: Path) -> Iterator[NatSite]:
    """A host with the network, and an agent that starts with the test."""
    with Namespace() as outside:
        found = NatSite(netns, outside, tmp_path, FORWARDS)
        with Agent(netns, found.hooks.policy) as agent:
            found.serve(agent)
            yield found
        outside.close_kept()


def test_the_agent_loads_a_table_again_within_a_second(told: NatSite, netns: Namespace) -> None:
    """Whatever was done to it, under traffic, and the flows that have begun meanwhile too."""
    tap = told.up()
    wanted = told.table()
    assert wanted
    times = []
    with flooded(tap):
        for undoing in UNDOINGS[:3]:
            netns.run(["nft", undoing])
            times.append(told.wait_table(wanted, 20))
    # NOTE: a loaded machine may be late.
    assert min(times) < 1, times
    told.close()


@pytest.mark.alone("the agent does it")
def test_gc_loads_a_table_again(netns: Namespace, site: NatSite) -> None:
    """Where no agent does, whatever was done to it, and with --dry-run only says so."""
    site.up()
    wanted = site.table()
    for undoing in UNDOINGS:
        netns.run(["nft", undoing])
        before = site.table()
        dry = site.hooks.ctl_warm("gc", "--dry-run")
        assert "would load the nft table of network lab again: " in dry.stdout, undoing
        assert site.table() == before != wanted
        done = site.hooks.ctl_warm("gc")
        assert "loaded the nft table of network lab again: " in done.stdout, (undoing, done)
        assert site.table() == wanted
    assert site.hooks.ctl_warm("gc").stdout == "nothing to remove\n"
    site.close()


@pytest.mark.alone("the agent does it")
def test_what_has_begun_without_the_table_does_not_go_on_so(
    netns: Namespace, site: NatSite
) -> None:
    """A guest's flow that left with its own address, and one that came in from outside."""
    from scapy.layers.inet import IP, UDP

    tap = site.up()
    head: Any = IP(src=GUEST, dst=OUTSIDE)
    out = NatSite.frame(head / UDP(sport=1000, dport=1001) / b"out it goes")
    with site.outside.enter():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        sender.bind((OUTSIDE, 2000))

        def comes_in() -> bool:
            sender.sendto(b"in it comes", (GUEST, 2001))
            return tap.recv(LINGER, lambda frame: b"in it comes" in frame) is not None

        assert not comes_in()
        # NOTE: whoever tracks connections beside us has them remembered.
        netns.run(["nft", "flush ruleset; add table inet other; add chain inet other first "
                   "{ type filter hook forward priority 0; }; "
                   "add rule inet other first ct state new accept"])  # fmt: skip
        drain(site.uplink)
        tap.send(out)
        assert any(is_source(frame, (SUBNET,)) for frame in seen(site.uplink, b"out it goes"))
        assert comes_in()
        tap.send(NatSite.frame(head / UDP(sport=2001, dport=2000) / b"an answer"))
        assert seen(site.uplink, b"an answer")
        assert site.hooks.ctl("gc").returncode == 0
        assert not comes_in()
        drain(site.uplink)
        tap.send(out)
        assert not any(is_source(frame, (SUBNET,)) for frame in seen(site.uplink, b"out it goes"))
    netns.run(["nft", "delete", "table", "inet", "other"])
    site.close()


def of_table(site: NatSite) -> list[dict[str, Any]]:
    """Return what doctor finds of the table."""
    answer = site.hooks.ctl_json("doctor")
    # NOTE: on a busy machine it tells of parts that it had no time for.
    while any(re.search("not done after|the time was up", each) for each in answer["unseen"]):
        answer = site.hooks.ctl_json("doctor")
    return [each for each in answer["findings"] if each["check"] == "nat-table"]


@pytest.mark.alone("the agent does it")
def test_status_doctor_and_apply_tell_of_a_table_that_is_not_as_it_was(
    netns: Namespace, site: NatSite
) -> None:
    """By its rules: a rule before, or in the stead of, one of the same number too."""
    site.up()
    assert [row["state"] for row in site.hooks.ctl_json("status")["taps"]] == ["ok"]
    listed = json.loads(netns.run(["nft", "-j", "list", "chain", "inet", TABLE, "left"]).stdout)
    handle = listed["nftables"][-1]["rule"]["handle"]
    netns.run(["nft", f"replace rule inet {TABLE} left handle {handle} accept"])
    (row,) = site.hooks.ctl_json("status")["taps"]
    assert (row["state"], row["differences"]) == ("differs", [{
        "setting": "nat", "wanted": "as the policy says",
        "is": "its nft table is changed by somebody else", "because": None,
    }])  # fmt: skip
    assert [each["command"] for each in of_table(site)] == ["pyqemu-ifctl gc"]
    dry = site.hooks.ctl("apply", "--dry-run")
    assert f"the nft table inet {TABLE} is not as the policy says" in dry.stdout, dry
    assert site.hooks.ctl("apply", "web0").returncode == 0
    assert [row["state"] for row in site.hooks.ctl_json("status")["taps"]] == ["ok"]
    site.close()


def test_a_table_that_the_policy_does_not_have_is_told_of(netns: Namespace, tmp_path: Path) -> None:
    """When it is flushed while its network has taps, and it is loaded once the policy has it."""
    path = str(tmp_path / "log")
    with Namespace() as outside, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(path)
        log.settimeout(20)
        site = NatSite(netns, outside, tmp_path, FORWARDS)
        site.up()
        wanted = site.table()
        good = site.hooks.policy.read_text()
        site.hooks.write_policy('{"version": 1, "networks": {"lan": {"bridge": "br0"}}, '
                                '"rules": [{"tap": "*", "network": "lan"}]}')  # fmt: skip
        before = f"import pyqemu_ifup.hook as hook; hook.LOG_SOCKET = {path!r}"
        with Agent(netns, site.hooks.policy, before=before) as agent:
            site.serve(agent)
            netns.run(["nft", "flush", "ruleset"])
            while b"nothing keeps its guests" not in (line := log.recv(4096)):
                continue
            assert f"network lab: the nft table inet {TABLE} is gone".encode() in line
            (finding,) = of_table(site)
            assert finding["command"] is None
            assert "give the network back its nat: and bridge: labbr0" in finding["do"]
            done = site.hooks.ctl("gc")
            assert done.returncode == 71, done
            assert "the nft table of network lab is gone" in done.stderr
            site.hooks.write_policy(good)
            site.wait_table(wanted, 20)
            site.write_policy({})
            (finding,) = of_table(site)
            assert finding["command"] == "pyqemu-ifctl apply"
            assert site.hooks.ctl("apply").returncode == 0
            assert of_table(site) == []
            site.close()
        outside.close_kept()


@pytest.mark.alone("the agent does it")
def test_an_up_loads_a_table_again(netns: Namespace, site: NatSite) -> None:
    site.up()
    wanted = site.table()
    second = netns.tap("web1")
    for undoing in UNDOINGS[1:4]:
        netns.run(["nft", undoing])
        assert site.hooks.up("web1").returncode == 0
        assert site.table() == wanted, undoing
    site.close("web0", "web1")
    second.close()


@functools.cache
def to_loopback(number: int) -> Sequence[bytes]:
    """Return frames of a guest's for services at 127.0.0.1 and 127.9.9.9, in all wrappings."""
    from scapy.layers.inet import IP, TCP, UDP, IPOption_LSRR

    tags: list[tuple[tuple[int, int], ...]] = [
        (), ((0x8100, 0),), ((0x88A8, 0),), ((0x8100, 0), (0x8100, 0)), ((0x88A8, 0), (0x8100, 0)),
        ((0x8100, 0xE000), (0x88A8, 0)),
    ]  # fmt: skip
    frames = []
    for at, wrapping in enumerate(tags):
        for to in ("127.0.0.1", "127.9.9.9"):
            sport = 20000 + 100 * number + at
            packet: Any = IP(src=GUEST, dst=to)
            frames.append(NatSite.frame(packet / UDP(sport=sport, dport=8125) / b"in", *wrapping))
            frames.append(NatSite.frame(
                packet / TCP(sport=sport, dport=8125, flags="S", seq=7), *wrapping
            ))  # fmt: skip
    routed: Any = IP(src=GUEST, dst=GATEWAY, options=IPOption_LSRR(routers=["127.0.0.1"]))
    frames.append(NatSite.frame(routed / UDP(sport=1, dport=8125) / b"in"))
    return frames


@contextmanager
def flooded(tap: Tap) -> Iterator[None]:
    """Have a guest send to loopback addresses all the while."""
    stop = threading.Event()

    def send() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % 100
            for each in to_loopback(number):
                tap.send(each)
            stop.wait(0.02)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def through_ip_hooks(netns: Namespace, how: str) -> None:
    """Say whether bridged frames go through the hooks of IP, where this kernel has br_netfilter."""
    key = "/proc/sys/net/bridge/bridge-nf-call-iptables"
    netns.run(["sh", "-c", f"test ! -e {key} || echo {how} >{key}"])


@pytest.mark.parametrize("how", ["0", "1"])
def test_no_guest_reaches_a_loopback_address_with_the_table_or_without(
    site: NatSite, netns: Namespace, how: str
) -> None:
    """Before, during and after a flush, and where all of the host routes 127.0.0.0/8."""
    through_ip_hooks(netns, how)
    tap = site.up()
    netns.run(["sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1"])
    with Listener(netns, "127.0.0.1", 8125) as one, Listener(netns, "127.9.9.9", 8125) as two:
        with flooded(tap):
            time.sleep(LINGER)
            netns.run(["nft", "flush", "ruleset"])
            time.sleep(4 * LINGER)
        answers = [frame for frame in drain(tap) if b"\x7f\0\0\x01" in frame[26:30]]
        assert (one.heard(), two.heard(), answers) == ([], [], [])
        with netns.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.sendto(b"own", ("127.0.0.1", 8125))
        assert one.heard() == [b"own"], "it hears who may reach it"
    site.close()


def is_tcp(frame: bytes) -> bool:
    """Tell a frame of TCP from one by which the bridge tells of its own groups (IGMP)."""
    return frame[12:14] == b"\x08\0" and frame[23] == socket.IPPROTO_TCP


@pytest.mark.parametrize("how", ["0", "1"])
def test_a_forward_from_a_loopback_address_leads_to_the_guest_and_back(
    site: NatSite, netns: Namespace, how: str
) -> None:
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether

    through_ip_hooks(netns, how)
    tap = site.up()
    with netns.enter(), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", 2222))
        asked: Any = Ether(tap.recv(20, is_tcp) or b"")
        assert (asked[IP].src, asked[IP].dst, asked[TCP].dport) == (GATEWAY, GUEST, 22)
        answer: Any = IP(src=GUEST, dst=GATEWAY)
        tap.send(NatSite.frame(answer / TCP(
            sport=22, dport=asked[TCP].sport, flags="SA", seq=5, ack=asked[TCP].seq + 1
        )))  # fmt: skip
        client.settimeout(20)
        client.connect(("127.0.0.1", 2222))
    site.close()
