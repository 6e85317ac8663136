"""Keeps a bridge's guests from this host's loopback addresses, whatever becomes of its nft table.

With `route_localnet` a frame that is sent to 127.0.0.0/8 would reach the services there. A classic
BPF program at the bridge's ingress (tc-bpf(8)) drops it as it comes from the wire. What answers a
forward from 127.0.0.1 is led there behind it; or before it, by br_netfilter, and then our table has
marked it. Messages: linux/rtnetlink.h, linux/pkt_cls.h, linux/pkt_sched.h.
"""

from __future__ import annotations

import errno
import socket
import struct

from pyqemu_ifup.drivers.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NetlinkSocket,
    attribute,
    attributes,
)

RTM_NEWQDISC, RTM_NEWTFILTER, RTM_GETTFILTER = 36, 44, 46
TCMSG = struct.Struct("BxxxiIII")
TC_H_CLSACT, INGRESS = 0xFFFFFFF1, 0xFFFFFFF2
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_BPF_OPS_LEN, TCA_BPF_OPS, TCA_BPF_NAME, TCA_BPF_FLAGS = 4, 5, 7, 8
DIRECT = 1
"""TCA_BPF_FLAG_ACT_DIRECT: what the program returns is done."""
FIRST, ANY = 1, 0x0300
"""The first place in line, and ETH_P_ALL in the network's byte order."""

LED = 0x7F7F
"""The mark of a packet that our table knows to be led to a loopback address."""
PROTOCOL, MARK, TO = 0xFFFFF000, 0xFFFFF014, 0xFFF00010
"""SKF_AD_OFF + SKF_AD_PROTOCOL or SKF_AD_MARK; SKF_NET_OFF + 16: the first byte of where IPv4 leads
(linux/filter.h)."""
LDW, LDH, LDB, JEQ, RET = 0x20, 0x28, 0x30, 0x15, 0x06
PROGRAM = (
    (LDH, 0, 0, PROTOCOL),
    # NOTE: a tag of VLAN 0 behind another is taken off only after this program has run.
    (JEQ, 6, 0, 0x8100),
    (JEQ, 5, 0, 0x88A8),
    (JEQ, 0, 5, 0x0800),
    (LDB, 0, 0, TO),
    (JEQ, 0, 3, 127),
    (LDW, 0, 0, MARK),
    (JEQ, 1, 0, LED),
    (RET, 0, 0, 2),  # TC_ACT_SHOT
    (RET, 0, 0, 0xFFFFFFFF),  # TC_ACT_UNSPEC
)
BYTECODE = f"{len(PROGRAM)}," + ",".join(" ".join(map(str, each)) for each in PROGRAM)
"""The program as tc-bpf(8) takes it."""
_OPS = b"".join(struct.pack("HBBI", *each) for each in PROGRAM)


def shut(index: int) -> None:
    """Have the bridge with this ifindex drop what comes for a loopback address.

    Raises OSError: ENOENT or EOPNOTSUPP where the kernel lacks a part of it, EPERM.
    """
    if is_shut(index):
        return
    create = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    with NetlinkSocket(socket.NETLINK_ROUTE) as kernel:
        try:
            body = TCMSG.pack(socket.AF_UNSPEC, index, 0xFFFF0000, TC_H_CLSACT, 0)
            kernel.ask(RTM_NEWQDISC, create, body + attribute(TCA_KIND, b"clsact\0"))
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        body = TCMSG.pack(socket.AF_UNSPEC, index, 0, INGRESS, FIRST << 16 | ANY)
        options = b"".join(
            (
                attribute(TCA_BPF_OPS_LEN, struct.pack("H", len(PROGRAM))),
                attribute(TCA_BPF_OPS, _OPS),
                attribute(TCA_BPF_FLAGS, struct.pack("I", DIRECT)),
            )
        )
        kernel.ask(
            RTM_NEWTFILTER,
            create,
            body + attribute(TCA_KIND, b"bpf\0") + attribute(TCA_OPTIONS, options),
        )


def is_shut(index: int) -> bool:
    """Tell whether the bridge with this ifindex drops what comes for a loopback address."""
    body = TCMSG.pack(socket.AF_UNSPEC, index, 0, INGRESS, 0)
    with NetlinkSocket(socket.NETLINK_ROUTE) as kernel:
        for found in kernel.ask(RTM_GETTFILTER, NLM_F_DUMP, body):
            options = attributes(attributes(found[TCMSG.size :]).get(TCA_OPTIONS, b""))
            if options.get(TCA_BPF_OPS) == _OPS and options.get(TCA_BPF_FLAGS) == b"\1\0\0\0":
                return True
    return False
