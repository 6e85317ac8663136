"""What a network with `nat:` is made of: names, the packet filter, dnsmasq's arguments. Pure.

nft(8): one table for each network, loaded in one transaction. dnsmasq(8) serves its bridge alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from socket import IPPROTO_UDP
from typing import TYPE_CHECKING

from pyqemu_ifconf.policy import DEFAULT_MTU, Forward, Nat, Service
from pyqemu_ifconf.shell import Command, into, joined, output, sh, write
from pyqemu_ifup.drivers.bolt import BYTECODE, LED
from pyqemu_ifup.stamp import ALIAS_MARK, BRIDGE_MARK
from pyqemu_ifup.system.lock import RUN

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.conntrack import Flow

TABLE = "pyqemu-ifup-"

LO = '"lo"'
ANY4 = bytes(4)
LOOPBACK4, MULTICAST4, BROADCAST4 = "127.0.0.0/8", "224.0.0.0/4", "255.255.255.255"
MULTICAST6, LINK_LOCAL6, MAPPED6 = "ff00::/8", "fe80::/10", "::ffff:0.0.0.0/96"
METADATA4 = ("169.254.0.0/16", "100.100.100.200", "168.63.129.16")
"""Where a cloud tells a host its secrets: RFC 3927's, and those of Alibaba and Azure."""
METADATA6 = ("fd00:ec2::254", "fd20:ce::254")
"""The same over IPv6, of AWS and Google."""
RAW, DSTNAT, FILTER, SRCNAT = -300, -100, 0, 100
"""nft(8)'s words for priorities, not all of which it takes in each hook."""


def bridge_alias(network: str) -> str:
    """Return the ifalias of the bridge of a network that we make."""
    return f"{BRIDGE_MARK}{network}"


def network_of(alias: str) -> str | None:
    """Return the network whose bridge carries this ifalias, None where it is not ours."""
    return alias[len(BRIDGE_MARK) :] if alias.startswith(BRIDGE_MARK) else None


def bridge_mac(network: str) -> str:
    """Return the MAC of a network's bridge: its own, and the same each time it is made.

    Locally administered (IEEE 802, 8.4), and below any `fe:` that its taps have.
    """
    digest = sha256(f"pyqemu-ifup bridge {network}".encode()).hexdigest()
    return ":".join(["02", *(digest[at : at + 2] for at in range(0, 10, 2))])


def table_name(network: str) -> str:
    """Return the name of the network's nft table."""
    return f"{TABLE}{network}"


def folder_name(network: str, netns: str, own: bool) -> str:
    """Return the folder of a network's files: leases, pid and lock.

    `own`: it is in the host's own network namespace; in another, `netns` is the inode of that.
    """
    return f"{RUN}/{network}" if own else f"{RUN}/{network}@{netns}"


def switches(bridge: str, nat: Nat) -> dict[str, str]:
    """Return below /proc/sys/net what the network's bridge has, where it can be written.

    What of it is not `needed`, the table and `addrgenmode` see to as well.
    """
    settings = {f"ipv6/conf/{bridge}/disable_ipv6": "1"}
    if nat.ipv6 is not None:
        # NOTE: an address that is still being checked for a twin can be listened at by nobody.
        values = {"accept_dad": "0", "accept_ra": "0", "autoconf": "0"}
        settings = {f"ipv6/conf/{bridge}/{name}": value for name, value in values.items()}
        settings |= needed(bridge, nat)
    return settings


def needed(bridge: str, nat: Nat) -> dict[str, str]:
    """Return below /proc/sys/net what the network's bridge cannot do without, and its value."""
    return {f"ipv6/conf/{bridge}/disable_ipv6": "0"} if nat.ipv6 is not None else {}


def ipv4_settings(nat: Nat) -> dict[tuple[str, int], int]:
    """Return how the bridge takes IPv4: a switch's name and number (linux/ip.h), and its value."""
    settings = {("route_localnet", 26): int(wants_loopback(nat))}
    if nat.ipv4 is not None:
        # NOTE: the option would lead a packet to whatever address it names.
        settings["accept_source_route", 9] = 0
    return settings


def subnet(address: str) -> str:
    """Return the subnet of a host's ADDRESS/LENGTH."""
    from ipaddress import ip_interface

    return str(ip_interface(address).network)


@dataclass(frozen=True)
class Chain:
    """A chain of an nft table, its rules in nft(8)'s words; no packet comes to one without a hook.

    The elements of a set, `{ ... }`, are sorted.
    """

    name: str
    type: str = ""
    hook: str = ""
    priority: int = 0
    rules: tuple[str, ...] = ()
    policy: str = "accept"


@dataclass(frozen=True)
class Table:
    """An nft table: the comment in it, its chains, and what else is in it, by name."""

    comment: str
    chains: tuple[Chain, ...]
    others: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether it carries our mark, or has been ours until all its rules were flushed."""
        flushed = self.chains and not any(chain.rules for chain in self.chains)
        return bool(flushed) or self.comment.startswith(f"{ALIAS_MARK} ")

    @property
    def whole(self) -> bool:
        """Whether it is as it was loaded, by whatever policy: its rules add up to its sum."""
        return not self.others and self.comment.endswith(f" sum={_sum(self.chains)}")

    def lines(self, chain: Chain) -> list[str]:
        """Return the rules of one of its chains as they are loaded, our mark among them."""
        mark = "" if chain.hook else f' comment "{self.comment}"'
        return [f"{rule}{mark}" for rule in chain.rules]

    @staticmethod
    def fault(table: Table | None) -> str:
        """Return in words what has become of a table, "" where it is as it was loaded."""
        if table is None:
            return "gone"
        return "" if table.whole else "changed by somebody else"


def _sum(chains: Iterable[Chain]) -> str:
    return sha256(repr(tuple(chains)).encode()).hexdigest()[:16]


def wanted_table(network: str, bridge: str, nat: Nat) -> Table:
    """Return the network's table as it shall be.

    Its comment, our mark, is a rule's, of a chain that no packet comes to: of a table's own not
    every nft(8) tells.
    """
    chains = (Chain("ours", rules=("counter",)), *_chains(bridge, nat))
    return Table(f"{ALIAS_MARK} network={network} sum={_sum(chains)}", chains)


def ruleset(network: str, bridge: str, nat: Nat) -> str:
    """Return the nft commands that make the network's table what it shall be, in one go."""
    return replacing(network, wanted_table(network, bridge, nat))


def replacing(network: str, table: Table) -> str:
    """Return the nft commands that put a whole table of ours in the place of the network's."""
    name = f"inet {table_name(network)}"
    lines = [f"table {name}", f"delete table {name}", f"table {name} {{"]
    for chain in table.chains:
        lines.append(f"\tchain {chain.name} {{")
        lines += [f"\t\t{_hooked(chain)}"] if chain.hook else []
        lines += [f"\t\t{rule}" for rule in table.lines(chain)]
        lines.append("\t}")
    return "\n".join([*lines, "}", ""])


def _hooked(chain: Chain) -> str:
    """Return where a chain that packets come to is, in nft(8)'s words."""
    return f"type {chain.type} hook {chain.hook} priority {chain.priority}; policy {chain.policy};"


def _chains(bridge: str, nat: Nat) -> list[Chain]:
    """Return the chains of the table that packets come to."""
    port = f'"{bridge}"'
    chains = [
        Chain("guard", "filter", "prerouting", RAW, _guard(port, nat)),
        Chain("forward", "filter", "forward", FILTER, _forward(port, nat)),
        Chain("leave", "nat", "postrouting", SRCNAT, _leave(port, nat)),
        Chain("left", "filter", "postrouting", SRCNAT + 10, _left(port, nat)),
    ]
    host = _host(port, nat, nat.host) if nat.host is not None else ()
    chains.append(Chain("host", "filter", "input", FILTER, (*_unheard(port, nat), *host)))
    if nat.forward:
        rules = tuple(map(_to_guest, nat.forward))
        chains.append(Chain("arrive", "nat", "prerouting", DSTNAT, rules))
        chains.append(Chain("own", "nat", "output", DSTNAT, rules))
    if wants_loopback(nat):
        chains.append(Chain("led", "filter", "prerouting", DSTNAT + 10, (
            f"iifname {port} ip daddr {LOOPBACK4} ct direction reply ct status dnat "
            f"meta mark set {LED}",
        )))  # fmt: skip
    return chains


def _set(*elements: str) -> str:
    """Return a set of nft(8)'s."""
    return f"{{ {', '.join(sorted(elements))} }}"


def _families(nat: Nat) -> Iterator[tuple[str, str]]:
    """Yield the families that the network has, in nft(8)'s words, with this host's address."""
    if nat.ipv4:
        yield "ip", nat.ipv4
    if nat.ipv6:
        yield "ip6", nat.ipv6


def _guard(port: str, nat: Nat) -> tuple[str, ...]:
    """Return the rules for what guests send, and for who else reaches the network's gateway."""
    own4 = [subnet(nat.ipv4)] if nat.ipv4 else []
    own6 = [subnet(nat.ipv6)] if nat.ipv6 else []
    return (
        *(
            f"iifname != {_set(port, LO)} {family} daddr {address.partition('/')[0]} drop"
            for family, address in _families(nat)
        ),
        f"iifname {port} ip daddr {_set(LOOPBACK4, *METADATA4)} drop",
        f"iifname {port} ip6 daddr {_set(MAPPED6, *METADATA6)} drop",
        # NOTE: 0.0.0.0 asks for an address.
        f"iifname {port} ip saddr != {_set('0.0.0.0', *own4)} drop",
        f"iifname {port} ip6 saddr != {_set('::', LINK_LOCAL6, *own6)} drop",
    )


def _forward(port: str, nat: Nat) -> tuple[str, ...]:
    """Return the rules for what this host passes on from guests, and to them."""
    rules = [f"iifname {port} oifname {port} accept"]
    if not nat.outbound:
        return (*rules, f"iifname {port} drop", f"oifname {port} drop")
    return (
        *rules,
        # NOTE: of these no address is translated (nf_nat of the kernel).
        f"iifname {port} ct state invalid,untracked drop",
        f"iifname {port} ip daddr {_set(MULTICAST4, BROADCAST4)} drop",
        f"iifname {port} fib daddr type broadcast drop",
        f"iifname {port} ip6 daddr {_set(MULTICAST6, LINK_LOCAL6)} drop",
        # NOTE: by its direction too: what was begun from outside while the table was not there
        # goes on being established.
        f"oifname {port} ct direction reply ct state established,related accept",
        f"oifname {port} ct status dnat accept",
        f"oifname {port} drop",
    )


def _unheard(port: str, nat: Nat) -> tuple[str, ...]:
    """Return the rules for what this host hears of no guest, whatever its switches are."""
    if nat.ipv6 is None:
        return (f"iifname {port} meta nfproto ipv6 drop",)
    return (f"iifname {port} icmpv6 type nd-router-advert drop",)


def _host(port: str, nat: Nat, services: Iterable[Service]) -> tuple[str, ...]:
    """Return the rules for what of this host's own its guests reach."""
    rules = [
        # NOTE: by its direction: what a guest has begun is looked at with each packet.
        f"iifname {port} ct direction reply ct state established,related accept",
        f"iifname {port} meta l4proto {_set('icmp', 'ipv6-icmp')} ct state related accept",
    ]
    for family, address in _families(nat):
        own = address.partition("/")[0]
        to = f"iifname {port} {family} daddr"
        if family == "ip":
            rules.append(f"{to} {own} meta l4proto icmp accept")
            if nat.dhcp is not None:
                rules.append(f"{to} {_set(own, BROADCAST4)} udp dport 67 accept")
            if nat.dns is not None:
                rules += [f"{to} {own} {protocol} dport 53 accept" for protocol in ("tcp", "udp")]
        else:
            near = _set(own, LINK_LOCAL6, MULTICAST6)
            rules.append(f"{to} {near} meta l4proto ipv6-icmp accept")
            rules.append(f"{to} {near} udp dport 547 accept")
            if nat.dns is not None:
                near = _set(own, LINK_LOCAL6)
                rules += [f"{to} {near} {protocol} dport 53 accept" for protocol in ("tcp", "udp")]
    for protocol in ("tcp", "udp"):
        for first, last in _merged(each for each in services if each.protocol == protocol):
            ports = f"{first}-{last}" if last > first else str(first)
            rules.append(f"iifname {port} {protocol} dport {ports} accept")
    return (*rules, f"iifname {port} drop")


def _merged(services: Iterable[Service]) -> list[tuple[int, int]]:
    """Return the ports of the services as ranges that do not touch, ascending."""
    found: list[tuple[int, int]] = []
    for first, last in sorted((each.first, each.last) for each in services):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _leave(port: str, nat: Nat) -> tuple[str, ...]:
    """Return the rules for whose address goes out in place of a guest's, or of our own."""
    rules = []
    for family, address in _families(nat):
        others = (MULTICAST4, BROADCAST4) if family == "ip" else (MULTICAST6, LINK_LOCAL6)
        own = subnet(address)
        if nat.forward and family == "ip":
            # NOTE: the answer of a guest to another must pass here, and so must one to 127.0.0.1.
            for source in (own, LOOPBACK4):
                rules.append(f"oifname {port} ip saddr {source} ct status dnat masquerade")
        if nat.outbound:
            rules.append(
                f"oifname != {port} {family} saddr {own} "
                f"{family} daddr != {_set(own, *others)} masquerade"
            )
    return tuple(rules)


def _left(port: str, nat: Nat) -> tuple[str, ...]:
    """Return the rules for what has kept an address of the subnet on its way elsewhere."""
    return tuple(
        f"oifname != {_set(port, LO)} {family} saddr {subnet(address)} drop"
        for family, address in _families(nat)
    )


def _to_guest(forward: Forward) -> str:
    where = "meta nfproto ipv4 fib daddr type local"
    if forward.address not in ("", "0.0.0.0"):
        where = f"ip daddr {forward.address}"
    return (
        f"{where} {forward.protocol} dport {forward.port} "
        f"dnat ip to {forward.to_address}:{forward.to_port}"
    )


def astray(nat: Nat, own: Iterable[str]) -> Callable[[Flow], bool]:
    """Return what tells whether a flow does not go as the table would have it, were it begun now.

    `own` are this host's addresses. A flow goes on as its first packet went, whatever the rules
    say since (nf_nat of the kernel): UDP that a forward has led or would lead, and whatever left
    the subnet with an address of it.
    """
    from ipaddress import ip_address, ip_interface

    hosts = {ip_address(each).packed for each in own}
    networks = [ip_interface(address).network for _, address in _families(nat)]
    # NOTE: a host tracks some 100,000 flows; that of an address's length, and its bits.
    subnets = {
        each.max_prefixlen // 8: (int(each.netmask), int(each.network_address)) for each in networks
    }
    led = {
        (forward.port, ip_address(forward.address or "0.0.0.0").packed)
        for forward in nat.forward
        if forward.protocol == "udp"
    }

    def is_within(address: bytes) -> bool:
        mask, bits = subnets.get(len(address), (0, 1))
        return int.from_bytes(address, "big") & mask == bits

    def is_astray(flow: Flow) -> bool:
        if flow.source == flow.answered and is_within(flow.source):
            return flow.destination not in hosts and not is_within(flow.destination)
        if nat.ipv4 is None or len(flow.source) != len(ANY4):
            return False
        protocol, port = flow.protocol
        if protocol != IPPROTO_UDP:
            return False
        if flow.answers != flow.destination:
            return is_within(flow.answers)
        return flow.destination in hosts and not led.isdisjoint(
            ((port, ANY4), (port, flow.destination))
        )

    return is_astray


def wants_loopback(nat: Nat) -> bool:
    """Tell whether a forward is from 127.0.0.1 as well, so that its packets must leave the host."""
    return any(
        forward.address in ("", "0.0.0.0") or forward.address.startswith("127.")
        for forward in nat.forward
    )


def wants_forwarding(nat: Nat) -> bool:
    """Tell whether this host passes packets on for the network."""
    return nat.outbound or bool(nat.forward)


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
        own = ip_interface(nat.ipv4)
        first, last = nat.dhcp.range or _all_but(nat.ipv4)
        words.append(f"dhcp-range={first},{last},{own.network.netmask},1h")
        words += [f"dhcp-host={mac},{address}" for mac, address in nat.dhcp.hosts]
        if not nat.outbound:
            words.append("dhcp-option=option:router")
        if nat.mtu != DEFAULT_MTU:
            words.append(f"dhcp-option=option:mtu,{nat.mtu}")
        if nat.dns is None:
            words.append("dhcp-option=option:dns-server")
    if nat.ipv6 is not None:
        words.append(f"dhcp-range={ip_interface(nat.ipv6).network.network_address},ra-only,64")
        mtu = f"mtu:{nat.mtu}," if nat.mtu != DEFAULT_MTU else ""
        # NOTE: the last number is the router's lifetime: 0 says that we are none.
        words.append(f"ra-param={bridge},{mtu}high,60,{1800 if nat.outbound else 0}")
        words.append("enable-ra")
        if nat.dns is None:
            words.append("dhcp-option=option6:dns-server")
    if nat.dns is None:
        words.append("port=0")
    elif nat.dns:
        words += [f"domain={nat.dns}", f"local=/{nat.dns}/"]
    if nat.dns is not None:
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
class Server:
    """The dnsmasq of a network, as it is to run: its settings, and the unit, None for a process.

    `record` is a file of the network's folder that says which process it is.
    """

    settings: tuple[str, ...]
    unit: str | None
    file: str
    ready: str
    record: str


def making_commands(
    network: str,
    bridge: str,
    nat: Nat,
    set_link: Iterable[Command],
    written: Mapping[str, str],
    folder: str,
    server: Server | None,
) -> list[Command]:
    """Return the commands that make the network, but for its mark, as an administrator would type.

    `set_link` are those that set more of the bridge, while it is down; `written` are files below
    /proc/sys/net and what is written to them.
    """
    link = ("ip", "link", "set", "dev", bridge)
    return [
        adding_command(network, bridge, nat),
        sh(*link, "mtu", str(nat.mtu)),
        sh("tc", "qdisc", "add", "dev", bridge, "clsact"),
        sh(
            "tc",
            "filter",
            "add",
            "dev",
            bridge,
            "ingress",
            "pref",
            "1",
            "protocol",
            "all",
            "bpf",
            "da",
            "bytecode",
            BYTECODE,
        ),
        *set_link,
        *(write(value, f"/proc/sys/net/{name}") for name, value in written.items()),
        *_table_commands(network, bridge, nat),
        *(sh("ip", "address", "add", each, "dev", bridge) for each in (nat.ipv4, nat.ipv6) if each),
        sh(*link, "up"),
        *(_serving_commands(folder, server) if server is not None else ()),
    ]


def marking_command(network: str, bridge: str) -> Command:
    """Return the command that marks the network's bridge as ours.

    It is the last of all: an agent takes away a bridge with this mark that no tap is on.
    """
    return sh("ip", "link", "set", "dev", bridge, "alias", bridge_alias(network))


def _table_commands(network: str, bridge: str, nat: Nat) -> Iterator[Command]:
    """Yield the commands that make the network's table, a line for each chain and rule."""
    name = ("inet", table_name(network))
    table = wanted_table(network, bridge, nat)
    yield sh("nft", "add", "table", *name)
    yield sh("nft", "flush", "table", *name)
    for chain in table.chains:
        yield sh(
            "nft",
            "add",
            "chain",
            *name,
            chain.name,
            *([f"{{ {_hooked(chain)} }}"] if chain.hook else []),
        )
        for rule in table.lines(chain):
            yield sh("nft", "add", "rule", *name, chain.name, rule)


def _serving_commands(folder: str, server: Server) -> Iterator[Command]:
    """Yield the commands that have the network's dnsmasq run, where `dnsmasq.look` finds it."""
    yield sh("mkdir", "-p", folder)
    yield into(sh("printf", r"%s\n", *server.settings), server.file)
    if server.unit is not None:
        yield sh("systemctl", "start", server.unit)
        return
    yield sh("dnsmasq", f"--conf-file={server.file}", f"--pid-file={server.ready}")
    process = output(sh("cat", server.ready))
    start = output(sh("awk", "{print $22}", joined("/proc/", process, "/stat")))
    namespace = output(sh("stat", "-Lc", "%i", "/proc/self/ns/pid"))
    yield into(sh("echo", process, start, namespace), server.record)


def adding_command(network: str, bridge: str, nat: Nat) -> Command:
    """Return the command that adds the network's bridge."""
    # NOTE: an MTU that is set to what it is pins nothing, and a port could lower it.
    return sh(
        "ip",
        "link",
        "add",
        "name",
        bridge,
        "address",
        bridge_mac(network),
        "mtu",
        str(nat.mtu + 1),
        "type",
        "bridge",
    )
