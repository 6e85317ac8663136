"""Asks the agent for a tap (docs/agent.md): the wire's `tap`, from the client's side.

Imports nothing but what the interpreter has loaded anyway, and small C modules: QEMU waits.
"""

from __future__ import annotations

import _socket
import errno
import os
import time

from pyqemu_ifconf.shell import ifctl, readable, sh
from pyqemu_ifup.agent import SOCKET_VARIABLE, USERS_UNIT
from pyqemu_ifup.agent import find_socket as find_agent
from pyqemu_ifup.wire import QUEUES_MAX, connect, open_socket, receive, send

SLICE = 0.25
"""Seconds of the longest wait: the end of the parent turns no descriptor ready."""
ACCEPT = 2.0
"""Seconds in which the agent must take the connection, and then the request."""
MARGIN = 3.0
"""Seconds beyond the agent's own deadline in which it may still answer."""
UNAVAILABLE, TRY_AGAIN, DENIED, REFUSED = 69, 75, 77, 71
"""Exit statuses, as pyqemu_ifconf.failure.Status has them, which costs too much to import."""


class NoTap(Exception):
    """The agent gives no tap: the exit status, and the lines that say why.

    `told` lines are the agent's own, to be written as they are; `text` is ours.
    """

    def __init__(self, status: int, text: str = "", told: tuple[str, ...] = ()) -> None:
        super().__init__(status, text, told)
        self.status = status
        self.text = text
        self.told = told


class NoAgent(NoTap):
    """There is no agent (69)."""


def find_socket() -> str:
    """Return the path of the agent's socket. Raises NoAgent if none is wanted."""
    path = find_agent()
    if not path:
        raise NoAgent(
            UNAVAILABLE,
            f"no agent: {SOCKET_VARIABLE} is empty; unset it, or name the socket of pyqemu-ifd",
        )
    return path


def ask_for_tap(
    path: str,
    network: str,
    name: str,
    queues: int,
    *,
    vnet_hdr: bool,
    for_parent: bool,
    mac: str = "",
) -> tuple[str, list[int]]:
    """Have the agent at `path` make a tap on `network`; return its name and its descriptors.

    `name` may be empty, and `mac`, that of the guest's device. `for_parent`: the tap is for the
    process that started this one, and its end ends the request. Raises NoTap, NoAgent if none
    listens there.
    """
    parent = os.getppid() if for_parent else None
    start = time.monotonic()
    connection = _connect(path)
    try:
        _send(
            connection,
            [
                network,
                name,
                str(queues),
                "vnet_hdr" if vnet_hdr else "",
                "parent" if for_parent else "",
                *([mac] if mac else []),
            ],
        )
        return _wait(connection, queues, parent, start)
    finally:
        connection.close()


def _connect(path: str) -> _socket.socket:
    connection = open_socket(ACCEPT)
    try:
        connect(connection, path)
    except (ValueError, OSError) as error:
        code = getattr(error, "errno", None)
        why = os.strerror(code) if code else str(error)
        if code in (errno.EACCES, errno.EPERM):
            raise NoTap(DENIED, f"{readable(path)}: {why}; ask who keeps the agent") from error
        if code in (None, errno.EAGAIN):
            raise NoTap(
                TRY_AGAIN,
                f"the agent at {readable(path)} does not answer: {why}; see {ifctl('agent')}",
            ) from error
        unit = "pyqemu-ifd.socket" if os.geteuid() == 0 else USERS_UNIT
        raise NoAgent(
            UNAVAILABLE,
            f"no agent at {readable(path)}: {why}; start one: " + sh("systemctl", "start", unit),
        ) from error
    return connection


def _send(connection: _socket.socket, fields: list[str]) -> None:
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        send(connection, "tap", *fields, descriptor=namespace)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            raise
        raise NoTap(
            TRY_AGAIN, "the agent refuses the connection: it has too many of yours; try again"
        ) from error
    finally:
        os.close(namespace)


class _Answer:
    """What the agent has sent of its answer so far, and until when it may send more."""

    def __init__(self, queues: int, start: float) -> None:
        self.queues = queues
        self.told: list[str] = []
        self.name = ""
        self.descriptors: list[int] = []
        self._start, self._seconds, self._accepted = start, ACCEPT, False

    def check(self, parent: int | None) -> None:
        """Raise NoTap if the process that asks has ended, or the time is up."""
        if parent is not None and os.getppid() != parent:
            raise NoTap(TRY_AGAIN, f"stopped: the calling process {parent} has ended")
        if time.monotonic() > self._start + self._seconds:
            raise NoTap(
                TRY_AGAIN,
                f"the agent does not answer: waited {self._seconds:g} s; "
                f"{'see ' + ifctl('agent') if self._accepted else 'try again'}",
            )

    def take(self, kind: bytes, text: str) -> bool:
        """Take in one packet; tell whether it is the last, and the tap is there. Raises NoTap."""
        if kind == b"":
            raise NoTap(TRY_AGAIN, "the agent has gone; try again")
        if kind == b"!" and text.isdigit():
            self._start, self._seconds, self._accepted = time.monotonic(), int(text) + MARGIN, True
        elif kind == b"-":
            self.told.append(text)
        elif kind == b">":
            self.name = text
        elif kind == b"?":
            raise NoTap(
                DENIED, f"the agent is not for this process: {text}; run QEMU where the agent runs"
            )
        elif kind == b"=" and text.isdigit():
            self._end(text)
            return True
        return False

    def _end(self, status: str) -> None:
        """Raise NoTap unless the agent has given all that was asked for."""
        if status != "0":
            text = "" if self.told else "the agent does not say why"
            raise NoTap(int(status), text, (*self.told,))
        if not self.name or len(self.descriptors) != self.queues:
            raise NoTap(
                REFUSED,
                f"the agent gave {len(self.descriptors)} descriptors for "
                f"{self.queues} queues; see whether more files may be open",
            )


def _wait(
    connection: _socket.socket, queues: int, parent: int | None, start: float
) -> tuple[str, list[int]]:
    """Take the answer's packets until its end. Raises NoTap; then no descriptor is left open."""
    answer = _Answer(queues, start)
    try:
        while True:
            answer.check(parent)
            kind, said, came = _receive(connection)
            answer.descriptors += came
            if answer.take(kind, os.fsdecode(said)):
                return answer.name, answer.descriptors
    except BaseException:
        for descriptor in answer.descriptors:
            os.close(descriptor)
        raise


def _receive(connection: _socket.socket) -> tuple[bytes, bytes, list[int]]:
    """Return the next packet as `receive`; its kind is a space if none has come in time."""
    try:
        return receive(connection, SLICE, QUEUES_MAX)
    except (TimeoutError, ConnectionResetError):
        # NOTE: a reset is told once and first; what the agent sent is still to be read.
        return b" ", b"", []
