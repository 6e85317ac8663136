"""The man pages: well-formed, and none behind the programs."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_install import PROGRAMS

from lab.checkout import ROOT
from lab.needs import lack
from pyqemu_ifctl import main
from pyqemu_ifctl.command_line import build_parser
from pyqemu_ifctl.completion import Verb, describe

PAGES = sorted(path for section in "58" for path in ROOT.glob(f"*/*.{section}"))
IFCTL = ROOT / "ifctl" / "pyqemu-ifctl.8"
VERBS = describe(build_parser(main.VERBS))

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def plain(page: Path) -> str:
    """Return the text of a page without what is only about its looks."""
    text = re.sub(r"^\.(?:BR|RB|BI|IB|IR|RI|B|I) ", "", page.read_text(), flags=re.MULTILINE)
    return re.sub(r"\\f.|[\"\\]", "", text)


@each_page
def test_groff_finds_no_fault(page: Path) -> None:
    if shutil.which("groff") is None:
        lack("no groff in PATH")
    words = ["groff", "-t", "-man", "-Tutf8", "-ww", "-z", str(page)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    # NOTE: a long word, such as QEMU's options, leaves a line short, which is no fault of a page.
    faults = [line for line in done.stderr.splitlines() if "cannot adjust line" not in line]
    assert not faults


@each_page
def test_what_is_copied_from_it_is_what_a_shell_takes(page: Path, tmp_path: Path) -> None:
    """With a groff that makes a hyphen of each -, as 1.23 does where no distribution undoes it."""
    if shutil.which("groff") is None:
        lack("no groff in PATH")
    (tmp_path / "man.local").write_text(".char - \\[hy]\n")
    words = ["groff", "-M", str(tmp_path), "-t", "-man", "-Tutf8", str(page)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    # NOTE: at the end of a line it is a word that was divided; head and foot are nobody's to copy.
    text = "\n".join(done.stdout.splitlines()[1:-1])
    assert not re.findall("\\w*\N{HYPHEN}\\w+", text)


@each_page
def test_the_heading_names_page_and_version(page: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, section = page.stem.upper(), page.suffix[1:]
    version = re.escape(f'"pyqemu-ifup {setup["metadata"]["version"]}"')
    heading = rf'^\.TH {name} {section} \d{{4}}-\d\d-\d\d {version} ".+"$'
    assert re.search(heading, page.read_text(), re.MULTILINE)


@each_page
def test_the_pages_of_ours_that_it_names_are_there(page: Path) -> None:
    named = re.findall(r"^\.BR (pyqemu-[a-z-]+) \((\d)\)", page.read_text(), re.MULTILINE)
    assert {f"{name}.{section}" for name, section in named} <= {page.name for page in PAGES}


@pytest.mark.parametrize("program", [*PROGRAMS, "pyqemu-takeover"])
def test_each_program_has_a_page(program: str) -> None:
    assert f"{program}.8" in {page.name for page in PAGES}


@pytest.mark.parametrize("unit", sorted(ROOT.glob("conf/systemd/*")), ids=lambda unit: unit.name)
def test_each_unit_is_told_of(unit: Path) -> None:
    pages = re.findall(r"^Documentation=man:([\w-]+)\((\d)\)$", unit.read_text(), re.MULTILINE)
    assert pages
    texts = "".join(plain(page) for page in PAGES if (page.stem, page.suffix[1:]) in pages)
    assert unit.name in texts


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_each_verb_and_each_of_its_options_is_told_of(verb: Verb) -> None:
    synopsis, _, text = plain(IFCTL).partition(".SH DESCRIPTION")
    told = re.search(rf"^pyqemu-ifctl {verb.name}\b(.*?)(?:^\.br|\Z)", synopsis, re.M | re.DOTALL)
    assert told, "not in the synopsis"
    assert verb.name == "version" or f"\n.SS {verb.name}\n" in text
    for option in verb.options:
        if "--help" not in option.flags:
            assert any(flag in told.group(1) for flag in option.flags), option.flags
