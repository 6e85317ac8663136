"""pyqemu-ifctl explain: which rule decides for a tap, what it would get, and by which commands."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds import spec_at
from pyqemu_ifconf.names import check_tap_name
from pyqemu_ifconf.policy import MATCH_KEYS, Attach, Caller, Decision, Deny, Leave
from pyqemu_ifconf.shell import Command, quote, readable, shown
from pyqemu_ifctl.answer import TIMEOUT, Answer, add_json, to_json
from pyqemu_ifctl.program import PROGRAM
from pyqemu_ifup.hook import narrator, within_deadline
from pyqemu_ifup.qemu.command_line import canonical_mac

if TYPE_CHECKING:
    from pyqemu_ifctl.explanation import Explanation, Form


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options and arguments."""
    add_json(parser)
    parser.add_argument("tap", metavar="TAP")
    parser.add_argument("--vm", metavar="VM", help="the guest's name, of QEMU's -name")
    parser.add_argument("--netdev", metavar="ID", help="the netdev, of QEMU's id=")
    parser.add_argument("--mac", metavar="MAC", help="the MAC of the guest's device")
    parser.add_argument("--user", metavar="NAME", help="the login name that QEMU runs as")
    parser.add_argument(
        "--network", metavar="NET", help="whatever the rules say, as pyqemu-ifup@NET does"
    )


def run(args: argparse.Namespace) -> Answer:
    """Explain what this host's policy says of a tap; touches nothing.

    A tap that is denied ends with 77. What JSON has no key for goes to standard error. Raises
    Failure.
    """
    from pyqemu_ifctl.explanation import explain

    tap = check_tap_name(args.tap)
    with within_deadline(TIMEOUT, hook=False) as deadline:
        caller = Caller(tap, args.vm, args.netdev, _mac(args.mac), args.user)
        found = explain(caller, args.network, os.environ, deadline, narrator(PROGRAM, tap))
        out = as_object(found) if args.json else as_text(found)
    status, remarks = Status.DONE, found.notes
    if isinstance(found.decision, Deny):
        status, remarks = Status.DENIED, (f"{readable(tap)}: {_verdict(found.decision)}",)
    return Answer(out, status, remarks if args.json else ()).by_name()


def _mac(text: str | None) -> str | None:
    """Return a MAC as the policy has it. Raises Failure (64) where it is none."""
    if text is None:
        return None
    mac = canonical_mac(text)
    if mac is None:
        raise Failure(
            Status.USAGE,
            f"--mac {readable(text)} is not the MAC of a device",
            "",
            "give six pairs of hexadecimal digits, such as 52:54:00:12:34:56",
        )
    return mac


def _unknown(decision: Decision, caller: Caller) -> tuple[str, ...]:
    """Return which options give what earlier rules looked at and nobody gave."""
    asked = {key for passed in decision.passed_over for key in passed.rule.match}
    missing = [key for key in MATCH_KEYS if key in asked and getattr(caller, key) is None]
    if not missing:
        return ()
    options = ", ".join(f"--{key}" for key in missing)
    return (f"what is unknown matches nothing; the guest's own can be given: {options}",)


def as_object(explanation: Explanation) -> str:
    """Return the explanation as JSON; with both forms, a comment stands before each."""
    decision = explanation.decision
    attach = isinstance(decision, Attach)
    words = {Attach: "attach", Deny: "deny", Leave: "leave"}
    lines: list[str] = []
    for form in explanation.forms:
        if len(explanation.forms) > 1 or form.cannot:
            lines.append(f"# {_title(form, decision)}")
        lines += form.commands
    return to_json(
        {
            "tap": explanation.caller.tap,
            "decision": words[type(decision)],
            "rule": str(decision.rule.position) if decision.rule is not None else None,
            "passed_over": [
                {"rule": str(passed.rule.position), "because": passed.because}
                for passed in decision.passed_over
            ],
            "port": {each.setting: each.value for each in explanation.wanted} if attach else None,
            "commands": lines,
        }
    )


def as_text(explanation: Explanation) -> str:
    """Return the explanation for a person."""
    decision = explanation.decision
    lines = [f"{readable(explanation.caller.tap)}: {_verdict(decision)}"]
    if decision.passed_over:
        lines += ["", "rules passed over:"]
        lines += [f"  {passed.rule.position}: {passed.because}" for passed in decision.passed_over]
    if explanation.wanted:
        lines += ["", "wanted:"]
        lines += [f"  {each.setting:<12}  {each.words}" for each in explanation.wanted]
    for form in explanation.forms:
        lines += ["", f"{_title(form, decision)}:"]
        lines += _indented(form.commands)
    notes = [*explanation.notes, *_unknown(decision, explanation.caller)]
    if notes:
        lines += ["", *(f"note: {note}" for note in notes)]
    return "\n".join(map(shown, lines)) + "\n"


def _indented(commands: Iterable[Command]) -> Iterator[str]:
    """Yield the commands as a person sees them; what a command reads stands as it is read."""
    is_read = False
    for command in commands:
        yield command if is_read else f"  {command}"
        is_read = command.endswith("<<'END'") or (is_read and command != "END")


def _verdict(decision: Decision) -> str:
    if isinstance(decision, Deny):
        if decision.rule is None:
            return "denied: no rule of the policy matches; add one"
        return f"denied by {decision.rule.position}: {decision.because}"
    if isinstance(decision, Leave):
        return f"left as it is by {decision.rule.position}"
    port = decision.port
    if decision.rule is None:
        return (
            f"attached to network {quote(port.network)} by the name of "
            f"{quote(f'pyqemu-ifup@{port.network}')}"
        )
    return f"attached to network {quote(port.network)} by {decision.rule.position}"


def _title(form: Form, decision: Decision) -> str:
    if isinstance(decision, Leave):
        return "commands, which take away what carries an old mark of ours"
    bridge = decision.port.place.name if isinstance(decision, Attach) else ""
    if form.cannot:
        return f"cannot be on {form.title}: {form.cannot}"
    spec = spec_at(decision.port.place) if isinstance(decision, Attach) else None
    if spec is not None and spec.endpoint != "tap":
        return f"commands, for {form.title} on {quote(bridge)}"
    return f"commands, {quote(bridge)} being {form.title}"
