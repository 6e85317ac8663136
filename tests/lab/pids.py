"""Processes that get the pid of one that has ended."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

NS_LAST_PID = "/proc/sys/kernel/ns_last_pid"
"""The pid that was given last in this PID namespace (proc(5)); the next one is that and one."""
TRIES = 200


def reuse_pid(pid: int, words: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start `words` under a pid that is free, with `options` as Popen takes them."""
    for _ in range(TRIES):
        with open(NS_LAST_PID, "w") as file:
            file.write(str(pid - 1))
        process = subprocess.Popen(words, **options)
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    raise RuntimeError(f"pid {pid} is not to be had again")
