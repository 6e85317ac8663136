"""What of the host's sits on a bridge's port: addresses, and devices that are made on it. Pure.

A bridge takes all that comes to its ports (br_handle_frame of net/bridge): who is asked for by ARP
from a port's address answers, and this host never learns it. A VLAN device is before the bridge,
and takes the frames of its VLAN (vlan_do_receive of net/8021q).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pyqemu_ifconf.shell import Command, all_of, quote, sh
from pyqemu_ifup.look import Link

DEVICES = ("vlan", "macvlan", "macvtap", "ipvlan", "ipvtap")
"""Kinds of links that are made on another, and get frames from it."""
MAIN = 254
"""The table of routes that ip(8) means where none is named (RT_TABLE_MAIN)."""
ODD_MAX = 3
"""How many of the things that no command moves are told."""


@dataclass(frozen=True)
class Address:
    """An address of a link's, as ADDRESS/LENGTH, or ADDRESS and its `peer` as PEER/LENGTH.

    `options` are the words of ip(8) that give it what it has beside. `odd` says what no command
    gives to the same address on another link, empty where there is no such thing.
    """

    index: int
    text: str
    peer: str = ""
    options: tuple[str, ...] = ()
    odd: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """The address as ip(8) has it."""
        return (self.text.partition("/")[0], "peer", self.peer) if self.peer else (self.text,)

    @property
    def name(self) -> str:
        """The address, for a message."""
        return " ".join(self.words)


@dataclass(frozen=True)
class Route:
    """A route by a link: where it leads (`default`, or ADDRESS/LENGTH), and by which router.

    `version` is IP's. `options` and `odd` are as an address has them. `kernel_s`: it comes and goes
    with an address.
    """

    index: int
    version: Literal[4, 6]
    to: str
    router: str | None
    metric: int = 0
    table: int = MAIN
    options: tuple[str, ...] = ()
    odd: str = ""
    kernel_s: bool = False

    @property
    def name(self) -> str:
        """The route, for a message."""
        return f"the route {self.to}" + (f" via {self.router}" if self.router else "")

    @property
    def key(self) -> tuple[int, str, int, int]:
        """What `ip route replace` goes by."""
        return self.version, self.to, self.metric, self.table


@dataclass(frozen=True)
class Sights:
    """What the host has: its links, each with its addresses, and its routes.

    The addresses of a link are in the kernel's order: a secondary one is behind its primary.
    """

    links: Sequence[Link]
    addresses: Sequence[Address]
    routes: Sequence[Route]

    @cached_property
    def by_link(self) -> dict[int, list[Address]]:
        """The addresses of each link, by its ifindex."""
        found: dict[int, list[Address]] = {}
        for each in self.addresses:
            found.setdefault(each.index, []).append(each)
        return found

    @cached_property
    def devices(self) -> dict[int, list[Link]]:
        """The devices that are made on each link, by its ifindex."""
        found: dict[int, list[Link]] = {}
        for link in self.links:
            if link.kind in DEVICES and link.under is not None:
                found.setdefault(link.under, []).append(link)
        return found


NOTHING = Sights((), (), ())


@dataclass(frozen=True)
class Sitting:
    """One thing on a port; `command` mends it, and where none does `do` says what to do."""

    setting: str
    name: str
    what: str
    why: str
    command: Command | None
    do: str = ""

    @property
    def remedy(self) -> str:
        """What to do, for a message."""
        return self.do or f"mend it: {self.command}"


def find_sitting(port: Link, bridge: str, sights: Sights) -> Iterator[Sitting]:
    """Yield what of the host's sits on a port of `bridge`, or a link that is to be one."""
    own = [each for each in sights.by_link.get(port.index, ()) if not is_of_link(each)]
    if own:
        names = ", ".join(each.name for each in own)
        moving, do = _moving(port, bridge, own, sights)
        yield Sitting(
            "address",
            names,
            f"{quote(port.name)}, a port of {quote(bridge)}, has the address {names}",
            "this host reaches nobody by it: the bridge takes what comes back, as all else",
            moving,
            do,
        )
    for link in sights.devices.get(port.index, ()):
        used = link.master is not None or any(
            not is_of_link(each) for each in sights.by_link.get(link.index, ())
        )
        took = f"the frames of VLAN {link.vid}" if link.kind == "vlan" else "all frames"
        gone = sh("ip", "link", "del", "dev", link.name)
        yield Sitting(
            "device",
            link.name,
            f"{quote(link.name)}, a {link.kind} device, takes {took} from {quote(port.name)} "
            f"before {quote(bridge)} sees them",
            "a guest that is to be there reaches nobody by the bridge",
            None if used else gone,
            f"give {quote(bridge)} what it is for, and take it away: {gone}" if used else "",
        )


def is_of_link(address: Address) -> bool:
    """Tell whether an address is of its link alone, as each link may have one."""
    from ipaddress import ip_interface  # most ports have no address

    return ip_interface(address.text).is_link_local


def _moving(
    port: Link, bridge: str, own: Sequence[Address], sights: Sights
) -> tuple[Command | None, str]:
    """Return the command that gives the bridge a port's addresses and routes, or what to do.

    There is none but for what it moves whole. At none of its steps the host has less than before.
    """
    to = next((link for link in sights.links if link.name == bridge), None)
    routes = [each for each in sights.routes if each.index == port.index and not each.kernel_s]
    odd = _find_odd(to, own, routes, sights)
    if to is None or odd:
        more = [f"{len(odd) - ODD_MAX} more"] if len(odd) > ODD_MAX else []
        return None, (
            f"have whoever configures {quote(port.name)} (a DHCP client, NetworkManager, "
            f"systemd-networkd, ifupdown) configure {quote(bridge)} in its place: no command moves "
            f"it whole: {'; '.join(odd[:ODD_MAX] + more) or f'there is no {quote(bridge)} yet'}"
        )
    there = {each.words for each in sights.by_link.get(to.index, ())}
    steps = [] if to.up else [sh("ip", "link", "set", "dev", bridge, "up")]
    steps += [
        sh("ip", "address", "add", *each.words, *each.options, "dev", bridge)
        for each in own
        if each.words not in there
    ]
    # NOTE: a router must be on a network that is there.
    for each in sorted(routes, key=lambda route: route.router is not None):
        via = ("via", each.router) if each.router is not None else ()
        steps.append(
            sh(
                "ip",
                f"-{each.version}",
                "route",
                "replace",
                each.to,
                *via,
                "dev",
                bridge,
                *each.options,
            )
        )
    # NOTE: the kernel takes a network's secondary addresses with its primary one.
    steps += [sh("ip", "address", "del", *each.words, "dev", port.name) for each in reversed(own)]
    return all_of(*steps), ""


def _find_odd(
    bridge: Link | None, own: Sequence[Address], routes: Sequence[Route], sights: Sights
) -> list[str]:
    """Return what no command gives the bridge as the port has it."""
    from ipaddress import ip_address, ip_interface

    if bridge is None:
        return []
    odd = [f"{each.name} {each.odd}" for each in own if each.odd]
    odd += [f"{each.name} {each.odd}" for each in routes if each.odd]
    if bridge.master is not None:
        odd.append(f"{quote(bridge.name)} is itself a part of another link")
    if bridge.ipv6_disabled and (
        any(":" in each.text for each in own) or any(each.version == 6 for each in routes)
    ):
        odd.append(f"{quote(bridge.name)} has no IPv6 (disable_ipv6)")
    near = {
        ip_interface(each.peer or each.text).network
        for each in (*own, *sights.by_link.get(bridge.index, ()))
    }
    near |= {
        ip_interface(each.to).network
        for each in routes
        if each.router is None and each.to != "default"
    }
    count = Counter(each.key for each in sights.routes)
    for each in routes:
        router = ip_address(each.router) if each.router is not None else None
        if count[each.key] > 1:
            odd.append(f"{each.name} has a twin by another link")
        elif (
            router is not None
            and not router.is_link_local
            and not any(router in network for network in near)
        ):
            odd.append(f"{each.name} leads to a router that is on no network here")
    return odd
