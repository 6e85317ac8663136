"""What a check of doctor's is and finds: the same of a kind of network as of all else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.shell import Command

S = TypeVar("S", contravariant=True)
"""What a check looks at: the host's snapshot, or all that doctor sees."""

Severity = Literal["error", "warning", "advice"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "advice")


@dataclass(frozen=True)
class Finding:
    """What a check has found of one thing, and why it matters.

    `command` is a line for a shell that mends it, None if there is none; then `do` says what to do.
    """

    what: str
    why: str
    command: Command | None
    do: str | None = None


@dataclass(frozen=True)
class Check(Generic[S]):
    """One check: `find` is pure, and yields a finding for each thing that is wrong.

    Several checks of the same name look for the same on several kinds.
    """

    name: str
    severity: Severity
    find: Callable[[S], Iterator[Finding]]


def finding_of(failure: Failure, why: str) -> Finding:
    """Return the finding of what an up, or QEMU, would fail with; `why` is what comes of it."""
    what = f"{failure.what}: {failure.why}" if failure.why else failure.what
    if isinstance(failure.remedy, Command):
        return Finding(what, why, failure.remedy)
    return Finding(what, why, None, failure.remedy)
