"""A network with NAT whose guest is a tap of the test's: frames in, and what comes out."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lab.agent import Agent
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.taps import BROADCAST, FRAME_MAX, Raw, Tap, mac
from pyqemu_ifup.made.names import bridge_mac

GUEST, GATEWAY, SUBNET = "192.168.76.10", "192.168.76.1", "192.168.76."
GUEST6, GATEWAY6, SUBNET6 = "fd00:76::10", "fd00:76::1", "fd00:76:"
PUBLIC, OUTSIDE = "203.0.113.1", "203.0.113.2"
PUBLIC6, OUTSIDE6 = "2001:db8::1", "2001:db8::2"
MAC = mac(10)
TABLE = "pyqemu-ifup-lab"
LINGER = 0.3
"""Seconds in which what is let through has arrived; a beacon that is let through is waited for."""
PATIENCE = 20.0


class NatSite:
    """A host with an uplink to `outside`, a policy with the network `lab`, and a guest's tap."""

    def __init__(
        self, netns: Namespace, outside: Namespace, folder: Path, nat: dict[str, Any]
    ) -> None:
        self.netns, self.outside = netns, outside
        self.hooks = Hooks(folder / "hooks", netns.name)
        self.write_policy(nat)
        name = outside.name
        netns.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", name)
        for place, address, address6 in ((netns, PUBLIC, PUBLIC6), (outside, OUTSIDE, OUTSIDE6)):
            place.ip("address", "add", f"{address}/24", "dev", "eth0")
            place.ip("address", "add", f"{address6}/64", "dev", "eth0", "nodad")
            place.ip("link", "set", "eth0", "up")
        netns.ip("route", "add", "default", "via", OUTSIDE)
        netns.ip("route", "add", "default", "via", OUTSIDE6)
        # NOTE: whoever is outside and knows the way in; what keeps him out is ours.
        outside.ip("route", "add", "192.168.0.0/16", "via", PUBLIC)
        outside.ip("route", "add", "fd00::/16", "via", PUBLIC6)
        self.uplink = outside.raw("eth0")

    def write_policy(self, nat: dict[str, Any], **networks: Any) -> None:
        """Put a policy in force whose network `lab` has this `nat:`."""
        lab = {"bridge": "labbr0", "nat": {
            "ipv4": f"{GATEWAY}/24", "ipv6": f"{GATEWAY6}/64", "dhcp": False, "dns": False, **nat,
        }}  # fmt: skip
        rules = [{"tap": f"{name}*", "network": name} for name in networks]
        self.hooks.write_policy(json.dumps({
            # NOTE: on a busy machine the libraries alone may take most of 10 s to be read.
            "version": 1, "timeout": 30, "networks": {"lab": lab, **networks},
            "rules": [*rules, {"tap": "*", "network": "lab"}],
        }))  # fmt: skip

    def serve(self, agent: Agent) -> None:
        """Let the hooks ask this agent."""
        self.hooks.agent, self.hooks.agent_pid = agent.path, agent.pid

    def up(self, tap: str = "web0") -> Tap:
        """Return a tap that the hook has attached, known to the host as that of `GUEST`."""
        found = self.netns.tap(tap)
        done = self.hooks.up(tap)
        assert (done.returncode, done.stderr) == (0, ""), done
        lladdr = MAC.hex(":")
        for address in (GUEST, GUEST6):
            self.netns.ip("neigh", "replace", address, "lladdr", lladdr, "dev", "labbr0")
        return found

    def close(self, *taps: str) -> None:
        """Take the taps down."""
        for tap in taps or ("web0",):
            assert self.hooks.down(tap).returncode == 0

    @staticmethod
    def frame(packet: Any, *tags: tuple[int, int], broadcast: bool = False) -> bytes:
        """Return a guest's frame to the gateway, or to all, with this packet of scapy's.

        Each of `tags` is EtherType and TCI, the outermost first.
        """
        from scapy.layers.inet6 import IPv6

        data = bytes(packet)
        kind = 0x86DD if isinstance(packet, IPv6) else 0x0800
        to = BROADCAST if broadcast else bytes.fromhex(bridge_mac("lab").replace(":", ""))
        head = to + MAC
        for ethertype, tci in tags:
            head += ethertype.to_bytes(2, "big") + tci.to_bytes(2, "big")
        return (head + kind.to_bytes(2, "big") + data).ljust(60, b"\0")

    def table(self) -> str:
        """Return the network's table, "" where there is none."""
        words = ["nft", "-s", "list", "table", "inet", TABLE]
        return self.netns.run(words, check=False).stdout

    def wait_table(self, wanted: str, seconds: float) -> float:
        """Return after how many seconds the table is as it was. Raises AssertionError."""
        begun = time.monotonic()
        while self.table() != wanted:
            assert time.monotonic() - begun < seconds, self.table()
            time.sleep(0.02)
        return time.monotonic() - begun


def drain(raw: Raw | Tap) -> list[bytes]:
    """Return the frames that have come and that nobody has taken yet."""
    found = []
    fd = raw.fd if isinstance(raw, Tap) else raw.socket.fileno()
    while select.select([fd], [], [], 0)[0]:
        found.append(os.read(fd, FRAME_MAX))
    return found


def seen(raw: Raw, beacon: bytes) -> list[bytes]:
    """Return the frames that have come before the one that holds `beacon`. Raises AssertionError.

    Frames of one sender keep their order, so that what was sent before and is not there was lost.
    """
    found: list[bytes] = []
    end = time.monotonic() + PATIENCE
    while not any(beacon in frame for frame in found):
        assert time.monotonic() < end, "the beacon does not come"
        select.select([raw.socket], [], [], 1.0)
        found += drain(raw)
    return found


class Listener:
    """A UDP and a TCP socket of the host's at an address; a context manager."""

    def __init__(self, place: Namespace, address: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with place.enter():
            self.udp = socket.socket(family, socket.SOCK_DGRAM)
            self.tcp = socket.socket(family, socket.SOCK_STREAM)
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for each in (self.udp, self.tcp):
            each.setblocking(False)
            each.bind((address, port))
        self.tcp.listen(64)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.udp.close()
        self.tcp.close()

    def wait(self) -> bytes:
        """Return the first datagram that has come, or that comes soon. Raises AssertionError."""
        ready, _, _ = select.select([self.udp], [], [], PATIENCE)
        assert ready, "nothing comes"
        return self.udp.recv(FRAME_MAX)

    def heard(self) -> list[bytes]:
        """Return the datagrams that have come."""
        found = []
        while True:
            try:
                found.append(self.udp.recv(FRAME_MAX))
            except BlockingIOError:
                return found


def is_source(frame: bytes, subnets: Iterable[str]) -> bool:
    """Tell whether an untagged frame is of IP, and its source begins as one of `subnets`."""
    kind = frame[12:14]
    if kind == b"\x08\x00":
        source = socket.inet_ntop(socket.AF_INET, frame[26:30])
    elif kind == b"\x86\xdd":
        source = socket.inet_ntop(socket.AF_INET6, frame[22:38])
    else:
        return False
    return any(source.startswith(each) for each in subnets)
