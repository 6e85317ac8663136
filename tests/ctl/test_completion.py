"""Completion in bash and zsh: all that the parser has, asked of the shells themselves."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab.hooks import SOURCE_ROOTS, Hooks
from lab.needs import lack
from lab.netns import Namespace
from pyqemu_ifctl.command_line import Parser, build_parser
from pyqemu_ifctl.completion import bash, describe, zsh
from pyqemu_ifctl.main import VERBS
from pyqemu_ifctl.program import PROGRAM

PATIENCE = 60.0
"""Seconds that a shell may take to answer."""
GENERATE = "import sys; sys.path[:0] = {roots!r}; from pyqemu_ifctl.completion import main; main()"

ASK = """
source {file}
ask() {{
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
    _pyqemu_ifctl
    printf '%s\\n' "${{COMPREPLY[@]}}"
    echo .
}}
"""


def generated(shell: str) -> str:
    """Return what the module prints for `shell`, as `make install` runs it."""
    code = GENERATE.format(roots=SOURCE_ROOTS)
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, shell], capture_output=True, text=True, check=True
    )
    return done.stdout


def ask_bash(
    text: str,
    folder: Path,
    lines: Sequence[Sequence[str]],
    netns: Namespace | None = None,
    before: str = "",
) -> list[set[str]]:
    """Return what bash offers for the last word of each of the lines, with completion `text`.

    `before` is run first.
    """
    file = folder / "completion"
    file.write_text(text)
    script = before + ASK.format(file=file)
    script += "".join(f"ask {' '.join(map(quote, line))}\n" for line in lines)
    argv = ["bash", "--norc", "-uc", script]
    if netns is None:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True)
    else:
        # NOTE: not as `argv` is, since /sys is the mount's, not the process's.
        words = ["sh", "-euc", 'mount -t sysfs sysfs /sys; exec "$@"', "sh", *argv]
        done = netns.run(["unshare", "--mount", *words])
    assert done.stderr == ""
    return [set(part.split()) for part in done.stdout.split("\n.\n")[:-1]]


def quote(word: str) -> str:
    """Return `word` as one word of a shell."""
    return "'" + word.replace("'", "'\\''") + "'"


def verbs_of(parser: Parser) -> dict[str, set[str]]:
    """Return the verbs and the long options of each, as the help tells them."""
    (action,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return {
        each.dest: set(re.findall(r"--[a-z][a-z-]*", action.choices[each.dest].format_help()))
        for each in action._choices_actions
    }


def test_bash_offers_every_verb_and_every_option(tmp_path: Path) -> None:
    verbs = verbs_of(build_parser(VERBS))
    lines = [(PROGRAM, ""), (PROGRAM, "ex"), *((PROGRAM, verb, "--") for verb in verbs)]
    top, ex, *options = ask_bash(generated("bash"), tmp_path, lines)
    assert top == {*verbs, "--help", "--version"}
    assert ex == {verb for verb in verbs if verb.startswith("ex")} >= {"explain"}
    for verb, offered in zip(verbs, options, strict=True):
        assert offered - {"--"} == verbs[verb], verb


def test_bash_offers_files_and_nothing_where_it_cannot_tell(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("")
    offered = ask_bash(
        generated("bash"),
        tmp_path,
        [
            (PROGRAM, "check", "pol"),
            (PROGRAM, "check", "policy.yaml", "pol"),
            (PROGRAM, "explain", "--vm", ""),
            (PROGRAM, "decode", ""),
            (PROGRAM, "nonsense", ""),
            (PROGRAM, "run", "--nic", "lan", "--", "pol"),
            (PROGRAM, "check", "--", "pol"),
        ],
    )
    file = {"policy.yaml"}
    assert offered == [file, file, set(), set(), set(), file, set()]


def test_bash_offers_a_file_whose_name_is_a_pattern_as_it_is(tmp_path: Path) -> None:
    for name in ("[a]x", "ax"):
        (tmp_path / name).write_text("")
    assert ask_bash(generated("bash"), tmp_path, [(PROGRAM, "check", "[")]) == [{"[a]x"}]


def test_bash_offers_taps_and_runs_none_of_their_names(netns: Namespace, tmp_path: Path) -> None:
    names = ("web0", "$(date>x)", "web;0")
    taps = [netns.tap(name) for name in names]
    lines = [(PROGRAM, "status", ""), (PROGRAM, "gc", "web")]
    every, web = ask_bash(generated("bash"), tmp_path, lines, netns)
    assert every == {"web0", r"\$\(date\>x\)", r"web\;0"}
    assert web == {"web0", r"web\;0"}
    assert len(taps) == len(names)


NAMED = """\
version: 1
networks: {lan: {bridge: br0}, wan: {bridge: br1}}
rules: [{tap: "*", network: lan}]
vms: {web1: {nics: [{network: lan}]}, db.1: {nics: [{network: wan}]}}
"""


def with_program(folder: Path) -> str:
    """Return lines for a shell after which the program is there, and has a policy."""
    hooks = Hooks(folder / "hooks")
    hooks.write_policy(NAMED)
    return f"export PATH={hooks.folder}:$PATH PYQEMU_IFUP_POLICY={hooks.policy}\n"


def test_bash_offers_guests_and_networks(tmp_path: Path) -> None:
    lines = [
        (PROGRAM, "args", ""),
        (PROGRAM, "info", "w"),
        (PROGRAM, "run", "d"),
        (PROGRAM, "explain", "--vm", "d"),
        (PROGRAM, "explain", "--network", ""),
        (PROGRAM, "run", "--nic", "l"),
    ]
    before = with_program(tmp_path)
    guests, networks = {"web1", "db.1"}, {"lan", "wan"}
    assert ask_bash(generated("bash"), tmp_path, lines, before=before) == [
        guests,
        {"web1"},
        {"db.1"},
        {"db.1"},
        networks,
        {"lan"},
    ]
    # A policy that is broken or gone has no names, and nothing is said on the line that is edited.
    (tmp_path / "hooks/policy.yaml").write_text("version: 2\n")
    assert ask_bash(generated("bash"), tmp_path, lines, before=before) == [set()] * len(lines)


def test_zsh_offers_guests_and_networks(tmp_path: Path) -> None:
    with interactive_zsh(tmp_path, generated("zsh"), with_program(tmp_path)) as terminal:
        told(terminal, "ready")
        for line, offered in (
            ("args ", ("web1", "db.1")),
            ("run d", ("db.1",)),
            ("explain --network ", ("lan", "wan")),
            ("run --nic l", ("lan ",)),
        ):
            os.write(terminal, f"\x18pyqemu-ifctl {line}\t".encode())
            told(terminal, *offered)


def added_verb() -> Parser:
    """Return a parser with a verb that no word of the completion knows."""
    parser = Parser(PROGRAM, "")
    verbs = parser.add_subparsers(dest="verb")
    draw = verbs.add_parser("draw", help="Draw: it's [new], 100%%.", description="")
    draw.add_argument("--as", choices=("dot", "svg"), help="one of %(choices)s")
    draw.add_argument("--secret", help="==SUPPRESS==")
    draw.add_argument("taps", metavar="TAP", nargs="*")
    return parser


def test_a_new_verb_needs_no_hand_edit(tmp_path: Path) -> None:
    text = bash(PROGRAM, describe(added_verb()))
    offered = ask_bash(
        text, tmp_path, [(PROGRAM, ""), (PROGRAM, "draw", "-"), (PROGRAM, "draw", "--as", "")]
    )
    assert offered == [{"draw", "--help", "--version"}, {"--help", "--as"}, {"dot", "svg"}]


@contextmanager
def interactive_zsh(
    folder: Path, text: str, before: str = "pyqemu-ifctl() { : }\n"
) -> Iterator[int]:
    """Start a zsh that has the completion in its fpath, and give its terminal.

    `before` is run first: no such program is installed here, which changes nothing but for names.
    """
    if shutil.which("zsh") is None:
        lack("no zsh in PATH")
    (folder / "_pyqemu-ifctl").write_text(text)
    (folder / "policy.yaml").write_text("")
    (folder / ".zshrc").write_text(
        f"fpath=({folder} $fpath)\nautoload -U compinit\ncompinit -u -D\nPS1='ready'\n"
        "setopt no_beep\nLISTMAX=1000\nbindkey '^X' kill-whole-line\n" + before
    )
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "ZDOTDIR": str(folder),
        "TERM": "dumb",
        "COLUMNS": "200",
        "LC_ALL": "C",
    }
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe("zsh", ["zsh", "-i"], env)
    try:
        yield terminal
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def told(terminal: int, *words: str) -> str:
    """Return what the terminal shows until it has shown all of `words`; raise TimeoutError."""
    shown = ""
    end = time.monotonic() + PATIENCE
    while not all(word in shown for word in words):
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"zsh shows {shown!r}, and not all of {words}")
        shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


def test_zsh_offers_every_verb_and_every_option(tmp_path: Path) -> None:
    verbs = verbs_of(build_parser(VERBS))
    with interactive_zsh(tmp_path, generated("zsh")) as terminal:
        told(terminal, "ready")
        os.write(terminal, b"pyqemu-ifctl \t")
        told(terminal, *(f"{verb} " for verb in verbs), "-- Check the policy: ok")
        for verb, options in verbs.items():
            # NOTE: a verb with one option gets it whole.
            os.write(terminal, f"\x18pyqemu-ifctl {verb} --\t".encode())
            told(terminal, f"ifctl {verb}", *(option[2:] for option in options))
        for line, offered in (
            ("check pol", "policy.yaml"),
            ("gc --dry-run --js", "--json "),
            ("run --nic lan -- zsh-no-such pol", "policy.yaml"),
        ):
            os.write(terminal, f"\x18pyqemu-ifctl {line}\t".encode())
            told(terminal, offered)


def test_zsh_takes_a_new_verb_as_it_comes(tmp_path: Path) -> None:
    with interactive_zsh(tmp_path, zsh(PROGRAM, describe(added_verb()))) as terminal:
        told(terminal, "ready")
        os.write(terminal, b"pyqemu-ifctl dr\t")
        told(terminal, "pyqemu-ifctl draw ")
        os.write(terminal, b"--as \t")
        told(terminal, "dot", "svg")
        os.write(terminal, b"\x18pyqemu-ifctl draw --\t")
        assert "secret" not in told(terminal, "--as", "one of dot, svg")
