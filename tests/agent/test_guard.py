"""When the agent looks at a table that somebody has touched: soon, however often."""

from __future__ import annotations

import time

import pytest

from pyqemu_ifd import guard
from pyqemu_ifd.guard import DELAY, PAUSE, SILENCE_LAST, Guard

pytestmark = pytest.mark.each_python


class Clock:
    """A clock that the test sets, and what was logged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.lines: list[str] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(guard, "log", lambda priority, line: self.lines.append(line))

    def fight(self, watch: Guard) -> float:
        """Touch a table, load it when it is time, and return how long that took."""
        begun = self.now
        watch.take({"lab"})
        assert watch.due is not None
        assert watch.ripe(watch.due - 0.01, {"lab"}) == []
        self.now = watch.due
        assert watch.ripe(self.now, {"lab"}) == ["lab"]
        watch.found("lab", "gone", "")
        return self.now - begun


@pytest.mark.parametrize("every", [0.0, 1.0, 30.0, 300.0])
def test_a_table_is_back_within_a_second_each_time(
    monkeypatch: pytest.MonkeyPatch, every: float
) -> None:
    """For a while, and told of ever less; whoever changes it at once makes no more work."""
    clock, watch = Clock(monkeypatch), Guard()
    lines = []
    while clock.now < 1000 + 30 * max(every, PAUSE):
        took = clock.fight(watch)
        assert took < max(DELAY, PAUSE) + 0.01, clock.now
        assert every or clock.now == 1000 + DELAY or took > PAUSE - 0.01, clock.now
        lines.append(len(clock.lines))
        clock.now += every
    assert lines[0] == 1
    assert clock.lines[0].endswith("pyqemu-ifup-lab is loaded again: it was gone")
    assert all("nft monitor" in line for line in clock.lines[1:])
    assert len(clock.lines) <= 8
    clock.now += SILENCE_LAST + 1
    assert clock.fight(watch) == pytest.approx(DELAY)
    assert clock.lines[-1] == clock.lines[0]


def test_many_events_are_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(monkeypatch), Guard()
    for _ in range(100):
        watch.take({"lab", "other"})
        clock.now += DELAY / 200
    assert watch.due == pytest.approx(1000 + DELAY)
    assert watch.ripe(1000 + DELAY, {"lab"}) == ["lab"], "no network of ours is called other"
    assert watch.due is None
    watch.take(None)
    assert sorted(watch.ripe(clock.now + DELAY, {"lab", "two"})) == ["lab", "two"]
