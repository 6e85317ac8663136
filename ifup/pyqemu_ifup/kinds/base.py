"""What each kind of network is to the engine, and the values that all kinds have in common."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Protocol

from pyqemu_ifconf.policy import Kind as KindName
from pyqemu_ifconf.policy import Port
from pyqemu_ifconf.shell import Command
from pyqemu_ifup.look import Link, OvsPort, Seen
from pyqemu_ifup.ops import Op, Plan
from pyqemu_ifup.stamp import Here, Stamp

if TYPE_CHECKING:
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


class TapKind(Protocol):
    """A kind of bridge that a tap can be a port of: what differs from one to the other.

    All but `settle` and `require` are pure. The engine surrounds its steps with those that each tap
    needs: down first, the mark, the settings of the tap itself, and up when all is proven.
    """

    name: KindName
    title: str
    """What such a bridge is, with its article, in a sentence."""
    has_link: bool
    """Whether such a bridge is known by a link of its name, and by nothing else."""

    master_kind: str
    """What rtnetlink(7) calls the kind of a port's master (IFLA_INFO_KIND)."""

    lingers: bool
    """Whether a port's master may stay for a moment when the port has gone."""

    def is_there(self, port: Port, seen: Seen) -> bool:
        """Tell whether there is a bridge of this kind with the wanted name."""

    def require(self, databases: Container[str], port: Port, seen: Seen) -> None:
        """Check that what serves the bridge runs, where it can only be of this kind.

        `databases` are those that this host has. Raises Failure (69).
        """

    def claim(self, port: Port, seen: Seen) -> None:
        """Check that the bridge can have ports that work. Raises Failure: 69, 71."""

    def refuse_foreign(self, seen: Seen, here: Here) -> None:
        """Check that nothing of somebody else's has the tap's name. Raises Failure (77)."""

    def join(self, port: Port, seen: Seen, stamp: Stamp, here: Here) -> Plan:
        """Return the steps that make the tap, which is down, a port with all its settings.

        Raises Failure (71) where the bridge cannot do what is wanted.
        """

    def is_in_place(self, port: Port, seen: Seen, here: Here) -> bool:
        """Tell whether the tap is on the wanted bridge already, and its port there is whole."""

    def change(self, port: Port, seen: Seen, stamp: Stamp, here: Here) -> tuple[Plan, bool]:
        """Return the steps that give a port in place its settings, and whether its VLAN changes.

        Raises Failure (71) where the bridge cannot do what is wanted.
        """

    def holds(self, seen: Seen, master: Link) -> bool:
        """Tell whether the tap is a port of its master because we have put it there."""

    def releasing(self, seen: Seen, master: Link) -> tuple[str, Command] | None:
        """Return who holds the tap whose master this is, and the command that takes it out.

        None where it is no master of this kind.
        """

    def ovsdb(self, port: Port) -> str | None:
        """Return the database that the port is in, for the mark; None where there is none."""

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

    def differences(self, port: Port, seen: Seen, *, up: bool) -> tuple[Difference, ...]:
        """Return what of the port is not as wanted; `up`: its link's state counts too."""

    async def settle(self, host: Host, port: Port, *, up: bool, told: bool) -> None:
        """Wait until what was done is in force, and what is to be seen of it is true.

        `told`: whoever serves the bridge has just told all that there was. Raises Failure (75).
        """

    def adding(self, port: Port) -> Command:
        """Return the command that makes a bridge which can do what is wanted."""

    def pinning(self, port: Port, mtu: int) -> Command:
        """Return the command that pins the bridge's MTU, in bytes."""

    def able(self, port: Port, bridge: Link) -> Link:
        """Return the bridge as one would be that can do what is wanted."""

    def judge(
        self, ports: Iterable[OvsPort], links: Iterable[Link], here: Here
    ) -> tuple[Leftover, ...]:
        """Return what is to become of every port that carries our mark and outlives its link.

        `links` must have been looked at after `ports`: a tap is there before its port is.
        """

    def is_lost(self, link: Link, bridge: Link | None, database: Database | None) -> bool:
        """Tell whether a running guest's tap is not on its bridge, which is there again.

        `bridge` is the link of the bridge's name, `database` the one that the mark names, which is
        connected. Raises Failure as the database.
        """


def all_steps(*plans: Plan) -> Plan:
    """Return the steps of several plans, one after the other."""
    return tuple(chain.from_iterable(plans))
