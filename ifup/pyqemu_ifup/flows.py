"""Has the kernel forget flows that it tracks, over nfnetlink (linux/netfilter/nfnetlink*.h)."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable

from pyqemu_ifup.links import NLM_F_ACK, NLM_F_DUMP, attribute, attributes
from pyqemu_ifup.look import Flow
from pyqemu_ifup.netlink_socket import NetlinkSocket

NETLINK_NETFILTER = 12
CT_GET, CT_DELETE = 0x101, 0x102
"""NFNL_SUBSYS_CTNETLINK << 8, and IPCTNL_MSG_CT_GET or _DELETE."""
NFGENMSG = struct.Struct("BBH")
NESTED = 0x8000
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ZONE = 1, 2, 18
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_SRC = {socket.AF_INET: 1, socket.AF_INET6: 3}
"""CTA_IP_V4_SRC, CTA_IP_V6_SRC; that of the destination is one more."""
CTA_PROTO_NUM, CTA_PROTO_DST_PORT = 1, 3


def forget_flows(which: Callable[[Flow], bool]) -> None:
    """Have the kernel forget those flows: their next packet is a first one.

    A kernel without connection tracking has none. Raises OSError.
    """
    try:
        kernel = NetlinkSocket(NETLINK_NETFILTER)
    except OSError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
        return
    with kernel:
        for told in kernel.ask(CT_GET, NLM_F_DUMP, NFGENMSG.pack(socket.AF_UNSPEC, 0, 0)):
            family = told[0]
            found = attributes(told[NFGENMSG.size :])
            if family not in CTA_IP_SRC or not which(_flow(family, found)):
                continue
            body = NFGENMSG.pack(family, 0, 0)
            body += attribute(CTA_TUPLE_ORIG | NESTED, found[CTA_TUPLE_ORIG])
            if CTA_ZONE in found:
                body += attribute(CTA_ZONE, found[CTA_ZONE])
            try:
                kernel.ask(CT_DELETE, NLM_F_ACK, body)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise


def _flow(family: int, found: dict[int, bytes]) -> Flow:
    ends = []
    for kind in (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY):
        addresses = attributes(attributes(found[kind])[CTA_TUPLE_IP])
        ends += [
            socket.inet_ntop(family, addresses[CTA_IP_SRC[socket.AddressFamily(family)] + at])
            for at in (0, 1)
        ]
    protocol = attributes(attributes(found[CTA_TUPLE_ORIG])[CTA_TUPLE_PROTO])
    return Flow(
        protocol[CTA_PROTO_NUM][0], ends[0], ends[1],
        int.from_bytes(protocol.get(CTA_PROTO_DST_PORT, b""), "big"), ends[2], ends[3],
    )
