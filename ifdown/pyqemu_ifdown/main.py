"""pyqemu-ifdown TAP: take the tap away again."""

from __future__ import annotations

import os
import syslog

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.names import check_tap_name
from pyqemu_ifup.manners import Watch, log, narrator, prove_tap, run_hook

PROGRAM = "pyqemu-ifdown"
TIMEOUT = 10.0
"""Seconds that a down may take."""


def main() -> int:
    """Run the hook with the arguments of this process and return its exit status."""
    return run_hook(PROGRAM, TIMEOUT, down)


def down(tap: str, inherited: list[str], watch: Watch) -> None:
    """Detach `tap`. Raises Failure, but not for lack of privilege: gc does it then."""
    from pyqemu_ifdown.detach import detach

    check_tap_name(tap)
    prove_tap(tap, inherited)
    try:
        detach(tap, os.getppid(), watch, narrator(PROGRAM, tap))
    except Failure as failure:
        if failure.status is not Status.DENIED:
            raise
        log(syslog.LOG_WARNING, f"{tap}: left to pyqemu-ifctl gc: {failure}")


if __name__ == "__main__":
    raise SystemExit(main())
