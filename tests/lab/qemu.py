"""A real QEMU without a guest: started, asked over QMP, stopped, and what it said.

NOTE: the QMP client here is our own, since qemu.qmp speaks asyncio over sockets only, and the
tests want the very bytes that come out of QEMU's stdout when QMP is on stdio.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from lab.needs import QEMU
from lab.netns import RUN_NETNS, entered

PATIENCE = 60.0
"""Seconds that QEMU, with the scripts that it runs, may take for one step."""


class QmpError(Exception):
    """QMP answered with an error; `str()` is its description."""


class Qemu:
    """One QEMU process; a context manager that kills it where it still runs at the end.

    `args` follow the machine's own options; a name with bytes that are no text is given as
    os.fsdecode makes it. `qmp` is where QMP goes: "stdio", "socket" (a socket pair, which works
    with -daemonize too), or None. `netns` is the name of the network namespace to run in,
    `prefix` a command that executes the one that follows it, `setpriv` say, `program` another QEMU
    than the machine's. Machine "none" starts
    fastest, but takes no -device.
    """

    def __init__(
        self,
        *args: str,
        netns: str | None = None,
        qmp: Literal["stdio", "socket"] | None = "stdio",
        machine: str = "none",
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        program: str = QEMU,
    ) -> None:
        self.argv = [*prefix, program, "-M", machine, "-accel", "tcg", "-nodefaults"]
        self.argv += ["-display", "none"]
        self.qmp = qmp
        self.events: list[dict[str, Any]] = []
        self._out = tempfile.TemporaryFile()
        self._err = tempfile.TemporaryFile()
        self._greeting: dict[str, Any] | None = None
        self._heard = bytearray()
        self._unread = b""
        self._ended = False
        self._socket: socket.socket | None = None
        theirs: socket.socket | None = None
        if qmp == "stdio":
            self.argv += ["-qmp", "stdio"]
        elif qmp == "socket":
            self._socket, theirs = socket.socketpair()
            self.argv += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}"]
            self.argv += ["-mon", "chardev=qmp,mode=control"]
        self.argv += args
        with entered(RUN_NETNS / netns) if netns is not None else nullcontext():
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE if qmp == "stdio" else subprocess.DEVNULL,
                stdout=subprocess.PIPE if qmp == "stdio" else self._out,
                stderr=self._err,
                pass_fds=[] if theirs is None else [theirs.fileno()],
                cwd=cwd,
                env=None if env is None else {**os.environ, **env},
            )
        if theirs is not None:
            theirs.close()

    def __enter__(self) -> Qemu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        for file in (self._out, self._err, self._socket, self.process.stdin, self.process.stdout):
            if file is not None:
                file.close()

    @property
    def pid(self) -> int:
        """The process id; with -daemonize, that of the one which ends at once."""
        return self.process.pid

    @property
    def stdout(self) -> bytes:
        """All that QEMU and its scripts have written to stdout, as far as it is read here."""
        return bytes(self._heard) if self.qmp == "stdio" else _contents(self._out)

    @property
    def stderr(self) -> str:
        """All that QEMU and its scripts have written to stderr up to now."""
        return _contents(self._err).decode(errors="surrogateescape")

    @property
    def greeting(self) -> dict[str, Any]:
        """QMP's greeting, waited for: all options are done then, each up script has ended.

        Raises EOFError with QEMU's stderr where it ends before.
        """
        if self._greeting is None:
            self._greeting = self._receive("QMP")
            self._ask("qmp_capabilities", {})
        return self._greeting

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run a QMP command to its end and return its result; raise QmpError, EOFError."""
        assert self.greeting
        return self._ask(command, arguments or {})

    def hmp(self, line: str) -> str:
        """Run a line of the human monitor and return what it prints."""
        text: str = self.execute("human-monitor-command", {"command-line": line})
        return text

    def quit(self) -> int:
        """End QEMU as the monitor's `quit` does and return its exit status."""
        self.execute("quit")
        return self.wait()

    def signal(self, number: signal.Signals) -> int:
        """Send a signal that ends QEMU; return its exit status, the signal's number negative."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for QEMU's own end and return its exit status, a signal's number negative.

        Raises TimeoutError. A child of QEMU that holds stdout open is not waited for.
        """
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            end = os.pidfd_open(self.pid)
            try:
                ready = _readable([end, *self._stdout()], deadline)
            finally:
                os.close(end)
            if end not in ready:
                self._read()
        while self._stdout() and _readable(self._stdout()):
            self._read()
        return self.process.returncode

    def _stdout(self) -> list[int]:
        """Return the descriptor of QEMU's stdout, where that is read here and not at its end."""
        return [self._source()] if self.qmp == "stdio" and not self._ended else []

    def _source(self) -> int:
        """Return the descriptor that QMP's answers come from."""
        file = self._socket or self.process.stdout
        assert file is not None, "this QEMU has no QMP"
        return file.fileno()

    def _read(self) -> bytes:
        """Read what is there on the QMP descriptor; empty at its end."""
        chunk = os.read(self._source(), 65536)
        self._unread += chunk
        self._ended = not chunk
        if self.qmp == "stdio":
            self._heard += chunk
        return chunk

    def _receive(self, *keys: str) -> dict[str, Any]:
        """Return the next QMP object with one of `keys`; events are kept, other lines skipped."""
        deadline = time.monotonic() + PATIENCE
        while True:
            while b"\n" not in self._unread:
                _readable([self._source()], deadline)
                if not self._read():
                    raise EOFError(f"QEMU ended {self.wait()}: {self.stderr}")
            line, _, self._unread = self._unread.partition(b"\n")
            try:
                answer = json.loads(line)
            except ValueError:
                # What a script wrote to stdout, which is QEMU's.
                continue
            if "event" in answer:
                self.events.append(answer)
            elif any(key in answer for key in keys):
                found: dict[str, Any] = answer
                return found

    def _ask(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Send one QMP command and return its result."""
        line = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        try:
            if self._socket is not None:
                self._socket.sendall(line)
            else:
                assert self.process.stdin is not None, "this QEMU has no QMP"
                self.process.stdin.write(line)
                self.process.stdin.flush()
        except BrokenPipeError:
            raise EOFError(f"QEMU ended {self.wait()}: {self.stderr}") from None
        answer = self._receive("return", "error")
        if "error" in answer:
            raise QmpError(answer["error"]["desc"])
        return answer["return"]


def end_daemon(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that is not our child and wait for its end; raise TimeoutError."""
    end = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(end, number)
        _readable([end], time.monotonic() + PATIENCE)
    finally:
        os.close(end)


def _readable(fds: Sequence[int], deadline: float | None = None) -> list[int]:
    """Return those of `fds` that can be read, at once or when the first can before `deadline`.

    Raises TimeoutError where none can until then.
    """
    timeout = 0.0 if deadline is None else max(0.0, deadline - time.monotonic())
    ready, _, _ = select.select(fds, [], [], timeout)
    if not ready and deadline is not None:
        raise TimeoutError(f"QEMU: nothing came in {PATIENCE:g} s")
    return ready


def _contents(file: Any) -> bytes:
    """Return all of a file that somebody else may still write to."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0)


def tell(path: Path, *commands: tuple[str, Mapping[str, Any]]) -> None:
    """Run QMP commands, and their arguments, at the unix socket of a QEMU in the background."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE)
        peer.connect(str(path))
        with peer.makefile("rw") as lines:
            assert "QMP" in json.loads(lines.readline())
            for command, arguments in (("qmp_capabilities", {}), *commands):
                lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
                lines.flush()
                while "event" in (answer := json.loads(lines.readline())):
                    pass
                assert "return" in answer, answer
