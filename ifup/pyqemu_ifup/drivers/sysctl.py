"""The kernel's switches for networks, as files below /proc/sys/net (sysctl(8))."""

from __future__ import annotations

import errno
import os

from pyqemu_ifconf.failure import Failure, Forbidden, Lacking, Status
from pyqemu_ifconf.shell import quote


def key(name: str) -> str:
    """Return what sysctl(8) calls a file below /proc/sys/net; a "." in a link's name is "/"."""
    return "net." + name.translate(str.maketrans("/.", "./"))


def read_sysctl(name: str) -> str | None:
    """Return a switch's value, None where the kernel does not have it."""
    try:
        with open(f"/proc/sys/net/{name}", encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return None


def is_writable(name: str) -> bool:
    """Tell whether a switch can be written, by opening it: a container may have it read-only."""
    try:
        os.close(os.open(f"/proc/sys/net/{name}", os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return False
    return True


def write_sysctl(name: str, value: str) -> None:
    """Write a value that is not there yet; a switch that the kernel does not have is passed over.

    Raises Failure, 77 or 71.
    """
    if read_sysctl(name) in (value, None):
        return
    try:
        with open(f"/proc/sys/net/{name}", "wb", buffering=0) as file:
            file.write(value.encode())
    except OSError as error:
        raise _failure(name, value, error, name) from error


def require_writable(name: str, value: str, given: str) -> None:
    """Check that a switch could be written, by opening it. Raises Failure as `write_sysctl`.

    `given` is the switch by which a container gets the value from whoever starts it.
    """
    try:
        os.close(os.open(f"/proc/sys/net/{name}", os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        raise _failure(name, value, error, given) from error


def _failure(name: str, value: str, error: OSError, given: str) -> Failure:
    what = f"cannot write {value} to {quote(f'/proc/sys/net/{name}')}"
    why = error.strerror or str(error)
    if isinstance(error, PermissionError):
        return Forbidden(what, why)
    if error.errno == errno.EROFS:
        # NOTE: a container without privilege has it so; whoever starts one can set what is its own.
        option = f"--sysctl {quote(f'{key(given)}={value}')}"
        return Lacking(Status.REFUSED, what, why, option)
    return Failure(Status.REFUSED, what, why, "see dmesg(1)")
