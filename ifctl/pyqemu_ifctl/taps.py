"""The taps of this host: what one look at it, and the policy, make of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Deny, Kind, Leave, Policy, Port, Vlan, decide, policy_asks, port_on
from pyqemu_ifconf.shell import ifctl, readable
from pyqemu_ifctl.agents import remark
from pyqemu_ifctl.bounded import ALL, Parts
from pyqemu_ifctl.databases import in_patience, take_policy
from pyqemu_ifctl.look import look
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
from pyqemu_ifup.kinds.base import Difference, Leftover
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.kinds.view import PortView, TapView
from pyqemu_ifup.look import Link, Seen, has_networks
from pyqemu_ifup.mark import Mark, is_alive
from pyqemu_ifup.on_port import find_sitting
from pyqemu_ifup.plan import differences
from pyqemu_ifup.system.users import login_of

State = Literal["ok", "differs", "foreign", "left", "loose", "stale", "elsewhere"]


@dataclass(frozen=True)
class Row:
    """One tap. What is unknown is None, `differences` as a whole too.

    `otherwise` is what its process says of itself by now and its mark does not, None if there is
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


Want = Callable[[str, Mark], Port | Deny | Leave | Unsaid | None]
"""What the policy says now of a tap with this mark; None or Unsaid if that is not known."""


@dataclass(frozen=True)
class View:
    """What is to be shown of this host at one moment; `failures` are those of its databases.

    `unknown` are those for which it cannot be told whether something differs.
    """

    rows: list[Row]
    snapshot: Snapshot
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
    snapshot = look(host, policy, parts)
    failed = snapshot.failed
    shown = rows(snapshot, lambda name, mark: wanted(policy, name, mark))
    found = (
        parts.take("whose right has ended", lambda: _with_rights(host, policy, snapshot, shown))
        or shown
    )
    remarks = [str(failure) for failure in failed.values()]
    unknown = []
    if isinstance(policy, Failure):
        remarks.insert(0, f"what is wanted is not known: {policy}")
        unknown.append(policy)
    found, unread = parts.take(
        "the nft tables of networks", lambda: _with_tables(host, policy, snapshot, found)
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
    return View(found, snapshot, tuple(remarks), (*failed.values(), *late), tuple(unknown))


def _with_rights(
    host: Host, policy: Policy | Failure, snapshot: Snapshot, found: list[Row]
) -> list[Row]:
    """Return the rows, those of taps whose right has ended with why, and what ends them."""
    lost = find_lost(host, policy, snapshot.links, lambda name, mark: wanted(policy, name, mark))
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
    host: Host, policy: Policy | Failure, snapshot: Snapshot, found: list[Row]
) -> tuple[list[Row], dict[str, Failure]]:
    """Return the rows, those of taps on a network that is made with what its table differs in.

    And, by network, why a table could not be read.
    """
    if not has_networks(snapshot.links):
        return found, {}
    from pyqemu_ifup.made.guard import find_table_faults

    faults, unread = {}, {}
    in_force = policy if isinstance(policy, Policy) else None
    looks = find_table_faults(host, in_force, snapshot.links)
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


def wanted(policy: Policy | Failure, tap: str, mark: Mark) -> Port | Deny | Leave | Unsaid | None:
    """Return what the policy says now of the tap, for the QEMU that its mark tells of.

    None without a policy; Unsaid if a rule asks for what the mark does not say.
    """
    if isinstance(policy, Failure):
        return None
    if mark.by_name:
        try:
            return port_on(policy, mark.network, tap, made=mark.made)
        except Failure as failure:
            return Deny(str(failure), None)
    # NOTE: a user's tap that is not asked for by a network's name is one that root has made.
    asked = find_user_said(policy, mark) if policy_asks(policy, "user") else None
    login = login_of(asked) if asked is not None else None
    caller = said_by(mark, tap, login, root_made=mark.uid is not None)
    try:
        check_said(policy, caller, mark)
        decision = decide(policy, caller)
        if isinstance(decision, Deny | Leave):
            return decision
        check_place(decision.port, mark)
    except Unsaid as unsaid:
        return unsaid
    return decision.port


def rows(snapshot: Snapshot, want: Want) -> list[Row]:
    """Return a row for each tap, and one for each port of ours whose tap is not here."""
    patience = Patience()
    found = [
        _tap_row(link, snapshot, want, patience)
        for link in snapshot.links
        if kinds.is_ports(link) and not any(each.is_own(link, snapshot) for each in kinds.views())
    ]
    for view in kinds.views():
        for leftover in view.kind.judge(snapshot.ports, snapshot.links, snapshot.here):
            row = _left_row(view, leftover)
            if leftover.port.is_elsewhere(snapshot.here):
                found.append(replace(row, state="elsewhere", because=leftover.because))
            elif leftover.remove is not None:
                because = f"{leftover.because}; {ifctl('gc')} removes it"
                found.append(replace(row, state="stale", because=because))
    return sorted(found, key=lambda row: (natural(row.tap), row.state or ""))


def _left_row(view: TapView, leftover: Leftover) -> Row:
    """Return the row of a port whose tap is not here."""
    place, mark = view.left(leftover)
    row = Row(
        leftover.port.name,
        None,
        network=mark.network or None,
        vm=mark.vm or None,
        pid=mark.pid or None,
    )
    return _at(row, place)


def _at(row: Row, place: PortView) -> Row:
    """Return the row of a tap that is there."""
    return replace(
        row, kind=place.kind, bridge=place.bridge, vlan=place.vlan, isolated=place.isolated
    )


def natural(name: str) -> list[tuple[int, str, str]]:
    """Return a key by which web2 comes before web10."""
    key = []
    for at, part in enumerate(re.split("([0-9]+)", name)):
        # NOTE: no int(), which refuses what a name in OVSDB may have: thousands of digits.
        digits = part.lstrip("0")
        key.append((len(digits), digits, part) if at % 2 else (0, part, ""))
    return key


def _tap_row(link: Link, snapshot: Snapshot, want: Want, patience: Patience) -> Row:
    seen = Seen(
        link,
        next((each for each in snapshot.links if each.index == link.master), None),
        vids=snapshot.vids_of(link),
        ports=tuple(port for port in snapshot.ports if port.name == link.name),
        own=snapshot.own.get(link.index),
    )
    row = Row(link.name, None, ifindex=link.index, mtu=link.mtu, mac=link.mac)
    mark = link.mark or kinds.lost_mark(seen, snapshot.here)
    places = [each.view(seen, snapshot.here, ours=mark is not None) for each in kinds.views()]
    maker = kinds.maker_of(link)
    places += [each.view(seen) for each in kinds.link_views() if each.kind is maker]
    place = next((each for each in places if each is not None), None)
    if place is not None:
        row = _at(row, place)
    if mark is None:
        return _others_row(row, link, seen.master, snapshot)
    vm = None if "vm" in mark.unsaid else mark.vm or None
    others = find_otherwise(link.name, mark, patience)
    row = replace(
        row,
        network=mark.network,
        vm=vm,
        pid=mark.pid or None,
        differences=None,
        otherwise=others,
        because=_ended(mark) or tell_otherwise(mark, others),
    )
    if mark.ovsdb in snapshot.unasked:
        return replace(
            row,
            kind=row.kind or mark.kind,
            bridge=row.bridge or mark.bridge,
            because="its database does not answer",
        )
    if snapshot.vids is None and filters(seen.master):
        return replace(row, because="there was no time to see its VLANs")
    wish = want(link.name, mark)
    if isinstance(wish, Unsaid):
        row, wish = replace(row, because="; ".join(filter(None, [row.because, str(wish)]))), None
    found = _compare(wish, mark, seen, snapshot)
    if found is None:
        attached = row.bridge == mark.bridge
        because = "" if attached else f"its mark says that it is on {readable(mark.bridge)}"
        return replace(row, state="ok" if attached else "differs", because=because or row.because)
    if link.mark is None:
        found = (*found, Difference("alias", "our mark", link.alias or "none"))
    if snapshot.sights is None:
        because = "there was no time to see what of this host's is on it"
        return replace(
            row, state="differs" if found else None, differences=found or None, because=because
        )
    found += tuple(
        Difference(each.setting, "none", each.name, f"{each.why}; {each.remedy}")
        for each in find_sitting(link, row.bridge or mark.bridge, snapshot.sights)
    )
    return replace(row, state="differs" if found else "ok", differences=found)


def _ended(mark: Mark) -> str:
    return f"its process {mark.pid} has ended" if mark.start and not is_alive(mark) else ""


def _compare(
    want: Port | Deny | Leave | None, mark: Mark, seen: Seen, snapshot: Snapshot
) -> tuple[Difference, ...] | None:
    """Return what is not as the policy wants it now, None if that is not known."""
    if want is None:
        return None
    if isinstance(want, Deny):
        return (Difference("network", "none", mark.network, f"denied: {want.because}"),)
    if isinstance(want, Leave):
        left = f"left alone from its next start on: {want.rule.position}"
        return (Difference("network", "none", mark.network, left),)
    if not snapshot.unasked.isdisjoint(want.place.databases) and not kinds.load(mark.kind).has_link:
        return None
    bridge = next((link for link in snapshot.links if link.name == want.place.name), None)
    seen = replace(
        seen,
        bridge=bridge,
        ovs_bridges=snapshot.ovs_bridges.get(want.place.name, ()),
        other_name_of=next(
            (link.name for link in snapshot.links if want.place.name in link.altnames), ""
        ),
    )
    try:
        kind = kinds.find(want, seen)
        found = differences(want, kind, seen, up=True)
    except Failure as failure:
        is_now = seen.master.name if seen.master else mark.bridge
        found = (Difference("bridge", want.place.name, is_now, str(failure)),)
    if want.network != mark.network:
        found = (Difference("network", want.network, mark.network), *found)
    return found


def _others_row(row: Row, link: Link, master: Link | None, snapshot: Snapshot) -> Row:
    """Return the row of a tap that is not ours: somebody else's, or nobody's."""
    is_left = link.name in snapshot.left
    if row.kind is None and master is None:
        if is_left:
            return replace(row, state="left")
        if snapshot.unasked:
            because = "a database that does not answer may hold it"
            return replace(row, because=because, differences=None)
        return replace(row, state="loose")
    if row.kind is None and master is not None:
        row = replace(row, bridge=master.name)
    return replace(row, state="left" if is_left else "foreign")
