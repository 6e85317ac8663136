"""The lock on a tap: who has it, who waits for it, and when it ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import pyqemu_ifup.system.lock
from lab.hooks import SOURCE_ROOTS
from lab.needs import require
from lab.netns import Namespace
from lab.public import NOBODY
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.system.lock import Lock, lock_tap
from pyqemu_ifup.task import finish

HOLDER = f"""
import sys, time
sys.path[:0] = {list(SOURCE_ROOTS)!r}
from pyqemu_ifup.system.lock import lock_tap
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.task import finish
with finish(lock_tap(int(sys.argv[1]), Deadline(5.0)), time.sleep):
    print("has it", flush=True)
    time.sleep(600)
"""


def take(index: int, seconds: float = 0.2) -> Lock:
    return finish(lock_tap(index, Deadline(seconds)), time.sleep)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the locks, not there yet, in one that all may look into."""
    with tempfile.TemporaryDirectory(dir="/tmp") as above:
        os.chmod(above, 0o755)
        monkeypatch.setattr(pyqemu_ifup.system.lock, "RUN", f"{above}/run")
        monkeypatch.setattr(pyqemu_ifup.system.lock, "TAPS", f"{above}/run/taps")
        yield Path(above) / "run"


def test_one_holder_at_a_time(netns: Namespace) -> None:
    """In one process too, as two guests of an agent are; other taps are other locks."""
    with netns.enter():
        with take(7), take(8):
            for index in (7, 8):
                with pytest.raises(Failure) as caught:
                    take(index)
                assert caught.value.status is Status.TRY_AGAIN
                assert "has this tap in hand" in str(caught.value)
        with take(7), take(8):
            pass


def test_another_network_namespace_is_another_host(netns: Namespace) -> None:
    require("root", "ip")
    with Namespace() as other:
        with netns.enter():
            held = take(7)
        with held, other.enter():
            take(7).close()


def test_it_ends_with_its_process(netns: Namespace) -> None:
    words = [sys.executable, "-I", "-c", HOLDER, "7"]
    with netns.popen(words) as holder, netns.enter():
        assert holder.stdout is not None and holder.stdout.readline() == "has it\n"
        with pytest.raises(Failure):
            take(7)
        holder.send_signal(signal.SIGKILL)
        take(7, seconds=5.0).close()


def test_who_has_it_is_named_as_one_word(netns: Namespace) -> None:
    code = f"import ctypes; ctypes.CDLL(None).prctl(15, b'\\r;id\\xff'); {HOLDER.strip()}"
    words = [sys.executable, "-I", "-c", code, "7"]
    with netns.popen(words) as holder, netns.enter():
        assert holder.stdout is not None and holder.stdout.readline() == "has it\n"
        with pytest.raises(Failure) as caught:
            take(7)
        holder.kill()
        name = r"'\r;id\udcff'"
        assert f"process {holder.pid} ({name}) has this tap in hand" in str(caught.value)


HOG = """
import os, resource, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
for number in range(min(hard, 20000) - 20):
    os.dup(0)
os.setresuid(int(sys.argv[1]), 0, 0)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("uid", [0, NOBODY])
def test_no_process_of_many_descriptors_makes_the_search_long(netns: Namespace, uid: int) -> None:
    """Neither one of root's, nor one of a user's that has become root, as su(1) at its prompt."""
    require("root")
    words = [sys.executable, "-I", "-c"]
    with ExitStack() as stack:
        hog = stack.enter_context(netns.popen([*words, HOG, str(uid)], stdin=subprocess.PIPE))
        stack.callback(hog.kill)
        assert hog.stdout is not None and hog.stdout.readline() == "ready\n"
        holder = stack.enter_context(netns.popen([*words, HOLDER, "7"]))
        stack.callback(holder.kill)
        assert holder.stdout is not None and holder.stdout.readline() == "has it\n"
        stack.enter_context(netns.enter())
        began = time.thread_time()
        with pytest.raises(Failure) as caught:
            take(7, seconds=0.0)
        assert time.thread_time() - began < 0.12
        assert f"process {holder.pid} (" in str(caught.value)


CROWD = """
import os, signal, sys
for number in range(20):
    os.dup(0)
children = []
for number in range(300):
    children.append(os.fork())
    if not children[-1]:
        signal.pause()
print("ready", flush=True)
sys.stdin.read()
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_who_has_it_is_found_among_hundreds_of_root_s_processes(netns: Namespace) -> None:
    """As a host has them; some began before whoever has it, and some later."""
    require("root")
    words = [sys.executable, "-I", "-c"]
    with ExitStack() as stack:
        started = []
        for code in (CROWD, HOLDER, CROWD):
            process = stack.enter_context(netns.popen([*words, code, "7"], stdin=subprocess.PIPE))
            if code is HOLDER:
                stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == ("has it\n" if code is HOLDER else "ready\n")
            started.append(process)
        stack.enter_context(netns.enter())
        with pytest.raises(Failure) as caught:
            take(7, seconds=0.0)
        assert f"process {started[1].pid} (" in str(caught.value)


def test_read_only_run_keeps_others_out(netns: Namespace) -> None:
    """Whose /run is read-only, as under ProtectSystem=strict, is as root as the others."""
    with netns.enter():
        take(7).close()
    remount = (
        "mount --bind /run/pyqemu-ifup /run/pyqemu-ifup && "
        'mount -o remount,bind,ro /run/pyqemu-ifup && exec "$@"'
    )
    words = ["unshare", "-m", "sh", "-c", remount, "sh", sys.executable, "-I", "-c", HOLDER, "7"]
    with netns.popen(words) as holder, netns.enter():
        assert holder.stdout is not None and holder.stdout.readline() == "has it\n"
        with pytest.raises(Failure) as caught:
            take(7)
        assert f"process {holder.pid} (" in str(caught.value)
        take(8).close()
        holder.kill()


def test_nobody_but_root_may_hold_it(folder: Path) -> None:
    """The umask of who made it is not asked. One who may not write there does without."""
    require("root")
    umask = os.umask(0)
    try:
        take(7).close()
    finally:
        os.umask(umask)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "taps")] == [
        0o755,
        0o600,
    ]
    os.seteuid(NOBODY)
    try:
        with take(7), take(7):
            pass
    finally:
        os.seteuid(0)


def test_what_is_no_file_is_refused(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    (folder / "taps").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Failure) as caught:
        take(7)
    assert caught.value.status is Status.REFUSED
    assert not (tmp_path / "elsewhere").exists()
