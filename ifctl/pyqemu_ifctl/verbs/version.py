"""pyqemu-ifctl version: which one this is."""

from __future__ import annotations

import argparse

from pyqemu_ifconf.version import say_version
from pyqemu_ifctl.answer import Answer
from pyqemu_ifctl.program import PROGRAM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb nothing: it has no options."""


def run(args: argparse.Namespace) -> Answer:
    """Print the version."""
    return Answer(say_version(PROGRAM))
