"""Macvtaps: links of our making, each a guest's own (macvlan of ip-link(8), drivers/net/tap.c).

A macvtap stays when whoever holds it has ended. So its mark is there from its first moment, and
whoever finds that its process has ended takes it away. Until it has its alias, that it is ours is
told by the group of links that it is made in.

Its queues are opened at /dev/tapN, N its ifindex, while it is down and nobody else's: so no frame
ever passes it without the filters, nor goes to this host's own stack for want of a reader.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import stat
import syslog
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, ClassVar

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.kinds.macvtap import SPEC, MacvtapPlace, Mode
from pyqemu_ifconf.policy import Kind as KindName
from pyqemu_ifconf.policy import Port
from pyqemu_ifconf.shell import Command, quote, sh, write
from pyqemu_ifup.drivers import nft
from pyqemu_ifup.drivers.links import (
    IFINFOMSG,
    IFLA_ADDRESS,
    IFLA_GROUP,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_LINK,
    IFLA_LINKINFO,
    IFLA_VLAN_ID,
    NO_ADDRESS,
    U16,
    U32,
)
from pyqemu_ifup.drivers.netlink import attribute, attributes
from pyqemu_ifup.drivers.nft_rules import Chain, link_of
from pyqemu_ifup.drivers.nft_words import commands as nft_commands
from pyqemu_ifup.drivers.nft_words import differences as chain_differences
from pyqemu_ifup.drivers.tun import IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, IFREQ, TUNSETIFF
from pyqemu_ifup.guards.nft import link_chains
from pyqemu_ifup.hook import log, waiting_for
from pyqemu_ifup.kinds.base import Difference, Stray, differing
from pyqemu_ifup.look import Link, Seen
from pyqemu_ifup.mark import ALIAS_MARK, Here, Mark, format_alias
from pyqemu_ifup.ops import DelTap, LinkOp, Op, Plan, SetAlias, SetIpv6, SetUp, set_link
from pyqemu_ifup.steps import take_back
from pyqemu_ifup.system.lock import lock_tap
from pyqemu_ifup.taps import close_all
from pyqemu_ifup.task import pause

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.ovsdb import Database
    from pyqemu_ifup.drivers.rtnetlink import Netlink
    from pyqemu_ifup.host import Host

name: KindName = SPEC.name
title = SPEC.title
has_link = True
link_kind = "macvtap"

GROUP = 0x70797166
"""The group of the links that we make here (`group` of ip-link(8))."""
IFF_UP, IFF_LOOPBACK, IFF_NOARP, IFF_ALLMULTI = 0x1, 0x8, 0x80, 0x200
"""linux/if.h."""
FLAGS = IFF_NOARP | IFF_ALLMULTI
"""Without IFF_ALLMULTI no IPv6 works in the guest. With IFF_NOARP this host answers for no address
of its own there, once nobody reads what comes."""
IFLA_MACVLAN_MODE = 1
MODE_NUMBERS: dict[Mode, int] = {"private": 1, "vepa": 2, "bridge": 4, "passthru": 8}
"""MACVLAN_MODE_* of linux/if_link.h."""
IPV4_DEVCONF_RP_FILTER = 8
"""linux/ip.h."""
LIKE_IT = ("macvlan", link_kind)
"""The kinds of links that share their parent's MACs."""
ETH_P_8021Q = 0x8100
"""linux/if_ether.h: the tags of a customer's VLANs; a provider's (802.1ad) have other VIDs."""
VLAN_MARK = f"{ALIAS_MARK} vlan network="
"""Our mark in the ifalias of a VLAN device that we have made, the network's name behind it."""
SAFE_OFFLOADS = (6, 12)
"""The first Linux that writes no checksum into the first 20 bytes of a frame, wherever whoever
sends it says that it belongs (virtio_net_hdr_to_skb of linux/virtio_net.h, commit 49d14b54a527)."""
ATTEMPTS = 4
"""How often another's device may be where that of ours should be."""
INDEX_MIN, INDEX_MAX = 1 << 24, 1 << 30
"""Among which an ifindex is taken at random then."""
GRACE = 1.0
"""Seconds in which a link that is just being made gets its alias."""
NAME_MAX = 15


# What it is made by


@dataclass(frozen=True)
class AddMacvtap(LinkOp):
    """Make the macvtap, down, with its MAC, on the link `lower`; `index` 0 is the kernel's choice.

    NOTE: in mode passthru it has the MAC of what it is on, whatever is asked for.
    """

    port: str
    lower: str
    lower_index: int
    mode: Mode
    mac: str
    index: int = 0

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (
            sh(
                *("ip", "link", "add", "link", self.lower, "name", self.port),
                *("address", self.mac, "group", str(GROUP), "type", link_kind, "mode", self.mode),
            ),
            set_link(self.port, "arp", "off", "allmulticast", "on"),
        )

    def change(self, links: Netlink) -> None:
        """Make it. Raises NetlinkError, EEXIST if there is a link of this name or index."""
        mode = attribute(IFLA_MACVLAN_MODE, U32.pack(MODE_NUMBERS[self.mode]))
        links.add_link(
            IFINFOMSG.pack(socket.AF_UNSPEC, 0, self.index, FLAGS, FLAGS)
            + attribute(IFLA_IFNAME, self.port.encode() + b"\0")
            + attribute(IFLA_LINK, U32.pack(self.lower_index))
            + attribute(IFLA_ADDRESS, bytes.fromhex(self.mac.replace(":", "")))
            + attribute(IFLA_GROUP, U32.pack(GROUP))
            + _info(link_kind, mode)
        )


@dataclass(frozen=True)
class AddVlan(LinkOp):
    """Make a VLAN device on the link `lower`, down."""

    port: str
    lower: str
    lower_index: int
    vid: int

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (
            sh(
                *("ip", "link", "add", "link", self.lower, "name", self.port),
                *("group", str(GROUP), "type", "vlan", "id", str(self.vid)),
            ),
        )

    def change(self, links: Netlink) -> None:
        """Make it. Raises NetlinkError, EEXIST if there is one of this VID, or of this name."""
        links.add_link(
            IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
            + attribute(IFLA_IFNAME, self.port.encode() + b"\0")
            + attribute(IFLA_LINK, U32.pack(self.lower_index))
            + attribute(IFLA_GROUP, U32.pack(GROUP))
            + _info("vlan", attribute(IFLA_VLAN_ID, U16.pack(self.vid)))
        )


def _info(kind: str, data: bytes) -> bytes:
    return attribute(
        IFLA_LINKINFO, attribute(IFLA_INFO_KIND, kind.encode()) + attribute(IFLA_INFO_DATA, data)
    )


@dataclass(frozen=True)
class KeepFromHost(LinkOp):
    """Have this host take in nothing that comes there, once nobody reads it.

    A link without a route back fails each check of the reverse path (RFC 3704, 2.2).
    """

    port: str
    index: int

    def commands(self) -> tuple[Command, ...]:
        """Return what is written below /proc/sys."""
        return (write("1", f"/proc/sys/net/ipv4/conf/{self.port}/rp_filter"),)

    def change(self, links: Netlink) -> None:
        """Set it."""
        links.set_ipv4(self.index, {IPV4_DEVCONF_RP_FILTER: 1})


class FilterOp:
    """What the ops of the filters have in common."""

    opens: ClassVar[bool] = False
    told: ClassVar[bool] = False
    blind: ClassVar[bool] = True


@dataclass(frozen=True)
class SetFilters(FilterOp):
    """Have these chains filter at the link, in the stead of those that were seen there."""

    port: str
    index: int
    chains: tuple[Chain, ...]
    seen: tuple[Chain, ...] = ()

    def commands(self) -> tuple[Command, ...]:
        """Return what nft(8) is told."""
        return nft_commands(self.chains, self.seen) if self.chains or self.seen else ()

    def commands_of_new(self) -> tuple[Command, ...]:
        """Return the same: the chains' names are free to choose."""
        return self.commands()

    async def run(self, host: Host) -> None:
        """Load them. Raises Failure."""
        with waiting_for(f"the kernel does not load the filters of {quote(self.port)}"):
            try:
                nft.load(self.port, self.index, self.chains)
            except Failure as failure:
                if failure.status is not Status.REFUSED or not self.chains:
                    raise
                raise Failure(
                    failure.status,
                    failure.what,
                    failure.why,
                    f"{failure.remedy or 'see dmesg(1)'}: with vlan: any and macs: none there is "
                    "nothing to filter",
                ) from failure


@dataclass(frozen=True)
class ClearFilters(FilterOp):
    """Take away what of ours filters at the link with this ifindex, be it there or gone.

    NOTE: by its number alone, for another link may have its name by now.
    """

    port: str
    index: int

    def commands(self) -> tuple[Command, ...]:
        """Return nothing: with its link a chain goes, on most kernels."""
        return ()

    def commands_of_new(self) -> tuple[Command, ...]:
        """Return nothing likewise."""
        return ()

    async def run(self, host: Host) -> None:
        """Remove them; none there is success. Raises Failure."""
        with waiting_for(f"the kernel does not remove the filters of {quote(self.port)}"):
            nft.remove("", self.index)


@dataclass(frozen=True)
class DropVlan(FilterOp):
    """Delete the VLAN device of our making, if nothing is on it: whether it is so, `run` sees."""

    port: str
    index: int
    under: int

    def commands(self) -> tuple[Command, ...]:
        """Return nothing: when it is typed, guests may be on it, and would lose their macvtaps."""
        return ()

    def commands_of_new(self) -> tuple[Command, ...]:
        """Return nothing likewise."""
        return ()

    async def run(self, host: Host) -> None:
        """Delete it, unless a guest has it. Raises Failure."""
        with await lock_tap(self.under, host.deadline):
            links = host.kernel.links()
            link = next((each for each in links if each.index == self.index), None)
            if link is not None and _is_our_vlan(link) and not _is_used(link, links):
                host.tell(sh("ip", "link", "del", "dev", self.port))
                host.kernel.delete_link(self.index)


def _is_our_vlan(link: Link) -> bool:
    ours = link.alias.startswith(VLAN_MARK) or (not link.alias and link.group_number == GROUP)
    return link.kind == "vlan" and ours


def _is_used(link: Link, links: Iterable[Link]) -> bool:
    return any(each.under == link.index for each in links)


# What is seen


@dataclass(frozen=True)
class Beneath:
    """What a look at a macvtap finds beside it: the link that it is on, and its filters.

    `parent` is the one without a VLAN.
    """

    lower: Link | None
    chains: tuple[Chain, ...]
    parent: Link | None = None


def see(host: Host, link: Link) -> Beneath:
    """Look at what is beneath a macvtap, and at its filters. Raises Failure."""
    links = host.kernel.links()
    lower = next((each for each in links if each.index == link.under), None)
    under = lower.under if lower is not None and lower.kind == "vlan" else link.under
    parent = next((each for each in links if each.index == under), None)
    return Beneath(lower, nft.read(link.name, link.index), parent)


def _beneath(seen: Seen) -> Beneath:
    return seen.own if isinstance(seen.own, Beneath) else Beneath(None, ())


def mode_of(link: Link) -> str:
    """Return in which mode a macvtap is, in a word."""
    (number,) = U32.unpack(attributes(link.data).get(IFLA_MACVLAN_MODE, bytes(4)))
    return next((each for each, its in MODE_NUMBERS.items() if its == number), str(number))


def _place(port: Port) -> MacvtapPlace:
    assert isinstance(port.place, MacvtapPlace)  # kinds.find goes by the place
    return port.place


def chains_of(port: Port, link: Link, mac: str) -> tuple[Chain, ...]:
    """Return the chains that a guest with this MAC is to have at its link."""
    own = bytes.fromhex(mac.replace(":", "")) if port.settings.macs is not None else None
    return link_chains(link.name, link.index, mac=own, tags=_bars_tags(port))


def _bars_tags(port: Port) -> bool:
    return port.settings.vlan is None or not port.settings.vlan.takes_all


def _vid(port: Port) -> int | None:
    return port.settings.vlan.native if port.settings.vlan is not None else None


def mac(port: Port, link: Link) -> str:
    """Return the MAC that the link is to have: the guest's, which its mark tells."""
    return (link.mark.mac if link.mark is not None else None) or link.mac


# What the engine asks


def is_there(port: Port, seen: Seen) -> bool:
    """Tell whether there is a link of the parent's name."""
    return seen.bridge is not None


def ovsdb(port: Port) -> str | None:
    """Return that there is none."""
    return None


def claim(port: Port, seen: Seen) -> None:
    """Check that guests can have macvtaps on the parent. Raises Failure: 69, 71, 77."""
    place, parent = _place(port), seen.bridge
    network = quote(port.network)
    if parent is None:
        raise Failure(
            Status.UNAVAILABLE,
            f"there is no interface {quote(place.parent)}",
            f"network {network} names it",
            "make it, or correct parent: in the policy",
        )
    shown = quote(parent.name)
    what = "lo" if parent.flags & IFF_LOOPBACK else "a tap" if parent.tap else ""
    if parent.kind in LIKE_IT:
        what = f"a {parent.kind} itself"
    if what:
        raise Failure(
            Status.REFUSED,
            f"{shown} is {what}",
            "no guest can have a macvtap there",
            f"correct parent: of network {network}",
        )
    if parent.master is not None:
        of = f"a port of {quote(seen.above)}" if seen.above else "a port of another link"
        raise Failure(
            Status.DENIED,
            f"{shown} is {of}",
            "a macvtap would take its frames",
            f"name that by bridge: for network {network}",
        )
    if not parent.up:
        raise Failure(
            Status.REFUSED,
            f"{shown} is down",
            "it passes no frame",
            f"bring it up: {set_link(parent.name, 'up')}",
        )
    wanted = port.settings.mtu
    if wanted is not None and wanted > parent.mtu:
        raise Failure(
            Status.REFUSED,
            f"{quote(port.tap)} is to have an MTU of {wanted}, and {shown} has {parent.mtu}",
            "",
            f"raise it: {set_link(parent.name, 'mtu', str(wanted))}",
        )


def join(port: Port, seen: Seen, mark: Mark, here: Here) -> Plan:
    """Return the steps that make a macvtap, which is down, what is wanted, but for its settings.

    Raises Failure (71) if it is on another parent, in another VLAN or mode: it stays there.
    """
    link = seen.tap
    assert link is not None
    _require_in_place(port, seen)
    wanted = mark.mac or link.mac
    chains = chains_of(port, link, wanted)
    filters = SetFilters(link.name, link.index, chains, _beneath(seen).chains)
    return KeepFromHost(link.name, link.index), filters


def _require_in_place(port: Port, seen: Seen) -> None:
    if seen.own is not None and _misplaced(port, seen):
        raise Failure(
            Status.REFUSED,
            f"{quote(port.tap)} cannot change where it is while its guest runs",
            "; ".join(map(str, _misplaced(port, seen))),
            "it takes effect when the guest is started again",
        )


def _misplaced(port: Port, seen: Seen) -> tuple[Difference, ...]:
    """Return what of the place of a macvtap is not as wanted."""
    place, lower, link = _place(port), _beneath(seen).lower, seen.tap
    assert link is not None
    vid = _vid(port)
    parent, found_vid = (lower.index if lower else None), None
    if lower is not None and lower.protocol == ETH_P_8021Q and vid is not None:
        parent, found_vid = lower.under, lower.vid
    is_parent = seen.bridge is not None and parent == seen.bridge.index
    where = lower.name if lower is not None else "nothing"
    return (
        *(() if is_parent else differing(place.noun, place.parent, where)),
        *differing("vlan", vid, found_vid),
        *differing("mode", place.mode, mode_of(link)),
    )


def is_in_place(port: Port, seen: Seen, here: Here) -> bool:
    """Tell whether the macvtap is where it is wanted, and in its mode."""
    return seen.tap is not None and not _misplaced(port, seen)


def change(port: Port, seen: Seen, mark: Mark, here: Here) -> tuple[Plan, bool]:
    """Return the step that gives a macvtap in place its filters; its VLAN never changes."""
    link = seen.tap
    assert link is not None
    chains, found = chains_of(port, link, mac(port, link)), _beneath(seen).chains
    if not chain_differences(chains, found):
        return (), False
    return (SetFilters(link.name, link.index, chains, found),), False


def restore(before: Seen, now: Seen) -> Plan:
    """Return the step that gives a macvtap the filters that it had."""
    link, had, found = now.tap, _beneath(before).chains, _beneath(now).chains
    assert link is not None
    if not chain_differences(had, found):
        return ()
    return (SetFilters(link.name, link.index, had, found),)


def unmake(seen: Seen) -> Plan:
    """Return the steps that take away a macvtap, which is down, and what was made for it."""
    link, lower = seen.tap, _beneath(seen).lower
    assert link is not None
    plan: list[Op] = [DelTap(link.name, link.index), ClearFilters(link.name, link.index)]
    if lower is not None and _is_our_vlan(lower) and lower.under is not None:
        plan.append(DropVlan(lower.name, lower.index, lower.under))
    return tuple(plan)


def differences(port: Port, seen: Seen, *, up: bool) -> tuple[Difference, ...]:
    """Return what of parent, VLAN, mode, filters and the parent's link is not as wanted."""
    link, beneath = seen.tap, _beneath(seen)
    assert link is not None
    lost = chain_differences(chains_of(port, link, mac(port, link)), beneath.chains)
    found = [*_misplaced(port, seen), *(Difference("filters", "in force", each) for each in lost)]
    found += differing("allmulticast and no ARP", True, link.flags & FLAGS == FLAGS)
    if beneath.lower is not None:
        state = "up" if beneath.lower.up else "down"
        found += differing(f"{quote(beneath.lower.name)}", "up", state)
        if beneath.lower.reorders is False:
            found.append(Difference("reorder_hdr", "on", "off", _UNORDERED))
    return tuple(found)


_UNORDERED = "a guest's frame with a tag of its own would leave in no VLAN"


async def settle(host: Host, port: Port, *, up: bool, told: bool) -> None:
    """Wait for nothing: what the kernel has done is in force."""


def adding(port: Port) -> Command:
    """Return the command that shows which interfaces there are."""
    return sh("ip", "-br", "link")


def pinning(port: Port, mtu: int) -> Command:
    """Return the command that gives the parent its MTU back."""
    return set_link(_place(port).parent, "mtu", str(mtu))


def able(port: Port, bridge: Link) -> Link:
    """Return the parent as it is."""
    return bridge


def is_lost(link: Link, bridge: Link | None, database: Database | None) -> bool:
    """Tell that it is not: without its parent there is no macvtap."""
    return False


# How one is made


def making(port: Port, link: Link, parent: Link, links: Iterable[Link]) -> Plan:
    """Return, to be told, the steps that make a macvtap on a parent, and its VLAN device.

    `link` is it as it is to be, `links` are all that are there: a VLAN device among them is taken.
    """
    vid, mode = _vid(port), _place(port).mode
    lower = parent if vid is None else find_vlan(parent, vid, links)
    steps: list[Op] = []
    if vid is not None and lower is None:
        device = vlan_name(parent.name, vid)
        steps.append(AddVlan(device, parent.name, parent.index, vid))
        fresh = replace(parent, index=0, name=device, kind="vlan", alias="", up=False)
        lower = replace(fresh, group_number=GROUP)
    assert lower is not None
    if _is_our_vlan(lower):
        has_ipv6 = link.ipv6_disabled is not None
        steps += [
            op for op in _finishing(lower, port.network) if has_ipv6 or not isinstance(op, SetIpv6)
        ]
    return (*steps, AddMacvtap(port.tap, lower.name, lower.index, mode, link.mac))


def find_vlan(parent: Link, vid: int, links: Iterable[Link]) -> Link | None:
    """Return the device that has this VLAN (802.1Q) of the parent, None without one."""
    for each in links:
        if (each.under, each.vid, each.protocol) == (parent.index, vid, ETH_P_8021Q):
            return each
    return None


async def make(host: Host, port: Port, mark: Mark, queues: int, *, vnet_hdr: bool) -> list[int]:
    """Make a macvtap, down, with its mark, and return a descriptor of each of its queues.

    `vnet_hdr`: with the headers by which a guest leaves checksums and segments to the kernel, if
    that is safe. Raises Failure: 69, 71, 77; then nothing is left of it.
    """
    seen = host.look(port.tap, port.place.name)
    if seen.tap is not None:
        raise taken(port.tap)
    claim(port, seen)
    parent = seen.bridge
    assert parent is not None and mark.mac is not None
    _refuse_wireless(parent)
    offloads = vnet_hdr and (not chains_of(port, parent, mark.mac) or is_safe(os.uname().release))
    try:
        with await lock_tap(parent.index, host.deadline):
            lower = await _find_lower(host, port, parent, host.kernel.links())
            if _place(port).mode == "passthru":
                _refuse_shared(port, lower, host.kernel)
            return await _make_open(host, port, mark, lower, queues, vnet_hdr=offloads)
    except BaseException:
        with host.until(host.deadline.undo()):
            await _drop_vlan(host, port, parent)
        raise


async def _drop_vlan(host: Host, port: Port, parent: Link) -> None:
    """Take back the VLAN device of our making, if nothing is on it; syslog is told if it stays."""
    vid = _vid(port)
    if vid is None:
        return
    try:
        lower = find_vlan(parent, vid, host.kernel.links())
    except Failure as failure:
        log(syslog.LOG_ERR, f"{quote(port.tap)}: cannot look at what is left: {failure}")
        return
    if lower is not None and _is_our_vlan(lower):
        await take_back(host, DropVlan(lower.name, lower.index, parent.index))


async def _make_open(
    host: Host, port: Port, mark: Mark, lower: Link, queues: int, *, vnet_hdr: bool
) -> list[int]:
    """Make the link on `lower` and open its queues. Raises Failure; then it is gone."""
    index = 0
    for _ in range(ATTEMPTS):
        link = await _make_one(host, port, mark, lower, index)
        try:
            found = open_queues(link, queues, vnet_hdr=vnet_hdr)
        except BaseException:
            await take_back(host, DelTap(link.name, link.index))
            raise
        if found:
            return found
        await host.run(DelTap(link.name, link.index))
        # NOTE: nobody can have put something there beforehand.
        index = INDEX_MIN + secrets.randbelow(INDEX_MAX - INDEX_MIN)
    raise Failure(
        Status.DENIED,
        f"/dev/tap{link.index} is another device than that of {quote(port.tap)}",
        "a link of another network namespace has its number",
        "see what is in /dev, and who has network namespaces: lsns -t net",
    )


def taken(name: str) -> Failure:
    """Return what is said (77) of the name of another link."""
    return Failure(
        Status.DENIED,
        f"cannot make {quote(name)}",
        "an interface of this name is there already",
        f"take another name, or see who has it: {sh('ip', '-d', 'link', 'show', 'dev', name)}",
    )


def is_safe(release: str) -> bool:
    """Tell whether a Linux writes checksums where no filter of ours looks, and nowhere else."""
    numbers = release.split("-")[0].split(".")
    try:
        return (int(numbers[0]), int(numbers[1])) >= SAFE_OFFLOADS
    except (IndexError, ValueError):
        return False


async def _make_one(host: Host, port: Port, mark: Mark, lower: Link, index: int) -> Link:
    """Make the link, and give it its mark. Raises Failure."""
    assert mark.mac is not None
    alias = format_alias(mark)
    mode = _place(port).mode
    try:
        await host.run(AddMacvtap(port.tap, lower.name, lower.index, mode, mark.mac, index))
    except Failure as failure:
        if _code(failure) is None:
            # NOTE: what the kernel has not refused it may have done.
            await _drop_half(host, port.tap)
        raise _explain(failure, port, lower, host.kernel) from failure
    link = host.kernel.look_up(port.tap)
    if link is None or link.kind != link_kind or link.group_number != GROUP:
        raise Failure(
            Status.TRY_AGAIN, f"{quote(port.tap)} has gone meanwhile", "", "see who manages links"
        )
    try:
        await host.run(SetAlias(link.name, link.index, alias))
    except BaseException:
        await take_back(host, DelTap(link.name, link.index))
        raise
    return replace(link, alias=alias)


def _code(failure: Failure) -> int | None:
    """Return the errno by which the kernel has refused something, None if it has not."""
    code = getattr(failure.__cause__, "code", None)
    return code if isinstance(code, int) else None


async def _drop_half(host: Host, name: str) -> None:
    """Delete a macvtap of this name that has been made, but has no mark yet."""
    try:
        link = host.kernel.look_up(name)
    except Failure as failure:
        log(syslog.LOG_ERR, f"{quote(name)}: cannot look at what is left: {failure}")
        return
    if link is None or link.alias:
        return
    if link.kind == link_kind and link.group_number == GROUP:
        await take_back(host, DelTap(link.name, link.index))


def _explain(failure: Failure, port: Port, lower: Link, kernel: Netlink) -> Failure:
    """Return what the kernel's refusal to make a macvtap means."""
    code, shown = _code(failure), quote(lower.name)
    if code == errno.EOPNOTSUPP:
        why = "this kernel has no macvtap"
        return Failure(Status.REFUSED, failure.what, why, f"load it: {sh('modprobe', link_kind)}")
    if code == errno.EEXIST:
        if kernel.look_up(port.tap) is not None:
            return taken(port.tap)
        why = "another link has its number, or had its name"
        return Failure(Status.TRY_AGAIN, failure.what, why, "try again")
    if code == errno.EBUSY:
        why = f"{shown} serves something else, as a bridge or a bond"
        return Failure(Status.DENIED, failure.what, why, "correct parent: in the policy")
    if code == errno.EINVAL:
        why = f"{shown} is no Ethernet interface, or a macvtap in mode passthru has it"
        return Failure(Status.REFUSED, failure.what, why, "correct parent: in the policy")
    return failure


def _refuse_wireless(parent: Link) -> None:
    """Raise Failure (71) for a parent whose access point passes one MAC alone."""
    if os.path.exists(f"/sys/class/net/{parent.name}/wireless"):
        raise Failure(
            Status.REFUSED,
            f"{quote(parent.name)} is wireless",
            "an access point passes one MAC only",
            "give the guest a network that has nat: in its stead",
        )


def _refuse_shared(port: Port, parent: Link, kernel: Netlink) -> None:
    """Raise Failure (77) for mode passthru on a parent that somebody else uses."""
    shown = quote(parent.name)
    on_it = [each for each in kernel.links() if each.under == parent.index and each.kind in LIKE_IT]
    why = ""
    if on_it:
        why = f"{quote(on_it[0].name)} is on it"
    elif any(index == parent.index for index, _ in kernel.addresses()):
        why = "it has an address of this host's"
    if why:
        raise Failure(
            Status.DENIED,
            f"{shown} cannot be passed through to {quote(port.tap)}",
            why,
            f"take that away, or take another mode for network {quote(port.network)}",
        )


def vlan_name(parent: str, vid: int) -> str:
    """Return what a VLAN device of our making is called: `eth1.30`, if that has room."""
    plain = f"{parent}.{vid}"
    if len(plain) <= NAME_MAX:
        return plain
    return f"vl{vid}-{sha256(parent.encode()).hexdigest()[:5]}"


async def _find_lower(host: Host, port: Port, parent: Link, links: list[Link]) -> Link:
    """Return the link that the macvtap is to be on, with the lock on the parent held.

    That is the parent, or its VLAN device, which is made if there is none. Raises Failure: 71, 77.
    """
    vid = _vid(port)
    if vid is None:
        return parent
    lower = find_vlan(parent, vid, links)
    if lower is not None and lower in _half_made(links) and not _is_used(lower, links):
        # NOTE: not taken over, for gc may have seen it as well, and deletes what it has seen.
        host.kernel.delete_link(lower.index)
        lower = None
    if lower is not None:
        if not lower.up and not _is_our_vlan(lower):
            raise Failure(
                Status.REFUSED,
                f"{quote(lower.name)}, which has VLAN {vid} of {quote(parent.name)}, is down",
                "it passes no frame",
                f"bring it up: {set_link(lower.name, 'up')}",
            )
        if not lower.reorders:
            raise Failure(
                Status.REFUSED,
                f"{quote(lower.name)} has reorder_hdr off",
                _UNORDERED,
                f"turn it on: {set_link(lower.name, 'type', 'vlan', 'reorder_hdr', 'on')}",
            )
        if lower.master is not None:
            raise Failure(
                Status.DENIED,
                f"{quote(lower.name)}, which has VLAN {vid} of {quote(parent.name)}, is a port of "
                "another link",
                "a macvtap would take its frames",
                f"name that by bridge: for network {quote(port.network)}",
            )
    else:
        lower = await _make_vlan(host, parent, vid)
    if _is_our_vlan(lower):
        lower = await _prepare_vlan(host, port, lower)
    return lower


async def _make_vlan(host: Host, parent: Link, vid: int) -> Link:
    """Make a VLAN device on the parent, and return it. Raises Failure: 71, 75."""
    device = vlan_name(parent.name, vid)
    try:
        await host.run(AddVlan(device, parent.name, parent.index, vid))
    except Failure as failure:
        if _code(failure) != errno.EOPNOTSUPP:
            raise
        raise Failure(
            Status.REFUSED,
            failure.what,
            "this kernel has no VLAN devices",
            f"load them: {sh('modprobe', '8021q')}",
        ) from failure
    found = host.kernel.look_up(device)
    if found is None:
        raise Failure(Status.TRY_AGAIN, f"{quote(device)} has gone meanwhile", "", "try again")
    return found


async def _prepare_vlan(host: Host, port: Port, lower: Link) -> Link:
    """Give a VLAN device of our making its mark, no address, and have it up. Raises Failure."""
    for op in _finishing(lower, port.network):
        await host.run(op)
    return replace(lower, up=True)


def _finishing(lower: Link, network: str) -> Plan:
    """Return the steps that a VLAN device of our making wants yet.

    Its alias, without which it is made anew, says that this host takes in nothing there.
    """
    steps: list[Op] = []
    if not lower.alias:
        steps += [
            SetIpv6(lower.name, lower.index, True, NO_ADDRESS),
            KeepFromHost(lower.name, lower.index),
            SetAlias(lower.name, lower.index, f"{VLAN_MARK}{network}"),
        ]
    if not lower.up:
        steps.append(SetUp(lower.name, lower.index))
    return tuple(steps)


def open_queues(link: Link, queues: int, *, vnet_hdr: bool) -> list[int]:
    """Return a descriptor for each queue; none if another device is at the place of its own.

    Raises Failure: 71, 77.
    """
    number = _find_number(link)
    path = f"/dev/tap{link.index}"
    flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet_hdr else 0)
    found: list[int] = []
    try:
        with ExitStack() as kept:
            kept.callback(close_all, found)
            for _ in range(queues):
                with waiting_for(f"{path} does not open"):
                    found.append(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
                there = os.fstat(found[-1])
                if not stat.S_ISCHR(there.st_mode) or there.st_rdev != number:
                    return []
                # NOTE: the flags alone count, the name does not (tap_ioctl).
                fcntl.ioctl(found[-1], TUNSETIFF, IFREQ.pack(os.fsencode(link.name), flags))
            kept.pop_all()
    except OSError as error:
        raise _not_open(path, error) from error
    return found


def _find_number(link: Link) -> int:
    """Return the number of a macvtap's device, by sysfs of its network namespace.

    NOTE: another namespace's link may have the same ifindex, and /dev is one. Raises Failure (71).
    """
    folder = f"/sys/class/net/{link.name}"
    try:
        with open(f"{folder}/ifindex", encoding="ascii") as file:
            index = int(file.read())
        with open(f"{folder}/{link_kind}/tap{link.index}/dev", encoding="ascii") as file:
            major, minor = map(int, file.read().split(":"))
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        index = 0
        reason: Exception | None = error
    else:
        why, reason = "it shows another network namespace", None
    if index == link.index:
        return os.makedev(major, minor)
    raise Failure(
        Status.REFUSED,
        f"the device of {quote(link.name)} cannot be told",
        f"{folder}: {why}",
        "mount /sys in the network namespace that this runs in",
    ) from reason


def _not_open(path: str, error: OSError) -> Failure:
    what, why = f"cannot open {path}", os.strerror(error.errno or 0)
    if error.errno in (errno.EPERM, errno.EACCES):
        return Forbidden(
            what, why, f"give the agent's unit the drop-in {link_kind}.conf: see pyqemu-ifd(8)"
        )
    if error.errno == errno.ENOENT:
        return Failure(Status.REFUSED, what, why, "mount devtmpfs on /dev")
    return Failure(Status.REFUSED, what, why, "see dmesg(1)")


# What a crash leaves


async def find_strays(host: Host) -> list[Stray]:
    """Return what of ours is left that no macvtap tells of: half made links, VLAN devices, chains.

    What is just being made is let be made. Raises Failure.
    """
    links = host.kernel.links()
    half = _half_made(links)
    if half:
        await pause(GRACE)
        links = host.kernel.links()
        before = {link.index for link in half}
        half = [each for each in _half_made(links) if each.index in before]
    try:
        chains = nft.read_all()
    except Forbidden:
        # NOTE: whoever may not look at them may not remove them either.
        chains = ()
    found = [
        Stray(link.name, "it was never finished", _deleting(link))
        for link in half
        if not _is_used(link, links)
    ]
    found += [
        Stray(link.name, "no guest is on it", (DropVlan(link.name, link.index, link.under or 0),))
        for link in links
        if link.alias.startswith(VLAN_MARK) and _is_our_vlan(link) and not _is_used(link, links)
    ]
    of_links = {link_of(chain.name) for chain in chains}
    stale = {each for each in of_links if each is not None} - {link.index for link in links}
    if stale:
        # NOTE: what has been made since that look had its chains, maybe, when they were read.
        stale -= {link.index for link in host.kernel.links()}
    for index in sorted(stale):
        port = f"link {index}"
        found.append(Stray(port, "the link of these filters is gone", (ClearFilters(port, index),)))
    return found


def _half_made(links: Iterable[Link]) -> list[Link]:
    """Return the links of ours that have no alias yet: until then, none of them is up."""
    return [each for each in links if each.group_number == GROUP and not (each.alias or each.up)]


def _deleting(link: Link) -> Plan:
    if link.kind == "vlan":
        return (DropVlan(link.name, link.index, link.under or 0),)
    return (DelTap(link.name, link.index), ClearFilters(link.name, link.index))
