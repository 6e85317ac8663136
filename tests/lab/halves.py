"""All the tests, in two processes beside each other: most of their time they wait."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest"]
BESIDE = (
    "test_nat.py", "test_openvswitch.py", "test_openvswitch_faults.py", "test_policy_size.py",
    "test_qemu_guest.py", "test_linux_bridge.py", "test_qemu_hooks.py", "test_tap_client.py",
    "test_tap_request.py", "test_thin.py", "test_tidy.py", "test_unprivileged.py",
)  # fmt: skip
"""About half of it by time, and nothing that looks at the whole host or at the checkout."""


def main() -> int:
    """Run both; print the one as it goes, and then what the other has printed. Return 0, or not."""
    beside = [str(TESTS / name) for name in BESIDE]
    with tempfile.TemporaryFile() as printed:
        with subprocess.Popen(
            [*PYTEST, *beside], cwd=TESTS.parent, stdin=subprocess.DEVNULL, stdout=printed,
            stderr=subprocess.STDOUT,
        ) as other:  # fmt: skip
            rest = [*PYTEST, *(f"--ignore={path}" for path in beside)]
            try:
                status = subprocess.run(rest, cwd=TESTS.parent).returncode
                status = other.wait() or status
            except BaseException:
                other.send_signal(signal.SIGINT)
                raise
        printed.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(printed.read())
    return status


if __name__ == "__main__":
    sys.exit(main())
