"""`make bench`: it measures each row, tells it as a table and as JSON, and leaves nothing."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lab import needs
from lab.checkout import ROOT
from lab.hooks import Hooks

pytestmark = pytest.mark.host("it looks at all processes of the host, and measures")

BENCH = ROOT / "bench" / "run"
NO_INDEX = ("No matching distribution found", "Could not find a version", "Connection")
MARK = "PYQEMU_BENCH_TEST"
WIDTH = 100

BARE_ROWS = {"python", "python-site", "pyroute2"}
LINUX_ROWS = {"ip-script", "ip-script-long", "linux", "linux-agent", "helper"}
OVS_ROWS = {"linux-ovs", "linux-ovs-agent", "ovs-script", "ovs-script-long", "ovs", "ovs-agent"}
OTHERS = {"stock": "/etc/qemu-ifup", "qemu-helper": "/usr/lib/qemu/qemu-bridge-helper"}
"""The rows of other people's programs, which may not be there."""
NO_DOWN = BARE_ROWS | {"helper", "qemu-helper"}


@dataclass(frozen=True)
class Bench:
    """How bench/run is started, in an environment and a TMPDIR that tell what is of it."""

    folder: Path
    prefix: Path
    pids: list[int] = field(default_factory=list)

    def start(self, *words: str, inside: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Start it; its environment is how all its processes are known."""
        process = subprocess.Popen(
            [*inside, sys.executable, str(BENCH), *words],
            env={**os.environ, "TMPDIR": str(self.folder), MARK: str(self.folder)},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pids.append(process.pid)
        return process

    def run(self, *words: str, inside: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        with self.start(*words, inside=inside) as process:
            printed, said = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, printed, said)

    def left(self) -> list[str]:
        """Return what it has left: processes, namespaces, and what lies in its TMPDIR."""
        found = [str(path) for path in self.folder.iterdir()]
        for pid in self.pids:
            found += [str(path) for path in Path("/run/netns").glob(f"ifup-{pid}-*")]
        mark = f"{MARK}={self.folder}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(str(path.parent))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def left_at_last(self) -> list[str]:
        """Return what it has left, or what of it is left after 5 s: what it killed ends by then."""
        end = time.monotonic() + 5
        while (found := self.left()) and time.monotonic() < end:
            time.sleep(0.05)
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A bench with an installation that has this checkout's programs and this interpreter."""
    needs.require("root", "tun", "ip")
    folder, prefix = tmp_path / "tmp", tmp_path / "prefix"
    folder.mkdir()
    Hooks(prefix / "bin")
    (prefix / "lib").mkdir()
    (prefix / "lib" / "pyqemu-ifup").symlink_to(sys.prefix)
    return Bench(folder, prefix)


def check_row(row: dict[str, Any], rounds: int, *, down: bool) -> None:
    """Check one row's figures."""
    assert (row["down"] is not None) == down
    for figures in filter(None, (row["up"], row["down"])):
        assert len(figures["times"]) == rounds
        assert 0 < figures["min"] <= figures["median"] <= figures["p95"]
        assert figures["cpu"] > 0
        assert figures["to_bare"] > 0 and figures["to_ip_script"] > 0


@pytest.mark.timeout(120)
def test_each_row_is_measured_and_nothing_is_left(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = bench.run("--rounds", "2", "--prefix", str(bench.prefix), "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert bench.left() == []

    told = json.loads(file.read_text())
    rows = {row["row"]: row for row in told["rows"]}
    wanted = BARE_ROWS | LINUX_ROWS | (set() if needs.missing("ovs") else OVS_ROWS)
    assert rows.keys() - OTHERS.keys() == wanted
    assert [row["row"] for row in told["left_out"]] == [
        *(() if "stock" in rows else ("/etc/qemu-ifup",)),
        *(() if "qemu-helper" in rows else ("QEMU's qemu-bridge-helper",)),
        *(() if "ovs" in rows else ("each with Open vSwitch",)),
    ]
    for key, program in OTHERS.items():
        assert (key in rows) == os.access(program, os.X_OK)
    assert told["version"] == 1 and told["rounds"] == 2
    assert {"kernel", "processors", "python", "pyroute2", "ovs", "PyYAML"} == told["machine"].keys()
    for key, row in rows.items():
        if key != "stock":
            check_row(row, 2, down=key not in NO_DOWN)

    lines = done.stdout.splitlines()
    for row in rows.values():
        (line,) = (each for each in lines if each.strip().startswith(f"{row['label']}  "))
        # NOTE: it is rounded twice on its way into the JSON and out of it again.
        shown = line.strip().removeprefix(row["label"]).split()[0]
        assert float(shown) == pytest.approx(row["up"]["median"], abs=0.11)
        assert shlex.join(row["up"]["command"]) in done.stdout
    for left_out in told["left_out"]:
        assert f"left out: {left_out['row']}: {left_out['because']}" in done.stdout
    table = lines[: lines.index("what is run:")]
    assert max(map(len, table)) <= WIDTH


@pytest.mark.timeout(60)
def test_vlans_are_measured_where_the_kernel_filters_them(bench: Bench, tmp_path: Path) -> None:
    words = "unshare --net ip link add br9 type bridge vlan_filtering 1".split()
    done = subprocess.run(words, capture_output=True, text=True)
    filters = done.returncode == 0
    assert filters or "not supported" in done.stderr
    told = tmp_path / "bench.json"
    arguments = ("--rounds", "1", "--prefix", str(bench.prefix), "--json", str(told))
    assert bench.run(*arguments).returncode == 0
    notes = " ".join(json.loads(told.read_text())["notes"])
    assert ("do not filter VLANs" in notes) == (not filters)
    (row,) = (row for row in json.loads(told.read_text())["rows"] if row["row"] == "linux")
    assert any("vlan: 100" in text for text in row["files"].values()) == filters


@pytest.mark.timeout(60)
def test_the_costliest_imports_are_shown(bench: Bench) -> None:
    done = bench.run("--imports", "--prefix", str(bench.prefix))
    assert done.returncode == 0, done.stderr
    own, whole = done.stdout.split("own ms")[1:]
    assert len(own.splitlines()) >= 15 and len(whole.splitlines()) == 16
    assert " pyroute2  (by pyqemu_ifup.drivers.rtnetlink)" in whole
    assert bench.left() == []


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_stopped_in_the_middle_it_cleans_up(bench: Bench, number: signal.Signals) -> None:
    with bench.start("--rounds", "1000", "--prefix", str(bench.prefix)) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "round 1 of 1000" in line:
                break
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (128 + number, "")
    assert said == f"bench: stopped by {number.name}; cleaning up\n"
    assert bench.left_at_last() == []


@pytest.mark.timeout(120)
def test_stopped_while_it_installs_it_cleans_up(bench: Bench) -> None:
    with bench.start() as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "bench: installing into a temporary PREFIX\n"
        process.terminate()
        _printed, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert said == "bench: stopped by SIGTERM; cleaning up\n"
    assert bench.left_at_last() == []


@pytest.mark.timeout(300)
def test_what_it_measures_is_an_installation_of_its_own(bench: Bench, tmp_path: Path) -> None:
    etc = Path("/etc/pyqemu-ifup")
    before = etc.exists()
    file = tmp_path / "bench.json"
    done = bench.run("--rounds", "1", "--json", str(file))
    if os.environ.get("CI") != "true" and any(words in done.stderr for words in NO_INDEX):
        pytest.skip("no package index to install from")
    assert done.returncode == 0, done.stderr
    commands = [row["up"]["command"][0] for row in json.loads(file.read_text())["rows"]]
    ours = (str(bench.folder), *OTHERS.values())
    assert all(command.startswith(ours) for command in commands), commands
    assert etc.exists() == before and bench.left() == []


REFUSALS = [
    ("setpriv --bounding-set=-net_admin", "root without CAP_NET_ADMIN"),
    ("setpriv --reuid=65534 --clear-groups", "not root"),
    (
        "unshare --mount sh -c 'mount -t tmpfs none /dev/net && exec \"$@\"' sh",
        "/dev/net/tun: No such file or directory",
    ),
]


@pytest.mark.parametrize(("inside", "reason"), REFUSALS, ids=[row[1] for row in REFUSALS])
def test_it_says_why_it_cannot_measure(bench: Bench, inside: str, reason: str) -> None:
    done = bench.run(inside=tuple(shlex.split(inside)))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"bench: cannot measure here: {reason}\n"
