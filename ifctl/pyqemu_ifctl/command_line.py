"""The command line of pyqemu-ifctl: what its words ask for, and the answer of the verb."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifctl.answer import Answer, by_name
from pyqemu_ifctl.program import PROGRAM, put
from pyqemu_ifctl.verbs import Verb
from pyqemu_ifup.hook import explain_bug, open_log


class Parser(argparse.ArgumentParser):
    """A parser that raises Failure (64) instead of exiting with 2, and never colours.

    From Python 3.14 on argparse hands `color` of the parser above on to that of each verb.
    """

    def __init__(
        self, prog: str, description: str, epilog: str | None = None, *, color: bool = False
    ) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.color = color

    def print_help(self, file: object = None) -> None:
        """Print the help to standard output; a reader who has gone misses nothing."""
        try:
            put(sys.stdout, self.format_help())
        except BrokenPipeError:
            return

    def error(self, message: str) -> NoReturn:
        """Raise Failure (64)."""
        raise Failure(Status.USAGE, message, "", f"see {self.prog} --help")


def cannot_write(error: OSError) -> Answer:
    """Return what is said of a standard output that takes nothing."""
    line = f"cannot write standard output: {os.strerror(error.errno or 0)}"
    return Answer("", Status.REFUSED, (by_name(line),))


def answer_or_failure(words: list[str], verbs: Sequence[Verb]) -> Answer:
    """Return what the verb that `words` name answers, a failure as one line for standard error."""
    try:
        open_log(PROGRAM)
        return _answer(words, verbs)
    except Failure as failure:
        return Answer("", failure.status, (by_name(str(failure)),))
    except Exception as error:  # NOTE: the outermost handler; all else catches by name.
        return Answer("", Status.BUG, (by_name(explain_bug(error)),))


def _answer(words: list[str], verbs: Sequence[Verb]) -> Answer:
    # NOTE: an option alone, and a verb is required.
    words = ["version"] if words == ["--version"] else words
    words, command = split_command(words)
    # NOTE: no option that comes before the verb takes a value.
    name = next((word for word in words if not word.startswith("-")), "")
    args = build_parser(verbs, name).parse_args(words)
    if args.version:
        raise Failure(Status.USAGE, "--version goes with no verb", "", "give it alone")
    args.command = command
    answer: Answer = next(verb for verb in verbs if verb.name == args.verb).load().run(args)
    return answer


def split_command(words: list[str]) -> tuple[list[str], list[str]]:
    """Return our own words and those of the command that `run` is given after `--`.

    NOTE: argparse treats `--` differently from version to version.
    """
    if words[:1] != ["run"] or "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def build_parser(verbs: Sequence[Verb], only: str | None = None) -> Parser:
    """Return the parser of the command line, with the options of each verb.

    Each verb is loaded for that. With `only`, just the one of this name has its options.
    """
    parser = Parser(
        PROGRAM,
        "Shows and explains what pyqemu-ifup does with the taps of this host.",
        "Exit statuses are those of pyqemu-ifup(8); pyqemu-ifctl(8) tells more.",
    )
    parser.add_argument("--version", action="store_true", help="print the version, and that alone")
    parsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in verbs:
        if verb.listed:
            added = parsers.add_parser(verb.name, help=verb.about, description=verb.about)
        else:
            # NOTE: one without help is not listed.
            added = parsers.add_parser(verb.name, description=verb.about)
        if only in (None, verb.name):
            verb.load().add_arguments(added)
    return parser
