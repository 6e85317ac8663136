"""pyqemu-ifctl apply: put the policy of now in force on the taps of the guests that run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.names import check_tap_name
from pyqemu_ifconf.shell import readable, shown
from pyqemu_ifctl.answer import (
    FOUND,
    TIMEOUT,
    Answer,
    add_json,
    count,
    json_differences,
    to_json,
    wrap,
)
from pyqemu_ifctl.program import PROGRAM
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.hook import narrator, within_deadline

if TYPE_CHECKING:
    from pyqemu_ifctl.in_force import Outcome, Result

FINE: tuple[Result, ...] = ("left", "cut", "would cut")
"""What a tap that did not get what the policy wants may have come to, and all is well."""
SEVERITY = (
    Status.DENIED,
    Status.TRY_AGAIN,
    Status.UNAVAILABLE,
    Status.REFUSED,
    Status.POLICY_INVALID,
    Status.NO_POLICY,
    Status.UNSAFE,
)
"""The statuses that a tap can fail with, from the least grave to the worst."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options and arguments."""
    add_json(parser)
    parser.add_argument("taps", metavar="TAP", nargs="*", help="only these")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be changed")
    parser.add_argument(
        "--cut", action="store_true", help="take down the links of taps that are denied by now"
    )
    parser.add_argument(
        "--exit-code", action="store_true", help="of a dry run: end 1 if a tap would be changed"
    )


def run(args: argparse.Namespace) -> Answer:
    """Put the policy in force. Raises Failure."""
    if args.exit_code and not args.dry_run:
        raise Failure(Status.USAGE, "--exit-code goes with --dry-run alone", "", "add --dry-run")
    taps = [check_tap_name(tap) for tap in args.taps]
    with within_deadline(TIMEOUT, hook=False) as deadline:
        answer = apply(
            taps,
            os.environ,
            deadline,
            dry_run=args.dry_run,
            as_json=args.json,
            cut=args.cut,
            exit_code=args.exit_code,
        )
    return answer.by_name()


def apply(
    taps: Sequence[str],
    environ: Mapping[str, str],
    deadline: Deadline,
    *,
    dry_run: bool,
    as_json: bool,
    cut: bool = False,
    exit_code: bool = False,
) -> Answer:
    """Put this host's policy in force on the taps of running guests, on `taps` alone where given.

    `cut`: the link of one of ours that the policy denies by now is taken down. One tap's failure
    does not keep the others from it. `exit_code`: the status is 1 where a dry run tells of
    something that it would change. Raises Failure where the policy, or the links, cannot be had.
    """
    from pyqemu_ifctl.databases import find_policy
    from pyqemu_ifctl.in_force import apply_policy
    from pyqemu_ifup.guest import Patience, find_otherwise, tell_otherwise
    from pyqemu_ifup.host import Host

    policy = find_policy(environ)
    with Host(None, deadline, narrator(PROGRAM, None)) as host:
        outcomes, remarks = apply_policy(host, policy, taps, dry_run=dry_run, cut=cut)
    failures = [each for each in outcomes if each.failure is not None and each.result not in FINE]
    remarks += [f"{readable(each.guest.tap)}: {each.failure}" for each in outcomes if each.failure]
    patience = Patience()
    for tap, mark in ((each.guest.tap, each.guest.mark) for each in outcomes):
        others = find_otherwise(tap, mark, patience) if mark is not None else ()
        other = tell_otherwise(mark, others) if mark is not None else ""
        remarks += [f"{readable(tap)}: {other}"] if other else []
    status: int = max(
        (each.failure.status for each in failures if each.failure is not None),
        key=lambda status: SEVERITY.index(status) if status in SEVERITY else len(SEVERITY),
        default=Status.DONE,
    )
    if deadline.interrupted() is not None:
        remarks.append(f"stopped: {deadline.interrupted()}; what was done stays done")
        status = Status.TRY_AGAIN if status == Status.DONE else status
    if exit_code and status == Status.DONE:
        status = FOUND if any(each.result.startswith("would") for each in outcomes) else status
    out = as_object(outcomes) if as_json else as_text(outcomes)
    return Answer(out, status, tuple(remarks))


def as_object(outcomes: Iterable[Outcome]) -> str:
    """Return the outcomes as JSON."""
    return to_json(
        {
            "taps": [
                {
                    "tap": each.guest.tap,
                    "vm": each.vm,
                    "pid": each.guest.pid,
                    "network": each.port.network if each.port is not None else None,
                    "rule": str(each.port.position) if each.port is not None else None,
                    "result": each.result,
                    "differences": json_differences(each.differences),
                    "link_down": each.moves,
                    "guest_told": None if each.untold is None else not each.untold,
                    "commands": list(each.commands),
                    "because": str(each.failure) if each.failure is not None else None,
                }
                for each in outcomes
            ]
        }
    )


def as_text(outcomes: Sequence[Outcome]) -> str:
    """Return for a person what differs on each tap, and how many of them there are."""
    lines = []
    for each in outcomes:
        if each.differences:
            lines += _diff(each)
    for result, words in (
        ("changed", "changed"),
        ("would change", "would be changed"),
        ("failed", "not changed"),
        ("denied", "denied"),
        ("cut", "cut off"),
        ("would cut", "would be cut off"),
        ("left", "left alone"),
        ("unchanged", "as the policy says"),
    ):
        number = sum(each.result == result for each in outcomes)
        if number:
            lines.append(f"{count(number, 'tap')} {words}")
    return "".join(f"{line}\n" for line in lines or ["no taps of running guests"])


def _diff(outcome: Outcome) -> list[str]:
    """Return what differs on one tap, as diff(1) would say it, and what that takes."""
    guest, port = outcome.guest, outcome.port
    assert port is not None  # something differs from it
    who = [f"vm {readable(outcome.vm)}"] if outcome.vm else []
    who += [f"pid {guest.pid}"] if guest.pid is not None else []
    tap = readable(guest.tap)
    lines = [f"{tap} ({', '.join(who)}): {port.position}" if who else tap]
    width = max(len(each.setting) for each in outcome.differences)
    for each in outcome.differences:
        lines.append(f"  - {each.setting:<{width}}  {each.found}")
        lines.append(f"  + {each.setting:<{width}}  {each.wanted}")
        lines += [f"    because: {each.because}"] if each.because else []
    steps: list[str] = []
    if outcome.result == "would change":
        lines += ["  its link would go down and up"] if outcome.moves else []
        # NOTE: a command is not wrapped, so that it can be copied.
        steps = [shown(f"  $ {command}") for command in outcome.commands]
    elif outcome.result == "failed":
        lines.append("  not done: it is what it was")
    elif outcome.moves:
        told_guest = ""
        if outcome.untold is not None:
            told_guest = (
                f"; the guest was not told: {outcome.untold}"
                if outcome.untold
                else (", the guest's too")
            )
        lines.append(f"  its link has gone down and up{told_guest}")
    return [*(line for each in lines for line in wrap(shown(each), "      ")), *steps, ""]
