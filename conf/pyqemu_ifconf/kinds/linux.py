"""A Linux bridge, of the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyqemu_ifconf.kinds.base import KindSpec
from pyqemu_ifconf.kinds.bridge import KEY, BridgePlace, OnBridge, bridge_field, faults

if TYPE_CHECKING:
    from pyqemu_ifconf.field import Field


@dataclass(frozen=True)
class LinuxPlace(OnBridge):
    """A Linux bridge, by its name."""


def _fields() -> tuple[Field, ...]:
    return (bridge_field(),)


SPEC = KindSpec(
    name="linux",
    title="a Linux bridge",
    label="Linux bridge",
    endpoint="tap",
    key=KEY,
    place=LinuxPlace,
    fields=_fields,
    settings=frozenset({"mtu", "vlan", "isolated", "txqueuelen"}),
    faults=faults,
    made=frozenset({"nat"}),
    found=BridgePlace,
)
