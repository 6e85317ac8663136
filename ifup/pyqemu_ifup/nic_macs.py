"""The MACs of the NICs of guests; `find_macs` and `host_id` alone look at this host."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Nic, Policy, Vm
from pyqemu_ifconf.shell import quote
from pyqemu_ifup.system import own_mac

MAC_PREFIX = "52:54:00"
"""That of QEMU's own MACs."""
Macs = Mapping[tuple[str, str], str]
"""MACs by the guest's name and the NIC's id."""


def macs_of(policy: Policy, host: str | None) -> Macs:
    """Return the MAC of each NIC of the policy.

    One that is not given is made of `host`, a name that no other host has, the guest's name and
    the NIC's id; of a host without a name (None) it has none. Raises Failure (65) where two would
    be alike.
    """
    found: dict[tuple[str, str], str] = {}
    holders: dict[str, tuple[str, Nic]] = {}
    for vm in policy.vms.values():
        for nic in vm.nics:
            if nic.mac is None and host is None:
                continue
            mac = nic.mac or made_mac(host or "", vm.name, nic.id)
            other = holders.setdefault(mac, (vm.name, nic))
            if other[1] is not nic:
                raise Failure(
                    Status.POLICY_INVALID,
                    f"two NICs would have the MAC {mac}",
                    f"{nic.id} of {quote(vm.name)} ({nic.position}) and {other[1].id} of "
                    f"{other[0]} ({other[1].position})",
                    "give one of them another mac",
                )
            found[vm.name, nic.id] = mac
    return found


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


def made_mac(host: str, vm: str, nic_id: str) -> str:
    """Return the MAC of a NIC that is given none: the same each time, and another elsewhere."""
    digest = sha256("\0".join((host, vm, nic_id)).encode()).hexdigest()
    return ":".join((MAC_PREFIX, digest[0:2], digest[2:4], digest[4:6]))
