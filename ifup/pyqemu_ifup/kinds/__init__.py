"""The kinds of network, a module each: what differs from one to the other, and nothing else."""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import cache

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds import SPECS
from pyqemu_ifconf.policy import Kind as KindName
from pyqemu_ifconf.policy import Port
from pyqemu_ifconf.shell import quote
from pyqemu_ifup.kinds.base import Leftover, TapKind
from pyqemu_ifup.look import Link, OvsPort, Seen
from pyqemu_ifup.stamp import Here


def load(name: KindName) -> TapKind:
    """Return the module of a kind, which is imported when it is wanted."""
    match name:
        case "linux":
            from pyqemu_ifup.kinds import linux

            return linux
        case "openvswitch":
            from pyqemu_ifup.kinds import openvswitch

            return openvswitch


@cache
def tap_kinds() -> tuple[TapKind, ...]:
    """Return the kinds of bridge that a tap can be a port of."""
    return tuple(load(spec.name) for spec in SPECS if spec.endpoint == "tap")


def require(databases: Container[str], port: Port, seen: Seen) -> None:
    """Check that what serves the wanted bridge runs. Raises Failure (69).

    `databases` are those that this host has.
    """
    for kind in tap_kinds():
        kind.require(databases, port, seen)


def may_linger(master: Link) -> bool:
    """Tell whether a tap may have this master for a moment when it is a port no more."""
    return any(kind.lingers and master.kind == kind.master_kind for kind in tap_kinds())


def judge(ports: Iterable[OvsPort], links: Iterable[Link], here: Here) -> tuple[Leftover, ...]:
    """Return what is to become of every port that carries our mark and outlives its link.

    `links` must have been looked at after `ports`: a tap is there before its port is.
    """
    ports, links = tuple(ports), tuple(links)
    return tuple(each for kind in tap_kinds() for each in kind.judge(ports, links, here))


def may_be_in_database(port: Port, seen: Seen) -> bool:
    """Tell whether the wanted bridge may be one that a database tells of."""
    if port.kind is not None:
        return load(port.kind).ovsdb(port) is not None
    there = [kind for kind in tap_kinds() if kind.is_there(port, seen)]
    return all(kind.ovsdb(port) is not None for kind in there)


def find(port: Port, seen: Seen) -> TapKind:
    """Return which kind of bridge `port.bridge` is on this host.

    Raises Failure: 69 where there is no such bridge, 71 where it is no bridge, is two, or is not
    of the kind that the policy says.
    """
    there = [kind for kind in tap_kinds() if kind.is_there(port, seen)]
    network = quote(port.network)
    if port.kind is None and len(there) > 1:
        words = " or ".join("kind: " + kind.name for kind in there)
        raise Failure(
            Status.REFUSED,
            f"{quote(port.bridge)} is both {' and '.join(kind.title for kind in there)}",
            "",
            f"say {words} for network {network}",
        )
    for kind in there:
        if port.kind in (None, kind.name):
            return kind
    if there:
        raise Failure(
            Status.REFUSED,
            f"{quote(port.bridge)} is {there[0].title}",
            f"the policy says kind: {port.kind} for network {network}",
            "correct its kind or its bridge",
        )
    wanted = tuple(kind for kind in tap_kinds() if port.kind in (None, kind.name))
    if seen.bridge is not None and any(kind.has_link for kind in wanted):
        what = f"a {seen.bridge.kind} interface" if seen.bridge.kind else "a network card"
        raise Failure(
            Status.REFUSED,
            f"{quote(port.bridge)} is not a bridge",
            f"it is {what}",
            f"correct bridge: of network {network}",
        )
    if seen.other_name_of:
        own = quote(seen.other_name_of)
        raise Failure(
            Status.UNAVAILABLE,
            f"there is no bridge {quote(port.bridge)}",
            f"that is another name of {own}",
            f"write {own} in the stead of {quote(port.bridge)} for network {network}",
        )
    remedy = " or ".join(kind.adding(port) for kind in wanted)
    raise Failure(
        Status.UNAVAILABLE,
        f"there is no bridge {quote(port.bridge)}",
        f"network {network} names it",
        f"make it ({remedy}) or correct the policy",
    )
