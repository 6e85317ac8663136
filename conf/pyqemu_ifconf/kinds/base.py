"""What a kind of network is: its own words in a policy, and what its ports can be given.

Other modules know the kinds by these values alone, and name none. The hooks import this, so it has
to cost little: what reads a policy's text is imported when a text is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from pyqemu_ifconf.field import Field

KindName = Literal["linux", "openvswitch", "macvtap"]

Endpoint = Literal["tap", "macvtap", "vfio", "vhost-user"]
"""What QEMU is given. Only a `tap` can QEMU open itself, and call its hooks for."""

SettingName = Literal["mtu", "vlan", "isolated", "external_ids", "txqueuelen", "macs"]
"""A port setting: it may stand on a network, a rule and a NIC, and means the same on each."""

MadeName = Literal["nat"]
"""A key of a network that has us make it for its first port, and unmake it after the last."""


@dataclass(frozen=True)
class Place(ABC):
    """Where the ports of a network are. Each kind has its own, made of what the network's keys say.

    `noun` is what the host has there, in a word.
    """

    noun: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of what the ports are on, as the host has it."""

    @property
    def databases(self) -> tuple[str, ...]:
        """The addresses of the databases of Open vSwitch that have it, or may have it."""
        return ()


@dataclass(frozen=True)
class Nowhere(Place):
    """The place of a network that names none, or a wrong one. Such a policy is never used."""

    noun: ClassVar[str] = "place"

    @property
    def name(self) -> str:
        """No name."""
        return ""


def place_of(kind: type[Place], values: Mapping[str, Any]) -> Place | None:
    """Return the place of this `kind` that `values` say, or None if a value is missing.

    Values that the place has no field for are passed over.
    """
    given = {each.name: values[each.name] for each in fields(kind) if each.name in values}
    if any(each.name not in given and each.default is MISSING for each in fields(kind)):
        return None
    return kind(**given)


def no_faults(settings: Mapping[str, object]) -> Iterable[tuple[SettingName, str]]:
    """Yield nothing: the kind can give its settings with any value."""
    return ()


@dataclass(frozen=True, eq=False)
class KindSpec:
    """What a policy may say of one kind of network, and what is said of it.

    `title` is what such a network is, as in `it is a Linux bridge`; `label` is the same as one word
    among others, as over a column. `endpoint` is what QEMU is given.

    `key` is the key that names the kind. `fields` returns all keys of the kind's own, `key` among
    them; the fields of `place` have their names.

    `settings` are the port settings that the kind can give, and `defaults` those that such a
    network has unless it says otherwise, `none` too. `faults` takes the settings of one port, as
    its network and its rule or NIC give them together. It yields each one that the kind cannot give
    with that value, or cannot be without, and why.

    `made` are the keys by which such a network can be made.

    `found` is set if several kinds share `key`: without `kind:` the host is looked at to tell them
    apart, and `found` is the network's place until then.
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
    made: frozenset[MadeName] = frozenset()
    found: type[Place] | None = None

    @cached_property
    def own_keys(self) -> frozenset[str]:
        """The names of its fields."""
        return frozenset(field.name for field in self.fields())
