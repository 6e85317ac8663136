"""What a network with `nat:` is made of: names, the packet filter, dnsmasq's arguments. Pure.

nft(8): one table for each network, loaded in one transaction. dnsmasq(8) serves its bridge alone.
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256

from pyqemu_ifconf.policy import DEFAULT_MTU, Forward, Nat
from pyqemu_ifup.lock import RUN
from pyqemu_ifup.look import Flow
from pyqemu_ifup.stamp import ALIAS_MARK, BRIDGE_MARK

TABLE = "pyqemu-ifup-"

MULTICAST4, BROADCAST4, LOOPBACK4 = "224.0.0.0/4", "255.255.255.255", "127.0.0.0/8"
MULTICAST6, LINK_LOCAL6 = "ff00::/8", "fe80::/10"


def bridge_alias(network: str) -> str:
    """Return the ifalias of the bridge of a network that we make."""
    return f"{BRIDGE_MARK}{network}"


def network_of(alias: str) -> str | None:
    """Return the network whose bridge carries this ifalias, None where it is not ours."""
    return alias[len(BRIDGE_MARK):] if alias.startswith(BRIDGE_MARK) else None


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


def subnet(address: str) -> str:
    """Return the subnet of a host's ADDRESS/LENGTH."""
    from ipaddress import ip_interface

    return str(ip_interface(address).network)


def ruleset(network: str, bridge: str, nat: Nat) -> str:
    """Return the nft commands that make the network's table what it shall be, in one go."""
    name = f"inet {table_name(network)}"
    body = [line for chain in _chains(bridge, nat) for line in chain]
    return "\n".join([
        f"table {name}", f"delete table {name}", f"table {name} {{",
        *_chain("ours", "", [f'counter comment "{table_comment(network, bridge, nat)}"']),
        *body, "}", "",
    ])


def table_comment(network: str, bridge: str, nat: Nat) -> str:
    """Return the comment in the network's table: our mark, and a sum of what is in it.

    It is a rule's, of a chain that no packet comes to: of a table's own not every nft(8) tells.
    """
    body = "\n".join(line for chain in _chains(bridge, nat) for line in chain)
    return f"{ALIAS_MARK} network={network} sum={sha256(body.encode()).hexdigest()[:16]}"


def count_rules(bridge: str, nat: Nat) -> int:
    """Return how many rules the network's table has, that with the mark among them."""
    return 1 + sum(len(chain) - 3 for chain in _chains(bridge, nat))


def _chains(bridge: str, nat: Nat) -> list[list[str]]:
    """Return the chains of the table, each as its lines: head, type, rules, end."""
    port = f'"{bridge}"'
    chains = [
        _chain("guard", "filter hook prerouting priority raw", _guard(port, nat)),
        _chain("forward", "filter hook forward priority filter", _forward(port, nat)),
        _chain("leave", "nat hook postrouting priority srcnat", _leave(port, nat)),
    ]
    if nat.forward:
        rules = [_to_guest(forward) for forward in nat.forward]
        chains.append(_chain("arrive", "nat hook prerouting priority dstnat", rules))
        # NOTE: -100 is dstnat, which is a word for prerouting only.
        chains.append(_chain("own", "nat hook output priority -100", rules))
    return chains


def _chain(name: str, kind: str, rules: list[str]) -> list[str]:
    head = [f"\tchain {name} {{"] + ([f"\t\ttype {kind}; policy accept;"] if kind else [])
    return [*head, *(f"\t\t{rule}" for rule in rules), "\t}"]


def _guard(port: str, nat: Nat) -> list[str]:
    """Return the rules for what guests send: from their own addresses, and not to our loopback."""
    rules = []
    own4 = f"{subnet(nat.ipv4)}, " if nat.ipv4 else ""
    rules.append(f"iifname {port} ip daddr {LOOPBACK4} drop")
    # NOTE: 0.0.0.0 asks for an address.
    rules.append(f"iifname {port} ip saddr != {{ {own4}0.0.0.0 }} drop")
    own6 = f"{subnet(nat.ipv6)}, " if nat.ipv6 else ""
    rules.append(f"iifname {port} ip6 saddr != {{ {own6}{LINK_LOCAL6}, :: }} drop")
    return rules


def _forward(port: str, nat: Nat) -> list[str]:
    """Return the rules for what this host passes on from guests, and to them."""
    rules = [f"iifname {port} oifname {port} accept"]
    if not nat.outbound:
        return [*rules, f"iifname {port} drop", f"oifname {port} drop"]
    return [
        *rules,
        f"oifname {port} ct state established,related accept",
        f"oifname {port} ct status dnat accept",
        f"oifname {port} drop",
    ]


def _leave(port: str, nat: Nat) -> list[str]:
    """Return the rules for whose address goes out in place of a guest's, or of our own."""
    rules = []
    for address, family, others in (
        (nat.ipv4, "ip", f"{MULTICAST4}, {BROADCAST4}"),
        (nat.ipv6, "ip6", f"{MULTICAST6}, {LINK_LOCAL6}"),
    ):
        if address is None:
            continue
        own = subnet(address)
        if nat.forward and family == "ip":
            # NOTE: the answer of a guest to another must pass here, and so must one to 127.0.0.1.
            for source in (own, LOOPBACK4):
                rules.append(
                    f"oifname {port} ip saddr {source} ct status dnat masquerade"
                )
        if nat.outbound:
            rules.append(
                f"oifname != {port} {family} saddr {own} "
                f"{family} daddr != {{ {own}, {others} }} masquerade"
            )
    return rules


def _to_guest(forward: Forward) -> str:
    where = "fib daddr type local"
    if forward.address not in ("", "0.0.0.0"):
        where = f"ip daddr {forward.address}"
    return (
        f"meta nfproto ipv4 {where} {forward.protocol} dport {forward.port} "
        f"dnat ip to {forward.to_address}:{forward.to_port}"
    )


def is_led_by(nat: Nat, flow: Flow, own: Collection[str]) -> bool:
    """Tell whether a UDP flow was led by a forward of this network, or would be if it began now.

    `own` are this host's IPv4 addresses. A flow goes on to where its first packet went, whatever
    the rules say since (nf_nat of the kernel).
    """
    from ipaddress import ip_address, ip_network

    if nat.ipv4 is None:
        return False
    if flow.answers != flow.destination:
        return ip_address(flow.answers) in ip_network(subnet(nat.ipv4))
    return flow.destination in own and any(
        forward.protocol == "udp" and forward.port == flow.port
        and forward.address in ("", "0.0.0.0", flow.destination)
        for forward in nat.forward
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


def wants_dnsmasq(nat: Nat) -> bool:
    """Tell whether the network needs a dnsmasq."""
    return nat.dhcp is not None or nat.dns is not None or nat.ipv6 is not None


def dnsmasq_arguments(bridge: str, nat: Nat, folder: str, user: str) -> list[str]:
    """Return dnsmasq's arguments, without its own name; it becomes a daemon by itself.

    `folder` is the network's own, `user` whom it runs as.
    """
    from ipaddress import ip_interface

    words = [
        "--conf-file=/dev/null", f"--interface={bridge}", "--except-interface=lo",
        "--bind-interfaces", f"--user={user}", f"--pid-file={folder}/dnsmasq.pid",
        f"--dhcp-leasefile={folder}/leases", "--no-ping", "--dhcp-authoritative",
    ]
    if nat.ipv4 is not None and nat.dhcp is not None:
        own = ip_interface(nat.ipv4)
        first, last = nat.dhcp.range or _all_but(nat.ipv4)
        words.append(f"--dhcp-range={first},{last},{own.network.netmask},1h")
        words += [f"--dhcp-host={mac},{address}" for mac, address in nat.dhcp.hosts]
        if not nat.outbound:
            words.append("--dhcp-option=option:router")
        if nat.mtu != DEFAULT_MTU:
            words.append(f"--dhcp-option=option:mtu,{nat.mtu}")
        if nat.dns is None:
            words.append("--dhcp-option=option:dns-server")
    if nat.ipv6 is not None:
        words.append(f"--dhcp-range={ip_interface(nat.ipv6).network.network_address},ra-only,64")
        mtu = f"mtu:{nat.mtu}," if nat.mtu != DEFAULT_MTU else ""
        # NOTE: the last number is the router's lifetime: 0 says that we are none.
        words.append(f"--ra-param={bridge},{mtu}high,60,{1800 if nat.outbound else 0}")
        words.append("--enable-ra")
        if nat.dns is None:
            words.append("--dhcp-option=option6:dns-server")
    if nat.dns is None:
        words.append("--port=0")
    elif nat.dns:
        words += [f"--domain={nat.dns}", f"--local=/{nat.dns}/"]
    if nat.dns is not None:
        # NOTE: what this host calls its neighbours is not for guests to read.
        words.append("--no-hosts")
        if not nat.outbound:
            # NOTE: a name that is asked for outside carries out whatever is in it.
            words.append("--no-resolv")
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


def making_commands(network: str, bridge: str, nat: Nat) -> list[str]:
    """Return the commands that make the network, as an administrator would type them."""
    folder = f"{RUN}/{network}"
    lines = [
        f"ip link add {bridge} address {bridge_mac(network)} mtu {nat.mtu + 1} type bridge",
        f"ip link set dev {bridge} mtu {nat.mtu}",
        f"ip link set dev {bridge} alias '{bridge_alias(network)}'",
        "nft -f - <<'END'", *ruleset(network, bridge, nat).splitlines(), "END",
    ]
    lines += [f"ip address add {each} dev {bridge}" for each in (nat.ipv4, nat.ipv6) if each]
    lines.append(f"ip link set dev {bridge} up")
    if wants_forwarding(nat):
        lines += ["sysctl -w net.ipv4.ip_forward=1"] if nat.ipv4 else []
        if nat.ipv6 and nat.outbound:
            lines.append("sysctl -w net.ipv6.conf.all.forwarding=1")
    if wants_dnsmasq(nat):
        lines.append(f"mkdir -p {folder}")
        lines.append(" ".join(["dnsmasq", *dnsmasq_arguments(bridge, nat, folder, "dnsmasq")]))
    return lines
