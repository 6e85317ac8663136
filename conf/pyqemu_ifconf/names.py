"""Which names a tap, a bridge and a network may have."""

from __future__ import annotations

import os
import re

from pyqemu_ifconf.failure import Failure, Status

NAME_MAX = 15
"""Bytes of an interface name, without the NUL (IFNAMSIZ - 1, linux/if.h)."""

NETWORK_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
"""A network's name: it is part of a program's file name (`pyqemu-ifup@NAME`) and of marks."""

USER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""The name of a tap that an unprivileged user gets: never an option, nor a word for a shell."""

NUMBER_ROOM = 4
"""Bytes that a tap name's pattern leaves for the number that the kernel puts for its %d."""

_NETWORK_NAME = re.compile(NETWORK_NAME)
_USER_NAME = re.compile(USER_NAME)


def is_network_name(name: str) -> bool:
    """Tell whether a network of the policy can be called `name`."""
    return _NETWORK_NAME.fullmatch(name) is not None


def is_valid_name(name: str) -> bool:
    """Tell whether `name` can be an interface's: dev_valid_name() of the kernel, ASCII only."""
    return (
        1 <= len(name) <= NAME_MAX
        and name not in (".", "..")
        and all("!" <= character <= "~" and character not in "/:" for character in name)
    )


def is_user_name(name: str) -> bool:
    """Tell whether a tap that an unprivileged user gets can be called `name`."""
    return is_valid_name(name) and _USER_NAME.fullmatch(name) is not None


def is_tap_pattern(pattern: str) -> bool:
    """Tell whether `pattern` is the name of a user's tap, or one with `%d` in place of a number.

    __dev_alloc_name() of the kernel puts the number there; one of 4 digits must fit.
    """
    if "%" not in pattern:
        return is_user_name(pattern)
    before, mark, after = pattern.partition("%d")
    return bool(mark) and is_user_name(before + "0" * NUMBER_ROOM + after)


def is_made_of(name: str, pattern: str) -> bool:
    """Tell whether the kernel can make the name of a tap from `pattern`."""
    before, mark, after = pattern.partition("%d")
    number = name[len(before) : len(name) - len(after)] if mark else ""
    return name == before + number + after and (
        not mark or (number.isascii() and number.isdigit() and str(int(number)) == number)
    )


def is_plain_tap_name(name: str) -> bool:
    """Tell whether `name` can be a tap's, and is no glob and no pattern for the kernel."""
    return is_valid_name(name) and not any(character in "*?[]%" for character in name)


def tap_name_of(vm: str, number: int) -> str:
    """Return the name of a NIC's tap if the policy gives none; NICs count from 0.

    A guest's name that is too long is cut, and a hash of it keeps the names apart.
    """
    name = f"{vm}-{number}"
    if is_valid_name(name):
        return name
    from hashlib import sha256  # only a long name needs it

    end = f"{sha256(vm.encode()).hexdigest()[:6]}-{number}"
    return vm[: NAME_MAX - len(end)] + end


def check_tap_name(name: str) -> str:
    """Return `name` if a tap can be called so; raise Failure (64) if not."""
    if is_valid_name(name):
        return name
    raise Failure(
        Status.USAGE,
        f"{ascii(name)} is not a tap name",
        "a name is 1 to 15 bytes of 0x21 to 0x7e, without / and :, not . or ..",
    )


TEXT_MAX = 255
"""Bytes of a name that QEMU or a user gives; a longer one is unknown."""


def bounded(text: str | None) -> str | None:
    """Return a text of another's, or None if it is empty, too long, or ends within a character."""
    # NOTE: each character has one byte at least.
    if not text or len(text) > TEXT_MAX:
        return None
    try:
        return text if len(os.fsencode(text)) <= TEXT_MAX else None
    except UnicodeEncodeError:
        # From an escape in JSON.
        return None
