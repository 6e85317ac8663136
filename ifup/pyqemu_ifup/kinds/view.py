"""What a kind of bridge shows of itself: a tap's port, what leads elsewhere, and what is wrong.

A module a kind, beside the one that does the work: the hooks need none of this.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from pyqemu_ifconf.policy import Kind as KindName
from pyqemu_ifconf.policy import Network, Vlan
from pyqemu_ifconf.shell import Command
from pyqemu_ifup.kinds.base import Leftover, LinkKind, TapKind
from pyqemu_ifup.kinds.check import Check
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.look import Link, OvsPort, Seen
from pyqemu_ifup.mark import Here, Mark

UNTAGGED = 0
"""Stands for no VLAN among VIDs."""


@dataclass(frozen=True)
class PortView:
    """Where a tap is a port, and what it has there; None for what is not known."""

    kind: KindName
    bridge: str | None
    vlan: Vlan | None
    isolated: bool | None


@dataclass(frozen=True)
class Uplink:
    """A port by which a bridge leads elsewhere, in its own right and not for a guest.

    It is neither a tap, nor a port of ours, nor one that the switch has made for this host itself;
    and the switch can use it. `vids` are the VLANs that it carries, UNTAGGED among them, None for
    all. `link` is None if it has none here, as a tunnel of Open vSwitch; `port` is its row there.
    """

    name: str
    vids: frozenset[int] | None
    link: Link | None = None
    port: OvsPort | None = None


class LinkView(Protocol):
    """A kind that makes the links of its ports, as operators are shown it. All is pure."""

    kind: LinkKind
    """The kind that is shown."""
    checks: tuple[Check[Snapshot], ...]
    """Its part of doctor."""
    outlives: bool
    """Whether a link stays when its process has ended."""

    def view(self, seen: Seen) -> PortView:
        """Return where a link of its making is; its `bridge` is what the link is on."""


class TapView(Protocol):
    """A kind of bridge as operators are shown it. All is pure."""

    kind: TapKind
    """The kind that is shown."""
    checks: tuple[Check[Snapshot], ...]
    """Its part of doctor."""
    outlives: bool
    """Whether a port stays when its tap has gone."""

    def view(self, seen: Seen, here: Here, *, ours: bool) -> PortView | None:
        """Return where the tap is a port, None if it is none of this kind; `ours`: by us."""

    def lost_mark(self, seen: Seen, here: Here) -> Mark | None:
        """Return the mark of a tap whose own is lost, from what else tells of it, if anything."""

    def left(self, leftover: Leftover) -> tuple[PortView, Mark]:
        """Return where a port is whose tap is not here, and what its mark says."""

    def is_own(self, link: Link, snapshot: Snapshot) -> bool:
        """Tell whether the switch has made the tap itself, so that it is no guest's."""

    def ports(self, snapshot: Snapshot, network: Network) -> list[Link]:
        """Return the links that are ports of the network's bridge, but what is the host's end."""

    def uplinks(self, snapshot: Snapshot, bridge: str, databases: Collection[str]) -> list[Uplink]:
        """Return the uplinks of a bridge that is in one of `databases`, if any, else in any."""

    def has_host_ends(self, snapshot: Snapshot, network: Network) -> bool:
        """Tell whether the bridge has a port that the switch made for this host, but its own."""

    def carrying(self, uplink: Uplink, vids: Sequence[int]) -> Command:
        """Return the command that has an uplink carry more VIDs, tagged, beside what it carries."""

    def adding(self, snapshot: Snapshot, network: Network) -> Command | None:
        """Return the command that makes the network's bridge; None if it is not to be of this."""

    def raising(self, network: Network, mtu: int) -> Command:
        """Return the command that raises the MTU of the network's bridge, in bytes."""
