"""What a kind of network is: the words of its own in a policy, and what its ports can be given.

The kinds are known by these values alone: no other module names one. To import them costs little,
for the hooks do; what reads a policy's text is imported where one is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pyqemu_ifconf.shell import quote

if TYPE_CHECKING:
    from pyqemu_ifconf.field import Field

KindName = Literal["linux", "openvswitch"]

Endpoint = Literal["tap", "macvtap", "vfio", "vhost-user"]
"""What QEMU is given: only a `tap` is one that it can open itself and call its hooks for."""

SettingName = Literal["mtu", "vlan", "isolated", "external_ids", "txqueuelen"]
"""A port setting: it may stand on a network, on a rule and on a NIC, and means the same there."""


@dataclass(frozen=True)
class Place(ABC):
    """Where the ports of a network are; each kind has its own, of what the network's keys say.

    `noun` is what the host has there, in a word.
    """

    noun: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of what the ports are on, as the host has it."""

    @property
    def words(self) -> str:
        """The place as operators are told of it: `bridge br0`."""
        return f"{self.noun} {quote(self.name)}"

    @property
    def databases(self) -> tuple[str, ...]:
        """The addresses of the databases of Open vSwitch that have it, or may have it."""
        return ()


def place_of(kind: type[Place], values: Mapping[str, Any]) -> Place | None:
    """Return the place of this `kind` that `values` say, None where one lacks that it must have.

    `values` may have others too, which are passed over: so what is said of a bridge becomes the
    place on that bridge of a kind that is looked up.
    """
    given = {each.name: values[each.name] for each in fields(kind) if each.name in values}
    if any(each.name not in given and each.default is MISSING for each in fields(kind)):
        return None
    return kind(**given)


def no_faults(settings: Mapping[str, object]) -> Iterable[tuple[SettingName, str]]:
    """Yield nothing: whatever the values are, such a kind can give them."""
    return ()


@dataclass(frozen=True, eq=False)
class KindSpec:
    """What a policy may say of one kind of network, and what is said of it.

    `title` is what such a network is, as in `it is a Linux bridge`; `label` the same where it is
    one word among others, as over a column. `key` is the one that names the kind, and `fields`
    returns all that are its own, `key` among them; those of `place` have the names of these.
    `settings` are what a port can be given. `faults` yields, of the settings of one port as the
    network and whoever leads to it give them together, each that the kind cannot give with that
    value, or cannot be without, and why. `defaults` are settings that such a network has unless it
    says otherwise, `none` too. `found`: several kinds share the key, and which of them it
    is is looked up where the network has no `kind:`; this is the network's place until then.
    """

    name: KindName
    title: str
    label: str
    endpoint: Endpoint
    key: str
    place: type[Place]
    fields: Callable[[], tuple[Field, ...]]
    settings: frozenset[SettingName]
    faults: Callable[[Mapping[str, object]], Iterable[tuple[SettingName, str]]] = no_faults
    defaults: Mapping[str, object] = field(default_factory=dict)
    found: type[Place] | None = None

    @cached_property
    def own_keys(self) -> frozenset[str]:
        """The names of its fields."""
        return frozenset(field.name for field in self.fields())
