"""A running QEMU's NICs by its command line, which tells the MACs that nobody else tells."""

from __future__ import annotations

from dataclasses import dataclass

from pyqemu_ifctl.qemu.running import Guest
from pyqemu_ifup.qemu.command_line import Option, canonical_mac

DEFAULT_MAC = "52:54:00:12:34:56"
"""The MAC of the first NIC without one; the next ones count on (qemu_macaddr_default_if_unset)."""


@dataclass(frozen=True)
class CommandNic:
    """One NIC of a command line: its MAC, and its other end.

    `type` is that of its backend, `tap` its tap's name; None where they are not known.
    """

    mac: str | None
    type: str | None
    tap: str | None


def nics_of(guest: Guest, most: int) -> tuple[CommandNic, ...]:
    """Return the NICs that have a backend, in the order in which QEMU gives them their MACs.

    There are `most` of them at most.
    """
    found = guest.options
    netdevs = {each.id: each for each in found if each.name == "netdev"}
    hub = [each for each in found if each.name == "net" and each.keys.get("type") != "nic"]
    # NOTE: those of -net and -nic are the machine's own, which is made before any -device.
    nics = [
        each
        for each in found
        if each.name == "nic" or (each.name == "net" and each.keys.get("type") == "nic")
    ]
    nics += [each for each in found if each.name == "device" and "netdev" in each.keys]
    given = 0
    answer = []
    for option in nics[:most]:
        mac = canonical_mac(option.keys.get(_mac_key(option), ""))
        if mac is None:
            mac = DEFAULT_MAC[:-2] + f"{int(DEFAULT_MAC[-2:], 16) + given:02x}"
            given += 1
        if option.name == "nic":
            backend: Option | None = option
        elif option.name == "net" and "netdev" not in option.keys:
            backend = hub[0] if len(hub) == 1 else None
        else:
            backend = netdevs.get(option.keys["netdev"])
        kind = backend.keys.get("type") if backend is not None else None
        answer.append(CommandNic(mac, kind, _tap_of(guest, backend)))
    return tuple(answer)


def _mac_key(option: Option) -> str:
    return "macaddr" if option.name == "net" else "mac"


def _tap_of(guest: Guest, backend: Option | None) -> str | None:
    """Return the name of a backend's tap: by its ifname=, its descriptor, or as the only one."""
    if backend is None or backend.keys.get("type") not in ("tap", "bridge"):
        return None
    descriptor = (backend.keys.get("fd") or backend.keys.get("fds", "")).partition(":")[0]
    if descriptor.isdecimal():
        return guest.taps.get(int(descriptor))
    if "ifname" in backend.keys:
        return backend.keys["ifname"]
    taps = set(guest.taps.values())
    return taps.pop() if len(taps) == 1 else None
