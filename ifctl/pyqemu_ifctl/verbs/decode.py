"""pyqemu-ifctl decode: what the number means that QEMU prints when a script has failed."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import dataclass, replace

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import quote, readable
from pyqemu_ifctl.answer import Answer, add_json, to_json
from pyqemu_ifctl.place import know_hooks

MEANING = {
    Status.DONE: "done",
    Status.USAGE: "usage, or not a valid tap name",
    Status.POLICY_INVALID: "the policy is invalid; pyqemu-ifctl check tells where",
    Status.NO_POLICY: "the policy cannot be read, or there is none; see pyqemu-ifctl check",
    Status.UNAVAILABLE: "the bridge, or Open vSwitch, is not there, or the Linux bridge is down",
    Status.BUG: "a bug; the traceback is in syslog, please report it",
    Status.REFUSED: "the kernel or the switch refused, cannot do it, or what was read back "
    "differs; or no such tap",
    Status.TRY_AGAIN: "the deadline passed, Open vSwitch is there but mute, or stopped by a "
    "signal; try again",
    Status.DENIED: "denied: no rule, a deny rule, missing privilege, or somebody else's tap, name "
    "or port; see pyqemu-ifctl explain",
    Status.UNSAFE: "the policy's ownership or mode is unsafe; pyqemu-ifctl check tells which",
}
"""Each exit status of the programs, in words."""

OTHERS = {
    1: "the script is missing or not executable, its interpreter is missing, or it is not ours",
    126: "a shell found the program but could not run it",
    127: "a shell did not find the program",
}
"""Exit statuses that are none of ours, in words."""

WAIT_MAX = 0xFFFF
CORE = 0x80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options and arguments."""
    add_json(parser)
    parser.add_argument("status", metavar="STATUS", help="such as 16640")


def run(args: argparse.Namespace) -> Answer:
    """Say what a status means. Raises Failure (64) where it is no number."""
    return answer(args.status, as_json=args.json)


@dataclass(frozen=True)
class Decoded:
    """What a number says: the exit status or the signal in it, None for what it has not."""

    exit: int | None
    signal: str | None
    meaning: str


def answer(text: str, *, as_json: bool) -> Answer:
    """Return what the number in `text` means. Raises Failure (64) where it is no number."""
    number = parse(text)
    decoded = decode(number)
    if decoded.exit in OTHERS and (hooks := know_hooks(sys.argv[0])) is not None:
        ours = f"; ours are {quote(hooks.ifup)} and {quote(hooks.ifdown)}"
        decoded = replace(decoded, meaning=decoded.meaning + ours)
    if as_json:
        return Answer(
            to_json(
                {
                    "status": number,
                    "exit": decoded.exit,
                    "signal": decoded.signal,
                    "meaning": decoded.meaning,
                }
            )
        )
    return Answer(f"{number}: {say(decoded)}\n")


def parse(text: str) -> int:
    """Return the number of `text`, decimal or `0x` and hexadecimal. Raises Failure (64)."""
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) <= 18:
        return int(text)
    if text[:2] in ("0x", "0X") and len(text) <= 18:
        try:
            return int(text, 16)
        except ValueError:
            return _refuse(text)
    return _refuse(text)


def _refuse(text: str) -> int:
    raise Failure(
        Status.USAGE,
        f"{readable(text)} is not a number",
        "",
        "give the one that QEMU prints, such as 16640",
    )


def decode(number: int) -> Decoded:
    """Return what `number` means: a raw wait status, as QEMU prints it, or a plain exit status.

    Small numbers are taken for what they mostly are: one of our own statuses, else a signal, also
    as subprocess (-9) and shells (137) have it.
    """
    if number in MEANING:
        return _exit(number)
    if number > 0 and number % 256 == 0 and number <= WAIT_MAX:
        return _exit(number // 256)
    if number in (126, 127):
        return _exit(number)
    if -CORE < number < 2 * CORE:
        name = _signal(-number if number < 0 else number & ~CORE)
        if name is not None:
            return Decoded(None, name, f"killed by {name}")
    return Decoded(None, None, "not a status that a script can end with")


def _exit(code: int) -> Decoded:
    if code in MEANING:
        return Decoded(code, None, MEANING[Status(code)])
    if code > CORE and (name := _signal(code - CORE)) is not None:
        return Decoded(code, name, f"a shell says that the program was killed by {name}")
    return Decoded(code, None, OTHERS.get(code, "not a status of these programs"))


def _signal(number: int) -> str | None:
    try:
        return signal.Signals(number).name
    except ValueError:
        return None


def say(decoded: Decoded) -> str:
    """Return it as one line for a person."""
    if decoded.exit is None:
        return decoded.meaning
    return f"exit {decoded.exit}: {decoded.meaning}"
