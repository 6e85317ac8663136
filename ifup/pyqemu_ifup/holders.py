"""Which processes hold which taps: by their descriptors in /proc, for this network namespace."""

from __future__ import annotations

import errno
import os

TUN_PATH = "/net/tun"
"""How the path of a tap's descriptor ends, wherever its process has its /dev."""
GONE = (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM)
"""How /proc answers for a process that has ended, or that is hidden from us."""


def holders() -> dict[str, tuple[int, ...]]:
    """Return the processes that hold each tap, the oldest id first: tap -> pids.

    Processes in another network namespace, and those hidden from the caller, are left out.
    Raises OSError for a fault of /proc itself.
    """
    here = os.stat("/proc/self/ns/net").st_ino
    found: dict[str, list[int]] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        for tap in sorted(_taps_of(pid, here)):
            found.setdefault(tap, []).append(pid)
    return {tap: tuple(pids) for tap, pids in found.items()}


def _taps_of(pid: int, namespace: int) -> set[str]:
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
        tuns = [number for number in numbers if _is_tun(f"/proc/{pid}/fd/{number}")]
        if not tuns or os.stat(f"/proc/{pid}/ns/net").st_ino != namespace:
            return set()
    except OSError as error:
        if error.errno not in GONE:
            raise
        return set()
    return {name for name in (_tap_of(pid, number) for number in tuns) if name}


def _is_tun(path: str) -> bool:
    """Tell whether a descriptor may be of /dev/net/tun; one closed meanwhile is not."""
    # NOTE: by the link's text: a stat would ask the file's own system, which may never answer.
    try:
        return os.readlink(path).removesuffix(" (deleted)").endswith(TUN_PATH)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return False


def _tap_of(pid: int, number: str) -> str:
    """Return the tap of a descriptor, empty where it has none (tun_chr_show_fdinfo)."""
    for line in _read(f"/proc/{pid}/fdinfo/{number}").splitlines():
        if line.startswith(b"iff:"):
            return os.fsdecode(line[len(b"iff:"):].strip())
    return ""


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno not in GONE:
            raise
        return b""
