"""Pythons beside this machine's own, each with the libraries that setup.cfg asks for."""

from __future__ import annotations

import configparser
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.boot import cache
from lab.checkout import ROOT

SETUP = Path(__file__).parent / "python" / "python-setup"
SUITES = {"3.11": "bookworm", "3.13": "trixie", "3.14": "forky"}
"""The Debian that python/python-setup takes a version from, where this machine does not have it."""
MANAGERS = (
    ("PYENV_ROOT", "~/.pyenv", "versions/*/bin"),
    ("UV_PYTHON_INSTALL_DIR", "~/.local/share/uv/python", "*/bin"),
)
"""Where people's managers of Pythons keep them: the variable, what it is unset, what lies there."""


@functools.cache
def settings() -> configparser.ConfigParser:
    """Return setup.cfg."""
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def named() -> list[str]:
    """Return the versions that the classifiers name, the oldest first."""
    found = re.findall(r":: Python :: (\d\.\d+)$", settings()["metadata"]["classifiers"], re.M)
    return sorted(found, key=lambda version: int(version.partition(".")[2]))


def requirements() -> list[str]:
    """Return what the programs need and what their tests do, each as setup.cfg says it."""
    extra = settings()["options.extras_require"]["test"]
    lines = f"{settings()['options']['install_requires']}\n{extra}".splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def floors() -> list[str]:
    """Return the least of each requirement that has a least, as a constraint of pip's."""
    return [line.replace(">=", "==") for line in requirements() if ">=" in line]


def _candidates(version: str) -> Iterator[str]:
    name = f"python{version}"
    if version == f"3.{sys.version_info.minor}":
        # NOTE: not the virtual environment's, whose packages are of another age.
        yield os.path.realpath(sys.executable)
    for folder in os.get_exec_path():
        yield os.path.join(folder, name)
    for variable, unset, below in MANAGERS:
        kept = Path(os.environ.get(variable) or unset).expanduser()
        yield from map(str, sorted(kept.glob(f"{below}/{name}")))


def find(version: str) -> str | None:
    """Return a Python of this machine that makes virtual environments; None if there is none."""
    check = (
        f"import ensurepip, ssl, sys, venv; sys.exit('{version}' != '%d.%d' % sys.version_info[:2])"
    )
    for program in _candidates(version):
        # NOTE: what pyenv puts into PATH is there for each version, and ends where that is off.
        if os.access(program, os.X_OK) and not _fails(program, "-I", "-c", check):
            return program
    return None


def _fails(*words: str) -> bool:
    return subprocess.run(words, capture_output=True, check=False).returncode != 0


def have(version: str) -> tuple[str | None, str]:
    """Return a Python of that version, this machine's or Debian's, or None and why."""
    found = find(version)
    if found is not None:
        return found, ""
    if version not in SUITES:
        return None, f"no python{version} on this machine, nor in a Debian"
    done = subprocess.run(
        [SETUP, SUITES[version], version, cache()], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return None, done.stderr.strip()
    return str(cache() / f"python-{version}" / "root" / "usr" / "bin" / f"python{version}"), ""


def first_of(versions: Sequence[str]) -> str:
    """Return the first Python of these versions that can be had, this one's own if none can."""
    return next(filter(None, (have(version)[0] for version in versions)), sys.executable)


def environment(python: str, folder: Path, *, oldest: bool) -> str:
    """Make a virtual environment in `folder` with all that tests need; return its Python.

    `oldest`: with the least of each library that setup.cfg asks for; else with the newest there is.
    Raises RuntimeError with what pip has said.
    """
    constraints = folder.with_suffix(".txt")
    constraints.write_text("".join(f"{line}\n" for line in floors() if oldest))
    program = str(folder / "bin" / "python3")
    wanted = ["--quiet", "--no-input", "--constraint", str(constraints), *requirements()]
    for words in (
        (python, "-I", "-m", "venv", str(folder)),
        (program, "-I", "-m", "pip", "install", *wanted),
    ):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}:\n{done.stdout}{done.stderr}")
    return program
