"""Which process asks: by a pidfd of the client where the kernel has one, and without."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab.pids import reuse_pid
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifd import asking
from pyqemu_ifd.asking import Process, find_asking
from pyqemu_ifd.wire import SO_PEERPIDFD, peer_of, peer_pidfd
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.system.process import find_parent, process_start

CONNECT = """\
import os, socket, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
# A child keeps the connection, so that it outlives who has made it.
if os.fork() == 0:
    os.close(1)
    connection.recv(1)
    os._exit(0)
print("connected", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def client(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """A process that has connected, and its connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        with subprocess.Popen(
            ["/usr/bin/env", "python3", "-I", "-c", CONNECT, tmp_path / "socket"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "connected\n"
            connection, _ = listener.accept()
            with connection:
                yield process, connection


def without_pidfd(connection: socket.socket) -> None:
    return None


@pytest.mark.parametrize("kernel", ["with a pidfd", "without"])
def test_a_client_is_known_until_it_ends(
    client: tuple[subprocess.Popen[str], socket.socket],
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, connection = client
    if kernel == "without":
        monkeypatch.setattr(asking, "peer_pidfd", without_pidfd)
    before = set(os.listdir("/proc/self/fd"))
    peer = peer_of(connection)
    assert (peer.pid, peer.uid) == (process.pid, os.getuid())
    own = find_asking(connection, peer, lambda pid: pid)
    assert own == Process(process.pid, process_start(process.pid) or 0)
    parent = find_asking(connection, peer, find_parent)
    assert parent == Process(os.getpid(), process_start(os.getpid()) or 0)
    assert not own.has_ended() and not parent.has_ended()
    deadline = Deadline(60, at_last=own.why_ended)
    shorter = deadline.child(30)
    assert shorter.remaining() <= 30
    for each in (deadline, shorter):
        each.last_check()
    process.communicate()
    assert own.has_ended()
    for each in (deadline, shorter):
        with pytest.raises(Failure, match=f"the calling process {process.pid} has ended"):
            each.last_check()
    for find in (find_parent, lambda pid: pid):
        with pytest.raises(Failure) as caught:
            find_asking(connection, peer, find)
        assert caught.value.status is Status.TRY_AGAIN
    with reuse_pid(process.pid, ["sleep", "60"], user=65534) as other:
        assert own.has_ended()
        for find in (find_parent, lambda pid: pid):
            with pytest.raises(Failure) as caught:
                find_asking(connection, peer, find)
            assert str(caught.value) == "stopped: the client has ended"
        other.kill()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_without_a_pidfd_a_later_process_of_the_same_user_is_not_the_client(
    client: tuple[subprocess.Popen[str], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "peer_pidfd", without_pidfd)
    process, connection = client
    peer = peer_of(connection)
    find_asking(connection, peer, find_parent)
    for other in (replace(peer, since=peer.since - 3600), replace(peer, uid=peer.uid + 1)):
        with pytest.raises(Failure, match="the client has ended"):
            find_asking(connection, other, find_parent)
    process.communicate()


class Older(socket.socket):
    """A connection on a kernel before 6.5."""

    def getsockopt(self, *args: int) -> bytes:  # type: ignore[override]
        assert args[1] == SO_PEERPIDFD
        raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))


def test_an_older_kernel_has_no_pidfd() -> None:
    with Older() as connection:
        assert peer_pidfd(connection) is None
