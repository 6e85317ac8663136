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


def _wait(
    connection: _socket.socket, queues: int, parent: int | None, start: float
) -> tuple[str, list[int]]:
    """Take the answer's packets until its end. Raises NoTap; then no descriptor is left open."""
    told: list[str] = []
    name, descriptors = "", list[int]()
    seconds, accepted = ACCEPT, False
    try:
        while True:
            if parent is not None and os.getppid() != parent:
                raise NoTap(TRY_AGAIN, f"stopped: the calling process {parent} has ended")
            if time.monotonic() > start + seconds:
                raise NoTap(
                    TRY_AGAIN,
                    f"the agent does not answer: waited {seconds:g} s; "
                    f"{'see ' + ifctl('agent') if accepted else 'try again'}",
                )
            kind, said, came = _receive(connection)
            descriptors += came
            text = os.fsdecode(said)
            if kind == b"":
                raise NoTap(TRY_AGAIN, "the agent has gone; try again")
            if kind == b"!" and text.isdigit():
                seconds, start, accepted = int(text) + MARGIN, time.monotonic(), True
            elif kind == b"-":
                told.append(text)
            elif kind == b">":
                name = text
            elif kind == b"?":
                raise NoTap(
                    DENIED,
                    f"the agent is not for this process: {text}; run QEMU where the agent runs",
                )
            elif kind == b"=" and text.isdigit():
                if text != "0":
                    raise NoTap(int(text), "" if told else "the agent does not say why", (*told,))
                if not name or len(descriptors) != queues:
                    raise NoTap(
                        REFUSED,
                        f"the agent gave {len(descriptors)} descriptors for "
                        f"{queues} queues; see whether more files may be open",
                    )
                return name, descriptors
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _receive(connection: _socket.socket) -> tuple[bytes, bytes, list[int]]:
    """Return the next packet as `receive`; its kind is a space if none has come in time."""
    try:
        return receive(connection, SLICE, QUEUES_MAX)
    except (TimeoutError, ConnectionResetError):
        # NOTE: a reset is told once and first; what the agent sent is still to be read.
        return b" ", b"", []
