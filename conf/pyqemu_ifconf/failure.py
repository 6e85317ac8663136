"""How every part of the toolkit fails: one exception, which carries its exit status.

    Failure             exit status, what failed, why, what to do
    +-- PolicyInvalid   all the errors of a policy, each with its place
    +-- Forbidden       this process may not do or see it, so what is there is not known
    +-- OfCaller        the caller can mend it, root or not
    +-- Lacking         this container lacks something, with the options that give it

Modules raise; only the programs' `main` prints and exits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Status(IntEnum):
    """The exit statuses of the programs, those of sysexits(3) if there is one."""

    DONE = 0
    USAGE = 64
    POLICY_INVALID = 65
    NO_POLICY = 66
    UNAVAILABLE = 69
    BUG = 70
    REFUSED = 71
    TRY_AGAIN = 75
    DENIED = 77
    UNSAFE = 78


class Failure(Exception):
    """Something that the caller must be told: `what: why; what to do`.

    `what` names the object, `why` is the reason, `remedy` what the reader can do about it.
    """

    def __init__(self, status: Status, what: str, why: str = "", remedy: str = "") -> None:
        super().__init__(status, what, why, remedy)
        self.status = status
        self.what = what
        self.why = why
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.what}: {self.why}" if self.why else self.what
        return f"{text}; {self.remedy}" if self.remedy else text


class Forbidden(Failure):
    """The kernel does not let this process do it, or look at it (77); another may.

    `net_admin`: CAP_NET_ADMIN is enough for it (capabilities(7)), and root lacks that here.
    """

    def __init__(
        self, what: str, why: str = "", remedy: str = "", *, net_admin: bool = False
    ) -> None:
        where = "CAP_NET_ADMIN in the tap's network namespace"
        if not remedy and os.geteuid() != 0:
            remedy = f"run as root, or with {where}" if net_admin else "run as root"
        elif not remedy and net_admin:
            remedy = f"give it {where}, a container by --cap-add=NET_ADMIN"
        elif not remedy:
            remedy = (
                "see which capability root lacks here (capabilities(7)), or in dmesg(1) what "
                "AppArmor or SELinux denies"
            )
        super().__init__(Status.DENIED, what, why, remedy)


class OfCaller(Failure):
    """The caller can mend it without being root, so `for_user` does not send the caller to root."""


class Lacking(Failure):
    """This container lacks what its starter can give it by `options`, which are a shell's words.

    A container is made anew to get more options, so all that it lacks is told at once: see `join`.
    """

    def __init__(self, status: Status, what: str, why: str, *options: str) -> None:
        remedy = f"have whoever starts this container give it {' '.join(options)}"
        super().__init__(status, what, why, remedy)
        self.options = options

    @classmethod
    def join(cls, causes: Sequence[Lacking]) -> Lacking:
        """Return one failure for all of these, one at least, with the status of the first."""
        what = ", and ".join(f"{each.what}: {each.why}" for each in causes[:-1])
        last = causes[-1]
        what = f"{what}, and {last.what}" if what else last.what
        options = dict.fromkeys(option for each in causes for option in each.options)
        return cls(causes[0].status, what, last.why, *options)


@dataclass(frozen=True)
class PolicyError:
    """One error of a policy: where it stands and what is wrong there.

    `line` and `column` count from 1; `source` is the text of the line, without its end.
    """

    file: str
    line: int
    column: int
    message: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


def for_user(failure: Failure) -> Failure:
    """Return the failure as an unprivileged user is told it: root mends what only root can."""
    mine = (Status.USAGE, Status.BUG, Status.TRY_AGAIN, Status.DENIED)
    if failure.status in mine or not failure.remedy or isinstance(failure, OfCaller):
        return failure
    remedy = f"let root mend it: {failure.remedy}"
    return Failure(failure.status, failure.what, failure.why, remedy)


class PolicyInvalid(Failure):
    """The policy has errors (65); `errors` holds them all, in the order of its `files`."""

    def __init__(self, errors: tuple[PolicyError, ...], files: tuple[str, ...]) -> None:
        first = errors[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        from pyqemu_ifconf.shell import ifctl  # rare

        remedy = f"run {ifctl('check')}"
        super().__init__(Status.POLICY_INVALID, "policy invalid", f"{first}{more}", remedy)
        self.errors = errors
        self.files = files
