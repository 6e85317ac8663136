"""Stands in for QEMU: holds a tap, and runs scripts as QEMU's children, one after the other.

A small process inside the namespaces of one host, started by hosts.py as a script. Each line on
stdin is a request and each line on stdout its answer, both in JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from lab.taps import Tap  # noqa: E402 - the path above is needed first

BLOCKED = (signal.SIGALRM, signal.SIGIO, signal.SIGUSR1, signal.SIGBUS)
"""What QEMU's main thread has blocked when it starts a script (os-posix.c:qemu_signal_init)."""
STDERR_MAX = 1 << 20


def run(argv: list[str], env: dict[str, str]) -> dict[str, object]:
    """Run `argv` to its end; return its status, its stderr, and the seconds that it took.

    `wall` is from before the spawn until it has been waited for, `cpu` what it and the children
    that it waited for used of the processors.
    """
    # NOTE: a pipe that nobody reads meanwhile could stop the script.
    said = os.memfd_create("stderr")
    try:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, said, 2),
        ]
        # NOTE: posix_spawn is a vfork: nothing of ours is copied for the child.
        begin = time.perf_counter()
        pid = os.posix_spawn(argv[0], argv, env, file_actions=actions, setsigmask=BLOCKED)
        _pid, status, usage = os.wait4(pid, 0)
        wall = time.perf_counter() - begin
        stderr = os.pread(said, STDERR_MAX, 0).decode(errors="replace")
    finally:
        os.close(said)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "stderr": stderr,
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
    }


def main() -> None:
    """Answer requests until stdin ends."""
    # NOTE: `python3 -c` would import from the working directory.
    os.chdir("/")
    tap: Tap | None = None
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        answer: dict[str, object] = {}
        if request["do"] == "open":
            tap = Tap(request["tap"], vnet_hdr=True)
            # NOTE: QEMU's descriptor of the tap is open in its scripts.
            os.set_inheritable(tap.fd, True)
        elif request["do"] == "run":
            answer = run(request["argv"], request["env"])
        elif tap is not None:
            tap.close()
            tap = None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
