"""A tap's queues, as linux/if_tun.h has them."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from pyqemu_ifup.manners import TUNGETIFF, read_tap_name

TUN = "/dev/net/tun"
TUNSETIFF = 0x400454CA
TUNSETOWNER = 0x400454CC
SIOCSIFNAME = 0x8923
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_PERSIST = 0x0800
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_TUN_EXCL = 0x8000
"""With it a name that is there already is EBUSY."""
IFREQ = struct.Struct("16sH22x")
"""What ioctls take: the name, and the flags."""


def attach_queue(name: str, flags: int) -> tuple[int, str]:
    """Open a queue of the tap `name`, making it where there is none, and return its own name too.

    Raises OSError: EBUSY where somebody has the only one.
    """
    descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        answer = fcntl.ioctl(descriptor, TUNSETIFF, IFREQ.pack(os.fsencode(name), flags))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, os.fsdecode(answer[:16].split(b"\0", 1)[0])


def set_owner(descriptor: int, uid: int) -> None:
    """Let nobody but the user `uid`, and whoever may change links, open the tap of a queue."""
    fcntl.ioctl(descriptor, TUNSETOWNER, uid)


def rename_tap(descriptor: int, name: str) -> str:
    """Give the tap of a queue, which is down, another name, and return it.

    A `%d` in it is the first free number. Raises OSError: EEXIST where there is such a link.
    """
    before = read_tap_name(descriptor) or ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        request = struct.pack("16s24s", os.fsencode(before), os.fsencode(name))
        fcntl.ioctl(any_socket, SIOCSIFNAME, request)
    return read_tap_name(descriptor) or ""


def is_persistent(descriptor: int) -> bool:
    """Tell whether the tap of a queue outlives its descriptors."""
    _, flags = IFREQ.unpack(fcntl.ioctl(descriptor, TUNGETIFF, bytes(IFREQ.size)))
    return bool(flags & IFF_PERSIST)
