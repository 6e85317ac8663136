"""pyqemu-ifctl args: the arguments that give QEMU the NICs of a guest of the policy's."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Policy, Vm, refuses_taps
from pyqemu_ifconf.shell import ifctl, quote, sh
from pyqemu_ifctl.answer import Answer, add_json, to_json
from pyqemu_ifctl.place import find_hooks
from pyqemu_ifctl.qemu.arguments import (
    by_hooks,
    find_vm,
    legacy,
    legacy_on_netdevs,
    modern,
    on_hubs,
)
from pyqemu_ifctl.qemu.binary import DEFAULT_QEMU, check_arguments, find_qemu
from pyqemu_ifup.nic_macs import find_macs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options and arguments."""
    add_json(parser)
    parser.add_argument("vm", metavar="VM")
    parser.add_argument("--legacy", action="store_true", help="-net nic in place of -device")
    parser.add_argument(
        "--qemu",
        metavar="PROGRAM",
        default=DEFAULT_QEMU,
        help=f"the QEMU that must take them ({DEFAULT_QEMU})",
    )
    parser.add_argument(
        "--machine", metavar="TYPE", help="its -machine, where it is not the default"
    )
    parser.add_argument("--no-check", action="store_true", help="ask no QEMU whether it takes them")


def run(args: argparse.Namespace) -> Answer:
    """Print the arguments for a guest. Raises Failure."""
    return arguments(
        args.vm,
        os.environ,
        qemu=args.qemu,
        machine=args.machine,
        check=not args.no_check,
        as_legacy=args.legacy,
        as_json=args.json,
    )


def _refuse_made(policy: Policy, vm: Vm) -> None:
    """Raise Failure (71) for a guest that has a NIC whose link QEMU can neither make nor open."""
    for nic in vm.nics:
        network = policy.networks.get(nic.network or "")
        if network is not None and (why := refuses_taps(network)):
            raise Failure(
                Status.REFUSED,
                f"{nic.id} of {quote(vm.name)} ({nic.position}) is nothing that QEMU opens itself",
                why,
                f"start the guest with {ifctl('run', vm.name)}",
            )


def arguments(
    name: str,
    environ: Mapping[str, str],
    *,
    qemu: str,
    machine: str | None,
    check: bool,
    as_legacy: bool,
    as_json: bool,
) -> Answer:
    """Print QEMU's arguments for the guest `name`, shell-quoted on one line, or as JSON.

    With `check`, the QEMU `qemu` must take them. Raises Failure.
    """
    from pyqemu_ifconf.load import load_host_policy

    policy = load_host_policy(environ)
    vm = find_vm(policy, name)
    _refuse_made(policy, vm)
    macs = find_macs(policy, vm)
    form = legacy if as_legacy else modern
    found = form(policy, vm, macs, by_hooks(find_hooks(sys.argv[0])))
    if check:
        # NOTE: on a hub of its own each, -net nic says the same as beside a -net.
        form = legacy_on_netdevs if as_legacy else modern
        check_arguments(find_qemu(qemu), machine, form(policy, vm, macs, on_hubs(vm)))
    if as_json:
        return Answer(to_json({"vm": vm.name, "arguments": found}))
    return Answer(sh(*found) + "\n")
