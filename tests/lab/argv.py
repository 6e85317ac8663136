"""What a guest that has taken over its QEMU can do to it: write its command line anew."""

from __future__ import annotations

import os
from pathlib import Path


def rewrite_argv(pid: int, *words: str) -> None:
    """Write `words` over the command line of process `pid`, in its own memory, filled up by -D.

    Raises ValueError where they have no room.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    # NOTE: fields 48 and 49 of proc_pid_stat(5); the list begins with the third.
    start, end = int(fields[45]), int(fields[46])
    text = b"".join(os.fsencode(word) + b"\0" for word in (*words, "-D"))
    room = end - start - len(text) - 1
    if room < 0:
        raise ValueError(f"{len(text)} bytes, and {end - start} of a command line")
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write(text + b"x" * room + b"\0")
