"""The taps of this host: one look at it, and at the policy, and what they make of each tap."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import (
    Deny,
    Kind,
    Leave,
    Policy,
    Port,
    Vlan,
    decide,
    is_left,
    policy_asks,
    port_on,
)
from pyqemu_ifconf.shell import ifctl, quote, readable
from pyqemu_ifctl.agents import remark
from pyqemu_ifctl.bounded import ALL, Parts
from pyqemu_ifctl.databases import addresses, in_patience, open_each, take_policy, take_sights
from pyqemu_ifctl.rights import find_lost
from pyqemu_ifup import kinds
from pyqemu_ifup.guest import (
    Other,
    Patience,
    Unsaid,
    check_place,
    check_said,
    find_otherwise,
    find_user_said,
    said_by,
    tell_otherwise,
)
from pyqemu_ifup.host import Host, filters
from pyqemu_ifup.kinds.base import Difference
from pyqemu_ifup.kinds.openvswitch import vlan_of_columns
from pyqemu_ifup.look import Link, OvsPort, Seen, Vid, has_networks, vlan_of_vids
from pyqemu_ifup.on_port import NOTHING, Sights, find_sitting
from pyqemu_ifup.plan import differences
from pyqemu_ifup.stamp import KEY_NETWORK, KEY_VM_NAME, KEY_VM_PID, Here, Stamp, find_here, is_alive
from pyqemu_ifup.system.process import PID_MAX, read_number
from pyqemu_ifup.system.users import login_of

State = Literal["ok", "differs", "foreign", "left", "loose", "stale", "elsewhere"]
DATAPATH_TAP = "ovs-netdev"
"""The tap that ovs-vswitchd itself makes for its userspace datapath."""


@dataclass(frozen=True)
class System:
    """This host at one moment: its links, and the ports of the databases that answered.

    `vids` are those of the ports of a Linux bridge that filters VLANs, `ovs_bridges` the databases
    that have a bridge of the name. `unasked` are the databases that are there and did not answer.
    `left` are the taps without a mark of ours that a `leave` rule has by their name. `sights` is
    None where there was no time for them.
    """

    links: tuple[Link, ...]
    ports: tuple[OvsPort, ...]
    vids: Mapping[int, tuple[Vid, ...]]
    ovs_bridges: Mapping[str, tuple[str, ...]]
    unasked: frozenset[str]
    here: Here
    left: frozenset[str] = frozenset()
    sights: Sights | None = NOTHING


@dataclass(frozen=True)
class Row:
    """One tap. What is unknown is None, `differences` as a whole too.

    `otherwise` is what its process says of itself by now and its mark does not, None where there is
    no mark, no process, or no time. `because` tells a person more about the state.
    """

    tap: str
    state: State | None
    ifindex: int | None = None
    kind: Kind | None = None
    bridge: str | None = None
    network: str | None = None
    mtu: int | None = None
    mac: str | None = None
    vlan: Vlan | None = None
    isolated: bool | None = None
    vm: str | None = None
    pid: int | None = None
    differences: tuple[Difference, ...] | None = ()
    otherwise: tuple[Other, ...] | None = None
    because: str = ""


Want = Callable[[str, Stamp], Port | Deny | Leave | Unsaid | None]
"""What the policy says now of a tap with this stamp; None or Unsaid where that cannot be told."""


@dataclass(frozen=True)
class View:
    """What is to be shown of this host at one moment; `failures` are those of its databases.

    `unknown` are those for which it cannot be told whether something differs.
    """

    rows: list[Row]
    system: System
    remarks: tuple[str, ...]
    failures: tuple[Failure, ...]
    unknown: tuple[Failure, ...]


def find_view(host: Host, tap: str | None, environ: Mapping[str, str]) -> View:
    """Look at this host, and at the policy, and return what is to be shown, of `tap` if given."""
    with host.until(host.deadline.allowing(min(ALL, host.deadline.seconds))):
        return _find_view(host, tap, environ)


def _find_view(host: Host, tap: str | None, environ: Mapping[str, str]) -> View:
    parts = Parts(host.deadline)
    policy = take_policy(parts, environ)
    system, failed = look(host, policy, parts)
    shown = rows(system, lambda name, stamp: wanted(policy, name, stamp))
    found = (
        parts.take("whose right has ended", lambda: _with_rights(host, policy, system, shown))
        or shown
    )
    remarks = [str(failure) for failure in failed.values()]
    unknown = []
    if isinstance(policy, Failure):
        remarks.insert(0, f"what is wanted is not known: {policy}")
        unknown.append(policy)
    found, unread = parts.take(
        "the nft tables of networks", lambda: _with_tables(host, policy, system, found)
    ) or (found, {})
    parts.end()
    late = [Failure(Status.TRY_AGAIN, "not seen", each) for each in parts.missed]
    remarks += map(str, late)
    unknown += late
    remarks += [f"the nft table of network {name}: {fault}" for name, fault in unread.items()]
    unknown += unread.values()
    remarks += remark(host.deadline.remaining())
    if tap is not None:
        found = [row for row in found if row.tap == tap]
    return View(found, system, tuple(remarks), (*failed.values(), *late), tuple(unknown))


def _with_rights(
    host: Host, policy: Policy | Failure, system: System, found: list[Row]
) -> list[Row]:
    """Return the rows, those of taps whose right has ended with why, and what ends them."""
    lost = find_lost(host, policy, system.links, lambda name, stamp: wanted(policy, name, stamp))
    by_index = {each.link.index: each for each in lost}
    return [
        row
        if (each := by_index.get(row.ifindex or 0)) is None
        else replace(
            row,
            state="differs",
            because=f"mend it: {each.command}",
            differences=(
                *(row.differences or ()),
                Difference("right", "by the policy", "ended", each.why),
            ),
        )
        for row in found
    ]


def _with_tables(
    host: Host, policy: Policy | Failure, system: System, found: list[Row]
) -> tuple[list[Row], dict[str, Failure]]:
    """Return the rows, those of taps on a network with `nat:` with what its table differs in.

    And, by network, why a table could not be read.
    """
    if not has_networks(system.links):
        return found, {}
    from pyqemu_ifup.made.network import find_table_faults

    faults, unread = {}, {}
    in_force = policy if isinstance(policy, Policy) else None
    looks = find_table_faults(host, in_force, system.links)
    with in_patience(host):
        told = host.finish(looks)
    for name, fault in told.items():
        if isinstance(fault, Failure):
            unread[name] = fault
        elif fault:
            faults[name] = Difference("nat", "as the policy says", f"its nft table is {fault}")
    rows = [
        replace(row, state="differs", differences=(*row.differences, faults[row.network]))
        if row.network in faults and row.state in ("ok", "differs") and row.differences is not None
        else row
        for row in found
    ]
    return rows, unread


def look(host: Host, policy: Policy | Failure, parts: Parts) -> tuple[System, dict[str, Failure]]:
    """Look at all there is; return it with the databases that failed."""
    stamps = [link.stamp for link in host.kernel.links()]
    named = [stamp.ovsdb for stamp in stamps if stamp is not None and stamp.ovsdb is not None]
    failed = open_each(host, dict.fromkeys([*addresses(policy), *named]))
    # NOTE: ports before links: a tap is there before its port is.
    ports = host.ports()
    for address, database in host.databases.items():
        if not database.is_connected:
            failed[address] = Failure(
                Status.UNAVAILABLE,
                f"Open vSwitch is not there: nothing answers at {quote(address)}",
                "it has ended meanwhile",
                "start Open vSwitch by its own service",
            )
    ports = tuple(port for port in ports if port.ovsdb not in failed)
    links = tuple(host.kernel.links())
    by_index = {link.index: link for link in links}
    marked = {port.name for port in ports if port.ours}
    networks = policy.networks.values() if isinstance(policy, Policy) else ()
    bridges = {network.bridge for network in networks}
    system = System(
        links=links,
        ports=ports,
        vids={
            link.index: host.kernel.vids(link.index)
            for link in links
            if link.master is not None and filters(by_index.get(link.master))
        },
        ovs_bridges={
            bridge: tuple(
                address for address, each in host.databases.items() if each.has_bridge(bridge)
            )
            for bridge in bridges
        },
        unasked=frozenset(failed),
        here=find_here(),
        sights=take_sights(
            parts,
            links,
            {
                link.index
                for link in links
                if link.tap and (link.stamp is not None or link.name in marked)
            },
        ),
        left=frozenset(
            link.name
            for link in links
            if link.tap
            and link.stamp is None
            and isinstance(policy, Policy)
            and is_left(policy, link.name)
        ),
    )
    return system, failed


def wanted(policy: Policy | Failure, tap: str, stamp: Stamp) -> Port | Deny | Leave | Unsaid | None:
    """Return what the policy says now of the tap, for the QEMU that its stamp tells of.

    None without a policy; Unsaid where a rule asks for what the stamp does not say.
    """
    if isinstance(policy, Failure):
        return None
    if stamp.by_name:
        try:
            return port_on(policy, stamp.network, tap)
        except Failure as failure:
            return Deny(str(failure), None)
    # NOTE: a user's tap that is not asked for by a network's name is one that root has made.
    asked = find_user_said(policy, stamp) if policy_asks(policy, "user") else None
    login = login_of(asked) if asked is not None else None
    caller = said_by(stamp, tap, login, root_made=stamp.uid is not None)
    try:
        check_said(policy, caller, stamp)
        decision = decide(policy, caller)
        if isinstance(decision, Deny | Leave):
            return decision
        check_place(decision.port, stamp)
    except Unsaid as unsaid:
        return unsaid
    return decision.port


def rows(system: System, want: Want) -> list[Row]:
    """Return a row for each tap, and one for each port of ours whose tap is not here."""
    patience = Patience()
    found = [
        _tap_row(link, system, want, patience)
        for link in system.links
        if link.tap and not _is_of_openvswitch(link, system)
    ]
    for leftover in kinds.judge(system.ports, system.links, system.here):
        port = leftover.port
        if port.is_elsewhere(system.here):
            found.append(_port_row(port, "elsewhere", leftover.because))
        elif leftover.remove is not None:
            because = f"{leftover.because}; {ifctl('gc')} removes it"
            found.append(_port_row(port, "stale", because))
    return sorted(found, key=lambda row: (natural(row.tap), row.state or ""))


def natural(name: str) -> list[tuple[int, str, str]]:
    """Return a key by which web2 comes before web10."""
    key = []
    for at, part in enumerate(re.split("([0-9]+)", name)):
        # NOTE: no int(), which refuses what a name in OVSDB may have: thousands of digits.
        digits = part.lstrip("0")
        key.append((len(digits), digits, part) if at % 2 else (0, part, ""))
    return key


def _is_of_openvswitch(link: Link, system: System) -> bool:
    """Tell whether Open vSwitch made the tap itself, as it does on its userspace datapath."""
    if link.stamp is not None:
        return False
    # NOTE: one that it could not make, as a guest's tap has the name, has no ifindex.
    is_its_port = any(
        port.internal
        and port.name == link.name
        and (port.ifindex == link.index or port.name == port.bridge)
        for port in system.ports
    )
    return is_its_port or (link.name == DATAPATH_TAP and not link.alias)


def _tap_row(link: Link, system: System, want: Want, patience: Patience) -> Row:
    ports = [port for port in system.ports if port.name == link.name]
    master = next((each for each in system.links if each.index == link.master), None)
    row = Row(link.name, None, ifindex=link.index, mtu=link.mtu, mac=link.mac)
    if master is not None and master.kind == "bridge":
        vids = system.vids.get(link.index, ())
        row = replace(
            row, kind="linux", bridge=master.name, vlan=vlan_of_vids(vids), isolated=link.isolated
        )
    stamp = link.stamp
    marked = next((p for p in ports if p.ours and p.is_of(link.index, system.here)), None)
    lost = stamp is None and marked is not None
    if lost and marked is not None:
        stamp = stamp_of(marked)
    if stamp is None:
        return _others_row(row, link, master, ports, system)
    port = marked if stamp.kind == "openvswitch" else None
    if port is not None and row.kind is None:
        row = _with_port(row, port)
    vm = None if "vm" in stamp.unsaid else stamp.vm or None
    others = find_otherwise(link.name, stamp, patience)
    row = replace(
        row,
        network=stamp.network,
        vm=vm,
        pid=stamp.pid or None,
        differences=None,
        otherwise=others,
        because=_ended(stamp) or tell_otherwise(stamp, others),
    )
    if stamp.ovsdb in system.unasked:
        return replace(
            row,
            kind=row.kind or stamp.kind,
            bridge=row.bridge or stamp.bridge,
            because="its database does not answer",
        )
    seen = Seen(link, master, vids=system.vids.get(link.index, ()), ports=tuple(ports))
    wish = want(link.name, stamp)
    if isinstance(wish, Unsaid):
        row, wish = replace(row, because="; ".join(filter(None, [row.because, str(wish)]))), None
    found = _compare(wish, stamp, seen, system)
    if found is None:
        attached = row.bridge == stamp.bridge
        because = "" if attached else f"its mark says that it is on {readable(stamp.bridge)}"
        return replace(row, state="ok" if attached else "differs", because=because or row.because)
    if lost:
        found = (*found, Difference("alias", "our mark", link.alias or "none"))
    if system.sights is None:
        because = "there was no time to see what of this host's is on it"
        return replace(
            row, state="differs" if found else None, differences=found or None, because=because
        )
    found += tuple(
        Difference(each.setting, "none", each.name, f"{each.why}; {each.remedy}")
        for each in find_sitting(link, row.bridge or stamp.bridge, system.sights)
    )
    return replace(row, state="differs" if found else "ok", differences=found)


def stamp_of(port: OvsPort) -> Stamp:
    """Return the stamp of a tap whose alias is lost, from its port."""
    ids = port.ids
    # NOTE: its vm-name is left out where it had no room.
    unsaid = {"netdev", "mac", "user", "by"} | ({"vm"} if KEY_VM_NAME not in ids else set())
    return Stamp(
        ids.get(KEY_NETWORK, ""),
        "openvswitch",
        port.bridge or "",
        ids.get(KEY_VM_NAME, ""),
        read_number(ids.get(KEY_VM_PID, ""), PID_MAX) or 0,
        0,
        port.ovsdb,
        unsaid=frozenset(unsaid),
    )


def _ended(stamp: Stamp) -> str:
    return f"its process {stamp.pid} has ended" if stamp.start and not is_alive(stamp) else ""


def _compare(
    want: Port | Deny | Leave | None, stamp: Stamp, seen: Seen, system: System
) -> tuple[Difference, ...] | None:
    """Return what is not as the policy wants it now; None where that cannot be told."""
    if want is None:
        return None
    if isinstance(want, Deny):
        return (Difference("network", "none", stamp.network, f"denied: {want.because}"),)
    if isinstance(want, Leave):
        left = f"left alone from its next start on: {want.rule.position}"
        return (Difference("network", "none", stamp.network, left),)
    is_unasked = not system.unasked.isdisjoint(want.place.databases)
    if is_unasked and stamp.kind == "openvswitch":
        return None
    bridge = next((link for link in system.links if link.name == want.place.name), None)
    seen = replace(
        seen,
        bridge=bridge,
        ovs_bridges=system.ovs_bridges.get(want.place.name, ()),
        other_name_of=next(
            (link.name for link in system.links if want.place.name in link.altnames), ""
        ),
    )
    try:
        kind = kinds.find(want, seen)
        found = differences(want, kind, seen, up=True)
    except Failure as failure:
        is_now = seen.master.name if seen.master else stamp.bridge
        found = (Difference("bridge", want.place.name, is_now, str(failure)),)
    if want.network != stamp.network:
        found = (Difference("network", want.network, stamp.network), *found)
    return found


def _others_row(
    row: Row, link: Link, master: Link | None, ports: list[OvsPort], system: System
) -> Row:
    """Return the row of a tap that is not ours: somebody else's, or nobody's."""
    foreign = next((port for port in ports if not port.ours), None)
    if master is None and foreign is None:
        if link.name in system.left:
            return replace(row, state="left")
        if system.unasked:
            because = "a database that does not answer may hold it"
            return replace(row, because=because, differences=None)
        return replace(row, state="loose")
    if foreign is not None and row.kind is None:
        row = _with_port(row, foreign)
    elif master is not None and row.kind is None:
        kind: Kind | None = "openvswitch" if master.kind == "openvswitch" else None
        row = replace(row, kind=kind, bridge=ports[0].bridge if ports else master.name)
    return replace(row, state="left" if link.name in system.left else "foreign")


def _with_port(row: Row, port: OvsPort) -> Row:
    return replace(
        row,
        kind="openvswitch",
        bridge=port.bridge,
        vlan=vlan_of_columns(port),
        isolated=port.protected,
    )


def _port_row(port: OvsPort, state: State, because: str) -> Row:
    stamp = stamp_of(port)
    row = Row(
        port.name,
        state,
        network=stamp.network or None,
        vm=stamp.vm or None,
        pid=stamp.pid or None,
        because=because,
    )
    return _with_port(row, port)
