"""Which users this process's user namespace has (user_namespaces(7)); without /proc, all."""

from __future__ import annotations

ALL = 4294967295
"""How many users the first user namespace has; 2**32 - 1 is none."""


def is_mapped(uid: int) -> bool:
    """Tell whether this user namespace has the user `uid`: a process here may become that one."""
    return any(first <= uid < first + count for first, count in _map())


def is_alone() -> bool:
    """Tell whether this user namespace has one user: an ordinary user's own root, as a rule."""
    return sum(count for _, count in _map()) == 1


def is_unmapped(uid: int) -> bool:
    """Tell whether `uid`, as seen on a file, stands for a user outside of this user namespace."""
    if is_mapped(uid):
        return False
    try:
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            return uid == int(file.read())
    except FileNotFoundError:
        return False


def _map() -> list[tuple[int, int]]:
    """Return the users that there are: the first of each range, and how many."""
    try:
        with open("/proc/self/uid_map", encoding="ascii", newline="\n") as file:
            rows = [line.split() for line in file]
    except FileNotFoundError:
        return [(0, ALL)]
    return [(int(first), int(count)) for first, _, count in rows]
