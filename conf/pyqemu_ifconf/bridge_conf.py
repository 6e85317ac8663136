"""QEMU's bridge.conf, as its qemu-bridge-helper reads it: which bridges are for everybody.

It is stricter than QEMU: a line that cannot be understood, an included file that is there and
cannot be read, and one without an absolute path are errors. QEMU passes over them, and so over what
they deny.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.names import is_valid_name
from pyqemu_ifconf.trust import read_trusted, show_path

PATH = "/etc/qemu/bridge.conf"
ALL = "all"
SIZE_MAX = 64 * 1024
"""Bytes of one file."""
FILES_MAX = 64
BLANKS = " \t\n\v\f\r"
"""What isspace(3) takes for blank in the C locale."""

Read = Callable[[str], bytes | None]
"""Reads a file; None if it does not exist. Raises Failure."""


@dataclass(frozen=True)
class BridgeConf:
    """What is allowed and what is denied: names of bridges, and `all`."""

    allowed: frozenset[str] = frozenset()
    denied: frozenset[str] = frozenset()

    def denies(self, bridge: str) -> bool:
        """Tell whether nobody may use the bridge, whatever allows it."""
        return bridge in self.denied or ALL in self.denied

    def allows(self, bridge: str) -> bool:
        """Tell whether everybody may use the bridge."""
        return (bridge in self.allowed or ALL in self.allowed) and not self.denies(bridge)


NOTHING = BridgeConf()


def _read(path: str) -> bytes | None:
    return read_trusted(path, SIZE_MAX + 1)


def read_bridge_conf(path: str = PATH, read: Read = _read) -> BridgeConf:
    """Return what the file and those that it includes say, or NOTHING if it does not exist.

    Raises Failure: 65 if it cannot be understood, 66 if it cannot be read, 78 if it is
    not to be trusted.
    """
    allowed: set[str] = set()
    denied: set[str] = set()
    waiting, seen = [path], {path}
    while waiting:
        file = waiting.pop()
        data = read(file)
        if data is None:
            continue
        if len(data) > SIZE_MAX:
            raise _invalid(file, f"it has more than {SIZE_MAX} bytes")
        lines = data.decode("utf-8", "surrogateescape").split("\n")
        for number, line in enumerate(lines, 1):
            word, argument = _split(line, f"{file}:{number}")
            if word == "include":
                if argument not in seen:
                    waiting.append(argument)
                seen.add(argument)
                if len(seen) > FILES_MAX:
                    raise _invalid(path, f"it includes more than {FILES_MAX} files")
            elif word:
                (allowed if word == "allow" else denied).add(argument)
    return BridgeConf(frozenset(allowed), frozenset(denied))


def _split(line: str, place: str) -> tuple[str, str]:
    """Return the word and the argument of a line, empty for a comment. Raises Failure (65)."""
    text = line.strip(BLANKS)
    if not text or text.startswith("#"):
        return "", ""
    # NOTE: QEMU looks for a space first, and for a tab only if there is no space.
    word, _, argument = text.partition(" " if " " in text else "\t")
    argument = argument.strip(BLANKS)
    if word not in ("allow", "deny", "include"):
        raise _invalid(place, f"{ascii(word)} is not allow, deny or include")
    if word == "include":
        if not argument.startswith("/") or "\0" in argument:
            raise _invalid(place, f"{ascii(argument)} is not the absolute path of a file")
    elif not is_valid_name(argument):
        raise _invalid(place, f"{ascii(argument)} is not the name of a bridge, nor {ALL}")
    return word, argument


def _invalid(place: str, why: str) -> Failure:
    return Failure(
        Status.POLICY_INVALID,
        show_path(place),
        why,
        "correct it, or leave bridge_conf: true out of the policy",
    )
