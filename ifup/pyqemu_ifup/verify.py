"""Proves it: looks again and compares with what was wanted; and tells what else is to be known."""

from __future__ import annotations

import syslog

from pyqemu_ifconf.failure import Failure, OfCaller, Status
from pyqemu_ifconf.policy import Port
from pyqemu_ifconf.shell import quote, sh
from pyqemu_ifup import kinds
from pyqemu_ifup.claims import is_taken_over
from pyqemu_ifup.hook import log
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.base import PortKind
from pyqemu_ifup.look import Link, Seen
from pyqemu_ifup.plan import check_bridge_mtu, differences
from pyqemu_ifup.settings import ADDRESS_MAY_COME, IPV6, OF_CONTAINER, UNWRITABLE, gets_address


async def verify(
    host: Host, port: Port, kind: PortKind, before: Seen, *, up: bool, told: bool = False
) -> None:
    """Look again. Raises Failure where what is differs from what was wanted: 71, or as `claim`.

    `told`: whoever serves the bridge has just told all that it knew, and need not be asked. What
    may become so by itself is waited for. Raises Failure (75) with the deadline.
    """
    while True:
        await kind.settle(host, port, up=up, told=told)
        now = kinds.look(host, port.tap, port.place.name)
        if now.tap is None or before.tap is None or now.tap.index != before.tap.index:
            raise OfCaller(
                Status.REFUSED,
                "the tap has gone meanwhile",
                "its QEMU has ended or closed it",
                "see whether the calling process still runs",
            )
        # NOTE: first the cause, then its effects: with mtu: bridge, a bridge whose MTU the tap has
        # lowered agrees with the tap.
        kind.claim(port, now)
        check_bridge_mtu(port, kind, before, now)
        # NOTE: a host that can keep no IPv6 address away is told so, and not that its taps fail.
        found = [each for each in differences(port, kind, now, up=up) if each.setting != IPV6]
        if not found:
            break
        if not all(each.passing for each in found):
            raise Failure(
                Status.REFUSED,
                "what was read back differs",
                "; ".join(map(str, found)),
                f"see who else manages this {port.place.noun}",
            )
        host.deadline.check("; ".join(map(str, found)))
    if up:
        _tell_of_mac(port, before, now)
        _tell_of_ipv6(port, now)


def tell_taken_over(seen: Seen) -> None:
    """Say of a tap that a script has put on the wanted bridge that it is ours from now on."""
    if is_taken_over(seen):
        assert seen.tap is not None and seen.master is not None
        log(
            syslog.LOG_NOTICE,
            f"{quote(seen.tap.name)}: taken over: it was on {quote(seen.master.name)} already, "
            "where another script has put it; that need not be run any more",
        )


def tell_of_sitting(host: Host, port: Port, tap: Link | None) -> None:
    """Warn of what of the host's sits on a tap that was there before its QEMU.

    What cannot be looked at is only told: the tap is attached all the same.
    """
    if tap is None or not tap.persistent:
        # NOTE: QEMU has just made it, and nobody else has had it.
        return
    from pyqemu_ifup.on_port import find_sitting

    try:
        sights = host.kernel.sights(routes_of=(tap.index,))
    except Failure as failure:
        log(
            syslog.LOG_WARNING,
            f"{quote(port.tap)}: cannot tell what of this host's sits on it: {failure}",
        )
        return
    for found in find_sitting(tap, port.place.name, sights):
        log(syslog.LOG_WARNING, f"{quote(port.tap)}: {found.what}: {found.why}; {found.remedy}")


def _tell_of_ipv6(port: Port, now: Seen) -> None:
    """Say what would keep an IPv6 address from the host's end, if nothing of ours does."""
    if now.tap is None or not gets_address(now.tap):
        return
    why, remedy = "its disable_ipv6 is 0 again", "see who else sets that"
    if not now.sysctl:
        why, remedy = UNWRITABLE, OF_CONTAINER
    log(syslog.LOG_WARNING, f"{quote(port.tap)}: {ADDRESS_MAY_COME}: {why}; {remedy}")


def _tell_of_mac(port: Port, before: Seen, now: Seen) -> None:
    """Say how to pin the MAC of a bridge that has none of its own and has taken the tap's."""
    if before.bridge is None or now.bridge is None or now.tap is None or not now.tap.tap:
        return
    if now.bridge.mac == now.tap.mac != before.bridge.mac:
        from pyqemu_ifup.system.own_mac import mac_for, this_host  # rare

        log(
            syslog.LOG_NOTICE,
            f"{quote(port.tap)}: {quote(port.place.name)} has no MAC of its own and has taken the "
            "tap's; pin one: "
            + sh(
                "ip",
                "link",
                "set",
                "dev",
                port.place.name,
                "address",
                mac_for(port.place.name, this_host()),
            ),
        )
