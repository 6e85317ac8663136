"""From what a network with `nat:` shall be and what there is of it to the steps between. Pure."""

from __future__ import annotations

from pyqemu_ifconf.policy import Nat
from pyqemu_ifconf.shell import quote
from pyqemu_ifup.drivers.links import NO_ADDRESS
from pyqemu_ifup.drivers.nft_table import Table, table_name
from pyqemu_ifup.drivers.sysctl import key
from pyqemu_ifup.made.base import WantedNetwork
from pyqemu_ifup.made.bridge import (
    AddAddress,
    AddBridge,
    DeleteBridge,
    MarkBridge,
    RemoveAddress,
    SetIpv4,
    SetOnBridge,
    TurnOn,
    WriteSwitch,
)
from pyqemu_ifup.made.names import bridge_alias
from pyqemu_ifup.made.nat.filter import DeleteTable, LoadTable
from pyqemu_ifup.made.nat.flows import ForgetFlows
from pyqemu_ifup.made.nat.look import Seen, addresses_of, spelled
from pyqemu_ifup.made.nat.loopback import ShutBolt
from pyqemu_ifup.made.nat.rules import wanted_table, wants_loopback
from pyqemu_ifup.made.nat.server import EndServer, Serve
from pyqemu_ifup.made.nat.switches import (
    ALL_LOCALNET,
    find_forwarding_off,
    ipv4_settings,
    needed,
    switches,
)
from pyqemu_ifup.ops import BY_MAC, Op, Plan, SetIpv6, SetMtu, SetUp


def make(wanted: WantedNetwork, seen: Seen) -> Plan:
    """Return the steps that make the network as it is wanted, isolation before connectivity.

    All that a new bridge is given is set, even what it has by now: other programs of the host's
    may set it too when they hear of a new link.
    """
    of, nat, link = (wanted.network, wanted.bridge), wanted.made, seen.bridge
    plan: list[Op] = []
    if link is None:
        plan.append(AddBridge(*of, nat.mtu))
    if link is None or not link.alias:
        plan.append(MarkBridge.of(*of))
    if link is None or link.mtu != nat.mtu:
        plan.append(SetOnBridge(*of, SetMtu(wanted.bridge, 0, nat.mtu)))
    if not seen.bolted:
        plan.append(ShutBolt(*of, needs_bolt(nat, seen)))
    plan += _set_switches(wanted, seen)
    table = wanted_table(*of, nat)
    if seen.table != table:
        plan += [LoadTable(*of, table, seen.table is not None), ForgetFlows(*of, nat)]
    for address in addresses_of(nat):
        if spelled(address) not in seen.addresses:
            plan.append(AddAddress(*of, address))
    if link is None or not link.up:
        plan.append(SetOnBridge(*of, SetUp(wanted.bridge, 0)))
    plan += (TurnOn(*of, name, "1") for name in find_forwarding_off(nat, seen.switches.get))
    return (*plan, *_serve(wanted, seen))


def _serve(wanted: WantedNetwork, seen: Seen) -> Plan:
    """Return the steps that have the dnsmasq run which the network needs, and no other."""
    of, server = (wanted.network, wanted.bridge), seen.server
    is_there = server.active or server.pid is not None
    ends = EndServer(*of, seen.folder, server.unit, server.pid) if is_there else None
    if seen.settings is None:
        return (ends,) if ends is not None else ()
    if seen.settings == server.settings:
        return ()
    return (Serve(*of, seen.folder, seen.settings, server.unit, ends),)


def _set_switches(wanted: WantedNetwork, seen: Seen) -> Plan:
    """Return the steps that set how the bridge takes IPv4 and IPv6."""
    of, nat, bridge = (wanted.network, wanted.bridge), wanted.made, wanted.bridge
    plan: list[Op] = []

    def is_due(name: str, value: str) -> bool:
        """Tell whether a switch is to be set: one that is not so, or of a new bridge."""
        is_so = seen.switches.get(name) in (value, None)
        return not is_so or (
            seen.bridge is None and name in seen.switches and name not in seen.fixed
        )

    ipv4 = tuple(
        (name, number, value)
        for name, number, value in ipv4_settings(nat)
        if is_due(f"ipv4/conf/{bridge}/{name}", str(value))
    )
    if ipv4:
        plan.append(SetIpv4(*of, ipv4))
    if not _gives_itself_right(seen.addrgenmode, nat):
        mode = NO_ADDRESS if nat.ipv6 is None else BY_MAC
        plan.append(SetOnBridge(*of, SetIpv6(bridge, 0, None, mode)))
    must = needed(bridge, nat)
    for name, value in switches(bridge, nat).items():
        if (name in must or name not in seen.fixed) and is_due(name, value):
            plan.append(WriteSwitch(*of, name, value))
    return tuple(plan)


def _gives_itself_right(mode: int | None, nat: Nat) -> bool:
    """Tell whether by this addrgenmode a link has an IPv6 address if the network has, else none."""
    return mode is None or (mode == NO_ADDRESS) is (nat.ipv6 is None)


def needs_bolt(nat: Nat, seen: Seen) -> bool:
    """Tell whether a frame for 127.0.0.0/8 would be taken in if no table of ours dropped it."""
    return wants_loopback(nat) or seen.switches.get(ALL_LOCALNET) == "1"


def restore(wanted: WantedNetwork, before: Seen) -> Plan:
    """Return the steps that give a network, which `make` has begun to change, back as it was.

    A table that had been changed by somebody else, and a dnsmasq that had ended, stay mended.
    """
    of, nat, link = (wanted.network, wanted.bridge), wanted.made, before.bridge
    assert link is not None
    changed = make(wanted, before)
    plan: list[Op] = []
    if before.table is not None and not Table.fault(before.table):
        plan += (LoadTable(*of, before.table, True) for op in changed if isinstance(op, LoadTable))
    for op in changed:
        if isinstance(op, SetIpv4):
            plan.append(SetIpv4(*of, _ipv4_before(wanted.bridge, op, before)))
    if _gives_itself_right(before.addrgenmode, nat) is False:
        plan.append(SetOnBridge(*of, SetIpv6(wanted.bridge, 0, None, before.addrgenmode)))
    plan += (
        WriteSwitch(*of, op.name, before.switches[op.name])
        for op in changed
        if type(op) is WriteSwitch
    )
    plan += (RemoveAddress(*of, op.address) for op in changed if isinstance(op, AddAddress))
    if nat.ipv6 is None:
        # NOTE: a link whose IPv6 is turned off loses its addresses.
        plan += (AddAddress(*of, each) for each in sorted(before.addresses) if ":" in each)
    plan += (
        SetOnBridge(*of, SetMtu(wanted.bridge, 0, link.mtu)) for op in changed if _sets_mtu(op)
    )
    return (*plan, *_serve_again(wanted, before))


def _serve_again(wanted: WantedNetwork, before: Seen) -> Plan:
    """Return the steps that have the dnsmasq run which ran before, and no other."""
    of, server = (wanted.network, wanted.bridge), before.server
    ends = EndServer(*of, before.folder, server.unit, None)
    if server.settings is not None and server.settings != before.settings:
        return (Serve(*of, before.folder, server.settings, server.unit, ends),)
    if before.settings is not None and not server.active and not server.recorded:
        return (ends,)
    return ()


def _sets_mtu(op: Op) -> bool:
    return isinstance(op, SetOnBridge) and isinstance(op.change, SetMtu)


def _ipv4_before(bridge: str, op: SetIpv4, before: Seen) -> tuple[tuple[str, int, int], ...]:
    return tuple(
        (name, number, int(before.switches[f"ipv4/conf/{bridge}/{name}"]))
        for name, number, _ in op.settings
    )


def unmake(end: EndServer) -> Plan:
    """Return the steps that take away what there is of a network, each whatever is there.

    `end` is the first of them: the bridge, if there is one, goes by its name.
    """
    of = (end.network, end.port)
    bridge = (DeleteBridge(*of),) if end.port else ()
    return (end, *bridge, DeleteTable(*of))


def differences(wanted: WantedNetwork, seen: Seen) -> tuple[str, ...]:
    """Return in words what of the network is not as it is wanted."""
    nat, link, bridge = wanted.made, seen.bridge, wanted.bridge
    if link is None:
        return (f"there is no bridge {quote(bridge)}",)
    found = []
    if link.alias != bridge_alias(wanted.network):
        found.append("the bridge does not carry our mark")
    if not link.up:
        found.append("the bridge is down")
    if link.mtu != nat.mtu:
        found.append(f"the bridge's MTU is {link.mtu}, not {nat.mtu}")
    found += [
        f"the bridge does not have {address}"
        for address in addresses_of(nat)
        if spelled(address) not in seen.addresses
    ]
    found += _switch_differences(wanted, seen)
    if not link.ipv6_disabled and not _gives_itself_right(seen.addrgenmode, nat):
        no = " no IPv6 address" if nat.ipv6 is not None else " IPv6 addresses"
        found.append(f"the bridge gives itself{no}")
    found += [f"{key(name)} is 0, not 1" for name in find_forwarding_off(nat, seen.switches.get)]
    if needs_bolt(nat, seen) and not seen.bolted:
        found.append("the bridge is open to this host's loopback addresses")
    if seen.table != wanted_table(wanted.network, bridge, nat):
        found.append(f"the nft table inet {table_name(wanted.network)} is not as the policy says")
    served = seen.server.settings
    if served is None and seen.settings is not None:
        found.append("no dnsmasq runs")
    elif served != seen.settings:
        found.append("its dnsmasq does not run as the policy says")
    return tuple(found)


def _switch_differences(wanted: WantedNetwork, seen: Seen) -> list[str]:
    """Return in words which switches of the bridge are not as they shall be, and could be."""
    nat, bridge = wanted.made, wanted.bridge
    must = needed(bridge, nat)
    values = {
        name: value
        for name, value in switches(bridge, nat).items()
        if name in must or name not in seen.fixed
    }
    for name, _, number in ipv4_settings(nat):
        values[f"ipv4/conf/{bridge}/{name}"] = str(number)
    return [
        f"{quote(key(name))} is {seen.switches[name]}, not {value}"
        for name, value in values.items()
        if seen.switches.get(name) not in (value, None)
    ]
