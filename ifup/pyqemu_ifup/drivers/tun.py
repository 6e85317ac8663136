"""A tap's queues, as linux/if_tun.h has them."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.shell import Command, all_of, sh
from pyqemu_ifup.hook import TUN as NUMBER
from pyqemu_ifup.hook import TUNGETIFF, read_tap_name, waiting_for

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


def open_tun() -> int:
    """Open what makes taps, as QEMU does. Raises OSError."""
    with waiting_for(f"{TUN} does not open"):
        return os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def require_tun() -> None:
    """Check that taps can be made here, by opening what makes them. Raises Failure as `no_tun`."""
    try:
        descriptor = open_tun()
    except OSError as error:
        raise no_tun(error) from error
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != NUMBER:
        raise Failure(
            Status.REFUSED,
            f"{TUN} is something else",
            "it is not the device that makes taps",
            all_of(sh("rm", TUN), _making()),
        )


def no_tun(error: OSError) -> Failure:
    """Return the Failure, 71 or 77, of one who could not open what makes taps."""
    what, why = f"{TUN} cannot be opened", os.strerror(error.errno or 0)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return Failure(
            Status.REFUSED,
            "there is no /dev/net/tun",
            why,
            _making() if is_loaded() else sh("modprobe", "tun"),
        )
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return Failure(
            Status.REFUSED, what, f"{why}: the kernel that runs has no driver for it", _loading()
        )
    if error.errno == errno.EACCES:
        return Forbidden(what, why, sh("chmod", "0666", TUN))
    if error.errno == errno.EPERM:
        # NOTE: not the file's mode: the rules for devices that a container or a unit has.
        return Failure(
            Status.DENIED,
            what,
            f"{why}: a container, or a unit, may use some devices alone",
            f"give a container --device={TUN}, a unit DeviceAllow={TUN}",
        )
    return Failure(Status.REFUSED, what, why, "see dmesg(1)")


def is_loaded() -> bool:
    """Tell whether the kernel's driver is there, with the number that mknod(1) takes."""
    with open("/proc/misc", encoding="ascii", newline="\n") as file:
        return any(line.split() == [str(os.minor(NUMBER)), "tun"] for line in file)


def making_anew(tap: str, user: str, *, queues: bool) -> Command:
    """Return the command that makes a persistent tap anew as a user's; `queues`: multi_queue."""
    words = ("dev", tap, "mode", "tap", *(["multi_queue"] if queues else []))
    return all_of(
        sh("ip", "tuntap", "del", *words), sh("ip", "tuntap", "add", *words, "user", user)
    )


def _making() -> Command:
    numbers = (str(os.major(NUMBER)), str(os.minor(NUMBER)))
    return all_of(
        sh("mkdir", "-p", os.path.dirname(TUN)), sh("mknod", "-m", "0666", TUN, "c", *numbers)
    )


def _loading() -> str:
    """Return what loads the driver; without the modules of the kernel that runs, nothing does."""
    if os.path.isdir(f"/lib/modules/{os.uname().release}"):
        return sh("modprobe", "tun")
    return (
        f"there are no modules of kernel {os.uname().release} here: after an upgrade of the "
        "kernel, reboot; for a container, load it on its host: modprobe tun"
    )


def attach_queue(name: str, flags: int) -> tuple[int, str]:
    """Open a queue of the tap `name`, making it where there is none, and return its own name too.

    Raises OSError: EBUSY where somebody has the only one.
    """
    descriptor = open_tun()
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
