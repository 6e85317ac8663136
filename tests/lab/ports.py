"""Ports as a policy makes them: where they are, and with what settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyqemu_ifconf.kinds.base import Place
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB, BridgePlace
from pyqemu_ifconf.kinds.linux import LinuxPlace
from pyqemu_ifconf.kinds.openvswitch import OvsPlace
from pyqemu_ifconf.policy import Kind, Port


def place_on(bridge: str, kind: Kind | None = None, ovsdb: str = DEFAULT_OVSDB) -> Place:
    """Return what a network says of its bridge: the kind too, or not (None)."""
    if kind == "linux":
        return LinuxPlace(bridge)
    return OvsPlace(bridge, ovsdb) if kind is not None else BridgePlace(bridge, ovsdb)


def giving(port: Port, **settings: Any) -> Port:
    """Return the port with other settings, by their keys in the policy."""
    return replace(port, settings=replace(port.settings, **settings))
