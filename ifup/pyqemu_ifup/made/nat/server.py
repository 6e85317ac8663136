"""The dnsmasq of a network with `nat:`: its settings, and the ops that start and end it."""

from __future__ import annotations

from dataclasses import dataclass

from pyqemu_ifconf.policy import DEFAULT_MTU, Dhcp, Nat
from pyqemu_ifconf.shell import Command, sh
from pyqemu_ifup.drivers import dnsmasq
from pyqemu_ifup.host import Host
from pyqemu_ifup.made.bridge import MadeOp


def wants_dnsmasq(nat: Nat) -> bool:
    """Tell whether the network needs a dnsmasq."""
    return nat.dhcp is not None or nat.dns is not None or nat.ipv6 is not None


def dnsmasq_settings(bridge: str, nat: Nat, folder: str, user: str) -> list[str]:
    """Return dnsmasq's settings, as in its file, or on its command line after a `--`.

    `folder` is the network's own, `user` whom it runs as.
    """
    from ipaddress import ip_interface

    # NOTE: by bind-interfaces it answers whoever reaches the address, on any link.
    words = [
        f"interface={bridge}",
        "except-interface=lo",
        "bind-dynamic",
        f"user={user}",
        f"dhcp-leasefile={folder}/leases",
        "no-ping",
        "dhcp-authoritative",
    ]
    if user == "root":
        # NOTE: who can become nobody else is no other group's either.
        words.append("group=")
    if nat.ipv4 is not None and nat.dhcp is not None:
        words += _dhcp_settings(nat, nat.ipv4, nat.dhcp)
    if nat.ipv6 is not None:
        words.append(f"dhcp-range={ip_interface(nat.ipv6).network.network_address},ra-only,64")
        mtu = f"mtu:{nat.mtu}," if nat.mtu != DEFAULT_MTU else ""
        # NOTE: the last number is the router's lifetime: 0 says that we are none.
        words.append(f"ra-param={bridge},{mtu}high,60,{1800 if nat.outbound else 0}")
        words.append("enable-ra")
        if nat.dns is None:
            words.append("dhcp-option=option6:dns-server")
    return [*words, *_dns_settings(nat)]


def _dhcp_settings(nat: Nat, host: str, dhcp: Dhcp) -> list[str]:
    """Return what guests are given by DHCP on a network where `host` is this host's address."""
    from ipaddress import ip_interface

    first, last = dhcp.range or _all_but(host)
    words = [f"dhcp-range={first},{last},{ip_interface(host).network.netmask},1h"]
    words += [f"dhcp-host={mac},{address}" for mac, address in dhcp.hosts]
    if not nat.outbound:
        words.append("dhcp-option=option:router")
    if nat.mtu != DEFAULT_MTU:
        words.append(f"dhcp-option=option:mtu,{nat.mtu}")
    if nat.dns is None:
        words.append("dhcp-option=option:dns-server")
    return words


def _dns_settings(nat: Nat) -> list[str]:
    """Return which names are resolved for guests."""
    if nat.dns is None:
        return ["port=0"]
    words = [f"domain={nat.dns}", f"local=/{nat.dns}/"] if nat.dns else []
    # NOTE: what this host calls its neighbours is not for guests to read.
    words.append("no-hosts")
    if not nat.outbound:
        # NOTE: a name that is asked for outside carries out whatever is in it.
        words.append("no-resolv")
    return words


def _all_but(address: str) -> tuple[str, str]:
    """Return the first and the last address of a subnet that may be a guest's."""
    from ipaddress import IPv4Interface

    own = IPv4Interface(address)
    first, last = own.network.network_address + 1, own.network.broadcast_address - 1
    # NOTE: dnsmasq gives nobody its own address, which may stand between.
    first = first + 1 if first == own.ip else first
    last = last - 1 if last == own.ip else last
    return str(first), str(last)


@dataclass(frozen=True)
class EndServer(MadeOp):
    """End the network's dnsmasq, wait until it has ended, and remove its settings.

    `unit` is its unit, `pid` its process; None if it is not, or that is not known.
    """

    folder: str
    unit: str | None
    pid: int | None

    def commands(self) -> tuple[Command, ...]:
        """Return what stops its unit, or ends its process, and removes its settings."""
        lines = self.ending()
        return (*lines, sh("rm", f"{self.folder}/{dnsmasq.SETTINGS}")) if lines else ()

    def ending(self) -> tuple[Command, ...]:
        """Return what ends it, and leaves its settings."""
        return dnsmasq.ending_commands(self.folder, self.unit, self.pid)

    async def run(self, host: Host) -> None:
        """End it; ended already is success. Raises Failure."""
        await dnsmasq.end(self.folder, host.deadline)


@dataclass(frozen=True)
class Serve(MadeOp):
    """Have a dnsmasq run that has these settings, and no other.

    `folder` is the network's own, `unit` the unit that it is to be, None if it is a process.
    `ends` is what ends one that runs with other settings.
    """

    folder: str
    settings: tuple[str, ...]
    unit: str | None
    ends: EndServer | None

    def commands(self) -> tuple[Command, ...]:
        """Return what writes its settings and starts it, where a later look finds it."""
        ending = self.ends.ending() if self.ends is not None else ()
        return (*ending, *dnsmasq.serving_commands(self.folder, self.settings, self.unit))

    async def run(self, host: Host) -> None:
        """Start it, after another has ended. Raises Failure."""
        await dnsmasq.serve(self.folder, self.settings, host.deadline)
