"""How the parts of a network's `nat:` are read, and which of them must fit together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pyqemu_ifconf.kinds import SPECS
from pyqemu_ifconf.nodes import Errors, List, Map, Node, Scalar, entries, quote, show
from pyqemu_ifconf.policy import Dhcp, Forward, Nat, Network, Service
from pyqemu_ifconf.values import BAD, Bad, Schema, must_be, unknown_key
from pyqemu_ifconf.vms import MAC_PATTERN, PORT_MAX, is_mac

if TYPE_CHECKING:
    from ipaddress import IPv4Interface

KIND = next(spec for spec in SPECS if "nat" in spec.made)
"""The kind of network that is made."""
WITHOUT = ("kind", "vlan")
"""The keys that such a network cannot have, and others of its kind can."""

_ADDRESS = r"[0-9]{1,3}(\.[0-9]{1,3}){3}"
_RANGE = re.compile(rf"({_ADDRESS})-({_ADDRESS}|[0-9]{{1,3}})")
_SERVICE = re.compile(r"([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?/(tcp|udp)")
HOST_PATTERN = rf"^{_ADDRESS}/([89]|1[0-9]|2[0-9]|30)$"
HOST6_PATTERN = r"^[0-9A-Fa-f:]+/64$"
DOMAIN_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$"


def is_host_address(text: str) -> bool:
    """Tell whether `text` is ADDRESS/LENGTH of a host in an IPv4 subnet with room for guests."""
    from ipaddress import IPv4Interface  # only a network with nat: needs it

    if re.fullmatch(HOST_PATTERN[1:-1], text) is None:
        return False
    try:
        found = IPv4Interface(text)
    except ValueError:
        return False
    network = found.network
    return found.ip not in (network.network_address, network.broadcast_address) and not (
        found.is_loopback or found.is_multicast or found.is_unspecified or found.is_link_local
    )


def is_host6_address(text: str) -> bool:
    """Tell whether `text` is ADDRESS/64 of a host: a guest makes its address of a /64 (SLAAC)."""
    from ipaddress import IPv6Interface  # only a network with nat: needs it

    if re.fullmatch(HOST6_PATTERN[1:-1], text) is None:
        return False
    try:
        found = IPv6Interface(text)
    except ValueError:
        return False
    return found.ip != found.network.network_address and not (
        found.is_loopback or found.is_multicast or found.is_link_local
    )


@dataclass(frozen=True)
class NatField:
    """The mapping of a network's `nat:`; the walk reads what is in it."""

    words: str = "a mapping such as {ipv4: 192.168.76.1/24}"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the mapping as it is."""
        return node if isinstance(node, Map) else must_be(name, self.words, node, errors)

    def schema(self) -> Schema:
        """Return the mapping."""
        return {"$ref": "#/$defs/nat"}


@dataclass(frozen=True)
class DhcpField:
    """`true`, `false`, or a range of addresses and the addresses of known MACs."""

    words: str = "true, false, or a mapping with range and hosts"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return a Dhcp, or None for `false`; without a range all the subnet may be given."""
        if isinstance(node, Scalar) and node.plain and node.text in ("true", "false"):
            return Dhcp() if node.text == "true" else None
        if not isinstance(node, Map):
            return must_be(name, self.words, node, errors)
        span: tuple[str, str] | None = None
        hosts: list[tuple[str, str]] = []
        good = True
        for key, value in entries(node, errors, "key"):
            if key.text == "range":
                found = self._range(value, errors)
                good, span = good and found is not None, found
            elif key.text == "hosts":
                good = self._hosts(value, hosts, errors) and good
            else:
                unknown_key(key, name, ("range", "hosts"), errors)
                good = False
        return Dhcp(span, tuple(hosts)) if good else BAD

    @staticmethod
    def _range(node: Node, errors: Errors) -> tuple[str, str] | None:
        match = _RANGE.fullmatch(node.text) if isinstance(node, Scalar) else None
        if match is None:
            must_be("range", "a range such as 192.168.76.100-199", node, errors)
            return None
        first, last = match[1], match[3]
        if "." not in last:
            last = f"{first.rpartition('.')[0]}.{last}"
        return first, last

    @staticmethod
    def _hosts(node: Node, hosts: list[tuple[str, str]], errors: Errors) -> bool:
        if not isinstance(node, Map):
            must_be("hosts", "a mapping of MACs to addresses", node, errors)
            return False
        good = True
        for key, value in entries(node, errors, "MAC"):
            if not is_mac(key.text):
                errors.add(key, f"hosts has {quote(key.text)}, which is not the MAC of a device")
                good = False
            elif not isinstance(value, Scalar) or re.fullmatch(_ADDRESS, value.text) is None:
                must_be(f"the address of {key.text}", "an IPv4 address", value, errors)
                good = False
            else:
                hosts.append((key.text.lower(), value.text))
        return good

    def schema(self) -> Schema:
        """Return the boolean, or the mapping."""
        mapping: Schema = {
            "type": "object",
            "properties": {
                "range": {"type": "string", "pattern": f"^{_RANGE.pattern}$"},
                "hosts": {
                    "type": "object",
                    "propertyNames": {"pattern": MAC_PATTERN},
                    "additionalProperties": {"type": "string", "pattern": f"^{_ADDRESS}$"},
                },
            },
            "additionalProperties": False,
        }
        return {"anyOf": [{"type": "boolean"}, mapping]}


@dataclass(frozen=True)
class Dns:
    """`true`, `false`, or `{domain: NAME}`."""

    words: str = "true, false, or a mapping with domain"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the domain, empty for none; None for `false`."""
        if isinstance(node, Scalar) and node.plain and node.text in ("true", "false"):
            return "" if node.text == "true" else None
        if not isinstance(node, Map):
            return must_be(name, self.words, node, errors)
        domain: str | Bad = ""
        for key, value in entries(node, errors, "key"):
            if key.text != "domain":
                unknown_key(key, name, ("domain",), errors)
                domain = BAD
            elif isinstance(value, Scalar) and re.fullmatch(DOMAIN_PATTERN[1:-1], value.text):
                domain = value.text
            else:
                domain = must_be("domain", "a domain name", value, errors)
        return domain

    def schema(self) -> Schema:
        """Return the boolean, or the mapping."""
        mapping: Schema = {
            "type": "object",
            "properties": {"domain": {"type": "string", "pattern": DOMAIN_PATTERN}},
            "additionalProperties": False,
        }
        return {"anyOf": [{"type": "boolean"}, mapping]}


@dataclass(frozen=True)
class Services:
    """`any`, or a list of `PORT/tcp`, `PORT-PORT/tcp` and the same of `udp`."""

    words: str = "any, or a list such as [8080/tcp, 5000-5009/udp]"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the services as a tuple, None for `any`."""
        if isinstance(node, Scalar) and node.text == "any":
            return None
        if not isinstance(node, List):
            hint = f"write [{show(node)}]" if self._service(node) is not None else ""
            return must_be(name, self.words, node, errors, hint)
        found: list[Service] = []
        for item in node.items:
            service = self._service(item)
            if service is None:
                number = isinstance(item, Scalar) and re.fullmatch("[1-9][0-9]{0,4}", item.text)
                hint = f"write {item.text}/tcp" if number and isinstance(item, Scalar) else ""
                must_be(name, "PORT/tcp, PORT-PORT/tcp, or /udp", item, errors, hint)
            else:
                found.append(service)
        return tuple(found)

    @staticmethod
    def _service(node: Node) -> Service | None:
        match = _SERVICE.fullmatch(node.text) if isinstance(node, Scalar) else None
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        return Service(match[3], first, last) if first <= last <= PORT_MAX else None

    def schema(self) -> Schema:
        """Return the word, or a list of such ports."""
        port: Schema = {"type": "string", "pattern": f"^{_SERVICE.pattern}$"}
        return {"anyOf": [{"const": "any"}, {"type": "array", "items": port}]}


def show_service(service: Service) -> str:
    """Return the service as the policy has it."""
    last = f"-{service.last}" if service.last != service.first else ""
    return f"{service.first}{last}/{service.protocol}"


def check_nat(
    values: Mapping[str, Any], nodes: Mapping[str, Node], place: Scalar, errors: Errors
) -> None:
    """Report the parts of one `nat:` that do not fit together; `place` is its key."""
    if "ipv4" not in nodes and "ipv6" not in nodes:
        errors.add(place, "nat has neither ipv4 nor ipv6; write ipv4: 192.168.76.1/24")
        return
    if "ipv4" not in nodes:
        for name in ("dhcp", "forward"):
            if name in nodes and values.get(name):
                errors.add(nodes[name], f"{name} is for IPv4, and nat has no ipv4; remove {name}")
        return
    if "ipv4" not in values:
        return
    dhcp = values.get("dhcp")
    if isinstance(dhcp, Dhcp):
        _check_dhcp(dhcp, values["ipv4"], nodes["dhcp"], errors)
    node = nodes.get("forward")
    if isinstance(node, List):
        _check_forwards(values.get("forward", ()), values["ipv4"], node, errors)


@lru_cache(maxsize=64)
def _interface(text: str) -> IPv4Interface:
    from ipaddress import IPv4Interface

    return IPv4Interface(text)


def _outside(address: str, host: str) -> str:
    """Return why `address` is no guest's in the subnet of `host`, or "" if it can be one."""
    from ipaddress import IPv4Address

    subnet = _interface(host)
    try:
        found = IPv4Address(address)
    except ValueError:
        return "it is no IPv4 address"
    if found not in subnet.network:
        return f"it is not in {subnet.network}"
    if found in (subnet.network.network_address, subnet.network.broadcast_address):
        return f"it is no host's in {subnet.network}"
    return "it is this host's own" if found == subnet.ip else ""


def _check_forwards(forwards: Iterable[Forward], host: str, node: Node, errors: Errors) -> None:
    for forward in forwards:
        fault = _outside(forward.to_address, host) if forward.to_address else "it names no guest"
        if fault:
            errors.add(node, f"a forward to {quote(forward.to_address)}:{forward.to_port}: {fault}")


def _check_dhcp(dhcp: Dhcp, host: str, node: Node, errors: Errors) -> None:
    from ipaddress import IPv4Address

    for end in dhcp.range or ():
        fault = _outside(end, host)
        if fault:
            errors.add(node, f"range has {end}: {fault}")
            return
    if dhcp.range is not None and IPv4Address(dhcp.range[0]) > IPv4Address(dhcp.range[1]):
        errors.add(node, f"the range {dhcp.range[0]}-{dhcp.range[1]} runs backwards")
    seen: set[str] = set()
    for mac, address in dhcp.hosts:
        fault = _outside(address, host)
        if fault:
            errors.add(node, f"hosts gives {mac} the address {address}: {fault}")
        elif address in seen:
            errors.add(node, f"hosts gives {address} to two MACs")
        seen.add(address)


def overlaps(networks: Iterable[Network]) -> list[tuple[Network, Network, str]]:
    """Return each network whose subnet overlaps that of another one, and the nearest such one.

    The one that comes later is the first of the pair.
    """
    from ipaddress import ip_interface

    subnets = [
        (subnet.version, subnet.network_address, -subnet.num_addresses, at, network, subnet)
        for at, network in enumerate(networks)
        if network.made is not None
        for subnet in (ip_interface(each).network for each in _subnets(network.made))
    ]
    # NOTE: of two subnets that overlap, one is in the other, and it is sorted after the other.
    subnets.sort(key=lambda row: row[:4])
    around: list[Any] = []
    found = []
    for row in subnets:
        while around and not (around[-1][0] == row[0] and around[-1][5].overlaps(row[5])):
            around.pop()
        if around:
            first, last = sorted((row, around[-1]), key=lambda each: int(each[3]))
            why = f"its subnet {last[5]} overlaps {first[5]}"
            found.append((int(last[3]), (last[4], first[4], why)))
        around.append(row)
    return [pair for _, pair in sorted(found, key=lambda each: each[0])]


def _subnets(nat: Nat | None) -> list[str]:
    assert nat is not None
    return [each for each in (nat.ipv4, nat.ipv6) if each]
