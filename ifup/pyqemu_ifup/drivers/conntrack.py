"""Has the kernel forget flows that it tracks, over nfnetlink (linux/netfilter/nfnetlink*.h)."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.netlink import (
    NETLINK_NETFILTER,
    NFGENMSG,
    NLM_F_ACK,
    NLM_F_DUMP,
    RTATTR,
    NetlinkSocket,
    attribute,
    attributes,
    bodies,
    reads_message,
)
from pyqemu_ifup.task import pause

CT_GET, CT_DELETE = 0x101, 0x102
"""NFNL_SUBSYS_CTNETLINK << 8, and IPCTNL_MSG_CT_GET or _DELETE."""
NESTED = 0x8000
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ZONE = 1, 2, 18
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_SRC: dict[int, int] = {socket.AF_INET: 1, socket.AF_INET6: 3}
"""CTA_IP_V4_SRC, CTA_IP_V6_SRC; that of the destination is one more."""
CTA_PROTO_NUM, CTA_PROTO_DST_PORT = 1, 3


def _layout(size: int, source: int) -> tuple[struct.Struct, tuple[bytes, bytes]]:
    """Return how a tuple begins: its length, type, and addresses of `size` bytes.

    And what stands before each of them.
    """
    each = RTATTR.size + size
    both = RTATTR.pack(RTATTR.size + 2 * each, CTA_TUPLE_IP | NESTED)
    heads = both + RTATTR.pack(each, source), RTATTR.pack(each, source + 1)
    return struct.Struct(f"HH{len(heads[0])}s{size}s{len(heads[1])}s{size}s"), heads


LAYOUTS: dict[int, tuple[struct.Struct, tuple[bytes, bytes]]] = {
    socket.AF_INET: _layout(4, CTA_IP_SRC[socket.AF_INET]),
    socket.AF_INET6: _layout(16, CTA_IP_SRC[socket.AF_INET6]),
}


class Flow(NamedTuple):
    """Packets that the kernel tracks: from where they are sent to where, and the way back.

    Addresses are those of packets, 4 or 16 bytes. Another than `destination` answers where a rule
    leads them there, and to another than `source` where a rule has changed that. `told` is the
    kernel's whole message.
    """

    source: bytes
    destination: bytes
    answers: bytes
    answered: bytes
    told: bytes

    @property
    @reads_message
    def protocol(self) -> tuple[int, int]:
        """IP's number of the protocol, and the port where they are sent to, 0 without ports."""
        begun = attributes(attributes(self.told[NFGENMSG.size :])[CTA_TUPLE_ORIG])
        found = attributes(begun[CTA_TUPLE_PROTO])
        return found[CTA_PROTO_NUM][0], int.from_bytes(found.get(CTA_PROTO_DST_PORT, b""), "big")


async def forget_flows(which: Callable[[Flow], bool], deadline: Deadline) -> bool:
    """Have the kernel forget those flows: their next packet is a first one.

    Returns whether all were looked at by the deadline: anybody who sends can have as many as the
    kernel tracks. A kernel without connection tracking has none. Raises OSError.
    """
    try:
        dump = NetlinkSocket(NETLINK_NETFILTER)
    except OSError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
        return True
    with dump, NetlinkSocket(NETLINK_NETFILTER) as kernel:
        for data in dump.packets(CT_GET, NLM_F_DUMP, NFGENMSG.pack(socket.AF_UNSPEC, 0, 0)):
            for body in bodies(data):
                _forget(kernel, body, which)
            if not deadline.remaining():
                return False
            await pause(0.0)
    return True


@reads_message
def _forget(kernel: NetlinkSocket, told: bytes, which: Callable[[Flow], bool]) -> None:
    family = told[0]
    if family not in CTA_IP_SRC or not which(parse_flow(told)):
        return
    found = attributes(told[NFGENMSG.size :])
    body = NFGENMSG.pack(family, 0, 0)
    body += attribute(CTA_TUPLE_ORIG | NESTED, found[CTA_TUPLE_ORIG])
    if CTA_ZONE in found:
        body += attribute(CTA_ZONE, found[CTA_ZONE])
    try:
        kernel.ask(CT_DELETE, NLM_F_ACK, body)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


@reads_message
def parse_flow(told: bytes) -> Flow:
    """Return the flow of a message of the kernel's, of IPv4 or IPv6."""
    # NOTE: a host tracks some 100,000, and the kernel writes both tuples first, and their addresses
    # first of all (ctnetlink_fill_info); else each attribute is looked for.
    family = told[0]
    layout, heads = LAYOUTS[family]
    length, begun, a, source, b, destination = layout.unpack_from(told, NFGENMSG.size)
    _, answer, c, answers, d, answered = layout.unpack_from(told, NFGENMSG.size + length)
    usual = (begun, answer) == (CTA_TUPLE_ORIG | NESTED, CTA_TUPLE_REPLY | NESTED)
    if usual and (a, b) == (c, d) == heads:
        return Flow(source, destination, answers, answered, told)
    found, at = attributes(told[NFGENMSG.size :]), CTA_IP_SRC[family]
    there, back = (
        attributes(attributes(found[kind])[CTA_TUPLE_IP])
        for kind in (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY)
    )
    return Flow(there[at], there[at + 1], back[at], back[at + 1], told)
