"""Taps as ports of an Open vSwitch bridge: ovs-vswitchd.conf.db(5).

What is said to the database itself is the driver's, which is imported when one is opened.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.base import Place
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB, BridgePlace
from pyqemu_ifconf.kinds.openvswitch import SPEC, OvsPlace
from pyqemu_ifconf.policy import Kind as KindName
from pyqemu_ifconf.policy import Port, Vlan
from pyqemu_ifconf.shell import Command, joined, output, ovs_value, piped, quote, sh, vsctl
from pyqemu_ifup.kinds.base import Difference, Leftover, differing, host_mac
from pyqemu_ifup.look import Link, OvsPort, Seen, show_vlan
from pyqemu_ifup.mark import KEY_BOOT_ID, KEY_IFINDEX, OUR_KEYS, Here, Mark, row_ids
from pyqemu_ifup.ops import Op, Plan, SetDown
from pyqemu_ifup.system.process import read_number

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.ovsdb import Database
    from pyqemu_ifup.host import Host

name: KindName = SPEC.name
title = SPEC.title
INDEX_MAX = (1 << 31) - 1
"""The greatest ifindex."""
has_link = False
master_kind = "openvswitch"
takes_over = False
lingers = True


@dataclass(frozen=True)
class AddPort:
    """Add the port in one transaction, every column that we own set."""

    opens: ClassVar[bool] = False
    told: ClassVar[bool] = True
    blind: ClassVar[bool] = False
    ovsdb: str
    bridge: str
    port: str
    index: int
    vlan: Vlan | None
    protected: bool
    external_ids: tuple[tuple[str, str], ...]

    @property
    def columns(self) -> tuple[str, int | None, tuple[int, ...]]:
        """Its vlan_mode, tag and trunks."""
        return vlan_columns(self.vlan)

    def commands(self) -> tuple[Command, ...]:
        """Return what ovs-vsctl(8) is told."""
        mode, tag, trunks = self.columns
        columns = [f"vlan_mode={mode}"]
        if tag is not None:
            columns.append(f"tag={tag}")
        if trunks:
            columns.append("trunks=" + ",".join(map(str, trunks)))
        columns.append(f"protected={'true' if self.protected else 'false'}")
        columns.append("other_config:transient=true")
        return (
            vsctl(
                self.ovsdb,
                ("add-port", self.bridge, self.port, *columns),
                ("set", "interface", self.port, *_ids(self.external_ids)),
            ),
        )

    def commands_of_new(self) -> tuple[Command, ...]:
        """Return the same, but that a command of its own sets the ifindex."""
        ids = tuple(pair for pair in self.external_ids if pair[0] != KEY_IFINDEX)
        own = piped(sh("ip", "-o", "link", "show", "dev", self.port), sh("cut", "-d:", "-f1"))
        index = joined(f"external_ids:{KEY_IFINDEX}=", output(own))
        return (
            *replace(self, external_ids=ids).commands(),
            vsctl(self.ovsdb, ("set", "interface", self.port, index)),
        )

    async def run(self, host: Host) -> None:
        """Add it, and wait until ovs-vswitchd has taken it in. Raises Failure as `add_port`."""
        await host.databases[self.ovsdb].add_port(self, host.deadline)


@dataclass(frozen=True)
class DelPort:
    """Delete the port that was seen, and wait until ovs-vswitchd let it go.

    `external_ids` are its Interface row's, our mark among them: another port that took its name
    meanwhile is left alone.
    """

    opens: ClassVar[bool] = False
    told: ClassVar[bool] = False
    blind: ClassVar[bool] = False
    ovsdb: str
    bridge: str | None
    port: str
    external_ids: tuple[tuple[str, str], ...]

    def commands(self) -> tuple[Command, ...]:
        """Return what ovs-vsctl(8) is told."""
        return (vsctl(self.ovsdb, ("--if-exists", "del-port", self.port)),)

    def commands_of_new(self) -> tuple[Command, ...]:
        """Return the same: it is about a port that is there."""
        return self.commands()

    async def run(self, host: Host) -> None:
        """Delete it. Raises Failure as `del_port`, and Unconfirmed with the host's patience."""
        await host.databases[self.ovsdb].del_port(self, host.deadline, host.patience)


@dataclass(frozen=True)
class SetPort:
    """Change the port that was seen, every column that we own in one transaction.

    `seen` are its Interface row's external_ids, our mark among them: another port that took its
    name meanwhile is left alone. `external_ids` are set beside the row's others, `without` are
    keys that go.
    """

    opens: ClassVar[bool] = False
    told: ClassVar[bool] = False
    blind: ClassVar[bool] = False
    ovsdb: str
    port: str
    seen: tuple[tuple[str, str], ...]
    vlan_mode: str | None
    tag: int | None
    trunks: tuple[int, ...]
    protected: bool
    transient: bool
    external_ids: tuple[tuple[str, str], ...]
    without: tuple[str, ...] = ()

    def commands(self) -> tuple[Command, ...]:
        """Return what ovs-vsctl(8) is told."""
        words = [
            f"vlan_mode={self.vlan_mode or '[]'}",
            f"tag={'[]' if self.tag is None else self.tag}",
            "trunks=" + (",".join(map(str, self.trunks)) or "[]"),
            f"protected={'true' if self.protected else 'false'}",
        ]
        words += ["other_config:transient=true"] if self.transient else []
        steps = [("set", "port", self.port, *words)]
        if self.external_ids:
            steps.append(("set", "interface", self.port, *_ids(self.external_ids)))
        if not self.transient:
            steps.append(("remove", "port", self.port, "other_config", "transient"))
        for key in self.without:
            steps.append(("remove", "interface", self.port, "external_ids", ovs_value(key)))
        return (vsctl(self.ovsdb, *steps),)

    def commands_of_new(self) -> tuple[Command, ...]:
        """Return the same: it is about a port that is there."""
        return self.commands()

    async def run(self, host: Host) -> None:
        """Change it, and wait until ovs-vswitchd has taken that in. Raises Failure."""
        await host.databases[self.ovsdb].set_port(self, host.deadline)


def _ids(pairs: tuple[tuple[str, str], ...]) -> list[str]:
    return [f"external_ids:{ovs_value(key)}={ovs_value(value)}" for key, value in pairs]


def vlan_columns(vlan: Vlan | None) -> tuple[str, int | None, tuple[int, ...]]:
    """Return vlan_mode, tag and trunks of the Port row for `vlan`.

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


def _columns(row: OvsPort) -> tuple[str | None, int | None, tuple[int, ...]]:
    return row.vlan_mode, row.tag, row.trunks


def bridge_at(place: Place) -> OvsPlace:
    """Return the bridge of Open vSwitch that a place is, whether its kind is said or looked up."""
    if isinstance(place, OvsPlace):
        return place
    return OvsPlace(place.name, next(iter(place.databases), DEFAULT_OVSDB))


def is_there(port: Port, seen: Seen) -> bool:
    """Tell whether the wanted database has a bridge with the wanted name."""
    return bridge_at(port.place).ovsdb in seen.ovs_bridges


def require(databases: Container[str], port: Port, seen: Seen) -> None:
    """Raise Failure (69) where the bridge can only be Open vSwitch's, and that does not run."""
    bridge, address = seen.bridge, bridge_at(port.place).ovsdb
    is_link = bridge is not None and bridge.kind == "bridge"
    wanted = (
        isinstance(port.place, OvsPlace)
        or (isinstance(port.place, BridgePlace) and not is_link and address != DEFAULT_OVSDB)
        or (bridge is not None and bridge.kind == "openvswitch")
    )
    if wanted and address not in databases:
        raise Failure(
            Status.UNAVAILABLE,
            f"Open vSwitch is not there: no socket at {quote(address)}",
            f"{quote(port.place.name)} of network {quote(port.network)} is its bridge",
            "start Open vSwitch by its own service",
        )


def claim(port: Port, seen: Seen) -> None:
    """Check nothing: a bridge whose link is down passes frames all the same."""


def refuse_foreign(seen: Seen, here: Here) -> None:
    """Raise Failure (77) where a row of the tap's name is not ours to replace."""
    for port in seen.ports:
        remedy = f"if it shall go: {vsctl(port.ovsdb, ('del-port', port.name))}"
        if not port.ours:
            raise Failure(
                Status.DENIED,
                "Open vSwitch has a port of this name that is not ours",
                f"on {port.owner}",
                remedy,
            )
        if port.is_elsewhere(here):
            raise Failure(
                Status.DENIED,
                "Open vSwitch has a port of this name from another network namespace",
                f"on {port.owner}",
                remedy,
            )


def join(port: Port, seen: Seen, mark: Mark, here: Here) -> Plan:
    """Return the step that adds the port with all its columns."""
    tap = seen.tap
    assert tap is not None
    ids = _wanted_ids(port, mark, tap.index, here)
    at, settings = bridge_at(port.place), port.settings
    return (
        AddPort(at.ovsdb, at.bridge, tap.name, tap.index, settings.vlan, settings.isolated, ids),
    )


def _wanted_ids(port: Port, mark: Mark, index: int, here: Here) -> tuple[tuple[str, str], ...]:
    ids = {**dict(port.settings.external_ids), **row_ids(mark, index, here)}
    return tuple(sorted(ids.items()))


def is_in_place(port: Port, seen: Seen, here: Here) -> bool:
    """Tell whether the only row of ours is the wanted one, made for this tap and in use."""
    tap, master, rows, at = seen.tap, seen.master, seen.our_rows(here), bridge_at(port.place)
    return (
        tap is not None
        and (master is None or master.kind == master_kind)
        and [(row.ovsdb, row.bridge, row.ifindex, row.error) for row in rows]
        == [(at.ovsdb, at.bridge, tap.index, None)]
        and rows[0].is_of(tap.index, here)
        and rows[0].ofport is not None
        and rows[0].ofport > 0
    )


def change(port: Port, seen: Seen, mark: Mark, here: Here) -> tuple[Plan, bool]:
    """Return the step that sets the columns, if one differs, and whether the VLAN does."""
    tap = seen.tap
    assert tap is not None  # it is in place
    row = seen.our_rows(here)[0]
    columns = vlan_columns(port.settings.vlan)
    moves = columns != _columns(row)
    ids = _wanted_ids(port, mark, tap.index, here)
    known = set(ids) <= set(row.external_ids)
    if not moves and port.settings.isolated == row.protected and row.transient and known:
        return (), False
    isolated = port.settings.isolated
    step = SetPort(row.ovsdb, tap.name, row.external_ids, *columns, isolated, True, ids)
    return (step,), moves


def holds(seen: Seen, master: Link) -> bool:
    """Tell whether a row of ours is the tap's, whose master is Open vSwitch's kernel datapath.

    A port of that datapath has the master ovs-system, whatever its bridge.
    """
    return master.kind == master_kind and any(port.ours for port in seen.ports)


def releasing(seen: Seen, master: Link) -> tuple[str, Command] | None:
    """Return the bridge, or else the datapath, that holds the tap, and what takes it out."""
    if master.kind != master_kind or seen.tap is None:
        return None
    holder, remedy = quote(master.name), vsctl("", ("del-port", seen.tap.name))
    for row in seen.ports:
        holder, remedy = row.owner, vsctl(row.ovsdb, ("del-port", seen.tap.name))
    return holder, remedy


def mac(port: Port, link: Link) -> str:
    """Return the MAC of the host's end of a tap."""
    return host_mac(link.mac)


def ovsdb(port: Port) -> str | None:
    """Return the database of the wanted bridge."""
    return bridge_at(port.place).ovsdb


def del_port(port: OvsPort) -> DelPort:
    """Return the op that deletes the port seen."""
    return DelPort(port.ovsdb, port.bridge, port.name, port.external_ids)


def leave(seen: Seen, here: Here, *, taken: bool) -> Plan:
    """Return the steps that delete the ports of ours.

    They are let go by ovs-vswitchd before anything is added: on the userspace datapath a port that
    is replaced in one transaction passes no frames.
    """
    tap, rows = seen.tap, seen.our_rows(here)
    plan: list[Op] = [del_port(row) for row in rows]
    if rows and tap is not None and not taken:
        # NOTE: ovs-vswitchd takes PROMISC from the link that it lets go, by writing all the flags
        # that it remembers, and may not have heard yet that the link is down.
        plan.append(SetDown(tap.name, tap.index))
    return tuple(plan)


def has_rows(seen: Seen, here: Here) -> bool:
    """Tell whether there is a row of ours."""
    return bool(seen.our_rows(here))


def leftovers(before: Seen, now: Seen, here: Here) -> Plan:
    """Return the steps that delete the ports that were made for the tap that has gone."""
    old = before.tap
    assert old is not None
    return tuple(del_port(port) for port in now.ports if port.ours and port.is_of(old.index, here))


def _own_rows(before: Seen, now: Seen, here: Here) -> tuple[list[OvsPort], list[OvsPort]]:
    """Return the tap's own rows as they were, and as they are."""
    index = now.tap.index if now.tap is not None else 0
    was, are = (
        [row for row in seen.ports if row.ours and row.is_of(index, here)] for seen in (before, now)
    )
    return was, are


def moved(before: Seen, now: Seen, here: Here) -> bool:
    """Tell whether the tap's rows are on other bridges."""
    was, are = _own_rows(before, now, here)
    return [(row.ovsdb, row.bridge) for row in was] != [(row.ovsdb, row.bridge) for row in are]


def changed_vlan(before: Seen, now: Seen, here: Here) -> bool:
    """Tell whether the tap's rows have other VLAN columns."""
    was, are = _own_rows(before, now, here)
    return list(map(_columns, was)) != list(map(_columns, are))


def restore(port: Port, before: Seen, now: Seen, here: Here, *, moved: bool) -> Plan:
    """Return the steps that give a tap the rows that it had."""
    tap = now.tap
    assert tap is not None
    was, are = _own_rows(before, now, here)
    plan: list[Op] = []
    for row in was:
        is_now = next((each for each in are if each.ovsdb == row.ovsdb and not moved), None)
        if is_now is None:
            # NOTE: it is down, and gets the very columns before it comes up.
            vlan = vlan_of_columns(row)
            assert row.bridge is not None
            plan.append(
                AddPort(
                    row.ovsdb,
                    row.bridge,
                    row.name,
                    tap.index,
                    vlan,
                    row.protected,
                    row.external_ids,
                )
            )
            exact = vlan_columns(vlan) == _columns(row) and row.transient
            seen, extra = row.external_ids, set[str]()
        else:
            ours = {*OUR_KEYS, *dict(port.settings.external_ids)}
            seen, extra = is_now.external_ids, (is_now.ids.keys() - row.ids.keys()) & ours
            exact = (
                _columns(is_now) == _columns(row)
                and is_now.protected == row.protected
                and is_now.transient == row.transient
                and not extra
                and set(row.external_ids) <= set(is_now.external_ids)
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
    return tuple(plan)


def is_no_worse(before: Seen, now: Seen) -> bool:
    """Tell whether the tap has no row that it had not, as far as whom its frames reach goes."""
    return set(map(_reach, now.ports)) <= set(map(_reach, before.ports))


def _reach(row: OvsPort) -> tuple[object, ...]:
    """Return what of a port decides whom its frames reach."""
    return row.ovsdb, row.bridge, *_columns(row), row.protected


def differences(port: Port, seen: Seen, *, up: bool) -> tuple[Difference, ...]:
    """Return which columns of the port are not as wanted."""
    tap = seen.tap
    wanted = bridge_at(port.place)
    row = next((row for row in seen.ports if row.ovsdb == wanted.ovsdb), None)
    if row is None or tap is None:
        return differing("bridge", wanted.bridge, None)
    found = list(differing("bridge", wanted.bridge, row.bridge))
    if _columns(row) != vlan_columns(port.settings.vlan):
        is_now = show_vlan(vlan_of_columns(row))
        if is_now == show_vlan(port.settings.vlan):
            is_now += f" (vlan_mode {row.vlan_mode or 'empty'}"
            is_now += f", trunks {','.join(map(str, row.trunks))})" if row.trunks else ")"
        found += differing("vlan", show_vlan(port.settings.vlan), is_now)
    found += differing("isolated", port.settings.isolated, row.protected)
    # NOTE: only what the policy gives: others (ovn-controller) add keys of their own to the row.
    given = {key: row.ids[key] for key, _ in port.settings.external_ids if key in row.ids}
    found += differing("external_ids", dict(port.settings.external_ids), given)
    found += differing("our mark", True, row.ours)
    found += differing("transient", True, row.transient)
    found += differing("error", None, row.error)
    found += differing("ofport", True, row.ofport is not None and row.ofport > 0)
    found += differing("ifindex", tap.index, row.ifindex)
    if up and tap.carrier:
        found += differing("link_state", "up", row.link_state, passing=True)
    return tuple(found)


async def settle(host: Host, port: Port, *, up: bool, told: bool) -> None:
    """Wait until ovs-vswitchd sees the link up, and the server has told all that there is."""
    database = host.databases[bridge_at(port.place).ovsdb]
    tap = host.kernel.look_up(port.tap)
    # NOTE: a persistent tap that nobody has opened yet has no carrier, so no link to wait for.
    if up and tap is not None and tap.carrier:
        # NOTE: it tells in order: whoever has had to wait for it knows all that came before.
        told = await database.link_up(port.tap, host.deadline)
    if not told:
        await database.sync(host.deadline)


def adding(port: Port) -> Command:
    """Return the command that makes the bridge."""
    at = bridge_at(port.place)
    return vsctl(_shortest(at.ovsdb), ("add-br", at.bridge))


def pinning(port: Port, mtu: int) -> Command:
    """Return the command that pins the bridge's MTU."""
    at = bridge_at(port.place)
    return vsctl(_shortest(at.ovsdb), ("set", "interface", at.bridge, f"mtu_request={mtu}"))


def _shortest(ovsdb: str) -> str:
    """Return a database's address as ovs-vsctl needs it: none where it is the default one."""
    return "" if ovsdb == DEFAULT_OVSDB else ovsdb


def able(port: Port, bridge: Link) -> Link:
    """Return the bridge as it is: each can do all that a policy says."""
    return bridge


def judge(ports: Iterable[OvsPort], links: Iterable[Link], here: Here) -> tuple[Leftover, ...]:
    """Return what is to become of every port that carries our mark.

    `links` must have been looked at after `ports`: a tap is there before its port is.
    """
    there = {(link.name, link.index): link for link in links}
    return tuple(_judge(port, there, here) for port in ports if port.ours)


def _judge(port: OvsPort, there: Mapping[tuple[str, int], Link], here: Here) -> Leftover:
    if port.is_elsewhere(here):
        return Leftover(port, "it is of another network namespace", None)
    ids = port.ids
    if ids.get(KEY_BOOT_ID) != here.boot_id:
        return Leftover(port, "its tap is gone: it is of an earlier boot", del_port(port))
    index = read_number(ids.get(KEY_IFINDEX, ""), INDEX_MAX)
    link = there.get((port.name, index)) if index is not None else None
    if link is not None and (link.up or link.alias):
        return Leftover(port, "its tap is there", None)
    if link is not None:
        # NOTE: the mark comes before the port and goes after it: this one's up was given up, and
        # Open vSwitch has made it since.
        return Leftover(port, "its tap is not attached", del_port(port))
    which = f"with ifindex {index}" if index is not None else "with the ifindex that it says"
    return Leftover(port, f"its tap is gone: no link {quote(port.name)} {which}", del_port(port))


def is_lost(link: Link, bridge: Link | None, database: Database | None) -> bool:
    """Tell whether the database has the bridge, and no port of the tap's name."""
    mark = link.mark
    return (
        mark is not None
        and database is not None
        and database.has_bridge(mark.bridge)
        and not database.ports(link.name)
    )
