"""Where this installation is: the paths of its hooks, for QEMU's script= and downscript=."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import readable


@dataclass(frozen=True)
class Hooks:
    """The paths of the two programs."""

    ifup: str
    ifdown: str


def find_hooks(program: str) -> Hooks:
    """Return pyqemu-ifup and pyqemu-ifdown of the installation that `program`, this one, is of.

    Raises Failure (69) where they are not beside it.
    """
    # NOTE: a link to the program may lie anywhere, and its hooks beside it or beside the program.
    folders = [os.path.dirname(find(program)) for find in (os.path.abspath, os.path.realpath)]
    found = [Hooks(f"{folder}/pyqemu-ifup", f"{folder}/pyqemu-ifdown") for folder in folders]
    for hooks in found:
        if os.access(hooks.ifup, os.X_OK) and os.access(hooks.ifdown, os.X_OK):
            return hooks
    raise Failure(
        Status.UNAVAILABLE,
        f"the hooks are not in {readable(folders[-1])}",
        "they are installed beside this",
        "install them: make install",
    )


def know_hooks(program: str) -> Hooks | None:
    """Return the same, None where they are not beside it."""
    try:
        return find_hooks(program)
    except Failure:
        return None
