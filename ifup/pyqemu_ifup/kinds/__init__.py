"""The kinds of network, a module each: what differs from one to the other, and nothing else."""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import cache
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds import SPECS, spec_at, spec_of
from pyqemu_ifconf.policy import Kind as KindName
from pyqemu_ifconf.policy import Port
from pyqemu_ifconf.shell import quote
from pyqemu_ifup.kinds.base import Leftover, TapKind
from pyqemu_ifup.look import Link, OvsPort, Seen
from pyqemu_ifup.stamp import Here, Stamp

if TYPE_CHECKING:
    from pyqemu_ifup.kinds.view import TapView


def load(name: KindName) -> TapKind:
    """Return the module of a kind, which is imported when it is wanted."""
    match name:
        case "linux":
            from pyqemu_ifup.kinds import linux

            return linux
        case "openvswitch":
            from pyqemu_ifup.kinds import openvswitch

            return openvswitch


def load_view(name: KindName) -> TapView:
    """Return the module that shows a kind of bridge to operators: the hooks do without."""
    match name:
        case "linux":
            from pyqemu_ifup.kinds import linux_view

            return linux_view
        case "openvswitch":
            from pyqemu_ifup.kinds import openvswitch_view

            return openvswitch_view


@cache
def views() -> tuple[TapView, ...]:
    """Return what shows each kind of bridge that a tap can be a port of."""
    return tuple(load_view(kind.name) for kind in tap_kinds())


def outliving() -> str:
    """Return the kinds whose ports stay when their taps have gone, in words."""
    return " or ".join(spec_of(view.kind.name).label for view in views() if view.outlives)


def lost_mark(seen: Seen, here: Here) -> Stamp | None:
    """Return the mark of a tap whose own is lost, from what else tells of it, None if nothing."""
    found = (view.lost_mark(seen, here) for view in views())
    return next((each for each in found if each is not None), None)


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


def said(port: Port) -> TapKind | None:
    """Return the kind of bridge that the policy says, None if that is looked up."""
    spec = spec_at(port.place)
    return load(spec.name) if spec is not None else None


def databases(port: Port, seen: Seen) -> tuple[str, ...]:
    """Return the addresses of the databases in which the wanted bridge may be."""
    kind = said(port)
    there = [kind] if kind is not None else _there(port, seen)
    in_none = any(each.ovsdb(port) is None for each in there)
    return () if in_none else port.place.databases


def _there(port: Port, seen: Seen) -> list[TapKind]:
    """Return the kinds of which there is a bridge with the wanted name."""
    return [kind for kind in tap_kinds() if kind.is_there(port, seen)]


def find(port: Port, seen: Seen) -> TapKind:
    """Return which kind of bridge the wanted one is on this host.

    Raises Failure: 69 where there is no such bridge, 71 where it is no bridge, is two, or is not
    of the kind that the policy says.
    """
    there, kind = _there(port, seen), said(port)
    network = quote(port.network)
    if kind is None and len(there) > 1:
        words = " or ".join("kind: " + each.name for each in there)
        raise Failure(
            Status.REFUSED,
            f"{quote(port.place.name)} is both {' and '.join(each.title for each in there)}",
            "",
            f"say {words} for network {network}",
        )
    if there and kind in (None, *there):
        return kind or there[0]
    if there and kind is not None:
        raise Failure(
            Status.REFUSED,
            f"{quote(port.place.name)} is {there[0].title}",
            f"the policy says kind: {quote(kind.name)} for network {network}",
            "correct its kind or its bridge",
        )
    wanted = (kind,) if kind is not None else tap_kinds()
    if seen.bridge is not None and any(each.has_link for each in wanted):
        what = f"a {seen.bridge.kind} interface" if seen.bridge.kind else "a network card"
        raise Failure(
            Status.REFUSED,
            f"{quote(port.place.name)} is not a bridge",
            f"it is {what}",
            f"correct bridge: of network {network}",
        )
    if seen.other_name_of:
        own = quote(seen.other_name_of)
        raise Failure(
            Status.UNAVAILABLE,
            f"there is no bridge {quote(port.place.name)}",
            f"that is another name of {own}",
            f"write {own} in the stead of {quote(port.place.name)} for network {network}",
        )
    remedy = " or ".join(each.adding(port) for each in wanted)
    raise Failure(
        Status.UNAVAILABLE,
        f"there is no bridge {quote(port.place.name)}",
        f"network {network} names it",
        f"make it ({remedy}) or correct the policy",
    )
