"""CONTRIBUTING.md names what there is: files, marks, parts of the lab, targets of make."""

from __future__ import annotations

import configparser
import re

from lab.checkout import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
QUOTED = re.findall(r"`([^`\n]+)`", PAGE)


def test_each_file_that_it_names_is_there() -> None:
    named = {word for word in QUOTED if re.fullmatch(r"(?:conf|if\w+|tests|docs)/[\w./-]+", word)}
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_each_part_of_the_lab_has_its_cost() -> None:
    lab = ROOT / "tests" / "lab"
    told = {word for word in QUOTED if word.endswith("-setup")}
    assert told == {str(path.relative_to(lab)) for path in lab.glob("*/*-setup")}


def test_each_mark_is_explained() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    marks = re.findall(r"^(\w+)[(:]", setup["tool:pytest"]["markers"], re.MULTILINE)
    assert sorted(marks) == sorted(re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE))


def test_each_target_of_make_is_there() -> None:
    targets = re.findall(r"^([.a-z/]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:`|    )make ([.a-z/]+)", PAGE)
    assert named and {*named} <= {*targets}
