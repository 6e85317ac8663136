"""What each kind of network is to the engine, and the values that all kinds have in common."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pyqemu_ifconf.policy import Kind as KindName
from pyqemu_ifconf.policy import Port
from pyqemu_ifconf.shell import Command
from pyqemu_ifup.look import Link, OvsPort, Seen
from pyqemu_ifup.mark import Here, Mark
from pyqemu_ifup.ops import Op, Plan

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.nft_rules import Chain
    from pyqemu_ifup.drivers.ovsdb import Database
    from pyqemu_ifup.host import Host


@dataclass(frozen=True)
class Difference:
    """One thing that is not as wanted; both sides in words.

    `because` tells why it is so, or cannot be as wanted, "" where that is not known. `passing`: it
    may become as wanted by itself, as what a daemon has yet to see.
    """

    setting: str
    wanted: str
    found: str
    because: str = ""
    passing: bool = False

    @property
    def sides(self) -> str:
        """What is and what was wanted, in words."""
        return f"{self.setting} is {self.found}, wanted {self.wanted}"

    def __str__(self) -> str:
        return self.sides + (f": {self.because}" if self.because else "")


def differing(
    setting: str, wanted: object, is_now: object, *, passing: bool = False
) -> tuple[Difference, ...]:
    """Return the Difference of two values, none where they are the same."""
    if wanted == is_now:
        return ()
    return (Difference(setting, in_words(wanted), in_words(is_now), passing=passing),)


def host_mac(mac: str) -> str:
    """Return the MAC of a tap's host's end: `fe:` and the other five bytes of the tap's own.

    A Linux bridge takes the lowest MAC among its ports (net/bridge/br_stp_if.c), so that a high
    one leaves it what it was.
    """
    return "fe" + mac[2:]


def in_words(value: object) -> str:
    """Return a value as a person reads it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, dict):
        return " ".join(f"{key}={value[key]}" for key in sorted(value)) or "none"
    return str(value)


@dataclass(frozen=True)
class Leftover:
    """A port of ours in a database; `remove` is None where it stays, `because` says why."""

    port: OvsPort
    because: str
    remove: Op | None


@dataclass(frozen=True)
class Stray:
    """What a crash has left of a kind that makes links, and no port tells of: why, and its end."""

    name: str
    because: str
    plan: Plan


class PortKind(Protocol):
    """A kind of network: what differs from one to the other, wherever its ports are.

    All but `settle` are pure. The engine surrounds its steps with those that each port needs: down
    first, the mark, the settings of the link itself, and up when all is proven.
    """

    name: KindName
    title: str
    """What such a place is, with its article, in a sentence."""
    has_link: bool
    """Whether such a place is known by a link of its name, and by nothing else."""

    def is_there(self, port: Port, seen: Seen) -> bool:
        """Tell whether there is a place of this kind with the wanted name."""

    def claim(self, port: Port, seen: Seen) -> None:
        """Check that the place can have ports that work. Raises Failure: 69, 71, 77."""

    def join(self, port: Port, seen: Seen, mark: Mark, here: Here) -> Plan:
        """Return the steps that make the link, which is down, a port with all its settings.

        Raises Failure (71) where the place cannot do what is wanted.
        """

    def is_in_place(self, port: Port, seen: Seen, here: Here) -> bool:
        """Tell whether the link is at the wanted place already, and its port there is whole."""

    def change(self, port: Port, seen: Seen, mark: Mark, here: Here) -> tuple[Plan, bool]:
        """Return the steps that give a port in place its settings, and whether its VLAN changes.

        Raises Failure (71) where the place cannot do what is wanted.
        """

    def mac(self, port: Port, link: Link) -> str:
        """Return the MAC that the port's link shall have."""

    def ovsdb(self, port: Port) -> str | None:
        """Return the database that the port is in, for the mark; None where there is none."""

    def differences(self, port: Port, seen: Seen, *, up: bool) -> tuple[Difference, ...]:
        """Return what of the port is not as wanted; `up`: its link's state counts too."""

    async def settle(self, host: Host, port: Port, *, up: bool, told: bool) -> None:
        """Wait until what was done is in force, and what is to be seen of it is true.

        `told`: whoever serves the place has just told all that there was. Raises Failure (75).
        """

    def adding(self, port: Port) -> Command:
        """Return the command that makes a place which can do what is wanted, or shows them all."""

    def pinning(self, port: Port, mtu: int) -> Command:
        """Return the command that pins the MTU of the place, in bytes."""

    def able(self, port: Port, bridge: Link) -> Link:
        """Return the place's link as one would be that can do what is wanted."""

    def is_lost(self, link: Link, bridge: Link | None, database: Database | None) -> bool:
        """Tell whether a running guest's port is not at its place, which is there again.

        `bridge` is the link of the place's name, `database` the one that the mark names, which is
        connected. Raises Failure as the database.
        """


@runtime_checkable
class Filtered(Protocol):
    """What a kind sees of a link of its making (`Seen.own`) that nftables filter."""

    @property
    def chains(self) -> tuple[Chain, ...]:
        """Those of ours that are in force there."""


class LinkKind(PortKind, Protocol):
    """A kind that makes the links of its ports, and opens them for QEMU."""

    link_kind: str
    """What rtnetlink(7) calls the kind of such a link (IFLA_INFO_KIND)."""

    def see(self, host: Host, link: Link) -> object:
        """Look at what else there is of such a link, for `Seen.own`. Raises Failure."""

    async def make(
        self, host: Host, port: Port, mark: Mark, queues: int, *, vnet_hdr: bool
    ) -> list[int]:
        """Make the port's link, down and with its mark; return a descriptor for each queue.

        Raises Failure: 69, 71, 77; then nothing is left of it.
        """

    def making(self, port: Port, link: Link, parent: Link, links: Iterable[Link]) -> Plan:
        """Return the steps that make the port's link, `link` as it is to be; it is not there yet.

        `links` are all that are there.
        """

    def unmake(self, seen: Seen) -> Plan:
        """Return the steps that take away the link, which is down, and what was made for it."""

    def restore(self, before: Seen, now: Seen) -> Plan:
        """Return the steps that give a link in place what it had before, its settings apart."""

    async def find_strays(self, host: Host) -> list[Stray]:
        """Return what a crash has left that no port tells of. Raises Failure."""


class TapKind(PortKind, Protocol):
    """A kind of bridge that a tap can be a port of.

    All but `settle` are pure.
    """

    master_kind: str
    """What rtnetlink(7) calls the kind of a port's master (IFLA_INFO_KIND)."""

    takes_over: bool
    """Whether an up takes over a port without a mark, which a script has made."""

    lingers: bool
    """Whether a port's master may stay for a moment when the port has gone."""

    def require(self, databases: Container[str], port: Port, seen: Seen) -> None:
        """Check that what serves the bridge runs, where it can only be of this kind.

        `databases` are those that this host has. Raises Failure (69).
        """

    def refuse_foreign(self, seen: Seen, here: Here) -> None:
        """Check that nothing of somebody else's has the tap's name. Raises Failure (77)."""

    def holds(self, seen: Seen, master: Link) -> bool:
        """Tell whether the tap is a port of its master because we have put it there."""

    def releasing(self, seen: Seen, master: Link) -> tuple[str, Command] | None:
        """Return who holds the tap whose master this is, and the command that takes it out.

        None where it is no master of this kind.
        """

    def leave(self, seen: Seen, here: Here, *, taken: bool) -> Plan:
        """Return the steps that take a tap, which is down, from where we had put it.

        `taken`: somebody else has moved it to another bridge since.
        """

    def has_rows(self, seen: Seen, here: Here) -> bool:
        """Tell whether something of ours that is not the tap's own tells where it is."""

    def leftovers(self, before: Seen, now: Seen, here: Here) -> Plan:
        """Return the steps that remove what is left of a tap that has gone meanwhile."""

    def moved(self, before: Seen, now: Seen, here: Here) -> bool:
        """Tell whether the tap is at another place of this kind than it was before."""

    def changed_vlan(self, before: Seen, now: Seen, here: Here) -> bool:
        """Tell whether the port has other VLANs than it had before."""

    def restore(self, port: Port, before: Seen, now: Seen, here: Here, *, moved: bool) -> Plan:
        """Return the steps that give the tap what it had before; `moved`: it has left its place.

        `port` is what a change wanted that has failed half-way.
        """

    def is_no_worse(self, before: Seen, now: Seen) -> bool:
        """Tell whether the tap reaches nobody whom it did not reach before."""

    def judge(
        self, ports: Iterable[OvsPort], links: Iterable[Link], here: Here
    ) -> tuple[Leftover, ...]:
        """Return what is to become of every port that carries our mark and outlives its link.

        `links` must have been looked at after `ports`: a tap is there before its port is.
        """


def all_steps(*plans: Plan) -> Plan:
    """Return the steps of several plans, one after the other."""
    return tuple(chain.from_iterable(plans))
