"""The figures of many taps and many rules, as tables for people and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from side_by_side import report
from side_by_side.report import LABEL, Goal
from side_by_side.rows import BARE
from side_by_side.scale import FEW, RULES, TIMES, AtOnce, Grown

CROWD = 256
"""How many taps at once the goals speak of."""


def percentile(seconds: Sequence[float], percent: float) -> float:
    """Return the percentile in milliseconds, by the nearest rank."""
    ordered = sorted(seconds)
    return 1000 * ordered[math.ceil(percent / 100 * len(ordered)) - 1]


def goals(grown: Grown) -> list[Goal]:
    """Return what many taps and many rules shall cost."""
    few, many = f"-{FEW}", f"-{grown.taps}"
    found = []
    for kind, label in (("linux", "Linux bridge"), ("ovs", "OVS bridge")):
        text = f"an up, {label}: {grown.taps} taps there / {FEW} taps there"
        found += report.times(grown.latency, kind + many, 1.5, kind + few, text)
    found += report.times(
        grown.latency,
        f"rules-{RULES[-1]}",
        1.1,
        f"rules-{RULES[0]}",
        f"an up: {RULES[-1]} rules / {RULES[0]} rules",
    )
    for each in grown.memory:
        if each.taps == grown.taps:
            what = f"the agent's memory, {each.label}, {each.taps} taps"
            found.append(Goal(what, 120, each.after, "MB"))
    for kill in grown.kills:
        what = f"SIGKILL until the port has gone, {kill.taps} taps, the longest"
        found.append(Goal(what, 1, max(kill.seconds), "s"))
    for crowd in grown.at_once:
        if crowd.count == CROWD and crowd.key != BARE:
            what = f"{crowd.count} at once, {crowd.label}: "
            found.append(Goal(f"{what}failed", 0, crowd.failed, "ups"))
            found.append(Goal(f"{what}p99", 2, percentile(crowd.walls, 99) / 1000, "s"))
    return found


def table(grown: Grown) -> str:
    """Return the tables, no wider than the first part's."""
    lines = [
        "",
        f"taps up at once: milliseconds from spawn to exit of one, and of all; {TIMES} times",
        "",
        f"{'':{LABEL}}{'at once':>8}{'p50':>9}{'p99':>9}{'all':>9}{'failed':>8}",
        *(line for each in grown.at_once for line in _crowd(each)),
        "",
        f"one tap, many there already: milliseconds from spawn to exit, {grown.latency.rounds} "
        "rounds",
        "",
        *report.heading(),
        *report.rows_table(grown.latency),
        "",
        "the agent's memory (VmRSS), MB",
        "",
        *(
            f"{f'{each.label}, {each.taps} taps':{LABEL}}{each.before:8.1f} without, "
            f"{each.after:.1f} with them"
            for each in grown.memory
        ),
    ]
    if grown.kills:
        lines += ["", "a tap's holder killed: milliseconds until its port has gone", ""]
    for kill in grown.kills:
        seconds = kill.seconds
        lines.append(
            f"{f'OVS bridge, {kill.taps} taps':{LABEL}}{1000 * statistics.median(seconds):8.1f} "
            f"median, {1000 * max(seconds):.1f} the longest of {len(seconds)}"
        )
    lines += ["", *report.goal_lines(goals(grown))]
    lines += [f"left out: {each.label}: {each.because}" for each in grown.left_out]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _crowd(each: AtOnce) -> list[str]:
    p50, p99 = (percentile(each.walls, percent) for percent in (50, 99))
    together = 1000 * statistics.median(each.all)
    lines = [
        f"{each.label:{LABEL}}{each.count:8}{p50:9.1f}{p99:9.1f}{together:9.1f}{each.failed:8}"
    ]
    return lines + [f"    {line}" for line in each.said.splitlines()[:3]]


def as_json(grown: Grown) -> dict[str, object]:
    """Return the figures as one JSON object, times in milliseconds, memory in MB."""
    return {
        "taps": grown.taps,
        "at_once": [_crowd_json(each) for each in grown.at_once],
        "rounds": grown.latency.rounds,
        "rows": report.rows_json(grown.latency),
        "memory": [
            {
                "switch": each.label,
                "taps": each.taps,
                "before": round(each.before, 1),
                "after": round(each.after, 1),
            }
            for each in grown.memory
        ],
        "kills": [
            {"taps": each.taps, "times": [round(1000 * one, 3) for one in each.seconds]}
            for each in grown.kills
        ],
        "goals": report.goals_json(goals(grown)),
        "left_out": [{"row": each.label, "because": each.because} for each in grown.left_out],
    }


def _crowd_json(each: AtOnce) -> dict[str, object]:
    return {
        "row": each.key,
        "label": each.label,
        "count": each.count,
        "p50": round(percentile(each.walls, 50), 3),
        "p99": round(percentile(each.walls, 99), 3),
        "all": [round(1000 * seconds, 3) for seconds in each.all],
        "times": [round(1000 * seconds, 3) for seconds in each.walls],
        "failed": each.failed,
        "said": each.said,
    }
