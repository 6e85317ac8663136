"""A host whose load is high, at no cost: what waits in the kernel for good is counted as work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.fuse import mute_folder

WAITERS = """
import ctypes, threading, time
spawn = ctypes.CDLL(None).posix_spawn
words = (ctypes.c_char_p * 2)(b"waiter", None)

def wait():
    spawn(ctypes.byref(ctypes.c_int()), {path!r}, None, None, words, words)

threading.stack_size(1 << 17)
for _ in range({number}):
    threading.Thread(target=wait, daemon=True).start()
time.sleep(1000)
"""
"""Each waits, as vfork(2) does, until its child has executed a program which never answers."""
FOR_PROCESSOR = 50
PATIENCE = 60.0
"""Seconds in which the kernel has counted them, as it does every five."""


@contextmanager
def high_load(folder: Path) -> Iterator[None]:
    """Have the load of this host be more than twice its processors, with an empty folder for it."""
    processors = os.cpu_count() or 1
    code = WAITERS.format(path=os.fsencode(folder / "waiter"), number=FOR_PROCESSOR * processors)
    with mute_folder(folder):
        process = subprocess.Popen([sys.executable, "-I", "-c", code])
        try:
            end = time.monotonic() + PATIENCE
            while os.getloadavg()[0] <= 4 * processors:
                assert time.monotonic() < end, os.getloadavg()
                time.sleep(0.1)
            yield
        finally:
            process.kill()
            process.wait()
