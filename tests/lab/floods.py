"""What a local user without any right does to the agents: each a process, or many, that goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lab.netns import Namespace
from lab.public import as_user, python

START = """
import array, os, resource, socket, struct, sys, time
sockets = sys.argv[1:]
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))

def connect(path):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection

def begun():
    print("begun", flush=True)
"""
LINGERING = (
    START
    + """
# Descriptors whose last close waits: 253 in a packet, many packets in a connection.
import signal
# NOTE: a signal ends the wait of a close. Ours is the last one if the agent is faster than we are.
signal.signal(signal.SIGALRM, lambda number, frame: None)
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)

def lingering():
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    sender = socket.create_connection(listener.getsockname())
    receivers.append(listener.accept()[0])
    sender.setblocking(False)
    try:
        while True:
            sender.send(bytes(65536))
    except BlockingIOError:
        pass
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
    return sender.detach()

receivers = []
packets = [b"pyqemu-ifup/1\\0up\\0lan0\\0\\0", b"x"]
at = 0
while True:
    for path in sockets:
        connection = connect(path)
        if connection is None:
            continue
        descriptors = [lingering() for _ in range(2)]
        for count in (253, 3, 1):
            numbers = array.array("i", (descriptors * 127)[:count])
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)]
            try:
                connection.sendmsg([packets[at % 2]], rights)
            except OSError:
                break
        for descriptor in descriptors:
            os.close(descriptor)
        at += 1
        if at % 3:
            kept = connection.detach()
        else:
            connection.close()
    if at == 3 or not at:
        begun()
        at = max(at, 4)
    time.sleep(0.002)
"""
)
CONNECTING = (
    START
    + """
begun()
while True:
    for path in sockets:
        connection = connect(path)
        if connection is not None:
            connection.close()
"""
)
MANY_USERS = (
    START
    + """
# As root in a user namespace of its own: as many users as its subordinate ids.
for uid in range(200000, 200064):
    if os.fork() == 0:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        held = []
        while True:
            held = [connection for path in sockets for _ in range(64)
                    if (connection := connect(path)) is not None]
            time.sleep(0.5)
begun()
time.sleep(600)
"""
)
REQUESTS = (
    START
    + """
# Each is refused, and told to syslog.
descriptor = os.open("/proc/self/ns/net", os.O_RDONLY)
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
begun()
while True:
    for path in sockets:
        for _ in range(16):
            connection = connect(path)
            if connection is not None:
                try:
                    connection.sendmsg([b"pyqemu-ifup/1\\0up\\0lan0\\0\\0"], rights)
                    connection.settimeout(1)
                    connection.recv(4096)
                except OSError:
                    pass
                connection.close()
"""
)
BURNING = (
    START
    + """
begun()
while True:
    pass
"""
)
FLOODS = {
    "lingering": (LINGERING, 1),
    "connecting": (CONNECTING, 3),
    "many users": (MANY_USERS, 1),
    "requests": (REQUESTS, 1),
}
"""The program of each, and how many run it."""
FLOODER = 65532


@contextmanager
def flood(netns: Namespace, names: Sequence[str], paths: Sequence[str]) -> Iterator[None]:
    """Have the floods go on while the block lasts; all of them have begun. "burning" burns."""
    running: list[subprocess.Popen[Any]] = []
    try:
        for name in names:
            code, count = FLOODS.get(name, (BURNING, 1))
            words = [python(), "-I", "-c", code, *paths]
            if name != "many users":
                words = [*as_user(FLOODER), *words]
            words = ["setsid", "--wait", *words]
            running += [netns.popen(words) for _ in range(count)]
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
        yield
    finally:
        for process in running:
            kill_tree(process.pid)
            process.wait(20)
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started."""
    subprocess.run(
        [
            "sh",
            "-c",
            "k() { for c in $(cat /proc/$1/task/*/children 2>/dev/null); do k $c; done; "
            'kill -9 $1 2>/dev/null; }; k "$1"',
            "sh",
            str(pid),
        ],
        check=False,
    )
