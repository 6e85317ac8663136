"""The two halves of `make test`: each file is run once, by one of them, and its time is kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from lab import halves
from lab.halves import Queue, longest_first

ORDERS: list[tuple[str, Mapping[str, float], str]] = [
    ("nothing was measured", {}, "a b c d"),
    ("all were", {"a": 1, "b": 3, "c": 4, "d": 2}, "c b d a"),
    ("a file that is gone", {"a": 1, "b": 3, "c": 4, "d": 2, "e": 100}, "c b d a"),
    ("a new file is as the mean", {"a": 10, "b": 1, "c": 4}, "a d c b"),
    ("files of one time", {"a": 1, "b": 2, "c": 1, "d": 2}, "b d a c"),
]


@pytest.mark.parametrize(
    ("seconds", "order"), [row[1:] for row in ORDERS], ids=[row[0] for row in ORDERS]
)
def test_the_longest_is_taken_first(seconds: Mapping[str, float], order: str) -> None:
    assert " ".join(longest_first("dcba", seconds)) == order


def test_what_is_taken_is_taken_by_one(tmp_path: Path) -> None:
    one, other = Queue(tmp_path), Queue(tmp_path)
    assert [one.take("abc"), other.take("bc"), one.take("abc"), other.take("bc")] == [
        "a",
        "b",
        "c",
        None,
    ]


TREE = {
    "test_long": "def test_it(): pass",
    "test_short": "def test_it(): pass",
    "test_new": "def test_it(): pass\ndef test_more(): pass",
    "test_failing": "def test_it(): assert 'this' == 'wrong'",
    "test_host": "pytestmark = pytest.mark.host('why')\ndef test_it(): pass",
    "test_last": "pytestmark = pytest.mark.last('why')\ndef test_it(): pass",
}
HEAD = """\
import os, pathlib, pytest

@pytest.fixture(autouse=True)
def told(request):
    with open(pathlib.Path(__file__).with_name("told"), "a") as file:
        file.write(f"{os.getpid()} {request.node.nodeid}\\n")

"""


def run(folder: Path, tree: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run both halves over the tests of `tree`, in `folder`; what they measure is kept there."""
    for name, text in tree.items():
        (folder / f"{name}.py").write_text(HEAD + text)
    marks = "markers =\n    host(reason)\n    last(reason)\n"
    (folder / "pytest.ini").write_text(f"[pytest]\n{marks}")
    words = ["-c", folder / "pytest.ini", "-p", "no:cacheprovider", "-q", "--color=no", folder]
    return subprocess.run(
        [sys.executable, halves.__file__, *map(str, words)],
        text=True,
        capture_output=True,
        env={**os.environ, "PYQEMU_LAB": str(folder / "lab"), "PYTEST_ADDOPTS": ""},
        check=False,
    )


def told(folder: Path) -> list[tuple[str, str]]:
    """Return the process and the name of each test that was run, in the order of their starts."""
    words = (line.split() for line in (folder / "told").read_text().splitlines())
    return [(process, name) for process, name in words]


def test_each_file_is_run_by_one_half_and_a_failure_shows(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    known = {"test_long.py": 90, "test_failing.py": 80, "test_short.py": 1, "test_gone.py": 1}
    (tmp_path / "lab" / "durations.json").write_text(json.dumps(known))
    done = run(tmp_path, TREE)
    ran = told(tmp_path)
    assert sorted(name for _process, name in ran) == sorted(
        [f"{name}.py::test_it" for name in TREE] + ["test_new.py::test_more"]
    )
    files = {(process, name.partition("::")[0]) for process, name in ran}
    assert len(files) == len(TREE), "a file is run by one process"
    assert done.returncode == 1
    assert done.stdout.count("def test_it(): assert 'this' == 'wrong'\n") == 1
    assert sum(map(int, re.findall(r"(\d+) passed", done.stdout))) == 6
    assert sum(map(int, re.findall(r"(\d+) failed", done.stdout))) == 1
    assert re.search(r"^halves: \d+ s and \d+ s of tests$", done.stdout, re.MULTILINE)
    kept = json.loads((tmp_path / "lab" / "durations.json").read_text())
    assert kept.keys() == {f"{name}.py" for name in TREE} | {"test_gone.py"}
    assert kept["test_long.py"] < 90


BARRIER = """
import time

def test_it():
    here = pathlib.Path(__file__)
    here.with_suffix(".here").touch()
    end = time.monotonic() + 60
    while len(list(here.parent.glob("*.here"))) < 2:
        assert time.monotonic() < end, "no other test runs beside this one"
        time.sleep(0.01)
"""


def test_both_run_beside_each_other(tmp_path: Path) -> None:
    done = run(tmp_path, {"test_a": BARRIER, "test_b": BARRIER})
    assert done.returncode == 0, done.stdout
    assert len({process for process, _name in told(tmp_path)}) == 2


def test_the_first_half_has_its_own(tmp_path: Path) -> None:
    """None of them runs beside another, they come before all else, and what is last comes last."""
    tree = {"test_a": BARRIER, "test_z": f"pytestmark = pytest.mark.host('why')\n{BARRIER}"}
    tree |= {f"test_host{number}": TREE["test_host"] for number in range(3)}
    tree["test_last"] = TREE["test_last"]
    done = run(tmp_path, tree)
    assert done.returncode == 0, done.stdout
    ran = told(tmp_path)
    hosts = {process for process, name in ran if name.startswith(("test_host", "test_z"))}
    assert len(hosts) == 1
    own = [name.partition(".")[0] for process, name in ran if {process} == hosts]
    assert own[:4] == ["test_host0", "test_host1", "test_host2", "test_z"]
    assert ran[-1][1] == "test_last.py::test_it"


def test_what_cannot_be_collected_ends_both(tmp_path: Path) -> None:
    done = run(tmp_path, {"test_a": "def test_it(): pass", "test_b": "import nothing_such"})
    assert done.returncode == pytest.ExitCode.INTERRUPTED
    assert done.stdout.count("No module named 'nothing_such'") >= 2
    assert not (tmp_path / "told").exists()
