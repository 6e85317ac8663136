"""Starts macvtaps in a blast of frames that their guest must neither see nor send: by hand.

    .venv/bin/python3 tests/lab/blast.py [STARTS]       as root; 500 of them take about a minute

Ends with 1 if a foreign frame was seen by a guest, or one of a hostile guest's on the wire.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("tests", "conf", "ifup", "ifdown", "ifctl", "ifd")]

from lab.macvtap import FOREIGN, OWN, Macvtap, given, tag  # noqa: E402
from lab.netns import Namespace  # noqa: E402
from lab.taps import BROADCAST  # noqa: E402

POLICY = f"""version: 1
networks: {{dmz: {{parent: v0}}}}
vms:
  web1: {{nics: [{{network: dmz, mac: "{OWN.hex(":")}"}}]}}
"""
OTHER = bytes.fromhex("020000000077")
ETH_P_ALL = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
"""linux/if_packet.h."""
LISTEN = 0.01
"""Seconds that each guest listens."""


def frame(destination: bytes, source: bytes, said: bytes, tags: bytes = b"") -> bytes:
    """Return an Ethernet frame of the least length, of an EtherType for experiments."""
    return (destination + source + tags + b"\x88\xb5" + said).ljust(60, b"\0")


FOREIGN_FRAMES = [
    frame(OWN, OTHER, b"FOREIGN", tag(20)),
    frame(BROADCAST, OTHER, b"FOREIGN", tag(20)),
    frame(BROADCAST, OTHER, b"FOREIGN", tag(0) + tag(20)),
    frame(BROADCAST, OTHER, b"FOREIGN", tag(20, 0x88A8)),
    frame(FOREIGN, OTHER, b"FOREIGN"),
]
HOSTILE_FRAMES = [
    frame(BROADCAST, OWN, b"HOSTILE", tag(20)),
    frame(BROADCAST, OWN, b"HOSTILE", tag(0) + tag(20)),
    frame(BROADCAST, FOREIGN, b"HOSTILE"),
]


@dataclass
class Count:
    """What was seen in all the starts, and the seconds of each."""

    foreign: int = 0
    good: int = 0
    hostile: int = 0
    sent: int = 0
    times: list[float] = field(default_factory=list)


def blast() -> None:
    """Send for ever, as a neighbour in the parent's segment."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as link:
        link.bind(("v1", 0))
        while True:
            for each in (*FOREIGN_FRAMES * 10, frame(BROADCAST, OTHER, b"GOOD")):
                with suppress(OSError):
                    link.send(each)


def hear(guest: Macvtap, count: Count) -> None:
    """Take what comes to a guest for a moment."""
    end = time.monotonic() + LISTEN
    while (left := end - time.monotonic()) > 0:
        if select.select([guest.fd], [], [], left)[0]:
            told = os.read(guest.fd, 2048)
            count.foreign += b"FOREIGN" in told
            count.good += b"GOOD" in told


def drain(wire: socket.socket, count: Count) -> None:
    """Take what has come out of the parent."""
    while select.select([wire], [], [], 0)[0]:
        told = wire.recv(2048)
        count.hostile += b"HOSTILE" in told
        count.sent += b"MINE" in told


def run(starts: int) -> Count:
    """Start so many macvtaps, one after the other."""
    count = Count()
    with Namespace() as namespace:
        namespace.ip("link", "add", "v0", "up", "type", "veth", "peer", "name", "v1")
        namespace.ip("link", "set", "v1", "up")
        namespace.ip("link", "set", "v0", "promisc", "on")
        with namespace.enter():
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            wire.bind(("v1", 0))
            wire.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            blaster = os.fork()
            if blaster == 0:
                blast()
        try:
            for _ in range(starts):
                began = time.monotonic()
                with given(namespace, POLICY, "web1-0") as taps:
                    count.times.append(time.monotonic() - began)
                    guest = taps["web1-0"]
                    for each in (*HOSTILE_FRAMES, frame(BROADCAST, OWN, b"MINE")):
                        guest.send(each)
                    hear(guest, count)
                    drain(wire, count)
        finally:
            os.kill(blaster, signal.SIGKILL)
            os.waitpid(blaster, 0)
            wire.close()
    return count


def main() -> int:
    """Run it, and say what was seen."""
    starts = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    count = run(starts)
    print(
        f"{starts} starts, each {statistics.median(count.times) * 1000:.0f} ms: a guest saw "
        f"{count.foreign} foreign and {count.good} good frames, the wire {count.hostile} hostile "
        f"and {count.sent} good ones"
    )
    return 1 if count.foreign or count.hostile else 0


if __name__ == "__main__":
    sys.exit(main())
