"""Measures rows, in turn and round for round, so that whatever else happens meets all alike."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from side_by_side.hosts import BenchError, Host, Run, Spawner
from side_by_side.report import Samples
from side_by_side.rows import Row, environment

Samplings = dict[tuple[str, str], Samples]


def progress(text: str) -> None:
    """Tell on stderr what is being done."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def attempt(spawner: Spawner, row: Row, words: Sequence[str]) -> Run:
    """Run one command of a row. Raises BenchError where it fails."""
    run = spawner.run(words, environment(row))
    _check_status(run, words)
    return run


def _check_status(run: Run, words: Sequence[str]) -> None:
    if run.status != 0:
        raise BenchError(f"`{' '.join(words)}` ended {run.status}: {run.stderr.strip()}")


def measure(host: Host, row: Row, samples: Samplings, *, check: bool) -> None:
    """Bring a new tap up and down once as `row` says and add what it took to `samples`.

    `check`: see also that the tap then is on the row's bridge, and then no longer. Raises
    BenchError where it is not.
    """
    try:
        if row.helper:
            run, tap = host.spawner.help(row.up, environment(row))
            _check_status(run, row.up)
            _take(samples, row, "up", run)
            if check:
                _check(host, row.up, tap, row.bridge)
            return
        host.spawner.open(row.tap)
        _take(samples, row, "up", attempt(host.spawner, row, row.up))
        if check:
            _check(host, row.up, row.tap, row.bridge)
        if row.down is not None:
            _take(samples, row, "down", attempt(host.spawner, row, row.down))
            if check:
                _check(host, row.down, row.tap, None if row.detaches else row.bridge)
    finally:
        host.spawner.close()


def _take(samples: Samplings, row: Row, direction: str, run: Run) -> None:
    taken = samples.setdefault((row.key, direction), Samples())
    taken.wall.append(run.wall)
    taken.cpu.append(run.cpu)


def _check(host: Host, words: Sequence[str], tap: str, wanted: str | None) -> None:
    found = host.master(tap)
    if found != wanted:
        raise BenchError(
            f"`{' '.join(words)}` ended 0, but {tap} is on {found or 'no bridge'}, "
            f"not on {wanted or 'no bridge'}"
        )


def measure_all(hosts: Mapping[str, Host], rows: Sequence[Row], rounds: int) -> Samplings:
    """Measure the rows in turn, `rounds` times, after one round that only warms up and checks."""
    progress("one round to warm up")
    for row in rows:
        measure(hosts[row.host], row, {}, check=True)
    samples: Samplings = {}
    for number in range(1, rounds + 1):
        if number % 10 == 1:
            progress(f"round {number} of {rounds}")
        for row in rows:
            measure(hosts[row.host], row, samples, check=False)
    return samples
