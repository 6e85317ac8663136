"""Which names a tap may have."""

from __future__ import annotations

from pyqemu_ifconf.failure import Failure, Status

NAME_MAX = 15
"""Bytes of an interface name, without the NUL (IFNAMSIZ - 1, linux/if.h)."""


def is_valid_name(name: str) -> bool:
    """Tell whether `name` can be an interface's: dev_valid_name() of the kernel, ASCII only."""
    return (
        1 <= len(name) <= NAME_MAX
        and name not in (".", "..")
        and all("!" <= character <= "~" and character not in "/:" for character in name)
    )


def check_tap_name(name: str) -> str:
    """Return `name` where a tap can be called so; else raise Failure (64)."""
    if is_valid_name(name):
        return name
    raise Failure(
        Status.USAGE,
        f"{ascii(name)} is not a tap name",
        "a name is 1 to 15 bytes of 0x21 to 0x7e, without / and :, not . or ..",
    )
