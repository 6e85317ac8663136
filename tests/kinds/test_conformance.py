"""What every kind of network does, from every state that a tap may be in: one suite for all.

Each test runs once for each row of the table that is of this lab, and each state; in a Linux of
the tests' own it runs for that one's rows.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import pytest

from kinds.scene import BROKEN, Scene, breaking, stepping
from kinds.states import State, states_of
from kinds.table import HERE, Row, World
from lab.inside import INSIDE
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import Datapath, OpenVSwitch
from lab.snapshot import Snapshot, diff
from pyqemu_ifconf.failure import Failure, Status

DATAPATH: Datapath = "system" if INSIDE in os.environ else "netdev"
LOOKS: dict[Row, Snapshot] = {}
"""What there is when a tap has been attached that was on no bridge."""


def each_state(fits: Callable[[State], bool], rows: Sequence[Row] = HERE) -> pytest.MarkDecorator:
    """Return what has a test run for each of the rows, in each of its states that fits."""
    pairs = [(row, name) for row in rows for name, state in states_of(row).items() if fits(state)]
    ids = [f"{row.title}-{name}" for row, name in pairs]
    return pytest.mark.parametrize(("row", "state"), pairs, ids=ids)


def each_settings() -> pytest.MarkDecorator:
    """Return what has a test run for each row, with each of its settings."""
    pairs = [(row, number) for row in HERE for number in range(len(row.settings))]
    ids = [f"{row.title}-{' '.join(row.settings[number]) or 'none'}" for row, number in pairs]
    return pytest.mark.parametrize(("row", "settings"), pairs, ids=ids)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A host with two places of each row of this lab."""
    require("root", "tun", "ip", "nft", "ovs", *(need for row in HERE for need in row.needs))
    with Namespace(lasting=True) as netns, OpenVSwitch(netns, datapath=DATAPATH) as ovs:
        world = World(netns, ovs)
        for row in HERE:
            for which in ("home", "other"):
                row.add(world, row.place(which))
        yield world


@pytest.fixture
def ovs(world: World) -> OpenVSwitch:
    """The host's Open vSwitch; with it, each test is seen to leave the host as it was."""
    return world.ovs


def look_after_up(world: World, row: Row) -> Snapshot:
    """Return what there is when a tap has been attached that was on no bridge."""
    if row not in LOOKS:
        with Scene(world, row) as scene:
            scene.up()
            LOOKS[row] = scene.look()
    return LOOKS[row]


def check_is_as_wanted(scene: Scene) -> None:
    """See that nothing differs from what the policy says, and that it all was done under a mark."""
    dry = scene.apply(dry_run=True)
    assert (dry.result, dry.differences, dry.commands) == ("unchanged", (), ())
    assert scene.unmarked == []


@each_settings()
def test_settings(world: World, ovs: OpenVSwitch, row: Row, settings: int) -> None:
    """A port gets each; the down leaves nothing of it."""
    with Scene(world, row, settings) as scene:
        scene.up()
        check_is_as_wanted(scene)
        scene.down()
        assert scene.left() == []
        assert scene.unmarked == []


@each_state(lambda state: state.up is Status.DONE)
def test_up(world: World, ovs: OpenVSwitch, row: Row, state: str) -> None:
    """It has come to the same from every state."""
    wanted = look_after_up(world, row)
    with Scene(world, row) as scene:
        states_of(row)[state].enter(scene)
        scene.up()
        assert scene.differs(wanted) == []
        check_is_as_wanted(scene)
        scene.down()
        assert scene.left() == []
        assert scene.unmarked == []


@each_state(lambda state: state.up is not Status.DONE)
def test_up_that_is_refused(world: World, ovs: OpenVSwitch, row: Row, state: str) -> None:
    """What is another's is unchanged; what was ours is attached nowhere any more."""
    found = states_of(row)[state]
    with Scene(world, row) as scene:
        found.enter(scene)
        before = scene.snapshot() if found.left else scene.pristine
        with pytest.raises(Failure) as caught:
            scene.up()
        assert caught.value.status is found.up, caught.value
        assert scene.left(before) == []
        assert scene.unmarked == []


@each_state(lambda state: True)
def test_down(world: World, ovs: OpenVSwitch, row: Row, state: str) -> None:
    """It leaves nothing, and may run twice; of another's tap it leaves all."""
    found = states_of(row)[state]
    with Scene(world, row) as scene:
        found.enter(scene)
        before = scene.snapshot() if found.foreign else scene.pristine
        for _ in range(2):
            scene.down()
            assert scene.left(before) == []
        assert scene.unmarked == []


def fails_after(number: int, attempt: Callable[[], None]) -> bool:
    """Have `attempt` fail after its op of this number; tell whether it has come that far."""
    with stepping(after=breaking(number)) as done:
        try:
            attempt()
        except Failure as failure:
            assert failure.what == BROKEN, failure
    return len(done) >= number


@each_state(lambda state: state.up is Status.DONE)
def test_up_that_fails(world: World, ovs: OpenVSwitch, row: Row, state: str) -> None:
    """After each op it is taken back: the tap is attached nowhere, and what it was at first.

    One that the up itself has made is not there, and what was there before may be as it was.
    """
    enter = states_of(row)[state].enter
    with Scene(world, row) as scene:
        enter(scene)
        for number in itertools.count(1):
            before = scene.snapshot() if row.made else scene.pristine
            if not fails_after(number, scene.up):
                break
            if not row.made or diff(before, scene.snapshot()):
                assert scene.left() == [], number
            if row.made:
                scene.again()
            enter(scene)
        assert number > 1 and scene.unmarked == []


@each_state(lambda state: state.held)
def test_apply(world: World, ovs: OpenVSwitch, row: Row, state: str) -> None:
    """It has come to what an up comes to; where it fails, after each op all is what it was."""
    wanted = look_after_up(world, row)
    with Scene(world, row) as scene:
        states_of(row)[state].enter(scene)
        before = scene.look()
        for number in itertools.count(1):
            if not fails_after(number, scene.change):
                break
            assert scene.differs(before) == [], number
        assert scene.differs(wanted) == []
        check_is_as_wanted(scene)


@pytest.mark.parametrize(
    ("row", "name"),
    [(row, name) for row in HERE for name in row.settings[0]],
    ids=[f"{row.title}-{name}" for row in HERE for name in row.settings[0]],
)
def test_apply_of_one_setting(world: World, ovs: OpenVSwitch, row: Row, name: str) -> None:
    """Where nothing else differs, it is put in force."""
    wanted = look_after_up(world, row)
    with Scene(world, row) as scene:
        others = {key: value for key, value in row.settings[0].items() if key != name}
        scene.up(scene.policy(given=others))
        assert scene.apply().result == "changed"
        assert scene.differs(wanted) == []


@each_state(lambda state: state.up is Status.DONE and not state.half)
def test_what_an_up_prints(world: World, ovs: OpenVSwitch, row: Row, state: str) -> None:
    """A shell that runs it comes to the same; so it does with what the down prints."""
    wanted = look_after_up(world, row)
    up: list[str] = []
    down: list[str] = []
    with Scene(world, row) as scene:
        states_of(row)[state].enter(scene)
        scene.up(tell=up.append)
        scene.down(tell=down.append)
        scene.again()
        states_of(row)[state].enter(scene)
        scene.run(up)
        assert scene.differs(wanted) == []
        if "down" not in row.unsaid:
            scene.run(down)
            assert scene.left() == []


@each_state(
    lambda state: state.held and not state.half, [row for row in HERE if "apply" not in row.unsaid]
)
def test_what_an_apply_prints(world: World, ovs: OpenVSwitch, row: Row, state: str) -> None:
    """A shell that runs it comes to the same."""
    wanted = look_after_up(world, row)
    with Scene(world, row) as scene:
        states_of(row)[state].enter(scene)
        scene.run(scene.apply(dry_run=True).commands)
        assert scene.differs(wanted) == []


@pytest.mark.parametrize("row", HERE, ids=lambda row: row.title)
def test_the_number_of_ops(world: World, ovs: OpenVSwitch, row: Row) -> None:
    """There is a state half made for each op of an up."""
    with Scene(world, row) as scene, stepping() as done:
        scene.up()
    assert len(done) == row.ops, done
