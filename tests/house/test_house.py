"""The rules of the house as tests: who may import whom, what no module may do, the linters."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.checkout import ROOT, files
from pyqemu_ifconf.kinds import SPECS

pytestmark = pytest.mark.host("it reads every file of the checkout")


MAY_IMPORT = {
    "pyqemu_ifconf": {"pyqemu_ifconf"},
    "pyqemu_ifup": {"pyqemu_ifconf", "pyqemu_ifup"},
    "pyqemu_ifdown": {"pyqemu_ifconf", "pyqemu_ifup", "pyqemu_ifdown"},
    "pyqemu_ifctl": {"pyqemu_ifconf", "pyqemu_ifup", "pyqemu_ifdown", "pyqemu_ifctl"},
    "pyqemu_ifd": {"pyqemu_ifconf", "pyqemu_ifup", "pyqemu_ifdown", "pyqemu_ifd"},
}

OWNER = {
    "yaml": "conf/pyqemu_ifconf/load.py",
    "pyroute2": "ifup/pyqemu_ifup/drivers/rtnetlink.py",
    "ovs": "ifup/pyqemu_ifup/drivers/ovsdb_connection.py",
    "qemu": "ifctl/pyqemu_ifctl/qemu/qmp.py",
    "subprocess": "ifup/pyqemu_ifup/drivers/programs.py",
}
"""Library -> the one module that may import it, at any depth."""

BROAD_ALLOWED = {
    ("ifup/pyqemu_ifup/hook.py", "run_hook"): "the door of the hooks: a bug is 70, told once",
    ("ifup/pyqemu_ifup/task.py", "finish"): "what breaks a wait off is the task's to undo",
    ("ifd/pyqemu_ifd/closer.py", "Closer._apart"): "who waits raises it, in its own thread",
    ("ifd/pyqemu_ifd/snapshot.py", "Observer._run"): "likewise",
    ("ifd/pyqemu_ifd/main.py", "main"): "the door of the agent, likewise",
    ("ifd/pyqemu_ifd/bridge_helper.py", "main"): "the door of QEMU's bridge helper, likewise",
    ("ifd/pyqemu_ifd/server.py", "Server._advance"): "a bug in one request ends no other",
    ("ifd/pyqemu_ifd/server.py", "Server._hear"): "no client's packet or descriptor ends the agent",
    ("ifd/pyqemu_ifd/server.py", "Server._reconcile"): "nothing found on this host ends the agent",
    ("ifd/pyqemu_ifd/users.py", "_answer"): "who waits raises it, in the agent's own thread",
    ("ifctl/pyqemu_ifctl/bounded.py", "attempt"): "nothing of one guest's ends a verb for others",
    ("ifctl/pyqemu_ifctl/bounded.py", "within.run"): "who waits raises it, in its own thread",
    ("ifctl/pyqemu_ifctl/command_line.py", "answer_or_failure"): "the operator's door, likewise",
}
"""(file, function) -> why it catches everything."""


def modules() -> list[Path]:
    """Return the modules of every package of ours."""
    return sorted(path for package in MAY_IMPORT for path in ROOT.glob(f"*/{package}/**/*.py"))


def named(path: Path) -> str:
    """Return `path` as the messages name it."""
    return str(path.relative_to(ROOT))


each_module = pytest.mark.parametrize("path", modules(), ids=named)


@dataclass(frozen=True)
class Imported:
    """One name that a module imports; None is a name that only running it would tell."""

    line: int
    name: str | None


IMPORTERS = {"import_module", "__import__", "find_spec", "find_loader", "run_module"}


def imports_of(tree: ast.Module, package: str) -> Iterator[Imported]:
    """Yield all that the module of `package` imports, at any depth and by any spelling."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Imported(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            for alias in node.names:
                yield Imported(node.lineno, ".".join(filter(None, (base, node.module, alias.name))))
        elif isinstance(node, ast.Call):
            called = node.func
            name = getattr(called, "attr", None) or getattr(called, "id", None)
            if name in IMPORTERS:
                words = [*node.args, *(keyword.value for keyword in node.keywords)]
                first = words[0] if words else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    dots = len(first.value) - len(first.value.lstrip("."))
                    anchor = f"{package}." if dots else ""
                    yield Imported(node.lineno, anchor + first.value.lstrip("."))
                else:
                    yield Imported(node.lineno, None)


def package_of(path: Path) -> str:
    """Return the dotted package that the module at `path` is in."""
    return ".".join(path.relative_to(ROOT).parent.parts[1:])


SPELLINGS = [
    ("import yaml", ["yaml"]),
    ("import yaml.nodes as n, os", ["yaml.nodes", "os"]),
    ("from ovs.db import idl", ["ovs.db.idl"]),
    ("from . import names", ["pkg.sub.names"]),
    ("from .names import x", ["pkg.sub.names.x"]),
    ("from ..other import y", ["pkg.other.y"]),
    ("def f():\n    import pyroute2", ["pyroute2"]),
    ("if TYPE_CHECKING:\n    import ovs", ["ovs"]),
    ("importlib.import_module('yaml')", ["yaml"]),
    ("import_module(name='yaml')", ["yaml"]),
    ("import_module('.names', __package__)", ["pkg.sub.names"]),
    ("__import__('ovs')", ["ovs"]),
    ("importlib.util.find_spec('pyroute2')", ["pyroute2"]),
    ("import_module('ya' + 'ml')", [None]),
]


@pytest.mark.parametrize(("source", "names"), SPELLINGS, ids=[row[0] for row in SPELLINGS])
def test_each_spelling_of_an_import_is_seen(source: str, names: list[str | None]) -> None:
    assert [found.name for found in imports_of(ast.parse(source), "pkg.sub")] == names


def test_the_modules_are_found() -> None:
    found = {package_of(path).split(".")[0] for path in modules()}
    assert {"pyqemu_ifconf", "pyqemu_ifup", "pyqemu_ifdown", "pyqemu_ifctl"} <= found
    for owner in OWNER.values():
        assert (ROOT / owner).is_file(), f"{owner} moved: name its new place in OWNER"


@each_module
def test_imports_run_one_way(path: Path) -> None:
    package = package_of(path)
    allowed = MAY_IMPORT[package.split(".")[0]]
    wrong = []
    for found in imports_of(ast.parse(path.read_text()), package):
        if found.name is None:
            wrong.append(f"{named(path)}:{found.line}: imports a computed name")
            continue
        top = found.name.split(".")[0]
        if top in MAY_IMPORT and top not in allowed:
            wrong.append(f"{named(path)}:{found.line}: {package} must not import {found.name}")
        if OWNER.get(top, named(path)) != named(path):
            wrong.append(f"{named(path)}:{found.line}: only {OWNER[top]} may import {top}")
        if top in {"tests", "lab", "bench"}:
            wrong.append(f"{named(path)}:{found.line}: a program must not import {found.name}")
    assert not wrong, "\n".join(wrong)


def imported_by() -> dict[str, set[str]]:
    """Return the modules of ours that each of ours imports, at any depth, for types alone too."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts[1:]).removesuffix(".__init__"): path
        for path in modules()
    }
    found = {}
    for module, path in paths.items():
        names = [each.name for each in imports_of(ast.parse(path.read_text()), package_of(path))]
        # NOTE: a name is a module, or stands in one.
        candidates = [(name, name.rpartition(".")[0]) for name in names if name is not None]
        found[module] = {next((each for each in two if each in paths), "") for two in candidates}
    return found


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of modules in which each comes to each other, by what they import."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        found: set[str] = set()
        waiting = [module]
        while waiting:
            new = imports.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        reached[module] = found
    found_circles = {
        tuple(sorted(other for other in reached[module] if module in reached.get(other, ())))
        for module in imports
        if module in reached[module]
    }
    return sorted(map(list, found_circles))


def test_a_circle_is_seen() -> None:
    imports = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": {"e"}, "e": set[str](), "f": {"f"}}
    assert circles(imports) == [["b", "c"], ["f"]]


def test_no_imports_run_in_a_circle() -> None:
    imports = imported_by()
    assert "pyqemu_ifd.server" in imports["pyqemu_ifd.main"]
    assert circles(imports) == []


OVSDB = "a database is a driver: of a kind of its own or not, it is Open vSwitch's"
OTHER_WORDS = {
    ("ifup/pyqemu_ifup/drivers/ovsdb.py", "Open vSwitch"): OVSDB,
    ("ifup/pyqemu_ifup/drivers/ovsdb_connection.py", "Open vSwitch"): OVSDB,
    ("ifup/pyqemu_ifup/host.py", "Open vSwitch"): f"{OVSDB}; it looks whether there is one",
    ("ifctl/pyqemu_ifctl/verbs/decode.py", "Open vSwitch"): "it is what an exit status means",
    ("ifctl/pyqemu_ifctl/verbs/decode.py", "Linux bridge"): "likewise",
    ("ifctl/pyqemu_ifctl/doctor/filters.py", "Linux bridge"): "nftables filters on these alone",
    ("ifup/pyqemu_ifup/on_port.py", "macvtap"): "a link of the kernel's, whoever has made it",
}
"""(file, word) -> why it is not the kind that is meant, or is meant there."""


def kinds_named(tree: ast.AST) -> Iterator[str]:
    """Yield each name or label of a kind that a text of the product's has, docstrings apart."""
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words = "|".join(re.escape(word) for spec in SPECS for word in (spec.name, spec.label))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield from re.findall(rf"(?<![\w-])(?:{words})(?![\w-])", node.value)


NAMING = [
    ("kind == 'linux'", ["linux"]),
    ("wanted = ('openvswitch', None)", ["openvswitch"]),
    ("f'{name} is no Linux bridge'", ["Linux bridge"]),
    ("match kind:\n    case 'linux': f()", ["linux"]),
    ('"Of Open vSwitch."', []),
    ("program = 'ld-linux'", []),
]


@pytest.mark.parametrize(("source", "names"), NAMING)
def test_each_spelling_of_a_kind_is_seen(source: str, names: list[str]) -> None:
    assert list(kinds_named(ast.parse(source))) == names


@each_module
def test_no_module_outside_kinds_names_a_kind(path: Path) -> None:
    """What differs from kind to kind lies in that kind's modules, and SPECS has its words."""
    if path.parent.name == "kinds":
        return
    tree = ast.parse(path.read_text())
    words = {(named(path), word) for word in kinds_named(tree)}
    of_kinds = {f"{package}.kinds.{spec.name}" for package in MAY_IMPORT for spec in SPECS}
    imported = [
        found.name
        for found in imports_of(tree, package_of(path))
        if found.name is not None
        and any(re.fullmatch(rf"{kind}(_view)?(\..*)?", found.name) for kind in of_kinds)
    ]
    assert words <= OTHER_WORDS.keys() and imported == []


def test_what_names_a_kind_still_does() -> None:
    for file, word in OTHER_WORDS:
        assert word in kinds_named(ast.parse((ROOT / file).read_text())), (file, word)


def test_made_networks_are_known_by_their_small_interface() -> None:
    """What makes one is its own affair; doctor's check of NAT is the exception."""
    known = {
        module
        for module, others in imported_by().items()
        for other in others
        if other.startswith("pyqemu_ifup.made.nat.")
    }
    others = {module for module in known if not module.startswith("pyqemu_ifup.made.")}
    assert others == {"pyqemu_ifctl.doctor.filters"}


VERBS = "pyqemu_ifctl.verbs"
TABLE_OF_VERBS = "ifctl/pyqemu_ifctl/main.py"
COMMAND_LINE = "ifctl/pyqemu_ifctl/command_line.py"


def test_each_verb_is_loaded_by_the_table_of_verbs_alone() -> None:
    """What two verbs share lies in a module of its own, and a verb in the table has a module."""
    importing = {
        (named(path), found.name)
        for path in modules()
        for found in imports_of(ast.parse(path.read_text()), package_of(path))
        if found.name is not None and found.name.startswith(f"{VERBS}.")
    } - {(file, f"{VERBS}.Verb") for file in (TABLE_OF_VERBS, COMMAND_LINE)}
    there = {path.stem for path in modules() if package_of(path) == VERBS} - {"__init__"}
    assert importing == {(TABLE_OF_VERBS, f"{VERBS}.{verb}") for verb in there}


@dataclass(frozen=True)
class Scoped:
    """A node and the dotted name of what it stands in, "" for the module."""

    node: ast.AST
    scope: str


def scoped(tree: ast.Module) -> Iterator[Scoped]:
    """Yield every node of `tree` with the function or class around it."""
    waiting: list[Scoped] = [Scoped(tree, "")]
    while waiting:
        here = waiting.pop()
        yield here
        scope = here.scope
        if isinstance(here.node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            scope = f"{scope}.{here.node.name}".lstrip(".")
        waiting += [Scoped(child, scope) for child in ast.iter_child_nodes(here.node)]


@each_module
def test_all_that_is_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    missing = [] if ast.get_docstring(tree) else [f"{named(path)}:1: the module"]
    functions = {
        f"{here.scope}.{here.node.name}".lstrip(".")
        for here in scoped(tree)
        if isinstance(here.node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    for here in scoped(tree):
        node = here.node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        private = any(part.startswith("_") for part in (*here.scope.split("."), node.name))
        if not private and here.scope not in functions and not ast.get_docstring(node):
            missing.append(f"{named(path)}:{node.lineno}: {node.name}")
    assert not missing, "without a docstring:\n" + "\n".join(missing)


def bare_name(node: ast.expr) -> str:
    """Return the last word of a dotted name: `b.Exception` -> "Exception"."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def stubs_of(tree: ast.Module) -> Iterator[int]:
    """Yield the line of each body that does nothing: `pass`, `...`, NotImplementedError."""
    declared = {
        id(child)
        for node in ast.walk(tree)
        if (isinstance(node, ast.ClassDef) and any(bare_name(b) == "Protocol" for b in node.bases))
        or (
            isinstance(node, ast.FunctionDef)
            and any(bare_name(word) == "overload" for word in node.decorator_list)
        )
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        ellipsis = (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and node.value.value is Ellipsis
            and id(node) not in declared
        )
        unwritten = (
            isinstance(node, ast.Raise)
            and node.exc is not None
            and "NotImplemented" in (ast.unparse(node.exc))
        )
        if isinstance(node, (ast.Pass, ast.Expr, ast.Raise)) and (
            isinstance(node, ast.Pass) or ellipsis or unwritten
        ):
            yield node.lineno


STUBS = [
    ("def f(): pass", 1),
    ("def f():\n    '''Does it.'''\n    pass", 1),
    ("try:\n    f()\nexcept OSError:\n    pass", 1),
    ("def f(): ...", 1),
    ("def f(): raise NotImplementedError('later')", 1),
    ("class P(typing.Protocol):\n    def f(self) -> int: ...", 0),
    ("@overload\ndef f(x: int) -> int: ...", 0),
    ("class Special(Failure):\n    '''A failure.'''", 0),
]


@pytest.mark.parametrize(("source", "count"), STUBS, ids=[row[0] for row in STUBS])
def test_each_spelling_of_a_stub_is_seen(source: str, count: int) -> None:
    assert len(list(stubs_of(ast.parse(source)))) == count


@each_module
def test_no_body_does_nothing(path: Path) -> None:
    stubs = [f"{named(path)}:{line}" for line in stubs_of(ast.parse(path.read_text()))]
    assert not stubs, f"{stubs}: contextlib.suppress() says it, or a real body does it"


def broad_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield function and line of each place that keeps what nobody named.

    What undoes its work and ends with a bare `raise` keeps nothing.
    """
    for here in scoped(tree):
        caught: list[ast.expr] = []
        if isinstance(here.node, ast.ExceptHandler):
            last = here.node.body[-1]
            leaves = any(isinstance(node, ast.Return) for node in ast.walk(here.node))
            if isinstance(last, ast.Raise) and last.exc is None and not leaves:
                continue
            if here.node.type is None:
                yield here.scope, here.node.lineno
                continue
            caught = [here.node.type]
        elif isinstance(here.node, ast.Call) and bare_name(here.node.func) == "suppress":
            caught = here.node.args
        flat = [part for node in caught for part in getattr(node, "elts", [node])]
        if any(bare_name(part) in {"Exception", "BaseException"} for part in flat):
            assert isinstance(here.node, (ast.ExceptHandler, ast.Call))
            yield here.scope, here.node.lineno


BROAD = [
    ("try:\n    f()\nexcept:\n    g()", 1),
    ("try:\n    f()\nexcept Exception:\n    g()", 1),
    ("try:\n    f()\nexcept (OSError, builtins.BaseException) as e:\n    g()", 1),
    ("with contextlib.suppress(Exception): f()", 1),
    ("def f():\n    try:\n        g()\n    except Exception:\n        return 1\n        raise", 1),
    ("try:\n    f()\nexcept BaseException:\n    g()\n    raise Other", 1),
    ("try:\n    f()\nexcept BaseException:\n    g()\n    raise", 0),
    ("try:\n    f()\nexcept OSError:\n    g()", 0),
]


@pytest.mark.parametrize(("source", "count"), BROAD, ids=[row[0] for row in BROAD])
def test_each_spelling_of_a_broad_except_is_seen(source: str, count: int) -> None:
    assert len(list(broad_of(ast.parse(source)))) == count


def test_only_what_is_named_here_catches_everything() -> None:
    found = {
        (named(path), scope): line
        for path in modules()
        for scope, line in broad_of(ast.parse(path.read_text()))
    }
    new = [f"{at[0]}:{found[at]}: {at[1]}" for at in found.keys() - BROAD_ALLOWED.keys()]
    assert not new, f"{new}: catch what the callee raises"
    assert not BROAD_ALLOWED.keys() - found.keys(), "allowed, but not there any more"


def loose_readers(tree: ast.AST) -> Iterator[int]:
    """Yield the line of each open() of a file of /proc whose lines end at more than a newline."""
    paths = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) != "open" or not node.args:
            continue
        path = node.args[0]
        shown = ast.unparse(paths.get(path.id, path) if isinstance(path, ast.Name) else path)
        binary = len(node.args) > 1 and "b" in ast.unparse(node.args[1])
        given = {each.arg: ast.unparse(each.value) for each in node.keywords}
        is_text = re.match("f?['\"]/proc/(?!sys/)", shown) and not binary
        if is_text and given.get("newline") != repr("\n"):
            yield node.lineno


READERS = [
    ("open('/proc/self/status')", 1),
    ("open(f'/proc/{pid}/comm', errors='replace')", 1),
    ("path = f'/proc/{pid}/stat'\nopen(path, newline='')", 1),
    ("open('/proc/self/status', newline='\\n')", 0),
    ("open(f'/proc/{pid}/stat', 'rb')", 0),
    ("open('/proc/sys/kernel/overflowuid')", 0),
    ("open('/run/x')", 0),
]


@pytest.mark.parametrize(("source", "count"), READERS)
def test_each_spelling_of_a_loose_reader_is_seen(source: str, count: int) -> None:
    assert len(list(loose_readers(ast.parse(source)))) == count


@each_module
def test_a_line_of_proc_ends_at_a_newline_alone(path: Path) -> None:
    """A process's name may hold all else that ends a line, with what passes for another field."""
    assert list(loose_readers(ast.parse(path.read_text()))) == []


PROCESS = "ifup/pyqemu_ifup/system/process.py"
"""The module that reads what /proc has of another process."""


def proc_paths(tree: ast.AST) -> Iterator[int]:
    """Yield the line of each f-string that is a path below the folder of some process."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and len(node.values) > 1:
            first = node.values[0]
            if isinstance(first, ast.Constant) and re.search("/proc/$", str(first.value)):
                yield node.lineno


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("open(f'/proc/{pid}/stat')", [1]),
        ("x = 1\nos.stat(f'/proc/{pid}')", [2]),
        ("open(f'/proc/sys/net/{name}')", []),
        ("open('/proc/self/status')", []),
    ],
)
def test_each_path_of_a_process_is_seen(source: str, lines: list[int]) -> None:
    assert list(proc_paths(ast.parse(source))) == lines


@each_module
def test_one_module_reads_what_proc_has_of_another_process(path: Path) -> None:
    assert named(path) == PROCESS or list(proc_paths(ast.parse(path.read_text()))) == []


NFT = (
    "ifup/pyqemu_ifup/drivers/nft_program.py",
    "ifup/pyqemu_ifup/drivers/nft_events.py",
    "ifup/pyqemu_ifup/drivers/nft.py",
    "ifup/pyqemu_ifup/drivers/nft_rules.py",
)
"""The modules that touch nftables.

The first runs the program, the second hears of changes, the others speak to the kernel themselves.
"""


def nft_users(tree: ast.AST) -> Iterator[int]:
    """Yield the line of each place that has to do with nftables itself: no command is printed."""
    printed = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "sh" and node.args
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            word = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            named_so = re.fullmatch(r"(?:\S*/)?nft(?:\s+-.*)?|libnftables\.so\S*", word)
            if named_so and id(node) not in printed:
                yield node.lineno
        elif isinstance(node, ast.Name) and re.match("NFT_|NFNL.*_NFTABLES$", node.id):
            yield node.lineno


NFT_USERS = [
    ("run(['nft', '-f', '-'])", 1),
    ("which('nft')", 1),
    ("run('/usr/sbin/nft')", 1),
    ("system('nft -j list ruleset')", 1),
    ("CDLL('libnftables.so.1')", 1),
    ("bind((0, 1 << NFNLGRP_NFTABLES))", 1),
    ("run([b'nft'])", 1),
    ("sh('nft', '-f', '-')", 0),
    ("'nft table of'", 0),
    ("nft.load(text)", 0),
]


@pytest.mark.parametrize(("source", "count"), NFT_USERS)
def test_each_spelling_of_a_use_of_nft_is_seen(source: str, count: int) -> None:
    assert len(list(nft_users(ast.parse(source)))) == count


@each_module
def test_one_module_touches_nft(path: Path) -> None:
    found = list(nft_users(ast.parse(path.read_text())))
    assert bool(found) == (named(path) in NFT), found


COMMAND = re.compile(
    r"(?:^|[\s(:;`$])(?:ip (?:-\S+ )*(?:link|address|addr|tuntap|route)|bridge (?:vlan|link)|"
    r"ovs-vsctl|pyqemu-ifctl (?:apply|gc|explain|status|run|args|info)|nft (?:-\S+|add|insert|"
    r"delete)|ip6?tables(?:-legacy)?|sysctl|systemctl|chmod|chown|mkdir|mknod|tc|dnsmasq|setpriv|"
    r"cp|mv|ln|kill) [^\s]"
)
"""What begins a command in a text, with a word after it."""
NAMES = {
    "name",
    "tap",
    "bridge",
    "vm",
    "guest",
    "path",
    "login",
    "ovsdb",
    "address",
    "script",
    "alias",
    "wish",
    "socket",
    "glob",
    "tap_name",
    "hook",
}
"""What is called so is a name that others have chosen, and goes by quote() into a sentence."""
THIN = "ifd/pyqemu_ifd/thin.py"
SHELL = "conf/pyqemu_ifconf/shell.py"
QUOTED_ALREADY = {
    (THIN, "self.name"): "quoted as it is set; it imports nothing",
    ("ifctl/pyqemu_ifctl/doctor/hubs.py", "qemu.name"): "quotes the guest's name itself",
    ("ifctl/pyqemu_ifctl/doctor/qemus.py", "qemu.name"): "likewise",
    ("ifctl/pyqemu_ifctl/doctor/qemus.py", "twin.name"): "likewise",
}
"""(file, expression) -> why it is no bare name."""
QUOTES = {
    node.name
    for node in ast.parse((ROOT / SHELL).read_text()).body
    if isinstance(node, ast.FunctionDef)
}
SAYS = {"Failure", "Finding", "NoTap", "log", "say"}
ADDS = {"add", "add_at"}
"""What errors of a policy are added by."""


def loose_commands(tree: ast.AST) -> Iterator[int]:
    """Yield the line of each text that makes a command of other texts, past pyqemu_ifconf.shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            begun = False
            for part in node.values:
                if isinstance(part, ast.Constant):
                    text = str(part.value)
                    found = [match.end() for match in COMMAND.finditer(text + "x")]
                    begun = bool(found) or (begun and ";" not in text)
                elif begun and isinstance(part, ast.FormattedValue) and not is_quoted(part.value):
                    yield node.lineno
                    break
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mod):
            left = node.left.value if isinstance(node.left, ast.Constant) else None
            if isinstance(left, str) and COMMAND.search(left + "x"):
                yield node.lineno
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "Command":
                yield node.lineno
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("format", "format_map"):
                form = node.func.value
                if isinstance(form, ast.Constant) and COMMAND.search(str(form.value)):
                    yield node.lineno
        elif isinstance(node, ast.Import | ast.ImportFrom) and "shlex" in (
            getattr(node, "module", ""),
            *(name.name for name in node.names),
        ):
            yield node.lineno


def is_quoted(node: ast.AST) -> bool:
    """Tell whether an expression is what a function of pyqemu_ifconf.shell returns."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in QUOTES


def bare_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and expression of each name that a sentence has as it is."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or last_word(ast.unparse(node.func)) not in SAYS:
            continue
        todo: list[ast.AST] = [node]
        while todo:
            part = todo.pop()
            if is_quoted(part):
                continue
            todo += ast.iter_child_nodes(part)
            if not isinstance(part, ast.FormattedValue) or part.format_spec is not None:
                continue
            if isinstance(part.value, ast.Name | ast.Attribute):
                shown = ast.unparse(part.value)
                if last_word(shown) in NAMES:
                    yield part.lineno, shown


def last_word(dotted: str) -> str:
    """Return the last word of a dotted name."""
    return dotted.rpartition(".")[2]


LOOSE = [
    ("f'ip link set dev {tap} down'", 1),
    ("f'cut it off: ip link set dev {tap} down; or'", 1),
    ("f'see {x}; pyqemu-ifctl gc {tap}'", 1),
    ("f'pyqemu-ifctl gc {tap} will'", 1),
    ("f'{tap}: systemctl start {unit}'", 1),
    ("'ip link set dev ' + tap", 1),
    ("'ip link set dev %s up' % tap", 1),
    ("'ovs-vsctl del-port {}'.format(tap)", 1),
    ("import shlex", 1),
    ("from shlex import quote", 1),
    ("Command(text)", 1),
    ("f'cut it off: {sh(1)}; or end {tap}'", 0),
    ("f'{x}; systemctl restart pyqemu-ifd'", 0),
    ("f'by ip {x}'", 0),
    ("'ip link show'", 0),
]


@pytest.mark.parametrize(("source", "count"), LOOSE)
def test_each_spelling_of_a_loose_command_is_seen(source: str, count: int) -> None:
    assert len(list(loose_commands(ast.parse(source)))) == count


@each_module
def test_commands_are_made_in_one_place(path: Path) -> None:
    """Each name in a command that is printed is quoted: sh() and its kin do it."""
    if named(path) not in (SHELL, THIN):
        assert list(loose_commands(ast.parse(path.read_text()))) == []


@each_module
def test_sentences_quote_the_names_in_them(path: Path) -> None:
    found = list(bare_names(ast.parse(path.read_text())))
    assert [each for each in found if (named(path), each[1]) not in QUOTED_ALREADY] == []


def cut_off(tree: ast.Module) -> Iterator[str]:
    """Yield the end of each text that is said, or kept to be, and ends as if more were to come."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and last_word(ast.unparse(node.func)) in SAYS | ADDS:
            parts = [each for one in node.args for each in ast.walk(one)]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("hint", "text"):
            parts = list(ast.walk(node.value))
        else:
            continue
        inside = {
            id(each)
            for part in parts
            if isinstance(part, ast.JoinedStr)
            for each in part.values[:-1]
        }
        for part in parts:
            text = part.value if isinstance(part, ast.Constant) and id(part) not in inside else None
            if isinstance(text, str) and re.search(r" \S*\w:$", text):
                yield text


def test_a_sentence_that_is_cut_off_is_seen() -> None:
    wrong = "Failure(s, 'x', remedy=1, ) ; Failure(s, f'give {n} another bridge:')"
    assert list(cut_off(ast.parse(wrong))) == [" another bridge:"]
    assert list(cut_off(ast.parse("Failure(s, f'take bridge: from {n}', 'kind: linux')"))) == []


@each_module
def test_no_sentence_is_cut_off(path: Path) -> None:
    """A key of the policy that a sentence ends with has no colon."""
    assert list(cut_off(ast.parse(path.read_text()))) == []


def test_the_version_is_the_changelog_s() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    version = setup["metadata"]["version"]
    versions = r"\[Unreleased\]: (\S+)|\[(\d\S*)\] - \d{4}-\d\d-\d\d"
    first = re.fullmatch(versions, headings[0])
    assert first, f"CHANGELOG.md: {headings[0]}: neither [Unreleased]: VERSION nor [VERSION] - DATE"
    assert version in first.groups()


def test_each_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    there = {package_of(path) for path in modules()}
    assert set(setup["options"]["packages"].split()) == there


def test_each_module_of_the_architecture_is_there() -> None:
    """Told in words by its file alone, or by the end of its path; a room by its folder."""
    there = {named(path) for path in modules()} | {
        str(path.relative_to(ROOT)) for path in files("*")
    }
    rooms = {str(Path(path).parent) + "/" for path in there}
    text = (ROOT / "docs" / "architecture.md").read_text()
    told = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    assert len(told) > 30
    for name in told:
        where = rooms if name.endswith("/") else there
        assert any(f"/{path}".endswith(f"/{name}") for path in where), name


def slug(heading: str) -> str:
    """Return the anchor that a Markdown heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_every_link_of_every_page_leads_somewhere() -> None:
    pages = files("*.md")
    assert pages
    dead = []
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        text = re.sub(r"`[^`\n]*`", "", text)
        links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text)
        links += re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
        for link in links:
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists():
                dead.append(f"{named(page)}: {link}")
            elif anchor and target.suffix == ".md":
                headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                if anchor not in map(slug, headings):
                    dead.append(f"{named(page)}: {link}: no such heading")
    assert not dead, "\n".join(dead)


def test_no_file_names_a_path_of_one_machine() -> None:
    """Home folders, and wherever this checkout, its Python and its user happen to live."""
    shared = {"/", "/usr", "/usr/local", "/opt", "/home", "/root", "/tmp", "/var/tmp", "/srv"}
    here = {str(ROOT), str(ROOT.parent), sys.prefix, str(Path.home())} - shared
    patterns = [re.escape(path) + r"(?![\w.-])" for path in sorted(here)]
    patterns.append(r"/(?:home|Users)/(?!USER\b)[\w.-]+/")
    machine = re.compile(r"(?<![\w.}~-])(?:" + "|".join(patterns) + ")")
    wrong = []
    for path in files("*"):
        for number, line in enumerate(path.read_bytes().decode(errors="replace").split("\n"), 1):
            if found := machine.search(line):
                wrong.append(f"{named(path)}:{number}: {found.group()}")
    assert not wrong, "\n".join(wrong)


LINTERS = [
    ("ruff", ("ruff", "check", "--no-cache", "--output-format=concise", ".")),
    ("format", ("ruff", "format", "--check", "--no-cache", ".")),
    ("mypy", ("mypy",)),
    ("codespell", ("codespell_lib",)),
]


@pytest.mark.parametrize(("name", "words"), LINTERS, ids=[row[0] for row in LINTERS])
def test_linter(name: str, words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{name}:\n{done.stdout}{done.stderr}"
