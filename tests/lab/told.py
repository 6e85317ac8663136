"""What a sentence of ours says that a person is to run, run as it stands there."""

from __future__ import annotations

import re
import shlex

from lab.hooks import Hooks

COMMAND = re.compile(r"pyqemu-ifctl (?:gc|apply)(?: --cut)?(?: --)?(?: \S*\d)?(?=[ ,;:\n]|$)")
"""One about no tap, or one whose name ends in a digit, as those of the tests do."""


def run_told(hooks: Hooks, text: str) -> list[str]:
    """Run each command of pyqemu-ifctl that stands in `text`, and return what they printed.

    Raises AssertionError where there is none, or one fails.
    """
    commands = COMMAND.findall(text)
    assert commands, text
    printed = []
    for command in commands:
        done = hooks.ctl(*shlex.split(command)[1:])
        assert (done.returncode, done.stderr) == (0, ""), (command, done)
        printed.append(done.stdout)
    return printed
