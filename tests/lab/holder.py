"""A process of a user's that gets taps of the agent, holds them, and does what the kernel lets it.

It is told what to do in Python, a line each, and answers each with what that comes to.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.netns import Namespace
from lab.public import as_user, python

CODE = """\
import array, fcntl, json, os, select, socket, struct, sys

PERSIST, OWNER, IFF, CARRIER = 0x400454CB, 0x400454CC, 0x400454CA, 0x400454E2
taps, said = [], []

def ask(descriptor, *fields):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(os.environ["PYQEMU_IFUP_SOCKET"])
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    connection.sendmsg([b"\\0".join(map(os.fsencode, ["pyqemu-ifup/1", *fields]))], rights)
    while True:
        data, held, _, _ = socket.recv_fds(connection, 65536, 64)
        said.append(os.fsdecode(data))
        taps.extend(held)
        if data[:1] in (b"=", b"?", b""):
            return said[-1]

def tap(network, name, queues=1):
    return ask(os.open("/proc/self/ns/net", os.O_RDONLY), "tap", network, name, str(queues), "", "")

def hook(*fields):
    # By a child, as a QEMU has it done that has the tap.
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, ask(taps[0], *fields).encode() + b" " + " ".join(said).encode())
        os._exit(0)
    os.wait()
    return os.read(read, 65536).decode()

def control(request, value):
    try:
        return fcntl.ioctl(taps[0], request, value) and 0
    except OSError as error:
        return error.strerror

def open_it(name, flags=0x1002):
    descriptor = os.open(os.environ["TUN"], os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(descriptor, IFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        os.close(descriptor)
        return error.strerror
    taps.append(descriptor)

def send(frame):
    try:
        return os.write(taps[0], bytes.fromhex(frame))
    except OSError as error:
        return error.strerror

def close():
    while taps:
        os.close(taps.pop())

def give():
    # A child has the taps from now on, as QEMU's under -daemonize, and this process ends.
    if os.fork():
        os._exit(0)
    os.setsid()
    return os.getpid()

def listen():
    global place
    place = socket.socket(socket.AF_UNIX)
    place.bind("\\0taps")
    place.listen()

def pass_on():
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("\\0taps")
    socket.send_fds(connection, [b"x"], taps)
    close()

def fetch():
    taps.extend(socket.recv_fds(place.accept()[0], 1, 64)[1])

for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


class Holder:
    """One such process; a context manager. `prefix` is a command that executes it."""

    def __init__(self, netns: Namespace, uid: int, env: Mapping[str, str], *prefix: str) -> None:
        self.process: subprocess.Popen[Any] = netns.popen(
            [*as_user(uid), *prefix, python(), "-I", "-c", CODE],
            env=dict(env),
            stdin=subprocess.PIPE,
        )

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __call__(self, line: str) -> Any:
        """Have it evaluate `line` and return what that comes to, as JSON has it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"it has ended at {line}"
        return json.loads(answer)

    def close(self) -> None:
        """End it, and whoever has its taps from it: all read the same end."""
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.wait(20)

    def kill(self) -> None:
        """Kill it (SIGKILL)."""
        self.process.kill()
        self.process.wait()


def tun_for_all(folder: Path) -> str:
    """Return the path of a /dev/net/tun that everybody may open, in `folder`."""
    node = folder / "tun"
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(10, 200))
    node.chmod(0o666)
    return str(node)
