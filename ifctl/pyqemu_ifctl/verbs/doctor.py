"""pyqemu-ifctl doctor: what is wrong with this host, why it matters, and what mends it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Status
from pyqemu_ifconf.shell import shown
from pyqemu_ifctl.answer import FOUND, TIMEOUT, Answer, add_json, count, to_json, wrap
from pyqemu_ifctl.program import PROGRAM
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.hook import narrator, within_deadline

if TYPE_CHECKING:
    from pyqemu_ifctl.doctor.scene import Scene
    from pyqemu_ifup.kinds.check import Check, Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options and arguments."""
    add_json(parser)
    parser.add_argument(
        "checks", metavar="CHECK", nargs="*", help="do these checks only, such as bridge-mac"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print errors alone, and nothing if there is none"
    )


def run(args: argparse.Namespace) -> Answer:
    """Look for what is wrong with this host. Raises Failure."""
    with within_deadline(TIMEOUT, hook=False) as deadline:
        answer = doctor(
            os.environ,
            deadline,
            narrator(PROGRAM, None),
            as_json=args.json,
            names=args.checks,
            quiet=args.quiet,
        )
    return answer.by_name()


def doctor(
    environ: Mapping[str, str],
    deadline: Deadline,
    tell: Callable[[str], None],
    *,
    as_json: bool,
    names: Sequence[str] = (),
    quiet: bool = False,
) -> Answer:
    """Look at this host and tell what is wrong; nothing is changed.

    `names` are the checks to be done, all without one. `quiet`: nothing is told but errors, and
    what keeps them from being seen.
    The status is 1 where one of the findings is an error, else 75 where a process does not let
    itself be looked at in time, and 70 where a check could not be done. Raises Failure: 64 where
    there is no such check, and where not even the links can be listed.
    """
    from pyqemu_ifctl.doctor.checks import checks_of, find_all
    from pyqemu_ifctl.doctor.scene import look

    checks = checks_of(names)
    scene = look(environ, deadline, tell)
    found, failed = find_all(scene, checks)
    if quiet:
        found = [each for each in found if each[0].severity == "error"]
    unseen = (*(() if quiet else scene.unseen), *scene.unread, *failed)
    status = FOUND if any(check.severity == "error" for check, _ in found) else 0
    if status == 0 and (failed or scene.unread):
        status = Status.BUG if failed else Status.TRY_AGAIN
    if as_json:
        out = to_json(
            {
                "ok": status == 0,
                "findings": [
                    {"check": check.name, "severity": check.severity, **asdict(finding)}
                    for check, finding in found
                ],
                "unseen": list(unseen),
            }
        )
    else:
        out = as_text(found, all_seen=not unseen) if found or not quiet else ""
    return Answer(out, status, tuple(f"not seen: {each}" for each in unseen))


def as_text(found: list[tuple[Check[Scene], Finding]], *, all_seen: bool) -> str:
    """Return the findings for a person: what, why, and the command on a line of its own.

    NOTE: the command is never broken, so that it can be copied.
    """
    lines: list[str] = []
    for check, finding in found:
        lines += wrap(shown(f"{check.severity}: {finding.what} [{check.name}]"), "    ")
        lines += wrap(shown(f"  why: {finding.why}"), "    ")
        if finding.command is not None:
            lines.append(f"  mend: {shown(finding.command)}")
        if finding.do is not None:
            lines += wrap(shown(f"  do: {finding.do}"), "    ")
        lines.append("")
    errors = sum(check.severity == "error" for check, _ in found)
    if found:
        lines.append(f"{count(len(found), 'finding')}, {count(errors, 'error')}")
    else:
        lines.append("nothing is wrong" if all_seen else "nothing is wrong of what can be seen")
    return "".join(f"{line}\n" for line in lines)
