"""What a network with `nat:` needs of this host: one list, by which up, `explain` and `doctor` go.

Each need looks, changes nothing, and returns the Failures that an up ends with, or raises one.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Sequence

from pyqemu_ifconf.failure import Failure, Forbidden, Lacking, Status
from pyqemu_ifconf.shell import Command, quote, sh, write
from pyqemu_ifup.drivers import dnsmasq
from pyqemu_ifup.drivers import nft_program as nft
from pyqemu_ifup.drivers.nft_table import table_name
from pyqemu_ifup.drivers.sysctl import read_sysctl, require_writable
from pyqemu_ifup.hook import SAFE_PATH
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link
from pyqemu_ifup.made.base import WantedNetwork
from pyqemu_ifup.made.folder import folder_of
from pyqemu_ifup.made.names import is_ours
from pyqemu_ifup.made.nat.rules import ruleset, subnet
from pyqemu_ifup.made.nat.server import dnsmasq_settings, wants_dnsmasq
from pyqemu_ifup.made.nat.switches import FORWARD6, find_forwarding_off, needed
from pyqemu_ifup.system.lock import require_folder
from pyqemu_ifup.task import Task

RTF_ADDRCONF = 0x40000
IP_FREEBIND, IPV6_FREEBIND = 15, 78
"""linux/in.h, linux/in6.h: an address that is not there yet can be bound to."""
DNS, DHCP = 53, 67


async def require(host: Host, wanted: WantedNetwork) -> None:
    """Check that all is there that making the network needs. Raises Failure, that of the first."""
    if found := (await _find(host, wanted, NEEDS)):
        raise found[0]


async def find_unmet(host: Host, wanted: WantedNetwork) -> list[Failure]:
    """Return why an up could not make the network, the first as it would end; changes nothing.

    A Forbidden among them is what this process may not look at; one (75) with the deadline is the
    last, and what comes after that has not been looked at.
    """
    return await _find(host, wanted, (*NEEDS, *TRIALS))


async def _find(host: Host, wanted: WantedNetwork, needs: Sequence[Need]) -> list[Failure]:
    """Return all that is unmet, what the container lacks as one."""
    found: list[Failure] = []
    for need in needs:
        try:
            found += await need(host, wanted)
        except Failure as failure:
            # NOTE: a trial may fail for what a need has told of.
            found += [failure] if str(failure) not in map(str, found) else []
            if failure.status == Status.TRY_AGAIN:
                break
        except PermissionError as error:
            what = f"cannot look at {quote(str(error.filename))}"
            found.append(Forbidden(what, error.strerror or str(error)))
    lacking = [each for each in found if isinstance(each, Lacking)]
    if lacking:
        place = found.index(lacking[0])
        found = [each for each in found if not isinstance(each, Lacking)]
        found.insert(place, Lacking.join(lacking))
    return found


def own_bridge(host: Host, network: str, bridge: str) -> Link | None:
    """Return the bridge, None where there is none. Raises Failure (77): somebody else's."""
    link, what = host.kernel.look_up(bridge), ""
    if link is not None and not is_ours(link, network):
        what = f"{quote(bridge)} is somebody else's"
    elif link is None and (other := host.kernel.other_name_of(bridge)):
        what = f"{quote(bridge)} is another name of {quote(other)}"
    if what:
        raise Failure(
            Status.DENIED,
            what,
            f"network {network} has nat:, and makes a bridge of its own",
            f"correct bridge: of network {network} to a name that no interface has",
        )
    return link


def find_lacking(wanted: WantedNetwork) -> list[Failure]:
    """Return a Failure (69) for each program that the network needs and this host lacks."""
    nat = wanted.made
    programs = [(nft.PROGRAM, "nftables", "nat:")]
    if wants_dnsmasq(nat):
        # NOTE: with neither DHCP nor DNS it is there for the router advertisements alone.
        given = {"dhcp:": nat.dhcp is not None, "dns:": nat.dns is not None}
        keys = [name for name, is_given in given.items() if is_given] or ["ipv6:"]
        programs.append(("dnsmasq", "dnsmasq-base", " and ".join(keys)))
    return [
        Failure(
            Status.UNAVAILABLE,
            f"there is no {program} in {SAFE_PATH}",
            f"{needed_by} of network {wanted.network} needs it",
            _install(package),
        )
        for program, package, needed_by in programs
        if shutil.which(program, path=SAFE_PATH) is None
    ]


def _install(package: str) -> Command:
    if shutil.which("dnf", path=SAFE_PATH):
        return sh("dnf", "install", package.removesuffix("-base"))
    return sh("apt-get", "install", package)


# The needs


async def _bridge(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    own_bridge(host, wanted.network, wanted.bridge)
    return ()


async def _programs(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    return find_lacking(wanted)


async def _account(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """dnsmasq has a user to run as."""
    if wants_dnsmasq(wanted.made):
        dnsmasq.account()
    return ()


async def _capabilities(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """dnsmasq has what it needs to become that user."""
    if wants_dnsmasq(wanted.made):
        dnsmasq.require_capabilities()
    return ()


async def _folder(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """The network's folder can be made, and its lock opened."""
    require_folder(folder_of(wanted.network))
    return ()


async def _table(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """The nft table of a network that is not there is not somebody else's (77)."""
    if _is_there(host, wanted) or not nft.is_there():
        return ()
    table = await nft.read_table(wanted.network, host.deadline)
    if table is not None and not table.ours:
        raise Failure(
            Status.DENIED,
            f"the nft table inet {table_name(wanted.network)} is somebody else's",
            "it does not carry our mark",
            f"if it shall go: {sh('nft', 'delete', 'table', 'inet', table_name(wanted.network))}",
        )
    return ()


def _is_there(host: Host, wanted: WantedNetwork) -> bool:
    """Tell whether the network's bridge is there, and its own."""
    link = host.kernel.look_up(wanted.bridge)
    return link is not None and is_ours(link, wanted.network)


async def _subnets(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """No other link has an address or a route in the network's subnets (71)."""
    from ipaddress import ip_interface, ip_network

    if _is_there(host, wanted):
        return ()
    found: dict[object, Failure] = {}
    names = {link.index: link.name for link in host.kernel.links()}
    there = host.kernel.destinations()
    for address in filter(None, (wanted.made.ipv4, wanted.made.ipv6)):
        own = ip_network(subnet(address))
        for index, text in there:
            other = ip_interface(text).network
            if other.version == own.version and other.prefixlen > 0 and other.overlaps(own):
                found.setdefault(
                    own,
                    Failure(
                        Status.REFUSED,
                        f"subnet {own} of network {wanted.network} is in use",
                        f"{quote(names[index]) if index in names else f'link {index}'} has {text}",
                        f"give network {wanted.network} another subnet",
                    ),
                )
    return [*found.values()]


async def _ipv6(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """The kernel has IPv6 where the network does (71)."""
    if wanted.made.ipv6 is None or _has_ipv6():
        return ()
    return [
        Failure(
            Status.REFUSED,
            "this kernel has no IPv6",
            f"network {wanted.network} has ipv6:, and an IPv6 socket cannot be opened",
            f"boot without ipv6.disable=1, or take ipv6: from network {wanted.network}",
        )
    ]


def _has_ipv6() -> bool:
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise Failure(
                Status.REFUSED, "cannot open an IPv6 socket", str(error), "see dmesg(1)"
            ) from error
        return False
    return True


async def _advertisements(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """IPv6 forwarding would not cost this host its own address and route (71)."""
    nat = wanted.made
    if nat.ipv6 is None or not nat.outbound or read_sysctl(FORWARD6) == "1":
        return ()
    return [
        Failure(
            Status.REFUSED,
            "IPv6 forwarding is off, and cannot be turned on as it is",
            f"{quote(name)} lives by router advertisements, which it would heed no more",
            "let it heed them all the same: "
            + write("2", f"/proc/sys/net/ipv6/conf/{name}/accept_ra"),
        )
        for name in _by_advertisement()
        if read_sysctl(f"ipv6/conf/{name}/accept_ra") in ("0", "1")
    ]


def _by_advertisement() -> list[str]:
    """Return the links that have a route by a router's advertisement: a default one, or its prefix.

    /proc/net/ipv6_route: RTF_ADDRCONF is 0x40000 (linux/ipv6_route.h).
    """
    found = []
    try:
        with open("/proc/net/ipv6_route", "rb") as file:
            for line in file:
                words = line.split()
                if int(words[8], 16) & RTF_ADDRCONF:
                    found.append(os.fsdecode(words[9]))
    except FileNotFoundError:
        return []
    return [name for name in dict.fromkeys(found) if name != "lo"]


async def _switches(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """Each switch below /proc/sys/net that is needed is as it shall be, or can be written."""
    # NOTE: a bridge that is not there yet has what the kernel gives to each new link, and none is
    # there when a container is started.
    name = wanted.bridge if _is_there(host, wanted) else "default"
    fixed = {path: (path, "1") for path in find_forwarding_off(wanted.made)}
    every, own = needed("default", wanted.made), needed(name, wanted.made)
    for given, (path, value) in zip(every, own.items(), strict=True):
        fixed[path] = (given, value)
    found = []
    for path, (given, value) in fixed.items():
        if read_sysctl(path) not in (value, None):
            try:
                require_writable(path, value, given)
            except Failure as failure:
                found.append(failure)
    return found


async def _ports(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """Nobody has the ports of a dnsmasq that is to be started (71)."""
    nat = wanted.made
    if not wants_dnsmasq(nat):
        return ()
    if await _is_served(host, wanted):
        return ()
    sockets: list[tuple[socket.SocketKind, str, int]] = []
    if nat.dns is not None:
        own = (nat.ipv4, nat.ipv6 if nat.ipv6 is not None and _has_ipv6() else None)
        addresses = [each.partition("/")[0] for each in own if each is not None]
        kinds = (socket.SOCK_DGRAM, socket.SOCK_STREAM)
        sockets += [(kind, address, DNS) for address in addresses for kind in kinds]
    if nat.dhcp is not None:
        sockets.append((socket.SOCK_DGRAM, "0.0.0.0", DHCP))
    taken = [each for each in sockets if _is_taken(*each)]
    # NOTE: who only looks has no lock: one of ours that has begun since is told of before it
    # listens.
    if not taken or (await _is_served(host, wanted)):
        return ()
    return [_ports_taken(wanted.network, taken)]


async def _is_served(host: Host, wanted: WantedNetwork) -> bool:
    """Tell whether the network has a dnsmasq, or one that has ended, whose ports are its own."""
    folder = folder_of(wanted.network)
    if not os.path.isdir(folder):
        return False
    server = await dnsmasq.look(folder, host.deadline)
    # NOTE: one of ours that shall not go on is ended before another is started.
    return server.active or os.path.exists(f"{folder}/{dnsmasq.RECORD}")


def _ports_taken(network: str, taken: Sequence[tuple[socket.SocketKind, str, int]]) -> Failure:
    words = {socket.SOCK_DGRAM: "udp", socket.SOCK_STREAM: "tcp"}
    each = [f"port {port}/{words[kind]} of {quote(address)}" for kind, address, port in taken]
    protocols = dict.fromkeys(f"--{words[kind]}" for kind, _, _ in taken)
    ports = {port: {DNS: "dns", DHCP: "dhcp"}[port] for _, _, port in taken}
    show = sh(
        "ss",
        "--no-header",
        "--listening",
        "--numeric",
        "--processes",
        *protocols,
        " or ".join(f"sport = :{port}" for port in ports),
    )
    return Failure(
        Status.REFUSED,
        f"{' and '.join(each)} {'is' if len(each) == 1 else 'are'} taken, which network {network} "
        "needs for its dnsmasq",
        "somebody listens there on all addresses of this host",
        f"see who: {show}; let that listen at addresses of its own alone, or set "
        f"{' and '.join(f'{key}: false' for key in ports.values())} for network {network}",
    )


def _is_taken(kind: socket.SocketKind, address: str, port: int) -> bool:
    """Tell whether dnsmasq could not bind a socket as it does; nothing is sent or got.

    It does with these options (make_sock and make_fd of its network.c and dhcp.c). Raises Failure.
    """
    try:
        return _is_refused(kind, address, port)
    except OSError as error:
        raise Failure(
            Status.REFUSED,
            f"cannot tell whether port {port} of {quote(address)} is free",
            str(error),
            "see dmesg(1)",
        ) from error


def _is_refused(kind: socket.SocketKind, address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        else:
            probe.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        if port == DHCP:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            # NOTE: it takes nothing that is for others; who listens on all links is in its way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
            probe.bind((address, port))
        except PermissionError as error:
            # NOTE: the agent may not, as a unit; then the unit that is dnsmasq's tells.
            if os.geteuid() != 0:
                raise Forbidden(f"cannot tell whether port {port} is free", str(error)) from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return True
    return False


async def _loading(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """The kernel takes the network's table; an up finds out as it loads it."""
    if nft.is_there():
        text = ruleset(wanted.network, wanted.bridge, wanted.made)
        await nft.load(text, host.deadline, try_only=True)
    return ()


async def _starting(host: Host, wanted: WantedNetwork) -> Sequence[Failure]:
    """dnsmasq runs, and takes the network's settings; an up finds out as it starts one."""
    if wants_dnsmasq(wanted.made) and shutil.which(dnsmasq.PROGRAM, path=SAFE_PATH):
        folder, user = folder_of(wanted.network), dnsmasq.account().name
        settings = dnsmasq_settings(wanted.bridge, wanted.made, folder, user)
        await dnsmasq.try_settings(settings, host.deadline)
    return ()


Need = Callable[[Host, WantedNetwork], Task[Sequence[Failure]]]
NEEDS: tuple[Need, ...] = (
    _bridge,
    _programs,
    _account,
    _capabilities,
    _folder,
    _table,
    _subnets,
    _ipv6,
    _advertisements,
    _switches,
    _ports,
)
TRIALS: tuple[Need, ...] = (_loading, _starting)
"""What an up need not look at before, since it does no more than that itself."""
