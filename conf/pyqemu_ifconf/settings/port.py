"""The settings of one port, whatever kind of network it is on."""

from __future__ import annotations

from dataclasses import dataclass

from pyqemu_ifconf.settings.vlan import Vlan


@dataclass(frozen=True)
class PortSettings:
    """What one port is given; a field has the name of its key in the policy.

    `mtu` is in bytes; None is the MTU of what the port is on. `vlan` None is the untagged network.
    `txqueuelen` None: it is left alone. `macs` is "nic" if the guest's own MAC alone passes, None
    if any does.
    """

    mtu: int | None = None
    vlan: Vlan | None = None
    isolated: bool = False
    external_ids: tuple[tuple[str, str], ...] = ()
    txqueuelen: int | None = None
    macs: str | None = None
