"""The verbs of pyqemu-ifctl: their command lines, and what runs each."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.names import check_tap_name
from pyqemu_ifconf.shell import readable, shown
from pyqemu_ifconf.version import say_version
from pyqemu_ifctl.answer import Answer
from pyqemu_ifctl.main import put
from pyqemu_ifup.manners import explain_bug, narrator, open_log, within_deadline

PROGRAM = "pyqemu-ifctl"
DEFAULT_QEMU = "qemu-system-x86_64"
TIMEOUT = 10.0
"""Seconds that a verb may take which looks at the switches."""
FOREVER = 1e8
"""Seconds of a verb that goes on until it is stopped."""


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
    return Answer("", Status.REFUSED, (_line(line),))


def answer_or_failure(words: list[str]) -> Answer:
    """Return what the verb answers, a failure as one line for standard error."""
    try:
        open_log(PROGRAM)
        # NOTE: an option alone, and a verb is required.
        words = ["version"] if words == ["--version"] else words
        words, command = split_command(words)
        args = build_parser().parse_args(words)
        if args.version:
            raise Failure(Status.USAGE, "--version goes with no verb", "", "give it alone")
        args.command = command
        return run(args)
    except Failure as failure:
        return Answer("", failure.status, (_line(str(failure)),))
    except Exception as error:  # NOTE: the outermost handler; all else catches by name.
        return Answer("", Status.BUG, (_line(explain_bug(error)),))


def split_command(words: list[str]) -> tuple[list[str], list[str]]:
    """Return our own words and those of the command that `run` is given after `--`.

    NOTE: argparse treats `--` differently from version to version.
    """
    if words[:1] != ["run"] or "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _line(text: str) -> str:
    return f"{PROGRAM}: {shown(text)}"


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    parser = Parser(
        PROGRAM,
        "Shows and explains what pyqemu-ifup does with the taps of this host.",
        "Exit statuses are those of pyqemu-ifup(8); pyqemu-ifctl(8) tells more.",
    )
    parser.add_argument("--version", action="store_true", help="print the version, and that alone")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, about: str, *, data: bool = True) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=about, description=about)
        if data:
            added.add_argument("--json", action="store_true", help="print one JSON object")
        return added

    check = verb("check", "Check the policy: ok, or every error with its place.")
    check.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help="check these files as one policy, not this host's own",
    )
    explain = verb(
        "explain", "Tell which rule decides for a tap, what it would get, and the equal commands."
    )
    explain.add_argument("tap", metavar="TAP")
    explain.add_argument("--vm", metavar="VM", help="the guest's name, of QEMU's -name")
    explain.add_argument("--netdev", metavar="ID", help="the netdev, of QEMU's id=")
    explain.add_argument("--mac", metavar="MAC", help="the MAC of the guest's device")
    explain.add_argument("--user", metavar="NAME", help="the login name that QEMU runs as")
    explain.add_argument(
        "--network", metavar="NET", help="whatever the rules say, as pyqemu-ifup@NET does"
    )
    status = verb("status", "Show every tap of this host and what is ours of it.")
    status.add_argument("tap", metavar="TAP", nargs="?", help="show all there is to this one")
    status.add_argument(
        "--watch", action="store_true", help="go on, and show it again whenever it changes"
    )
    status.add_argument(
        "--graph",
        choices=("dot", "svg"),
        metavar="dot|svg",
        help="draw guests, taps, VLANs, bridges and uplinks",
    )
    status.add_argument(
        "--exit-code", action="store_true", help="end 1 if a tap differs or is stale"
    )
    apply = verb("apply", "Put the policy in force on the taps of running guests.")
    apply.add_argument("taps", metavar="TAP", nargs="*", help="only these")
    apply.add_argument("--dry-run", action="store_true", help="tell what would be changed")
    apply.add_argument(
        "--cut", action="store_true", help="take down the links of taps that are denied by now"
    )
    apply.add_argument(
        "--exit-code", action="store_true", help="of a dry run: end 1 if a tap would be changed"
    )
    gc = verb("gc", "Remove what is ours and whose tap is gone.")
    gc.add_argument("tap", metavar="TAP", nargs="?", help="only what is left of this one")
    gc.add_argument("--dry-run", action="store_true", help="tell what would be removed")
    verb("agent", "Show how the agents are: their requests, their policy, their last error.")
    decode = verb("decode", "Say in words the status that QEMU prints when a script has failed.")
    decode.add_argument("status", metavar="STATUS", help="such as 16640")
    args = verb("args", "Print the arguments that give QEMU the NICs of a guest of the policy's.")
    args.add_argument("vm", metavar="VM")
    args.add_argument("--legacy", action="store_true", help="-net nic in place of -device")
    args.add_argument(
        "--qemu",
        metavar="PROGRAM",
        default=DEFAULT_QEMU,
        help=f"the QEMU that must take them ({DEFAULT_QEMU})",
    )
    args.add_argument("--machine", metavar="TYPE", help="its -machine, where it is not the default")
    args.add_argument("--no-check", action="store_true", help="ask no QEMU whether it takes them")
    about = verb("info", "Show the NICs of running guests, as QEMU and as this host have them.")
    about.add_argument("vm", metavar="VM", nargs="?", help="of this one only")
    about.add_argument("--qmp", metavar="PATH", help="its QMP socket")
    doctor = verb("doctor", "Look for what is wrong with this host, and tell what mends it.")
    doctor.add_argument(
        "checks", metavar="CHECK", nargs="*", help="do these checks only, such as bridge-mac"
    )
    doctor.add_argument(
        "--quiet", action="store_true", help="print errors alone, and nothing if there is none"
    )
    models = verb("models", "List the NIC models that a QEMU has.")
    models.add_argument(
        "qemu", metavar="QEMU", nargs="?", default=DEFAULT_QEMU, help=f"({DEFAULT_QEMU})"
    )
    start = verb("run", "Open taps through the agent and start a QEMU that has them.", data=False)
    start.usage = (
        f"{PROGRAM} run [VM] [--nic NETWORK[,tap=NAME][,id=ID][,queues=N] ...] -- QEMU ..."
    )
    start.add_argument("vm", metavar="VM", nargs="?", help="a guest of the policy's, for its NICs")
    start.add_argument(
        "--nic",
        metavar="NETWORK[,...]",
        action="append",
        default=[],
        help="a tap on this network, for -device ...,netdev=ID; net0, net1 ... without id=",
    )
    verb("version", "Print the version.", data=False)
    # NOTE: for the shells' completion; a verb without help is not listed.
    names = verbs.add_parser("names", description="Print the names of the policy, for a shell.")
    names.add_argument("what", choices=("networks", "vms"))
    return parser


def run(args: argparse.Namespace) -> Answer:
    """Run the verb of the parsed command line. Raises Failure."""
    # NOTE: each verb imports what it needs: check and decode get by without pyroute2.
    if args.verb == "version":
        return Answer(say_version(PROGRAM))
    if args.verb == "names":
        from pyqemu_ifconf.load import load_host_policy

        policy = load_host_policy(os.environ)
        found = policy.networks if args.what == "networks" else policy.vms
        return Answer("".join(f"{name}\n" for name in found))
    if args.verb == "decode":
        from pyqemu_ifctl.verbs import decode

        return decode.answer(args.status, as_json=args.json)
    if args.verb == "check":
        from pyqemu_ifctl.verbs.check import check

        return check(args.files, os.environ, as_json=args.json)
    if args.verb == "run":
        from pyqemu_ifctl.verbs.run import run as run_qemu

        answer = run_qemu(args.vm, args.nic, args.command, os.environ)
        return Answer("", answer.status, tuple(map(_line, answer.remarks)))
    if args.verb == "args":
        from pyqemu_ifctl.verbs.args import args as write_args

        return write_args(
            args.vm,
            os.environ,
            qemu=args.qemu,
            machine=args.machine,
            check=not args.no_check,
            as_legacy=args.legacy,
            as_json=args.json,
        )
    if args.verb == "models":
        from pyqemu_ifctl.verbs.models import models

        return models(args.qemu, as_json=args.json)
    if args.verb == "agent":
        from pyqemu_ifctl.verbs.agent import agent

        answer = agent(as_json=args.json)
        return Answer(answer.out, answer.status, tuple(map(_line, answer.remarks)))
    if args.verb == "apply":
        from pyqemu_ifctl.in_force import apply

        if args.exit_code and not args.dry_run:
            raise Failure(
                Status.USAGE, "--exit-code goes with --dry-run alone", "", "add --dry-run"
            )
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
        return Answer(answer.out, answer.status, tuple(map(_line, answer.remarks)))
    given: str | None = getattr(args, "tap", None)
    tap = check_tap_name(given) if given is not None else None
    tell = narrator(PROGRAM, tap)
    if args.verb == "status" and args.graph and (args.json or args.watch):
        raise Failure(
            Status.USAGE, "--graph goes with neither --json nor --watch", "", "give one of them"
        )
    if args.verb == "status" and args.watch and args.exit_code:
        raise Failure(Status.USAGE, "--exit-code does not go with --watch", "", "give one of them")
    if args.verb == "status" and args.watch:
        from pyqemu_ifctl.watch import watch_status

        with within_deadline(FOREVER, hook=False) as deadline:
            watch_status(
                tap,
                os.environ,
                deadline,
                tell,
                lambda text: put(sys.stdout, text),
                lambda line: put(sys.stderr, f"{_line(line)}\n"),
                as_json=args.json,
                redraw=sys.stdout is not None and sys.stdout.isatty(),
            )
        return Answer("")
    with within_deadline(TIMEOUT, hook=False) as deadline:
        if args.verb == "explain":
            from pyqemu_ifconf.policy import Caller
            from pyqemu_ifctl.explanation import explain

            caller = Caller(args.tap, args.vm, args.netdev, _mac(args.mac), args.user)
            answer = explain(caller, args.network, os.environ, deadline, tell, as_json=args.json)
        elif args.verb == "doctor":
            from pyqemu_ifctl.verbs.doctor import doctor

            answer = doctor(
                os.environ, deadline, tell, as_json=args.json, names=args.checks, quiet=args.quiet
            )
        elif args.verb == "info":
            from pyqemu_ifctl.qemu.cards import info

            answer = info(args.vm, args.qmp, os.environ, deadline, tell, as_json=args.json)
        elif args.verb == "status":
            from pyqemu_ifctl.taps import status

            answer = status(
                tap,
                os.environ,
                deadline,
                tell,
                as_json=args.json,
                graph=args.graph,
                exit_code=args.exit_code,
            )
        else:
            from pyqemu_ifctl.verbs.gc import gc

            answer = gc(tap, os.environ, deadline, tell, dry_run=args.dry_run, as_json=args.json)
    return Answer(answer.out, answer.status, tuple(map(_line, answer.remarks)))


def _mac(text: str | None) -> str | None:
    """Return a MAC as the policy has it. Raises Failure (64) where it is none."""
    if text is None:
        return None
    from pyqemu_ifup.caller import canonical_mac

    mac = canonical_mac(text)
    if mac is None:
        raise Failure(
            Status.USAGE,
            f"--mac {readable(text)} is not the MAC of a device",
            "",
            "give six pairs of hexadecimal digits, such as 52:54:00:12:34:56",
        )
    return mac
