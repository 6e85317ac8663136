"""A bridge of Open vSwitch, in the database of its ovsdb-server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyqemu_ifconf.kinds.base import KindSpec
from pyqemu_ifconf.kinds.bridge import (
    DEFAULT_OVSDB,
    KEY,
    BridgePlace,
    OnBridge,
    bridge_field,
    faults,
)

if TYPE_CHECKING:
    from pyqemu_ifconf.field import Field

_TCP = r"tcp:(\[([^\]]+)\]|[^:\[\]]+):([1-9][0-9]{0,4})"


@dataclass(frozen=True)
class OvsPlace(OnBridge):
    """A bridge of Open vSwitch, by its name, and the address of the database that has it."""

    ovsdb: str = DEFAULT_OVSDB

    @property
    def databases(self) -> tuple[str, ...]:
        """The one that has it."""
        return (self.ovsdb,)


def is_ovsdb_address(text: str) -> bool:
    """Tell whether `text` is `unix:/PATH` or `tcp:ADDRESS:PORT`.

    The address is a number, for the ovs library looks up no names. IPv6 stands in brackets.
    """
    if text.startswith("unix:"):
        return re.fullmatch(r"unix:/[!-~]+", text) is not None
    match = re.fullmatch(_TCP, text)
    if match is None or int(match[3]) > 65535 or re.fullmatch("[!-~]+", text) is None:
        return False
    from ipaddress import AddressValueError, IPv4Address, IPv6Address  # only tcp needs it

    try:
        _ = IPv6Address(match[2]) if match[2] else IPv4Address(match[1])
    except AddressValueError:
        return False
    return True


def _fields() -> tuple[Field, ...]:
    from pyqemu_ifconf.field import Field  # only what reads a policy needs it
    from pyqemu_ifconf.values import Text

    ovsdb = Field(
        "ovsdb",
        "network",
        Text(
            "unix:/PATH or tcp:ADDRESS:PORT",
            is_ovsdb_address,
            r"^(unix:/[!-~]+|tcp:([0-9.]+|\[[0-9A-Fa-f:.]+(%[!-Z\\^-~]+)?\]):[1-9][0-9]{0,4})$",
            "the address is a number such as 127.0.0.1 or [::1], the port 1 to 65535",
        ),
        "The address of the OVSDB server; unix:/run/openvswitch/db.sock.",
    )
    return bridge_field(), ovsdb


SPEC = KindSpec(
    name="openvswitch",
    title="an Open vSwitch bridge",
    label="Open vSwitch",
    endpoint="tap",
    key=KEY,
    place=OvsPlace,
    fields=_fields,
    settings=frozenset({"mtu", "vlan", "isolated", "external_ids", "txqueuelen"}),
    faults=faults,
    found=BridgePlace,
)
