"""Linuxes of the tests' own, each booted once for its tests, beside the tests of this kernel."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import needs

LAB = Path(__file__).parent
TESTS = LAB.parent
ROOT = TESTS.parent
INSIDE = "PYQEMU_IFUP_INSIDE"
"""Set inside such a Linux, to its name."""


@dataclass(frozen=True)
class Machine:
    """A Linux for the tests of tests/NAME: tests/lab/NAME has what makes it ready, and runs it.

    `title` is what it is called, `memory` the megabytes that it may use, `seconds` the longest that
    its tests may take on a busy machine. `more` are further files of tests, below tests/, that run
    inside as well.
    """

    name: str
    title: str
    memory: int
    seconds: int
    more: tuple[str, ...] = ()

    @property
    def tests(self) -> Path:
        """The folder of the tests that run inside."""
        return TESTS / self.name

    @property
    def results(self) -> Path:
        """The file whose tests are their results."""
        return TESTS / "house" / f"test_in_{self.name}.py"

    def script(self, what: str) -> Path:
        """Return the program that makes it ready ("setup"), or runs a command inside ("run")."""
        return LAB / self.name / f"{self.name}-{what}"


KINDS = "kinds/test_conformance.py"
"""The suite of all kinds of network, which runs on each lab that has a row in its table."""
UML = Machine("uml", "User Mode Linux", 768, 1200, (KINDS,))
VM = Machine("vm", "virtual machine", 768, 600)
MACHINES = (UML, VM)
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


def collect(machine: Machine) -> list[str]:
    """Return the ids of the tests that run inside, or what was printed where that fails."""
    done = subprocess.run(
        [*PYTEST, "--collect-only", "-q", machine.tests, *(TESTS / more for more in machine.more)],
        cwd=ROOT,
        # NOTE: who wants more words of a run would not have them in this list.
        env=os.environ | {INSIDE: machine.name, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return [f"cannot collect tests/{machine.name}:\n{done.stdout}{done.stderr}"]
    return [line for line in done.stdout.splitlines() if "::" in line]


class Boot:
    """A Linux that runs some of its tests, from now on until `close`."""

    def __init__(self, machine: Machine, tests: Sequence[str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"in-{machine.name}-", dir="/tmp"))
        self.lacking: str | None = None
        """Why there is no such Linux, None where there is one."""
        self._found: dict[str, xml.Element | str] | None = None
        self._process: int | None = None
        """A descriptor of its process (pidfd_open(2))."""
        setup = subprocess.run([machine.script("setup")], capture_output=True, text=True)
        if setup.returncode != 0:
            self.lacking = f"no {machine.title}: {setup.stderr.strip()}"
            return
        variables = [f"{INSIDE}={machine.name}", "PYTHONDONTWRITEBYTECODE=1"]
        variables += [f"{name}={os.environ[name]}" for name in ("CI",) if name in os.environ]
        junit = ["-o", "junit_family=xunit1", "--junitxml=/run/out/junit.xml"]
        limits = ["-m", str(machine.memory), "-t", str(machine.seconds), "-o", str(self.folder)]
        command: list[str | Path] = [
            machine.script("run"),
            *limits,
            "--",
            "env",
            *variables,
            *PYTEST,
        ]
        # NOTE: no child of ours, which a test during which it ends would find as a zombie.
        aside = ["sh", "-c", 'out=$1; shift; "$@" >"$out" 2>&1 & echo $!', "sh"]
        started = subprocess.run(
            [*aside, self.folder / "printed", *command, *junit, "--color=no", "-q", *tests],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=True,
        )
        self._process = os.pidfd_open(int(started.stdout))

    def results(self) -> dict[str, xml.Element | str]:
        """Wait for its end; return the JUnit element of each test, by id.

        The key "" holds what the Linux printed.
        """
        if self._found is None:
            self._wait()
            printed = (self.folder / "printed").read_text(errors="replace")
            self._found = {"": printed[-10000:]}
            junit = self.folder / "junit.xml"
            if junit.exists():
                for case in xml.parse(junit).getroot().iter("testcase"):
                    self._found[_id(case)] = case
        return self._found

    def close(self) -> None:
        """End it, where it still runs."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGTERM)
            self._wait()
            os.close(self._process)
        shutil.rmtree(self.folder)

    def _wait(self) -> None:
        """Wait for its end."""
        if self._process is not None:
            select.select([self._process], [], [])


BOOTS = pytest.StashKey[dict[str, Boot]]()
"""Where a session keeps its own, by the name of the machine."""


def parametrize(metafunc: pytest.Metafunc, machine: Machine) -> None:
    """Make a test here of each test in there: its `inner` is the other's id."""
    inner = collect(machine)
    ids = [
        "collect"
        if test.startswith("cannot collect")
        else test.removeprefix(f"tests/{machine.name}/").removeprefix("tests/")
        for test in inner
    ]
    metafunc.parametrize("inner", inner, ids=ids)


def check(machine: Machine, inner: str, session: pytest.Session) -> None:
    """End the calling test as the one in there has ended: it passes, fails, or is skipped."""
    if inner.startswith("cannot collect"):
        pytest.fail(inner, pytrace=False)
    boot = session.stash[BOOTS][machine.name]
    if boot.lacking is not None:
        needs.lack(boot.lacking)
    results = boot.results()
    case = results.get(inner)
    if not isinstance(case, xml.Element):
        pytest.fail(f"no result; the Linux printed:\n{results['']}", pytrace=False)
    for verdict in case:
        text = f"{verdict.get('message', '')}\n{verdict.text or ''}"
        if verdict.tag in ("failure", "error"):
            pytest.fail(re.sub(r"\x1b\[[0-9;]*m", "", text), pytrace=False)
        if verdict.tag == "skipped":
            pytest.skip(verdict.get("message", ""))


def _id(case: xml.Element) -> str:
    """Return the id of the test that a JUnit element tells of."""
    file, classname = case.get("file", ""), case.get("classname", "")
    classes = classname.removeprefix(file.removesuffix(".py").replace("/", ".")).split(".")
    return "::".join([file, *filter(None, classes), case.get("name", "")])
