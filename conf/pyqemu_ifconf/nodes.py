"""A YAML text as values with their places, free of anchors, aliases and tags, not yet typed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from pyqemu_ifconf.failure import PolicyError


@dataclass(frozen=True)
class Scalar:
    """A text; `plain` if no quotes and no block mark make it one, so a type may read it."""

    line: int
    column: int
    text: str
    plain: bool


@dataclass(frozen=True)
class List:
    """A sequence."""

    line: int
    column: int
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Map:
    """A mapping, in the order of the text; a key may be there more than once."""

    line: int
    column: int
    pairs: tuple[tuple[Node, Node], ...]


@dataclass(frozen=True)
class Broken:
    """Something with an error that is reported already: no other error is told of it."""

    line: int
    column: int


Node: TypeAlias = Scalar | List | Map | Broken


@dataclass
class Errors:
    """Collects the errors of one file."""

    file: str
    found: list[PolicyError] = field(default_factory=list)

    def add(self, node: Node, message: str) -> None:
        """Note that something is wrong at `node`."""
        self.add_at(node.line, node.column, message)

    @property
    def full(self) -> bool:
        """Whether there are so many that no more are kept."""
        return len(self.found) > ERRORS_MAX

    def add_at(self, line: int, column: int, message: str) -> None:
        """Note that something is wrong at `line` and `column`, which count from 1."""
        if len(self.found) == ERRORS_MAX:
            message += "; and there are more errors, which are told once these are mended"
        if not self.full:
            self.found.append(PolicyError(self.file, line, column, message))


ERRORS_MAX = 1000
"""Errors of one file that are kept; one more says that there are more."""


SHOWN_MAX = 60
"""Characters of a value that an error quotes."""


def quote(text: str) -> str:
    """Return `text` for an error: bare if it is one visible word, else in quotes, and cut."""
    cut = text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + "..."
    if cut and cut.isprintable() and " " not in cut and '"' not in cut:
        return cut
    import json  # only an error needs it

    return json.dumps(cut, ensure_ascii=not cut.isprintable())


def show(node: Node) -> str:
    """Return what `node` is, in the words of an error: its text, or `a list`."""
    if isinstance(node, Scalar):
        if node.plain:
            return quote(node.text) if node.text else "empty"
        shown = quote(node.text)
        return shown if shown.startswith('"') else f'"{shown}"'
    if isinstance(node, List):
        return "a list"
    return "a mapping"


def entries(node: Map, errors: Errors, what: str) -> Iterator[tuple[Scalar, Node]]:
    """Yield the pairs of a mapping whose keys are good; `what` is what a key is, in an error."""
    seen: dict[str, Scalar] = {}
    for key, value in node.pairs:
        if isinstance(key, Broken):
            continue
        if not isinstance(key, Scalar):
            errors.add(key, f"a {what} must be one word, not {show(key)}")
        elif key.plain and key.text == "<<":
            errors.add(key, "a merge key (<<) is not part of the policy language; write it out")
        elif key.text in seen:
            first = seen[key.text]
            errors.add(
                key, f"{what} {quote(key.text)} is given twice; first at {errors.file}:{first.line}"
            )
        else:
            seen[key.text] = key
            yield key, value
