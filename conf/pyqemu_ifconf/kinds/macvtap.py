"""A macvtap: a link of the guest's own on an interface of this host's, without a bridge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pyqemu_ifconf.kinds.base import KindSpec, Place, SettingName
from pyqemu_ifconf.settings.vlan import Vlan

if TYPE_CHECKING:
    from pyqemu_ifconf.field import Field

KEY = "parent"
Mode = Literal["bridge", "vepa", "private", "passthru"]
MODES: tuple[Mode, ...] = ("bridge", "vepa", "private", "passthru")
"""Whom a guest hears beside the wire (macvlan of ip-link(8)); the first is the default."""


@dataclass(frozen=True)
class MacvtapPlace(Place):
    """An interface of this host's, by its name, and whom on it a guest hears."""

    noun: ClassVar[str] = "interface"
    parent: str
    mode: Mode = MODES[0]

    @property
    def name(self) -> str:
        """The interface's name."""
        return self.parent


def _fields() -> tuple[Field, ...]:
    from pyqemu_ifconf.field import Field  # only what reads a policy needs it
    from pyqemu_ifconf.names import NAME_MAX, is_valid_name
    from pyqemu_ifconf.values import Choice, Text

    parent = Field(
        KEY,
        "network",
        Text(
            "the name of an interface",
            is_valid_name,
            rf"^(?!\.{{1,2}}$)[!-.0-9;-~]{{1,{NAME_MAX}}}$",
            f"a name is 1 to {NAME_MAX} bytes of 0x21 to 0x7e, without / and :, not . or ..",
            NAME_MAX,
        ),
        "The Ethernet interface that each guest gets a macvtap on.",
    )
    mode = Field("mode", "network", Choice(MODES), "Whom on the parent a guest hears; bridge.")
    return parent, mode


def _faults(settings: Mapping[str, object]) -> Iterable[tuple[SettingName, str]]:
    vlan = settings.get("vlan")
    if isinstance(vlan, Vlan) and vlan.trunk and not vlan.takes_all:
        yield "vlan", "its guests are in one VLAN, or in all; write vlan: VID, or vlan: any"
    if settings.get("mtu") == "bridge":
        yield "mtu", "there is no bridge; without mtu, a guest has the parent's"


SPEC = KindSpec(
    name="macvtap",
    title="a macvtap",
    label="macvtap",
    endpoint="macvtap",
    key=KEY,
    place=MacvtapPlace,
    fields=_fields,
    settings=frozenset({"mtu", "vlan", "macs", "txqueuelen"}),
    faults=_faults,
    defaults={"macs": "nic"},
)
