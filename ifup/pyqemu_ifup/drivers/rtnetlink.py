"""Links and Linux bridges over rtnetlink(7): looks, and executes the ops that concern them.

The only module that imports pyroute2. Whatever has been looked up by name is then driven by its
ifindex, so that a tap which was renamed or replaced meanwhile is never mistaken for another.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute, NetlinkError
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from pyqemu_ifconf.failure import Failure, Forbidden, OfCaller, Status
from pyqemu_ifconf.names import is_valid_name
from pyqemu_ifconf.shell import Command, quote, sh
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.links import (
    IFA_F_NODAD,
    IFF_UP,
    IFINFOMSG,
    IFLA_AF_SPEC,
    NO_ADDRESS,
    U32,
    LinkReader,
)
from pyqemu_ifup.drivers.netlink import NLMSGHDR, attribute, malformed
from pyqemu_ifup.hook import waiting_for
from pyqemu_ifup.look import Counters, Link, Vid, ranges

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.conntrack import Flow
    from pyqemu_ifup.on_port import Sights

IFLA_INET_CONF = 1
VLAN_PVID, VLAN_UNTAGGED = 0x2, 0x4
"""BRIDGE_VLAN_INFO_* of linux/if_bridge.h."""
TRANSIENT = (errno.EAGAIN, errno.EINTR, errno.ENOBUFS)
_MAY_NOT = (errno.EPERM, errno.EACCES, errno.EROFS)
ATTEMPTS = 5
NO_LINK = 2**31 - 1
"""An ifindex that no link has: the kernel counts them from 1."""


def _failure(what: str, code: int) -> Failure:
    """Return what a netlink error number means to the person who must mend it."""
    if code in (errno.EPERM, errno.EACCES):
        why = f"the kernel refuses it ({os.strerror(code)})"
        return Forbidden(what, why, net_admin=True)
    if code == errno.EXFULL:
        return Failure(
            Status.REFUSED, what, "the bridge is full (1023 ports)", "use another bridge"
        )
    if code == errno.ENODEV:
        return OfCaller(
            Status.REFUSED,
            what,
            "the tap or the bridge has gone meanwhile",
            "see whether the calling process still runs",
        )
    if code == errno.EADDRINUSE:
        return OfCaller(
            Status.DENIED,
            what,
            "another link there, or what it is on, has its MAC",
            "give the NIC another mac",
        )
    if code == errno.EOPNOTSUPP:
        return Failure(
            Status.REFUSED,
            what,
            f"this kernel cannot ({os.strerror(code)})",
            "see pyqemu-ifup-policy(5) for what each switch needs",
        )
    return Failure(
        Status.REFUSED, what, f"the kernel refuses it ({os.strerror(code)})", "see dmesg(1)"
    )


IP = (socket.AF_INET, socket.AF_INET6)
"""The families of addresses that are IP's; MPLS and MCTP have others."""


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn a netlink error into a Failure about `what`."""
    try:
        with waiting_for(f"{what}: the kernel does not answer", least=True):
            yield
    except NetlinkError as error:
        raise _failure(what, error.code) from error
    except OSError as error:
        raise _failure(what, error.errno or errno.EIO) from error


class Netlink:
    """The links of this network namespace; close it, or use it in a `with`."""

    def __init__(self) -> None:
        self._reader = LinkReader()
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
        """Close the sockets."""
        self._route.close()
        self._reader.close()

    def require_right(self) -> None:
        """Check that this process may change links here, by an order to one that there cannot be.

        Raises Failure (77).
        """
        with _explained("cannot change any link"):
            try:
                self.set_link(NO_LINK)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise

    def look_up(self, name: str) -> Link | None:
        """Return the link called `name`, None where there is none."""
        if not is_valid_name(name):
            return None
        with _explained(f"cannot look at link {quote(name)}"):
            link = self._reader.by_name(name)
        # NOTE: the kernel finds a link by its alternative names too; ours is the name proper.
        return link if link is not None and link.name == name else None

    def other_name_of(self, name: str) -> str:
        """Return the link that has this name as an alternative one, empty where there is none."""
        with _explained(f"cannot look at link {quote(name)}"):
            link = self._reader.by_name(name) if is_valid_name(name) else None
        return link.name if link is not None and link.name != name else ""

    def look_at(self, index: int) -> Link | None:
        """Return the link with this ifindex, None where there is none."""
        with _explained(f"cannot look at link {index}"):
            return self._reader.by_index(index)

    def links(self) -> list[Link]:
        """Return every link of this network namespace."""
        with _explained("cannot list the links"):
            return self._reader.all()

    def counters(self, index: int) -> Counters | None:
        """Return what has passed the link with this ifindex, None where there is none."""
        with _explained(f"cannot look at link {index}"):
            return self._reader.counters(index)

    def vids(self, index: int) -> tuple[Vid, ...]:
        """Return the VIDs of the bridge port with this ifindex, ascending."""
        found: list[Vid] = []
        with _explained("cannot read the VLANs of the bridge port"):
            for message in self._route.vlandb("dump", ifindex=index):
                if message["ifindex"] != index:
                    continue
                for entry in message.get_attrs("BRIDGE_VLANDB_ENTRY"):
                    info = entry.get_attr("BRIDGE_VLANDB_ENTRY_INFO")
                    if info is None:
                        raise malformed()
                    last = entry.get_attr("BRIDGE_VLANDB_ENTRY_RANGE") or info["vid"]
                    found += [
                        Vid(
                            vid,
                            bool(info["flags"] & VLAN_PVID),
                            bool(info["flags"] & VLAN_UNTAGGED),
                        )
                        for vid in range(info["vid"], last + 1)
                    ]
        return tuple(sorted(found))

    def add_bridge(self, name: str, mac: str, mtu: int) -> None:
        """Make a Linux bridge, down, with a MAC and an MTU that no port changes.

        Raises Failure, 77 or 71.
        """
        with _explained(f"cannot make the bridge {quote(name)}"):
            self._route.link("add", ifname=name, kind="bridge", address=mac, mtu=mtu)

    def add_link(self, body: bytes) -> None:
        """Make a link as the body of an RTM_NEWLINK message says. Raises NetlinkError."""
        try:
            self._reader.add(body)
        except OSError as error:
            raise NetlinkError(error.errno) from error

    def delete_link(self, index: int) -> None:
        """Delete the link with this ifindex; gone already is success. Raises Failure."""
        with _explained(f"cannot delete link {index}"):
            try:
                self._route.link("del", index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise

    def addresses(self) -> list[tuple[int, str]]:
        """Return the addresses of all links: the ifindex, and ADDRESS/LENGTH."""
        with _explained("cannot list the addresses"):
            # NOTE: with a peer, IFA_ADDRESS is the peer's (linux/if_addr.h).
            return [
                (
                    message["index"],
                    f"{local or message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}",
                )
                for message in self._route.get_addr()
                if message["family"] in IP
                for local in (message.get_attr("IFA_LOCAL"),)
            ]

    def sights(
        self, links: Sequence[Link] | None = None, routes_of: Collection[int] | None = None
    ) -> Sights:
        """Return the links, or those that are given, with addresses and routes. Raises Failure.

        With the ifindexes `routes_of` the routes are read only where one of these links has an
        address that is not of the link alone: a router may have a million.
        """
        from pyqemu_ifup import on_port  # rare
        from pyqemu_ifup.drivers import sights

        links = self.links() if links is None else links
        with _explained("cannot list the addresses and the routes"):
            names = {link.index: link.name for link in links}
            addresses = [
                sights.read_address(message, names.get(message["index"], ""))
                for message in self._route.get_addr()
                if message["family"] in IP
            ]
            has_some = routes_of is None or any(
                each.index in routes_of and not on_port.is_of_link(each) for each in addresses
            )
            routes = (
                [
                    route
                    for message in self._route.get_routes()
                    if message["family"] in IP
                    for route in sights.read_route(message)
                ]
                if has_some
                else []
            )
        return on_port.Sights(links, addresses, routes)

    def add_address(self, index: int, address: str) -> None:
        """Give a link an ADDRESS/LENGTH; there already is success. Raises Failure."""
        host, _, length = address.partition("/")
        with _explained(f"cannot set the address {address}"):
            try:
                # NOTE: an address that is being checked for a twin can be listened at by nobody.
                flags = {"flags": IFA_F_NODAD} if ":" in host else {}
                self._route.addr("add", index=index, address=host, prefixlen=int(length), **flags)
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise

    def remove_address(self, index: int, address: str) -> None:
        """Take an ADDRESS/LENGTH from a link; gone already is success. Raises Failure."""
        host, _, length = address.partition("/")
        with _explained(f"cannot remove the address {address}"):
            try:
                self._route.addr("del", index=index, address=host, prefixlen=int(length))
            except NetlinkError as error:
                if error.code not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                    raise

    def set_ipv4(self, index: int, settings: Mapping[int, int]) -> None:
        """Set a link's switches for IPv4, by their numbers (IPV4_DEVCONF_*). Raises Failure."""
        values = [attribute(number, U32.pack(value)) for number, value in settings.items()]
        inet = attribute(socket.AF_INET, attribute(IFLA_INET_CONF, b"".join(values)))
        with _explained(f"cannot set how link {index} takes IPv4"):
            self._reader.change(
                IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0) + attribute(IFLA_AF_SPEC, inet)
            )

    def destinations(self) -> list[tuple[int, str]]:
        """Return where this host's addresses and routes lead: the ifindex, and ADDRESS/LENGTH."""
        found = self.addresses()
        with _explained("cannot list the routes"):
            for message in self._route.get_routes():
                if message["family"] not in IP:
                    continue
                to, out = message.get_attr("RTA_DST"), message.get_attr("RTA_OIF")
                if to is not None and out is not None:
                    found.append((out, f"{to}/{message['dst_len']}"))
        return found

    async def forget_flows(self, which: Callable[[Flow], bool], deadline: Deadline) -> bool:
        """Do as `conntrack.forget_flows`. Raises Failure."""
        from pyqemu_ifup.drivers.conntrack import forget_flows  # rare

        with _explained("cannot forget the flows of a network"):
            return await forget_flows(which, deadline)

    def run(self, change: Callable[[Netlink], None], commands: Sequence[Command]) -> None:
        """Make a `change`, which the `commands` do, again where the kernel had no room for it.

        Raises Failure, 77 where the kernel forbids it, else 71.
        """
        with _explained(f"{commands[-1]} failed"):
            for attempt in range(ATTEMPTS):
                try:
                    change(self)
                    return
                except NetlinkError as error:
                    if error.code not in TRANSIENT or attempt == ATTEMPTS - 1:
                        raise

    def set_link(self, index: int, *attributes: tuple[str, object], up: bool | None = None) -> None:
        """Set attributes of a link, and whether it is up. Raises NetlinkError."""
        # NOTE: by the library's message and our own socket: its own way runs an event loop for
        # each, and takes three times as long.
        message = ifinfmsg()
        message["index"] = index
        message["attrs"] = list(attributes)
        if up is not None:
            message["flags"], message["change"] = IFF_UP if up else 0, IFF_UP
        message.encode()
        try:
            self._reader.change(bytes(message.data[NLMSGHDR.size :]))
        except OSError as error:
            raise NetlinkError(error.errno) from error

    def set_ipv6(
        self, name: str, index: int, disabled: bool | None, addrgenmode: int | None
    ) -> None:
        """Set whether a link gets an IPv6 address, as far as it can be set; None leaves a part.

        Raises NetlinkError, Failure.
        """
        if addrgenmode is not None:
            settings = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", addrgenmode)]}
            try:
                self.set_link(index, ("IFLA_AF_SPEC", {"attrs": [("AF_INET6", settings)]}))
            except NetlinkError as error:
                if error.code == errno.EAFNOSUPPORT:
                    return  # NOTE: the link has no IPv6.
                if addrgenmode != NO_ADDRESS or error.code in _MAY_NOT:
                    raise
        if disabled is not None:
            try:
                write_ipv6_disabled(name, index, disabled)
            except OSError as error:
                # NOTE: who may set a link, and not write there, is in a container.
                if not disabled or error.errno not in _MAY_NOT:
                    path = quote(_ipv6_switch(name))
                    raise _failure(f"cannot write {path}", error.errno or errno.EIO) from error

    def join(self, name: str, index: int, bridge: str, master: int) -> None:
        """Make a bridge the master of a link that has no other. Raises NetlinkError, Failure."""
        # NOTE: the kernel takes a port from another bridge without a word.
        link = self.look_at(index)
        if link is not None and link.master not in (None, master):
            raise Failure(
                Status.DENIED,
                "somebody else's tap",
                "another bridge has taken it meanwhile",
                "see who else manages it",
            )
        try:
            self.set_link(index, ("IFLA_MASTER", master))
        except NetlinkError as error:
            from pyqemu_ifup.on_port import DEVICES  # rare

            on_it = (
                []
                if error.code != errno.EBUSY
                else [each for each in self.links() if each.under == index and each.kind in DEVICES]
            )
            if on_it:
                raise Failure(
                    Status.REFUSED,
                    f"{quote(name)} cannot be a port of {quote(bridge)}",
                    f"{quote(on_it[0].name)}, a {on_it[0].kind} device, has all its frames",
                    f"take it away: {sh('ip', 'link', 'del', 'dev', on_it[0].name)}",
                ) from error
            # A master that is not there; see do_set_master() of the kernel.
            if error.code == errno.EINVAL and self.look_at(master) is None:
                raise NetlinkError(errno.ENODEV) from error
            raise

    def set_vids(self, index: int, vids: Collection[Vid]) -> None:
        """Remove each VID of a port that is not wanted just so, then add what is missing."""
        present = set(self.vids(index))
        wanted = set(vids)
        for first, last in ranges(vid.vid for vid in present - wanted):
            self._route.vlan_filter("del", index=index, vlan_info=_range(first, last))
        missing = wanted - present
        for flags in sorted({_flags(vid) for vid in missing}):
            for first, last in ranges(v.vid for v in missing if _flags(v) == flags):
                info = {"vid": first, "flags": flags} if flags else _range(first, last)
                self._route.vlan_filter("add", index=index, vlan_info=info)

    def set_isolated(self, index: int, isolated: bool) -> None:
        """Set a bridge port's isolation from other isolated ports. Raises NetlinkError."""
        self.set_link(index, _port_setting("IFLA_BRPORT_ISOLATED", int(isolated)))


def _port_setting(name: str, value: int) -> tuple[str, object]:
    """Return the attribute of a link that sets one of it as a bridge port."""
    settings = {"attrs": [(name, value)]}
    attributes = [("IFLA_INFO_SLAVE_KIND", "bridge_slave"), ("IFLA_INFO_SLAVE_DATA", settings)]
    return "IFLA_LINKINFO", {"attrs": attributes}


def _flags(vid: Vid) -> int:
    return (VLAN_PVID if vid.pvid else 0) | (VLAN_UNTAGGED if vid.untagged else 0)


def _range(first: int, last: int) -> dict[str, object]:
    return {"vid": str(first) if first == last else f"{first}-{last}"}


def _ipv6_switch(tap: str) -> str:
    # NOTE: /proc/sys/net follows the network namespace of the reader, unlike /sys/class/net.
    return f"/proc/sys/net/ipv6/conf/{tap}/disable_ipv6"


def write_ipv6_disabled(tap: str, index: int, disabled: bool) -> None:
    """Turn IPv6 off or on on the link `tap` where its ifindex is `index`, and it has IPv6.

    Raises OSError, and Failure (71) where the link is another by now.
    """
    try:
        with open(_ipv6_switch(tap), "wb", buffering=0) as file:
            # NOTE: the switch goes by the link's name. An open one stays with its link, whoever
            # takes the name now.
            _check_name(tap, index)
            file.write(b"%d" % disabled)
    except FileNotFoundError:
        _check_name(tap, index)


def _check_name(tap: str, index: int) -> None:
    """Raise Failure (71) where the link `tap` is not the one with this ifindex."""
    try:
        found: int | None = socket.if_nametoindex(tap)
    except OSError:
        # ENODEV, the only one; before Python 3.12 no errno is set.
        found = None
    if found != index:
        raise _failure(f"cannot find link {quote(tap)}", errno.ENODEV)
