"""The settings of one port, whatever kind of network it is on."""

from __future__ import annotations

from dataclasses import dataclass

from pyqemu_ifconf.settings.vlan import Vlan


@dataclass(frozen=True)
class PortSettings:
    """What one port is given, each by the name of its key in the policy.

    `mtu` is in bytes, None for that of what the port is on. `vlan` None is the untagged network.
    `txqueuelen` None: left alone.
    """

    mtu: int | None = None
    vlan: Vlan | None = None
    isolated: bool = False
    external_ids: tuple[tuple[str, str], ...] = ()
    txqueuelen: int | None = None
