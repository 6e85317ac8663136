"""How pyqemu-ifctl behaves as a program: usage, help, streams, what it imports, a bug."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from lab import answers
from lab.hooks import SOURCE_ROOTS, Hooks
from pyqemu_ifctl import main
from pyqemu_ifctl.answer import Answer
from pyqemu_ifctl.command_line import build_parser
from pyqemu_ifctl.verbs import Verb

VERBS = ("check", "explain", "status", "gc", "agent", "decode", "version")


@pytest.fixture
def hooks(tmp_path: Path) -> Hooks:
    made = Hooks(tmp_path / "hooks", env={"COLUMNS": "80"})
    made.write_policy("version: 1\nnetworks: {lan: {bridge: br0}}\n")
    return made


NAME_RULE = "a name is 1 to 15 bytes of 0x21 to 0x7e, without / and :, not . or .."
USAGE = [
    ((), "the following arguments are required: VERB; see pyqemu-ifctl --help"),
    (("explain",), "the following arguments are required: TAP; see pyqemu-ifctl explain --help"),
    (("gc", "a", "b"), "unrecognized arguments: b; see pyqemu-ifctl --help"),
    (("status", "--jso"), "unrecognized arguments: --jso; see pyqemu-ifctl --help"),
    (("version", "--json"), "unrecognized arguments: --json; see pyqemu-ifctl --help"),
    (("explain", "a/b"), f"'a/b' is not a tap name: {NAME_RULE}"),
    (("status", "x" * 16), f"'{'x' * 16}' is not a tap name: {NAME_RULE}"),
    (("gc", ""), f"'' is not a tap name: {NAME_RULE}"),
    (
        ("explain", "a", "--mac", "52:54:00"),
        "--mac 52:54:00 is not the MAC of a device; give six pairs of hexadecimal digits, "
        "such as 52:54:00:12:34:56",
    ),
    (("decode", "x\ny"), "'x\\ny' is not a number; give the one that QEMU prints, such as 16640"),
]


@pytest.mark.parametrize(("words", "line"), USAGE, ids=[" ".join(row[0]) for row in USAGE])
def test_usage(hooks: Hooks, words: tuple[str, ...], line: str) -> None:
    done = hooks.ctl(*words)
    assert (done.returncode, done.stdout, done.stderr) == (64, "", f"pyqemu-ifctl: {line}\n")


def test_an_unknown_verb(hooks: Hooks) -> None:
    done = hooks.ctl("stauts")
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("pyqemu-ifctl: argument VERB: invalid choice: 'stauts'")
    assert all(verb in done.stderr for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(hooks: Hooks, verb: str) -> None:
    done = hooks.ctl(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: pyqemu-ifctl {verb} [-h]")
    assert ("--json" in done.stdout) == (verb != "version")
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "\x1b" not in done.stdout and "\t" not in done.stdout


@pytest.mark.parametrize("program", ["pyqemu-ifctl", "pyqemu-ifd", "pyqemu-bridge-helper"])
def test_the_version(hooks: Hooks, program: str) -> None:
    done = hooks.run(program, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{program} ([0-9.]+|of a checkout)\n", done.stdout)
    if program == "pyqemu-ifctl":
        assert hooks.ctl("version").stdout == done.stdout
        assert "--version" in hooks.ctl("--help").stdout


@pytest.mark.parametrize("words", [("decode", "16640"), ("status", "--json")], ids=" ".join)
def test_the_version_goes_with_no_verb(hooks: Hooks, words: tuple[str, ...]) -> None:
    done = hooks.run("pyqemu-ifctl", "--version", *words)
    assert (done.returncode, done.stdout, done.stderr) == (
        64,
        "",
        "pyqemu-ifctl: --version goes with no verb; give it alone\n",
    )


@pytest.mark.parametrize("words", [("--help",), ("decode", "65"), ("check",)], ids=" ".join)
def test_a_reader_who_has_gone_is_no_error(hooks: Hooks, words: tuple[str, ...]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as nobody:
        done = subprocess.run(
            hooks.argv("pyqemu-ifctl", *words),
            env=hooks.environ(),
            stdout=nobody,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_answer_that_cannot_be_written_is_told(hooks: Hooks) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            hooks.argv("pyqemu-ifctl", "decode", "65"),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert done.returncode == 71
    assert done.stderr == b"pyqemu-ifctl: cannot write standard output: No space left on device\n"


@pytest.mark.parametrize("words", [("decode", "65"), ("status", "x" * 16)], ids=" ".join)
def test_closed_standard_descriptors(hooks: Hooks, words: tuple[str, ...]) -> None:
    command = " ".join(hooks.argv("pyqemu-ifctl", *words)) + " <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (
        0 if words[0] == "decode" else 64,
        b"",
        b"",
    )


LOADED = """
import sys
sys.path[:0] = {roots!r}
from pyqemu_ifctl import main
main.put = lambda stream, text: None
sys.argv = ["pyqemu-ifctl", *{words!r}]
status = main.main()
print(status, *sorted({{"argparse", "yaml", "pyroute2", "ovs"}} & sys.modules.keys()))
"""


def test_a_negative_number_is_no_option(hooks: Hooks) -> None:
    assert hooks.ctl("decode", "-9").stdout == "-9: killed by SIGKILL\n"


IMPORTS = [
    (("decode", "65"), "0 argparse"),
    (("version",), "0 argparse"),
    (("check",), "0 argparse yaml"),
    (("agent",), "69 argparse"),
]


@pytest.mark.parametrize(("words", "loaded"), IMPORTS, ids=[row[0][0] for row in IMPORTS])
def test_no_verb_imports_what_it_does_not_need(
    hooks: Hooks, words: tuple[str, ...], loaded: str
) -> None:
    code = LOADED.format(roots=SOURCE_ROOTS, words=words)
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        env=hooks.environ(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == loaded


HEAVY = """
import sys
sys.path[:0] = {roots!r}
from pyqemu_ifctl import main
from pyqemu_ifctl.command_line import build_parser
build_parser(main.VERBS)
heavy = {{"pyroute2", "ovs", "qemu.qmp", "yaml", "asyncio"}}
print(len([name for name in sys.modules if name.startswith("pyqemu_ifctl.verbs.")]),
      *sorted(heavy & sys.modules.keys()))
"""


def test_the_options_of_no_verb_import_what_is_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", HEAVY.format(roots=SOURCE_ROOTS)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == str(len(main.VERBS))


@pytest.mark.parametrize("verb", main.VERBS, ids=lambda verb: verb.name)
def test_each_verb_has_its_options_and_its_run(verb: Verb) -> None:
    module = verb.load()
    assert module.__name__ == f"pyqemu_ifctl.verbs.{verb.name}"
    assert get_type_hints(module.add_arguments) == {
        "parser": argparse.ArgumentParser,
        "return": type(None),
    }
    assert get_type_hints(module.run) == {"args": argparse.Namespace, "return": Answer}


BUG = """
import sys
sys.path[:0] = {roots!r}
from pyqemu_ifctl.verbs import decode
from pyqemu_ifctl import main
decode.decode = lambda number: [][number]
sys.argv = ["pyqemu-ifctl", "decode", "65"]
raise SystemExit(main.main())
"""


def test_a_bug_is_70_and_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", BUG.format(roots=SOURCE_ROOTS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (70, "")
    assert done.stderr == (
        "pyqemu-ifctl: internal error: IndexError: list index out of range; "
        "the traceback is in syslog, please report it\n"
    )


def test_each_verb_that_prints_json_has_its_schema() -> None:
    parser = build_parser(main.VERBS)
    (verbs,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    printing = {name for name, verb in verbs.choices.items() if "--json" in verb.format_help()}
    schema = json.loads(answers.SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    shared = {"vlan", "differences", "counters", "place", "report"}
    assert schema["$defs"].keys() - shared == printing
