"""Reads links over rtnetlink(7): one, all, and what happens to them; and sends their changes.

NOTE: pyroute2 makes the messages that change them; it does not do the reading, because an up looks
ten times, and a look through the library takes ten times as long. Messages: linux/if_link.h,
linux/rtnetlink.h, linux/if_addr.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pyqemu_ifup.drivers.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    S32,
    NetlinkSocket,
    Subscription,
    attribute,
    attributes,
    attributes_between,
    each_attribute,
    messages,
    reads_message,
)
from pyqemu_ifup.look import Counters, Link
from pyqemu_ifup.mark import ALIAS_MARK

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTMGRP_LINK = 1
IFINFOMSG = struct.Struct("BxHiII")
U8, U16, U32 = struct.Struct("B"), struct.Struct("H"), struct.Struct("I")
BE16 = struct.Struct(">H")
STATS64 = struct.Struct("8Q")
"""The first of rtnl_link_stats64 (linux/if_link.h): packets, bytes, errors, dropped, rx then tx."""
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
IFA_F_NODAD = 0x2

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_TXQLEN = 1, 3, 4, 10, 13
IFLA_LINKINFO, IFLA_IFALIAS, IFLA_STATS64, IFLA_CARRIER = 18, 20, 23, 33
IFLA_AF_SPEC, IFLA_INET6_CONF, IFLA_INET6_ADDR_GEN_MODE = 26, 2, 8
NO_ADDRESS = 1
"""IN6_ADDR_GEN_MODE_NONE (linux/if_link.h): the kernel gives the link no address by itself."""
DEVCONF_DISABLE_IPV6 = 26
"""Which of the numbers of IFLA_INET6_CONF is `disable_ipv6` (linux/ipv6.h)."""
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
IFLA_BR_FORWARD_DELAY, IFLA_BR_STP_STATE, IFLA_BR_VLAN_FILTERING = 1, 5, 7
IFLA_BR_NF_CALL_IPTABLES, IFLA_BR_VLAN_DEFAULT_PVID = 36, 39
IFLA_BRPORT_ISOLATED = 33
IFLA_PROP_LIST, IFLA_ALT_IFNAME = 52, 53
IFLA_LINK, IFLA_LINK_NETNSID, IFLA_VLAN_ID, IFLA_VLAN_FLAGS = 5, 37, 1, 2
IFLA_VLAN_PROTOCOL = 5
VLAN_FLAG_REORDER_HDR = 1
IFLA_GROUP = 27
IFLA_TUN_OWNER, IFLA_TUN_GROUP, IFLA_TUN_TYPE = 1, 2, 3
IFLA_TUN_PERSIST, IFLA_TUN_MULTI_QUEUE = 6, 7
IFLA_TUN_NUM_QUEUES, IFLA_TUN_NUM_DISABLED_QUEUES = 8, 9
IFF_TAP = 2
"""What IFLA_TUN_TYPE says of a tap (linux/if_tun.h)."""

T = TypeVar("T")


class LinkReader:
    """A socket that asks the kernel for links of this network namespace, and to change them."""

    def __init__(self) -> None:
        self._socket = NetlinkSocket(socket.NETLINK_ROUTE)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def by_name(self, name: str) -> Link | None:
        """Return the link that has this name, be it an alternative one; None without one.

        Raises OSError as the kernel answers.
        """
        return self._read_one(0, attribute(IFLA_IFNAME, os.fsencode(name) + b"\0"), _link)

    def by_index(self, index: int) -> Link | None:
        """Return the link with this ifindex, None without one. Raises OSError."""
        return self._read_one(index, b"", _link)

    def counters(self, index: int) -> Counters | None:
        """Return what has passed the link with this ifindex, None without one. Raises OSError."""
        return self._read_one(index, b"", _counters)

    def all(self) -> list[Link]:
        """Return every link. Raises OSError, EBUSY where they never stand still."""
        packets = self._socket.dump(RTM_GETLINK, IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
        return [
            _link(data, body, end)
            for data in packets
            for kind, _, _, body, end in messages(data)
            if kind == RTM_NEWLINK
        ]

    def change(self, body: bytes) -> None:
        """Have a link changed as the body of an RTM_NEWLINK message says. Raises OSError."""
        self._socket.ask(RTM_NEWLINK, NLM_F_ACK, body)

    def add(self, body: bytes) -> None:
        """Have a link made as the body of an RTM_NEWLINK message says. Raises OSError, EEXIST."""
        self._socket.ask(RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body)

    def _read_one(self, index: int, name: bytes, read: Callable[[bytes, int, int], T]) -> T | None:
        body = IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0) + name
        try:
            data = self._socket.ask_one(RTM_GETLINK, body)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return None
        return read(data, 0, len(data))


@dataclass(frozen=True)
class LinkEvent:
    """A link that has come (or changed), or has gone; `kind` as Link has it.

    `idle`: it is up and has no carrier, as a tap that no process holds. `loose`: it is up, has our
    mark and no master.
    """

    gone: bool
    index: int
    name: str
    kind: str | None
    idle: bool = False
    loose: bool = False
    up: bool = False


class LinkEvents(Subscription):
    """A subscription to the links of this network namespace (RTNLGRP_LINK of rtnetlink(7)).

    It reads of each message just what LinkEvent holds: a host that starts guests has thousands.
    """

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE, RTMGRP_LINK)

    def drain(self) -> bool:
        """Tell whether anything has happened since, to a bridge port's settings too."""
        return bool(list(self.packets()))

    def read(self) -> list[LinkEvent] | None:
        """Return what has happened since; None where some of it was lost (ENOBUFS), or is cut."""
        events: list[LinkEvent] = []
        lost = False
        for data in self.packets():
            if data is None:
                lost = True
                continue
            try:
                for kind, _, _, body, end in messages(data):
                    if kind in (RTM_NEWLINK, RTM_DELLINK):
                        events += _events(kind == RTM_DELLINK, data, body, end)
            except OSError:
                lost = True
        return None if lost else events


def _nested(found: dict[int, bytes], kind: int) -> dict[int, bytes]:
    return attributes(found.get(kind, b""))


def _number(form: struct.Struct, found: dict[int, bytes], kind: int) -> int | None:
    data = found.get(kind)
    if data is None:
        return None
    value: int = form.unpack_from(data)[0]
    return value


def _text(found: dict[int, bytes], kind: int) -> str:
    # NOTE: the kernel takes any bytes; those that are not UTF-8 come as surrogate escapes.
    return os.fsdecode(found.get(kind, b"").rstrip(b"\0"))


def _altnames(found: dict[int, bytes]) -> tuple[str, ...]:
    names = found.get(IFLA_PROP_LIST)
    if names is None:
        return ()
    return tuple(
        os.fsdecode(name.rstrip(b"\0"))
        for kind, name in each_attribute(names, 0, len(names))
        if kind == IFLA_ALT_IFNAME
    )


@reads_message
def _counters(data: bytes, body: int, end: int) -> Counters:
    found = attributes_between(data, body + IFINFOMSG.size, end)
    numbers = STATS64.unpack_from(found[IFLA_STATS64])
    return Counters(*numbers[:4], *numbers[6:8])


@reads_message
def _events(gone: bool, data: bytes, body: int, end: int) -> list[LinkEvent]:
    """Return the event of a message about a link; none of one about a bridge's port."""
    if data[body] != socket.AF_UNSPEC:
        return []
    found = attributes_between(data, body + IFINFOMSG.size, end)
    kind = _text(_nested(found, IFLA_LINKINFO), IFLA_INFO_KIND)
    _, _, index, flags, _ = IFINFOMSG.unpack_from(data, body)
    idle = flags & (IFF_UP | IFF_LOWER_UP) == IFF_UP
    up = bool(flags & IFF_UP)
    loose = (
        up
        and IFLA_MASTER not in found
        and (found.get(IFLA_IFALIAS, b"").startswith(ALIAS_MARK.encode()))
    )
    return [LinkEvent(gone, index, _text(found, IFLA_IFNAME), kind or None, idle, loose, up)]


@reads_message
def _link(data: bytes, body: int, end: int) -> Link:
    """Return the Link of an RTM_NEWLINK message."""
    _, _, index, flags, _ = IFINFOMSG.unpack_from(data, body)
    found = attributes_between(data, body + IFINFOMSG.size, end)
    info = _nested(found, IFLA_LINKINFO)
    kind = _text(info, IFLA_INFO_KIND) or None
    data_of_kind = info.get(IFLA_INFO_DATA, b"")
    own = attributes(data_of_kind) if kind in ("bridge", "tun", "vlan") else {}
    bridge = own if kind == "bridge" else {}
    tun = own if kind == "tun" else {}
    ipv6 = _nested(_nested(found, IFLA_AF_SPEC), socket.AF_INET6) if data_of_kind else {}
    on_bridge = _text(info, IFLA_INFO_SLAVE_KIND) == "bridge"
    port = _nested(info, IFLA_INFO_SLAVE_DATA) if on_bridge else {}
    filtering = _number(U8, bridge, IFLA_BR_VLAN_FILTERING)
    isolated = _number(U8, port, IFLA_BRPORT_ISOLATED)
    stp = _number(U32, bridge, IFLA_BR_STP_STATE)
    calls_iptables = _number(U8, bridge, IFLA_BR_NF_CALL_IPTABLES)
    return Link(
        index=index,
        name=_text(found, IFLA_IFNAME),
        kind=kind,
        tap=_number(U8, tun, IFLA_TUN_TYPE) == IFF_TAP,
        up=bool(flags & IFF_UP),
        mtu=_number(U32, found, IFLA_MTU) or 0,
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
        txqueuelen=_number(U32, found, IFLA_TXQLEN) or 0,
        master=_number(U32, found, IFLA_MASTER),
        alias=_text(found, IFLA_IFALIAS),
        carrier=bool(_number(U8, found, IFLA_CARRIER)),
        vlan_filtering=None if filtering is None else bool(filtering),
        default_pvid=_number(U16, bridge, IFLA_BR_VLAN_DEFAULT_PVID),
        isolated=None if isolated is None else bool(isolated),
        owner=_number(U32, tun, IFLA_TUN_OWNER),
        group=_number(U32, tun, IFLA_TUN_GROUP),
        persistent=bool(_number(U8, tun, IFLA_TUN_PERSIST)),
        multi_queue=bool(_number(U8, tun, IFLA_TUN_MULTI_QUEUE)),
        queues=(_number(U32, tun, IFLA_TUN_NUM_QUEUES) or 0)
        + (_number(U32, tun, IFLA_TUN_NUM_DISABLED_QUEUES) or 0),
        stp=None if stp is None else bool(stp),
        forward_delay=_number(U32, bridge, IFLA_BR_FORWARD_DELAY),
        calls_iptables=None if calls_iptables is None else bool(calls_iptables),
        ipv6_disabled=_is_ipv6_disabled(ipv6),
        addrgenmode=_number(U8, ipv6, IFLA_INET6_ADDR_GEN_MODE),
        under=None if IFLA_LINK_NETNSID in found else _number(U32, found, IFLA_LINK),
        vid=_number(U16, own, IFLA_VLAN_ID) if kind == "vlan" else None,
        protocol=_number(BE16, own, IFLA_VLAN_PROTOCOL) if kind == "vlan" else None,
        reorders=_reorders(own) if kind == "vlan" else None,
        altnames=_altnames(found),
        flags=flags,
        group_number=_number(U32, found, IFLA_GROUP) or 0,
        data=data_of_kind if not own else b"",
    )


def _reorders(vlan: dict[int, bytes]) -> bool:
    """Tell whether a VLAN device takes the tag off what it hands on (struct ifla_vlan_flags)."""
    return bool((_number(U32, vlan, IFLA_VLAN_FLAGS) or 0) & VLAN_FLAG_REORDER_HDR)


def _is_ipv6_disabled(ipv6: dict[int, bytes]) -> bool | None:
    """Tell whether IPv6 is off on a link, None where it has none."""
    settings = ipv6.get(IFLA_INET6_CONF)
    if settings is None:
        return None
    (disabled,) = S32.unpack_from(settings, DEVCONF_DISABLE_IPV6 * S32.size)
    return bool(disabled)
