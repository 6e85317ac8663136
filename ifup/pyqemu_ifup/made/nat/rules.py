"""The packet filter of a network with `nat:`, as a table of nft(8). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pyqemu_ifconf.policy import Forward, Nat, Service
from pyqemu_ifup.drivers.bolt import LED
from pyqemu_ifup.drivers.nft_table import Chain, Table, marked, text_of

LO = '"lo"'
LOOPBACK4, MULTICAST4, BROADCAST4 = "127.0.0.0/8", "224.0.0.0/4", "255.255.255.255"
MULTICAST6, LINK_LOCAL6, MAPPED6 = "ff00::/8", "fe80::/10", "::ffff:0.0.0.0/96"
METADATA4 = ("169.254.0.0/16", "100.100.100.200", "168.63.129.16")
"""Where a cloud tells a host its secrets: RFC 3927's, and those of Alibaba and Azure."""
METADATA6 = ("fd00:ec2::254", "fd20:ce::254")
"""The same over IPv6, of AWS and Google."""
RAW, DSTNAT, FILTER, SRCNAT = -300, -100, 0, 100
"""nft(8)'s words for priorities, not all of which it takes in each hook."""


def wanted_table(network: str, bridge: str, nat: Nat) -> Table:
    """Return the network's table as it shall be."""
    return marked(network, _chains(bridge, nat))


def ruleset(network: str, bridge: str, nat: Nat) -> str:
    """Return the text for nft(8) that makes the network's table what it shall be, in one go."""
    return text_of(network, wanted_table(network, bridge, nat))


def subnet(address: str) -> str:
    """Return the subnet of a host's ADDRESS/LENGTH."""
    from ipaddress import ip_interface

    return str(ip_interface(address).network)


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
    """Return a set of nft(8)'s; one element stands alone, as nft(8) tells such a set."""
    return f"{{ {', '.join(sorted(elements))} }}" if len(elements) > 1 else elements[0]


def families(nat: Nat) -> Iterator[tuple[str, str]]:
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
            for family, address in families(nat)
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
    for family, address in families(nat):
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
    for family, address in families(nat):
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
        for family, address in families(nat)
    )


def _to_guest(forward: Forward) -> str:
    where = "meta nfproto ipv4 fib daddr type local"
    if forward.address not in ("", "0.0.0.0"):
        where = f"ip daddr {forward.address}"
    return (
        f"{where} {forward.protocol} dport {forward.port} "
        f"dnat ip to {forward.to_address}:{forward.to_port}"
    )


def wants_loopback(nat: Nat) -> bool:
    """Tell whether a forward is from 127.0.0.1 as well, so that its packets must leave the host."""
    return any(
        forward.address in ("", "0.0.0.0") or forward.address.startswith("127.")
        for forward in nat.forward
    )


def wants_forwarding(nat: Nat) -> bool:
    """Tell whether this host passes packets on for the network."""
    return nat.outbound or bool(nat.forward)
