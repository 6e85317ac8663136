"""One client of an agent, as the loop has it: who it is, its request, and what it is told."""

from __future__ import annotations

import errno
import socket
import time
from dataclasses import dataclass

from pyqemu_ifconf.shell import printable
from pyqemu_ifd import wire

LINE_MAX = 2000
"""Bytes of one line that a client is told."""
_GONE = (
    errno.EPIPE,
    errno.ECONNRESET,
    errno.EAGAIN,
    errno.ENOTCONN,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EMSGSIZE,
)
"""How a packet fails that a client does not get: it has gone, does not read, or has no room."""


@dataclass(eq=False)
class Connection:
    """One client: its socket, who it is, and what becomes of its request."""

    socket: socket.socket
    peer: wire.Peer
    since: float
    request: wire.Request | None = None
    stopped: str | None = None
    heard: bool = True
    """Whether the loop listens to it."""
    in_line: float | None = None
    """The seconds that its request may take once its turn has come, None from then on."""
    told: float = 0.0
    """When it was told so last."""

    def send(self, packet: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """Send one packet; a client that has gone, or that does not read, stops its request."""
        try:
            if descriptors:
                socket.send_fds(self.socket, [packet], list(descriptors))
            else:
                self.socket.send(packet)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self.stopped = self.stopped or "the client has hung up"

    def allow(self, seconds: float) -> None:
        """Tell that its request is done, or has failed, in `seconds` from now."""
        self.told = time.monotonic()
        self.send(b"!%d" % seconds)

    def stand_in_line(self, seconds: float) -> None:
        """Tell the same, and go on telling until `begin`: its request waits for others."""
        self.in_line = seconds
        self.allow(seconds)

    def begin(self) -> None:
        """Note that the turn of its request has come."""
        self.in_line = None

    def why_stopped(self) -> str | None:
        """Return why its request must stop, None where it need not, as it is this very moment."""
        # NOTE: the loop may not have heard yet: whoever waits in vain does the work himself, and
        # what is done then must not be done to it once more.
        try:
            if self.stopped is None:
                self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                self.stopped = "the client has hung up"
        except BlockingIOError:
            return None
        except ConnectionResetError:
            self.stopped = "the client has hung up"
        return self.stopped

    def say(self, line: str) -> None:
        """Send one line for standard error."""
        self.send(b"-" + printable(line).encode("ascii")[:LINE_MAX])
