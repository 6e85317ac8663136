"""The one deadline of a run, and what is made of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pyqemu_ifconf.failure import Failure
from pyqemu_ifup.deadline import GRACE, Deadline

pytestmark = pytest.mark.each_python


class Clock:
    """The monotonic clock, which stands still but for `pass_by`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def pass_by(self, seconds: float) -> None:
        """Let so much time pass."""
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


PARTS: list[tuple[str, Callable[[Deadline], Deadline]]] = [
    ("the run's own", lambda first: first.undo()),
    ("a way back of a way back", lambda first: first.undo().undo()),
    ("a part of a way back", lambda first: first.undo().child(1.5).undo()),
    ("what lasts in a way back", lambda first: first.undo().lasting().undo()),
    ("a part of the run", lambda first: first.child(8.0).undo()),
    ("what lasts in a part of the run", lambda first: first.child(8.0).lasting().undo()),
]


@pytest.mark.parametrize("part", [row[1] for row in PARTS], ids=[row[0] for row in PARTS])
@pytest.mark.parametrize("interrupted", [None, "received SIGTERM"])
def test_no_part_of_a_way_back_ends_later_than_the_first_may(
    clock: Clock, part: Callable[[Deadline], Deadline], interrupted: str | None
) -> None:
    """The run ends at 10; whoever has stopped it waits 2 s from then on, once."""
    first = Deadline(10.0, lambda: interrupted)
    clock.pass_by(9.0)
    first.undo()
    clock.pass_by(1.5)
    left = part(first).remaining()
    clock.pass_by(1.0)
    again = part(first).remaining()
    end = 9.0 + GRACE if interrupted else 10.0 + GRACE
    assert 10.5 + left <= end and 11.5 + again <= max(end, 11.5)


def test_a_part_of_the_run_that_was_stopped_leaves_the_others_no_more_time(clock: Clock) -> None:
    first = Deadline(10.0, lambda: "received SIGTERM")
    brief = first.child(5.0)
    assert brief.undo().remaining() == pytest.approx(GRACE)
    clock.pass_by(1.5)
    assert first.undo().remaining() == pytest.approx(GRACE - 1.5)


def test_nothing_interrupts_a_way_back(clock: Clock) -> None:
    first = Deadline(10.0, lambda: "received SIGTERM", wakeup=0)
    with pytest.raises(Failure, match="received SIGTERM"):
        first.check()
    back = first.undo()
    back.check()
    assert back.wakeup is None and first.wakeup == 0
    clock.pass_by(GRACE)
    with pytest.raises(Failure, match="not done after 2 s"):
        back.check()


def test_what_has_more_time_since_bounds_the_run(clock: Clock) -> None:
    armed: list[Deadline | None] = []
    first = Deadline(10.0, arm=armed.append)
    clock.pass_by(1.0)
    longer = first.allowing(30.0)
    assert longer.remaining() == pytest.approx(29.0) and first.remaining() == pytest.approx(9.0)
    anew = longer.renewed(30.0)
    assert anew.remaining() == pytest.approx(30.0)
    longer.child(5.0)
    back = anew.undo()
    anew.last_check()
    assert armed == [first, longer, anew, back, None]


def test_what_ends_at_the_last_ends_its_parts_too(clock: Clock) -> None:
    ended: list[str] = []
    first = Deadline(10.0, at_last=lambda: ended[0] if ended else None, stopped="gc mends it")
    part = first.child(5.0)
    part.last_check()
    ended.append("the calling process 7 has ended")
    part.check()
    with pytest.raises(Failure, match="stopped: the calling process 7 has ended; gc mends it"):
        part.last_check()
