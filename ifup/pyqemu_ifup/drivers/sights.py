"""Addresses and routes, as pyroute2's messages tell them, and what of each no command would move.

linux/if_addr.h, linux/rtnetlink.h. What is not known to be plain is odd.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any, Literal

from pyqemu_ifup.drivers.links import IFA_F_NODAD
from pyqemu_ifup.on_port import MAIN, Address, Route

IFA_F_PERMANENT, IFA_F_NOPREFIXROUTE = 0x80, 0x200
_PLAIN_FLAGS = 0x1 | IFA_F_NODAD | 0x40 | IFA_F_PERMANENT
"""Beside those: IFA_F_SECONDARY, which is its order, and IFA_F_TENTATIVE, which passes."""
FOREVER = 2**32 - 1
RTN_UNICAST, RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 1, 0, 253
RTPROT_KERNEL, RTPROT_BOOT, RTPROT_STATIC = 2, 3, 4
_PROTOCOLS = {9: "ra", 16: "dhcp"}
"""Who makes routes that a person does not, as ip(8) calls them."""
RTM_F_CLONED, RTNH_F_ONLINK = 0x200, 0x4
IP6_RT_PRIO_USER = 1024
"""The metric that the kernel gives a route of IPv6 for which none is named."""
_MORE = ("RTA_SRC", "RTA_METRICS", "RTA_VIA", "RTA_ENCAP", "RTA_NH_ID", "RTA_FLOW", "RTA_PREFSRC")
"""What a plain route has none of."""


def read_address(message: Any, link: str) -> Address:
    """Return the Address of an RTM_NEWADDR message, of the link of this name."""
    # NOTE: with a peer, IFA_ADDRESS is the peer's, and of its network (linux/if_addr.h).
    whole, length = message.get_attr("IFA_ADDRESS"), message["prefixlen"]
    host = message.get_attr("IFA_LOCAL") or whole
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    broadcast = message.get_attr("IFA_BROADCAST")
    options: tuple[str, ...] = ("brd", broadcast) if broadcast else ()
    if message["family"] == socket.AF_INET6 and flags & IFA_F_NODAD:
        options = ("nodad",)
    return Address(
        message["index"],
        f"{host}/{length}",
        f"{whole}/{length}" if whole != host else "",
        options,
        _what_is_odd(message, flags, link),
    )


def _what_is_odd(message: Any, flags: int, link: str) -> str:
    ipv4 = message["family"] == socket.AF_INET
    life = message.get_attr("IFA_CACHEINFO") or {}
    if not flags & IFA_F_PERMANENT or any(
        life.get(key, FOREVER) != FOREVER for key in ("ifa_preferred", "ifa_valid")
    ):
        return "has an end, as a DHCP client's or an advertised one"
    if flags & IFA_F_NOPREFIXROUTE:
        return "is without its route (noprefixroute), as NetworkManager's"
    if flags & ~_PLAIN_FLAGS:
        return f"has the flags {flags:#x}"
    if ipv4 and message.get_attr("IFA_LABEL") not in (None, link):
        return "has a label"
    if ipv4 and message["scope"] != RT_SCOPE_UNIVERSE:
        return f"has the scope {message['scope']}"
    if message.get_attr("IFA_RT_PRIORITY"):
        return "has a metric"
    return ""


def read_route(message: Any) -> Iterator[Route]:
    """Yield the Route of an RTM_NEWROUTE message, one for each link that it leads out by."""
    if message["flags"] & RTM_F_CLONED:
        return
    to, router = message.get_attr("RTA_DST"), message.get_attr("RTA_GATEWAY")
    version: Literal[4, 6] = 4 if message["family"] == socket.AF_INET else 6
    metric = message.get_attr("RTA_PRIORITY") or 0
    table = message.get_attr("RTA_TABLE") or message["table"]
    several = message.get_attr("RTA_MULTIPATH") or ()
    out = message.get_attr("RTA_OIF")
    for index in {each["oif"] for each in several} | ({out} if out else set()):
        yield Route(
            index,
            version,
            "default" if to is None else f"{to}/{message['dst_len']}",
            router,
            metric,
            table,
            ("proto", "static") if message["proto"] == RTPROT_STATIC else (),
            "has several routers" if several else _what_no_command_gives(message, metric, table),
            message["proto"] == RTPROT_KERNEL and not several and router is None,
        )


def _what_no_command_gives(message: Any, metric: int, table: int) -> str:
    ipv4, proto = message["family"] == socket.AF_INET, message["proto"]
    has_router = message.get_attr("RTA_GATEWAY") is not None
    life = message.get_attr("RTA_CACHEINFO") or {}
    if table != MAIN:
        return f"is in table {table}"
    if proto not in (RTPROT_BOOT, RTPROT_STATIC):
        return f"is by the protocol {_PROTOCOLS.get(proto, proto)}"
    if metric != (0 if ipv4 else IP6_RT_PRIO_USER):
        return f"has the metric {metric}"
    if message["flags"] & RTNH_F_ONLINK:
        return "has onlink"
    scope = RT_SCOPE_LINK if ipv4 and not has_router else RT_SCOPE_UNIVERSE
    if (message["type"], message["scope"], message["tos"]) != (RTN_UNICAST, scope, 0):
        return f"has the type {message['type']}, scope {message['scope']}, tos {message['tos']}"
    if message.get_attr("RTA_PREF") or life.get("rta_expires"):
        return "has a preference or an end"
    for name in _MORE:
        if message.get_attr(name) is not None:
            return f"has more to it ({name[4:].lower()})"
    return ""
