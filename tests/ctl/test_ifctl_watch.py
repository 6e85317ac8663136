"""pyqemu-ifctl status --watch: what it shows, when, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.sites import both_switches

PATIENCE = 30.0
"""Seconds that a change may take to be shown."""
IDLE = 1.0
"""Seconds in which nothing happens, and nothing is to be done."""


@pytest.fixture
def hooks(netns: Namespace, ovs: OpenVSwitch, tmp_path: Path) -> Hooks:
    return both_switches(netns, ovs, tmp_path / "hooks")


class Watched:
    """A running status --watch and what it has shown; `text` is all of it."""

    def __init__(self, process: subprocess.Popen[bytes], source: int) -> None:
        self.process = process
        self.source = source
        self.text = ""

    def wait(self, shown: Callable[[str], object]) -> str:
        """Wait until what has been shown since the last time is so, and return it."""
        start, end = len(self.text), time.monotonic() + PATIENCE
        while not shown(self.text[start:]):
            left = end - time.monotonic()
            assert left > 0, f"not shown; since the last time: {self.text[start:]!r}"
            if select.select([self.source], [], [], left)[0]:
                data = os.read(self.source, 65536)
                assert data, f"it has ended: {self.text}"
                self.text += data.decode()
        return self.text[start:]

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """End it and return its exit status and what it said on standard error."""
        self.process.send_signal(number)
        assert self.process.stderr is not None
        said = self.process.stderr.read().decode()
        return self.process.wait(PATIENCE), said


@contextmanager
def watched(hooks: Hooks, *words: str, terminal: bool = False) -> Iterator[Watched]:
    """Run status --watch, its standard output a pipe or a terminal."""
    read, write = pty.openpty() if terminal else os.pipe()
    env = {**hooks.environ(), "PYQEMU_IFUP_POLICY": str(hooks.policy)}
    process = subprocess.Popen(
        hooks.argv("pyqemu-ifctl", "status", "--watch", *words),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    try:
        yield Watched(process, read)
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
        os.close(read)


def has(*words: str) -> Callable[[str], bool]:
    """Want a line that begins with these words."""
    return lambda text: any(
        line.split()[: len(words)] == list(words)
        for line in text.replace("\x1b[H\x1b[2J", "\n").splitlines()
    )


def switches(pid: int) -> int:
    """Return how often the process has gone to sleep."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches"):
            return int(line.split()[1])
    raise LookupError(pid)


def test_it_is_shown_whenever_it_changes(hooks: Hooks, netns: Namespace, ovs: OpenVSwitch) -> None:
    with watched(hooks) as shown:
        assert shown.wait(lambda text: text == "no taps\n")
        netns.tap("lan0")
        shown.wait(has("lan0", "loose"))
        assert hooks.up("lan0").returncode == 0
        shown.wait(has("lan0", "ok", "br0", "lan"))
        # What is the port's alone is told by the bridge's family of messages.
        netns.run(["bridge", "link", "set", "dev", "lan0", "isolated", "on"])
        shown.wait(has("lan0", "differs"))
        assert hooks.ctl("apply").returncode == 0
        shown.wait(has("lan0", "ok"))
        netns.tap("sw0")
        assert hooks.up("sw0").returncode == 0
        shown.wait(has("sw0", "ok", "br-int", "sw", "100"))
        # And what is Open vSwitch's by its database.
        ovs.vsctl("set", "port", "sw0", "tag=7")
        shown.wait(has("sw0", "differs", "br-int", "sw", "7"))
        before = len(shown.text)
        count = switches(shown.process.pid)
        time.sleep(IDLE)
        assert switches(shown.process.pid) - count <= 2, "it looks though nothing has happened"
        assert shown.text[before:] == ""
        assert "\n\nTAP " in shown.text and "\x1b" not in shown.text
        assert hooks.down("sw0").returncode == hooks.down("lan0").returncode == 0
        shown.wait(has("lan0", "loose"))
        assert shown.end() == (0, "")


def test_on_a_terminal_one_is_in_the_place_of_the_other(hooks: Hooks, netns: Namespace) -> None:
    with watched(hooks, terminal=True) as shown:
        shown.wait(has("no", "taps"))
        netns.tap("lan0")
        shown.wait(has("lan0", "loose"))
        assert shown.text.startswith("\x1b[H\x1b[2Jno taps")
        assert shown.text.count("\x1b[H\x1b[2J") == 2
        assert shown.end(signal.SIGTERM) == (0, "")


def test_one_tap_as_json(hooks: Hooks, netns: Namespace) -> None:
    with watched(hooks, "--json", "lan0") as shown:
        text = shown.wait(lambda text: text.endswith("}\n"))
        assert json.loads(text) == {"version": 1, "taps": []}
        netns.tap("other")
        netns.tap("lan0")
        text = shown.wait(lambda text: text.endswith("}\n"))
        assert [each["tap"] for each in json.loads(text)["taps"]] == ["lan0"]
        assert shown.end(signal.SIGHUP) == (0, "")


def test_database_that_goes_and_comes(hooks: Hooks, netns: Namespace, ovs: OpenVSwitch) -> None:
    netns.tap("sw0")
    assert hooks.up("sw0").returncode == 0
    with watched(hooks, "sw0") as shown:
        shown.wait(lambda text: "state        ok" in text)
        ovs.server.kill()
        shown.wait(lambda text: "state        not known" in text)
        ovs.start_server()
        shown.wait(lambda text: "state        ok" in text)
        status, said = shown.end()
        assert status == 0
        gone = f"Open vSwitch is not there: nothing answers at {ovs.db}"
        assert said.startswith(f"pyqemu-ifctl: {gone}")
    assert hooks.down("sw0").returncode == 0


def test_reader_that_goes(hooks: Hooks, netns: Namespace) -> None:
    with watched(hooks) as shown:
        shown.wait(has("no", "taps"))
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, shown.source)
        os.close(null)
        netns.tap("lan0")
        assert shown.process.wait(PATIENCE) == 0
        assert shown.process.stderr is not None
        assert shown.process.stderr.read() == b""
