"""Taps held as QEMU holds them, packet sockets, and the frames that go through both.

Each is made in the network namespace of the calling thread and stays there.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
TUNSETOWNER = 0x400454CC
TUNSETIFINDEX = 0x400454DA
SIOCGIFHWADDR, SIOCSIFHWADDR = 0x8927, 0x8924
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
VNET_HDR_LEN = 10
"""Bytes of struct virtio_net_hdr, a tap's default."""

# linux/if_packet.h
SOL_PACKET = 263
PACKET_AUXDATA = 8
PACKET_OUTGOING = 4
ETH_P_ALL = 0x0003
TP_STATUS_VLAN_VALID = 0x10
TP_STATUS_VLAN_TPID_VALID = 0x40
AUXDATA = struct.Struct("IIIHHHH")

FRAME_MAX = 70000
TPIDS = (0x8100, 0x88A8)
LOCAL_EXPERIMENT = 0x88B5
"""IEEE 802 Local Experimental EtherType: nothing on a host answers it."""
BROADCAST = b"\xff" * 6

Want = Callable[[bytes], bool]


def any_frame(frame: bytes) -> bool:
    """Want each frame."""
    return True


def mac(number: int) -> bytes:
    """Return the locally administered unicast MAC 52:54:00:00:00:NUMBER."""
    return bytes((0x52, 0x54, 0, 0, 0, number))


def frame(
    src: bytes,
    dst: bytes = BROADCAST,
    payload: bytes = b"",
    vids: Sequence[int] = (),
    *,
    ethertype: int = LOCAL_EXPERIMENT,
    tpid: int = 0x8100,
) -> bytes:
    """Build an Ethernet frame, at least 60 bytes long, with a tag for each of `vids`.

    The outermost tag comes first.
    """
    tags = b"".join(struct.pack("!HH", tpid, vid) for vid in vids)
    return (dst + src + tags + struct.pack("!H", ethertype) + payload).ljust(60, b"\0")


def tags(frame: bytes) -> tuple[int, ...]:
    """Return the VIDs of all of a frame's VLAN tags, the outermost first."""
    found = []
    offset = 12
    while int.from_bytes(frame[offset : offset + 2], "big") in TPIDS:
        found.append(int.from_bytes(frame[offset + 2 : offset + 4], "big") & 0xFFF)
        offset += 4
    return tuple(found)


def vid(frame: bytes) -> int | list[int] | None:
    """Return None for an untagged frame, the VID of a tagged one, a list where tags are stacked."""
    found = tags(frame)
    if len(found) > 1:
        return list(found)
    return found[0] if found else None


def holds(payload: bytes) -> Want:
    """Want a frame that holds `payload` anywhere."""
    return lambda frame: payload in frame


class Tap:
    """A tap, held by a descriptor that `close` closes; a context manager.

    A name that is already there attaches to it, as TUNSETIFF does; a new one gets the ifindex
    `index`, if that is given and free. Raises OSError.
    """

    def __init__(
        self,
        name: str,
        *,
        persist: bool = False,
        vnet_hdr: bool = False,
        multi_queue: bool = False,
        owner: int | None = None,
        index: int | None = None,
    ) -> None:
        flags = IFF_TAP | IFF_NO_PI
        flags |= IFF_VNET_HDR if vnet_hdr else 0
        flags |= IFF_MULTI_QUEUE if multi_queue else 0
        self.header = bytes(VNET_HDR_LEN if vnet_hdr else 0)
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if index is not None:
                fcntl.ioctl(self.fd, TUNSETIFINDEX, struct.pack("I", index))
            request = struct.pack("16sH22x", name.encode(), flags)
            answer = fcntl.ioctl(self.fd, TUNSETIFF, request)
            self.name = answer[:16].split(b"\0", 1)[0].decode()
            if owner is not None:
                self.set_owner(owner)
            if persist:
                self.set_persist(True)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def avoid_fe(self) -> None:
        """See to it that the tap's MAC, chosen at random, does not begin as if a hook had set it.

        Of 64 taps one would have it, and one step less in its up.
        """
        answer = fcntl.ioctl(self.fd, SIOCGIFHWADDR, bytes(40))
        if answer[18] == 0xFE:
            fcntl.ioctl(self.fd, SIOCSIFHWADDR, answer[:18] + b"\x02" + answer[19:])

    def set_owner(self, uid: int) -> None:
        """Let the user `uid` attach to this tap."""
        fcntl.ioctl(self.fd, TUNSETOWNER, uid)

    def set_persist(self, persist: bool) -> None:
        """Say whether the tap outlives its last descriptor."""
        fcntl.ioctl(self.fd, TUNSETPERSIST, int(persist))

    def send(self, frame: bytes) -> None:
        """Send `frame` as a guest would; raise OSError (EIO) where the tap is down."""
        os.write(self.fd, self.header + frame)

    def recv(self, timeout: float = 1.0, want: Want = any_frame) -> bytes | None:
        """Return the first frame to the guest that `want` takes, None after `timeout` seconds."""
        end = time.monotonic() + timeout
        while select.select([self.fd], [], [], max(0.0, end - time.monotonic()))[0]:
            frame = os.read(self.fd, FRAME_MAX)[len(self.header) :]
            if want(frame):
                return frame
        return None

    def close(self) -> None:
        """Close the descriptor; the tap goes with it unless it is persistent. May run twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Raw:
    """A packet socket on one link: frames as they are on the wire, tags included."""

    def __init__(self, ifname: str) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        try:
            # NOTE: the kernel takes the outer tag out of the frame; auxdata tells what it was.
            self.socket.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
            self.socket.bind((ifname, 0))
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def send(self, frame: bytes) -> None:
        """Send `frame` out of the link."""
        self.socket.send(frame)

    def recv(
        self, timeout: float = 1.0, want: Want = any_frame, *, outgoing: bool = False
    ) -> bytes | None:
        """Return the first frame that came in and that `want` takes, None after `timeout` seconds.

        `outgoing` takes frames that this host sent through the link too.
        """
        end = time.monotonic() + timeout
        while select.select([self.socket], [], [], max(0.0, end - time.monotonic()))[0]:
            frame, ancillary, _flags, address = self.socket.recvmsg(FRAME_MAX, 256)
            if address[2] == PACKET_OUTGOING and not outgoing:
                continue
            for level, kind, data in ancillary:
                if (level, kind) == (SOL_PACKET, PACKET_AUXDATA):
                    frame = _retag(frame, data)
            if want(frame):
                return frame
        return None

    def close(self) -> None:
        """Close the socket. May run twice."""
        self.socket.close()


def carries(
    src: Tap, dst: Tap, payload: bytes, vids: Sequence[int] = (), *, timeout: float = 1.0
) -> bytes | None:
    """Send a broadcast as one guest; return it as the other gets it, None where it does not."""
    src.send(frame(mac(1), payload=payload, vids=vids))
    return dst.recv(timeout, holds(payload))


def who_has(tap: Tap, address: str, own: str = "192.0.2.99", timeout: float = 20.0) -> str | None:
    """Ask as a guest who has an IPv4 address (RFC 826), each second; return the MAC, if any."""
    asked = socket.inet_aton(address)
    body = struct.pack(
        "!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac(1), socket.inet_aton(own), bytes(6), asked
    )
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        tap.send(frame(mac(1), payload=body, ethertype=0x0806))
        answer = tap.recv(1.0, lambda data: data[12:14] == b"\x08\x06" and data[28:32] == asked)
        if answer is not None:
            return answer[22:28].hex(":")
    return None


def _retag(frame: bytes, auxdata: bytes) -> bytes:
    """Put the tag that struct tpacket_auxdata tells of back into the frame."""
    status, _len, _snaplen, _mac, _net, tci, tpid = AUXDATA.unpack(auxdata[: AUXDATA.size])
    if not status & TP_STATUS_VLAN_VALID:
        return frame
    if not status & TP_STATUS_VLAN_TPID_VALID:
        tpid = 0x8100
    return frame[:12] + struct.pack("!HH", tpid, tci) + frame[12:]
