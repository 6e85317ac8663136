"""Loads the policy: finds and reads its files, parses the YAML dialect, and has it walked.

It is the one module that imports yaml. The dialect is checked on the parser's events, before
anything is built of them. So no alias is ever followed, and nothing here recurses.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import yaml

from pyqemu_ifconf.failure import Failure, PolicyError, PolicyInvalid, Status
from pyqemu_ifconf.nodes import Broken, Errors, List, Map, Node, Scalar
from pyqemu_ifconf.policy import POLICY_VARIABLE, Policy
from pyqemu_ifconf.trust import list_trusted, read_trusted, show_path
from pyqemu_ifconf.walk import Document, read_policy

ETC = "/etc/pyqemu-ifup"
MAIN_FILE = "policy.yaml"
DROP_INS = "policy.d"
SIZE_MAX = 256 * 1024
"""Bytes of all files of a policy together."""
DEPTH_MAX = 16

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Control characters, line ends of YAML 1.1 alone, marks that change the order in which a person
# sees a text, and what no YAML text may hold. A carriage return may stand before a line feed.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]"
    "|\r(?!\n)"
)
_COMMENT = re.compile(r"(?:^|\s)#")
# NOTE: no [ inside, or else a line of many [ would be searched anew from each of them.
_GLOB_IN_BRACKETS = re.compile(r"(?:[:,\[-]\s*)(?P<glob>\[[^\[\]\s]*\][^\s,\]}])")


@dataclass(frozen=True)
class Source:
    """One file of a policy: its name, as errors show it, and what is in it."""

    file: str
    data: bytes


def load_host_policy(environ: Mapping[str, str], etc: str = ETC) -> Policy:
    """Return the policy of this host: the drop-ins of the folder `etc`, then its main file.

    PYQEMU_IFUP_POLICY in `environ` names the one file that replaces all of them. A program with
    raised privilege passes no environment. Raises Failure: 66 if there is no policy or it
    cannot be read, 78 if it is not to be trusted; PolicyInvalid (65).
    """
    named = environ.get(POLICY_VARIABLE)
    if named:
        return load_policy([named])
    main_file = os.path.join(etc, MAIN_FILE)
    folder = os.path.join(etc, DROP_INS)
    files = [os.path.join(folder, name) for name in list_trusted(folder) or [] if is_drop_in(name)]
    sources = _read_sources(files, folders=True)
    data = read_trusted(main_file, SIZE_MAX + 1)
    if data is not None:
        sources.append(Source(show_path(main_file), data))
    if not sources:
        raise Failure(
            Status.NO_POLICY,
            show_path(main_file),
            "there is no policy on this host",
            "write one; the sample policy.yaml shows how",
        )
    return parse_policy(sources)


def is_drop_in(name: str) -> bool:
    """Tell whether a file of this name in the folder of drop-ins is a part of the policy."""
    return name.endswith(".yaml") and not name.startswith(".")


def find_place(environ: Mapping[str, str], etc: str = ETC) -> str:
    """Return the file, or the folder, that has the policy of this host."""
    return environ.get(POLICY_VARIABLE) or etc


def load_policy(files: Sequence[str]) -> Policy:
    """Return the policy that `files` are together, in this order, if all of them can be trusted.

    Raises Failure: 66 if one is missing or cannot be read, 78 if one is not to be trusted;
    PolicyInvalid (65).
    """
    return parse_policy(_read_sources(files, folders=True))


def check_policy(files: Sequence[str]) -> Policy:
    """Return the policy that `files` are together, as `load_policy`, whatever their folders are."""
    return parse_policy(_read_sources(files, folders=False))


def parse_policy(sources: Sequence[Source]) -> Policy:
    """Return the policy that the texts of `sources` are together; raises PolicyInvalid (65)."""
    documents = []
    lines: dict[str, list[str]] = {}
    left = SIZE_MAX
    for source in sources:
        errors = Errors(source.file)
        text = source.data.decode("utf-8", "replace")
        lines.setdefault(source.file, _lines(text.removeprefix("\ufeff")))
        left -= len(source.data)
        if left < 0:
            errors.add_at(1, 1, f"the policy is larger than {SIZE_MAX // 1024} KiB in all")
            documents.append(Document(None, errors))
            break
        documents.append(Document(_parse(source.data, errors), errors))
    policy, found = read_policy(documents)
    if found:
        placed = tuple(_placed(error, lines[error.file]) for error in found)
        raise PolicyInvalid(placed, policy.files)
    return policy


def render(error: PolicyError) -> str:
    """Return `error` for a terminal: `FILE:LINE:COLUMN: message`, the line, and a caret."""
    # NOTE: a part of the line, for one line may be the whole policy.
    start = max(0, error.column - 61)
    cut = error.source[start : error.column + 59]
    before = error.column - 1 - start
    shown = "".join(c if c == "\t" or c.isprintable() else " " if c.isspace() else "�" for c in cut)
    margin = "".join("\t" if c == "\t" else " " * _width(c) for c in shown[:before])
    return f"{error}\n{'  ' + shown.rstrip() if shown.strip() else ''}\n  {margin}^"


def _width(character: str) -> int:
    """Return how many columns of a terminal `character` takes."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _read_sources(files: Sequence[str], *, folders: bool) -> list[Source]:
    sources = []
    left = SIZE_MAX
    for file in files:
        data = read_trusted(file, left + 1, folders=folders)
        if data is None:
            raise Failure(Status.NO_POLICY, show_path(file), "it does not exist")
        left = max(0, left - len(data))
        sources.append(Source(show_path(file), data))
    return sources


def _lines(text: str) -> list[str]:
    """Return the lines as the parser counts them, without their ends; at least one."""
    lines = re.split("\r\n|\n|\r", text)
    return lines[:-1] if len(lines) > 1 and not lines[-1] else lines


def _placed(error: PolicyError, lines: list[str]) -> PolicyError:
    """Return `error` with the text of its line, or at the end of the file if it is past that."""
    if error.line > len(lines):
        last = lines[-1]
        return replace(error, line=len(lines), column=len(last) + 1, source=last)
    source = lines[error.line - 1]
    return replace(error, column=min(error.column, len(source) + 1), source=source)


def _place_of(text: str, index: int) -> tuple[int, int]:
    """Return the line and column, from 1, of the character `index` of `text`."""
    lines = re.split("\r\n|\n|\r", text[:index])
    return len(lines), len(lines[-1]) + 1


def _parse(data: bytes, errors: Errors) -> Node | None:
    """Return the root of one document, or None if it cannot be told; errors are reported."""
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8").removeprefix("\ufeff")
        byte = f"byte 0x{data[error.start]:02x}"
        errors.add_at(*_place_of(before, len(before)), f"{byte} is not UTF-8; save it as UTF-8")
        return None
    forbidden = _FORBIDDEN.search(text)
    if forbidden is not None:
        code = f"U+{ord(forbidden[0]):04X}"
        errors.add_at(*_place_of(text, forbidden.start()), f"character {code} is not allowed")
        return None
    if _has_tab(text, errors):
        return None
    try:
        root = _compose(text, errors)
    except yaml.MarkedYAMLError as error:
        errors.add_at(*_explain(error, text))
        return None
    # NOTE: PyYAML's own parser converts escapes and version numbers without a check.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        errors.add_at(1, 1, f"not YAML: {str(error).splitlines()[0]}")
        return None
    if root is None and not errors.found:
        errors.add_at(1, 1, "the file is empty; a policy has at least version: 1")
    return root


def _has_tab(text: str, errors: Errors) -> bool:
    """Report the first tab outside of a comment: PyYAML's two parsers do not agree on them."""
    if "\t" not in text:
        return False
    for number, line in enumerate(_lines(text), 1):
        tab = line.find("\t")
        if tab != -1 and not _COMMENT.search(line[:tab]):
            errors.add_at(number, tab + 1, "a tab; put spaces here")
            return True
    return False


def _explain(error: yaml.MarkedYAMLError, text: str) -> tuple[int, int, str]:
    """Return the line, the column and the meaning of a parser's error.

    Mistakes that people often make have messages of their own.
    """
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return 1, 1, f"not YAML: {error.problem}"
    begin = error.context_mark or mark
    here, there = (mark.line + 1, mark.column + 1), (begin.line + 1, begin.column + 1)
    lines = [*_lines(text), ""]
    context, problem = error.context or "", error.problem or ""
    bracket = _GLOB_IN_BRACKETS.search(lines[min(mark.line, len(lines) - 1)])
    if bracket is not None:
        column = bracket.start("glob") + 1
        return here[0], column, 'a glob that begins with [ must be in quotes, as in tap: "[ab]*"'
    if context == "while scanning an alias":
        return *there, 'a text that begins with * must be in quotes, as in tap: "*"'
    if context == "while scanning a simple key":
        return *there, "a key without its colon; the file may be cut short"
    if "cannot start any token" in problem:
        first = lines[mark.line][mark.column : mark.column + 1]
        return *here, f"a text that begins with {first} must be in quotes"
    is_quoted = context in ("while scanning a quoted scalar", "while parsing a quoted scalar")
    if is_quoted and "unexpected end of stream" in problem:
        return *there, "these quotes are never closed"
    is_flow = context in ("while parsing a flow sequence", "while parsing a flow mapping")
    if is_flow and (
        mark.line >= len(lines) - 1 or not "".join(lines[mark.line :])[mark.column :].strip()
    ):
        return *there, f"this {'[' if 'sequence' in context else '{'} is never closed"
    return *here, f"not YAML: {problem}{f' ({context})' if context else ''}"


@dataclass
class _Open:
    """A sequence or mapping whose end is still to come."""

    line: int
    column: int
    is_map: bool
    children: list[Node]


def _compose(text: str, errors: Errors) -> Node | None:
    """Return the root of the one document in `text`; report what is not part of the dialect."""
    root: Node | None = None
    stack: list[_Open] = []
    documents = 0
    for event in yaml.parse(text, Loader=LOADER):
        mark = event.start_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        node: Node
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                errors.add_at(line, column, "a second document; a policy file has one")
                return root
            if event.version or event.tags:
                errors.add_at(line, column, "a % directive stands before this; leave it out")
            continue
        if isinstance(event, yaml.CollectionStartEvent):
            _has_properties(event, line, column, errors)
            if len(stack) == DEPTH_MAX:
                errors.add_at(line, column, f"this is deeper than {DEPTH_MAX} levels")
                return None
            stack.append(_Open(line, column, isinstance(event, yaml.MappingStartEvent), []))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            node = _close(stack.pop())
        elif isinstance(event, yaml.NodeEvent):
            node = _leaf(event, line, column, errors)
        else:
            continue
        if stack:
            stack[-1].children.append(node)
        else:
            root = node
    return root


def _leaf(event: yaml.NodeEvent, line: int, column: int, errors: Errors) -> Node:
    """Return the node of a scalar; report an alias, or what is before a scalar."""
    if isinstance(event, yaml.ScalarEvent):
        # NOTE: the text of a scalar with a tag or an anchor may not be what was meant, so nothing
        # more is said of it.
        if _has_properties(event, line, column, errors):
            return Broken(line, column)
        return Scalar(line, column, event.value, not event.style)
    errors.add_at(
        line,
        column,
        f"an alias (*{event.anchor}) is not part of the policy language; write it out, "
        "or put a glob that begins with * in quotes",
    )
    return Broken(line, column)


def _has_properties(event: yaml.NodeEvent, line: int, column: int, errors: Errors) -> bool:
    """Report an anchor and a tag, which the dialect has not; tell whether there is one."""
    tag = getattr(event, "tag", None)
    if event.anchor is not None:
        errors.add_at(
            line,
            column,
            f"an anchor (&{event.anchor}) is not part of the policy language; leave it "
            "out, or put a text that begins with & in quotes",
        )
    if tag is not None:
        shown = tag.replace("tag:yaml.org,2002:", "!!")
        errors.add_at(
            line,
            column,
            f"a tag ({shown}) is not part of the policy language; leave it out, or put a "
            "text that begins with ! in quotes",
        )
    return event.anchor is not None or tag is not None


def _close(done: _Open) -> Node:
    if not done.is_map:
        return List(done.line, done.column, tuple(done.children))
    pairs = tuple(zip(done.children[::2], done.children[1::2], strict=True))
    return Map(done.line, done.column, pairs)
