"""Which rules of a policy may match a caller, found without a look at every rule.

Each rule is filed under one of its keys, by the plain characters that the globs of that key begin
with. It is the key with the longest beginnings. A rule without such a key is always looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pyqemu_ifconf.globs import literal_start

MatchKey = Literal["tap", "vm", "netdev", "mac", "user"]


def fold(key: MatchKey, text: str) -> str:
    """Return `text` of a match key as it is compared: MACs in lower case."""
    return text.lower() if key == "mac" else text


class RuleIndex:
    """An index of rules, given by the globs of each key of each rule, in their order."""

    def __init__(self, rules: Sequence[Mapping[MatchKey, tuple[str, ...]]]) -> None:
        self.keys = frozenset(key for rule in rules for key in rule)
        """The keys that any rule looks at."""
        self._always: list[int] = []
        self._filed: dict[MatchKey, dict[str, list[int]]] = {}
        """For each key and each beginning of its globs, the numbers of the rules."""
        for number, rule in enumerate(rules):
            self._file(number, rule)
        self._lengths = {
            key: sorted({len(start) for start in starts}) for key, starts in self._filed.items()
        }

    def _file(self, number: int, rule: Mapping[MatchKey, tuple[str, ...]]) -> None:
        best: MatchKey | None = None
        most = 0
        for key, globs in rule.items():
            least = min((len(literal_start(glob)) for glob in globs), default=0)
            if least > most:
                best, most = key, least
        if best is None:
            self._always.append(number)
            return
        starts = self._filed.setdefault(best, {})
        for start in {literal_start(fold(best, glob)) for glob in rule[best]}:
            starts.setdefault(start, []).append(number)

    def candidates(self, values: Mapping[MatchKey, str | None]) -> list[int]:
        """Return the numbers of all rules that may match, ascending; a value of None is unknown."""
        found = set(self._always)
        for key, starts in self._filed.items():
            value = values[key]
            if value is None:
                continue
            value = fold(key, value)
            for length in self._lengths[key]:
                if length > len(value):
                    break
                found.update(starts.get(value[:length], ()))
        return sorted(found)
