"""The agent as our own child inside a namespace, and a client that speaks its wire."""

from __future__ import annotations

import array
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lab.hooks import SOURCE_ROOTS
from lab.netns import Namespace
from lab.warm import Warm

READY = 20.0
"""Seconds that an agent may take to start, and to end."""
PATIENCE = 60.0
"""Seconds after which an answer that does not come fails its test."""
VERSION = b"pyqemu-ifup/1"
MAIN = "from pyqemu_ifd.main import main; raise SystemExit(main())"
DESCRIPTORS = 64


class Agent:
    """An agent with a policy file and a socket of its own; a context manager.

    `before` is Python that it runs first: what a test changes in it. `limits` are options of
    prlimit(1). `users`: it is that of everybody but root, not root's.
    """

    warm: ClassVar[bool] = True
    """Whether it may be forked from an interpreter that has the libraries, and not be started."""
    tells: ClassVar[bool] = True
    """Whether what it has said is told though it has ended well."""

    def __init__(
        self,
        namespace: Namespace,
        policy: Path,
        *,
        before: str = "",
        limits: Sequence[str] = (),
        users: bool = False,
    ) -> None:
        self.users = users
        self.namespace = namespace
        self.policy = policy
        self.before = before
        self.limits = list(limits)
        self.wrapper: list[str] = []
        """What runs it, where that is not this process itself."""
        # NOTE: the path of a Unix socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="ifd-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.path = str(self.folder / "agent.sock")
        self.process: subprocess.Popen[Any] | Warm | None = None
        self.told: list[str] = []
        """What it has told its supervisor (sd_notify(3))."""
        self._supervisor = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._supervisor.bind(str(self.folder / "notify"))

    def __enter__(self) -> Agent:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The running agent's process id."""
        assert self.process is not None, "the agent is not running"
        return self.process.pid

    @property
    def code(self) -> str:
        """The Python that it runs."""
        return f"import sys; sys.path[:0] = {list(SOURCE_ROOTS)!r}\n{self.before}\n{MAIN}"

    @property
    def arguments(self) -> list[str]:
        """Its arguments."""
        users = ["--users"] if self.users else []
        return ["--policy", str(self.policy), "--socket", self.path, *users]

    def argv(self) -> list[str]:
        """Return the command that runs it."""
        limits = ["/usr/bin/prlimit", *self.limits] if self.limits else []
        return [*self.wrapper, *limits, sys.executable, "-I", "-c", self.code, *self.arguments]

    def start(self, *, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()) -> None:
        """Start it and return when it serves. Raises RuntimeError where it ends instead."""
        assert self.process is None, "the agent is running"
        environ = {**os.environ, "NOTIFY_SOCKET": str(self.folder / "notify"), **(env or {})}
        self.told.clear()
        if self.wrapper or self.limits or pass_fds or not self.warm:
            self.process = self.namespace.popen(self.argv(), env=environ, pass_fds=pass_fds)
        else:
            with self.namespace.enter():
                self.process = Warm(self.code, self.arguments, environ)
        self.wait_told("READY=1")

    def wait_told(self, state: str) -> None:
        """Wait until it has told its supervisor `state`. Raises RuntimeError where it ends."""
        handle = os.pidfd_open(self.pid)
        try:
            while state not in self.told:
                listened = self._supervisor.fileno()
                ready = select.select([listened, handle], [], [], READY)[0]
                if listened in ready:
                    self.told.append(self._supervisor.recv(4096).decode())
                elif ready:
                    raise RuntimeError(f"the agent has ended with {self.wait()}")
                else:
                    raise TimeoutError(f"the agent does not tell {state}")
        finally:
            os.close(handle)

    def wait_stopped(self) -> None:
        """Return when it has stopped itself. Raises TimeoutError."""
        end = time.monotonic() + PATIENCE
        stat = Path(f"/proc/{self.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            if time.monotonic() > end:
                raise TimeoutError("the agent does not stop")
            time.sleep(0.005)

    def wait(self) -> int:
        """Wait for its end and return its exit status, negative the signal; its words are told."""
        assert self.process is not None, "the agent is not running"
        _, said = self.process.communicate(timeout=READY)
        status = self.process.returncode
        assert status is not None
        self.process = None
        if said and (status or self.tells):
            sys.stderr.write(said)
        return int(status)

    def stop(self) -> int:
        """Have it end in good order (SIGTERM) and return its exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill it (SIGKILL) and return when it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """End it, where it runs, and remove its folder."""
        try:
            if self.process is not None:
                self.process.terminate()
                try:
                    self.wait()
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.wait()
        finally:
            self._supervisor.close()
            shutil.rmtree(self.folder)

    def connect(self) -> Client:
        """Return a client that is connected."""
        return Client(self.path)

    def ask(self, *fields: str, descriptors: Sequence[int] | None = None) -> Answer:
        """Ask for something and return the whole answer; see `Client.ask`."""
        with self.connect() as client:
            client.ask(*fields, descriptors=descriptors, namespace=self.namespace)
            return client.answer()

    def up(self, tap: str, network: str = "", *, descriptor: int | None = None) -> Answer:
        """Have this process's tap attached."""
        return self.ask("up", tap, network, "", descriptors=_or_none(descriptor))

    def down(self, tap: str, *, descriptor: int | None = None) -> Answer:
        """Have a tap detached."""
        return self.ask("down", tap, "", descriptors=_or_none(descriptor))

    def report(self) -> dict[str, Any]:
        """Return what it tells of itself."""
        answer = self.ask("agent")
        assert answer.status == 0, answer
        report: dict[str, Any] = json.loads(answer.data)
        return report


def _or_none(descriptor: int | None) -> list[int] | None:
    return None if descriptor is None else [descriptor]


@dataclass
class Answer:
    """What the agent has answered: `status` None where it hung up without one.

    `seconds` is the deadline that it gave, `elsewhere` why it is not for it.
    """

    status: int | None = None
    lines: list[str] = field(default_factory=list)
    data: bytes = b""
    seconds: int | None = None
    elsewhere: str | None = None
    tap: str | None = None
    descriptors: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close the descriptors that came with it."""
        while self.descriptors:
            os.close(self.descriptors.pop())


class Client:
    """One connection to the agent; a context manager."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE)
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.socket.connect(path)
                return
            except BlockingIOError:
                # NOTE: so many wait for the agent that there is no room for one more (unix(7)).
                if time.monotonic() > end:
                    self.socket.close()
                    raise
                time.sleep(0.01)
            except BaseException:
                self.socket.close()
                raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def ask(
        self,
        *fields: str,
        descriptors: Sequence[int] | None = None,
        namespace: Namespace | None = None,
    ) -> None:
        """Send a request of these fields, with `descriptors`.

        Without any it comes with that of `namespace`, but `agent`, which takes none.
        """
        request = b"\0".join([VERSION, *map(os.fsencode, fields)])
        if descriptors is not None or fields[:1] == ("agent",):
            self.send(request, descriptors or ())
            return
        path = namespace.path if namespace is not None else "/proc/thread-self/ns/net"
        place = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.send(request, [place])
        finally:
            os.close(place)

    def send(self, packet: bytes, descriptors: Iterable[int] = ()) -> None:
        """Send one packet as it is."""
        rights = array.array("i", descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        self.socket.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)

    def stop(self) -> None:
        """Say that no more is wanted; the answer is still to come."""
        self.socket.shutdown(socket.SHUT_WR)

    def packet(self) -> tuple[bytes, list[int]]:
        """Return the next packet and its descriptors; an empty one at the end."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 20, DESCRIPTORS)
            except ConnectionResetError:
                # NOTE: told once and first; what the agent had sent is still to be read.
                continue
            return data, descriptors

    def answer(self) -> Answer:
        """Return the whole answer."""
        answer = Answer()
        while answer.status is None and answer.elsewhere is None:
            packet, descriptors = self.packet()
            answer.descriptors += descriptors
            kind, text = packet[:1], packet[1:]
            if not packet:
                break
            if kind == b"!":
                answer.seconds = int(text)
            elif kind == b"-":
                answer.lines.append(text.decode("ascii"))
            elif kind == b"+":
                answer.data += text
            elif kind == b">":
                answer.tap = text.decode("ascii")
            elif kind == b"?":
                answer.elsewhere = text.decode("ascii")
            else:
                assert kind == b"=", packet
                answer.status = int(text)
        return answer
