"""Links and Linux bridges over rtnetlink(7): looks, and executes the ops that concern them.

The only module that imports pyroute2. Whatever has been looked up by name is then driven by its
ifindex, so that a tap which was renamed or replaced meanwhile is never mistaken for another.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.look import Link, Vid, ranges
from pyqemu_ifup.plan import (
    JoinBridge,
    LeaveBridge,
    LinkOp,
    SetAlias,
    SetDown,
    SetIpv6,
    SetMac,
    SetMtu,
    SetTxQueueLen,
    SetUp,
    SetVlans,
    commands,
)

IFF_UP = 0x1
TUN_TYPE_TAP = 2
"""IFF_TAP of linux/if_tun.h, as IFLA_TUN_TYPE has it."""
VLAN_PVID, VLAN_UNTAGGED = 0x2, 0x4
VLAN_RANGE_BEGIN, VLAN_RANGE_END = 0x8, 0x10
"""BRIDGE_VLAN_INFO_* of linux/if_bridge.h."""
RTM_NEWLINK, RTM_DELLINK, RTMGRP_LINK = 16, 17, 1
IFLA_IFNAME, IFLA_LINKINFO, IFLA_INFO_KIND = 3, 18, 1
NLMSGHDR, IFINFOMSG, RTATTR = struct.Struct("IHHII"), struct.Struct("BxHiII"), struct.Struct("HH")
NLA_TYPE_MASK = 0x3FFF
SO_RCVBUFFORCE = 33
EVENT_BUFFER = 1 << 20
"""Bytes of link events that may wait: some 500 links at once."""
TRANSIENT = (errno.EAGAIN, errno.EINTR, errno.ENOBUFS)
ATTEMPTS = 5


def _failure(what: str, code: int) -> Failure:
    """Return what a netlink error number means to the person who must mend it."""
    if code in (errno.EPERM, errno.EACCES):
        return Failure(
            Status.DENIED, what, f"the kernel refuses it ({os.strerror(code)})",
            "run as root, or with CAP_NET_ADMIN in the tap's network namespace",
        )
    if code == errno.EXFULL:
        return Failure(
            Status.REFUSED, what, "the bridge is full (1023 ports)", "use another bridge"
        )
    if code == errno.ENODEV:
        return Failure(
            Status.REFUSED, what, "the tap or the bridge has gone meanwhile",
            "see whether the calling process still runs",
        )
    if code == errno.EOPNOTSUPP:
        return Failure(
            Status.REFUSED, what, f"this kernel cannot ({os.strerror(code)})",
            "see pyqemu-ifup-policy(5) for what each switch needs",
        )
    return Failure(
        Status.REFUSED, what, f"the kernel refuses it ({os.strerror(code)})", "see dmesg(1)"
    )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn a netlink error into a Failure about `what`."""
    try:
        yield
    except NetlinkError as error:
        raise _failure(what, error.code) from error


class Netlink:
    """One rtnetlink socket in this network namespace; close it, or use it in a `with`."""

    def __init__(self) -> None:
        self._route: Any = IPRoute()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._route.close()

    def look_up(self, name: str) -> Link | None:
        """Return the link called `name`, None where there is none."""
        link = self._get(ifname=name)
        # NOTE: the kernel finds a link by its alternative names too; ours is the name proper.
        return link if link is not None and link.name == name else None

    def look_at(self, index: int) -> Link | None:
        """Return the link with this ifindex, None where there is none."""
        return self._get(index=index)

    def _get(self, *, ifname: str | None = None, index: int | None = None) -> Link | None:
        try:
            if ifname is not None:
                messages = self._route.link("get", ifname=ifname)
            else:
                messages = self._route.link("get", index=index)
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise _failure(f"cannot look at link {ifname or index}", error.code) from error
        return _link(messages[0])

    def links(self) -> list[Link]:
        """Return every link of this network namespace."""
        with _explained("cannot list the links"):
            return [_link(message) for message in self._route.get_links()]

    def vids(self, index: int) -> tuple[Vid, ...]:
        """Return the VIDs of the bridge port with this ifindex, ascending."""
        found: list[Vid] = []
        with _explained("cannot read the VLANs of the bridge port"):
            for message in self._route.vlandb("dump", ifindex=index):
                if message["ifindex"] != index:
                    continue
                for entry in message.get_attrs("BRIDGE_VLANDB_ENTRY"):
                    info = entry.get_attr("BRIDGE_VLANDB_ENTRY_INFO")
                    last = entry.get_attr("BRIDGE_VLANDB_ENTRY_RANGE") or info["vid"]
                    found += [
                        Vid(vid, bool(info["flags"] & VLAN_PVID),
                            bool(info["flags"] & VLAN_UNTAGGED))
                        for vid in range(info["vid"], last + 1)
                    ]
        return tuple(sorted(found))

    def run(self, op: LinkOp) -> None:
        """Execute one op. Raises Failure, 77 where the kernel forbids it, else 71."""
        with _explained(f"{commands(op)[-1]} failed"):
            for attempt in range(ATTEMPTS):
                try:
                    self._run(op)
                    return
                except NetlinkError as error:
                    if error.code not in TRANSIENT or attempt == ATTEMPTS - 1:
                        raise

    def _run(self, op: LinkOp) -> None:
        route = self._route
        if isinstance(op, SetAlias):
            route.link("set", index=op.index, ifalias=op.alias)
        elif isinstance(op, SetDown):
            route.link("set", index=op.index, state="down")
        elif isinstance(op, SetUp):
            route.link("set", index=op.index, state="up")
        elif isinstance(op, SetMac):
            route.link("set", index=op.index, address=op.mac)
        elif isinstance(op, SetMtu):
            route.link("set", index=op.index, mtu=op.mtu)
        elif isinstance(op, SetTxQueueLen):
            route.link("set", index=op.index, txqlen=op.length)
        elif isinstance(op, SetIpv6):
            write_ipv6_disabled(op.tap, op.index, op.disabled)
        elif isinstance(op, JoinBridge):
            self._join(op)
        elif isinstance(op, LeaveBridge):
            route.link("set", index=op.index, master=0)
        elif isinstance(op, SetVlans):
            self._set_vlans(op)
        else:
            route.brport("set", index=op.index, isolated=int(op.isolated))

    def _join(self, op: JoinBridge) -> None:
        # NOTE: the kernel takes a port from another bridge without a word.
        link = self.look_at(op.index)
        if link is not None and link.master not in (None, op.master):
            raise Failure(
                Status.DENIED, "somebody else's tap", "another bridge has taken it meanwhile",
                "see who else manages it",
            )
        try:
            self._route.link("set", index=op.index, master=op.master)
        except NetlinkError as error:
            # A master that is not there; see do_set_master() of the kernel.
            if error.code == errno.EINVAL and self.look_at(op.master) is None:
                raise NetlinkError(errno.ENODEV) from error
            raise

    def _set_vlans(self, op: SetVlans) -> None:
        """Remove every VID that is not wanted just so, then add what is missing."""
        present = set(self.vids(op.index))
        wanted = set(op.vids)
        for first, last in ranges(vid.vid for vid in present - wanted):
            self._route.vlan_filter("del", index=op.index, vlan_info=_range(first, last))
        missing = wanted - present
        for flags in sorted({_flags(vid) for vid in missing}):
            for first, last in ranges(v.vid for v in missing if _flags(v) == flags):
                info = {"vid": first, "flags": flags} if flags else _range(first, last)
                self._route.vlan_filter("add", index=op.index, vlan_info=info)


@dataclass(frozen=True)
class LinkEvent:
    """A link that has come (or changed), or has gone; `kind` as Link has it."""

    gone: bool
    index: int
    name: str
    kind: str | None


class LinkEvents:
    """A subscription to the links of this network namespace (RTNLGRP_LINK of rtnetlink(7)).

    It reads of each message just what LinkEvent holds: a host that starts guests has thousands.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, EVENT_BUFFER)
        self._socket.bind((0, RTMGRP_LINK))

    def fileno(self) -> int:
        """Return the descriptor that turns readable with an event."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()

    def read(self) -> list[LinkEvent] | None:
        """Return what has happened since; None where some of it was lost (ENOBUFS)."""
        events: list[LinkEvent] = []
        lost = False
        while True:
            try:
                data = self._socket.recv(EVENT_BUFFER)
            except BlockingIOError:
                return None if lost else events
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            events += _link_events(data)


def _link_events(data: bytes) -> Iterator[LinkEvent]:
    at = 0
    while at + NLMSGHDR.size <= len(data):
        length, message, _, _, _ = NLMSGHDR.unpack_from(data, at)
        if length < NLMSGHDR.size:
            return
        body = at + NLMSGHDR.size
        if message in (RTM_NEWLINK, RTM_DELLINK) and data[body] == socket.AF_UNSPEC:
            index = IFINFOMSG.unpack_from(data, body)[2]
            attributes = dict(_attributes(data, body + IFINFOMSG.size, at + length))
            name = attributes.get(IFLA_IFNAME, b"").rstrip(b"\0")
            info = attributes.get(IFLA_LINKINFO, b"")
            kind = dict(_attributes(info, 0, len(info))).get(IFLA_INFO_KIND)
            yield LinkEvent(
                message == RTM_DELLINK, index, os.fsdecode(name),
                None if kind is None else os.fsdecode(kind.rstrip(b"\0")),
            )
        at += (length + 3) & ~3


def _attributes(data: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    while at + RTATTR.size <= end:
        length, kind = RTATTR.unpack_from(data, at)
        if length < RTATTR.size:
            return
        yield kind & NLA_TYPE_MASK, data[at + RTATTR.size : at + length]
        at += (length + 3) & ~3


def _flags(vid: Vid) -> int:
    return (VLAN_PVID if vid.pvid else 0) | (VLAN_UNTAGGED if vid.untagged else 0)


def _range(first: int, last: int) -> dict[str, object]:
    return {"vid": str(first) if first == last else f"{first}-{last}"}


def _link(message: Any) -> Link:
    """Return the Link of an RTM_NEWLINK message."""
    kind = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
    slave = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_KIND")
    filtering = default_pvid = isolated = tun_type = owner = None
    if kind == "bridge":
        filtering = _data(message, "IFLA_BR_VLAN_FILTERING")
        default_pvid = _data(message, "IFLA_BR_VLAN_DEFAULT_PVID")
    if kind == "tun":
        tun_type = _data(message, "IFLA_TUN_TYPE")
        owner = _data(message, "IFLA_TUN_OWNER")
    if slave == "bridge":
        isolated = message.get_nested(
            "IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA", "IFLA_BRPORT_ISOLATED"
        )
    return Link(
        index=message["index"],
        name=_text(message.get_attr("IFLA_IFNAME")),
        kind=kind,
        tap=tun_type == TUN_TYPE_TAP,
        up=bool(message["flags"] & IFF_UP),
        mtu=message.get_attr("IFLA_MTU"),
        mac=message.get_attr("IFLA_ADDRESS") or "",
        txqueuelen=message.get_attr("IFLA_TXQLEN") or 0,
        master=message.get_attr("IFLA_MASTER"),
        alias=_text(message.get_attr("IFLA_IFALIAS") or ""),
        carrier=bool(message.get_attr("IFLA_CARRIER")),
        vlan_filtering=None if filtering is None else bool(filtering),
        default_pvid=default_pvid,
        isolated=None if isolated is None else bool(isolated),
        owner=owner,
    )


def _text(value: str | bytes) -> str:
    # NOTE: the kernel takes any bytes; pyroute2 leaves those that are not UTF-8 as they are.
    return value if isinstance(value, str) else os.fsdecode(value)


def _data(message: Any, name: str) -> Any:
    return message.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA", name)


def _ipv6_switch(tap: str) -> str:
    # NOTE: /proc/sys/net follows the network namespace of the reader, unlike /sys/class/net.
    return f"/proc/sys/net/ipv6/conf/{tap}/disable_ipv6"


def read_ipv6_disabled(tap: str) -> bool | None:
    """Tell whether IPv6 is off on the link, None where the kernel or the link has no IPv6."""
    try:
        with open(_ipv6_switch(tap), encoding="ascii") as file:
            return file.read().strip() == "1"
    except FileNotFoundError:
        return None


def write_ipv6_disabled(tap: str, index: int, disabled: bool) -> None:
    """Turn IPv6 off or on on the link `tap` where its ifindex is `index`, and it has IPv6.

    Raises Failure, 77 where that is forbidden, else 71.
    """
    path = _ipv6_switch(tap)
    try:
        with open(path, "wb", buffering=0) as file:
            # NOTE: the switch goes by the link's name. An open one stays with its link, whoever
            # takes the name now.
            _check_name(tap, index)
            file.write(b"%d" % disabled)
    except FileNotFoundError:
        _check_name(tap, index)
    except OSError as error:
        raise _failure(f"cannot write {path}", error.errno or errno.EIO) from error


def _check_name(tap: str, index: int) -> None:
    """Raise Failure (71) where the link `tap` is not the one with this ifindex."""
    try:
        found: int | None = socket.if_nametoindex(tap)
    except OSError:
        # ENODEV, the only one; before Python 3.12 no errno is set.
        found = None
    if found != index:
        raise _failure(f"cannot find link {tap}", errno.ENODEV)
