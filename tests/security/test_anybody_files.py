"""Anybody's files whose close lasts as long as their maker likes: they keep nobody else waiting."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab.fuse import mute_file
from lab.holder import Holder, tun_for_all
from lab.netns import Namespace
from lab.public import NOBODY, public_folder
from lab.race import fork, wait
from pyqemu_ifup.caller import read_status
from pyqemu_ifup.holders import find_holders

LOOKER = "pyqemu-looker"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can read."""
    with public_folder() as found:
        yield found


def living() -> set[int]:
    """Return the processes that take descriptors of others', and have not come to their end."""
    found = {int(pid): read_status(int(pid), ("Name", "State"))
             for pid in filter(str.isdigit, os.listdir("/proc"))}
    return {pid for pid, each in found.items()
            if each.get("Name") == LOOKER and not each["State"].startswith("Z")}


def waiting() -> bool:
    """Tell whether one of them is kept from its end."""
    before = living()
    if before:
        time.sleep(0.2)
    return bool(before & living())


SWAP = "[os.dup2(it, at) for _ in iter(int, 1) for it in (taps[0], file) for at in range(50, 99)]"


def test_a_tap_that_is_another_file_by_the_time_it_is_taken(
    netns: Namespace, folder: Path
) -> None:
    """Each of a user's numbers is now a tap's, now a file's that never answers root's close."""
    # NOTE: a tap is known by the name of its device.
    (folder / "net").mkdir(mode=0o755)
    env = {"TUN": tun_for_all(folder / "net")}

    def look() -> None:
        end = time.monotonic() + 10
        with netns.enter():
            while not waiting() and time.monotonic() < end:
                find_holders()
            assert os.getppid() in find_holders().of("t0")

    with ExitStack() as stack:
        stack.enter_context(netns.tap("t0"))
        file = stack.enter_context(mute_file(folder))
        user = stack.enter_context(Holder(netns, NOBODY, env))
        stack.callback(user.kill)
        assert user("__import__('ctypes').CDLL(None).unshare(0x50000000)") == 0
        assert user('open_it("t0")') is None
        user(f"globals().update(file=os.open({str(file)!r}, os.O_RDONLY))")
        assert user.process.stdin is not None
        user.process.stdin.write(f"{SWAP}\n")
        user.process.stdin.flush()
        status = wait(fork(look), 20)
        seen = waiting()
    assert status == 0, "root waits for the user's file"
    assert seen, "it was a tap each time"
    end = time.monotonic() + 20
    while waiting():
        assert time.monotonic() < end
        time.sleep(0.05)
