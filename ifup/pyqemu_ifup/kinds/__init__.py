"""The kinds of network, a module each: what differs from one to the other, and nothing else."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, cast

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds import SPECS, spec_at, spec_of
from pyqemu_ifconf.policy import Kind as KindName
from pyqemu_ifconf.policy import Port
from pyqemu_ifconf.shell import ifctl, quote
from pyqemu_ifup.kinds.base import Leftover, LinkKind, PortKind, TapKind
from pyqemu_ifup.look import Link, OvsPort, Seen
from pyqemu_ifup.mark import Here, Mark

if TYPE_CHECKING:
    from pyqemu_ifup.host import Host
    from pyqemu_ifup.kinds.view import LinkView, TapView


def load(name: KindName) -> TapKind | LinkKind:
    """Return the module of a kind, which is imported when it is wanted."""
    match name:
        case "linux":
            from pyqemu_ifup.kinds import linux

            return linux
        case "openvswitch":
            from pyqemu_ifup.kinds import openvswitch

            return openvswitch
        case "macvtap":
            from pyqemu_ifup.kinds import macvtap

            return macvtap


def load_view(name: KindName) -> TapView | LinkView:
    """Return the module that shows a kind to operators: the hooks do without."""
    match name:
        case "linux":
            from pyqemu_ifup.kinds import linux_view

            return linux_view
        case "openvswitch":
            from pyqemu_ifup.kinds import openvswitch_view

            return openvswitch_view
        case "macvtap":
            from pyqemu_ifup.kinds import macvtap_view

            return macvtap_view


@cache
def views() -> tuple[TapView, ...]:
    """Return what shows each kind of bridge that a tap can be a port of."""
    return tuple(cast("TapView", load_view(kind.name)) for kind in tap_kinds())


@cache
def link_views() -> tuple[LinkView, ...]:
    """Return what shows each kind that makes the links of its ports."""
    return tuple(cast("LinkView", load_view(kind.name)) for kind in makers())


def outliving() -> str:
    """Return the kinds whose ports stay when their taps have gone, in words."""
    return " or ".join(spec_of(view.kind.name).label for view in views() if view.outlives)


def lost_mark(seen: Seen, here: Here) -> Mark | None:
    """Return the mark of a tap whose own is lost, from what else tells of it, None if nothing."""
    found = (view.lost_mark(seen, here) for view in views())
    return next((each for each in found if each is not None), None)


@cache
def tap_kinds() -> tuple[TapKind, ...]:
    """Return the kinds of bridge that a tap can be a port of."""
    return tuple(cast(TapKind, load(spec.name)) for spec in SPECS if spec.endpoint == "tap")


def master_kinds(name: KindName) -> tuple[str, ...]:
    """Return what rtnetlink(7) calls the master of a port of this kind, if it has one."""
    return tuple(kind.master_kind for kind in tap_kinds() if kind.name == name)


def makers() -> tuple[LinkKind, ...]:
    """Return the kinds that make the links of their ports."""
    return tuple(filter(None, (maker(spec.name) for spec in SPECS)))


def maker(name: KindName) -> LinkKind | None:
    """Return the module of a kind that makes the links of its ports, None for any other."""
    return None if spec_of(name).endpoint == "tap" else cast(LinkKind, load(name))


def maker_at(port: Port) -> LinkKind | None:
    """Return the kind that is to make the link of a port, None if QEMU or the caller makes it."""
    spec = spec_at(port.place)
    return maker(spec.name) if spec is not None else None


def maker_of(link: Link | None) -> LinkKind | None:
    """Return the kind that has made a link, by its mark; None for any other link."""
    mark = link.mark if link is not None else None
    kind = maker(mark.kind) if mark is not None else None
    return kind if kind is not None and link is not None and link.kind == kind.link_kind else None


def is_ports(link: Link) -> bool:
    """Tell whether a link is a tap, or one of our making that serves as one."""
    return link.tap or maker_of(link) is not None


def look(host: Host, tap: str, place: str | None) -> Seen:
    """Look as `Host.look`, and at what the kind that has made the link sees beside."""
    seen = host.look(tap, place)
    own = see(host, seen.tap)
    return seen if own is None else replace(seen, own=own)


def see(host: Host, link: Link | None) -> object:
    """Return what the kind that has made a link sees beside, None for any other link."""
    kind = maker_of(link)
    return kind.see(host, link) if kind is not None and link is not None else None


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


def said(port: Port) -> TapKind | LinkKind | None:
    """Return the kind of bridge that the policy says, None if that is looked up."""
    spec = spec_at(port.place)
    return load(spec.name) if spec is not None else None


def databases(port: Port, seen: Seen) -> tuple[str, ...]:
    """Return the addresses of the databases in which the wanted bridge may be."""
    kind = said(port)
    there = [kind] if kind is not None else _there(port, seen)
    in_none = any(each.ovsdb(port) is None for each in there)
    return () if in_none else port.place.databases


def _require_link(port: Port, seen: Seen) -> None:
    """Raise Failure (71) if a tap was seen where the network makes links of its own, or so."""
    wanted, has = maker_at(port), maker_of(seen.tap)
    if seen.tap is None or wanted is has:
        return
    if has is None:
        raise Failure(
            Status.REFUSED,
            f"{quote(port.tap)} is a tap, which cannot be plugged in network {quote(port.network)}",
            f"each of its ports is {wanted.title if wanted is not None else ''}, made for a guest",
            f"start the guest with {ifctl('run')}",
        )
    raise Failure(
        Status.REFUSED,
        f"{quote(port.tap)} is {has.title}, and a port of network {quote(port.network)} is not",
        "",
        "it takes effect when the guest is started again",
    )


def _there(port: Port, seen: Seen) -> list[TapKind]:
    """Return the kinds of which there is a bridge with the wanted name."""
    return [kind for kind in tap_kinds() if kind.is_there(port, seen)]


def find(port: Port, seen: Seen) -> PortKind:
    """Return which kind of place the wanted one is on this host.

    Raises Failure: 69 where there is no such bridge, 71 where it is no bridge, is two, or is not
    of the kind that the policy says, or where such a link as was seen can be no port of it.
    """
    _require_link(port, seen)
    made = maker_at(port)
    if made is not None:
        return made
    there, kind = _there(port, seen), cast("TapKind | None", said(port))
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
