"""What is: the live system around one tap, as values. `kinds.look` and `Host` fill them in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyqemu_ifconf.policy import Vlan
from pyqemu_ifconf.shell import readable
from pyqemu_ifup import mark as marks
from pyqemu_ifup.mark import Here, Mark


@dataclass(frozen=True, order=True)
class Vid:
    """One VID of a bridge port, as `bridge vlan show` has it."""

    vid: int
    pvid: bool = False
    untagged: bool = False


@dataclass(frozen=True)
class Link:
    """A network interface, as rtnetlink(7) gives it.

    `kind` is IFLA_INFO_KIND ("tun", "bridge", "openvswitch" ...), None for a real network card;
    `tap` tells a tap from a tun. `carrier` is a tap's while a process holds it. `vlan_filtering`
    and `default_pvid` (0: none) are a bridge's, None elsewhere and where the kernel has no VLAN
    filtering; `isolated` is a bridge port's. `owner` and `group` are the uid (TUNSETOWNER) and gid
    (TUNSETGROUP) that may open a tap, without both anybody may; a `multi_queue` one may be opened
    while somebody has it, and has so many `queues`. `stp`, `forward_delay` (hundredths of a
    second) and `calls_iptables`, whether it by itself has frames go through iptables, are a
    bridge's. `ipv6_disabled` and `addrgenmode` (IN6_ADDR_GEN_MODE_* of linux/if_link.h) are a
    tap's or a bridge's, None where it or the kernel has no IPv6. `under` is the ifindex of the link
    that it is made on, as a VLAN device, whose VLAN is `vid`, with tags of `protocol` (ETH_P_* of
    linux/if_ether.h); one that `reorders` takes the tag off what comes in. `altnames` are the other
    names that the kernel knows it by. `flags` are IFF_* of linux/if.h, `group_number` that of
    ip-link(8)'s `group`. `data` is IFLA_INFO_DATA of a kind that has none of the above.
    """

    index: int
    name: str
    kind: str | None
    tap: bool
    up: bool
    mtu: int
    mac: str
    txqueuelen: int
    master: int | None
    alias: str
    carrier: bool
    vlan_filtering: bool | None = None
    default_pvid: int | None = None
    isolated: bool | None = None
    owner: int | None = None
    group: int | None = None
    persistent: bool = False
    multi_queue: bool = False
    queues: int = 0
    stp: bool | None = None
    forward_delay: int | None = None
    calls_iptables: bool | None = None
    ipv6_disabled: bool | None = None
    addrgenmode: int | None = None
    under: int | None = None
    vid: int | None = None
    altnames: tuple[str, ...] = ()
    protocol: int | None = None
    reorders: bool | None = None
    flags: int = 0
    group_number: int = 0
    data: bytes = b""

    @property
    def mark(self) -> Mark | None:
        """Our mark on it, None where there is none."""
        return marks.parse_alias(self.alias)

    @property
    def given_away(self) -> bool:
        """Whether a tap of our making, which is root's, has been given another owner.

        Whoever holds a tap can do that (TUNSETOWNER), and none at all lets anybody open it. No
        other link of our making has an owner.
        """
        mark = self.mark
        return mark is not None and mark.made and self.tap and self.owner != 0


@dataclass(frozen=True)
class Counters:
    """What has passed a link since it came, from the host's point of view."""

    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int
    rx_dropped: int
    tx_dropped: int

    @property
    def turned(self) -> Counters:
        """The same from the other end's point of view."""
        return Counters(
            self.tx_packets,
            self.rx_packets,
            self.tx_bytes,
            self.rx_bytes,
            self.tx_dropped,
            self.rx_dropped,
        )


@dataclass(frozen=True)
class OvsPort:
    """A Port and its Interface row, of one OVSDB.

    `bridge` is None where no bridge holds the port. Columns that may be empty are None or empty.
    `internal`: its link is this host's own, and made by Open vSwitch: on the userspace datapath it
    is a tap, and no guest's.
    """

    ovsdb: str
    bridge: str | None
    name: str
    tag: int | None
    trunks: tuple[int, ...]
    vlan_mode: str | None
    protected: bool
    transient: bool
    external_ids: tuple[tuple[str, str], ...]
    ofport: int | None
    error: str | None
    ifindex: int | None
    link_state: str | None
    internal: bool = False

    @property
    def ids(self) -> dict[str, str]:
        """The Interface row's external_ids."""
        return dict(self.external_ids)

    @property
    def ours(self) -> bool:
        """Whether the row carries our mark; one of another version is not ours to judge."""
        return self.ids.get(marks.KEY_VERSION) == marks.VERSION

    @property
    def owner(self) -> str:
        """Who holds the port, for a message: "bridge br-int of unix:..., vm web1"."""
        place = f"bridge {readable(self.bridge)}" if self.bridge else "no bridge"
        vm = self.ids.get(marks.KEY_VM_NAME)
        return f"{place} of {readable(self.ovsdb)}" + (f", vm {readable(vm)}" if vm else "")

    def is_elsewhere(self, here: Here) -> bool:
        """Tell whether the row belongs to another network namespace, so not ours to judge.

        A row of an earlier boot is judged where the database is this host's own.
        """
        ids = self.ids
        if ids.get(marks.KEY_BOOT_ID) == here.boot_id:
            return ids.get(marks.KEY_NETNS) != here.netns
        return not is_local(self.ovsdb)

    def is_of(self, ifindex: int, here: Here) -> bool:
        """Tell whether the row was made for the interface with this index."""
        ids = self.ids
        return (
            ids.get(marks.KEY_BOOT_ID) == here.boot_id
            and ids.get(marks.KEY_NETNS) == here.netns
            and ids.get(marks.KEY_IFINDEX) == str(ifindex)
        )


@dataclass(frozen=True)
class OvsBridge:
    """A Bridge row: whether it runs the spanning tree protocol, and whether its MAC is set."""

    ovsdb: str
    name: str
    stp: bool
    pinned: bool


@dataclass(frozen=True)
class OvsSwitch:
    """What one database says of its Open vSwitch.

    `version` is the one that ovs-ctl has noted at its start, None where nothing has. `behind`:
    ovs-vswitchd has not taken in the whole configuration yet.
    """

    ovsdb: str
    version: str | None
    behind: bool
    bridges: tuple[OvsBridge, ...]


def has_networks(links: Iterable[Link]) -> bool:
    """Tell whether bridges are among the links that were made for taps."""
    return any(link.alias.startswith(marks.BRIDGE_MARK) for link in links)


def is_local(ovsdb: str) -> bool:
    """Tell whether a database address can only be this host's."""
    return ovsdb.startswith(("unix:", "tcp:127.", "tcp:[::1]:", "tcp:localhost:"))


FRESH = Link(
    index=0,
    name="",
    kind="tun",
    tap=True,
    up=False,
    mtu=1500,
    mac="",
    txqueuelen=1000,
    master=None,
    alias="",
    carrier=False,
)
"""A tap as QEMU makes it; its index and its MAC are the kernel's to choose."""


@dataclass(frozen=True)
class Seen:
    """One look at a tap and what is about it.

    `tap` is None where there is no such link. `bridge` is the link that has the wanted bridge's
    name, `vids` the tap's own on a Linux bridge, `ports` every row of the tap's name in the
    databases looked at, and `ovs_bridges` those databases which have a bridge of the wanted name.
    `own` is what a kind that makes its links sees of the port beside, `above` the master of the
    link that `bridge` is. `other_name_of` is the link that has the wanted bridge's name as an
    alternative one, empty where there is none. `sysctl`: what is below /proc/sys/net can be
    written here.
    """

    tap: Link | None
    master: Link | None = None
    bridge: Link | None = None
    vids: tuple[Vid, ...] = ()
    ports: tuple[OvsPort, ...] = ()
    ovs_bridges: tuple[str, ...] = ()
    sysctl: bool = True
    other_name_of: str = ""
    own: object = None
    above: str = ""

    def our_rows(self, here: Here) -> list[OvsPort]:
        """Return those of `ports` that are ours to judge, from this network namespace."""
        return [port for port in self.ports if port.ours and not port.is_elsewhere(here)]


def wanted_vids(vlan: Vlan) -> tuple[Vid, ...]:
    """Return the VIDs of a Linux bridge port for `vlan`: the native one is PVID and untagged."""
    vids = {vid: Vid(vid) for vid in vlan.trunk}
    if vlan.native is not None:
        vids[vlan.native] = Vid(vlan.native, pvid=True, untagged=True)
    return tuple(sorted(vids.values()))


def vlan_of_vids(vids: Iterable[Vid]) -> Vlan | None:
    """Return the Vlan that a Linux bridge port's VIDs amount to, None for no VID at all."""
    native = next((v.vid for v in vids if v.pvid and v.untagged), None)
    trunk = tuple(sorted(v.vid for v in vids if v.vid != native))
    return Vlan(native, trunk) if native is not None or trunk else None


def ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as inclusive ranges."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def spans(numbers: Iterable[int]) -> list[str]:
    """Return ascending numbers as `20` and `30-39`."""
    return [str(a) if a == b else f"{a}-{b}" for a, b in ranges(numbers)]


def show_vlan(vlan: Vlan | None) -> str:
    """Return a VLAN as a person reads it: `none`, `100`, `trunk 20,30-39`, `native 10 trunk 20`."""
    if vlan is None:
        return "none"
    if vlan.takes_all:
        return "any"
    trunk = ",".join(spans(vlan.trunk))
    if vlan.native is None:
        return f"trunk {trunk}"
    return f"native {vlan.native} trunk {trunk}" if trunk else str(vlan.native)
