"""Macvtaps as status, info and doctor show them."""

from __future__ import annotations

from collections.abc import Iterator

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.kinds.macvtap import MacvtapPlace
from pyqemu_ifconf.policy import Policy, Port, Vlan
from pyqemu_ifup.kinds import macvtap
from pyqemu_ifup.kinds.base import LinkKind
from pyqemu_ifup.kinds.check import Check, Finding, finding_of
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.kinds.view import PortView
from pyqemu_ifup.look import Seen

kind: LinkKind = macvtap
outlives = True


def view(seen: Seen) -> PortView:
    """Return on which parent a macvtap is, and in which VLAN."""
    own = seen.own
    if not isinstance(own, macvtap.Beneath) or own.parent is None or own.lower is None:
        return PortView(macvtap.name, None, None, None)
    vid = own.lower.vid
    return PortView(macvtap.name, own.parent.name, Vlan(vid) if vid else None, None)


def find_bad_parents(snapshot: Snapshot) -> Iterator[Finding]:
    """A parent that is not there, is down, or can have no macvtaps."""
    policy = snapshot.policy
    networks = policy.networks.values() if isinstance(policy, Policy) else ()
    for network in networks:
        if not isinstance(network.place, MacvtapPlace):
            continue
        parent = snapshot.link(network.place.parent)
        master = parent.master if parent is not None else None
        above = next((each.name for each in snapshot.links if each.index == master), "")
        seen = Seen(None, bridge=parent, above=above)
        try:
            macvtap.claim(Port("", network.name, network.place, network.position), seen)
        except Failure as failure:
            status = int(failure.status)
            why = f"each start of a guest on network {network.name} fails (status {status})"
            yield finding_of(failure, why)


checks: tuple[Check[Snapshot], ...] = (Check("parent", "error", find_bad_parents),)
