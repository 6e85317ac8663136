"""What each sort of made network is to the engine, and the values that all sorts have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Nat
from pyqemu_ifup.host import Host
from pyqemu_ifup.ops import Plan

S = TypeVar("S")
"""What a look at one sort of network returns."""


class WantedNetwork(NamedTuple):
    """A network that is to be there: its name, its bridge, and how the policy says it is made."""

    network: str
    bridge: str
    made: Nat


class MadeNetwork(Protocol[S]):
    """A sort of network that is made: what differs from one sort to the other.

    `make`, `restore` and `differences` are pure. The engine holds the network's lock
    around all but `find_unmet` and `leftovers`.
    """

    def find_lacking(self, wanted: WantedNetwork) -> Sequence[Failure]:
        """Return a Failure for each program that the network needs and this host lacks."""

    async def require(self, host: Host, wanted: WantedNetwork) -> None:
        """Check that this host has all that the network needs. Raises Failure, the first."""

    async def find_unmet(self, host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
        """Return why the network could not be made, the first as `require` raises it."""

    async def look(self, host: Host, wanted: WantedNetwork, *, guess: bool = False) -> S:
        """Return what there is of the network. Raises Failure, 75 with the host's deadline.

        With `guess`, what this process may not look at counts as not there, as far as can be.
        """

    def make(self, wanted: WantedNetwork, seen: S) -> Plan:
        """Return the steps that make the network as it is wanted, isolation before connectivity."""

    def restore(self, wanted: WantedNetwork, before: S) -> Plan:
        """Return the steps that give a network, which `make` has changed, back as it was."""

    def unmake(self, network: str, bridge: str, folder: str) -> Plan:
        """Return the steps that take away what there is of a network, each whatever is there.

        `bridge` is the name of its bridge, "" if there is none, and `folder` that of its files.
        """

    def differences(self, wanted: WantedNetwork, seen: S) -> tuple[str, ...]:
        """Return in words what of the network is not as it is wanted, none of one that is not."""

    async def tell(self, host: Host, wanted: WantedNetwork) -> None:
        """Tell syslog who else on this host keeps a new network from its work.

        Raises Failure (75) with the host's deadline.
        """

    async def leftovers(self, host: Host) -> Sequence[str]:
        """Return the networks of which there is more than a bridge and a folder. Raises Failure."""
