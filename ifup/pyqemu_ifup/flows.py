"""Has the kernel forget flows that it tracks, over nfnetlink (linux/netfilter/nfnetlink*.h)."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from pyqemu_ifup.links import NLM_F_ACK, NLM_F_DUMP, attribute, attributes
from pyqemu_ifup.manners import Watch
from pyqemu_ifup.netlink_socket import NetlinkSocket
from pyqemu_ifup.work import Work

NETLINK_NETFILTER = 12
CT_GET, CT_DELETE = 0x101, 0x102
"""NFNL_SUBSYS_CTNETLINK << 8, and IPCTNL_MSG_CT_GET or _DELETE."""
NFGENMSG = struct.Struct("BBH")
NESTED = 0x8000
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ZONE = 1, 2, 18
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_SRC: dict[int, int] = {socket.AF_INET: 1, socket.AF_INET6: 3}
"""CTA_IP_V4_SRC, CTA_IP_V6_SRC; that of the destination is one more."""
CTA_PROTO_NUM, CTA_PROTO_DST_PORT = 1, 3


class Flow(NamedTuple):
    """Packets that the kernel tracks: from where they are sent to where, and the way back.

    Addresses are those of packets, 4 or 16 bytes. Another than `destination` answers where a rule
    leads them there, and to another than `source` where a rule has changed that.
    """

    source: bytes
    destination: bytes
    answers: bytes
    answered: bytes
    protocol_data: bytes

    @property
    def protocol(self) -> tuple[int, int]:
        """IP's number of the protocol, and the port where they are sent to, 0 without ports."""
        found = attributes(self.protocol_data)
        return found[CTA_PROTO_NUM][0], int.from_bytes(found.get(CTA_PROTO_DST_PORT, b""), "big")


def forgetting(which: Callable[[Flow], bool], watch: Watch) -> Work[bool]:
    """Have the kernel forget those flows: their next packet is a first one.

    Returns whether all were looked at within `watch`: anybody who sends can have as many as the
    kernel tracks. A kernel without connection tracking has none. Raises OSError.
    """
    try:
        dump = NetlinkSocket(NETLINK_NETFILTER)
    except OSError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
        return True
    with dump, NetlinkSocket(NETLINK_NETFILTER) as kernel:
        for told in dump.asking(CT_GET, NLM_F_DUMP, NFGENMSG.pack(socket.AF_UNSPEC, 0, 0)):
            for body in told:
                _forget(kernel, body, which)
            if not watch.remaining():
                return False
            yield 0.0
    return True


def _forget(kernel: NetlinkSocket, told: bytes, which: Callable[[Flow], bool]) -> None:
    family = told[0]
    found = attributes(told[NFGENMSG.size :])
    if family not in CTA_IP_SRC or not which(_flow(CTA_IP_SRC[family], found)):
        return
    body = NFGENMSG.pack(family, 0, 0)
    body += attribute(CTA_TUPLE_ORIG | NESTED, found[CTA_TUPLE_ORIG])
    if CTA_ZONE in found:
        body += attribute(CTA_ZONE, found[CTA_ZONE])
    try:
        kernel.ask(CT_DELETE, NLM_F_ACK, body)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _flow(at: int, found: dict[int, bytes]) -> Flow:
    begun, answer = attributes(found[CTA_TUPLE_ORIG]), attributes(found[CTA_TUPLE_REPLY])
    there, back = attributes(begun[CTA_TUPLE_IP]), attributes(answer[CTA_TUPLE_IP])
    return Flow(there[at], there[at + 1], back[at], back[at + 1], begun[CTA_TUPLE_PROTO])
