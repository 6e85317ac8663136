"""The states that a tap may be in when an up, a down or an apply comes; each is made for real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from kinds.scene import Scene
from kinds.table import HERE, INDEX, Row
from pyqemu_ifconf.failure import Status

INIT = 1
"""A process that lives, and is not the tap's QEMU."""


@dataclass(frozen=True)
class State:
    """What makes the tap so, and what becomes of it then.

    `up` is what an up ends with; where it fails, the tap is as it was in the beginning, but if it
    is `left` as it is. One that is another's a down leaves as it is too. `held`: it is attached for
    its QEMU, so that a policy can be put in force on it. `half`: an up came half way. `there`: it
    is a port of its kind already.
    """

    enter: Callable[[Scene], None]
    up: Status = Status.DONE
    left: bool = False
    foreign: bool = False
    held: bool = False
    half: bool = False
    there: bool = False


def _is_not_there(scene: Scene) -> None:
    scene.row.close(scene.world)


def _is_on_no_bridge(scene: Scene) -> None:
    """It is so in the beginning."""


def _is_elsewhere(scene: Scene) -> None:
    scene.up(scene.policy(which="other"))


def _is_on_the_other_kind(scene: Scene) -> None:
    other = _other_kind(scene.row)
    scene.up(scene.policy(other), row=other)


def _other_kind(row: Row) -> Row:
    return next(each for each in HERE if each.kind != row.kind)


def _is_in_place(scene: Scene) -> None:
    scene.up(scene.policy(settings=1))


def _has_left_its_row(scene: Scene) -> None:
    """A tap of this name was on Open vSwitch, and has gone without its down."""
    row = next(row for row in HERE if row.kind == "openvswitch")
    scene.row.close(scene.world)
    row.open(scene.world, index=INDEX + 1)
    scene.up(scene.policy(row), row=row)
    row.close(scene.world)
    scene.row.open(scene.world)


def _has_lost_its_place(scene: Scene) -> None:
    """Somebody has taken it from there."""
    scene.up()
    scene.row.take(scene.world, scene.row.place("home"))


def _place_has_gone(scene: Scene) -> None:
    place = scene.row.place("gone")
    scene.row.add(scene.world, place)
    scene.which = "gone"
    scene.up()
    scene.row.remove(scene.world, place)


def _is_of_another(scene: Scene) -> None:
    """Its mark names a process that lives."""
    scene.up(pid=INIT)


def _is_put_elsewhere(scene: Scene) -> None:
    """Somebody else has put it on a bridge, and not by us."""
    scene.row.put(scene.world, scene.row.place("other"))


STATES = {
    "not there": State(_is_not_there, up=Status.REFUSED, left=True, foreign=True),
    "on no bridge": State(_is_on_no_bridge),
    "on another bridge of its kind": State(_is_elsewhere, held=True, there=True),
    "on a bridge of the other kind": State(_is_on_the_other_kind, held=True),
    "in place with other settings": State(_is_in_place, held=True, there=True),
    "its row without a link": State(_has_left_its_row),
    "a link without its place": State(_has_lost_its_place, held=True),
    "its place gone": State(_place_has_gone, up=Status.UNAVAILABLE),
    "of another holder": State(_is_of_another, up=Status.DENIED, left=True, foreign=True),
    "put elsewhere by somebody else": State(
        _is_put_elsewhere, up=Status.DENIED, left=True, foreign=True
    ),
}


def states_of(row: Row) -> dict[str, State]:
    """Return the states that a port of this kind is tried from, half made ones too, by name."""
    found = {name: state for name, state in STATES.items() if name not in row.never}
    for number in range(1, row.ops + 1):
        enter = partial(Scene.half_up, ops=number)
        found[f"half made after op {number}"] = State(enter, held=True, half=True, there=True)
    if row.made:
        for name, state in found.items():
            if state.up is Status.UNAVAILABLE:
                # NOTE: its filters are for gc to take away.
                found[name] = replace(state, left=True)
            elif state.there:
                held = state.held and name not in row.unmoved
                found[name] = replace(state, up=Status.DENIED, left=True, held=held)
    return {name: found[name] for name in row.only or found}
