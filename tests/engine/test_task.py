"""A task that waits, and whoever drives it."""

from __future__ import annotations

import os
import pty

import pytest

from pyqemu_ifup.hook import read_tap_name
from pyqemu_ifup.task import finish, pause

pytestmark = pytest.mark.each_python


def test_work_runs_to_its_end_and_says_how_long_it_waits() -> None:
    async def work() -> str:
        await pause(0.5)
        await pause(0.25)
        return "done"

    waits: list[float] = []
    assert finish(work(), waits.append) == "done"
    assert waits == [0.5, 0.25]


def test_work_that_is_broken_off_while_it_waits_takes_back_what_it_did() -> None:
    """As by the alarm of the deadline; and the undo may wait, too."""
    told: list[str] = []

    async def work() -> None:
        try:
            told.append("did")
            await pause(0.5)
            told.append("not reached")
        except TimeoutError:
            await pause(0.1)
            told.append("took back")
            raise

    def wait(seconds: float) -> None:
        if seconds == 0.5:
            raise TimeoutError("the alarm")

    with pytest.raises(TimeoutError, match="the alarm"):
        finish(work(), wait)
    assert told == ["did", "took back"]


def test_a_terminal_that_has_hung_up_is_no_tap() -> None:
    """TUNGETIFF on it is EIO: QEMU in the background, its terminal closed."""
    master, slave = pty.openpty()
    os.close(master)
    try:
        assert read_tap_name(slave) is None
    finally:
        os.close(slave)
