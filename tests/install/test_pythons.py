"""The oldest and the newest Python and libraries: what needs no root, and the heart of the rest.

A test is chosen by the mark `each_python`, where it stands.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from lab import pythons
from lab.checkout import ROOT, files
from lab.hooks import Hooks
from lab.needs import lack
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.sites import FLAT, HOME, Site

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts[1:]).removesuffix(".__init__")
    for path in ROOT.glob("*/pyqemu_if*/**/*.py")
)


@pytest.mark.each_python
@pytest.mark.parametrize("name", MODULES)
def test_each_module_is_imported(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


@pytest.mark.each_python
@pytest.mark.parametrize("network", [FLAT, HOME])
def test_an_up_a_look_and_a_down(
    network: str, tmp_path: Path, netns: Namespace, ovs: OpenVSwitch
) -> None:
    site = Site("openvswitch", netns, Hooks(tmp_path / "hooks", netns=netns.name), ovs)
    site.all_on(network)
    with netns.tap("t0"):
        done = site.hooks.up("t0")
        assert (done.returncode, done.stderr) == (0, "")
        assert site.network_of("t0") == network
        done = site.hooks.run("pyqemu-ifctl", "status")
        assert done.returncode == 0 and " ok" in done.stdout, done
        done = site.hooks.down("t0")
        assert (done.returncode, done.stderr) == (0, "")
    netns.ip("link", "del", "br0")
    ovs.vsctl("del-br", "br-int")


ENDS = {"oldest": pythons.named(), "newest": pythons.named()[::-1]}
"""Which versions are looked for, in this order."""


def test_setup_cfg_names_each_version_from_the_floor_on() -> None:
    minors = [int(version.removeprefix("3.")) for version in pythons.named()]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert pythons.settings()["options"]["python_requires"] == f">=3.{minors[0]}"


@pytest.mark.parametrize("end", ENDS)
def test_what_setup_cfg_names_can_be_had(end: str) -> None:
    """Where the oldest is in no Debian and not on this machine, the next is what is tested."""
    version = ENDS[end][0]
    found, why = pythons.have(version)
    if found is None and version in pythons.SUITES:
        lack(why)
    if found is None:
        pytest.skip(why)
    words = [found, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    assert subprocess.run(words, stdout=subprocess.PIPE, text=True).stdout == f"{version}\n"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("end", ENDS)
def test_on(end: str, tmp_path: Path) -> None:
    chosen = [path for path in files("test_*.py") if "mark.each_python" in path.read_text()]
    oldest = end == "oldest"
    base = pythons.first_of(ENDS[end])
    python = pythons.environment(base, tmp_path / "venv", oldest=oldest)
    words = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "each_python", "-q"]
    done = subprocess.run([*words, *chosen], cwd=ROOT, capture_output=True, text=True, check=False)
    printed = f"{base}:\n{done.stdout}{done.stderr}"
    assert done.returncode == 0, printed
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 1000, printed
