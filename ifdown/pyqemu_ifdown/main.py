"""pyqemu-ifdown TAP: take the tap away again."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.names import check_tap_name
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.hook import left_to_gc, narrator, run_hook

PROGRAM = "pyqemu-ifdown"
TIMEOUT = 10.0
"""Seconds that a down may take."""


def main() -> int:
    """Run the hook with the arguments of this process and return its exit status."""
    # NOTE: as far as a down came that has stopped, it stays.
    return run_hook(PROGRAM, TIMEOUT, down, left_to_gc)


def down(tap: str, inherited: list[str], deadline: Deadline) -> None:
    """Detach `tap`. Raises Failure, but not for lack of privilege: gc does it then."""
    from pyqemu_ifdown.detach import detach, leave_to_gc
    from pyqemu_ifup.host import Host

    check_tap_name(tap)
    tap = present_name(tap, inherited)
    try:
        with Host(tap, deadline, narrator(PROGRAM, tap)) as host:
            host.finish(detach(host, tap, os.getppid()))
    except Failure as failure:
        leave_to_gc(tap, failure)


def present_name(tap: str, inherited: Sequence[str]) -> str:
    """Return the name of the tap that was handed over, which may have been renamed meanwhile.

    QEMU only knows the name that it opened the tap by.
    """
    return inherited[0] if len(inherited) == 1 else tap


if __name__ == "__main__":
    raise SystemExit(main())
