"""pyqemu-ifctl VERB: the operator's program, from its first moment to its last, and its verbs.

It imports next to nothing before it heeds signals: `args` has something to say to them. The module
of a verb is loaded here alone, once it is known to be the one.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib import import_module

from pyqemu_ifctl.program import PROGRAM, put
from pyqemu_ifctl.verbs import Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    # NOTE: typing alone takes as long to load as all the rest here.
    from typing import NoReturn

    from pyqemu_ifctl.answer import Answer

NO_ARGUMENTS = "-pyqemu-ifctl-args-failed"
"""What `args` prints where it fails, for eval: a word to a shell, and to no QEMU an option.

NOTE: without a word about the network, QEMU starts with its user mode.
"""
ARGS = "args"
NEAR = 3
"""Letters of `args` that a verb has which is meant to be that."""


VERBS: tuple[Verb, ...] = (
    Verb(
        "check",
        lambda: import_module("pyqemu_ifctl.verbs.check"),
        "Check the policy: ok, or every error with its place.",
    ),
    Verb(
        "explain",
        lambda: import_module("pyqemu_ifctl.verbs.explain"),
        "Tell which rule decides for a tap, what it would get, and the equal commands.",
    ),
    Verb(
        "status",
        lambda: import_module("pyqemu_ifctl.verbs.status"),
        "Show every tap of this host and what is ours of it.",
    ),
    Verb(
        "apply",
        lambda: import_module("pyqemu_ifctl.verbs.apply"),
        "Put the policy in force on the taps of running guests.",
    ),
    Verb(
        "gc",
        lambda: import_module("pyqemu_ifctl.verbs.gc"),
        "Remove what is ours and whose tap is gone.",
    ),
    Verb(
        "agent",
        lambda: import_module("pyqemu_ifctl.verbs.agent"),
        "Show how the agents are: their requests, their policy, their last error.",
    ),
    Verb(
        "decode",
        lambda: import_module("pyqemu_ifctl.verbs.decode"),
        "Say in words the status that QEMU prints when a script has failed.",
    ),
    Verb(
        "args",
        lambda: import_module("pyqemu_ifctl.verbs.args"),
        "Print the arguments that give QEMU the NICs of a guest of the policy's.",
    ),
    Verb(
        "info",
        lambda: import_module("pyqemu_ifctl.verbs.info"),
        "Show the NICs of running guests, as QEMU and as this host have them.",
    ),
    Verb(
        "doctor",
        lambda: import_module("pyqemu_ifctl.verbs.doctor"),
        "Look for what is wrong with this host, and tell what mends it.",
    ),
    Verb(
        "models",
        lambda: import_module("pyqemu_ifctl.verbs.models"),
        "List the NIC models that a QEMU has.",
    ),
    Verb(
        "run",
        lambda: import_module("pyqemu_ifctl.verbs.run"),
        "Open taps through the agent and start a QEMU that has them.",
    ),
    Verb("version", lambda: import_module("pyqemu_ifctl.verbs.version"), "Print the version."),
    Verb(
        "names",
        lambda: import_module("pyqemu_ifctl.verbs.names"),
        "Print the names of the policy, for a shell.",
        listed=False,
    ),
)


def main() -> int:
    """Run the verb that the arguments of this process name and return its exit status."""
    words = sys.argv[1:]
    for_qemu = is_for_qemu(words)
    # NOTE: Ctrl-C ends what only reads files, without a traceback. `within_deadline` does the rest.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if for_qemu:
        for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(stop, _give_no_arguments)
    try:
        _fill_standard_descriptors()
        return _run(words, for_qemu=for_qemu)
    except (OSError, ImportError, MemoryError) as error:
        # NOTE: too few descriptors or too little memory (ulimit) to load what there is.
        if for_qemu:
            put(sys.stdout, f"{NO_ARGUMENTS}\n")
        put(sys.stderr, f"{PROGRAM}: cannot start: {error or 'out of memory'}\n")
        return os.EX_OSERR


def _run(words: list[str], *, for_qemu: bool) -> int:
    """Run a verb and print what it answers; return its exit status. Raises OSError."""
    from pyqemu_ifctl.command_line import answer_or_failure, cannot_write

    answer: Answer = answer_or_failure(words, VERBS)
    out = answer.out
    misused = answer.status == os.EX_USAGE and ARGS in words and words[0] != ARGS
    if answer.status and (for_qemu or misused):
        out = f"{NO_ARGUMENTS}\n"
    try:
        put(sys.stdout, out)
    except OSError as error:
        if error.errno != errno.EPIPE:
            answer = cannot_write(error)
    if answer.remarks:
        try:
            put(sys.stderr, "".join(f"{line}\n" for line in answer.remarks))
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
                raise
    return int(answer.status)


def is_for_qemu(words: list[str]) -> bool:
    """Tell whether the verb is, or is meant to be, `args`, whose output a shell gives QEMU.

    With --json a program reads it.
    """
    verb = next((word for word in words if not word.startswith("-")), "").lower()
    letters = len(set(verb) & set(ARGS))
    near = letters >= NEAR and abs(len(verb) - len(ARGS)) <= 1
    return near and not (words[0] == ARGS and "--json" in words)


def _give_no_arguments(number: int, frame: object) -> NoReturn:
    """End by a signal, with the word that keeps a QEMU from starting."""
    signal.signal(number, signal.SIG_DFL)
    put(sys.stdout, f"{NO_ARGUMENTS}\n")
    os.kill(os.getpid(), number)
    os._exit(os.EX_TEMPFAIL)


def _fill_standard_descriptors() -> None:
    """Give each closed standard descriptor to /dev/null, lest a socket of ours becomes one."""
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        null = os.dup(null)
    os.close(null)


if __name__ == "__main__":
    raise SystemExit(main())
