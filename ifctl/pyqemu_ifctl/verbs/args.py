"""pyqemu-ifctl args: the arguments that give QEMU the NICs of a guest of the policy's."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import load_host_policy
from pyqemu_ifconf.policy import Policy, Vm
from pyqemu_ifconf.shell import sh
from pyqemu_ifctl.answer import Answer, to_json
from pyqemu_ifctl.place import find_hooks
from pyqemu_ifctl.qemu.arguments import (
    Macs,
    by_hooks,
    find_vm,
    legacy,
    legacy_on_netdevs,
    macs_of,
    modern,
    on_hubs,
)
from pyqemu_ifctl.qemu.binary import check_arguments, find_qemu
from pyqemu_ifup import own_mac


def args(
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
    policy = load_host_policy(environ)
    vm = find_vm(policy, name)
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


def find_macs(policy: Policy, vm: Vm) -> Macs:
    """Return the MACs of this host's NICs, those of the guest `vm` among them.

    Raises Failure: 65 where two are alike, 71 where the host has no id to make one of.
    """
    macs = macs_of(policy, own_mac.find_host_id())
    return macs if all((vm.name, nic.id) in macs for nic in vm.nics) else macs_of(policy, host_id())


def host_id() -> str:
    """Return what no other host is called. Raises Failure (71) where this one has no id."""
    found = own_mac.find_host_id()
    if found is None:
        raise Failure(
            Status.REFUSED,
            "the host has no id to make MACs of",
            f"no {own_mac.MACHINE_IDS[0]}",
            "make one: systemd-machine-id-setup, or: dbus-uuidgen --ensure=/etc/machine-id; or "
            "give each NIC of the guest a mac of its own",
        )
    return found
