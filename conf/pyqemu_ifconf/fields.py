"""The one table of what a policy may say: it drives the walk, the errors and the JSON Schema.

A new port setting is one row of FIELDS, one field of PortSettings with its default, and its name in
each kind that can give it; the keys that belong to a network's kind lie with that kind.
"""

from __future__ import annotations

from functools import cache

from pyqemu_ifconf import kinds
from pyqemu_ifconf.field import Field, Where
from pyqemu_ifconf.kinds.base import KindSpec, SettingName
from pyqemu_ifconf.made import nat as made_nat
from pyqemu_ifconf.made.nat import (
    HOST6_PATTERN,
    HOST_PATTERN,
    DhcpField,
    Dns,
    NatField,
    Services,
    is_host6_address,
    is_host_address,
)
from pyqemu_ifconf.names import NAME_MAX, NUMBER_ROOM, USER_NAME, is_plain_tap_name, is_tap_pattern
from pyqemu_ifconf.nodes import Errors, Scalar, quote
from pyqemu_ifconf.values import (
    LINE_PATTERN,
    Choice,
    ExternalIds,
    Flag,
    Globs,
    Networks,
    Number,
    Rules,
    Text,
    Users,
    VlanPort,
    Yes,
    is_line,
    listed,
    unknown_key,
)
from pyqemu_ifconf.vms import (
    ADDR_PATTERN,
    HOSTNAME_MAX,
    HOSTNAME_PATTERN,
    ID_PATTERN,
    IPV4_LENGTH_MAX,
    MAC_PATTERN,
    MODEL_PATTERN,
    Domains,
    Forwards,
    Nics,
    OrFalse,
    UserModes,
    Vms,
    fits,
    is_ipv4_address,
    is_ipv6_subnet,
    is_mac,
    is_subnet,
)


def _labels(setting: SettingName) -> str:
    """Return the kinds of network that can give a port setting."""
    return listed([spec.label for spec in kinds.SPECS if setting in spec.settings], "and")


FIELDS: tuple[Field, ...] = (
    Field("version", "top", Number(1, 1), "The version of the policy language.", required=True),
    Field("timeout", "top", Number(1, 300), "The whole seconds that an up may take; 10."),
    Field("networks", "top", Networks(), "The places that taps can be plugged in, by name."),
    Field(
        "bridge_conf",
        "top",
        Flag(),
        "Whether QEMU's /etc/qemu/bridge.conf says too who may use which bridge; false.",
    ),
    Field("rules", "top", Rules(), "Who goes where: from the top, the first that matches decides."),
    Field("vms", "top", Vms(), "The guests whose NICs pyqemu-ifctl args tells QEMU of, by name."),
    Field(
        "users",
        "network",
        Users(),
        "Who may plug an unprivileged QEMU in: login names and @groups; nobody but root.",
    ),
    Field("deny_users", "network", Users(), "Who may not, whatever else lets them."),
    Field(
        "max_taps",
        "network",
        Number(1, 1023),
        "The most taps that one user may have on it at a time; 16.",
    ),
    Field(
        "tap_name",
        "network",
        Text(
            "the name of a tap, in which one %d may stand for a number",
            is_tap_pattern,
            rf"^((?=.{{1,{NAME_MAX}}}$){USER_NAME}"
            rf"|(?=.{{2,{NAME_MAX - NUMBER_ROOM + 2}}}$)({USER_NAME})?%d[A-Za-z0-9._-]*)$",
            "letters, digits, dots, hyphens and underscores, a letter or digit first; "
            f"at most {NAME_MAX} bytes, {NAME_MAX - NUMBER_ROOM} beside a %d",
            NAME_MAX,
        ),
        "What the taps are called that unprivileged users get; tap%d.",
    ),
    Field("nat", "network", NatField(), "A network that is made for its first tap, and its NAT."),
    Field(
        "ipv4",
        "nat",
        Text(
            "this host's address and length, such as 192.168.76.1/24",
            is_host_address,
            HOST_PATTERN,
            "of a host, its length 8 to 30",
        ),
        "This host's IPv4 address on the network, and with it the subnet.",
    ),
    Field(
        "ipv6",
        "nat",
        Text(
            "this host's address and 64, such as fd00:76::1/64",
            is_host6_address,
            HOST6_PATTERN,
            "of a host, its length 64",
        ),
        "This host's IPv6 address on the network, and with it the subnet.",
    ),
    Field("dhcp", "nat", DhcpField(), "What IPv4 addresses the guests get; true."),
    Field("dns", "nat", Dns(), "Whether names are resolved, and the guests' domain; true."),
    Field("forward", "nat", Forwards(), "Ports of this host's that lead to guests'."),
    Field("host", "nat", Services(), "What of this host's guests reach beside DHCP and DNS; any."),
    Field("outbound", "nat", Flag(), "Whether guests reach what is beyond this host; true."),
    Field("tap", "rule", Globs(ascii_only=True), "Matches the tap's name."),
    Field("vm", "rule", Globs(ascii_only=False), "Matches the guest's name, QEMU's -name."),
    Field("netdev", "rule", Globs(ascii_only=True), "Matches the netdev's id, QEMU's id=."),
    Field(
        "mac", "rule", Globs(ascii_only=True), "Matches the MAC of the netdev's device, lower case."
    ),
    Field(
        "user",
        "rule",
        Globs(ascii_only=False),
        "Matches the login name of QEMU's real user, or the number where it has none.",
    ),
    Field(
        "network",
        "rule",
        Text("the name of a network", bool, r"^[\s\S]"),
        "The network that the tap is plugged in.",
    ),
    Field(
        "deny",
        "rule",
        Text("the reason, one line of text", is_line, LINE_PATTERN),
        "Refuses the tap, with this reason.",
    ),
    Field("leave", "rule", Yes(), "Leaves the tap as it is, which others have set up."),
    Field(
        "mtu",
        "port",
        Number(68, 65521, ("bridge",)),
        "The tap's MTU in bytes; bridge, the default, is the bridge's own.",
    ),
    Field("vlan", "port", VlanPort(), "The VID of an access port, or the VIDs of a trunk."),
    Field("isolated", "port", Flag(), "Keeps the tap from the bridge's other isolated ports."),
    Field(
        "external_ids",
        "port",
        ExternalIds(),
        f"Keys for the external_ids of the Interface row; {_labels('external_ids')} only.",
    ),
    Field("txqueuelen", "port", Number(0, 1_000_000), "The tap's queue length, in packets."),
    Field(
        "macs",
        "port",
        Choice(("nic",)),
        "The MACs that a guest sends with and is sent to: nic, its own; none, any.",
    ),
    Field("nics", "vm", Nics(), "The guest's NICs, in the order in which it gets them.", True),
    Field(
        "users",
        "vm",
        Users(),
        "Who of its networks' users may have its taps: login names and @groups; all of them.",
    ),
    Field(
        "network",
        "nic",
        Text("the name of a network", bool, r"^[\s\S]"),
        "The network that the NIC's tap is plugged in.",
    ),
    Field("user", "nic", UserModes(), "QEMU's user-mode network, in place of one of the policy's."),
    Field(
        "tap",
        "nic",
        Text(
            "the name of a tap",
            is_plain_tap_name,
            rf"^(?!\.{{1,2}}$)[!-$&-)+-.0-9;->@-Z\\^-~]{{1,{NAME_MAX}}}$",
            f"at most {NAME_MAX} bytes, none of / : * ? [ ] %, not . or ..",
            NAME_MAX,
        ),
        "What the tap is called; the guest's name, a hyphen and the NIC's number from 0.",
    ),
    Field(
        "id",
        "nic",
        Text(
            "an id of QEMU's",
            lambda text: fits(ID_PATTERN, text),
            ID_PATTERN,
            "a letter, then letters, digits, dots, hyphens and underscores",
        ),
        "QEMU's id= of the netdev; net0, net1 ...",
    ),
    Field(
        "model",
        "nic",
        Text("the model of a NIC", lambda text: fits(MODEL_PATTERN, text), MODEL_PATTERN),
        "QEMU's device; virtio-net-pci. pyqemu-ifctl models lists them.",
    ),
    Field(
        "mac",
        "nic",
        Text(
            "the MAC of a device",
            is_mac,
            MAC_PATTERN,
            "six pairs of hexadecimal digits such as 52:54:00:12:34:56, the second digit even",
        ),
        "The MAC; 52:54:00 and a hash of host, guest and NIC.",
    ),
    Field("queues", "nic", Number(1, 64), "Pairs of queues, of virtio models; 1."),
    Field(
        "vectors",
        "nic",
        Number(0, 2048, ("auto",)),
        "MSI-X vectors, of virtio models; auto, the default, is two for each queue, and two.",
    ),
    Field(
        "bus",
        "nic",
        Text(
            "a bus of QEMU's",
            lambda text: fits(ID_PATTERN, text),
            ID_PATTERN,
            "such as pcie.0 or the id of a port",
        ),
        "The bus that the device is on; QEMU's own choice.",
    ),
    Field(
        "addr",
        "nic",
        Text(
            "a PCI slot such as 0x8, or slot and function such as 0x8.1",
            lambda text: fits(ADDR_PATTERN, text),
            ADDR_PATTERN,
            "in hexadecimal, at most 1f.7",
            2,
        ),
        "The device's PCI address on its bus, in hexadecimal; QEMU's own choice.",
    ),
    Field(
        "ipv4",
        "user",
        OrFalse(
            Text(
                "an IPv4 subnet such as 10.0.2.0/24",
                is_subnet,
                r"^[0-9]{1,3}(\.[0-9]{1,3}){3}/([0-9]|1[0-9]|2[0-7])$",
                f"its host part zero, its length at most {IPV4_LENGTH_MAX}",
            )
        ),
        "The guest's IPv4 subnet, or false for none; 10.0.2.0/24.",
    ),
    Field(
        "ipv6",
        "user",
        OrFalse(
            Text(
                "an IPv6 subnet such as fd00:2::/64",
                is_ipv6_subnet,
                r"^[0-9A-Fa-f:.]+/([0-9]|[1-9][0-9]|1[01][0-9]|12[0-6])$",
                "its host part zero, its length at most 126",
            )
        ),
        "The guest's IPv6 subnet, or false for none; fec0::/64.",
    ),
    Field("restrict", "user", Flag(), "Keeps the guest from all but the forwards; false."),
    Field(
        "hostname",
        "user",
        Text(
            "a host name",
            lambda text: fits(HOSTNAME_PATTERN, text),
            HOSTNAME_PATTERN,
            f"letters, digits, dots and hyphens, at most {HOSTNAME_MAX}",
            HOSTNAME_MAX,
        ),
        "The name that the guest gets by DHCP.",
    ),
    Field(
        "dns",
        "user",
        Text(
            "an IPv4 address of the guest's subnet",
            is_ipv4_address,
            r"^[0-9]{1,3}(\.[0-9]{1,3}){3}$",
        ),
        "Where the guest finds the host's own name servers; QEMU's own choice.",
    ),
    Field("search", "user", Domains(), "The domains in which the guest looks names up."),
    Field("forward", "user", Forwards(), "Ports of the host's that lead to the guest's."),
)
"""The fields that belong to no kind of network."""

PORT_SETTINGS = frozenset(field.name for field in FIELDS if field.where == "port")

OBJECTS: dict[str, str] = {
    "top": "the policy",
    "network": "a network",
    "rule": "a rule",
    "vm": "a guest of vms:",
    "nic": "a NIC",
    "user": "user:",
    "nat": "nat:",
}


def all_fields() -> tuple[Field, ...]:
    """Return every field, those of the kinds first."""
    return (*kinds.own_fields(), *FIELDS)


@cache
def fields_of(where: Where) -> dict[str, Field]:
    """Return the fields that may stand at `where`, by name, the port settings with them."""
    also = ("port",) if where in ("network", "rule", "nic") else ()
    return {field.name: field for field in all_fields() if field.where in (where, *also)}


def owners_of(name: str) -> tuple[KindSpec, ...]:
    """Return the kinds of network that a key of a network is for, none if it is for all."""
    return kinds.named_by(made_nat.KIND.key) if name == "nat" else kinds.owners(name)


@cache
def lacking(specs: tuple[KindSpec, ...], also: tuple[str, ...] = ()) -> frozenset[str]:
    """Return the keys, port settings too, that no network of these kinds can have, and `also`.

    Each of `also` is a key of a network.
    """
    settings = PORT_SETTINGS.difference(*(spec.settings for spec in specs))
    keys = (name for name in fields_of("network") if not {*(owners_of(name) or specs)} & {*specs})
    return settings.union(keys, also)


def unknown_field(key: Scalar, where: Where, owner: str, errors: Errors) -> None:
    """Report that `owner`, which stands at `where`, has no such field."""
    homes = [field.where for field in all_fields() if field.name == key.text]
    home = OBJECTS.get(homes[0], "a network, a rule or a NIC") if homes else ""
    hint = f"{quote(key.text)} belongs to {home}" if home else ""
    unknown_key(key, owner, tuple(fields_of(where)), errors, hint)
