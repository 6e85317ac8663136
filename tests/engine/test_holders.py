"""Who holds which tap is found in time that grows with the descriptors, a little at a time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.needs import require
from lab.netns import Namespace
from pyqemu_ifup.system import holders
from pyqemu_ifup.system.holders import BATCH, OTHERS, Held

PATHS = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
COPIES = 1200
"""Descriptors of one tap that a process has."""
LET_GO = 100
"""Those of them that it lets go while they are asked for."""
HOLDING = f"""
import os, sys
copies = [int(sys.argv[1]), *(os.dup(int(sys.argv[1])) for _ in range({COPIES - 1}))]
print(flush=True)
sys.stdin.readline()
for each in copies[:{LET_GO}]:
    os.close(each)
print(flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder(inside: Namespace) -> Iterator[subprocess.Popen[str]]:
    """A process that holds web0 by many descriptors, and lets some go when it is told to."""
    with (
        inside.tap("web0") as tap,
        subprocess.Popen(
            [sys.executable, "-c", HOLDING, str(tap.fd)],
            pass_fds=[tap.fd],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        tap.close()
        try:
            yield process
        finally:
            process.kill()


def test_many_descriptors_of_which_some_are_let_go_cost_little(
    holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is compared with few others, and the agent's loop goes on after a batch of them."""
    compared = [0]
    real_eq, real_hash, real_find = Held.__eq__, Held.__hash__, holders._find_elsewhere
    calls = 0

    def count_eq(self: Held, other: object) -> bool:
        compared[-1] += 1
        return real_eq(self, other)

    def count_hash(self: Held) -> int:
        compared[-1] += 1
        return real_hash(self)

    def finding(*words: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.write("\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == "\n"
        return real_find(*words)

    monkeypatch.setattr(Held, "__eq__", count_eq)
    monkeypatch.setattr(Held, "__hash__", count_hash)
    monkeypatch.setattr(holders, "_find_elsewhere", finding)
    work = holders.find_holders(OTHERS)
    while True:
        try:
            work.send(None)
        except StopIteration as end:
            found = end.value
            break
        compared.append(0)
    monkeypatch.undo()
    assert calls == 1, "what is held still was asked for twice"
    assert found.of("web0") == (holder.pid,)
    assert len(found.held) == COPIES - LET_GO
    assert sum(compared) < 20 * COPIES
    assert max(compared) < 10 * BATCH


@pytest.fixture
def macvtap(inside: Namespace) -> Iterator[tuple[int, int]]:
    """A macvtap mv0 of the namespace: its ifindex, and the number of its device."""
    require("macvtap")
    lines = (
        "link add v0 up type veth peer name v1",
        "link add link v0 name mv0 type macvtap mode bridge",
    )
    inside.run(["ip", "-batch", "-"], input="\n".join(lines))
    inside.kept.callback(inside.run, ["ip", "link", "del", "v0"])
    index = inside.link("mv0")["ifindex"]
    told = subprocess.run(
        ["ip", "netns", "exec", inside.name, "cat", f"/sys/class/net/mv0/macvtap/tap{index}/dev"],
        check=True,
        capture_output=True,
        text=True,
    )
    yield index, os.makedev(*map(int, told.stdout.split(":")))


LOOK = """
from pyqemu_ifup.system.holders import all_holders
print(*all_holders().of("mv0"))
"""


@pytest.mark.parametrize(
    ("kind", "flags", "counts"),
    [
        ("the link's own device", os.O_RDWR, True),
        ("the link's own device", os.O_PATH, False),
        ("another device", os.O_RDWR, False),
        ("a file", os.O_RDWR, False),
    ],
)
def test_only_the_device_of_a_link_holds_it(
    inside: Namespace, macvtap: tuple[int, int], tmp_path: Path, kind: str, flags: int, counts: bool
) -> None:
    """Anybody may call a file as the device of root's link."""
    index, number = macvtap
    node = tmp_path / f"tap{index}"
    if kind == "a file":
        node.touch()
    else:
        null = os.makedev(1, 3)
        os.mknod(node, stat.S_IFCHR | 0o600, number if "own" in kind else null)
    # NOTE: in a process with a /sys that shows the namespace, as root's agent has.
    look = ["ip", "netns", "exec", inside.name, sys.executable, "-c", LOOK]
    descriptor = os.open(node, flags)
    try:
        told = subprocess.run(
            look, check=True, capture_output=True, text=True, env={**os.environ, **PATHS}
        )
    finally:
        os.close(descriptor)
    assert told.stdout.split() == [str(os.getpid())] * counts
