"""netlink(7): its messages and attributes, and a socket that asks the kernel.

Layouts: linux/netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TypeVar

from pyqemu_ifup.hook import waiting_for

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x200, 0x400, 0x800
NLMSGHDR, RTATTR, S32 = struct.Struct("IHHII"), struct.Struct("HH"), struct.Struct("i")
NLA_TYPE_MASK = 0x3FFF
NETLINK_NETFILTER = 12
NFGENMSG = struct.Struct("!BBH")
"""linux/netfilter/nfnetlink.h."""
SO_RCVBUFFORCE = 33
EVENT_BUFFER = 1 << 20
"""Bytes of events that may wait: some 500 links at once."""
MESSAGE_MAX = 1 << 17
ATTEMPTS = 20
"""How often what others change meanwhile is dumped anew."""
T = TypeVar("T")


def malformed() -> OSError:
    """Return what is raised of a message that is cut, or lacks what each of its kind has."""
    return kernel_error(errno.EBADMSG)


def reads_message(read: Callable[..., T]) -> Callable[..., T]:
    """Have what a function finds missing in a message raised as OSError, EBADMSG."""

    @wraps(read)
    def checked(*arguments: object) -> T:
        try:
            return read(*arguments)
        except (struct.error, KeyError, IndexError, ValueError) as error:
            raise malformed() from error

    return checked


def messages(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield each message of netlink(7) in a packet.

    That is its type, flags and sequence, and where its body begins and ends. Raises OSError,
    EBADMSG, where one is cut.
    """
    at = 0
    while at + NLMSGHDR.size <= len(data):
        length, kind, flags, sequence, _ = NLMSGHDR.unpack_from(data, at)
        if length < NLMSGHDR.size or at + length > len(data):
            raise malformed()
        yield kind, flags, sequence, at + NLMSGHDR.size, at + length
        at += (length + 3) & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute as a message has it."""
    return RTATTR.pack(RTATTR.size + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes that stand one behind another, by type."""
    return attributes_between(data, 0, len(data))


def attributes_between(data: bytes, at: int, end: int) -> dict[int, bytes]:
    """Return the attributes between two places, by type."""
    return dict(each_attribute(data, at, end))


def each_attribute(data: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the attributes between two places: the type, which may come again, and the value."""
    while at + RTATTR.size <= end:
        length, kind = RTATTR.unpack_from(data, at)
        if length < RTATTR.size:
            break
        yield kind & NLA_TYPE_MASK, data[at + RTATTR.size : at + length]
        at += (length + 3) & ~3


@reads_message
def read_error(data: bytes, body: int) -> int:
    """Return the error number of an NLMSG_ERROR or NLMSG_DONE, 0 for none."""
    code: int = -S32.unpack_from(data, body)[0]
    return code


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
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def ask(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        """Ask; return the body of each message that is told. Raises OSError as the kernel answers.

        `flags` have NLM_F_ACK or NLM_F_DUMP, by which the answer has an end.
        """
        return [each for data in self.packets(kind, flags, body) for each in bodies(data)]

    def ask_one(self, kind: int, body: bytes) -> bytes:
        """Ask for one thing, which is told in one message; return its body. Raises OSError."""
        self._socket.send(self.pack(kind, 0, body))
        while True:
            data = self._receive()
            for answer, _, sequence, begin, end in messages(data):
                if sequence == self._sequence:
                    if answer == NLMSG_ERROR:
                        raise kernel_error(read_error(data, begin))
                    return data[begin:end]

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Ask for all that there is; return the packets of the answer, for `messages`, `bodies`.

        Raises OSError as the kernel answers, EBUSY where what is asked for never stands still.
        """
        for _ in range(ATTEMPTS):
            found = list(self.packets(kind, NLM_F_DUMP, body))
            # NOTE: a dump that something was changed under may lack a thing, or have one twice.
            if all(_stood_still(data) for data in found):
                return found
        raise kernel_error(errno.EBUSY)

    def packets(self, kind: int, flags: int, body: bytes) -> Iterator[bytes]:
        """Ask, as `ask`; yield each packet of the answer: of a dump, the kernel makes it then."""
        self._socket.send(self.pack(kind, flags, body))
        done = False
        while not done:
            data = self._receive()
            is_answer = False
            for answer, _, sequence, begin, _ in messages(data):
                if sequence != self._sequence:
                    continue
                is_answer = True
                if answer in (NLMSG_ERROR, NLMSG_DONE):
                    code = read_error(data, begin)
                    if code:
                        raise kernel_error(code)
                    done = True
            if is_answer:
                yield data

    def pack(self, kind: int, flags: int, body: bytes) -> bytes:
        """Return a message, which has the next number of this socket's."""
        self._sequence += 1
        length = NLMSGHDR.size + len(body)
        return NLMSGHDR.pack(length, kind, NLM_F_REQUEST | flags, self._sequence, 0) + body

    def send_batch(self, parts: list[bytes]) -> list[tuple[int, int]]:
        """Send messages of `pack` at once; return each that is answered, its place and the error.

        The error is 0 for none. Places begin with 0.
        """
        first = self._sequence - len(parts) + 1
        self._socket.send(b"".join(parts))
        found: list[tuple[int, int]] = []
        while True:
            try:
                # NOTE: the kernel has answered all when send() returns.
                data = self._socket.recv(MESSAGE_MAX, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            for kind, _, sequence, begin, _ in messages(data):
                if kind == NLMSG_ERROR and sequence >= first:
                    found.append((sequence - first, read_error(data, begin)))

    def _receive(self) -> bytes:
        with waiting_for("the kernel does not answer over netlink"):
            return self._socket.recv(MESSAGE_MAX)


class Subscription:
    """A socket to which the kernel tells what happens, by the groups of a netlink family."""

    def __init__(self, family: int, groups: int) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, family
        )
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, EVENT_BUFFER)
            self._socket.bind((0, groups))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor that turns readable with an event."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()

    def packets(self) -> Iterator[bytes | None]:
        """Yield each packet that has come since; None where some were lost (ENOBUFS)."""
        while True:
            try:
                data = self._socket.recv(EVENT_BUFFER)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield None
                continue
            yield data


def bodies(data: bytes) -> Iterator[bytes]:
    """Yield the body of each message in a packet, but of those that end an answer."""
    for kind, _, _, begin, end in messages(data):
        if kind not in (NLMSG_ERROR, NLMSG_DONE):
            yield data[begin:end]


def _stood_still(data: bytes) -> bool:
    return not any(flags & NLM_F_DUMP_INTR for _, flags, *_ in messages(data))


def kernel_error(code: int) -> OSError:
    """Return the error with a number of errno(3)'s."""
    return OSError(code, os.strerror(code))
