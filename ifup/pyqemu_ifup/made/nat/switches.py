"""The switches below /proc/sys/net that a network with `nat:` needs: of its bridge, and the host's.

What a bridge's switches do not see to, where they cannot be written, the network's table does.
"""

from __future__ import annotations

from collections.abc import Callable

from pyqemu_ifconf.policy import Nat
from pyqemu_ifup.drivers.sysctl import read_sysctl
from pyqemu_ifup.made.nat.rules import wants_forwarding, wants_loopback

FORWARD4, FORWARD6 = "ipv4/ip_forward", "ipv6/conf/all/forwarding"
ALL_LOCALNET = "ipv4/conf/all/route_localnet"
OF_BRIDGE = (
    *(f"ipv6/conf/{{}}/{name}" for name in ("accept_dad", "accept_ra", "autoconf", "disable_ipv6")),
    *(f"ipv4/conf/{{}}/{name}" for name in ("route_localnet", "accept_source_route")),
)
"""All switches of a bridge that may be written, with `{}` for its name."""
OF_HOST = (FORWARD4, FORWARD6, ALL_LOCALNET)


def switches(bridge: str, nat: Nat) -> dict[str, str]:
    """Return the switches of the bridge for IPv6, and their values, as far as they can be written.

    What of them is not `needed`, the table and `addrgenmode` see to as well.
    """
    settings = {f"ipv6/conf/{bridge}/disable_ipv6": "1"}
    if nat.ipv6 is not None:
        # NOTE: an address that is still being checked for a twin can be listened at by nobody.
        values = {"accept_dad": "0", "accept_ra": "0", "autoconf": "0"}
        settings = {f"ipv6/conf/{bridge}/{name}": value for name, value in values.items()}
        settings |= needed(bridge, nat)
    return settings


def needed(bridge: str, nat: Nat) -> dict[str, str]:
    """Return the switches that the network cannot do without, and their values."""
    return {f"ipv6/conf/{bridge}/disable_ipv6": "0"} if nat.ipv6 is not None else {}


def ipv4_settings(nat: Nat) -> tuple[tuple[str, int, int], ...]:
    """Return how the bridge takes IPv4: a switch's name, number (linux/ip.h) and value each."""
    settings = [("route_localnet", 26, int(wants_loopback(nat)))]
    if nat.ipv4 is not None:
        # NOTE: the option would lead a packet to whatever address it names.
        settings.append(("accept_source_route", 9, 0))
    return tuple(settings)


def find_forwarding_off(
    nat: Nat, read: Callable[[str], str | None] = read_sysctl
) -> tuple[str, ...]:
    """Return the switches that are 0, and keep this host from passing on for the network."""
    if not wants_forwarding(nat):
        return ()
    names = [FORWARD4] if nat.ipv4 is not None else []
    if nat.ipv6 is not None and nat.outbound:
        names.append(FORWARD6)
    return tuple(name for name in names if read(name) == "0")
