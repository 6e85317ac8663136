"""The agent's wire: what a request is made of, and the packets of an answer. docs/agent.md."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
import time
from array import array
from dataclasses import dataclass
from io import FileIO
from typing import Literal

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.agent import REQUEST_MAX, WIRE
from pyqemu_ifup.drivers.tun import is_persistent
from pyqemu_ifup.hook import read_tap_name
from pyqemu_ifup.system.holders import TUNGETDEVNETNS
from pyqemu_ifup.system.lock import index_of

VERSION = WIRE.encode()
NS_GET_NSTYPE = 0xB703
"""_IO(0xb7, 3) of linux/nsfs.h."""
CLONE_NEWNET = 0x40000000
DESCRIPTORS_MAX = 2
"""The most that are taken from one packet: one more than any request comes with."""
WRONG_DESCRIPTOR = "its descriptor is neither a tap's nor a network namespace's"
_CREDENTIALS = struct.Struct("iII")
SO_PEERPIDFD = 77
"""Of asm-generic/socket.h, since Linux 6.5."""

Verb = Literal["up", "down", "tap", "agent"]
FIELDS: dict[Verb, int] = {"up": 3, "down": 2, "tap": 5, "agent": 0}
"""How many fields follow each verb."""
OPTIONAL: dict[Verb, int] = {"tap": 1}
"""How many more may follow it."""


@dataclass(frozen=True)
class Peer:
    """Who has connected, by SO_PEERCRED: the process, its user and its group.

    It was there `since` (seconds since boot) at the latest. What its pid is by now, and whether
    still its, find_asking tells.
    """

    pid: int
    uid: int
    gid: int
    since: float


@dataclass(frozen=True)
class Request:
    """A request that is well-formed; `fields` are those after the verb."""

    verb: Verb
    fields: tuple[str, ...]


def peer_of(connection: socket.socket) -> Peer:
    """Return who is at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return Peer(pid, uid, gid, time.clock_gettime(time.CLOCK_BOOTTIME))


def peer_pidfd(connection: socket.socket) -> int | None:
    """Return a descriptor of the process at the other end; None where this kernel has none.

    Raises Failure (75) where that has ended.
    """
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return None
        if error.errno not in (errno.ESRCH, errno.EINVAL):
            raise
        raise Failure(Status.TRY_AGAIN, "stopped", "the client has ended") from error
    return int.from_bytes(raw, sys.byteorder)


def look_at_request(connection: socket.socket, room: int) -> tuple[bytes, list[int], bool]:
    """Return the next packet, which stays in the queue, and at most `room` of its descriptors.

    And whether there are more. None of those returned, nor of those cut off, is the last one of
    its file, so that no close of theirs does more than close(2) of a descriptor itself does. Raises
    OSError as recvmsg(2).
    """
    # NOTE: not by socket.recv_fds(), which passes no flags on before Python 3.12.
    data, ancillary, flags, _ = connection.recvmsg(
        REQUEST_MAX + 1, socket.CMSG_LEN(4 * room), socket.MSG_CMSG_CLOEXEC | socket.MSG_PEEK
    )
    numbers = array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
    return data, list(numbers), bool(flags & socket.MSG_CTRUNC)


class Elsewhere(Exception):
    """The request is not for this agent, and why (ASCII): its client does the work itself."""


def parse_request(data: bytes, descriptors: int) -> Request:
    """Return the request in one packet; `descriptors` are those that came, or one too many.

    Raises Elsewhere for another version of the wire, Failure (64) for whatever is no request.
    """
    if len(data) > REQUEST_MAX:
        raise _bad(f"it has more than {REQUEST_MAX} bytes")
    version, *rest = data.split(b"\0")
    if version != VERSION:
        if version.startswith(b"pyqemu-ifup/"):
            raise Elsewhere("another version of the wire")
        raise _bad("it does not begin with " + WIRE)
    verb = next((known for known in FIELDS if rest and known.encode() == rest[0]), None)
    if verb is None:
        raise _bad("its verb is unknown")
    fields = tuple(os.fsdecode(field) for field in rest[1:])
    if not FIELDS[verb] <= len(fields) <= FIELDS[verb] + OPTIONAL.get(verb, 0):
        raise _bad(f"{verb} takes {FIELDS[verb]} fields, not {len(fields)}")
    wanted = 0 if verb == "agent" else 1
    if descriptors != wanted:
        more = " or more" if descriptors >= DESCRIPTORS_MAX else ""
        raise _bad(f"{verb} takes {wanted} descriptors, not {descriptors}{more}")
    return Request(verb, fields)


def _bad(why: str) -> Failure:
    return Failure(Status.USAGE, "not a request", why, "see docs/agent.md")


@dataclass(frozen=True)
class Place:
    """What a descriptor proves: its network namespace "DEVICE:INODE", and the tap it is of."""

    netns: str
    tap: str | None
    index: int | None = None
    """The tap's ifindex, None where it is not in this process's namespace."""
    queue: FileIO | None = None
    """A persistent tap's, by which it can be given an owner while its QEMU has it."""


def place_of(descriptor: int, peer: Peer, *, keep: bool = False) -> Place:
    """Return what the descriptor of a tap, or of a network namespace, that `peer` sent proves.

    `keep`: a persistent tap's is kept in it.
    Raises Failure (64) for any other descriptor, Elsewhere where a tap's namespace cannot be told.
    """
    if peer.uid != 0 and not is_prompt(descriptor):
        raise _bad(WRONG_DESCRIPTOR)
    try:
        tap = read_tap_name(descriptor)
    except OSError as error:
        raise _bad(f"its descriptor cannot be told: {error.strerror}") from error
    if tap is None:
        return Place(_netns(descriptor), None)
    try:
        namespace = fcntl.ioctl(descriptor, TUNGETDEVNETNS)
    except OSError as error:
        # An older kernel, a tap of a user namespace that is not ours, too many open files.
        raise Elsewhere(f"no network namespace to be told of: {error.strerror}") from error
    try:
        kept = keep and is_persistent(descriptor)
        return Place(
            _netns(namespace), tap, index_of(tap), FileIO(os.dup(descriptor)) if kept else None
        )
    finally:
        os.close(namespace)


def is_prompt(descriptor: int) -> bool:
    """Tell whether a descriptor is a tun device's or a namespace's, without asking its file.

    Whatever another one is asked, fstat(2) too, may wait for whoever has made it (fuse(4)). The
    kernel writes `iff:` for a tun device alone (tun_chr_show_fdinfo of drivers/net/tun.c), and a
    name without a slash for what is in no file system that could be mounted.
    """
    path = f"/proc/thread-self/fdinfo/{descriptor}"
    with open(path, encoding="ascii", errors="replace", newline="\n") as file:
        if any(line.startswith("iff:") for line in file):
            return True
    return os.readlink(f"/proc/thread-self/fd/{descriptor}").startswith("net:[")


def _netns(descriptor: int) -> str:
    """Return the network namespace behind a descriptor of it. Raises Failure (64)."""
    try:
        found = os.fstat(descriptor)
        # NOTE: of nothing but a namespace's file it is known what the ioctl does.
        is_namespace = found.st_dev == os.stat("/proc/self/ns/net").st_dev
        kind = fcntl.ioctl(descriptor, NS_GET_NSTYPE) if is_namespace else None
    except OSError:
        kind = None
    if kind != CLONE_NEWNET:
        raise _bad(WRONG_DESCRIPTOR)
    return f"{found.st_dev}:{found.st_ino}"
