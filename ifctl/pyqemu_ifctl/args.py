"""pyqemu-ifctl args: the arguments that give QEMU the NICs of a guest of the policy's."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import load_host_policy
from pyqemu_ifconf.policy import Nic, Policy, Vm
from pyqemu_ifctl.answer import Answer, to_json
from pyqemu_ifctl.nics import (
    Hooks,
    find_vm,
    legacy,
    macs_of,
    modern,
    tap_by_hooks,
    user_mode,
)
from pyqemu_ifctl.qemu import check_arguments, find_qemu

MACHINE_IDS = ("/etc/machine-id", "/var/lib/dbus/machine-id")
"""Where a host's own id is (machine-id(5))."""


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
    macs = macs_of(policy, host_id())
    hooks = find_hooks(sys.argv[0])
    if as_legacy:
        found = legacy(policy, vm, macs, hooks)
    else:
        found = []
        for nic in vm.nics:
            backend = (
                user_mode(nic.id, nic.user) if nic.user is not None else tap_by_hooks(nic, hooks)
            )
            found += modern(policy, nic, macs[vm.name, nic.id], backend)
    if check:
        check_arguments(find_qemu(qemu), machine, dry(policy, vm, macs))
    if as_json:
        return Answer(to_json({"vm": vm.name, "arguments": found}))
    return Answer(shlex.join(found) + "\n")


def dry(policy: Policy, vm: Vm, macs: Mapping[tuple[str, str], str]) -> list[str]:
    """Return the guest's arguments with what opens a tap or a port of the host's left out."""
    found: list[str] = []
    for number, nic in enumerate(vm.nics):
        found += modern(policy, nic, macs[vm.name, nic.id], _dry_backend(nic, number))
    return found


def _dry_backend(nic: Nic, number: int) -> str:
    if nic.user is not None:
        return user_mode(nic.id, nic.user, forwards=False)
    return f"hubport,id={nic.id},hubid={number}"


def host_id() -> str:
    """Return what no other host is called. Raises Failure (71) where this one has no id."""
    for path in MACHINE_IDS:
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                found = file.read().strip()
        except (FileNotFoundError, PermissionError):
            continue
        if found and found != "uninitialized":
            return found
    raise Failure(
        Status.REFUSED, "the host has no id to make MACs of", f"no {MACHINE_IDS[0]}",
        "make one: systemd-machine-id-setup, or: dbus-uuidgen --ensure=/etc/machine-id; or give "
        "each NIC its mac:",
    )


def find_hooks(program: str) -> Hooks:
    """Return the hooks of the installation that `program`, this one, is of.

    Raises Failure (69) where they are not beside it.
    """
    folder = os.path.dirname(os.path.abspath(program))
    hooks = Hooks(os.path.join(folder, "pyqemu-ifup"), os.path.join(folder, "pyqemu-ifdown"))
    for path in (hooks.ifup, hooks.ifdown):
        if not os.access(path, os.X_OK):
            raise Failure(
                Status.UNAVAILABLE, f"the hook {path} is not there",
                "the hooks are installed beside this", "install them: make install",
            )
    return hooks
