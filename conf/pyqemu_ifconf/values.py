"""How each type of value of a policy is read, and what it is in a JSON Schema.

A type reports its own errors. The fields that have these types are in fields.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pyqemu_ifconf.globs import glob_fault
from pyqemu_ifconf.names import NETWORK_NAME
from pyqemu_ifconf.nodes import Broken, Errors, List, Map, Node, Scalar, entries, quote, show
from pyqemu_ifconf.settings.vlan import ANY, VID_MAX, VID_MIN, Vids, Vlan

Schema = dict[str, object]

NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
RESERVED_IDS = ("pyqemu-*", "vm-name", "vm-pid")
"""The keys of external_ids that we write ourselves, as the mark of a port."""

_RANGE = re.compile(r"([1-9][0-9]{0,17})-([1-9][0-9]{0,17})")
_VID_PATTERN = "([1-9][0-9]{0,2}|[1-3][0-9]{3}|40[0-8][0-9]|409[0-4])"
_NOT_TEXT: list[Schema] = [{"type": "number"}, {"type": "boolean"}]
"""What other readers of YAML make of a plain `100` or `true`, which we read as text."""


class Bad:
    """The value of a field with an error, which has been reported."""


BAD = Bad()


class Type(Protocol):
    """How a field's value is read."""

    @property
    def words(self) -> str:
        """What the value must be, as in `mtu must be ...`."""

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the value of `node`, or report its errors and return BAD."""

    def schema(self) -> Schema:
        """Return the JSON Schema of the value."""


def must_be(name: str, words: str, node: Node, errors: Errors, hint: str = "") -> Bad:
    """Report that the field `name` must be `words` and is not."""
    if not isinstance(node, Broken):
        more = f"; {hint}" if hint else ""
        errors.add(node, f"{name} must be {words}, not {show(node)}{more}")
    return BAD


SUGGESTIONS_MAX = 100
"""Errors of one file that come with a suggestion, which takes longer to find than the error."""

KNOWN_MAX = 200
"""Words that are looked at for a suggestion."""

LISTED_MAX = 20


def nearest(word: str, known: Sequence[str], errors: Errors) -> str | None:
    """Return the one of `known` that `word` most likely means, or None if none is near."""
    if len(errors.found) >= SUGGESTIONS_MAX or len(known) > KNOWN_MAX:
        return None
    from difflib import get_close_matches  # only an error needs it

    near = get_close_matches(word[:80].lower(), known, 1, 0.6)
    return near[0] if near else None


def listed(words: Sequence[str], last: str = "or") -> str:
    """Return `a, b or c`; of very many, the first ones."""
    if len(words) > LISTED_MAX:
        return f"{', '.join(words[:LISTED_MAX])} {last} {len(words) - LISTED_MAX} more"
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def unknown_key(
    key: Scalar, owner: str, known: Sequence[str], errors: Errors, hint: str = ""
) -> None:
    """Report that `owner` has no such key, with `hint`, the nearest right key, or all of them."""
    text = quote(key.text)
    if not hint:
        near = nearest(key.text.replace("-", "_"), known, errors)
        hint = f"did you mean {near}?" if near else f"the keys are {listed(known, 'and')}"
    errors.add(key, f"{owner} has no key {text}; {hint}")


@dataclass(frozen=True)
class Number:
    """A whole number from `low` to `high`, or one of `choices`."""

    low: int
    high: int
    choices: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The range and the words, for an error."""
        if self.low == self.high:
            return str(self.low)
        return listed((f"a whole number from {self.low} to {self.high}", *self.choices))

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the number, or the word of `choices`."""
        if not isinstance(node, Scalar):
            return must_be(name, self.words, node, errors)
        if node.text in self.choices:
            return node.text
        if NUMBER.fullmatch(node.text) is None:
            digits = re.fullmatch(r"0+([0-9]{1,18})|([0-9]{1,3}(?:_[0-9]{3}){1,5})", node.text)
            plain = (digits[1] or digits[2].replace("_", "")) if digits else ""
            hint = f"write {plain}" if plain and self.low <= int(plain) <= self.high else ""
            return must_be(name, self.words, node, errors, hint)
        if not node.plain:
            return must_be(name, self.words, node, errors, "take the quotes away")
        if not self.low <= int(node.text) <= self.high:
            return must_be(name, self.words, node, errors)
        return int(node.text)

    def schema(self) -> Schema:
        """Return an integer with its range, or the words."""
        if self.low == self.high:
            return {"type": "integer", "const": self.low}
        number: Schema = {"type": "integer", "minimum": self.low, "maximum": self.high}
        return {"anyOf": [number, {"enum": list(self.choices)}]} if self.choices else number


@dataclass(frozen=True)
class Flag:
    """`true` or `false`."""

    words: str = "true or false"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the boolean; the other words of YAML 1.1 get a hint."""
        if isinstance(node, Scalar) and node.text in ("true", "false"):
            if node.plain:
                return node.text == "true"
            return must_be(name, self.words, node, errors, "take the quotes away")
        hint = ""
        if isinstance(node, Scalar) and node.text.lower() in ("true", "yes", "y", "on", "1"):
            hint = "write true"
        if isinstance(node, Scalar) and node.text.lower() in ("false", "no", "n", "off", "0"):
            hint = "write false"
        return must_be(name, self.words, node, errors, hint)

    def schema(self) -> Schema:
        """Return a boolean."""
        return {"type": "boolean"}


@dataclass(frozen=True)
class Yes(Flag):
    """`true` and nothing else: leaving the key out is `false`."""

    words: str = "true"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return True; for `false`, report that the key is to be left out."""
        if isinstance(node, Scalar) and node.plain and node.text == "false":
            return must_be(name, self.words, node, errors, f"take {name} out")
        return super().read(name, node, errors)

    def schema(self) -> Schema:
        """Return the one value."""
        return {"const": True}


@dataclass(frozen=True)
class Choice:
    """One of `choices`."""

    choices: tuple[str, ...]

    @property
    def words(self) -> str:
        """The words, for an error."""
        return listed(self.choices)

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the word."""
        if isinstance(node, Scalar) and node.text in self.choices:
            return node.text
        return must_be(name, self.words, node, errors)

    def schema(self) -> Schema:
        """Return the words."""
        return {"enum": list(self.choices)}


@dataclass(frozen=True)
class Text:
    """A text that `is_good` accepts; `pattern` is the same for a JSON Schema, as far as it can be.

    `length` is how many bytes it has at most, for readers that take a text of digits for a number.
    """

    words: str
    is_good: Callable[[str], bool]
    pattern: str
    hint: str = ""
    length: int | None = None

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the text."""
        if isinstance(node, Scalar) and self.is_good(node.text):
            return node.text
        return must_be(name, self.words, node, errors, self.hint)

    def schema(self) -> Schema:
        """Return the pattern, and the other types that readers may take a text for."""
        number: Schema = {"type": "number"}
        if self.length is not None:
            number = {**number, "maximum": 10**self.length - 1}
        text: Schema = {"type": "string", "pattern": self.pattern}
        return {"anyOf": [text, number, {"type": "boolean"}]}


def is_line(text: str) -> bool:
    """Tell whether `text` is one line of text: not empty, no control or invisible characters."""
    return bool(text.strip()) and text.isprintable()


LINE_PATTERN = r"^[^\u0000-\u001f\u007f]*[^\u0000-\u0020\u007f][^\u0000-\u001f\u007f]*$"


@dataclass(frozen=True)
class Globs:
    """A glob or a list of globs; `ascii_only` if what it is matched with is always ASCII.

    NOTE: a glob with an invisible character matches nothing, so its rule, which may deny, would be
    passed over.
    """

    ascii_only: bool
    words: str = "a glob or a list of globs"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the globs as a tuple, even if there is one."""
        if isinstance(node, Scalar):
            glob = self._glob(name, node, errors)
            return BAD if isinstance(glob, Bad) else (glob,)
        if not isinstance(node, List):
            return must_be(name, self.words, node, errors)
        if not node.items:
            errors.add(node, f"{name} has an empty list of globs, which matches nothing")
            return BAD
        globs = []
        for item in node.items:
            glob = self._glob(name, item, errors)
            if not isinstance(glob, Bad):
                globs.append(glob)
        return tuple(globs)

    def _glob(self, name: str, node: Node, errors: Errors) -> str | Bad:
        if not isinstance(node, Scalar):
            return must_be(name, self.words, node, errors)
        if not node.text:
            errors.add(node, f'{name} has an empty glob, which matches nothing; for all, write "*"')
            return BAD
        if self.ascii_only and not all("!" <= character <= "~" for character in node.text):
            errors.add(node, f"{name} must be visible ASCII without blanks, not {show(node)}")
            return BAD
        if not node.text.isprintable():
            errors.add(node, f"{name} must be visible text, not {show(node)}")
            return BAD
        fault = glob_fault(node.text)
        if fault is not None:
            errors.add(node, f"{name} {quote(node.text)} is not a glob: {fault}")
            return BAD
        return node.text

    def schema(self) -> Schema:
        """Return one glob, or a list of them that is not empty."""
        # All characters but [, which must begin a set.
        free = r"!-Z\\-~" if self.ascii_only else r"^\[\u0000-\u001f\u007f"
        glob: Schema = {"type": "string", "pattern": rf"^([{free}]|\[(?!!?\])[^\]]+\])+$"}
        if self.ascii_only:
            glob = {"allOf": [glob, {"pattern": "^[!-~]+$"}]}
        one: list[Schema] = [glob, *_NOT_TEXT]
        return {"anyOf": [*one, {"type": "array", "minItems": 1, "items": {"anyOf": one}}]}


_USER = re.compile(r"@?[^\s\x00-\x1f\x7f@*?,:\[\]/-][^\s\x00-\x1f\x7f*?,:\[\]/]*")


@dataclass(frozen=True)
class Users:
    """A list of login names and `@group`; a number is a user, or a group, without a name.

    NOTE: no globs, for who is meant must not depend on which other users there are.
    """

    words: str = "a list of login names and @groups"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the names as a tuple."""
        if not isinstance(node, List):
            hint = f"write [{show(node)}]" if isinstance(node, Scalar) and node.text else ""
            return must_be(name, self.words, node, errors, hint)
        users = []
        for item in node.items:
            if isinstance(item, Scalar) and item.text.isprintable() and _USER.fullmatch(item.text):
                users.append(item.text)
            else:
                hint = "name each, or a group" if isinstance(item, Scalar) else ""
                must_be(name, self.words, item, errors, hint)
        return tuple(users)

    def schema(self) -> Schema:
        """Return a list of such names."""
        user: Schema = {"type": "string", "pattern": f"^{_USER.pattern}$"}
        return {"type": "array", "items": {"anyOf": [user, *_NOT_TEXT]}}


@dataclass(frozen=True)
class VlanPort:
    """A VID, the VIDs of a trunk as `{native: 10, trunk: [20, 30-39]}`, or `any`."""

    words: str = f"a VID from {VID_MIN} to {VID_MAX} or a mapping with trunk"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the Vlan."""
        if not isinstance(node, Map):
            if isinstance(node, Scalar) and _RANGE.fullmatch(node.text):
                return must_be(name, self.words, node, errors, f"write {{trunk: [{node.text}]}}")
            if isinstance(node, List):
                return must_be(name, self.words, node, errors, "write {trunk: [...]}")
            if isinstance(node, Scalar) and node.text == "any":
                return ANY
            vid = Number(VID_MIN, VID_MAX).read(name, node, Errors(errors.file))
            return Vlan(vid) if isinstance(vid, int) else self._not_vid(name, node, errors)
        native: object = None
        trunk: object = None
        for key, value in entries(node, errors, "key"):
            if key.text == "native":
                native = Number(VID_MIN, VID_MAX).read("native", value, errors)
            elif key.text == "trunk":
                trunk = self._trunk(value, errors)
            else:
                unknown_key(key, name, ("native", "trunk"), errors)
                trunk = trunk if trunk is not None else BAD
        if trunk is None:
            write = f"vlan: {native}" if isinstance(native, int) else "trunk: [20, 30-39]"
            errors.add(node, f"{name} has no trunk; write {write}")
        if isinstance(trunk, Vids) and (native is None or isinstance(native, int)):
            return Vlan(native, trunk)
        return BAD

    def _not_vid(self, name: str, node: Node, errors: Errors) -> Bad:
        quoted = isinstance(node, Scalar) and not node.plain and NUMBER.fullmatch(node.text)
        return must_be(name, self.words, node, errors, "take the quotes away" if quoted else "")

    def _trunk(self, node: Node, errors: Errors) -> object:
        if not isinstance(node, List):
            hint = f"write [{node.text}]" if isinstance(node, Scalar) and node.text else ""
            return must_be("trunk", "a list of VIDs and ranges", node, errors, hint)
        if not node.items:
            errors.add(node, "trunk has no VID; for a port without tagged VLANs, write vlan: VID")
            return BAD
        good = True
        # NOTE: a bit for each VID, for each rule of a policy may have all of them.
        seen = 0
        before: list[tuple[range, Node]] = []
        for item in node.items:
            vids = self._vids(item, errors)
            if isinstance(vids, Bad):
                good = False
                continue
            bits = ((1 << len(vids)) - 1) << vids.start
            twice = seen & bits
            if twice and not errors.full:
                vid = (twice & -twice).bit_length() - 1
                first = next(each for known, each in before if vid in known)
                errors.add(
                    item, f"VID {vid} is twice in trunk: in {show(first)} and in {show(item)}"
                )
            good = good and not twice
            # NOTE: an item without a new VID is never the first that has one.
            if bits & ~seen:
                before.append((vids, item))
            seen |= bits
        return Vids(seen) if good else BAD

    def _vids(self, node: Node, errors: Errors) -> range | Bad:
        words = f"VIDs from {VID_MIN} to {VID_MAX} and ranges of them such as 30-39"
        if not isinstance(node, Scalar):
            return must_be("trunk", words, node, errors)
        match = _RANGE.fullmatch(node.text)
        if match is None:
            if NUMBER.fullmatch(node.text) is None or not node.plain:
                return must_be("trunk", words, node, errors)
            first = last = int(node.text)
        else:
            first, last = int(match[1]), int(match[2])
        if not (VID_MIN <= first <= VID_MAX and VID_MIN <= last <= VID_MAX):
            return must_be("trunk", words, node, errors)
        if first > last:
            errors.add(node, f"the range {node.text} runs backwards; write {last}-{first}")
            return BAD
        return range(first, last + 1)

    def schema(self) -> Schema:
        """Return a VID, the mapping with trunk, or the word."""
        vid: Schema = {"type": "integer", "minimum": VID_MIN, "maximum": VID_MAX}
        vids: Schema = {"type": "string", "pattern": f"^{_VID_PATTERN}-{_VID_PATTERN}$"}
        trunk: Schema = {
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": {"anyOf": [vid, vids]},
        }
        ports: Schema = {
            "type": "object",
            "properties": {"native": vid, "trunk": trunk},
            "required": ["trunk"],
            "additionalProperties": False,
        }
        return {"anyOf": [vid, ports, {"const": "any"}]}


@dataclass(frozen=True)
class ExternalIds:
    """Keys and values for the external_ids of a row; the plain word `none` unsets a key."""

    words: str = "a mapping of keys to text"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the pairs as a tuple; the value None unsets its key."""
        if not isinstance(node, Map):
            return must_be(name, self.words, node, errors)
        if not node.pairs:
            errors.add(node, f"{name} is empty; leave it out, or write none")
            return BAD
        pairs: list[tuple[str, str | None]] = []
        for key, value in entries(node, errors, "key"):
            if key.text.startswith("pyqemu-") or key.text in RESERVED_IDS:
                errors.add(
                    key,
                    f"{name} key {quote(key.text)} is one that pyqemu-ifup writes itself "
                    f"({', '.join(RESERVED_IDS)}); take another",
                )
            elif not is_line(key.text):
                errors.add(key, f"{name} has a key that is not one line of text: {show(key)}")
            elif isinstance(value, Scalar) and value.plain and value.text == "none":
                pairs.append((key.text, None))
            elif isinstance(value, Scalar) and is_line(value.text):
                pairs.append((key.text, value.text))
            else:
                must_be(f"{name} {quote(key.text)}", "one line of text", value, errors)
        return tuple(pairs)

    def schema(self) -> Schema:
        """Return a mapping of texts without the keys that are ours."""
        key = rf"^(?!pyqemu-|vm-name$|vm-pid$){LINE_PATTERN[1:]}"
        value: list[Schema] = [{"type": "string", "pattern": LINE_PATTERN}, *_NOT_TEXT]
        return {
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"pattern": key},
            "additionalProperties": {"anyOf": value},
        }


@dataclass(frozen=True)
class Networks:
    """The mapping of names to networks; the walk reads what is in it."""

    words: str = "a mapping of names to networks"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the mapping as it is."""
        return node if isinstance(node, Map) else must_be(name, self.words, node, errors)

    def schema(self) -> Schema:
        """Return a mapping of network names to networks."""
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^{NETWORK_NAME}$"},
            "additionalProperties": {"$ref": "#/$defs/network"},
        }


@dataclass(frozen=True)
class Rules:
    """The list of rules; the walk reads what is in it."""

    words: str = "a list of rules"

    def read(self, name: str, node: Node, errors: Errors) -> object:
        """Return the list as it is."""
        return node if isinstance(node, List) else must_be(name, self.words, node, errors)

    def schema(self) -> Schema:
        """Return a list of rules."""
        return {"type": "array", "items": {"$ref": "#/$defs/rule"}}
