"""The ends of processes are told of, whatever pid a mark has."""

from __future__ import annotations

import os
import select
import subprocess
import threading
from collections.abc import Iterator

import pytest

from pyqemu_ifd.ends import Ends
from pyqemu_ifup.system.process import process_start


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


@pytest.fixture
def thread() -> Iterator[int]:
    """The id of a thread of this process, which is not its first."""
    goes = threading.Event()
    thread = threading.Thread(target=goes.wait)
    thread.start()
    assert thread.native_id is not None
    yield thread.native_id
    goes.set()
    thread.join()


def is_told(ends: Ends) -> bool:
    return bool(select.select([ends], [], [], 0)[0])


@pytest.mark.parametrize("pid", [0, 1 << 22, 1 << 31, 1 << 80])
def test_a_pid_that_none_can_have_is_of_one_that_has_ended(ends: Ends, pid: int) -> None:
    assert ends.watch({(pid, 0)})
    assert not is_told(ends)


@pytest.mark.parametrize("start", ["another", "its own"])
def test_a_thread_is_no_process(ends: Ends, thread: int, start: str) -> None:
    started = process_start(thread)
    assert started is not None
    assert ends.watch({(thread, started - (start == "another"))})


def test_a_copy_of_what_is_watched_no_more_wakes_nobody(ends: Ends) -> None:
    """A forked child has one until it is another program."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        started = process_start(process.pid)
        assert started is not None
        assert not ends.watch({(process.pid, started)})
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        child = os.fork()
        if child == 0:
            os.close(ours)
            os.read(theirs, 1)
            os._exit(0)
        try:
            os.close(theirs)
            process.kill()
            select.select([ends], [], [], 20)
            assert ends.take()
            assert not is_told(ends)
            assert not ends.watch(())
        finally:
            os.close(ours)
            os.waitpid(child, 0)
