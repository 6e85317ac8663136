"""A question to the kernel over netlink(7), in messages that the library has no part in."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from pyqemu_ifup.drivers.links import (
    MESSAGE_MAX,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSGHDR,
    messages,
    read_error,
)
from pyqemu_ifup.manners import waiting_for


class NetlinkSocket:
    """A socket for a netlink family, such as NETLINK_ROUTE; a context manager."""

    def __init__(self, family: int) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family
        )
        self._sequence = 0

    def __enter__(self) -> NetlinkSocket:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def ask(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        """Ask; return the body of each message that is told. Raises OSError as the kernel answers.

        `flags` have NLM_F_ACK or NLM_F_DUMP, by which the answer has an end.
        """
        return [each for told in self.asking(kind, flags, body) for each in told]

    def asking(self, kind: int, flags: int, body: bytes) -> Iterator[list[bytes]]:
        """Do as `ask`, a packet of the answer at a time: of a dump, the kernel makes each then."""
        self._sequence += 1
        length = NLMSGHDR.size + len(body)
        header = NLMSGHDR.pack(length, kind, NLM_F_REQUEST | flags, self._sequence, 0)
        self._socket.send(header + body)
        while True:
            with waiting_for("the kernel does not answer over netlink"):
                data = self._socket.recv(MESSAGE_MAX)
            told: list[bytes] = []
            for answer, _, sequence, begin, end in messages(data):
                if sequence != self._sequence:
                    continue
                if answer in (NLMSG_ERROR, NLMSG_DONE):
                    code = read_error(data, begin)
                    if code:
                        raise OSError(code, os.strerror(code))
                    yield told
                    return
                told.append(data[begin:end])
            yield told
