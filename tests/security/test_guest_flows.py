"""What a guest delays by having the kernel track as many flows as it can."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.nat_site import GATEWAY, GUEST, OUTSIDE, PATIENCE, TABLE, NatSite
from lab.netns import Namespace
from lab.taps import Tap
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.conntrack import (
    CTA_IP_SRC,
    CTA_PROTO_DST_PORT,
    CTA_PROTO_NUM,
    CTA_TUPLE_IP,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_PROTO,
    CTA_TUPLE_REPLY,
    NESTED,
    Flow,
    forget_flows,
    parse_flow,
)
from pyqemu_ifup.drivers.netlink import NFGENMSG, attribute
from pyqemu_ifup.task import finish

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


def wait_untranslated(netns: Namespace, *, there: bool) -> None:
    """Wait until a flow from the guest to `OUTSIDE` that is not translated is there, or is not."""

    def note(found: list[Flow], flow: Flow) -> bool:
        if flow.destination == socket.inet_aton(OUTSIDE):
            found.append(flow)
        return False

    end = time.monotonic() + PATIENCE
    with netns.enter():
        while True:
            flows: list[Flow] = []
            finish(forget_flows(partial(note, flows), Deadline(PATIENCE)), time.sleep)
            if any(each.source == each.answered for each in flows) is there:
                return
            assert time.monotonic() < end, flows
            time.sleep(0.05)


def test_many_flows_stop_the_agent_for_no_moment(
    site: NatSite, netns: Namespace, record: Path
) -> None:
    """When their network's table is loaded again: they are looked at in pieces, and all of them.

    What has left meanwhile with the guest's own address is forgotten; and no look is for ever.
    """
    from scapy.layers.inet import IP, UDP

    tap = site.up()
    wanted = site.table()
    flood(netns, tap)
    agent = site.hooks.agent_pid
    assert agent is not None
    os.kill(agent, signal.SIGSTOP)
    # NOTE: without a table that asks for it the kernel tracks nothing.
    netns.run(["nft", f"delete table inet {TABLE}; add table inet other; add chain inet other one "
               "{ type filter hook forward priority 0; }; "
               "add rule inet other one ct state new accept"])  # fmt: skip
    packet: IP = IP(src=GUEST, dst=OUTSIDE) / UDP(sport=1, dport=9)
    tap.send(NatSite.frame(packet))
    wait_untranslated(netns, there=True)
    os.kill(agent, signal.SIGCONT)
    site.wait_table(wanted, 20)
    wait_untranslated(netns, there=False)
    netns.run(["nft", "delete", "table", "inet", "other"])
    site.close()
    assert float(record.read_text()) < LONGEST
    with netns.enter():
        looks = forget_flows(lambda flow: False, Deadline(0))
        with pytest.raises(StopIteration) as end:
            looks.send(None)
        assert end.value.value is False


@pytest.mark.parametrize(("back", "turned"), list(product((False, True), repeat=2)))
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_flow_is_read_in_whatever_order_the_kernel_tells_of_it(
    family: socket.AddressFamily, back: bool, turned: bool
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
