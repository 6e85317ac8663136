"""shellcheck finds no fault in any shell of the project's: scripts, recipes, what it generates."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.checkout import ROOT, files
from lab.hooks import SOURCE_ROOTS
from lab.needs import lack

SHELL = re.compile(r"#! ?/bin/(?:busybox )?(sh|bash)\b")
OF_MAKE = "MAKE", "MFLAGS"
"""What a make that runs the tests tells every make that they run."""


def shell_of(path: Path) -> str | None:
    """Return the shell that runs the script at `path`; None if it is none of a shell's."""
    with open(path, errors="replace") as file:
        found = SHELL.match(file.readline())
    return found and found[1]


SCRIPTS = {str(path.relative_to(ROOT)): shell for path in files("*") if (shell := shell_of(path))}


def filled(text: str) -> str:
    """Return a script with what `make` puts in the place of each @word@."""
    units = sorted(path.stem for path in (ROOT / "conf" / "systemd").glob("*.service"))
    words = {"units": " ".join(units), "bin": "'/usr/bin'", "version": "1.0"}
    return re.sub("@(units|bin|version)@", lambda found: words[found[1]], text)


@pytest.fixture
def check() -> Callable[[str, str, str], None]:
    """Fails the test with all that shellcheck finds in a text: its name, the shell, the text."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    program = shutil.which("shellcheck", path=path)
    if program is None:
        lack("no shellcheck; pip installs it with the other tools, for x86_64 and aarch64 alone")

    def run(name: str, shell: str, text: str) -> None:
        words = [program, f"--shell={shell}", "--format=gcc", "--norc", "-"]
        done = subprocess.run(words, input=text, text=True, capture_output=True, check=False)
        found = re.sub("^-:", f"{name}:", done.stdout, flags=re.MULTILINE)
        assert (done.returncode, found + done.stderr) == (0, "")

    return run


def test_the_scripts_are_found() -> None:
    assert {".ci/run", "conf/takeover.in", "conf/debian/postinst", "tests/lab/uml/uml-run"} <= (
        SCRIPTS.keys()
    )
    assert {*SCRIPTS.values()} == {"sh", "bash"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, check: Callable[[str, str, str], None]) -> None:
    check(name, SCRIPTS[name], filled((ROOT / name).read_text()))


TARGETS = re.findall(r"^([a-z./]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
PRINTER = """#!/bin/sh
set -eu
[ "$1 $#" = '-euc 2' ]
printf %s "$2" >"${0%/*}/recipe"
"""
"""What takes the place of make's shell, and runs nothing."""


def recipe(target: str, folder: Path) -> str:
    """Return what make would have a shell run for a target; `folder` is the test's own."""
    shell = folder / "shell"
    shell.write_text(PRINTER)
    shell.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith(OF_MAKE)}
    words = ["make", f"SHELL={shell}", "--always-make", target]
    subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, check=True)
    return (folder / "recipe").read_text()


def test_the_targets_are_found() -> None:
    assert {"help", "install", "test", ".venv/ready"} <= {*TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_recipe(target: str, tmp_path: Path, check: Callable[[str, str, str], None]) -> None:
    check(f"Makefile: {target}", "sh", f"set -eu\n{recipe(target, tmp_path)}")


def test_completion(check: Callable[[str, str, str], None]) -> None:
    code = f"import sys; sys.path[:0] = {SOURCE_ROOTS!r}; from pyqemu_ifctl.completion import main"
    words = [sys.executable, "-I", "-c", f"{code}; sys.exit(main())", "bash"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    check("completion", "bash", done.stdout)
