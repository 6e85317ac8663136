"""Stands in for QEMU: holds taps, and runs scripts and helpers as QEMU's children.

A small process inside the namespaces of one host, started by hosts.py as a script. Each line on
stdin is a request and each line on stdout its answer, both in JSON.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from lab.taps import Tap

BLOCKED = (signal.SIGALRM, signal.SIGIO, signal.SIGUSR1, signal.SIGBUS)
"""What QEMU's main thread has blocked when it starts a script (os-posix.c:qemu_signal_init)."""
STDERR_MAX = 1 << 20
TUNGETIFF = 0x800454D2
"""_IOR('T', 210, unsigned int) of linux/if_tun.h."""
WIRE = b"pyqemu-ifup/1"
PACKET_MAX = 65536


class Spawner:
    """What is held meanwhile, and the requests, each by the name that `do` has."""

    def __init__(self) -> None:
        self.tap: Tap | None = None
        self.given = -1
        """The descriptor of the tap that a helper has made."""
        self.crowd: list[Tap] = []

    def open(self, tap: str) -> dict[str, object]:
        """Open a tap and hold it."""
        self.tap = Tap(tap, vnet_hdr=True)
        # NOTE: QEMU's descriptor of the tap is open in its scripts.
        os.set_inheritable(self.tap.fd, True)
        return {}

    def close(self) -> dict[str, object]:
        """Close every tap; each goes with its descriptor."""
        if self.given >= 0:
            os.close(self.given)
            self.given = -1
        for tap in self.crowd if self.tap is None else [*self.crowd, self.tap]:
            tap.close()
        self.tap = None
        self.crowd.clear()
        return {}

    def hold(self, names: list[str]) -> dict[str, object]:
        """Open many taps, and hold them so that no child has them."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.crowd += [Tap(name, vnet_hdr=True) for name in names]
        return {}

    def run(self, argv: list[str], env: dict[str, str]) -> dict[str, object]:
        """Run `argv` to its end; return its status, its stderr, and the seconds that it took.

        `wall` is from before the spawn until it has been waited for, `cpu` what it and the
        children that it waited for used of the processors.
        """
        return _timed(argv, env, lambda: None)

    def help(self, argv: list[str], env: dict[str, str]) -> dict[str, object]:
        """Run a helper as `run` does a script, and hold the tap that it hands over, `tap`."""
        ours, its = socket.socketpair()
        with ours, its:
            its.set_inheritable(True)
            words = [*argv, f"--fd={its.fileno()}"]
            answer = _timed(words, env, lambda: self._take(ours, its))
        name = ""
        if self.given >= 0:
            named = fcntl.ioctl(self.given, TUNGETIFF, bytes(40))
            name = named[:16].partition(b"\0")[0].decode()
        return {**answer, "tap": name}

    def _take(self, ours: socket.socket, its: socket.socket) -> None:
        its.close()
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        if descriptors:
            (self.given,) = descriptors

    def at_once(self, argv: list[str], env: dict[str, str]) -> dict[str, object]:
        """Run `argv` for every tap of the crowd at the same time, the tap's name its last word.

        Return the status and the seconds of each, `all` of them together, and their stderr.
        """
        running: dict[int, float] = {}
        ended: list[tuple[int, float]] = []

        def reap(flags: int) -> None:
            while running:
                pid, status = os.waitpid(-1, flags)
                if not pid:
                    return
                seconds = time.perf_counter() - running.pop(pid)
                ended.append((os.waitstatus_to_exitcode(status), seconds))

        with _Said() as said:
            begin = time.perf_counter()
            for tap in self.crowd:
                start = time.perf_counter()
                actions = [*said.actions, (os.POSIX_SPAWN_DUP2, tap.fd, 3)]
                pid = os.posix_spawn(
                    argv[0], [*argv, tap.name], env, file_actions=actions, setsigmask=BLOCKED
                )
                running[pid] = start
                reap(os.WNOHANG)
            reap(0)
            seconds = time.perf_counter() - begin
            return {
                "statuses": [status for status, _ in ended],
                "walls": [wall for _, wall in ended],
                "all": seconds,
                "stderr": said.text(),
            }

    def attach(self, path: str) -> dict[str, object]:
        """Have the agent at `path` attach the crowd, tap after tap, without a hook's process.

        Return the lines that it has said, of which there are none where all went well.
        """
        said: list[str] = []
        for tap in self.crowd:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.connect(path)
                request = b"\0".join([WIRE, b"up", tap.name.encode(), b"", b""])
                socket.send_fds(connection, [request], [tap.fd])
                while (packet := connection.recv(PACKET_MAX)) not in (b"", b"=0"):
                    if packet[:1] != b"!":
                        said.append(packet.decode())
        return {"said": said}


class _Said:
    """What children write to standard error, in a file: a pipe that is full would stop them."""

    def __enter__(self) -> _Said:
        self.file = os.memfd_create("stderr")
        self.actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, self.file, 2),
        ]
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.file)

    def text(self) -> str:
        return os.pread(self.file, STDERR_MAX, 0).decode(errors="replace")


def _timed(
    argv: list[str], env: dict[str, str], meanwhile: Callable[[], None]
) -> dict[str, object]:
    with _Said() as said:
        # NOTE: posix_spawn is a vfork: nothing of ours is copied for the child.
        begin = time.perf_counter()
        pid = os.posix_spawn(argv[0], argv, env, file_actions=said.actions, setsigmask=BLOCKED)
        meanwhile()
        _pid, status, usage = os.wait4(pid, 0)
        wall = time.perf_counter() - begin
        return {
            "status": os.waitstatus_to_exitcode(status),
            "stderr": said.text(),
            "wall": wall,
            "cpu": usage.ru_utime + usage.ru_stime,
        }


def main() -> None:
    """Answer requests until stdin ends."""
    # NOTE: `python3 -c` would import from the working directory.
    os.chdir("/")
    spawner = Spawner()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        do = getattr(spawner, request.pop("do"))
        print(json.dumps(do(**request)), flush=True)


if __name__ == "__main__":
    main()
