"""What a verb answers, and how answers are laid out: plain text, or JSON."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Status
from pyqemu_ifconf.policy import Vlan
from pyqemu_ifconf.shell import shown
from pyqemu_ifctl.program import PROGRAM
from pyqemu_ifup.look import ranges

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from pyqemu_ifup.kinds.base import Difference

COLUMNS = 80
"""How wide a text is that no terminal shows, and a terminal that does not say so."""
GAP = 2
LEAST = 5
"""Columns that a column of a table keeps at least."""
CUT = "~"
"""The last character of a cell that was cut."""
JSON_VERSION = 1
TIMEOUT = 10.0
"""Seconds that a verb may take which looks at the switches."""
FOUND = 1
"""The exit status of `doctor` that has found an error, and of --exit-code if something differs."""
_UNPRINTED = re.compile("[^\n -~]")
"""What JSON may have as it is, and a terminal obey."""


@dataclass(frozen=True)
class Answer:
    """What a verb prints: `out` for standard output, `remarks` as lines for standard error.

    `status` is a Status, or FOUND.
    """

    out: str
    status: int = Status.DONE
    remarks: tuple[str, ...] = ()

    def by_name(self) -> Answer:
        """Return the same with the program's name before each remark."""
        return replace(self, remarks=tuple(map(by_name, self.remarks)))


def by_name(text: str) -> str:
    """Return a line for standard error, with the program's name before it."""
    return f"{PROGRAM}: {shown(text)}"


@dataclass(frozen=True)
class Table:
    """Lines of a table, and the rows (from 0) of which a cell was cut."""

    lines: tuple[str, ...]
    cut: frozenset[int]


def add_json(parser: ArgumentParser) -> None:
    """Give a verb the option by which it prints JSON."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def to_json(values: Mapping[str, object]) -> str:
    """Return one JSON object, as visible ASCII, with the version of its form; bytes that are no
    text as `?`."""
    text = json.dumps({"version": JSON_VERSION, **values}, indent=2, ensure_ascii=False)
    return _UNPRINTED.sub(_escaped, text) + "\n"


def _escaped(match: re.Match[str]) -> str:
    """Return one letter as JSON writes it in ASCII."""
    letter = match[0]
    if letter == "\x7f":
        return "\\u007f"
    return json.dumps("?" if "\ud800" <= letter <= "\udfff" else letter)[1:-1]


def json_vlan(vlan: Vlan | None) -> object:
    """Return a VLAN for JSON: null, an integer, `"any"`, or native and trunk with its ranges."""
    if vlan is not None and vlan.takes_all:
        return "any"
    if vlan is None or not vlan.trunk:
        return vlan.native if vlan is not None else None
    trunk = [low if low == high else f"{low}-{high}" for low, high in ranges(vlan.trunk)]
    return {"native": vlan.native, "trunk": trunk}


def json_differences(found: Iterable[Difference] | None) -> object:
    """Return for JSON what is not as wanted, null where that cannot be told."""
    return (
        None
        if found is None
        else [
            {
                "setting": each.setting,
                "wanted": each.wanted,
                "is": each.found,
                "because": each.because or None,
            }
            for each in found
        ]
    )


def count(number: int, noun: str) -> str:
    """Return `1 rule`, `2 rules`, `2 processes`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def terminal() -> int | None:
    """Return how many columns the terminal has that is standard output, None if it is none."""
    try:
        return os.get_terminal_size(1).columns or COLUMNS
    except OSError:
        # A file or a pipe, or it is closed.
        return None


def width(text: str) -> int:
    """Return how many columns of a terminal `text` takes."""
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def wrap(text: str, indent: str = "  ") -> list[str]:
    """Return `text` as lines that fit the terminal, or 80 columns, broken at blanks if possible."""
    lines: list[str] = []
    rest = text
    room = max(terminal() or COLUMNS, len(indent) + LEAST)
    while (end := len(_head(rest, room))) < len(rest):
        blank = rest.rfind(" ", len(indent) + 1, end + 1)
        end = blank if blank != -1 else end
        lines.append(rest[:end].rstrip())
        rest = indent + rest[end:].lstrip()
    return [*lines, rest]


def lay_out(heads: Sequence[str], rows: Iterable[Sequence[str]], give: Sequence[int]) -> Table:
    """Return a table that fits the terminal; the columns `give` are the first to be cut.

    In a pipe, or a file, it is whole.
    """
    cells = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(heads, *cells, strict=True)]
    room = terminal()
    for narrow in (list(give), list(range(len(heads)))):
        while room is not None and sum(widths) + GAP * (len(heads) - 1) > room:
            widest = max(narrow, key=lambda at: widths[at])
            if widths[widest] <= LEAST:
                break
            widths[widest] -= 1
    cut = {
        number
        for number, row in enumerate(cells)
        if any(width(cell) > most for cell, most in zip(row, widths, strict=True))
    }
    lines = []
    for row in [list(heads), *cells]:
        padded = [_pad(cell, most) for cell, most in zip(row, widths, strict=True)]
        lines.append((" " * GAP).join(padded).rstrip())
    return Table(tuple(lines), frozenset(cut))


def _pad(cell: str, room: int) -> str:
    if width(cell) > room:
        cell = _head(cell, room - 1) + CUT
    return cell + " " * (room - width(cell))


def _head(text: str, room: int) -> str:
    """Return the longest beginning of `text` that takes at most `room` columns."""
    end, used = 0, 0
    while end < len(text) and used + width(text[end]) <= room:
        used += width(text[end])
        end += 1
    return text[:end]
