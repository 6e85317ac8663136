"""pyqemu-ifctl names: the names of the policy, one a line, for a shell that completes them."""

from __future__ import annotations

import argparse
import os

from pyqemu_ifctl.answer import Answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its argument."""
    parser.add_argument("what", choices=("networks", "vms"))


def run(args: argparse.Namespace) -> Answer:
    """Print the names of all networks, or guests, of this host's policy. Raises Failure."""
    from pyqemu_ifconf.load import load_host_policy

    policy = load_host_policy(os.environ)
    found = policy.networks if args.what == "networks" else policy.vms
    return Answer("".join(f"{name}\n" for name in found))
