"""The versions of QEMU that the tests run: this machine's, and one that qemu/qemu-setup unpacks."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from lab.boot import cache
from lab.needs import QEMU, lack, require

SETUP = Path(__file__).parent / "qemu" / "qemu-setup"
VERSIONS = ("installed", "Debian 13's")


@functools.cache
def qemu_of(version: str) -> str:
    """Return the program of a version of QEMU; the calling test is skipped where it is not there.

    Raises as `lack` does.
    """
    if version == "installed":
        require("qemu")
        return QEMU
    done = subprocess.run([SETUP, cache()], capture_output=True, text=True)
    if done.returncode != 0:
        lack(f"no QEMU of {version}: {done.stderr.strip()}")
    return str(cache() / "qemu-trixie" / "qemu-system-x86_64")
