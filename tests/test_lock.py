"""The lock on a tap: who has it, who waits for it, and when it ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from lab.hooks import SOURCE_ROOTS
from lab.needs import require
from lab.netns import Namespace
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.lock import TAPS, Lock, lock_tap
from pyqemu_ifup.manners import Watch
from pyqemu_ifup.work import finish

HOLDER = f"""
import sys, time
sys.path[:0] = {list(SOURCE_ROOTS)!r}
from pyqemu_ifup.lock import lock_tap
from pyqemu_ifup.manners import Watch
from pyqemu_ifup.work import finish
with finish(lock_tap(int(sys.argv[1]), Watch(5.0)), time.sleep):
    print("has it", flush=True)
    time.sleep(600)
"""


def take(index: int, seconds: float = 0.2) -> Lock:
    return finish(lock_tap(index, Watch(seconds)), time.sleep)


def test_one_holder_at_a_time(netns: Namespace) -> None:
    """In one process too, as two guests of an agent are; other taps are other locks."""
    with netns.enter():
        with take(7), take(8):
            for index in (7, 8):
                with pytest.raises(Failure) as caught:
                    take(index)
                assert caught.value.status is Status.TRY_AGAIN
                assert "is at work on this tap" in str(caught.value)
        with take(7), take(8):
            pass


def test_another_network_namespace_is_another_host(netns: Namespace) -> None:
    require("root", "ip")
    with Namespace() as other:
        with netns.enter():
            held = take(7)
        with held, other.enter():
            take(7).close()


def test_it_ends_with_its_process_and_is_root_s_alone(netns: Namespace) -> None:
    with netns.popen(
        [sys.executable, "-I", "-c", HOLDER, "7"], stdout=subprocess.PIPE, text=True
    ) as holder, netns.enter():
        assert holder.stdout is not None and holder.stdout.readline() == "has it\n"
        with pytest.raises(Failure):
            take(7)
        mode = os.stat(TAPS)
        assert (stat.S_IMODE(mode.st_mode), mode.st_uid) == (0o600, os.geteuid())
        holder.send_signal(signal.SIGKILL)
        take(7, seconds=5.0).close()
