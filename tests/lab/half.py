"""One of the two processes of lab.halves: a pytest that runs one file of tests after another.

A test marked `host` is run by the first half alone, so that no two of them run beside each other,
and one marked `last` after all others.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from lab.halves import KEPT, Queue, cached, longest_first, read


class Half:
    """A plugin of pytest's: both halves collect all the tests, each runs what it takes.

    `seconds` is what each file is known to take.
    """

    def __init__(self, name: str, queue: Queue, seconds: Mapping[str, float]) -> None:
        self.name = name
        self.queue = queue
        self.seconds = seconds

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave to the first half what is its alone."""
        if self.name != "first":
            others = [item for item in items if item.get_closest_marker("host") is not None]
            config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if item.get_closest_marker("host") is None]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run one file after another until all are taken; what else is as in pytest's own loop."""
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        if session.config.option.collectonly:
            return True
        files: dict[str, list[pytest.Item]] = {}
        for item in session.items:
            files.setdefault(item.nodeid.partition("::")[0], []).append(item)
        order = sorted(longest_first(files, self.seconds), key=lambda file: turn(files[file]))
        while (file := self.queue.take(order)) is not None:
            start = time.monotonic()
            self._run(session, files[file])
            self.queue.ran(self.name, file, time.monotonic() - start)
        return True

    def _run(self, session: pytest.Session, items: Sequence[pytest.Item]) -> None:
        for item, following in zip(items, [*items[1:], None], strict=True):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)


def turn(items: Sequence[pytest.Item]) -> int:
    """Return when a file's tests have their turn: before all others (0), among them, or last (2).

    What only the first half may run goes first: in the end there is something for both.
    """
    marks = {mark.name for item in items for mark in item.iter_markers()}
    return 2 if "last" in marks else 0 if "host" in marks else 1


def main() -> int:
    """Run the half that the arguments name, with the folder of the queue, and what pytest gets."""
    name, folder, *arguments = sys.argv[1:]
    plugin = Half(name, Queue(Path(folder)), read(KEPT) | read(cached()))
    # NOTE: each half runs a part of what it has collected: its percentages would tell nothing.
    return pytest.main(["-o", "console_output_style=classic", *arguments], plugins=[plugin])
