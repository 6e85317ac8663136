"""Frames that no bridge passes: docs/troubleshooting.md says which they are, and how they do."""

from __future__ import annotations

import os
import re
import time

from test_troubleshooting import PAGE

from lab.needs import require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.plug import plug, port_of, unplug
from lab.taps import Tap, frame, holds, mac

ARRIVAL = 30.0
LINGER = 0.2
"""Seconds that a frame is given which must not come through, after one that has."""
LAST = {"STP": 0x00, "LACP": 0x02, "802.1X": 0x03, "LLDP": 0x0E}
"""The last byte of each protocol's address, after 01:80:c2:00:00 (IEEE 802.1Q, table 8-1)."""


def section() -> str:
    text: str = PAGE.read_text().partition("\n## Frames that no bridge passes\n")[2]
    return text.partition("\n## ")[0]


def commands(start: str) -> list[list[str]]:
    """Return the commands of the page that begin so."""
    found = re.findall(rf"^    ({start}.*)$", section(), re.MULTILINE)
    assert found, start
    return [line.split() for line in found]


def rows() -> dict[str, tuple[str, str]]:
    """Return the page's table: what a Linux bridge and Open vSwitch do with each protocol."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section().splitlines()
        if line.startswith("| ")
    ]
    return {name: (linux, ovs) for name, _, linux, ovs in cells[1:]}


def passes(one: Tap, other: Tap, last: int, *, soon: bool = False) -> bool:
    """Tell whether a frame to the reserved address gets to the other guest.

    `soon`: it is to pass, and given time.
    """
    address = bytes((0x01, 0x80, 0xC2, 0x00, 0x00, last))
    token, sign = os.urandom(16), os.urandom(16)
    end = time.monotonic() + ARRIVAL
    while time.monotonic() < end:
        one.send(frame(mac(1), address, token))
        one.send(frame(mac(1), payload=sign))
        found = other.recv(1.0, lambda data: token in data or sign in data)
        if found is not None and token in found:
            return True
        if found is not None and not soon:
            return other.recv(LINGER, holds(token)) is not None
    return False


def passing(one: Tap, other: Tap, *expected: str) -> set[str]:
    return {name for name, last in LAST.items() if passes(one, other, last, soon=name in expected)}


def open_taps(netns: Namespace) -> tuple[Tap, Tap]:
    """Open a guest's tap, and one that stands for the card behind the bridge."""
    return netns.tap("web0"), netns.tap("eth0")


def test_on_a_linux_bridge(netns: Namespace) -> None:
    require("root", "tun", "ip")
    taps = open_taps(netns)
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    for tap in taps:
        plug(netns, port_of(tap.name, "br0"))
    by_nature = [name for name, (linux, _) in rows().items() if linux.startswith("passes")]
    assert passing(*taps, *by_nature) == {*by_nature} == {"STP"}
    (mask,) = commands("ip link set dev br0 type bridge group_fwd_mask")
    netns.run(mask)
    assert passing(*taps, "STP", "802.1X", "LLDP") == {"STP", "802.1X", "LLDP"}
    # Of the bridge as a whole the kernel does not let LACP through.
    refused = netns.run([*mask[:-1], "4"], check=False)
    assert refused.returncode != 0
    for each in commands("ip link set dev .* type bridge_slave"):
        netns.run(each)
    assert passing(*taps, *LAST) == set(LAST)
    assert passing(taps[1], taps[0], *LAST) == set(LAST)
    for tap in taps:
        unplug(netns, tap.name)
    netns.ip("link", "del", "dev", "br0")


def test_on_open_vswitch(netns: Namespace, ovs: OpenVSwitch) -> None:
    require("root", "tun", "ip")
    taps = open_taps(netns)
    ovs.add_bridge("br-int")
    for tap in taps:
        plug(netns, port_of(tap.name, "br-int", kind="openvswitch", ovsdb=ovs.db))
    assert {cell for _, cell in rows().values()} == {"does not pass"}
    assert passing(*taps) == set()
    (line,) = commands("ovs-vsctl set bridge br-int")
    ovs.vsctl(*line[1:])
    assert passing(*taps, *LAST) == set(LAST)
    for tap in taps:
        unplug(netns, tap.name)
    ovs.vsctl("del-br", "br-int")
