"""Which rule decides for a tap, what it would get, and by which commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

from pyqemu_ifconf.failure import Failure, Forbidden
from pyqemu_ifconf.kinds import named_by, said, spec_at, spec_of
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.made.nat import show_service
from pyqemu_ifconf.policy import (
    Attach,
    Caller,
    Decision,
    Deny,
    Leave,
    Nat,
    Policy,
    Port,
    PortSettings,
    Vlan,
    decide,
    find_nic,
    port_on,
)
from pyqemu_ifconf.shell import Command, output, piped, quote, sh
from pyqemu_ifconf.vms import show_from
from pyqemu_ifctl.answer import json_vlan
from pyqemu_ifctl.databases import addresses, find_policy, in_patience, look_for_unmet, open_each
from pyqemu_ifup import kinds
from pyqemu_ifup.access import ROOT, User, find_user, is_root_made
from pyqemu_ifup.claims import is_taken_over, refuse_foreign_ports, refuse_shared, refuse_strangers
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.tun import require_tun
from pyqemu_ifup.holder import Holder
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds import vswitchd
from pyqemu_ifup.kinds.base import PortKind, host_mac
from pyqemu_ifup.look import FRESH, Link, Seen, show_vlan
from pyqemu_ifup.made.base import WantedNetwork
from pyqemu_ifup.mark import Here, find_here
from pyqemu_ifup.nic_macs import find_macs
from pyqemu_ifup.on_port import find_sitting
from pyqemu_ifup.ops import Op, Plan, SetMtu, set_link
from pyqemu_ifup.plan import plan_leaving, plan_up
from pyqemu_ifup.tap_request import may_attach

UID_MAX = 2**32 - 2
"""The greatest number of a user (credentials(7)); the one after it is none."""


@dataclass(frozen=True)
class View:
    """What an explanation can see of this host.

    `unasked` are the databases that did not answer, `databases` those that did; `ipv6` tells
    whether the kernel has IPv6. `unmet` is why an up would fail whatever the bridge is like. `made`
    and `marked` are the commands that make a network which is made for its first tap: those before
    the tap joins it, and those after.
    `links` are all of this host, where one is to be made for the port.
    `uid` is the user's who asks.
    """

    seen: Seen
    here: Here
    unasked: frozenset[str]
    ipv6: bool
    remarks: tuple[str, ...] = ()
    databases: frozenset[str] = frozenset()
    unmet: tuple[Failure, ...] = ()
    made: tuple[Command, ...] = ()
    marked: tuple[Command, ...] = ()
    links: tuple[Link, ...] = ()
    uid: int = ROOT


@dataclass(frozen=True)
class Form:
    """The commands that attach the tap to what has this title; none where that cannot be."""

    title: str
    commands: tuple[Command, ...]
    cannot: str = ""


@dataclass(frozen=True)
class Wanted:
    """One setting of the wanted state, as a value for JSON and in words."""

    setting: str
    value: object
    words: str


@dataclass(frozen=True)
class Explanation:
    """The decision for one tap; what an attachment would be, empty where it is denied."""

    caller: Caller
    decision: Decision
    wanted: tuple[Wanted, ...] = ()
    forms: tuple[Form, ...] = ()
    notes: tuple[str, ...] = ()


def explain(
    caller: Caller,
    network: str | None,
    environ: Mapping[str, str],
    deadline: Deadline,
    tell: Callable[[str], None],
) -> Explanation:
    """Return what this host's policy says of `caller`, and what that takes; touches nothing.

    `network`: as the program called pyqemu-ifup@NETWORK. Raises Failure where the policy cannot be
    had.
    """
    policy = find_policy(environ)
    user = _unprivileged(caller.user)
    if user is not None:
        with Host(caller.tap, deadline, tell) as host:
            link, links = host.kernel.look_up(caller.tap), host.kernel.links()
        root_made = link is not None and is_root_made(link, user.uid)
        caller = replace(caller, unprivileged=True, root_made=root_made)
    if network is not None:
        decision: Decision = Attach(port_on(policy, network, caller.tap), None)
    else:
        decision = decide(policy, caller)
    if isinstance(decision, Deny):
        return Explanation(caller, decision)
    if isinstance(decision, Leave):
        return _explain_leave(caller, decision, policy, deadline, tell)
    if caller.mac is None and kinds.maker_at(decision.port) is not None:
        found = find_nic(policy, decision.port.network, caller.tap)
        if found is not None:
            vm, nic = found
            caller = replace(caller, vm=vm.name, mac=find_macs(policy, vm)[vm.name, nic.id])
    view = look(decision.port, policy, deadline, tell)
    view = replace(view, uid=user.uid if user is not None else ROOT)
    explanation = explain_port(caller, decision, view)
    if user is not None:
        try:
            may_attach(policy, decision.port, user, link, links)
        except Failure as failure:
            notes = (*explanation.notes, _would_fail(failure))
            explanation = replace(explanation, notes=notes)
    return explanation


def _explain_leave(
    caller: Caller, decision: Leave, policy: Policy, deadline: Deadline, tell: Callable[[str], None]
) -> Explanation:
    """Return what leaving the tap as it is takes: nothing, but for an old mark of ours."""
    with Host(caller.tap, deadline, tell) as host:
        link = host.kernel.look_up(caller.tap)
        marked = link.mark.ovsdb if link is not None and link.mark is not None else None
        named = [marked] if marked is not None else []
        failed = open_each(host, dict.fromkeys([*addresses(policy), *named]))
        seen = kinds.look(host, caller.tap, None)
    notes = tuple(f"could not tell: {failure}" for failure in failed.values())
    steps = plan_leaving(seen, find_here())
    lines = tuple(line for step in steps for line in step.commands())
    forms = (Form("", lines),) if lines else ()
    return Explanation(caller, decision, forms=forms, notes=notes)


def _unprivileged(name: str | None) -> User | None:
    """Return the user of this login name, or number; None for root, and where it is not known."""
    if name is None:
        return None
    import pwd

    try:
        uid = pwd.getpwnam(name).pw_uid
    except KeyError:
        if not (name.isascii() and name.isdigit() and len(name) < 11 and int(name) <= UID_MAX):
            return User(-1, name, ())
        uid = int(name)
    return find_user(uid) if uid != ROOT else None


def look(port: Port, policy: Policy, deadline: Deadline, tell: Callable[[str], None]) -> View:
    """Look at the tap, its bridge and its rows, as far as that is to be had."""
    with Host(port.tap, deadline, tell, details=True) as host:
        failed = open_each(host, [*port.place.databases, *addresses(policy)])
        seen = kinds.look(host, port.tap, port.place.name)
        makes = seen.tap is None and kinds.maker_at(port) is not None
        links = tuple(host.kernel.links()) if makes else ()
        databases = frozenset(host.databases)
        failures = list(failed.values())
        made, marked = _NO_COMMANDS
        if port.made is not None:
            wanted = WantedNetwork(port.network, port.place.name, port.made)
            failures += look_for_unmet(host, wanted)
            made, marked = _look_at_made(host, wanted)
        sitting = (
            tuple(
                f"{each.what}: {each.why}; {each.remedy}"
                for each in find_sitting(
                    seen.tap, port.place.name, host.kernel.sights(routes_of=(seen.tap.index,))
                )
            )
            if seen.tap is not None
            else ()
        )
        remarks = tuple(
            f"could not tell: {each}" for each in failures if isinstance(each, Forbidden)
        )
        for address in kinds.databases(port, seen):
            if address in seen.ovs_bridges:
                remarks += _vswitchd_remarks(host, address)
    if seen.tap is not None:
        remarks += sitting
    elif not makes:
        remarks += _tun_remarks()
    unmet = tuple(each for each in failures if not isinstance(each, Forbidden))
    ipv6 = os.path.exists("/proc/sys/net/ipv6")
    return View(
        *(seen, find_here(), frozenset(failed), ipv6, remarks, databases, unmet, made, marked),
        links=links,
    )


_NO_COMMANDS: tuple[tuple[Command, ...], tuple[Command, ...]] = ((), ())


def _look_at_made(
    host: Host, wanted: WantedNetwork
) -> tuple[tuple[Command, ...], tuple[Command, ...]]:
    """Return the commands that make the network as it is wanted, those before and after it joins.

    There are none if the network is so, or if an up could not tell how to make it.
    """
    from pyqemu_ifup.made.network import commands_of, plan_to_make

    try:
        with in_patience(host):
            return commands_of(host.finish(plan_to_make(host, wanted)))
    except Failure:
        # NOTE: it is among what is unmet.
        return _NO_COMMANDS


def _vswitchd_remarks(host: Host, ovsdb: str) -> tuple[str, ...]:
    """Return why the ovs-vswitchd of a database would not see to the port in time."""
    switch = vswitchd.settled(host, {}).get(ovsdb)
    if switch is None:
        return ()
    finding = vswitchd.find_fault(switch, vswitchd.look([switch]))
    if finding is None:
        return ()
    return (f"an up would wait until its deadline (75): {finding.what}; {finding.command}",)


def _tun_remarks() -> tuple[str, ...]:
    """Return why QEMU could not make the tap."""
    try:
        require_tun()
    except Forbidden:
        # NOTE: who explains need not be whose QEMU makes it.
        return ()
    except Failure as failure:
        return (f"QEMU could not make the tap now: {failure}",)
    return ()


def explain_port(caller: Caller, decision: Attach, view: View) -> Explanation:
    """Return what attaching the tap would be, given what is to be seen."""
    port, seen = decision.port, view.seen
    kind, found, notes = _find_kind(port, view)
    notes = [*map(_would_fail, view.unmet), *_refusals(port, view), *notes]
    if is_taken_over(seen):
        notes.append(
            f"it is on {quote(port.place.name)} already, where another script has put it: it is "
            "taken over, and that script need not be run any more"
        )
    forms = []
    for each in (kind,) if kind is not None else kinds.tap_kinds():
        by_name = decision.rule is None
        form, fault = _form(port, each, caller, view, live=found, by_name=by_name)
        forms.append(form)
        notes += [fault] if fault else []
    if kind is None:
        either = " or ".join(each.title for each in kinds.tap_kinds())
        notes.append(
            f"whether {quote(port.place.name)} is {either} cannot be told, and network "
            f"{quote(port.network)} gives no kind:; both forms follow"
        )
    wanted = _wanted(port, kind, seen, view.ipv6)
    return Explanation(
        caller, decision, wanted, tuple(forms), (*view.remarks, *dict.fromkeys(notes))
    )


def _find_kind(port: Port, view: View) -> tuple[PortKind | None, bool, list[str]]:
    """Return the bridge's kind, whether that was seen, and what speaks against it."""
    seen = view.seen
    said = kinds.said(port)
    if port.made is not None:
        # NOTE: it is made where it is not there.
        return said, seen.bridge is not None, []
    # NOTE: whatever kind the policy says, the host's own database may have a bridge of that name.
    is_unasked = not view.unasked.isdisjoint(port.place.databases or (DEFAULT_OVSDB,))
    try:
        if not is_unasked:
            kinds.require(view.databases, port, seen)
        return kinds.find(port, seen), True, []
    except Failure as failure:
        told = failure
    if is_unasked and (seen.bridge is None or seen.bridge.kind != "bridge"):
        # NOTE: the local port of a bridge on the kernel's datapath is a link of its kind.
        for kind in kinds.tap_kinds() if said is None and seen.bridge is not None else ():
            if seen.bridge is not None and seen.bridge.kind == kind.master_kind:
                return kind, True, []
        return said, False, []
    return said, False, [_would_fail(told)]


def _refusals(port: Port, view: View) -> list[str]:
    """Return why the hook would refuse the tap as it is now; being in use is no reason here."""
    seen = view.seen
    mark = seen.tap.mark if seen.tap is not None else None
    notes = []
    try:
        if seen.tap is not None:
            refuse_strangers(port.tap, seen, mark.pid if mark is not None else 0)
            refuse_shared(seen.tap, view.uid)
        refuse_foreign_ports(seen, view.here)
    except Failure as failure:
        notes.append(_would_fail(failure))
    return notes


def _would_fail(failure: Failure) -> str:
    return f"an up would fail now ({int(failure.status)}): {failure}"


def _form(
    port: Port, kind: PortKind, caller: Caller, view: View, *, live: bool, by_name: bool
) -> tuple[Form, str | None]:
    """Return the commands for a bridge of this kind, and why an up would fail on the live one.

    Without a `live` bridge, or where it cannot do what is wanted, one that can is taken.
    """
    seen = view.seen
    fresh = seen.tap is None
    tap = seen.tap or replace(FRESH, name=port.tap)
    making: Plan = ()
    maker = kinds.maker(kind.name)
    if fresh and view.ipv6:
        tap = replace(tap, ipv6_disabled=False)
    if fresh and maker is not None:
        if caller.mac is None:
            what = "the MAC of the guest's device is not known; give it by --mac"
            return Form(kind.title, (), what), None
        parent = seen.bridge or replace(FRESH, name=port.place.name)
        tap = replace(tap, kind=maker.link_kind, tap=False, mac=caller.mac)
        making = maker.making(port, tap, parent, view.links)
    seen = replace(seen, tap=tap)
    fault = None
    try:
        # NOTE: no process, which a fresh tap's commands leave open, is 0 in a mark.
        pid = tap.mark.pid if tap.mark is not None else 0
        mark = Holder(caller, pid, by_name=by_name).mark_for(port, kind)
        if live:
            try:
                plan = (*making, *plan_up(port, kind, seen, mark, view.here))
                return Form(kind.title, _lines(plan, port, seen, view, fresh=fresh)), None
            except Failure as failure:
                fault = _would_fail(failure)
        able = replace(seen, bridge=_able_bridge(port, kind, seen.bridge))
        plan = (*making, *plan_up(port, kind, able, mark, view.here))
    except Failure as failure:
        return Form(kind.title, (), str(failure)), fault
    return Form(kind.title, _lines(plan, port, seen, view, fresh=fresh)), fault


def _able_bridge(port: Port, kind: PortKind, bridge: Link | None) -> Link:
    """Return a bridge that can do what `port` wants, as like the one seen as may be."""
    if bridge is None or bridge.kind != "bridge":
        mtu = bridge.mtu if bridge is not None else FRESH.mtu
        bridge = replace(FRESH, name=port.place.name, kind="bridge", tap=False, mtu=mtu)
    return kind.able(port, replace(bridge, up=True))


def _lines(
    plan: tuple[Op, ...], port: Port, seen: Seen, view: View, *, fresh: bool
) -> tuple[Command, ...]:
    """Return the plan's commands; what only the kernel knows is left to a command's own output."""
    lines: list[Command] = []
    lines += view.made
    for op in plan:
        if isinstance(op, SetMtu) and port.settings.mtu is None and seen.bridge is None:
            own = piped(
                sh("ip", "-o", "link", "show", "dev", port.place.name),
                sh("sed", r"s/.* mtu \([0-9]*\).*/\1/"),
            )
            lines.append(set_link(port.tap, "mtu", output(own)))
        else:
            lines += op.commands_of_new() if fresh else op.commands()
    return (*lines, *view.marked)


def _wanted(port: Port, kind: PortKind | None, seen: Seen, ipv6: bool) -> tuple[Wanted, ...]:
    """Return every setting of the wanted state, those of `port` first."""
    found = [Wanted("network", port.network, port.network), *_wanted_place(port, kind)]
    given = _given(port)
    for field in fields(PortSettings):
        value: object = getattr(port.settings, field.name)
        if field.name not in given:
            continue
        if field.name == "mtu":
            found.append(_wanted_mtu(port, seen))
        elif isinstance(value, Vlan) or field.name == "vlan":
            vlan = port.settings.vlan
            words = show_vlan(vlan) if vlan else f"none: the {port.place.noun}'s untagged network"
            found.append(Wanted("vlan", json_vlan(vlan), words))
        elif isinstance(value, tuple):
            pairs = dict(value)
            words = ", ".join(f"{key}={pairs[key]}" for key in sorted(pairs)) or "none"
            found.append(Wanted(field.name, pairs, words))
        elif isinstance(value, bool):
            found.append(Wanted(field.name, value, "true" if value else "false"))
        else:
            found.append(Wanted(field.name, value, "left alone" if value is None else str(value)))
    found += [_wanted_nat(port.made)] if port.made is not None else []
    found.append(_wanted_mac(port, seen))
    none = "this kernel has no IPv6"
    found.append(Wanted("addrgenmode", "none" if ipv6 else None, "none" if ipv6 else none))
    written = ipv6 and seen.sysctl
    why = "left alone: /proc/sys/net cannot be written" if ipv6 else none
    found.append(Wanted("disable_ipv6", written or None, "true" if written else why))
    found.append(Wanted("link", "up", "up"))
    return tuple(found)


def _given(port: Port) -> frozenset[str]:
    """Return the settings that such a network's port may have, whatever kind it is found to be."""
    own = spec_at(port.place)
    specs = named_by(own.key) if own is not None else said()
    return frozenset[str]().union(*(spec.settings for spec in specs))


def _wanted_mac(port: Port, seen: Seen) -> Wanted:
    """Return the MAC that the link is to have."""
    maker, tap = kinds.maker_at(port), seen.tap
    if maker is not None:
        mac = maker.mac(port, tap) if tap is not None else None
        return Wanted("mac", mac, mac or "that of the guest's device")
    mac = host_mac(tap.mac) if tap is not None and tap.mac else None
    return Wanted("mac", mac, mac or "fe: and the other five bytes of the tap's own")


def _wanted_place(port: Port, kind: PortKind | None) -> list[Wanted]:
    """Return where the port is to be, each of its place's keys; the kind is the second.

    A key that others of the same key have, and this kind has not, is told of as such.
    """
    spec = spec_of(kind.name) if kind is not None else None
    shape = type(port.place) if spec is None else spec.found or spec.place
    own = {each.name for each in fields(spec.place if spec is not None else shape)}
    found = []
    for each in fields(shape):
        if spec is not None and each.name not in own:
            noun = each.metadata.get("noun", each.name)
            found.append(Wanted(each.name, None, f"none: {spec.title} has no {noun}"))
        else:
            value = getattr(port.place, each.name)
            found.append(Wanted(each.name, value, str(value)))
    name = spec.name if spec is not None else None
    return [*found[:1], Wanted("kind", name, name or "not known here"), *found[1:]]


def _wanted_nat(nat: Nat) -> Wanted:
    """Return the network that is made for its first tap."""
    forwards = [f"{show_from(each)} to {each.to_address}:{each.to_port}" for each in nat.forward]
    value: dict[str, object] = {
        "ipv4": nat.ipv4,
        "ipv6": nat.ipv6,
        "dhcp": nat.dhcp is not None,
        "dns": nat.dns is not None,
        "domain": nat.dns or None,
        "forward": forwards,
        "outbound": nat.outbound,
        "host": "any" if nat.host is None else [show_service(each) for each in nat.host],
    }
    words = [address for address in (nat.ipv4, nat.ipv6) if address is not None]
    words += ["DHCP"] if nat.dhcp is not None else []
    words += [f"DNS {nat.dns}".rstrip()] if nat.dns is not None else []
    words += [f"forward {each}" for each in forwards]
    words += [] if nat.outbound else ["this host and guests only"]
    if nat.host is not None:
        services = " ".join(map(show_service, nat.host))
        words.append(f"of this host {services or 'nothing more'}")
    return Wanted("nat", value, f"made where it is not there: {', '.join(words)}")


def _wanted_mtu(port: Port, seen: Seen) -> Wanted:
    if port.settings.mtu is not None:
        return Wanted("mtu", port.settings.mtu, str(port.settings.mtu))
    if seen.bridge is not None:
        return Wanted(
            "mtu", seen.bridge.mtu, f"{seen.bridge.mtu}: that of {quote(port.place.name)}"
        )
    return Wanted("mtu", None, f"that of {quote(port.place.name)}")
