"""From a guest's NICs, as the policy has them, to QEMU's own arguments.

Pure.

QEMU's options: qemu-options.hx of QEMU, -netdev, -device and -net; a comma in a value is doubled
(qemu(1)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Forward, Nic, Policy, UserMode, Vm, nic_port
from pyqemu_ifconf.shell import readable
from pyqemu_ifconf.vms import is_virtio
from pyqemu_ifctl.place import Hooks
from pyqemu_ifup.nic_macs import Macs

MTU_OF_ETHERNET = 1500
NO_NIC = ("-nic", "none")
"""Of a guest without a NIC: QEMU gives one in user mode to a guest of which it is told none."""


def find_vm(policy: Policy, name: str) -> Vm:
    """Return the guest of this name. Raises Failure (69) where the policy has none."""
    vm = policy.vms.get(name)
    if vm is None:
        known = ", ".join(policy.vms)
        raise Failure(
            Status.UNAVAILABLE,
            f"the policy has no guest {readable(name)}",
            f"its guests are {known}" if known else f"{', '.join(policy.files)} has no vms",
            "add it to vms:, or correct the name",
        )
    return vm


Backend = Callable[[Nic], str]
"""Returns the value of -netdev for a NIC."""


def modern(policy: Policy, vm: Vm, macs: Macs, backend: Backend) -> list[str]:
    """Return -netdev and -device for each NIC of the guest."""
    found: list[str] = []
    for nic in vm.nics:
        found += ["-netdev", backend(nic), "-device", device(policy, nic, macs[vm.name, nic.id])]
    return found or list(NO_NIC)


def device(policy: Policy, nic: Nic, mac: str) -> str:
    """Return the value of -device for the NIC on its netdev."""
    words = [nic.model, f"netdev={nic.id}", f"id=nic-{nic.id}", f"mac={mac}"]
    if nic.queues > 1:
        words.append("mq=on")
    vectors = nic.vectors
    if vectors is None and nic.queues > 1:
        # NOTE: one for each queue of a pair, and one each for configuration and control.
        vectors = 2 * nic.queues + 2
    if vectors is not None:
        words.append(f"vectors={vectors}")
    mtu = guest_mtu(policy, nic)
    if mtu is not None:
        words.append(f"host_mtu={mtu}")
    words += [f"{key}={value}" for key, value in (("bus", nic.bus), ("addr", nic.addr)) if value]
    return ",".join(words)


def guest_mtu(policy: Policy, nic: Nic) -> int | None:
    """Return the MTU that the device tells the guest of, None where it is Ethernet's own.

    Only virtio can tell (VIRTIO_NET_F_MTU of the VIRTIO specification, 5.1.3).
    """
    if nic.network is None or not is_virtio(nic.model):
        return None
    mtu = nic_port(policy, nic).settings.mtu
    return mtu if mtu != MTU_OF_ETHERNET else None


def by_hooks(hooks: Hooks) -> Backend:
    """Return what gives each NIC its netdev where QEMU opens the taps, and calls the hooks."""

    def backend(nic: Nic) -> str:
        return user_mode(nic.id, nic.user) if nic.user is not None else tap_by_hooks(nic, hooks)

    return backend


def on_hubs(vm: Vm) -> Backend:
    """Return what gives each NIC a netdev that opens no tap and no port of the host's."""
    numbers = {nic.id: number for number, nic in enumerate(vm.nics)}

    def backend(nic: Nic) -> str:
        if nic.user is not None:
            return user_mode(nic.id, nic.user, forwards=False)
        return f"hubport,id={nic.id},hubid={numbers[nic.id]}"

    return backend


def tap_by_hooks(nic: Nic, hooks: Hooks) -> str:
    """Return the netdev of a tap that QEMU opens, and that the hooks attach."""
    words = [
        "tap",
        f"id={nic.id}",
        f"ifname={_doubled(nic.tap)}",
        f"script={_doubled(hooks.ifup)}",
        f"downscript={_doubled(hooks.ifdown)}",
    ]
    return ",".join(words + ([f"queues={nic.queues}"] if nic.queues > 1 else []))


def tap_by_descriptors(nic_id: str, taps: Sequence[int], vhosts: Sequence[int]) -> str:
    """Return the netdev of a tap whose queues are open already, and so is vhost-net, or not."""
    many = "s" if len(taps) > 1 else ""
    words = ["tap", f"id={nic_id}", f"fd{many}={':'.join(map(str, taps))}"]
    if vhosts:
        words += ["vhost=on", f"vhostfd{many}={':'.join(map(str, vhosts))}"]
    return ",".join(words)


def user_mode(nic_id: str, user: UserMode, *, forwards: bool = True) -> str:
    """Return the netdev of QEMU's user-mode network; without `forwards` it opens no port."""
    words = ["user", f"id={nic_id}", *_user_words(user)]
    return ",".join([*words, *(map(_hostfwd, user.forward) if forwards else ())])


def _user_words(user: UserMode) -> list[str]:
    words = [f"{protocol}=off" for protocol in ("ipv4", "ipv6") if getattr(user, protocol) is False]
    pairs = (
        ("net", user.ipv4),
        ("ipv6-net", user.ipv6),
        ("hostname", user.hostname),
        ("dns", user.dns),
        *(("dnssearch", domain) for domain in user.search),
    )
    words += [f"{key}={value}" for key, value in pairs if value]
    return words + (["restrict=on"] if user.restrict else [])


def _hostfwd(forward: Forward) -> str:
    return (
        f"hostfwd={forward.protocol}:{forward.address}:{forward.port}"
        f"-{forward.to_address}:{forward.to_port}"
    )


def legacy(policy: Policy, vm: Vm, macs: Macs, backend: Backend) -> list[str]:
    """Return -net nic, and -net with its backend; for several NICs, -netdev in place of that.

    QEMU plugs every -net into one hub, which would join the networks of several NICs. Raises
    Failure (71) for what this form cannot say.
    """
    if len(vm.nics) > 1:
        return legacy_on_netdevs(policy, vm, macs, backend)
    found: list[str] = []
    for nic in vm.nics:
        words = _legacy_nic(policy, nic, macs[vm.name, nic.id])
        found += ["-net", ",".join(["nic", *words]), "-net", backend(nic)]
    return found or list(NO_NIC)


def legacy_on_netdevs(policy: Policy, vm: Vm, macs: Macs, backend: Backend) -> list[str]:
    """Return -netdev, and -net nic on it, for each NIC of the guest. Raises Failure (71)."""
    found: list[str] = []
    for nic in vm.nics:
        words = _legacy_nic(policy, nic, macs[vm.name, nic.id])
        found += ["-netdev", backend(nic), "-net", ",".join(["nic", f"netdev={nic.id}", *words])]
    return found or list(NO_NIC)


def _legacy_nic(policy: Policy, nic: Nic, mac: str) -> list[str]:
    """Return what -net nic says of the NIC itself. Raises Failure (71)."""
    if nic.queues > 1:
        raise _not_legacy(nic, "queues")
    mtu = guest_mtu(policy, nic)
    if mtu is not None:
        raise _not_legacy(nic, f"host_mtu, and the network's MTU is {mtu}")
    if nic.bus or nic.addr:
        # NOTE: since version 9, QEMU passes the addr= of -net nic over without a word.
        raise _not_legacy(nic, "a PCI address that each QEMU heeds")
    words = [f"model={nic.model}", f"macaddr={mac}"]
    return words + ([f"vectors={nic.vectors}"] if nic.vectors is not None else [])


def _not_legacy(nic: Nic, what: str) -> Failure:
    return Failure(
        Status.REFUSED,
        f"--legacy has no words for {what}",
        f"{nic.id} at {nic.position}",
        "leave --legacy out",
    )


def _doubled(value: str) -> str:
    return value.replace(",", ",,")
