"""One boot of a User Mode Linux for all tests of tests/uml, beside the tests of this kernel."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

UML = Path(__file__).parent / "uml"
ROOT = Path(__file__).parents[2]
IN_UML = "PYQEMU_IFUP_IN_UML"
"""Set inside the User Mode Linux, where the tests of tests/uml run, and there only."""
MEMORY = 768
"""Megabytes that the Linux may use."""
SECONDS = 1200
"""The longest that its tests may take on a busy machine."""
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


def collect() -> list[str]:
    """Return the ids of the tests in tests/uml, or what was printed where that fails."""
    done = subprocess.run(
        [*PYTEST, "--collect-only", "-q", ROOT / "tests" / "uml"],
        cwd=ROOT,
        # NOTE: who wants more words of a run would not have them in this list.
        env=os.environ | {IN_UML: "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return [f"cannot collect tests/uml:\n{done.stdout}{done.stderr}"]
    return [line for line in done.stdout.splitlines() if "::" in line]


class Boot:
    """A User Mode Linux that runs some of the tests, from now on until `close`."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="in-uml-", dir="/tmp"))
        self.lacking: str | None = None
        """Why there is no User Mode Linux, None where there is one."""
        self._found: dict[str, xml.Element | str] | None = None
        self._process: int | None = None
        """A descriptor of its process (pidfd_open(2))."""
        setup = subprocess.run([UML / "uml-setup"], capture_output=True, text=True)
        if setup.returncode != 0:
            self.lacking = f"no User Mode Linux: {setup.stderr.strip()}"
            return
        variables = [f"{IN_UML}=1", "PYTHONDONTWRITEBYTECODE=1"]
        variables += [f"{name}={os.environ[name]}" for name in ("CI",) if name in os.environ]
        junit = ["-o", "junit_family=xunit1", "--junitxml=/run/out/junit.xml"]
        limits = ["-m", str(MEMORY), "-t", str(SECONDS), "-o", str(self.folder)]
        command: list[str | Path] = [UML / "uml-run", *limits, "--", "env", *variables, *PYTEST]
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


BOOT = pytest.StashKey[Boot]()
"""Where a session keeps its own."""


def _id(case: xml.Element) -> str:
    """Return the id of the test that a JUnit element tells of."""
    file, classname = case.get("file", ""), case.get("classname", "")
    classes = classname.removeprefix(file.removesuffix(".py").replace("/", ".")).split(".")
    return "::".join([file, *filter(None, classes), case.get("name", "")])
