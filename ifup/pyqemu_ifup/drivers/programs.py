"""Runs other programs to their end, by a deadline, with nothing of ours open in them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.manners import SAFE_PATH, waiting_for
from pyqemu_ifup.task import pause

SHORT = 0.005
"""Seconds between looks at a program that is about to end."""


@dataclass(frozen=True)
class Run:
    """What a program that has ended said."""

    status: int
    out: str
    err: str


def scratch() -> BinaryIO:
    """Return an empty file for what a program is given or says."""
    # NOTE: in memory, for a container may have no folder that can be written.
    return open(os.memfd_create("pyqemu-ifup"), "w+b")


async def run_program(words: Sequence[str], deadline: Deadline, text: str = "") -> Run:
    """Run a program to its end, with `text` on its standard input; it inherits nothing else.

    Raises Failure, 75 with `watch`; then it is killed.
    """
    # NOTE: files, not pipes: what stays in the background keeps no end of a pipe open.
    with scratch() as given, scratch() as out, scratch() as err:
        given.write(text.encode())
        given.seek(0)
        with waiting_for(f"{words[0]} does not start"):
            process = subprocess.Popen(
                list(words),
                stdin=given,
                stdout=out,
                stderr=err,
                cwd="/",
                env={"PATH": SAFE_PATH, "LC_ALL": "C"},
                start_new_session=True,
            )
        try:
            while process.poll() is None:
                deadline.check(f"{words[0]} does not end")
                await pause(SHORT)
        except BaseException:
            process.kill()
            process.wait()
            raise
        found = []
        for file in (out, err):
            file.seek(0)
            found.append(file.read().decode("utf-8", "replace"))
        return Run(process.returncode, *found)
