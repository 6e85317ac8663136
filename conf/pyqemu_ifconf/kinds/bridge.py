"""What is common to the kinds of network that are a bridge of the host's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pyqemu_ifconf.kinds.base import Place
from pyqemu_ifconf.settings.vlan import Vlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pyqemu_ifconf.field import Field
    from pyqemu_ifconf.kinds.base import SettingName

KEY = "bridge"

DEFAULT_OVSDB = "unix:/run/openvswitch/db.sock"


@dataclass(frozen=True)
class OnBridge(Place):
    """A bridge of the host's, by its name."""

    noun: ClassVar[str] = "bridge"
    bridge: str

    @property
    def name(self) -> str:
        """The bridge's name."""
        return self.bridge


@dataclass(frozen=True)
class BridgePlace(OnBridge):
    """A bridge whose kind the policy does not say; `ovsdb` is the database that may have it."""

    ovsdb: str = field(default=DEFAULT_OVSDB, metadata={"noun": "database"})

    @property
    def databases(self) -> tuple[str, ...]:
        """The one that may have it."""
        return (self.ovsdb,)


def faults(settings: Mapping[str, object]) -> Iterable[tuple[SettingName, str]]:
    """Yield what no bridge can give: all VLANs, without naming them."""
    vlan = settings.get("vlan")
    if isinstance(vlan, Vlan) and vlan.takes_all:
        yield "vlan", "its ports have the VLANs that are named; write vlan: VID, or a trunk"


def bridge_field() -> Field:
    """Return the field that names the bridge."""
    from pyqemu_ifconf.field import Field  # only what reads a policy needs it
    from pyqemu_ifconf.names import NAME_MAX, is_valid_name
    from pyqemu_ifconf.values import Text

    return Field(
        KEY,
        "network",
        Text(
            "the name of a bridge",
            is_valid_name,
            rf"^(?!\.{{1,2}}$)[!-.0-9;-~]{{1,{NAME_MAX}}}$",
            f"a name is 1 to {NAME_MAX} bytes of 0x21 to 0x7e, without / and :, not . or ..",
            NAME_MAX,
        ),
        "The Linux bridge or Open vSwitch bridge.",
    )
