"""The tap itself, whatever bridge it is on: the settings that it is given, and gets back. Pure."""

from __future__ import annotations

from dataclasses import replace

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Port
from pyqemu_ifconf.shell import quote
from pyqemu_ifup.drivers.links import NO_ADDRESS
from pyqemu_ifup.kinds.base import Difference, PortKind, differing
from pyqemu_ifup.look import Link, Seen
from pyqemu_ifup.mark import Was
from pyqemu_ifup.ops import Op, Plan, SetIpv6, SetMac, SetMtu, SetTxQueueLen

IPV6_MTU_MIN = 1280
"""Bytes; IPV6_MIN_MTU of linux/ipv6.h (RFC 8200, 5)."""
IPV6 = "disable_ipv6"
"""What a Difference calls it that the host's end may get an IPv6 address."""


def target_mtu(port: Port, seen: Seen) -> int:
    """Return the MTU that the tap shall have, in bytes: the policy's, else the bridge's own.

    Raises Failure (71) where the bridge's interface cannot be seen.
    """
    if port.settings.mtu is not None:
        return port.settings.mtu
    if seen.bridge is None:
        raise Failure(
            Status.REFUSED,
            f"the MTU of {quote(port.place.name)} cannot be told",
            "it has no interface in this network namespace",
            f"give network {quote(port.network)} an mtu of its own",
        )
    return seen.bridge.mtu


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


def join(port: Port, kind: PortKind, seen: Seen, *, anew: bool = True) -> Plan:
    """Return the steps that give a link, which is down, its settings, before it joins its place.

    One that is not attached `anew`, but in place, is given those alone that it has not. Raises
    Failure (71) where the bridge's MTU cannot be told.
    """
    tap = seen.tap
    assert tap is not None
    mtu = target_mtu(port, seen)
    plan: list[Op] = []
    mac = kind.mac(port, tap)
    if mac != tap.mac:
        plan.append(SetMac(tap.name, tap.index, mac))
    if anew or tap.mtu != mtu:
        plan.append(SetMtu(tap.name, tap.index, mtu))
    if port.settings.txqueuelen is not None and (
        anew or port.settings.txqueuelen != tap.txqueuelen
    ):
        plan.append(SetTxQueueLen(tap.name, tap.index, port.settings.txqueuelen))
    if anew or gets_address(tap) is not False:
        plan += _no_address(tap, seen, mtu)
    return tuple(plan)


def differences(port: Port, kind: PortKind, seen: Seen) -> tuple[Difference, ...]:
    """Return what of the tap's own settings is not as wanted."""
    tap = seen.tap
    assert tap is not None
    found: list[Difference] = []
    if port.settings.mtu is not None or seen.bridge is not None:
        found += differing("mtu", target_mtu(port, seen), tap.mtu)
    if port.settings.txqueuelen is not None:
        found += differing("txqueuelen", port.settings.txqueuelen, tap.txqueuelen)
    found += differing("mac", kind.mac(port, tap), tap.mac)
    if gets_address(tap):
        found += differing(IPV6, True, tap.ipv6_disabled)
    return tuple(found)


def restore(before: Seen, now: Seen) -> Plan:
    """Return the steps that give the link itself the settings that it had."""
    tap, old = now.tap, before.tap
    assert tap is not None and old is not None
    plan: list[Op] = []
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
    return tuple(plan)


def was_before(before: Seen) -> Was | None:
    """Return what the mark is to say of a persistent tap as it was `before`; None of another."""
    tap = before.tap
    if tap is None or not tap.persistent:
        return None
    if tap.mark is not None:
        return tap.mark.was
    return Was(
        tap.mtu, tap.txqueuelen, tap.mac[:2], tap.ipv6_disabled is False, tap.addrgenmode, tap.up
    )


def give_back(now: Seen) -> Plan:
    """Return the steps that give a persistent tap the settings that its mark says it had."""
    return restore(as_it_was(now), now) if now.tap is not None else ()


def as_it_was(seen: Seen) -> Seen:
    """Return what was seen, a persistent tap of ours with the settings that it had before."""
    tap = seen.tap
    was = tap.mark.was if tap is not None and tap.mark is not None else None
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
