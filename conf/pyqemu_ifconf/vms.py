"""How the parts of `vms:` are read: guests, their NICs, and what user mode forwards."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyqemu_ifconf.names import NETWORK_NAME
from pyqemu_ifconf.nodes import Errors, List, Map, Node, Scalar, entries, show
from pyqemu_ifconf.policy import Forward
from pyqemu_ifconf.values import BAD, Bad, Schema, Text, must_be, unknown_key

_FROM = re.compile(r"(?:([0-9.]+):)?([1-9][0-9]{0,4})/(tcp|udp)")
_TO = re.compile(r"([0-9.]*):([1-9][0-9]{0,4})")
PORT_MAX = 65535

ID_PATTERN = "^[A-Za-z][A-Za-z0-9._-]*$"
"""What QEMU takes for an id (id_wellformed of util/id.c)."""
MODEL_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]*$"
MAC_PATTERN = "^[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$"
ADDR_PATTERN = "^(0x)?[01]?[0-9A-Fa-f](\\.[0-7])?$"
"""A slot up to 1f and a function, in hexadecimal (set_pci_devfn of hw/core/qdev-properties-system.c
of QEMU)."""
HOSTNAME_MAX = 32
"""Bytes of a host name that QEMU's DHCP server gives; libslirp cuts longer ones (slirp.h)."""
HOSTNAME_PATTERN = f"^[A-Za-z0-9]([A-Za-z0-9.-]{{0,{HOSTNAME_MAX - 2}}}[A-Za-z0-9])?$"
DOMAIN_PATTERN = "^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$"
IPV4_LENGTH_MAX = 27
"""The greatest length of a user-mode subnet: the guest is number 15, which is the broadcast address
of a longer one."""
DEFAULT_USER_IPV4 = "10.0.2.0/24"
"""QEMU's own (net_slirp_init of net/slirp.c)."""


def fits(pattern: str, text: str) -> bool:
    """Tell whether `text` matches `pattern`, which begins with ^ and ends with $."""
    return re.fullmatch(pattern[1:-1], text) is not None


def is_virtio(model: str) -> bool:
    """Tell whether a model is virtio's, which has several queues, vectors and an MTU."""
    return model.startswith("virtio-net")


def is_mac(text: str) -> bool:
    """Tell whether `text` is the MAC of one device: six groups, no multicast, not zero."""
    return fits(MAC_PATTERN, text) and text.strip("0:") != ""


def is_subnet(text: str) -> bool:
    """Tell whether `text` is ADDRESS/LENGTH of an IPv4 subnet with room for QEMU's own numbers."""
    from ipaddress import IPv4Network  # only a policy that has one needs it

    try:
        return re.fullmatch("[0-9.]+/[0-9]+", text) is not None and (
            IPv4Network(text).prefixlen <= IPV4_LENGTH_MAX
        )
    except ValueError:
        return False


def is_ipv6_subnet(text: str) -> bool:
    """Tell whether `text` is ADDRESS/LENGTH of an IPv6 subnet; QEMU takes no longer than 126."""
    from ipaddress import IPv6Network  # only a policy that has one needs it

    try:
        return re.fullmatch("[0-9A-Fa-f:.]+/[0-9]+", text) is not None and (
            IPv6Network(text).prefixlen <= 126
        )
    except ValueError:
        return False


def is_ipv4_address(text: str) -> bool:
    """Tell whether `text` is an IPv4 address."""
    from ipaddress import AddressValueError, IPv4Address  # only a forward needs it

    try:
        IPv4Address(text)
    except AddressValueError:
        return False
    return True


def is_host_of(address: str, subnet: str) -> bool:
    """Tell whether the IPv4 `address` is one of the hosts in `subnet`."""
    from ipaddress import IPv4Address, IPv4Network  # only what names an address needs it

    network = IPv4Network(subnet)
    ends = (network.network_address, network.broadcast_address)
    return IPv4Address(address) in network and IPv4Address(address) not in ends


@dataclass(frozen=True)
class OrFalse:
    """What `text` is, or the plain word `false` for none."""

    text: Text

    @property
    def words(self) -> str:
        """What it must be, for an error."""
        return f"{self.text.words}, or false"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the text, or False."""
        if isinstance(node, Scalar) and node.plain and node.text == "false":
            return False
        if isinstance(node, Scalar) and self.text.is_good(node.text):
            return node.text
        return must_be(name, self.words, node, errors, self.text.hint)

    def schema(self) -> Schema:
        """Return the pattern, or false."""
        return {"anyOf": [{"type": "string", "pattern": self.text.pattern}, {"const": False}]}


@dataclass(frozen=True)
class Domains:
    """A list of domains."""

    words: str = "a list of domains such as [lab.test]"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the domains as a tuple."""
        if not isinstance(node, List):
            hint = f"write [{show(node)}]" if isinstance(node, Scalar) and node.text else ""
            return must_be(name, self.words, node, errors, hint)
        found = []
        for item in node.items:
            if isinstance(item, Scalar) and fits(DOMAIN_PATTERN, item.text):
                found.append(item.text)
            else:
                must_be(name, self.words, item, errors)
        return tuple(found)

    def schema(self) -> Schema:
        """Return a list of such names."""
        domain: Schema = {"type": "string", "pattern": DOMAIN_PATTERN}
        number: Schema = {"type": "number", "minimum": 0}
        return {"type": "array", "items": {"anyOf": [domain, number, {"type": "boolean"}]}}


@dataclass(frozen=True)
class Vms:
    """The mapping of names to guests; the walk reads what is in it."""

    words: str = "a mapping of names to guests"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the mapping as it is."""
        return node if isinstance(node, Map) else must_be(name, self.words, node, errors)

    def schema(self) -> Schema:
        """Return a mapping of names to guests."""
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^{NETWORK_NAME}$"},
            "additionalProperties": {"$ref": "#/$defs/vm"},
        }


@dataclass(frozen=True)
class Nics:
    """The list of a guest's NICs; the walk reads what is in it."""

    words: str = "a list of NICs"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the list as it is."""
        return node if isinstance(node, List) else must_be(name, self.words, node, errors)

    def schema(self) -> Schema:
        """Return a list of NICs."""
        return {"type": "array", "items": {"$ref": "#/$defs/nic"}}


@dataclass(frozen=True)
class UserModes:
    """The mapping that describes a user-mode network; the walk reads what is in it."""

    words: str = "a mapping such as {} or {ipv4: 10.0.2.0/24}"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the mapping as it is."""
        return node if isinstance(node, Map) else must_be(name, self.words, node, errors)

    def schema(self) -> Schema:
        """Return the mapping."""
        return {"$ref": "#/$defs/user"}


@dataclass(frozen=True)
class Forwards:
    """A list of `{from: [ADDRESS:]PORT/tcp, to: "[ADDRESS]:PORT"}`."""

    words: str = 'a list such as [{from: 127.0.0.1:2222/tcp, to: ":22"}]'

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the forwards as a tuple."""
        if not isinstance(node, List):
            return must_be(name, self.words, node, errors)
        found: list[Forward] = []
        seen: set[tuple[str, str, int]] = set()
        for item in node.items:
            forward = self._forward(name, item, errors)
            if isinstance(forward, Bad):
                continue
            taken = (forward.protocol, forward.address, forward.port)
            if taken in seen:
                errors.add(item, f"{name} has this from twice: {show_from(forward)}")
                continue
            seen.add(taken)
            found.append(forward)
        return tuple(found)

    def _forward(self, name: str, node: Node, errors: Errors) -> Forward | Bad:
        if not isinstance(node, Map):
            return must_be(name, self.words, node, errors)
        given: dict[str, re.Match[str] | None] = {}
        for key, value in entries(node, errors, "key"):
            if key.text == "from":
                words = "[ADDRESS:]PORT/tcp or /udp, the address IPv4"
                given["from"] = self._end("from", _FROM, 2, 1, words, value, errors)
            elif key.text == "to":
                words = '"[ADDRESS]:PORT", the address IPv4'
                given["to"] = self._end("to", _TO, 2, 1, words, value, errors)
            else:
                unknown_key(key, name, ("from", "to"), errors)
                given.setdefault("from", None)
        for key_name in ("from", "to"):
            if key_name not in given:
                errors.add(node, f"{name} has an entry without {key_name}; {self.words} is one")
        come, to = given.get("from"), given.get("to")
        if come is None or to is None:
            return BAD
        return Forward(come[3], come[1] or "", int(come[2]), to[1], int(to[2]))

    @staticmethod
    def _end(
        name: str,
        form: re.Pattern[str],
        port: int,
        address: int,
        words: str,
        node: Node,
        errors: Errors,
    ) -> re.Match[str] | None:
        """Return the match of one end of a forward, or None if it is wrong, as is reported."""
        match = form.fullmatch(node.text) if isinstance(node, Scalar) else None
        if (
            match is not None
            and int(match[port]) <= PORT_MAX
            and (not match[address] or is_ipv4_address(match[address]))
        ):
            return match
        hint = ""
        if isinstance(node, Scalar) and re.fullmatch("[1-9][0-9]{0,4}", node.text):
            hint = f"write {node.text}/tcp" if name == "from" else f'write ":{node.text}"'
        must_be(name, words, node, errors, hint)
        return None

    def schema(self) -> Schema:
        """Return a list of such mappings."""
        entry: Schema = {
            "type": "object",
            "properties": {
                "from": {"type": "string", "pattern": f"^{_FROM.pattern}$"},
                "to": {"type": "string", "pattern": f"^{_TO.pattern}$"},
            },
            "required": ["from", "to"],
            "additionalProperties": False,
        }
        return {"type": "array", "items": entry}


def show_from(forward: Forward) -> str:
    """Return the host's end of a forward as the policy has it."""
    address = f"{forward.address}:" if forward.address else ""
    return f"{address}{forward.port}/{forward.protocol}"
