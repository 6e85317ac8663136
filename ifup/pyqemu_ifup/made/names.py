"""What a made network is called by, and how its bridge is told from anybody else's. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

from pyqemu_ifconf.names import is_network_name
from pyqemu_ifup.look import Link
from pyqemu_ifup.mark import BRIDGE_MARK


def bridge_alias(network: str) -> str:
    """Return the ifalias of the bridge that is made for a network: our mark."""
    return f"{BRIDGE_MARK}{network}"


def network_of(link: Link) -> str | None:
    """Return the network that a bridge was made for, by its mark; None for any other link."""
    if link.kind != "bridge" or not link.alias.startswith(BRIDGE_MARK):
        return None
    name = link.alias[len(BRIDGE_MARK) :]
    return name if is_network_name(name) else None


def bridge_mac(network: str) -> str:
    """Return the MAC of a network's bridge: its own, and the same each time it is made.

    It is locally administered (IEEE 802, 8.4), and below any `fe:` that the taps have.
    """
    digest = sha256(f"pyqemu-ifup bridge {network}".encode()).hexdigest()
    return ":".join(["02", *(digest[at : at + 2] for at in range(0, 10, 2))])


def is_ours(link: Link, network: str) -> bool:
    """Tell whether a link is the bridge that we have made for the network, or begun to make."""
    if link.kind != "bridge":
        return False
    # NOTE: a run that is killed after its first step has not marked the bridge yet.
    return link.alias == bridge_alias(network) or (
        not link.alias and not link.up and link.mac == bridge_mac(network)
    )


def find_bridge(links: Iterable[Link], network: str) -> Link | None:
    """Return the bridge that we have made for the network, whatever its name; None if none is."""
    return next((link for link in links if is_ours(link, network)), None)


def ports_of(links: Iterable[Link], bridge: Link) -> tuple[str, ...]:
    """Return the names of the bridge's ports."""
    return tuple(link.name for link in links if link.master == bridge.index)
