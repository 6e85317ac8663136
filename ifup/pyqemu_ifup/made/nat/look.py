"""What there is of a network with `nat:` on this host, looked at as one value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_interface

from pyqemu_ifconf.failure import Forbidden
from pyqemu_ifconf.policy import Nat
from pyqemu_ifconf.shell import quote
from pyqemu_ifup.drivers import dnsmasq
from pyqemu_ifup.drivers import nft_program as nft
from pyqemu_ifup.drivers.nft_table import Table
from pyqemu_ifup.drivers.sysctl import is_writable, read_sysctl
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link
from pyqemu_ifup.made.base import WantedNetwork
from pyqemu_ifup.made.folder import folder_of
from pyqemu_ifup.made.nat import loopback
from pyqemu_ifup.made.nat.server import dnsmasq_settings, wants_dnsmasq
from pyqemu_ifup.made.nat.switches import OF_BRIDGE, OF_HOST


@dataclass(frozen=True)
class Seen:
    """What there is of a network.

    `bridge` is None if it is not there; then `switches` and `addrgenmode` are what a new link gets.
    `addresses` are as the kernel spells them. `switches` are those below /proc/sys/net that the
    kernel has, and `fixed` those of them that cannot be written. `bolted`: the bridge drops what
    comes for a loopback address. `server` is its dnsmasq, and `settings` those that one shall have,
    None if the network needs none.
    """

    bridge: Link | None
    addresses: frozenset[str]
    switches: Mapping[str, str]
    fixed: frozenset[str]
    addrgenmode: int | None
    bolted: bool
    table: Table | None
    folder: str
    server: dnsmasq.Found
    settings: tuple[str, ...] | None


async def look(host: Host, wanted: WantedNetwork, *, guess: bool = False) -> Seen:
    """Look at what there is of a network, whose bridge is its own or nobody's.

    With `guess`, it is told as root would find it: a packet filter that a user may not look at has
    no table of the network's, and what a user may not write can be written.
    Raises Failure: 75 with the host's deadline, 77 if this process may not look, 71.
    """
    try:
        return await _look(host, wanted, guess=guess)
    except PermissionError as error:
        what = f"cannot look at {quote(str(error.filename))}"
        raise Forbidden(what, error.strerror or str(error)) from error


async def _look(host: Host, wanted: WantedNetwork, *, guess: bool) -> Seen:
    link = host.kernel.look_up(wanted.bridge)
    # NOTE: a new link has what stands below `default`.
    of = {each.format(wanted.bridge): each.format(_there(link)) for each in OF_BRIDGE}
    values = {name: read_sysctl(path) for name, path in of.items()}
    values |= {name: read_sysctl(name) for name in OF_HOST}
    mode = read_sysctl("ipv6/conf/default/addr_gen_mode")
    addresses = host.kernel.addresses() if link is not None else []
    folder = folder_of(wanted.network)
    return Seen(
        bridge=link,
        addresses=frozenset(text for index, text in addresses if link and index == link.index),
        switches={name: value for name, value in values.items() if value is not None},
        fixed=frozenset(
            name
            for name, path in of.items()
            if not (guess and os.geteuid() != 0) and not is_writable(path)
        ),
        addrgenmode=link.addrgenmode if link is not None else int(mode) if mode else None,
        bolted=link is not None and loopback.is_shut(link.index),
        table=await _read_table(host, wanted.network, guess=guess),
        folder=folder,
        server=await dnsmasq.look(folder, host.deadline),
        settings=_settings(wanted, folder),
    )


async def _read_table(host: Host, network: str, *, guess: bool) -> Table | None:
    """Return the network's table, None if there is none, or no nft(8) to tell. Raises Failure."""
    if not nft.is_there():
        return None
    try:
        return await nft.read_table(network, host.deadline)
    except Forbidden:
        if not guess:
            raise
        return None


def _there(link: Link | None) -> str:
    return link.name if link is not None else "default"


def _settings(wanted: WantedNetwork, folder: str) -> tuple[str, ...] | None:
    """Return the settings that the network's dnsmasq shall have, None if it needs none."""
    if not wants_dnsmasq(wanted.made):
        return None
    user = dnsmasq.account().name
    return tuple(dnsmasq_settings(wanted.bridge, wanted.made, folder, user))


def spelled(address: str) -> str:
    """Return an ADDRESS/LENGTH as the kernel spells it."""
    return str(ip_interface(address))


def addresses_of(nat: Nat) -> tuple[str, ...]:
    """Return the addresses that the network's bridge shall have, as the policy spells them."""
    return tuple(address for address in (nat.ipv4, nat.ipv6) if address)
