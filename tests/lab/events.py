"""What happened to the links of a namespace, in its order, as the kernel tells it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from lab.netns import Namespace

# linux/rtnetlink.h, linux/if_link.h, linux/if.h
RTMGRP_LINK = 1
RTM_NEWLINK = 16
IFLA_IFNAME, IFLA_MTU, IFLA_MASTER = 3, 4, 10
IFF_UP = 1
HEADER = struct.Struct("=IHHII")
IFINFO = struct.Struct("=BxHiII")
ATTRIBUTE = struct.Struct("=HH")
BUFFER = 1 << 20


@dataclass(frozen=True)
class LinkEvent:
    """A link as it was at one moment; `master` is an ifindex or None."""

    name: str
    up: bool
    mtu: int
    master: int | None


class LinkEvents:
    """All changes of links in the namespace from now on; a context manager."""

    def __init__(self, netns: Namespace) -> None:
        with netns.enter():
            self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self.socket.bind((0, RTMGRP_LINK))
        self.socket.setblocking(False)

    def __enter__(self) -> LinkEvents:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def of(self, name: str) -> list[LinkEvent]:
        """Return what has happened to the link `name` since the last call, the earliest first."""
        found: list[LinkEvent] = []
        while True:
            try:
                data = self.socket.recv(BUFFER)
            except BlockingIOError:
                return found
            found += [event for event in _parse(data) if event.name == name]


def _parse(data: bytes) -> Iterator[LinkEvent]:
    """Yield the RTM_NEWLINK messages of one datagram, but those about a bridge's own ports."""
    at = 0
    while at < len(data):
        length, kind, _flags, _seq, _pid = HEADER.unpack_from(data, at)
        family, _type, _index, flags, _change = IFINFO.unpack_from(data, at + HEADER.size)
        if kind == RTM_NEWLINK and family == socket.AF_UNSPEC:
            attributes = dict(_attributes(data[at + HEADER.size + IFINFO.size : at + length]))
            master = attributes.get(IFLA_MASTER)
            yield LinkEvent(
                os.fsdecode(attributes[IFLA_IFNAME].rstrip(b"\0")),
                bool(flags & IFF_UP),
                struct.unpack("=I", attributes[IFLA_MTU])[0],
                None if master is None else struct.unpack("=I", master)[0],
            )
        at += length + 3 & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, at)
        yield kind & 0x3FFF, data[at + ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
