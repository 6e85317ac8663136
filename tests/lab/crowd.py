"""Processes of anybody's that pass for QEMUs, many at a time and cheap: they are forks of one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lab.netns import Namespace
from lab.public import python
from lab.taps import Tap

CODE = """
import os
users = {users}
parent, pids, uid = os.getpid(), [os.getpid()], users[0]
read_end, write_end = os.pipe()
for other in users[1:]:
    pids.append(os.fork())
    if not pids[-1]:
        uid = other
        break
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
if os.getpid() != parent:
    os.write(write_end, b"x")
    os.read(0, 1)
    os._exit(0)
for _ in users[1:]:
    os.read(read_end, 1)
print(*pids, flush=True)
os.read(0, 1)
for _ in users[1:]:
    os.wait()
"""


@contextmanager
def crowd(
    netns: Namespace,
    users: Sequence[int],
    *words: str,
    name: str = "qemu-system-x86_64",
    held: Sequence[Tap] = (),
) -> Iterator[list[int]]:
    """Have a process of each of the users that is called `name` and has these arguments.

    Each of them holds the taps `held`. Yields their pids; they end when their standard input does.
    """
    code = CODE.format(users=list(users))
    with netns.enter():
        first = subprocess.Popen(
            [name, "-c", code, *map(os.fsencode, words)],
            executable=python(),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[tap.fd for tap in held],
        )
    assert first.stdout is not None
    with first:
        yield [int(pid) for pid in first.stdout.readline().split()]
