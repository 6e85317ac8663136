"""Anybody's files whose close lasts, and users whom nobody knows, keep nobody else waiting."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.fuse import mute_file
from lab.holder import Holder, tun_for_all
from lab.needs import require
from lab.netns import Namespace
from lab.public import NOBODY, mute_directory, public_folder, python
from lab.race import fork, wait
from pyqemu_ifd.closer import Closer
from pyqemu_ifup.system.holders import all_holders
from pyqemu_ifup.system.process import read_status

pytestmark = pytest.mark.host("it looks at all processes of the host")

SLOW = 40.0
"""Seconds that an answer may take on a machine that is busy."""
LOOKER = "pyqemu-looker"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can read."""
    with public_folder() as found:
        yield found


def living() -> set[int]:
    """Return the processes that take descriptors of others', and have not come to their end."""
    found = {
        int(pid): read_status(int(pid), ("Name", "State"))
        for pid in filter(str.isdigit, os.listdir("/proc"))
    }
    return {
        pid
        for pid, each in found.items()
        if each.get("Name") == LOOKER and not each["State"].startswith("Z")
    }


def waiting() -> bool:
    """Tell whether one of them is kept from its end."""
    before = living()
    if before:
        time.sleep(0.2)
    return bool(before & living())


SWAP = "[os.dup2(it, at) for _ in iter(int, 1) for it in (taps[0], file) for at in range(50, 99)]"


def test_a_tap_that_is_another_file_by_the_time_it_is_taken(netns: Namespace, folder: Path) -> None:
    """Each of a user's numbers is now a tap's, now a file's that never answers root's close."""
    # NOTE: a tap is known by the name of its device.
    (folder / "net").mkdir(mode=0o755)
    env = {"TUN": tun_for_all(folder / "net")}

    def look() -> None:
        end = time.monotonic() + 10
        with netns.enter():
            while not waiting() and time.monotonic() < end:
                all_holders()
            assert os.getppid() in all_holders().of("t0")

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


SENDING = """
import array, os, socket, sys
path, file, first, count, *fields = sys.argv[1:]
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [os.open(file, os.O_RDONLY)]))]
kept = []
for uid in range(int(first), int(first) + int(count)):
    os.setresuid(uid, uid, 0)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path)
    connection.sendmsg(["\\0".join(["pyqemu-ifup/1", *fields]).encode()], rights)
    connection.settimeout(10)
    try:
        said = connection.recv(4096)
    except ConnectionResetError:
        # What it left unread is told first, and then what it has said (unix_release_sock).
        said = connection.recv(4096)
    print(said.split()[-1].decode(), flush=True)
    os.setresuid(0, 0, 0)
    kept.append(connection)
os.setresuid(int(first), int(first), int(first))
sys.stdin.read()
"""


def test_files_that_many_users_send_keep_nobody_else_from_a_tap(
    netns: Namespace, folder: Path
) -> None:
    """Neither while they are looked at, nor while the agent runs a program, as for `nat:`.

    Once, all threads waited, and so did each program, before it was executed.
    """
    require("dnsmasq", "nft")
    policy = folder / "policy.yaml"
    nat = {"ipv4": "192.168.79.1/24", "outbound": False}
    lab = {"bridge": "labbr0", "nat": nat, "users": ["nobody"], "tap_name": "lab%d"}
    policy.write_text(
        json.dumps(
            {"version": 1, "networks": {"lab": lab}, "rules": [{"tap": "*", "network": "lab"}]}
        )
    )

    def ask() -> None:
        while (done := honest('tap("lab", "lab0")')) != "=0":
            # NOTE: a machine that is busy takes its time for nft.
            assert done == "=75", (done, honest("said"))
        while not (down := honest('hook("down", "lab0", "")')).startswith("=0"):
            assert down.startswith("=75"), down
        honest("close()")

    with ExitStack() as stack:
        agent = stack.enter_context(Agent(netns, policy, users=True))
        env = {"TUN": "", "PYQEMU_IFUP_SOCKET": agent.path}
        honest = stack.enter_context(Holder(netns, NOBODY, env))
        file = stack.enter_context(mute_file(folder))
        # Who has had a tap is known.
        ask()
        words = [
            python(),
            "-I",
            "-c",
            SENDING,
            agent.path,
            str(file),
            "200000",
            "40",
            "up",
            "lan0",
            "",
            "",
        ]
        sender = stack.enter_context(netns.popen(words, stdin=subprocess.PIPE))
        stack.callback(sender.kill)
        assert sender.stdout is not None
        said = [sender.stdout.readline() for _ in range(40)]
        assert wait(fork(ask), SLOW) == 0
        # Each is told that it is no tap, and, when too many wait, to try again.
        assert said == ["docs/agent.md\n"] * 32 + ["again\n"] * 8


def test_users_whom_the_directory_does_not_know_take_no_other_s_turn(
    netns: Namespace, folder: Path
) -> None:
    """Who has been known is asked for, and another is told soon to try again."""
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    policy = folder / "policy.yaml"
    lan = {"bridge": "br0", "users": ["nobody"]}
    policy.write_text(
        json.dumps(
            {
                "version": 1,
                "timeout": 300,
                "networks": {"lan": lan},
                "rules": [{"tap": "*", "network": "lan"}],
            }
        )
    )

    def ask(uid: int, answer: str) -> None:
        with Holder(netns, uid, {"PYQEMU_IFUP_SOCKET": agent.path}) as user:
            assert user('tap("lan", "")') == answer

    with ExitStack() as stack:
        stack.callback(lambda: netns.ip("link", "del", "br0"))
        before = mute_directory("uid >= 200000")
        agent = stack.enter_context(Agent(netns, policy, before=before, users=True))
        ask(NOBODY, "=0")
        words = [
            python(),
            "-I",
            "-c",
            SENDING,
            agent.path,
            "/proc/self/ns/net",
            "200000",
            "20",
            "tap",
            "lan",
            "",
            "1",
            "",
            "",
        ]
        sender = stack.enter_context(netns.popen(words, stdin=subprocess.PIPE))
        stack.callback(sender.kill)
        assert sender.stdout is not None
        for _ in range(20):
            assert sender.stdout.readline() == "!300\n"
        assert wait(fork(lambda: ask(NOBODY, "=0")), SLOW) == 0
        assert wait(fork(lambda: ask(NOBODY - 1, "=75")), SLOW) == 0


@pytest.mark.timeout(60)
def test_no_child_of_the_agent_s_closes_what_a_user_has_sent() -> None:
    """A program that is about to start has a copy of each connection, which is not the last one."""
    closer = Closer()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        sender = socket.create_connection(listener.getsockname())
        receiver = listener.accept()[0]
    sender.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sender.send(bytes(65536))
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, sender:
        socket.send_fds(ours, [b"x"], [sender.fileno()])
    with receiver:
        closer.hang_up(NOBODY, theirs.detach())
        began = time.monotonic()
        # NOTE: as one that is slow between fork(2) and execve(2).
        subprocess.run(["true"], preexec_fn=lambda: time.sleep(0.5), check=True)
        assert time.monotonic() - began < SLOW
        while not closer.closed:
            closer.prod()
            time.sleep(0.01)
    assert [*closer.closed] == [NOBODY]
