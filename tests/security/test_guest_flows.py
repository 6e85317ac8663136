"""What a guest delays by having the kernel track as many flows as it can."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.nat_site import GATEWAY, GUEST, TABLE, NatSite
from lab.netns import Namespace
from lab.taps import Tap
from pyqemu_ifup.flows import (
    CTA_IP_SRC,
    CTA_PROTO_DST_PORT,
    CTA_PROTO_NUM,
    CTA_TUPLE_IP,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_PROTO,
    CTA_TUPLE_REPLY,
    NESTED,
    NFGENMSG,
    forgetting,
    parse_flow,
)
from pyqemu_ifup.links import attribute
from pyqemu_ifup.manners import Watch

FLOWS = 12_000
COUNT = "/proc/sys/net/netfilter/nf_conntrack_count"
LONGEST = 0.25
"""Seconds of processor time in which 12,000 flows are not looked at, but some hundreds are."""
TIMED = """
import os, time
from pyqemu_ifd.server import Server

advance, longest = Server._advance, 0.0

def timed(server, job):
    global longest
    began = time.thread_time()
    ended = advance(server, job)
    longest = max(longest, time.thread_time() - began)
    with open(RECORD + ".new", "w") as file:
        file.write(str(longest))
    os.rename(RECORD + ".new", RECORD)
    return ended

Server._advance = timed
"""
"""Has the agent write down its longest piece of work, in which nobody else's goes on."""


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "longest"


@pytest.fixture
def site(netns: Namespace, tmp_path: Path, record: Path) -> Iterator[NatSite]:
    with Namespace() as outside:
        found = NatSite(netns, outside, tmp_path, {})
        before = f"RECORD = {str(record)!r}{TIMED}"
        with Agent(netns, found.hooks.policy, before=before) as agent:
            found.serve(agent)
            yield found
        outside.close_kept()


def flood(netns: Namespace, tap: Tap) -> None:
    """Send to the gateway from ever other ports, until as many flows are tracked."""
    from scapy.layers.inet import IP, UDP

    packet: IP = IP(src=GUEST, dst=GATEWAY) / UDP(sport=1, dport=9, chksum=0)
    frame = bytearray(NatSite.frame(packet))
    for _ in range(20):
        for port in range(1, FLOWS + 1):
            frame[34:36] = port.to_bytes(2, "big")
            tap.send(bytes(frame))
        with netns.enter(), open(COUNT, encoding="ascii") as file:
            if int(file.read()) >= FLOWS:
                return
    raise AssertionError("the kernel does not track them")


def test_many_flows_stop_the_agent_for_no_moment(
    site: NatSite, netns: Namespace, record: Path
) -> None:
    """When their network's table is loaded again, and it is, in pieces; and none for ever."""
    tap = site.up()
    wanted = site.table()
    flood(netns, tap)
    netns.run(["nft", "delete", "table", "inet", TABLE])
    site.wait_table(wanted, 20)
    site.close()
    assert float(record.read_text()) < LONGEST
    with netns.enter():
        looks = forgetting(lambda flow: False, Watch(0))
        with pytest.raises(StopIteration) as end:
            next(looks)
        assert end.value.value is False


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_flow_is_read_in_whatever_order_the_kernel_tells_of_it(
    family: socket.AddressFamily,
) -> None:
    size = 4 if family == socket.AF_INET else 16
    source, destination, answers, answered = (bytes([each]) * size for each in (1, 2, 3, 4))

    def one(kind: int, first: bytes, second: bytes, back: bool) -> bytes:
        at = CTA_IP_SRC[family]
        ends = [attribute(at, first), attribute(at + 1, second)]
        ports = attribute(CTA_PROTO_NUM, b"\x11") + attribute(CTA_PROTO_DST_PORT, b"\0\x35")
        if back:
            ends.reverse()
        parts = [
            attribute(CTA_TUPLE_IP | NESTED, b"".join(ends)),
            attribute(CTA_TUPLE_PROTO | NESTED, ports),
        ]
        return attribute(kind | NESTED, b"".join(reversed(parts) if back else parts))

    for back, turned in product((False, True), repeat=2):
        tuples = [
            one(CTA_TUPLE_ORIG, source, destination, back),
            one(CTA_TUPLE_REPLY, answers, answered, back),
        ]
        if turned:
            tuples.reverse()
        told = NFGENMSG.pack(family, 0, 0) + b"".join(tuples)
        flow = parse_flow(told)
        assert flow == (source, destination, answers, answered, told)
        assert flow.protocol == (17, 53)
