"""Taps as ports of a Linux bridge: bridge(8), net/bridge of the kernel."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.linux import SPEC
from pyqemu_ifconf.policy import Kind as KindName
from pyqemu_ifconf.policy import Port, Vlan
from pyqemu_ifconf.shell import Command, all_of, quote, sh
from pyqemu_ifup.kinds.base import Difference, Leftover, differing, host_mac
from pyqemu_ifup.look import Link, OvsPort, Seen, Vid, ranges, show_vlan, vlan_of_vids, wanted_vids
from pyqemu_ifup.mark import Here, Mark
from pyqemu_ifup.ops import LinkOp, Op, Plan, set_link

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.ovsdb import Database
    from pyqemu_ifup.drivers.rtnetlink import Netlink
    from pyqemu_ifup.host import Host

name: KindName = SPEC.name
title = SPEC.title
has_link = True
master_kind = "bridge"
takes_over = True
lingers = False


@dataclass(frozen=True)
class JoinBridge(LinkOp):
    """Make the Linux bridge the tap's master."""

    port: str
    index: int
    bridge: str
    master: int

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (set_link(self.port, "master", self.bridge),)

    def change(self, links: Netlink) -> None:
        """Join it, unless another bridge has taken the tap meanwhile."""
        links.join(self.port, self.index, self.bridge, self.master)


@dataclass(frozen=True)
class LeaveBridge(LinkOp):
    """Take the tap from its Linux bridge; its VIDs and port flags go with that."""

    port: str
    index: int
    bridge: str

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (set_link(self.port, "nomaster"),)

    def change(self, links: Netlink) -> None:
        """Leave it."""
        links.set_link(self.index, ("IFLA_MASTER", 0))


@dataclass(frozen=True)
class SetVlans(LinkOp):
    """Give the bridge port exactly these VIDs."""

    port: str
    index: int
    vids: tuple[Vid, ...]

    def commands(self) -> tuple[Command, ...]:
        """Return what bridge(8) is told."""
        return (
            sh("bridge", "vlan", "del", "dev", self.port, "vid", "1-4094"),
            *(
                sh("bridge", "vlan", "add", "dev", self.port, "vid", *words)
                for words in _vid_words(self.vids)
            ),
        )

    def change(self, links: Netlink) -> None:
        """Remove each VID that is not wanted just so, then add what is missing."""
        links.set_vids(self.index, self.vids)


@dataclass(frozen=True)
class SetIsolated(LinkOp):
    """Set the bridge port's isolation from other isolated ports."""

    port: str
    index: int
    isolated: bool

    def commands(self) -> tuple[Command, ...]:
        """Return what bridge(8) is told."""
        state = "on" if self.isolated else "off"
        return (sh("bridge", "link", "set", "dev", self.port, "isolated", state),)

    def change(self, links: Netlink) -> None:
        """Set it."""
        links.set_isolated(self.index, self.isolated)


def _vid_words(vids: tuple[Vid, ...]) -> list[list[str]]:
    words = []
    for pvid, untagged in sorted({(vid.pvid, vid.untagged) for vid in vids}, reverse=True):
        flags = [*(["pvid"] if pvid else []), *(["untagged"] if untagged else [])]
        alike = (vid.vid for vid in vids if (vid.pvid, vid.untagged) == (pvid, untagged))
        words += [[f"{a}" if a == b else f"{a}-{b}", *flags] for a, b in ranges(alike)]
    return words


def is_there(port: Port, seen: Seen) -> bool:
    """Tell whether there is a Linux bridge with the wanted name."""
    return seen.bridge is not None and seen.bridge.kind == master_kind


def require(databases: Container[str], port: Port, seen: Seen) -> None:
    """Check nothing: the kernel serves its bridges."""


def claim(port: Port, seen: Seen) -> None:
    """Raise Failure (69) where the bridge is down: it passes no frame.

    The bridge of a network that is made for taps is brought up with its first one.
    """
    if port.made is not None or seen.bridge is None or seen.bridge.up:
        return
    raise Failure(
        Status.UNAVAILABLE,
        f"the bridge {quote(seen.bridge.name)} is down",
        "it passes no frame",
        f"bring it up: {set_link(seen.bridge.name, 'up')}",
    )


def refuse_foreign(seen: Seen, here: Here) -> None:
    """Check nothing: a bridge knows no port by its name alone."""


def target_vids(port: Port, bridge: Link) -> tuple[Vid, ...] | None:
    """Return the VIDs that the port shall have, None where the bridge filters none.

    Raises Failure (71) where the bridge cannot do what the policy says.
    """
    if not bridge.vlan_filtering:
        if port.settings.vlan is None:
            return None
        raise Failure(
            Status.REFUSED,
            f"{quote(bridge.name)} does not filter VLANs",
            f"vlan {show_vlan(port.settings.vlan)} is wanted",
            f"turn it on: {_set_bridge(bridge.name, 'vlan_filtering', 1)}"
            if bridge.vlan_filtering is not None
            else "this kernel cannot (CONFIG_BRIDGE_VLAN_FILTERING)",
        )
    if port.settings.vlan is not None:
        return wanted_vids(port.settings.vlan)
    if bridge.default_pvid:
        return wanted_vids(Vlan(bridge.default_pvid))
    raise Failure(
        Status.REFUSED,
        f"{quote(bridge.name)} has no default PVID",
        "and the policy gives no vlan",
        f"set vlan: for network {quote(port.network)}, "
        f"or: {_set_bridge(bridge.name, 'vlan_default_pvid', 1)}",
    )


def _set_bridge(bridge: str, setting: str, value: int) -> Command:
    return set_link(bridge, "type", "bridge", setting, str(value))


def _vids(port: Port, bridge: Link) -> tuple[Vid, ...] | None:
    """Return the VIDs as target_vids; raise Failure (71) for external_ids too."""
    if port.settings.external_ids:
        raise Failure(
            Status.REFUSED,
            f"{quote(port.place.name)} is {title}",
            "it has no place for external_ids",
            f"take external_ids: from network {quote(port.network)}, or from its rule",
        )
    return target_vids(port, bridge)


def join(port: Port, seen: Seen, mark: Mark, here: Here) -> Plan:
    """Return the steps that make the tap a port with its VIDs and its isolation."""
    tap, bridge = seen.tap, seen.bridge
    assert tap is not None and bridge is not None  # is_there has seen it
    vids = _vids(port, bridge)
    return (
        JoinBridge(tap.name, tap.index, bridge.name, bridge.index),
        *((SetVlans(tap.name, tap.index, vids),) if vids is not None else ()),
        *((SetIsolated(tap.name, tap.index, True),) if port.settings.isolated else ()),
    )


def is_in_place(port: Port, seen: Seen, here: Here) -> bool:
    """Tell whether the wanted bridge is the tap's master, by us, and no row says otherwise."""
    master = seen.master
    return (
        master is not None
        and seen.bridge is not None
        and master.index == seen.bridge.index
        and holds(seen, master)
        and not seen.our_rows(here)
    )


def change(port: Port, seen: Seen, mark: Mark, here: Here) -> tuple[Plan, bool]:
    """Return the steps that give a port its VIDs and its isolation, and whether the VIDs change."""
    tap = seen.tap
    assert tap is not None and seen.bridge is not None  # it is in place
    vids = _vids(port, seen.bridge)
    plan: list[Op] = []
    if vids is not None and vids != tuple(sorted(seen.vids)):
        plan.append(SetVlans(tap.name, tap.index, vids))
    moves = bool(plan)
    if port.settings.isolated != bool(tap.isolated):
        plan.append(SetIsolated(tap.name, tap.index, port.settings.isolated))
    return tuple(plan), moves


def holds(seen: Seen, master: Link) -> bool:
    """Tell whether the tap's master is the bridge that its mark names."""
    mark = seen.tap.mark if seen.tap else None
    return (
        master.kind == master_kind
        and mark is not None
        and mark.kind == name
        and mark.bridge == master.name
    )


def releasing(seen: Seen, master: Link) -> tuple[str, Command] | None:
    """Return the bridge that holds the tap, and what takes it out."""
    if master.kind != master_kind or seen.tap is None:
        return None
    return quote(master.name), set_link(seen.tap.name, "nomaster")


def mac(port: Port, link: Link) -> str:
    """Return the MAC of the host's end of a tap."""
    return host_mac(link.mac)


def ovsdb(port: Port) -> str | None:
    """Return that there is none."""
    return None


def leave(seen: Seen, here: Here, *, taken: bool) -> Plan:
    """Return the step that takes the tap from its bridge."""
    tap, master = seen.tap, seen.master
    if tap is None or master is None or master.kind != master_kind or taken:
        return ()
    return (LeaveBridge(tap.name, tap.index, master.name),)


def has_rows(seen: Seen, here: Here) -> bool:
    """Tell that there are none: all that there is, is the tap's own."""
    return False


def leftovers(before: Seen, now: Seen, here: Here) -> Plan:
    """Return no step: a port goes with its link."""
    return ()


def moved(before: Seen, now: Seen, here: Here) -> bool:
    """Tell whether the tap has, or had, another bridge; other masters are not ours to set."""
    tap, old = now.tap, before.tap
    masters = (tap.master if tap else None, old.master if old else None)
    links = [link for link in (before.master, now.master) if link is not None]
    return masters[0] != masters[1] and any(link.kind == master_kind for link in links)


def changed_vlan(before: Seen, now: Seen, here: Here) -> bool:
    """Tell whether the port's VIDs are others."""
    return before.vids != now.vids


def restore(port: Port, before: Seen, now: Seen, here: Here, *, moved: bool) -> Plan:
    """Return the steps that give the tap the bridge, the VIDs and the isolation that it had."""
    tap, old = now.tap, before.tap
    assert tap is not None and old is not None
    plan: list[Op] = []
    if moved and before.master is not None and before.master.kind == master_kind:
        plan.append(JoinBridge(tap.name, tap.index, before.master.name, before.master.index))
        if before.master.vlan_filtering:
            plan.append(SetVlans(tap.name, tap.index, before.vids))
        if old.isolated:
            plan.append(SetIsolated(tap.name, tap.index, True))
    elif not moved:
        if before.vids != now.vids:
            plan.append(SetVlans(tap.name, tap.index, before.vids))
        if old.isolated is not None and tap.isolated != old.isolated:
            plan.append(SetIsolated(tap.name, tap.index, old.isolated))
    return tuple(plan)


def is_no_worse(before: Seen, now: Seen) -> bool:
    """Tell whether the tap is on no other bridge, in no further VLAN, and as isolated as it was."""
    tap, old = now.tap, before.tap
    assert tap is not None and old is not None
    return (
        (
            now.master is None
            or (before.master is not None and now.master.index == before.master.index)
        )
        and set(now.vids) <= set(before.vids)
        and bool(tap.isolated or not old.isolated or now.master is None)
    )


def differences(port: Port, seen: Seen, *, up: bool) -> tuple[Difference, ...]:
    """Return what of master, VIDs and isolation is not as wanted, and whether the bridge is up."""
    found = list(differing("bridge", port.place.name, seen.master.name if seen.master else None))
    tap, bridge = seen.tap, seen.bridge
    if tap is None or bridge is None or seen.master is None:
        return tuple(found)
    try:
        vids = target_vids(port, bridge)
    except Failure as failure:
        is_now = show_vids(seen.vids)
        found.append(Difference("vlan", show_vlan(port.settings.vlan), is_now, str(failure)))
    else:
        if vids is not None and vids != tuple(sorted(seen.vids)):
            wanted = show_vlan(vlan_of_vids(vids))
            found.append(Difference("vlan", wanted, show_vids(seen.vids)))
    found += differing("isolated", port.settings.isolated, bool(tap.isolated))
    found += differing("bridge link", "up", "up" if bridge.up else "down")
    return tuple(found)


def show_vids(vids: tuple[Vid, ...]) -> str:
    """Return a bridge port's VIDs in words, flags that make no Vlan included."""
    vlan = vlan_of_vids(vids)
    if vlan is not None and wanted_vids(vlan) == tuple(sorted(vids)):
        return show_vlan(vlan)
    words = [
        str(vid.vid) + (" pvid" if vid.pvid else "") + (" untagged" if vid.untagged else "")
        for vid in sorted(vids)
    ]
    return ", ".join(words) or "none"


async def settle(host: Host, port: Port, *, up: bool, told: bool) -> None:
    """Wait for nothing: what the kernel has done is in force."""


def adding(port: Port) -> Command:
    """Return the command that makes the bridge, which filters VLANs where one is wanted."""
    return adding_bridge(port.place.name, filtering=port.settings.vlan is not None)


def adding_bridge(bridge: str, mac: str | None = None, *, filtering: bool = False) -> Command:
    """Return the command that makes a Linux bridge which passes frames: it is up."""
    address = ("address", mac) if mac is not None else ()
    words = ("vlan_filtering", "1") if filtering else ()
    return sh("ip", "link", "add", "name", bridge, *address, "up", "type", "bridge", *words)


def pinning(port: Port, mtu: int) -> Command:
    """Return the command that pins the bridge's MTU.

    The kernel takes a link's own MTU for no change, and pins nothing (dev_set_mtu_ext).
    """
    return all_of(*(set_link(port.place.name, "mtu", str(each)) for each in (mtu - 1, mtu)))


def able(port: Port, bridge: Link) -> Link:
    """Return the bridge as one that filters VLANs where one is wanted."""
    return replace(bridge, vlan_filtering=port.settings.vlan is not None)


def judge(ports: Iterable[OvsPort], links: Iterable[Link], here: Here) -> tuple[Leftover, ...]:
    """Return nothing: no port outlives its link."""
    return ()


def is_lost(link: Link, bridge: Link | None, database: Database | None) -> bool:
    """Tell whether the bridge is there and up, and the tap on no bridge."""
    is_back = bridge is not None and bridge.kind == master_kind and bridge.up
    return is_back and link.master is None
