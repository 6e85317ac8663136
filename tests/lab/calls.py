"""Calls a hook as QEMU does, in a forked process of which a test can change anything first.

QEMU's signal mask, a descriptor of each open tap, standard descriptors of the caller's own, and
a syslog that the test reads. Forked, since what the hooks import is imported then already.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import posix
import select
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import NoReturn, cast

import pyqemu_ifconf.load
import pyqemu_ifd.thin
import pyqemu_ifdown.detach
import pyqemu_ifdown.main
import pyqemu_ifup.attach
import pyqemu_ifup.main
from lab.hooks import Hooks
from pyqemu_ifconf.shell import Command, readable
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.ops import LinkOp

# What a hook imports when it gets there; see above.
IMPORTED = (pyqemu_ifconf.load, pyqemu_ifup.attach, pyqemu_ifdown.detach)

# sched.h, sys/mount.h, sys/prctl.h
CLONE_NEWNS = 0x00020000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
PR_SET_CHILD_SUBREAPER = 36

QEMU_BLOCKS = (signal.SIGALRM, signal.SIGIO, signal.SIGUSR1, signal.SIGBUS)
"""What QEMU's main thread blocks, so its scripts too (os-posix.c: os_setup_signal_handling)."""
MONITOR = b"system_powerdown\n"
"""What stands in the hook's standard input, and is not the hook's to read."""
DEVICES = {"null": (1, 3), "full": (1, 7), "urandom": (1, 9), "net/tun": (10, 200)}
PATIENCE = 60.0
"""Seconds after which a call that does not end fails its test."""
BROKEN = 99
"""The exit status of a forked process that did not get as far as the hook."""

Change = Callable[[], object]


@dataclass(frozen=True)
class Ended:
    """How a call ended.

    A negative status is the signal that killed it; `log` are syslog's lines, each of the priority
    in `priorities`; `stdin_read` is how many bytes it took from its standard input.
    """

    status: int
    stdout: bytes
    stderr: str
    log: tuple[str, ...]
    priorities: tuple[int, ...]
    seconds: float
    stdin_read: int


class Syslog:
    """A syslog of the test's own: /dev/log, as far as it is shown to a process by `show`.

    While it is `deaf`, it takes nothing.
    """

    def __init__(self, folder: Path) -> None:
        # NOTE: the path of a Unix socket has at most 107 bytes.
        self.folder = tempfile.TemporaryDirectory(prefix="log-", dir="/tmp")
        os.chmod(self.folder.name, 0o755)
        self.path = f"{self.folder.name}/log"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        os.chmod(self.path, 0o666)
        self.socket.setblocking(False)
        self.heard: list[tuple[int, str]] = []
        self.deaf = False

    def close(self) -> None:
        """Remove the socket."""
        self.socket.close()
        self.folder.cleanup()

    def hear(self) -> None:
        """Take what has come: few lines fit into the socket, and who would write more waits."""
        while not self.deaf and select.select([self.socket], [], [], 0)[0]:
            # RFC 3164: <PRIORITY>Mmm dd hh:mm:ss TAG[PID]: TEXT
            priority, _, line = self.socket.recv(65536).decode().partition(">")
            text = line[len("Mmm dd hh:mm:ss ") :].rstrip("\n\0")
            self.heard.append((int(priority[1:]), text))

    def of(self, *starts: str, since: int = 0) -> list[tuple[int, str]]:
        """Return the priority and `TAG[PID]: TEXT` of each line whose `[PID]: TEXT` starts so.

        Of those heard so far the first `since` do not count.
        """
        self.hear()
        return [
            (priority, text)
            for priority, text in self.heard[since:]
            if text[text.find("[") :].startswith(starts)
        ]

    def show(self) -> None:
        """Give the calling process a /dev with this syslog, in a mount namespace of its own."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
            raise OSError(ctypes.get_errno(), "unshare")
        if libc.mount(b"tmpfs", b"/dev", b"tmpfs", 0, b"mode=755"):
            raise OSError(ctypes.get_errno(), "mount")
        umask = os.umask(0)
        os.mkdir("/dev/net", 0o755)
        for name, numbers in DEVICES.items():
            os.mknod(f"/dev/{name}", 0o666 | stat.S_IFCHR, os.makedev(*numbers))
        os.umask(umask)
        os.symlink(self.path, "/dev/log")


class Call:
    """A running hook. `pid` is its own, `caller` that of the process which called it."""

    def __init__(
        self,
        calls: Calls,
        tap: str,
        folder: Path,
        stdin: int,
        pid: int,
        caller: tuple[int, int] | None,
    ) -> None:
        self.calls = calls
        self.tap = tap
        self.heard = len(calls.syslog.heard)
        self.folder = folder
        self.stdin = stdin
        self.pid = pid
        self.caller = caller[0] if caller is not None else None
        self.answer = caller[1] if caller is not None else -1
        self.start = time.monotonic()

    def wait(self, *, keep_caller: bool = False) -> Ended:
        """Return how it ended; raise TimeoutError, and kill it, where it does not.

        With `keep_caller` the calling process goes on until `end_caller`.
        """
        ended = self._wait()
        seconds = time.monotonic() - self.start
        if not ended:
            os.kill(self.pid, signal.SIGKILL)
        told = os.read(self.answer, 20) if self.caller is not None else b""
        status = int(told) if told else os.waitpid(self.pid, 0)[1]
        if not keep_caller or not ended:
            self.end_caller()
        if not ended:
            raise TimeoutError(f"the hook does not end; it said: {self.stderr()}")
        taken = os.lseek(self.stdin, 0, os.SEEK_CUR)
        os.close(self.stdin)
        # NOTE: what the agent does for it, the agent tells syslog.
        agent = f"[{self.calls.hooks.agent_pid}]: {self.tap}: "
        log = self.calls.syslog.of(f"[{self.pid}]: ", agent, since=self.heard)
        code = os.waitstatus_to_exitcode(status)
        if code == BROKEN:
            raise RuntimeError(self.stderr())
        return Ended(
            code,
            (self.folder / "stdout").read_bytes(),
            self.stderr(),
            tuple(line for _, line in log),
            tuple(priority for priority, _ in log),
            seconds,
            taken,
        )

    def _wait(self) -> bool:
        """Tell whether it ends in time, and take what it says to syslog meanwhile."""
        syslog = self.calls.syslog
        handle = os.pidfd_open(self.pid)
        try:
            end = time.monotonic() + PATIENCE
            while True:
                left = max(0.0, end - time.monotonic())
                listened = [] if syslog.deaf else [syslog.socket.fileno()]
                ready = select.select([handle, *listened], [], [], left)[0]
                syslog.hear()
                if handle in ready or not ready:
                    return bool(ready)
        finally:
            os.close(handle)

    def wait_stopped(self) -> bool:
        """Wait until the hook has stopped itself, True, or has ended, False."""
        seen = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if seen is None or seen.si_code != os.CLD_STOPPED:
            return False
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)
        return True

    def go_on(self) -> None:
        """Let the hook that has stopped itself go on."""
        os.kill(self.pid, signal.SIGCONT)

    def end_caller(self) -> None:
        """Kill the calling process, where it is one of its own; may run twice."""
        if self.caller is not None:
            os.kill(self.caller, signal.SIGKILL)
            os.waitpid(self.caller, 0)
            os.close(self.answer)
            self.caller = None

    def stderr(self) -> str:
        """Return what the hook has said so far."""
        return (self.folder / "stderr").read_text(errors="surrogateescape")


class Calls:
    """Calls of the launchers of `hooks`; close it at the end."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self.syslog = Syslog(hooks.folder)
        self.number = 0

    def close(self) -> None:
        """Close the syslog."""
        self.syslog.close()
        # Other tests' orphans are not ours to wait for.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def up(self, tap: str, change: Change | None = None) -> Ended:
        """Run pyqemu-ifup on `tap` to its end; see `start`."""
        return self.start("pyqemu-ifup", tap, change=change).wait()

    def down(self, tap: str, change: Change | None = None) -> Ended:
        """Run pyqemu-ifdown on `tap` to its end; see `start`."""
        return self.start("pyqemu-ifdown", tap, change=change).wait()

    def start(
        self,
        program: str,
        *arguments: str,
        change: Change | None = None,
        caller: Change | None = None,
        execute: bool = False,
    ) -> Call:
        """Start a hook, called by this process; with `caller` by one of its own that runs it first.

        `change` is run in the hook's process before it begins. With `execute` it is the launcher,
        with the descriptors that are inheritable; else it runs in the forked process.
        """
        self.number += 1
        folder = self.hooks.folder / f"call-{self.number}"
        folder.mkdir()
        (folder / "stdin").write_bytes(MONITOR)
        stdin = os.open(folder / "stdin", os.O_RDONLY | os.O_CLOEXEC)
        words = [str(self.hooks.folder / program), *arguments]

        def hook() -> NoReturn:
            self._run(folder, stdin, words, change, execute)

        tap = readable(arguments[0]) if arguments else ""
        self.syslog.hear()
        if caller is None:
            return Call(self, tap, folder, stdin, _fork(hook), None)
        read_end, write_end = os.pipe()

        def called() -> NoReturn:
            os.close(write_end)
            hook()

        def between() -> NoReturn:
            os.close(read_end)
            caller()
            pid = _fork(called)
            os.write(write_end, b"%-20d" % pid)
            os.write(write_end, b"%-20d" % os.waitpid(pid, 0)[1])
            while True:
                signal.pause()

        # So that a hook whose caller has ended becomes a child of this process.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        parent = _fork(between)
        os.close(write_end)
        pid = int(os.read(read_end, 20))
        return Call(self, tap, folder, stdin, pid, (parent, read_end))

    def _run(
        self, folder: Path, stdin: int, words: list[str], change: Change | None, execute: bool
    ) -> NoReturn:
        environ = self.hooks.environ()
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(stdin, 0)
        self.syslog.show()
        os.environ.clear()
        os.environ.update(environ)
        # NOTE: what a client of the agent reads is what the process was started with.
        posix.environ.clear()
        posix.environ.update({os.fsencode(name): os.fsencode(environ[name]) for name in environ})
        signal.pthread_sigmask(signal.SIG_SETMASK, QEMU_BLOCKS)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        if change is not None:
            change()
        if execute:
            os.execv(words[0], words)
        sys.argv[:] = words
        down = "ifdown" in os.path.basename(words[0])
        status = pyqemu_ifd.thin.ask("pyqemu-ifdown" if down else "pyqemu-ifup")
        if status is None:
            status = pyqemu_ifdown.main.main() if down else pyqemu_ifup.main.main()
        os._exit(status)


def _fork(run: Callable[[], NoReturn]) -> int:
    """Run `run` in a forked process and return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(BROKEN)
    return pid


def on_ops(act: Callable[[int, LinkOp, bool], object]) -> Change:
    """Return a change: call `act` before (False) and after (True) each op, with its number from 0.

    Ops are counted at the door of those that change links, Netlink.run; an undo's are counted on.
    """
    counted = itertools.count()

    def change() -> None:
        run = Netlink.run

        def counting(
            links: Netlink, change: Callable[[Netlink], None], commands: Sequence[Command]
        ) -> None:
            op, number = cast(MethodType, change).__self__, next(counted)
            act(number, cast(LinkOp, op), False)
            run(links, change, commands)
            act(number, cast(LinkOp, op), True)

        setattr(Netlink, "run", counting)  # noqa: B010  mypy lets no method be assigned

    return change


def at_op(number: int, act: Callable[[], object], *, after: bool = False) -> Change:
    """Return a change: run `act` before, or right `after`, the hook's op of this number."""
    return on_ops(lambda n, op, done: act() if (n, done) == (number, after) else None)


def stop() -> None:
    """Stop the calling process, as `wait_stopped` sees it."""
    os.kill(os.getpid(), signal.SIGSTOP)
