"""Runs other programs, with nothing of ours open in them: a hook's, the agent's, and ifctl's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.hook import SAFE_PATH, waiting_for
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


Child = subprocess.Popen[bytes]
"""A program that runs, which only its `poll` or `wait` takes away when it has ended."""


def start_program(
    words: Sequence[str], given: BinaryIO | None, out: BinaryIO | None, err: BinaryIO
) -> Child:
    """Start a program in a session of its own, and with what root's programs are found by alone.

    `given` is its standard input, a pipe where None; `out` what it says, nobody's where None.
    Raises OSError.
    """
    return subprocess.Popen(
        list(words),
        stdin=subprocess.PIPE if given is None else given,
        stdout=subprocess.DEVNULL if out is None else out,
        stderr=err,
        cwd="/",
        env={"PATH": SAFE_PATH, "LC_ALL": "C"},
        start_new_session=True,
    )


def run_as_is(words: Sequence[str], seconds: float, text: str = "") -> Run:
    """Run a program of the user's own to its end, with the user's environment and folder.

    `text` is on its standard input. Raises OSError where it does not start, and TimeoutError after
    so many seconds; then it is killed.
    """
    try:
        done = subprocess.run(
            words, input=text.encode(), capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{words[0]} has not ended in {seconds:g} s") from error
    out, err = (said.decode("utf-8", "replace") for said in (done.stdout, done.stderr))
    return Run(done.returncode, out, err)


async def run_program(words: Sequence[str], deadline: Deadline, text: str = "") -> Run:
    """Run a program to its end, with `text` on its standard input; it inherits nothing else.

    Raises Failure, 75 by the deadline; then it is killed.
    """
    # NOTE: files, not pipes: what stays in the background keeps no end of a pipe open.
    with scratch() as given, scratch() as out, scratch() as err:
        given.write(text.encode())
        given.seek(0)
        with waiting_for(f"{words[0]} does not start"):
            process = start_program(words, given, out, err)
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
