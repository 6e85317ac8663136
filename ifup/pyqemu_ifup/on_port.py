"""What of the host's sits on a bridge's port: addresses, and devices that are made on it. Pure.

A bridge takes all that comes to its ports (br_handle_frame of net/bridge): who is asked for by ARP
from a port's address answers, and this host never learns it. A VLAN device is before the bridge,
and takes the frames of its VLAN (vlan_do_receive of net/8021q).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pyqemu_ifconf.shell import Command, all_of, quote, sh
from pyqemu_ifup.look import Link

DEVICES = ("vlan", "macvlan", "macvtap", "ipvlan", "ipvtap")
"""Kinds of links that are made on another, and get frames from it."""


@dataclass(frozen=True)
class Sights:
    """What the host has: its links, each with its addresses (ADDRESS/LENGTH), and its gateways.

    A gateway is a route's ifindex, where it leads (`default`, or ADDRESS/LENGTH), and the router.
    """

    links: Sequence[Link]
    addresses: Sequence[tuple[int, str]]
    gateways: Sequence[tuple[int, str, str]]

    @cached_property
    def by_link(self) -> dict[int, list[str]]:
        """The addresses of each link, by its ifindex."""
        found: dict[int, list[str]] = {}
        for index, text in self.addresses:
            found.setdefault(index, []).append(text)
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
    own = [text for text in sights.by_link.get(port.index, ()) if not _is_of_link(text)]
    if own:
        yield Sitting(
            "address", ", ".join(own),
            f"{quote(port.name)}, a port of {quote(bridge)}, has the address {', '.join(own)}",
            "this host reaches nobody by it: the bridge takes what comes back, as all else",
            _moving(port, bridge, own, sights),
        )
    for link in sights.devices.get(port.index, ()):
        own = [text for text in sights.by_link.get(link.index, ()) if not _is_of_link(text)]
        used = bool(own) or link.master is not None
        took = f"the frames of VLAN {link.vid}" if link.kind == "vlan" else "all frames"
        gone = sh("ip", "link", "del", "dev", link.name)
        yield Sitting(
            "device", link.name,
            f"{quote(link.name)}, a {link.kind} device, takes {took} from {quote(port.name)} "
            f"before {quote(bridge)} sees them",
            "a guest that is to be there reaches nobody by the bridge",
            None if used else gone,
            f"give {quote(bridge)} what it is for, and take it away: {gone}" if used else "",
        )


def _is_of_link(text: str) -> bool:
    from ipaddress import ip_interface  # most ports have no address

    return ip_interface(text).is_link_local


def _moving(port: Link, bridge: str, own: Iterable[str], sights: Sights) -> Command:
    """Return the command that gives the bridge a port's addresses and routes.

    One of a subnet that the bridge has an address in goes.
    """
    from ipaddress import ip_interface

    index = next((link.index for link in sights.links if link.name == bridge), None)
    there = {ip_interface(text).network for text in sights.by_link.get(index or 0, ())}
    steps = []
    for text in own:
        steps.append(sh("ip", "address", "del", text, "dev", port.name))
        if ip_interface(text).network not in there:
            steps.append(sh("ip", "address", "add", text, "dev", bridge))
    steps += [
        sh("ip", "route", "replace", to, "via", router, "dev", bridge)
        for at, to, router in sights.gateways if at == port.index
    ]
    return all_of(*steps)
