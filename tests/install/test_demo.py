"""The demonstration of `make demo`: it works, and cleans up when it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab import boot, needs
from lab.checkout import ROOT

pytestmark = pytest.mark.host("it looks at all processes of the host")

DEMO = ROOT / "tests" / "lab" / "demo.py"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """The environment that the demonstration runs in, with an empty TMPDIR of its own."""
    needs.require("root", "tun", "ip", "qemu")
    reason = boot.setup()
    if reason is not None:
        needs.lack(reason)
    return {**os.environ, "TMPDIR": str(tmp_path)}


def processes_on(tap: str) -> list[str]:
    """Return the command lines that name a tap, of all processes."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"ifname={tap},".encode() in words:
            lines.append(words.replace(b"\0", b" ").decode(errors="replace"))
    return lines


@pytest.mark.timeout(150)
def test_each_step_works_and_is_told(env: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, DEMO], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert [line.partition(",")[0] for line in told] == [f"[{n}/9" for n in range(1, 10)]
    assert "    from the guest: ICMP echo request, 98 bytes\n" in done.stdout
    assert "    to the guest:   ICMP echo reply, 98 bytes\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(150)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_stopped_while_the_guest_boots(
    env: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    with subprocess.Popen(
        [sys.executable, DEMO], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("[7/9"):
                break
        assert processes_on("demo0"), "the guest does not run"
        demo.send_signal(number)
        _rest, said = demo.communicate(timeout=60)
    assert demo.returncode == 128 + number
    assert said == f"demo: stopped by {number.name}; cleaning up\n"
    assert processes_on("demo0") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(150)
def test_a_failing_step_is_named(env: dict[str, str], tmp_path: Path) -> None:
    """Without ip(8) the first step cannot be taken."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("ip", "bridge"):
        (tools / name).write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 2\n")
        (tools / name).chmod(0o755)
    env["PATH"] = f"{tools}:{env['PATH']}"
    done = subprocess.run([sys.executable, DEMO], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    step = "demo: step 1 of 9 failed: `ip link set lo up` ended 2, not 0: no such thing\n"
    assert done.stderr == step
