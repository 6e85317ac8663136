"""From what is wanted and what is to the steps between: pure, as tuples of ops.

An op is a value in the words of the thing that it drives. linux_bridge.py and openvswitch.py
execute them; `commands` says them as an administrator would type them. One plan serves up,
dry-run, explain and undo.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyqemu_ifconf.failure import Failure, OfCaller, Status
from pyqemu_ifconf.policy import DEFAULT_OVSDB, Kind, Port, Vlan
from pyqemu_ifconf.shell import Command, all_of, ovs_value, quote, readable, sh, vsctl, write
from pyqemu_ifup.look import Link, OvsPort, Seen, Vid, ranges, show_vlan, vlan_of_vids, wanted_vids
from pyqemu_ifup.stamp import OUR_KEYS, Here, Stamp, Was, format_alias, is_anothers, row_ids

IPV6_MTU_MIN = 1280
"""Bytes; IPV6_MIN_MTU of linux/ipv6.h (RFC 8200, 5)."""
NO_ADDRESS = 1
"""IN6_ADDR_GEN_MODE_NONE (linux/if_link.h): the kernel gives the link no address by itself."""
BY_MAC = 0
"""IN6_ADDR_GEN_MODE_EUI64, the kernel's own."""
ADDRGENMODES = ("eui64", "none", "stable_secret", "random")
"""What ip-link(8) calls each mode, by its number."""
IPV6 = "disable_ipv6"
"""What a Difference calls it that the host's end may get an IPv6 address."""


@dataclass(frozen=True)
class SetAlias:
    """Set the tap's ifalias; the empty one removes it."""

    tap: str
    index: int
    alias: str


@dataclass(frozen=True)
class SetDown:
    """Take the tap's link down."""

    tap: str
    index: int


@dataclass(frozen=True)
class SetUp:
    """Bring the tap's link up: from here on frames pass."""

    tap: str
    index: int


@dataclass(frozen=True)
class SetMac:
    """Set the MAC of the host's end."""

    tap: str
    index: int
    mac: str


@dataclass(frozen=True)
class SetMtu:
    """Set the tap's MTU, in bytes."""

    tap: str
    index: int
    mtu: int


@dataclass(frozen=True)
class SetTxQueueLen:
    """Set the tap's transmit queue length, in packets."""

    tap: str
    index: int
    length: int


@dataclass(frozen=True)
class SetIpv6:
    """Set whether the host's end gets an IPv6 address, where it has IPv6; None leaves a part alone.

    `addrgenmode` is set over netlink, `disabled` by a file below /proc/sys, which a container may
    not have to write.
    """

    tap: str
    index: int
    disabled: bool | None
    addrgenmode: int | None


@dataclass(frozen=True)
class JoinBridge:
    """Make the Linux bridge the tap's master."""

    tap: str
    index: int
    bridge: str
    master: int


@dataclass(frozen=True)
class LeaveBridge:
    """Take the tap from its Linux bridge; its VIDs and port flags go with that."""

    tap: str
    index: int
    bridge: str


@dataclass(frozen=True)
class SetVlans:
    """Give the bridge port exactly these VIDs."""

    tap: str
    index: int
    vids: tuple[Vid, ...]


@dataclass(frozen=True)
class SetIsolated:
    """Set the bridge port's isolation from other isolated ports."""

    tap: str
    index: int
    isolated: bool


@dataclass(frozen=True)
class DelTap:
    """Delete the tap, which is of our making; whoever holds it can do no more with it."""

    tap: str
    index: int


@dataclass(frozen=True)
class AddPort:
    """Add the Open vSwitch port in one transaction, every column that we own set."""

    ovsdb: str
    bridge: str
    tap: str
    index: int
    vlan: Vlan | None
    protected: bool
    external_ids: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class DelPort:
    """Delete the Open vSwitch port that was seen, and wait until vswitchd let it go.

    `external_ids` are its Interface row's, our mark among them: another port that took its name
    meanwhile is left alone.
    """

    ovsdb: str
    bridge: str | None
    tap: str
    external_ids: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SetPort:
    """Change the Open vSwitch port that was seen, every column that we own in one transaction.

    `seen` are its Interface row's external_ids, our mark among them: another port that took its
    name meanwhile is left alone. `external_ids` are set beside the row's others, `without` are
    keys that go.
    """

    ovsdb: str
    tap: str
    seen: tuple[tuple[str, str], ...]
    vlan_mode: str | None
    tag: int | None
    trunks: tuple[int, ...]
    protected: bool
    transient: bool
    external_ids: tuple[tuple[str, str], ...]
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prove:
    """Look again and compare with what was wanted; `up`: the link's state too."""

    tap: str
    up: bool


LinkOp = (
    SetAlias
    | SetDown
    | SetUp
    | SetMac
    | SetMtu
    | SetTxQueueLen
    | SetIpv6
    | JoinBridge
    | LeaveBridge
    | SetVlans
    | SetIsolated
    | DelTap
)
OvsOp = AddPort | DelPort | SetPort
Step = LinkOp | OvsOp
"""An op that changes something."""
Op = Step | Prove
Plan = tuple[Op, ...]


@dataclass(frozen=True)
class Difference:
    """One thing that is not as wanted; both sides in words.

    `because` tells why it is so, or cannot be as wanted, "" where that is not known.
    """

    setting: str
    wanted: str
    found: str
    because: str = ""

    @property
    def sides(self) -> str:
        """What is and what was wanted, in words."""
        return f"{self.setting} is {self.found}, wanted {self.wanted}"

    def __str__(self) -> str:
        return self.sides + (f": {self.because}" if self.because else "")


def host_mac(mac: str) -> str:
    """Return the MAC of the host's end: `fe:` and the other five bytes of the tap's own.

    A Linux bridge takes the lowest MAC among its ports (net/bridge/br_stp_if.c), so that a high
    one leaves it what it was.
    """
    return "fe" + mac[2:]


def vlan_columns(vlan: Vlan | None) -> tuple[str, int | None, tuple[int, ...]]:
    """Return vlan_mode, tag and trunks of the Port row for `vlan` (ovs-vswitchd.conf.db(5)).

    Without a VLAN the port takes untagged frames only; OVS's own default would be a trunk of all.
    """
    if vlan is None:
        return "access", None, ()
    if not vlan.trunk:
        return "access", vlan.native, ()
    if vlan.native is None:
        return "trunk", None, tuple(vlan.trunk)
    return "native-untagged", vlan.native, tuple(vlan.trunk)


def vlan_of_columns(port: OvsPort) -> Vlan | None:
    """Return the VLAN that a Port row amounts to, None for untagged frames only.

    A row without vlan_mode is an access port where it has a tag, else a trunk; an empty trunks
    column means every VLAN.
    """
    mode = port.vlan_mode or ("access" if port.tag is not None else "trunk")
    if mode in ("access", "dot1q-tunnel"):
        return None if port.tag is None else Vlan(port.tag)
    every = tuple(range(1, 4095))
    return Vlan(port.tag if mode.startswith("native") else None, port.trunks or every)


def find_kind(port: Port, seen: Seen) -> Kind:
    """Return which kind of bridge `port.bridge` is on this host.

    Raises Failure: 69 where there is no such bridge, 71 where it is no bridge, is two, or is not
    of the kind that the policy says.
    """
    linux = seen.bridge is not None and seen.bridge.kind == "bridge"
    openvswitch = port.ovsdb in seen.ovs_bridges
    if port.kind is None and linux and openvswitch:
        raise Failure(
            Status.REFUSED,
            f"{quote(port.bridge)} is both a Linux bridge and an Open vSwitch bridge",
            "",
            f"say kind: linux or kind: openvswitch for network {quote(port.network)}",
        )
    if linux and port.kind != "openvswitch":
        return "linux"
    if openvswitch and port.kind != "linux":
        return "openvswitch"
    if linux or openvswitch:
        other = "a Linux bridge" if linux else "an Open vSwitch bridge"
        raise Failure(
            Status.REFUSED,
            f"{quote(port.bridge)} is {other}",
            f"the policy says kind: {port.kind} for network {quote(port.network)}",
            "correct its kind or its bridge",
        )
    if seen.bridge is not None and port.kind != "openvswitch":
        what = f"a {seen.bridge.kind} interface" if seen.bridge.kind else "a network card"
        raise Failure(
            Status.REFUSED,
            f"{quote(port.bridge)} is not a bridge",
            f"it is {what}",
            f"correct bridge: of network {quote(port.network)}",
        )
    if seen.other_name_of:
        own = quote(seen.other_name_of)
        raise Failure(
            Status.UNAVAILABLE,
            f"there is no bridge {quote(port.bridge)}",
            f"that is another name of {own}",
            f"write {own} in the stead of {quote(port.bridge)} for network {quote(port.network)}",
        )
    how = {
        "linux": adding_bridge(port.bridge, filtering=port.vlan is not None),
        "openvswitch": vsctl(_shortest(port.ovsdb), ("add-br", port.bridge)),
    }
    remedy = how[port.kind] if port.kind else " or ".join(how.values())
    raise Failure(
        Status.UNAVAILABLE,
        f"there is no bridge {quote(port.bridge)}",
        f"network {quote(port.network)} names it",
        f"make it ({remedy}) or correct the policy",
    )


def adding_bridge(name: str, mac: str | None = None, *, filtering: bool = False) -> Command:
    """Return the command that makes a Linux bridge which passes frames: it is up."""
    address = ("address", mac) if mac is not None else ()
    words = ("vlan_filtering", "1") if filtering else ()
    return sh("ip", "link", "add", "name", name, *address, "up", "type", "bridge", *words)


def _shortest(ovsdb: str) -> str:
    """Return a database's address as ovs-vsctl needs it: none where it is the default one."""
    return "" if ovsdb == DEFAULT_OVSDB else ovsdb


def refuse_down(port: Port, kind: Kind, bridge: Link | None) -> None:
    """Raise Failure (69) where a Linux bridge is down: it passes no frame.

    The bridge of a network that is made for taps is brought up with its first one.
    """
    if kind != "linux" or port.nat is not None or bridge is None or bridge.up:
        return
    raise Failure(
        Status.UNAVAILABLE,
        f"the bridge {quote(bridge.name)} is down",
        "it passes no frame",
        f"bring it up: {sh('ip', 'link', 'set', 'dev', bridge.name, 'up')}",
    )


def refuse_strangers(tap: str, seen: Seen, parent: int) -> Link:
    """Return the tap's link where nobody else has a claim to it.

    Raises Failure: 71 where there is no such link, 77 where it is no tap, or somebody else's: its
    master, its alias, or a living QEMU other than `parent` that it was attached for. One that is
    on the wanted Linux bridge already is taken over.
    """
    link = seen.tap
    if link is None:
        raise no_such_tap()
    if not link.tap:
        what = f"a {link.kind} interface" if link.kind else "a network card"
        raise Failure(Status.DENIED, f"not a tap but {what}", "", "give the name of a tap")
    stamp = link.stamp
    if link.alias and stamp is None:
        raise Failure(
            Status.DENIED,
            "somebody else's tap",
            f"its alias is {readable(link.alias)}",
            f"if it is not, remove it: {sh('ip', 'link', 'set', 'dev', tap, 'alias', '')}",
        )
    if stamp is not None:
        refuse_anothers(stamp, parent)
    if seen.master is not None and not is_ours_to_leave(seen, seen.master):
        holder = quote(seen.master.name)
        remedy = sh("ip", "link", "set", "dev", tap, "nomaster")
        if seen.master.kind != "bridge":
            remedy = vsctl("", ("del-port", tap))
            for row in seen.ports:
                holder = row.owner
                remedy = vsctl(row.ovsdb, ("del-port", tap))
        raise Failure(
            Status.DENIED,
            "somebody else's tap",
            f"{holder} holds it",
            f"if it shall go, take it out: {remedy}",
        )
    return link


def no_such_tap() -> Failure:
    """Return what is said (71) of a name that no link has."""
    return OfCaller(
        Status.REFUSED,
        "there is no such tap in this network namespace",
        "",
        "the caller must open it first, as QEMU does",
    )


def refuse_anothers(stamp: Stamp, parent: int) -> None:
    """Raise Failure (77) where the tap serves a living process that is not `parent`."""
    if is_anothers(stamp, parent):
        raise Failure(
            Status.DENIED,
            "in use",
            f"attached to {readable(stamp.bridge)} for process {stamp.pid}"
            + (f", vm {readable(stamp.guest)}" if stamp.guest else ""),
            "end that process first",
        )


def is_open_to_all(link: Link) -> bool:
    """Tell whether anybody may open the tap, now or when its QEMU has let it go."""
    return link.owner is None and link.group is None and (link.multi_queue or link.persistent)


def refuse_shared(link: Link, uid: int) -> None:
    """Check that nobody but root and the user `uid` may open the tap while that one has it.

    Each queue of a tap gets frames of its guest (tun_flow_update and tun_select_queue of
    drivers/net/tun.c), and may send in its name. Raises Failure (77).
    """
    if not link.multi_queue or (link.owner in (None, 0, uid) and link.group is None):
        return
    who = f"group {link.group}" if link.owner in (None, 0, uid) else f"user {link.owner}"
    raise Failure(
        Status.DENIED,
        "shared with others",
        f"{who} may open a queue of this multi-queue tap too",
        "make it anew without an owner: "
        + sh("ip", "tuntap", "del", "dev", link.name, "mode", "tap", "multi_queue"),
    )


def is_ours_to_touch(tap: str, seen: Seen, parent: int) -> bool:
    """Tell whether the tap is there and nobody else has a claim to it."""
    try:
        refuse_strangers(tap, seen, parent)
    except Failure:
        return False
    return True


def is_our_master(seen: Seen, master: Link) -> bool:
    """Tell whether the tap's master is where its stamp says that we put it.

    A port of Open vSwitch's kernel datapath has the master ovs-system, whatever its bridge.
    """
    stamp = seen.tap.stamp if seen.tap else None
    if master.kind == "openvswitch":
        return any(port.ours for port in seen.ports)
    return (
        master.kind == "bridge"
        and stamp is not None
        and stamp.kind == "linux"
        and stamp.bridge == master.name
    )


def is_taken_over(seen: Seen) -> bool:
    """Tell whether the tap is on the wanted Linux bridge without a mark: a script has put it there.

    What is wanted is what that did, or more. An Open vSwitch row is another matter: it outlives
    the tap, and may be whoever's.
    """
    tap, master, bridge = seen.tap, seen.master, seen.bridge
    return (
        tap is not None
        and not tap.alias
        and master is not None
        and bridge is not None
        and master.kind == "bridge"
        and master.index == bridge.index
    )


def is_ours_to_leave(seen: Seen, master: Link) -> bool:
    """Tell whether we may take the tap from its master: we, or a script, had put it there."""
    return is_our_master(seen, master) or is_taken_over(seen)


def refuse_foreign_ports(seen: Seen, here: Here) -> None:
    """Raise Failure (77) where a row of the tap's name in Open vSwitch is not ours to replace."""
    for port in seen.ports:
        if not port.ours:
            raise Failure(
                Status.DENIED,
                "Open vSwitch has a port of this name that is not ours",
                f"on {port.owner}",
                f"if it shall go: {vsctl(port.ovsdb, ('del-port', port.name))}",
            )
        if port.is_elsewhere(here):
            raise Failure(
                Status.DENIED,
                "Open vSwitch has a port of this name from another network namespace",
                f"on {port.owner}",
                f"if it shall go: {vsctl(port.ovsdb, ('del-port', port.name))}",
            )


def target_mtu(port: Port, seen: Seen) -> int:
    """Return the MTU that the tap shall have, in bytes: the policy's, else the bridge's own.

    Raises Failure (71) where the bridge's interface cannot be seen.
    """
    if port.mtu is not None:
        return port.mtu
    if seen.bridge is None:
        raise Failure(
            Status.REFUSED,
            f"the MTU of {quote(port.bridge)} cannot be told",
            "it has no interface in this network namespace",
            f"give network {quote(port.network)} an mtu of its own",
        )
    return seen.bridge.mtu


def target_vids(port: Port, bridge: Link) -> tuple[Vid, ...] | None:
    """Return the VIDs that the port shall have on a Linux bridge, None where it filters none.

    Raises Failure (71) where the bridge cannot do what the policy says.
    """
    if not bridge.vlan_filtering:
        if port.vlan is None:
            return None
        raise Failure(
            Status.REFUSED,
            f"{quote(bridge.name)} does not filter VLANs",
            f"vlan {show_vlan(port.vlan)} is wanted",
            f"turn it on: {_set_bridge(bridge.name, 'vlan_filtering', 1)}"
            if bridge.vlan_filtering is not None
            else "this kernel cannot (CONFIG_BRIDGE_VLAN_FILTERING)",
        )
    if port.vlan is not None:
        return wanted_vids(port.vlan)
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
    return sh("ip", "link", "set", "dev", bridge, "type", "bridge", setting, str(value))


def plan_up(port: Port, kind: Kind, seen: Seen, stamp: Stamp, here: Here) -> Plan:
    """Return the steps that attach the tap of `seen` as `port` wants it.

    Isolation comes before connectivity: it joins while it is down, and comes up when all is
    proven. Raises Failure (71) where the switch cannot do what is wanted.
    """
    tap = seen.tap
    assert tap is not None  # refuse_strangers came before
    name, index = tap.name, tap.index
    refuse_down(port, kind, seen.bridge)
    mtu = target_mtu(port, seen)
    mark = SetAlias(name, index, format_alias(stamp))
    leave = plan_leave(seen, here)
    # NOTE: wherever this ends, the tap carries a mark that tells where it is now: an older one of
    # ours stays until it has left that place.
    plan: list[Op] = [mark, *leave] if tap.stamp is None else [*leave, mark]
    if host_mac(tap.mac) != tap.mac:
        plan.append(SetMac(name, index, host_mac(tap.mac)))
    plan.append(SetMtu(name, index, mtu))
    if port.txqueuelen is not None:
        plan.append(SetTxQueueLen(name, index, port.txqueuelen))
    plan += _no_address(tap, seen, mtu)
    if kind == "linux":
        bridge = seen.bridge
        assert bridge is not None  # find_kind saw it
        vids = _linux_vids(port, bridge)
        plan.append(JoinBridge(name, index, bridge.name, bridge.index))
        if vids is not None:
            plan.append(SetVlans(name, index, vids))
        if port.isolated:
            plan.append(SetIsolated(name, index, True))
    else:
        plan.append(
            AddPort(
                port.ovsdb,
                port.bridge,
                name,
                index,
                port.vlan,
                port.isolated,
                _wanted_ids(port, stamp, index, here),
            )
        )
    plan += [Prove(name, up=False), SetUp(name, index), Prove(name, up=True)]
    return tuple(plan)


ADDRESS_MAY_COME = "the host's end may get an IPv6 address, by which its guest reaches the host"
UNWRITABLE = "what is below /proc/sys/net cannot be written"
OF_CONTAINER = (
    "have whoever starts this container give it --sysctl net.ipv6.conf.default.disable_ipv6=1"
)
"""What keeps one away where that is why."""


def gets_address(tap: Link) -> bool | None:
    """Tell whether the host's end may get an IPv6 address, None where it has no IPv6."""
    if tap.ipv6_disabled is None:
        return None
    # NOTE: without a master, on Open vSwitch's userspace datapath, the host takes in its frames as
    # well, and a guest's router advertisement gives an address whatever the mode.
    return not tap.ipv6_disabled and (tap.addrgenmode != NO_ADDRESS or tap.master is None)


def _no_address(tap: Link, seen: Seen, mtu: int) -> tuple[SetIpv6, ...]:
    """Return the step after which the host's end, with this MTU in bytes, gets no IPv6 address."""
    # NOTE: a link has IPv6 while its MTU is 1280 at least.
    hidden = tap.ipv6_disabled is None and tap.mtu < IPV6_MTU_MIN
    if mtu < IPV6_MTU_MIN or (tap.ipv6_disabled is None and not hidden):
        return ()
    disabled = True if seen.sysctl and not tap.ipv6_disabled else None
    mode = NO_ADDRESS if tap.addrgenmode != NO_ADDRESS else None
    return _set_ipv6(tap, disabled, mode)


def _set_ipv6(tap: Link, disabled: bool | None, mode: int | None) -> tuple[SetIpv6, ...]:
    if disabled is None and mode is None:
        return ()
    return (SetIpv6(tap.name, tap.index, disabled, mode),)


def _linux_vids(port: Port, bridge: Link) -> tuple[Vid, ...] | None:
    """Return the VIDs on a Linux bridge as target_vids; raise Failure (71) for external_ids too."""
    if port.external_ids:
        raise Failure(
            Status.REFUSED,
            f"{quote(port.bridge)} is a Linux bridge",
            "it has no place for external_ids",
            f"take external_ids: from network {quote(port.network)}, or from its rule",
        )
    return target_vids(port, bridge)


def _wanted_ids(port: Port, stamp: Stamp, index: int, here: Here) -> tuple[tuple[str, str], ...]:
    ids = {**dict(port.external_ids), **row_ids(stamp, index, here)}
    return tuple(sorted(ids.items()))


def is_in_place(port: Port, kind: Kind, seen: Seen, here: Here) -> bool:
    """Tell whether the tap is on the wanted bridge already, and its port there is whole.

    What is not has to be attached anew: the settings of a port that is can be changed where it is.
    """
    tap, master = seen.tap, seen.master
    rows = seen.our_rows(here)
    if tap is None:
        return False
    if kind == "linux":
        return (
            master is not None
            and seen.bridge is not None
            and master.index == seen.bridge.index
            and is_our_master(seen, master)
            and not rows
        )
    return (
        (master is None or master.kind == "openvswitch")
        and [(row.ovsdb, row.bridge, row.ifindex, row.error) for row in rows]
        == [(port.ovsdb, port.bridge, tap.index, None)]
        and rows[0].is_of(tap.index, here)
        and rows[0].ofport is not None
        and rows[0].ofport > 0
    )


def plan_change(port: Port, kind: Kind, seen: Seen, stamp: Stamp, here: Here) -> Plan:
    """Return the steps that make a running guest's tap what `port` wants; none where it is so.

    A tap that is elsewhere is attached anew, as by plan_up. On its own bridge it changes where it
    is: its link goes down for another VLAN, so that no frame is in a wrong one, and for nothing
    else. Raises Failure (71) where the switch cannot do what is wanted.
    """
    if not is_in_place(port, kind, seen, here):
        return plan_up(port, kind, seen, stamp, here)
    tap = seen.tap
    assert tap is not None  # it is in place
    name, index = tap.name, tap.index
    refuse_down(port, kind, seen.bridge)
    mtu = target_mtu(port, seen)
    plan: list[Op] = []
    if tap.stamp != stamp:
        plan.append(SetAlias(name, index, format_alias(stamp)))
    if host_mac(tap.mac) != tap.mac:
        plan.append(SetMac(name, index, host_mac(tap.mac)))
    if tap.mtu != mtu:
        plan.append(SetMtu(name, index, mtu))
    if port.txqueuelen not in (None, tap.txqueuelen):
        assert port.txqueuelen is not None
        plan.append(SetTxQueueLen(name, index, port.txqueuelen))
    if gets_address(tap) is not False:
        plan += _no_address(tap, seen, mtu)
    if kind == "linux":
        assert seen.bridge is not None  # it is in place
        vids = _linux_vids(port, seen.bridge)
        moves = vids is not None and vids != tuple(sorted(seen.vids))
        if moves and vids is not None:
            plan.append(SetVlans(name, index, vids))
        if port.isolated != bool(tap.isolated):
            plan.append(SetIsolated(name, index, port.isolated))
    else:
        row = seen.our_rows(here)[0]
        columns = vlan_columns(port.vlan)
        moves = columns != (row.vlan_mode, row.tag, row.trunks)
        ids = _wanted_ids(port, stamp, index, here)
        known = set(ids) <= set(row.external_ids)
        if moves or port.isolated != row.protected or not row.transient or not known:
            plan.append(
                SetPort(port.ovsdb, name, row.external_ids, *columns, port.isolated, True, ids)
            )
    if moves and tap.up:
        plan.insert(0, SetDown(name, index))
    if moves or not tap.up:
        plan += [Prove(name, up=False), SetUp(name, index)]
    return (*plan, Prove(name, up=True)) if plan else ()


def del_port(port: OvsPort) -> DelPort:
    """Return the op that deletes the port seen."""
    return DelPort(port.ovsdb, port.bridge, port.name, port.external_ids)


def plan_leave(seen: Seen, here: Here) -> tuple[Step, ...]:
    """Return the steps that take down a tap and take it from where we had put it.

    A tap that somebody else has moved to another bridge since stays there, as it is.
    The Open vSwitch port is deleted and let go by vswitchd before anything is added: on the
    userspace datapath a port that is replaced in one transaction passes no frames.
    """
    plan: list[Step] = []
    tap, master = seen.tap, seen.master
    taken = master is not None and not is_ours_to_leave(seen, master)
    if tap is not None and tap.up and not taken:
        plan.append(SetDown(tap.name, tap.index))
    rows = seen.our_rows(here)
    plan += map(del_port, rows)
    if rows and tap is not None and not taken:
        # NOTE: ovs-vswitchd takes PROMISC from the link that it lets go, by writing all the flags
        # that it remembers, and may not have heard yet that the link is down.
        plan.append(SetDown(tap.name, tap.index))
    if tap is not None and master is not None and master.kind == "bridge" and not taken:
        plan.append(LeaveBridge(tap.name, tap.index, master.name))
    return tuple(plan)


def plan_leaving(seen: Seen, here: Here) -> tuple[Step, ...]:
    """Return the steps that take away what of a tap carries our mark, and touch nothing else.

    Where it is still attached it is taken from there and is what it was before.
    """
    tap, master = seen.tap, seen.master
    rows = seen.our_rows(here)
    if tap is None or tap.stamp is None:
        return tuple(map(del_port, rows))
    if not rows and (master is None or not is_our_master(seen, master)):
        return (SetAlias(tap.name, tap.index, ""),)
    return (*plan_leave(seen, here), *plan_given_back(seen))


def plan_undo(before: Seen, now: Seen, here: Here, *, again: bool = False) -> tuple[Step, ...]:
    """Return the steps from `now` back to a tap that is down, attached nowhere, and as it was.

    One that had a mark of ours is what it was before that, but where it is to be attached `again`:
    its guest runs. One of our making keeps the mark, which tells whose it is.
    """
    tap, old = now.tap, before.tap
    assert old is not None
    if tap is None or tap.index != old.index:
        return tuple(
            del_port(port) for port in now.ports if port.ours and port.is_of(old.index, here)
        )
    plan = [*plan_leave(now, here), *_settings_back(before if again else _as_it_was(before), now)]
    alias = old.alias if old.stamp is not None and old.stamp.made else ""
    if tap.alias != alias:
        plan.append(SetAlias(tap.name, tap.index, alias))
    return tuple(plan)


def _settings_back(before: Seen, now: Seen) -> list[Step]:
    """Return the steps that give the link itself the settings that it had."""
    tap, old = now.tap, before.tap
    assert tap is not None and old is not None
    plan: list[Step] = []
    if tap.mac != old.mac:
        plan.append(SetMac(tap.name, tap.index, old.mac))
    if tap.mtu != old.mtu:
        plan.append(SetMtu(tap.name, tap.index, old.mtu))
    if tap.txqueuelen != old.txqueuelen:
        plan.append(SetTxQueueLen(tap.name, tap.index, old.txqueuelen))
    plan += _set_ipv6(
        tap,
        old.ipv6_disabled if old.ipv6_disabled != tap.ipv6_disabled and now.sysctl else None,
        old.addrgenmode if old.addrgenmode != tap.addrgenmode else None,
    )
    return plan


def was_before(before: Seen) -> Was | None:
    """Return what the mark is to say of a persistent tap as it was `before`; None of another."""
    tap = before.tap
    if tap is None or not tap.persistent:
        return None
    if tap.stamp is not None:
        return tap.stamp.was
    return Was(
        tap.mtu, tap.txqueuelen, tap.mac[:2], tap.ipv6_disabled is False, tap.addrgenmode, tap.up
    )


def plan_was(now: Seen) -> tuple[Step, ...]:
    """Return the steps that give a persistent tap the settings that its mark says it had."""
    return tuple(_settings_back(_as_it_was(now), now)) if now.tap is not None else ()


def plan_given_back(now: Seen) -> tuple[Step, ...]:
    """Return the steps that give a tap of ours, which has left its bridge, back as it was.

    Its mark goes, and its link comes up last: one with our mark that is up has lost its bridge.
    """
    tap, master = now.tap, now.master
    assert tap is not None
    mark = SetAlias(tap.name, tap.index, "")
    was = tap.stamp.was if tap.stamp is not None else None
    taken = master is not None and not is_our_master(now, master)
    up = [SetUp(tap.name, tap.index)] if was is not None and was.up and not taken else []
    return (*plan_was(now), mark, *up)


def _as_it_was(seen: Seen) -> Seen:
    """Return what was seen, a persistent tap of ours with the settings that it had before."""
    tap = seen.tap
    was = tap.stamp.was if tap is not None and tap.stamp is not None else None
    if tap is None or was is None:
        return seen
    # NOTE: what a too small MTU took comes back with the kernel's defaults.
    has_ipv6 = tap.ipv6_disabled is not None or tap.mtu < IPV6_MTU_MIN <= was.mtu
    old = replace(
        tap,
        mtu=was.mtu,
        txqueuelen=was.txqueuelen,
        mac=was.mac + tap.mac[2:] if tap.mac.startswith("fe:") else tap.mac,
        ipv6_disabled=not was.ipv6 if has_ipv6 else None,
        addrgenmode=was.addrgenmode if was.addrgenmode is not None else tap.addrgenmode,
    )
    return replace(seen, tap=old)


def plan_back(port: Port, before: Seen, now: Seen, here: Here) -> tuple[Step, ...]:
    """Return the steps from `now` back to a tap that is attached as it was `before`.

    `port` is what a change wanted that has failed half-way.
    """
    tap, old = now.tap, before.tap
    assert old is not None
    if tap is None or tap.index != old.index:
        return plan_undo(before, now, here)
    name, index = tap.name, tap.index
    rows, rows_now = (
        [row for row in seen.ports if row.ours and row.is_of(index, here)] for seen in (before, now)
    )
    moved = (tap.master != old.master and _is_bridge(before.master, now.master)) or [
        (row.ovsdb, row.bridge) for row in rows
    ] != [(row.ovsdb, row.bridge) for row in rows_now]
    plan: list[Step] = []
    if moved:
        plan += plan_leave(now, here)
    elif tap.up and (
        before.vids != now.vids or list(map(_columns, rows)) != list(map(_columns, rows_now))
    ):
        plan.append(SetDown(name, index))
    # NOTE: a tap that had no mark keeps ours until it is where it was.
    if old.alias and tap.alias != old.alias:
        plan.append(SetAlias(name, index, old.alias))
    plan += _settings_back(before, now)
    if moved and before.master is not None and before.master.kind == "bridge":
        plan.append(JoinBridge(name, index, before.master.name, before.master.index))
        if before.master.vlan_filtering:
            plan.append(SetVlans(name, index, before.vids))
        if old.isolated:
            plan.append(SetIsolated(name, index, True))
    elif not moved:
        if before.vids != now.vids:
            plan.append(SetVlans(name, index, before.vids))
        if old.isolated is not None and tap.isolated != old.isolated:
            plan.append(SetIsolated(name, index, old.isolated))
    plan += _rows_back(port, index, rows, [] if moved else rows_now)
    if not old.alias and tap.alias:
        plan.append(SetAlias(name, index, ""))
    is_up = tap.up and SetDown(name, index) not in plan
    if old.up and not is_up:
        plan.append(SetUp(name, index))
    elif is_up and not old.up:
        plan.append(SetDown(name, index))
    return tuple(plan)


def _is_bridge(*links: Link | None) -> bool:
    """Tell whether one of the links is a Linux bridge: other masters are not ours to set."""
    return any(link is not None and link.kind == "bridge" for link in links)


def _columns(row: OvsPort) -> tuple[str | None, int | None, tuple[int, ...]]:
    return row.vlan_mode, row.tag, row.trunks


def _rows_back(port: Port, index: int, rows: list[OvsPort], rows_now: list[OvsPort]) -> list[Step]:
    """Return the steps that give a tap the rows that it had."""
    plan: list[Step] = []
    for row in rows:
        now = next((each for each in rows_now if each.ovsdb == row.ovsdb), None)
        if now is None:
            # NOTE: it is down, and gets the very columns before it comes up.
            vlan = vlan_of_columns(row)
            assert row.bridge is not None
            plan.append(
                AddPort(
                    row.ovsdb, row.bridge, row.name, index, vlan, row.protected, row.external_ids
                )
            )
            exact = vlan_columns(vlan) == _columns(row) and row.transient
            seen, extra = row.external_ids, set[str]()
        else:
            ours = {*OUR_KEYS, *dict(port.external_ids)}
            seen, extra = now.external_ids, (now.ids.keys() - row.ids.keys()) & ours
            exact = (
                _columns(now) == _columns(row)
                and now.protected == row.protected
                and now.transient == row.transient
                and not extra
                and set(row.external_ids) <= set(now.external_ids)
            )
        if not exact:
            plan.append(
                SetPort(
                    row.ovsdb,
                    row.name,
                    seen,
                    *_columns(row),
                    row.protected,
                    row.transient,
                    row.external_ids,
                    tuple(sorted(extra)),
                )
            )
    return plan


def differences(port: Port, kind: Kind, seen: Seen, *, up: bool) -> tuple[Difference, ...]:
    """Return what of the tap is not as `port` wants it; `up`: its link's state counts too.

    What differs because the policy cannot be had on this bridge is a difference as well.
    """
    tap = seen.tap
    if tap is None:
        return (Difference("tap", "there", "gone"),)
    found: list[Difference] = []

    def compare(setting: str, wanted: object, is_now: object) -> None:
        if wanted != is_now:
            found.append(Difference(setting, _word(wanted), _word(is_now)))

    if kind == "linux":
        compare("bridge", port.bridge, seen.master.name if seen.master else None)
    else:
        _compare_port(port, seen, tap, compare, up=up)
    if port.mtu is not None or seen.bridge is not None:
        compare("mtu", target_mtu(port, seen), tap.mtu)
    if port.txqueuelen is not None:
        compare("txqueuelen", port.txqueuelen, tap.txqueuelen)
    compare("mac", host_mac(tap.mac), tap.mac)
    if gets_address(tap):
        compare(IPV6, True, tap.ipv6_disabled)
    if kind == "linux" and seen.bridge is not None and seen.master is not None:
        try:
            vids = target_vids(port, seen.bridge)
        except Failure as failure:
            found.append(
                Difference("vlan", show_vlan(port.vlan), show_vids(seen.vids), str(failure))
            )
        else:
            if vids is not None and vids != tuple(sorted(seen.vids)):
                wanted = show_vlan(vlan_of_vids(vids))
                found.append(Difference("vlan", wanted, show_vids(seen.vids)))
        compare("isolated", port.isolated, bool(tap.isolated))
        compare("bridge link", "up", "up" if seen.bridge.up else "down")
    if up:
        compare("link", "up", "up" if tap.up else "down")
    return tuple(found)


def _compare_port(port: Port, seen: Seen, tap: Link, compare: object, *, up: bool) -> None:
    assert callable(compare)
    rows = [row for row in seen.ports if row.ovsdb == port.ovsdb]
    if not rows:
        compare("bridge", port.bridge, None)
        return
    row = rows[0]
    compare("bridge", port.bridge, row.bridge)
    if (row.vlan_mode, row.tag, row.trunks) != vlan_columns(port.vlan):
        found = show_vlan(vlan_of_columns(row))
        if found == show_vlan(port.vlan):
            found += f" (vlan_mode {row.vlan_mode or 'empty'}"
            found += f", trunks {','.join(map(str, row.trunks))})" if row.trunks else ")"
        compare("vlan", show_vlan(port.vlan), found)
    compare("isolated", port.isolated, row.protected)
    # NOTE: only what the policy gives: others (ovn-controller) add keys of their own to the row.
    given = {key: row.ids[key] for key, _ in port.external_ids if key in row.ids}
    compare("external_ids", dict(port.external_ids), given)
    compare("our mark", True, row.ours)
    compare("transient", True, row.transient)
    compare("error", None, row.error)
    compare("ofport", True, row.ofport is not None and row.ofport > 0)
    compare("ifindex", tap.index, row.ifindex)
    if up and tap.carrier:
        compare("link_state", "up", row.link_state)


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


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, dict):
        return " ".join(f"{key}={value[key]}" for key in sorted(value)) or "none"
    return str(value)


def check_bridge_mtu(port: Port, kind: Kind, before: Seen, now: Seen) -> None:
    """Raise Failure (71) where the tap has lowered the bridge's own MTU."""
    if before.bridge is None or now.bridge is None or now.bridge.mtu >= before.bridge.mtu:
        return
    was = before.bridge.mtu
    # NOTE: the kernel takes a link's own MTU for no change, and pins nothing (dev_set_mtu_ext).
    pin = (
        all_of(
            *(
                sh("ip", "link", "set", "dev", port.bridge, "mtu", str(mtu))
                for mtu in (was - 1, was)
            )
        )
        if kind == "linux"
        else vsctl(_shortest(port.ovsdb), ("set", "interface", port.bridge, f"mtu_request={was}"))
    )
    raise Failure(
        Status.REFUSED,
        f"the tap's MTU would lower that of {quote(port.bridge)} from {was} to {now.bridge.mtu}",
        "its other ports would lose longer frames",
        f"pin it: {pin}",
    )


def commands(op: Op) -> tuple[Command, ...]:
    """Return the shell commands that do what `op` does, as an administrator would type them."""
    if isinstance(op, SetAlias):
        return (_set_link(op.tap, "alias", op.alias),)
    if isinstance(op, SetDown):
        return (_set_link(op.tap, "down"),)
    if isinstance(op, SetUp):
        return (_set_link(op.tap, "up"),)
    if isinstance(op, SetMac):
        return (_set_link(op.tap, "address", op.mac),)
    if isinstance(op, SetMtu):
        return (_set_link(op.tap, "mtu", str(op.mtu)),)
    if isinstance(op, SetTxQueueLen):
        return (_set_link(op.tap, "txqueuelen", str(op.length)),)
    if isinstance(op, SetIpv6):
        return _ipv6_commands(op)
    if isinstance(op, JoinBridge):
        return (_set_link(op.tap, "master", op.bridge),)
    if isinstance(op, LeaveBridge):
        return (_set_link(op.tap, "nomaster"),)
    if isinstance(op, SetVlans):
        return (
            sh("bridge", "vlan", "del", "dev", op.tap, "vid", "1-4094"),
            *(
                sh("bridge", "vlan", "add", "dev", op.tap, "vid", *words)
                for words in _vid_words(op.vids)
            ),
        )
    if isinstance(op, SetIsolated):
        state = "on" if op.isolated else "off"
        return (sh("bridge", "link", "set", "dev", op.tap, "isolated", state),)
    if isinstance(op, DelTap):
        return (sh("ip", "link", "del", "dev", op.tap),)
    if isinstance(op, AddPort):
        return (_add_port_command(op),)
    if isinstance(op, DelPort):
        return (vsctl(op.ovsdb, ("--if-exists", "del-port", op.tap)),)
    if isinstance(op, SetPort):
        return (_set_port_command(op),)
    return (sh("ip", "-d", "link", "show", "dev", op.tap),)


def _ipv6_commands(op: SetIpv6) -> tuple[Command, ...]:
    lines = []
    if op.addrgenmode is not None:
        known = op.addrgenmode < len(ADDRGENMODES)
        mode = ADDRGENMODES[op.addrgenmode] if known else str(op.addrgenmode)
        lines.append(_set_link(op.tap, "addrgenmode", mode))
    if op.disabled is not None:
        path = f"/proc/sys/net/ipv6/conf/{op.tap}/disable_ipv6"
        lines.append(write(str(int(op.disabled)), path))
    return tuple(lines)


def _set_link(tap: str, *words: str) -> Command:
    return sh("ip", "link", "set", "dev", tap, *words)


def _vid_words(vids: tuple[Vid, ...]) -> list[list[str]]:
    words = []
    for pvid, untagged in sorted({(vid.pvid, vid.untagged) for vid in vids}, reverse=True):
        flags = [*(["pvid"] if pvid else []), *(["untagged"] if untagged else [])]
        alike = (vid.vid for vid in vids if (vid.pvid, vid.untagged) == (pvid, untagged))
        words += [[f"{a}" if a == b else f"{a}-{b}", *flags] for a, b in ranges(alike)]
    return words


def _add_port_command(op: AddPort) -> Command:
    mode, tag, trunks = vlan_columns(op.vlan)
    columns = [f"vlan_mode={mode}"]
    if tag is not None:
        columns.append(f"tag={tag}")
    if trunks:
        columns.append("trunks=" + ",".join(map(str, trunks)))
    columns.append(f"protected={'true' if op.protected else 'false'}")
    columns.append("other_config:transient=true")
    return vsctl(
        op.ovsdb,
        ("add-port", op.bridge, op.tap, *columns),
        ("set", "interface", op.tap, *_ids(op.external_ids)),
    )


def _set_port_command(op: SetPort) -> Command:
    words = [
        f"vlan_mode={op.vlan_mode or '[]'}",
        f"tag={'[]' if op.tag is None else op.tag}",
        "trunks=" + (",".join(map(str, op.trunks)) or "[]"),
        f"protected={'true' if op.protected else 'false'}",
    ]
    words += ["other_config:transient=true"] if op.transient else []
    steps = [("set", "port", op.tap, *words)]
    if op.external_ids:
        steps.append(("set", "interface", op.tap, *_ids(op.external_ids)))
    if not op.transient:
        steps.append(("remove", "port", op.tap, "other_config", "transient"))
    for key in op.without:
        steps.append(("remove", "interface", op.tap, "external_ids", ovs_value(key)))
    return vsctl(op.ovsdb, *steps)


def _ids(pairs: tuple[tuple[str, str], ...]) -> list[str]:
    return [f"external_ids:{ovs_value(key)}={ovs_value(value)}" for key, value in pairs]
