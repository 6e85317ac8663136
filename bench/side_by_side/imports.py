"""Where the time of an up goes before it does anything: the costliest of its imports."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 15

_LINE = re.compile(r"import time: +(\d+) \| +(\d+) \|( +)(\S+)$")


@dataclass(frozen=True)
class Import:
    """One module's import: milliseconds of its own, with what it imports, and who asked first."""

    module: str
    own: float
    total: float
    importer: str


def parse(text: str) -> list[Import]:
    """Return the imports that `python3 -X importtime` told of on stderr, in its order."""
    found: list[Import] = []
    waiting: dict[int, list[int]] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        own, total, spaces, module = match.groups()
        depth = (len(spaces) - 1) // 2
        # NOTE: a module is told of after all that it imports.
        for index in waiting.pop(depth + 1, []):
            child = found[index]
            found[index] = Import(child.module, child.own, child.total, module)
        waiting.setdefault(depth, []).append(len(found))
        found.append(Import(module, int(own) / 1000, int(total) / 1000, "-"))
    return found


def medians(runs: Sequence[Sequence[Import]]) -> list[Import]:
    """Return the imports of the first run, each with the medians of all runs."""
    times: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        for each in run:
            times.setdefault(each.module, []).append((each.own, each.total))
    return [
        Import(
            each.module,
            statistics.median(own for own, _ in times[each.module]),
            statistics.median(total for _, total in times[each.module]),
            each.importer,
        )
        for each in runs[0]
    ]


def table(imports: Sequence[Import], runs: int) -> str:
    """Return the costliest imports as a table, by their own cost and by all that they bring."""
    whole = sum(each.own for each in imports)
    lines = [
        f"an up on a Linux bridge imports {len(imports)} modules in {whole:.1f} ms "
        f"(medians of {runs} runs; the tracing itself adds to each)"
    ]
    for title, key in (("by their own cost", "own"), ("with all that they import", "total")):
        lines += ["", f"  own ms  all ms  {title}"]
        costliest = sorted(imports, key=lambda each: getattr(each, key), reverse=True)
        for each in costliest[:SHOWN]:
            by = "" if each.importer == "-" else f"  (by {each.importer})"
            lines.append(f"{each.own:8.1f}{each.total:8.1f}  {each.module}{by}")
    return "\n".join(lines) + "\n"
