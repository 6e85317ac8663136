"""The globs of the match keys: `*`, `?`, `[a-z]` and `[!a-z]`, on the whole string.

Nothing else is special: no backslash, no braces, no `[^a-z]`.
"""

# NOTE: not fnmatch, whose translation makes one regular expression for each glob: 5,000 rules
# would cost half a second, and a guest's name that meets several `*` could cost much more.

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
    """Return what each text that `glob` matches begins with: all before its first special."""
    special = _SPECIAL.search(glob)
    return glob if special is None else glob[: special.start()]


def glob_fault(glob: str) -> str | None:
    """Return what is wrong with `glob`, None where it is well-formed."""
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
    prefix = glob[: special.start()]
    if not text.startswith(prefix):
        return False
    return _match(_tokens(glob[special.start() :]), text[special.start() :])


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


def _match(tokens: list[_Token | None], text: str) -> bool:
    """Match greedily; on a mismatch, only the last `*` takes one character more."""
    at = index = 0
    star: int | None = None
    resume = 0
    while index < len(text):
        token = tokens[at] if at < len(tokens) else (False, ())
        if token is None:
            star, resume = at, index
            at += 1
        elif token[0] != any(low <= text[index] <= high for low, high in token[1]):
            at += 1
            index += 1
        elif star is None:
            return False
        else:
            resume += 1
            at, index = star + 1, resume
    return all(token is None for token in tokens[at:])
