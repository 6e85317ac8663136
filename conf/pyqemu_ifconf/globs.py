"""The globs of the match keys: `*`, `?`, `[a-z]` and `[!a-z]`, on the whole string.

Nothing else is special: no backslash, no braces, no `[^a-z]`.
"""

# NOTE: not fnmatch, which makes a regular expression of each glob: 5,000 rules would cost half a
# second, and a guest's name that meets several `*` could cost much more.

from __future__ import annotations

import re

_SPECIAL = re.compile(r"[*?\[]")

_Ranges = tuple[tuple[str, str], ...]
_Token = tuple[bool, _Ranges]
"""What one character must be: whether the ranges are negated, and the ranges."""


def is_glob(text: str) -> bool:
    """Tell whether `text` has a character that is special in a glob."""
    return _SPECIAL.search(text) is not None


def literal_start(glob: str) -> str:
    """Return the plain characters that `glob` begins with, as each text that it matches does."""
    special = _SPECIAL.search(glob)
    return glob if special is None else glob[: special.start()]


def glob_fault(glob: str) -> str | None:
    """Return what is wrong with `glob`, None if it is well-formed."""
    index = 0
    while (index := glob.find("[", index)) != -1:
        end = glob.find("]", index)
        if end == -1:
            return "its [ has no ]; to match a [ itself, write [[]"
        body = glob[index + 1 : end].removeprefix("!")
        if not body:
            return f"{glob[index : end + 1]} is an empty set"
        for low, high in _ranges(body):
            if low > high:
                return f"the range {low}-{high} in {glob[index : end + 1]} runs backwards"
        index = end + 1
    return None


def matches(glob: str, text: str) -> bool:
    """Tell whether `glob`, which is well-formed, matches the whole of `text`."""
    special = _SPECIAL.search(glob)
    if special is None:
        return glob == text
    # NOTE: the pieces between the `*` are found one after the other, each at its first place. There
    # is no backtracking.
    first, *middle = _pieces(glob)
    if not middle:
        return len(first) == len(text) and _fits(first, text, 0)
    last = middle.pop()
    begin, end = len(first), len(text) - len(last)
    if begin > end or not _fits(first, text, 0) or not _fits(last, text, end):
        return False
    for piece in middle:
        found = _find(piece, text, begin, end)
        if found is None:
            return False
        begin = found + len(piece)
    return True


_Piece = str | list[_Token]
"""What is between two `*`: plain characters, or tokens if some are special."""


def _pieces(glob: str) -> list[_Piece]:
    """Cut `glob` at each `*`."""
    found: list[list[_Token]] = [[]]
    for token in _tokens(glob):
        if token is None:
            found.append([])
        else:
            found[-1].append(token)
    return [_plain(piece) for piece in found]


def _plain(tokens: list[_Token]) -> _Piece:
    """Return the characters of the tokens if all are plain, else the tokens."""
    letters = [
        ranges[0][0]
        for negated, ranges in tokens
        if not negated and len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    ]
    return "".join(letters) if len(letters) == len(tokens) else tokens


def _fits(piece: _Piece, text: str, at: int) -> bool:
    """Tell whether the piece matches the characters of `text` from `at` on."""
    if isinstance(piece, str):
        return text.startswith(piece, at)
    return all(
        negated != any(low <= text[at + number] <= high for low, high in ranges)
        for number, (negated, ranges) in enumerate(piece)
    )


def _find(piece: _Piece, text: str, begin: int, end: int) -> int | None:
    """Return the first place from `begin` where the piece matches, all of it before `end`."""
    if isinstance(piece, str):
        found = text.find(piece, begin, end)
        return found if found >= 0 else None
    places = range(begin, end - len(piece) + 1)
    return next((at for at in places if _fits(piece, text, at)), None)


def _tokens(glob: str) -> list[_Token | None]:
    """Cut `glob` into tokens, one for each character of the text; None is a `*`."""
    tokens: list[_Token | None] = []
    index = 0
    while index < len(glob):
        character = glob[index]
        if character == "*":
            tokens.append(None)
        elif character == "?":
            tokens.append((True, ()))
        elif character == "[":
            end = glob.index("]", index)
            body = glob[index + 1 : end]
            tokens.append((body.startswith("!"), _ranges(body.removeprefix("!"))))
            index = end
        else:
            tokens.append((False, ((character, character),)))
        index += 1
    return tokens


def _ranges(body: str) -> _Ranges:
    """Return the ranges of a set's body; a `-` at either end of it stands for itself."""
    ranges = []
    index = 0
    while index < len(body):
        if body[index + 1 : index + 2] == "-" and index + 2 < len(body):
            ranges.append((body[index], body[index + 2]))
            index += 3
        else:
            ranges.append((body[index], body[index]))
            index += 1
    return tuple(ranges)


def least_length(glob: str) -> int:
    """Return how many characters the shortest text has that `glob` matches."""
    return sum(token is not None for token in _tokens(glob))


COVER_MAX = 2_000
"""Places that `covers` looks at before it gives up; globs of people's need some hundreds."""


def covers(wide: str, narrow: str) -> bool:
    """Tell whether `wide` matches each text that `narrow` does; False if it is too hard to tell.

    Both are read side by side, a character at a time, each at all the places that it may be at.
    """
    first, second = _tokens(wide), _tokens(narrow)
    letters = _letters(first + second)
    begin = (_settle(second, {0}), _settle(first, {0}))
    seen = {begin}
    waiting = [begin]
    while waiting:
        narrows, wides = waiting.pop()
        if len(second) in narrows and len(first) not in wides:
            return False
        for letter in letters:
            step = _step(second, narrows, letter)
            after = (step, _step(first, wides, letter))
            if step and after not in seen:
                if len(seen) >= COVER_MAX:
                    return False
                seen.add(after)
                waiting.append(after)
    return True


def _letters(tokens: list[_Token | None]) -> list[str]:
    """Return characters of which one is like any other: what a set ends or begins with, and next.

    NOTE: all that a token tells apart, it tells apart at the end of a range.
    """
    edges = {0}
    for token in tokens:
        for low, high in token[1] if token is not None else ():
            edges |= {ord(low), ord(high) + 1}
    return [chr(edge) for edge in sorted(edges) if edge <= 0x10FFFF]


def _settle(tokens: list[_Token | None], places: set[int]) -> frozenset[int]:
    """Return the places with those behind each `*` at them, which may match nothing."""
    found = set(places)
    for place in sorted(places):
        at = place
        while at < len(tokens) and tokens[at] is None:
            at += 1
            found.add(at)
    return frozenset(found)


def _step(tokens: list[_Token | None], places: frozenset[int], letter: str) -> frozenset[int]:
    """Return where `letter` leads from the places."""
    after = set()
    for place in places:
        if place < len(tokens):
            token = tokens[place]
            if token is None:
                after.add(place)
            elif token[0] != any(low <= letter <= high for low, high in token[1]):
                after.add(place + 1)
    return _settle(tokens, after)
