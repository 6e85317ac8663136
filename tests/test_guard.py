"""When the agent looks at a table that somebody has touched: soon, and later each time."""

from __future__ import annotations

import time

import pytest

from pyqemu_ifd import guard
from pyqemu_ifd.guard import DELAY, PAUSE_MAX, PEACE, Guard


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
        watch.loaded("lab", "gone")
        return self.now - begun


def test_a_fight_is_slower_each_time_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(monkeypatch), Guard()
    took = [clock.fight(watch) for _ in range(20)]
    assert took[0] == pytest.approx(DELAY)
    assert all(each < 1 for each in took[:4])
    assert took == sorted(took)
    assert took[-1] == pytest.approx(PAUSE_MAX)
    assert sum("again and again" in line for line in clock.lines) == 1
    assert len(clock.lines) <= 5
    clock.now += PAUSE_MAX + PEACE + 1
    assert clock.fight(watch) == pytest.approx(DELAY)
    assert clock.lines[-1].endswith("pyqemu-ifup-lab is loaded again: it was gone")


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
