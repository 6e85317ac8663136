"""Questions to a name server, and guests that put them: namespaces on a bridge."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lab.netns import Namespace

ANSWERED, REFUSED = 0, 5
"""RFC 1035, 4.1.1: RCODE."""


@contextmanager
def guest(host: Namespace, bridge: str, ipv4: str, ipv6: str = "") -> Iterator[Namespace]:
    """Yield a namespace with a card on the bridge, these ADDRESS/LENGTH, and the first as router.

    It stands for a guest, or for a neighbour where `bridge` is "": then `PUBLIC` is the host's.
    """
    with Namespace() as place:
        port = f"p{place.inode}"
        host.ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", place.name)
        try:
            if bridge:
                host.ip("link", "set", port, "master", bridge)
            place.ip("link", "set", "eth0", "up")
            host.ip("link", "set", port, "up")
            for address in filter(None, (ipv4, ipv6)):
                stem, _, length = address.rpartition("/")
                gateway = stem[: stem.rindex(":" if ":" in stem else ".") + 1] + "1"
                if not bridge:
                    host.ip("address", "add", f"{gateway}/{length}", "dev", port, *_nodad(gateway))
                place.ip("address", "add", address, "dev", "eth0", *_nodad(stem))
                place.ip("route", "add", "default", "via", gateway)
            yield place
        finally:
            host.ip("link", "del", port)


def _nodad(address: str) -> list[str]:
    return ["nodad"] if ":" in address else []


def question(name: str) -> bytes:
    """Return the question for the A record of a name (RFC 1035, 4.1)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">6H", 0x1234, 0x0100, 1, 0, 0, 0) + labels + struct.pack(">B2H", 0, 1, 1)


def ask(place: Namespace, server: str, name: str, *, tcp: bool, wait: float = 10.0) -> int | None:
    """Return the RCODE of the answer to a question from `place`, None where there is no answer."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with place.enter():
        asker = socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    text, said = question(name), b""
    with asker, suppress(TimeoutError, ConnectionError, OSError):
        asker.settimeout(wait)
        asker.connect((server, 53))
        asker.send(struct.pack(">H", len(text)) + text if tcp else text)
        said = asker.recv(4096)
        if tcp and len(said) == 2:
            said += asker.recv(4096)
    said = said[2:] if tcp else said
    return said[3] & 15 if said[:2] == text[:2] and len(said) > 3 else None


def servers(place: Namespace) -> list[int]:
    """Return the dnsmasqs that run there, without those that they have for TCP connections."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # NOTE: the name of any process on this host may be of any bytes.
            fields = (process / "stat").read_bytes().rpartition(b")")[2].decode().split()
            if (process / "comm").read_bytes() != b"dnsmasq\n" or fields[0] in "ZX":
                continue
            if (process / "ns" / "net").stat().st_ino == place.inode:
                found[int(process.name)] = int(fields[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [pid for pid, parent in found.items() if parent not in found]


def discover(place: Namespace, *, wait: float = 10.0) -> bool:
    """Ask for an address by the card eth0 (RFC 2131); tell whether one is offered."""
    mac = bytes.fromhex("5254000000fe")
    text = struct.pack(">4BI2H", 1, 1, 6, 0, 0x1234, 0, 0x8000) + bytes(16) + mac
    text += bytes(10 + 192) + bytes([99, 130, 83, 99, 53, 1, 1, 255])
    with place.enter():
        asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with asker, suppress(TimeoutError):
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        asker.bind(("", 68))
        asker.settimeout(wait)
        asker.sendto(text, ("255.255.255.255", 67))
        return asker.recv(4096)[:8] == struct.pack(">4BI", 2, 1, 6, 0, 0x1234)
    return False


@contextmanager
def flood(place: Namespace, server: str, number: int) -> Iterator[None]:
    """Hold so many TCP connections from `place` to port 53, as far as they come to be."""
    with ExitStack() as stack:
        for _ in range(number):
            with place.enter():
                each = stack.enter_context(socket.socket())
            each.setblocking(False)
            each.connect_ex((server, 53))
        yield


def family(pid: int) -> list[int]:
    """Return the processes of a dnsmasq: itself, and one for each TCP connection."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
