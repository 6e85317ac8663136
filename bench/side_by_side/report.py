"""The figures of one run, as a table for people and as JSON."""

from __future__ import annotations

import math
import shlex
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from side_by_side.rows import BARE, LONG_OVS_SCRIPT, OVS_SCRIPT, PYROUTE2, SCRIPT, LeftOut, Row

WIDTH = 98
LABEL = 34


@dataclass
class Samples:
    """What one command took: seconds of wall time and of processor time, a round each."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """The median, the least and the 95th percentile of the wall time, in milliseconds."""

    median: float
    least: float
    p95: float
    cpu: float


@dataclass(frozen=True)
class Result:
    """A whole run: the rows, their samples by (key, "up" or "down"), and what should be known."""

    rows: tuple[Row, ...]
    samples: Mapping[tuple[str, str], Samples]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    rounds: int


def figures(samples: Samples) -> Figures:
    """Return the figures of `samples`, which are at least one; `cpu` is a median too."""
    ordered = sorted(samples.wall)
    # NOTE: the nearest rank: a time that was measured, not one between two.
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return Figures(
        1000 * statistics.median(ordered),
        1000 * ordered[0],
        1000 * p95,
        1000 * statistics.median(samples.cpu),
    )


def ratios(result: Result, direction: str, median: float) -> tuple[float, float]:
    """Return how many times the bare interpreter, and the two-line script, `median` is."""
    bare = figures(result.samples[BARE, "up"]).median
    script = figures(result.samples[SCRIPT, direction]).median
    return median / bare, median / script


def table(result: Result) -> str:
    """Return the table, no wider than WIDTH, and under it what each row runs."""
    lines = [
        f"milliseconds from spawn to exit, {result.rounds} rounds",
        "",
        *heading(),
        *rows_table(result),
        "",
        *goal_lines(goals(result)),
        "",
        *_wrap(
            "/bare: times the median of the bare interpreter, `python3 -I -S -c pass`; "
            "/ip: times that of the two-line ip script's up, or down.",
            "",
        ),
        *(
            line
            for each in result.left_out
            for line in _wrap(f"left out: {each.label}: {each.because}", "  ")
        ),
        *(line for note in result.notes for line in _wrap(f"note: {note}", "  ")),
        "",
        "what is run:",
    ]
    shown: set[str] = set()
    for row in result.rows:
        lines += _commands(row, shown)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def heading() -> list[str]:
    """Return the heading of the rows."""
    columns = f"{'median':>7} {'min':>6} {'p95':>6} {'/bare':>6} {'/ip':>5}"
    return [f"{'':{LABEL}}{'up':>18}{'down':>32}".rstrip(), f"{'':{LABEL - 2}}{columns}{columns}"]


def rows_table(result: Result) -> list[str]:
    """Return a line for each row, without a heading."""
    return [
        f"{row.label:{LABEL - 2}}{_cells(result, row, 'up')}{_cells(result, row, 'down')}".rstrip()
        for row in result.rows
    ]


@dataclass(frozen=True)
class Goal:
    """A figure that this project wants to reach, what it is in this run, and in which unit."""

    what: str
    limit: float
    figure: float
    unit: str


def times(result: Result, key: str, limit: float, of: str, text: str) -> list[Goal]:
    """Return the goal that the up of row `key` takes at most `limit` times that of row `of`."""
    medians = [result.samples.get((each, "up")) for each in (key, of)]
    ours, theirs = (figures(each).median if each is not None else None for each in medians)
    if ours is None or theirs is None:
        return []
    return [Goal(text, limit, ours / theirs, "times")]


def goals(result: Result) -> list[Goal]:
    """Return what the hooks shall cost beside what they are compared with."""
    return [
        *times(
            result,
            "linux-agent",
            1.4,
            BARE,
            "through the agent, Linux bridge / python3 -I -S -c pass",
        ),
        *times(
            result,
            "ovs-agent",
            1.2,
            OVS_SCRIPT,
            "through the agent, OVS bridge / ovs-vsctl script, tag",
        ),
        *times(
            result,
            "ovs-agent",
            1.2,
            LONG_OVS_SCRIPT,
            "through the agent, OVS bridge / ovs-vsctl script, tag MTU MAC",
        ),
        *times(
            result,
            "linux",
            1.3,
            PYROUTE2,
            "without the agent, Linux bridge / python3 -c 'import pyroute2'",
        ),
    ]


def goal_lines(goals: Sequence[Goal]) -> list[str]:
    """Return the goals as lines for people: no test asserts them, nor does this run."""
    width = max((len(goal.what) for goal in goals), default=0)
    return [
        f"{goal.what:{width}} {goal.figure:9.2f} {goal.unit:5}  goal <= {goal.limit:g}"
        for goal in goals
    ]


def goals_json(goals: Sequence[Goal]) -> list[dict[str, object]]:
    """Return the goals for the JSON object."""
    return [
        {"what": each.what, "figure": round(each.figure, 3), "unit": each.unit, "goal": each.limit}
        for each in goals
    ]


def _cells(result: Result, row: Row, direction: str) -> str:
    samples = result.samples.get((row.key, direction))
    if samples is None:
        return f"{'-':>7} {'-':>6} {'-':>6} {'-':>6} {'-':>5}"
    found = figures(samples)
    bare, script = ratios(result, direction, found.median)
    return f"{found.median:7.1f} {found.least:6.1f} {found.p95:6.1f} {bare:6.1f} {script:5.1f}"


def _commands(row: Row, shown: set[str]) -> list[str]:
    """Return what the row runs, in words; a file that is in `shown` is not printed again."""
    lines = [f"  {row.label.strip()}"]
    env = [f"{name}={value}" for name, value in row.env.items()]
    for words in filter(None, (row.up, row.down)):
        lines.append(f"    {shlex.join([*env, *words])}")
    for path, text in row.text.items():
        if path not in shown:
            shown.add(path)
            name = path.rpartition("/")[2]
            lines += [f"    {name}:", *(f"      {line}" for line in text.splitlines())]
    return lines


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def as_json(result: Result) -> dict[str, object]:
    """Return the run as one JSON object, its times in milliseconds."""
    return {
        "rounds": result.rounds,
        "rows": rows_json(result),
        "goals": goals_json(goals(result)),
        "left_out": [{"row": each.label, "because": each.because} for each in result.left_out],
        "notes": list(result.notes),
    }


def rows_json(result: Result) -> list[dict[str, object]]:
    """Return the rows for the JSON object."""
    return [_row_json(result, row) for row in result.rows]


def _row_json(result: Result, row: Row) -> dict[str, object]:
    return {
        "row": row.key,
        "label": row.label.strip(),
        "host": row.host,
        "environment": dict(row.env),
        "files": dict(row.text),
        "up": _direction_json(result, row, "up", row.up),
        "down": _direction_json(result, row, "down", row.down),
    }


def _direction_json(
    result: Result, row: Row, direction: str, words: Sequence[str] | None
) -> dict[str, object] | None:
    if words is None:
        return None
    samples = result.samples[row.key, direction]
    found = figures(samples)
    bare, script = ratios(result, direction, found.median)
    return {
        "command": list(words),
        "median": round(found.median, 3),
        "min": round(found.least, 3),
        "p95": round(found.p95, 3),
        "cpu": round(found.cpu, 3),
        "to_bare": round(bare, 3),
        "to_ip_script": round(script, 3),
        "times": [round(1000 * seconds, 3) for seconds in samples.wall],
    }
