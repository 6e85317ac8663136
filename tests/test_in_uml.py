"""Runs the tests of tests/uml in one boot of a User Mode Linux, and tells each one's result."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from conftest import IN_UML
from lab import needs

TESTS = Path(__file__).parent
ROOT = TESTS.parent
UML = TESTS / "lab" / "uml"
MEMORY = 768
"""Megabytes that the Linux may use."""
SECONDS = 900

PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


def collect() -> list[str]:
    """Return the ids of the tests in tests/uml, or what was printed where that fails."""
    done = subprocess.run(
        [*PYTEST, "--collect-only", "-q", TESTS / "uml"],
        cwd=ROOT,
        env=os.environ | {IN_UML: "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return [f"cannot collect tests/uml:\n{done.stdout}{done.stderr}"]
    return [line for line in done.stdout.splitlines() if "::" in line]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test here of each test in there."""
    inner = collect()
    ids = [
        "collect" if test.startswith("cannot collect") else test.removeprefix("tests/uml/")
        for test in inner
    ]
    metafunc.parametrize("inner", inner, ids=ids)


def wanted(session: pytest.Session) -> list[str]:
    """Return the tests in there that this session has selected here."""
    found = []
    for item in session.items:
        if isinstance(item, pytest.Function) and item.path == Path(__file__):
            found.append(str(item.callspec.params["inner"]))
    return found


@pytest.fixture(scope="session")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, xml.Element | str]:
    """Boot, run the selected tests, and return the JUnit element of each, by id.

    The key "" holds what the Linux printed.
    """
    setup = subprocess.run([UML / "uml-setup"], capture_output=True, text=True)
    if setup.returncode != 0:
        needs.lack(f"no User Mode Linux: {setup.stderr.strip()}")
    out = tmp_path_factory.mktemp("uml")
    variables = [f"{IN_UML}=1", "PYTHONDONTWRITEBYTECODE=1"]
    variables += [f"{name}={os.environ[name]}" for name in ("CI",) if name in os.environ]
    junit = ["-o", "junit_family=xunit1", "--junitxml=/run/out/junit.xml"]
    command = [*PYTEST, *junit, "--color=no", "-q", *wanted(request.session)]
    limits = ["-m", str(MEMORY), "-t", str(SECONDS), "-o", str(out)]
    done = subprocess.run(
        [UML / "uml-run", *limits, "--", "env", *variables, *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    found: dict[str, xml.Element | str] = {"": done.stdout[-10000:]}
    if (out / "junit.xml").exists():
        for case in xml.parse(out / "junit.xml").getroot().iter("testcase"):
            found[_id(case)] = case
    return found


def _id(case: xml.Element) -> str:
    """Return the id of the test that a JUnit element tells of."""
    file, classname = case.get("file", ""), case.get("classname", "")
    classes = classname.removeprefix(file.removesuffix(".py").replace("/", ".")).split(".")
    return "::".join([file, *filter(None, classes), case.get("name", "")])


@pytest.mark.timeout(SECONDS + 60)
def test_in_uml(inner: str, results: dict[str, xml.Element | str]) -> None:
    if inner.startswith("cannot collect"):
        pytest.fail(inner, pytrace=False)
    case = results.get(inner)
    if not isinstance(case, xml.Element):
        pytest.fail(f"no result; the Linux printed:\n{results['']}", pytrace=False)
    for verdict in case:
        text = f"{verdict.get('message', '')}\n{verdict.text or ''}"
        if verdict.tag in ("failure", "error"):
            pytest.fail(re.sub(r"\x1b\[[0-9;]*m", "", text), pytrace=False)
        if verdict.tag == "skipped":
            pytest.skip(verdict.get("message", ""))
