"""The client's side of the agents' wire: a connection, a request, the packets of an answer.

docs/agent.md has what they say. Imports nothing but what the interpreter has loaded anyway, and
small C modules: QEMU waits.
"""

from __future__ import annotations

import _socket
import _struct
import os
import sys

from pyqemu_ifup.agent import WIRE

PACKET_MAX = 1 << 20
"""Bytes of a packet that is taken whole."""
QUEUES_MAX = 64
"""Queues of one tap: their descriptors go in one packet, of at most 253 (SCM_MAX_FD)."""


def open_socket(seconds: float) -> _socket.socket:
    """Return a socket for an agent, which has so many seconds to take it, and each request.

    Raises OSError as socket(2).
    """
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    # NOTE: while the agent's queue is full, connect(2) waits that long; it would not with a timeout
    # of Python's.
    limit = _struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, limit)
    return connection


def connect(connection: _socket.socket, path: str) -> None:
    """Connect to the agent at `path`; if that fails the socket is closed.

    Raises OSError as connect(2), with EAGAIN if the agent does not take it in time, and ValueError
    if no file can have such a path.
    """
    try:
        connection.connect(os.fsencode(path))
    except BaseException:
        connection.close()
        raise


def send(connection: _socket.socket, *words: str, descriptor: int | None = None) -> None:
    """Send a request: a verb and what belongs to it, and a descriptor if it takes one.

    Raises OSError as sendmsg(2).
    """
    request = b"\0".join(os.fsencode(word) for word in (WIRE, *words))
    rights = []
    if descriptor is not None:
        data = descriptor.to_bytes(4, sys.byteorder)
        rights.append((_socket.SOL_SOCKET, _socket.SCM_RIGHTS, data))
    connection.sendmsg([request], rights, _socket.MSG_NOSIGNAL)


def receive(
    connection: _socket.socket, seconds: float, most: int = 0
) -> tuple[bytes, bytes, list[int]]:
    """Return the next packet, its kind and what it says, and the descriptors with it.

    The kind is empty if the agent has hung up. Of the descriptors `most` are taken. Raises
    TimeoutError after so many seconds, and OSError as recvmsg(2).
    """
    connection.settimeout(seconds)
    room = _socket.CMSG_SPACE(4 * most) if most else 0
    packet, ancillary, _, _ = connection.recvmsg(PACKET_MAX, room, _socket.MSG_CMSG_CLOEXEC)
    descriptors = [
        int.from_bytes(data[at : at + 4], sys.byteorder)
        for level, kind, data in ancillary
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS)
        for at in range(0, len(data) - len(data) % 4, 4)
    ]
    return packet[:1], packet[1:], descriptors
