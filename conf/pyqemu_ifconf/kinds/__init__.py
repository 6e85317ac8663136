"""The kinds of network, one a module: what a policy may say of each.

A new kind is a module here, a name in base.KindName and a row in SPECS. The fields, the walk with
its errors and the JSON Schema are made of these rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqemu_ifconf.kinds import linux, macvtap, openvswitch
from pyqemu_ifconf.kinds.base import KindName, KindSpec, Place

if TYPE_CHECKING:
    from pyqemu_ifconf.field import Field

SPECS: tuple[KindSpec, ...] = (linux.SPEC, openvswitch.SPEC, macvtap.SPEC)


def spec_of(name: KindName) -> KindSpec:
    """Return the kind of this name."""
    return next(spec for spec in SPECS if spec.name == name)


def spec_at(place: Place) -> KindSpec | None:
    """Return the kind that `place` is of, or None if the policy does not say it."""
    return next((spec for spec in SPECS if type(place) is spec.place), None)


def naming_keys() -> tuple[str, ...]:
    """Return the keys that name a kind: a network has exactly one of them."""
    return tuple(dict.fromkeys(spec.key for spec in SPECS))


def named_by(key: str) -> tuple[KindSpec, ...]:
    """Return the kinds that this key names; if there are several, `kind:` may say which one."""
    return tuple(spec for spec in SPECS if spec.key == key)


def said() -> tuple[KindSpec, ...]:
    """Return the kinds that `kind:` can say: those that share their key."""
    return tuple(spec for spec in SPECS if len(named_by(spec.key)) > 1)


def owners(name: str) -> tuple[KindSpec, ...]:
    """Return the kinds that a key of a network is for, none if it belongs to no kind."""
    if name == "kind":
        return said()
    return tuple(spec for spec in SPECS if name in spec.own_keys)


def own_fields() -> tuple[Field, ...]:
    """Return the keys of a network that belong to its kind, those that name one first."""
    from pyqemu_ifconf.field import Field  # only what reads a policy needs it
    from pyqemu_ifconf.values import Choice

    kind = Field(
        "kind",
        "network",
        Choice(tuple(spec.name for spec in said())),
        "What the bridge is; checked where it is given, else looked up.",
    )
    rows = {field.name: field for spec in SPECS for field in spec.fields()}
    naming = [rows.pop(key) for key in naming_keys()]
    return (*naming, kind, *rows.values())
