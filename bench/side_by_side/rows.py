"""What is measured: one row for each way to bring a tap up and down."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from side_by_side.hosts import BRIDGE, MTU, OVS_BRIDGE

TAP = "bench0"
VID = 100
STOCK_UP, STOCK_DOWN = Path("/etc/qemu-ifup"), Path("/etc/qemu-ifdown")
HostName = Literal["plain", "ovs"]

BARE, SCRIPT = "python", "ip-script"
"""The keys of the rows that all others are compared with."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what is run, on which host, and where the tap then is.

    `bridge` None: the row attaches nothing. `text` shows a script's own lines, by its path.
    """

    key: str
    label: str
    host: HostName
    up: tuple[str, ...]
    down: tuple[str, ...] | None = None
    bridge: str | None = None
    detaches: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    text: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """A row that cannot be measured here, and why."""

    label: str
    because: str


def make_rows(
    prefix: Path, folder: Path, *, vlan_filtering: bool, no_ovs: str | None
) -> tuple[list[Row], list[LeftOut]]:
    """Return the rows for the installation in `prefix`; their scripts and policies go to `folder`.

    `no_ovs` tells why there is no Open vSwitch; None where there is.
    """
    python = str(prefix / "lib" / "pyqemu-ifup" / "bin" / "python3")
    rows = [
        Row(BARE, "python3 -I -S -c pass", "plain", (python, "-I", "-S", "-c", "pass")),
        Row("python-site", "python3 -I -c pass", "plain", (python, "-I", "-c", "pass")),
        Row("pyroute2", "python3 -c 'import pyroute2'", "plain", (python, "-c", "import pyroute2")),
        _script(SCRIPT, "ip script, two lines", "plain", BRIDGE, folder, _TWO_LINES, _NOMASTER),
        _long_script(folder, vlan_filtering),
    ]
    left_out: list[LeftOut] = []
    if os.access(STOCK_UP, os.X_OK):
        rows.append(_stock_row())
    else:
        left_out.append(LeftOut(str(STOCK_UP), f"there is no {STOCK_UP} here"))
    ours = _write_policy(folder, "linux", BRIDGE, VID if vlan_filtering else None)
    rows.append(_our_row("linux", "pyqemu-ifup, Linux bridge", "plain", BRIDGE, prefix, ours))
    if no_ovs is None:
        rows.append(
            _our_row("linux-ovs", "  the same, host with OVS", "ovs", BRIDGE, prefix, ours)
        )
        rows.append(_ovs_script(folder))
        ours = _write_policy(folder, "ovs", OVS_BRIDGE, VID)
        rows.append(_our_row("ovs", "pyqemu-ifup, OVS bridge", "ovs", OVS_BRIDGE, prefix, ours))
    else:
        left_out.append(LeftOut("each with Open vSwitch", no_ovs))
    return rows, left_out


_TWO_LINES = f"""\
ip link set "$1" master {BRIDGE}
ip link set "$1" up
"""
_NOMASTER = """\
ip link set "$1" down
ip link set "$1" nomaster
"""


def _script(
    key: str, label: str, host: HostName, bridge: str, folder: Path, up: str, down: str
) -> Row:
    text = {}
    for name, lines in ((f"{key}-up", up), (f"{key}-down", down)):
        path = folder / name
        path.write_text(f"#!/bin/sh -e\n{lines}")
        path.chmod(0o755)
        text[str(path)] = lines
    up_path, down_path = text
    return Row(key, label, host, (up_path, TAP), (down_path, TAP), bridge, text=text)


def _long_script(folder: Path, vlan_filtering: bool) -> Row:
    vlan = (
        f'bridge vlan del dev "$1" vid 1\nbridge vlan add dev "$1" vid {VID} pvid untagged\n'
        if vlan_filtering
        else ""
    )
    up = f"""\
read -r mac <"/sys/class/net/$1/address"
ip link set "$1" address "fe:${{mac#*:}}"
ip link set "$1" mtu {MTU}
ip link set "$1" master {BRIDGE}
bridge link set dev "$1" isolated on
{vlan}ip link set "$1" up
"""
    label = "ip script, MTU MAC isolation" + (" VLAN" if vlan else "")
    return _script("ip-script-long", label, "plain", BRIDGE, folder, up, _NOMASTER)


def _ovs_script(folder: Path) -> Row:
    up = f'ovs-vsctl add-port {OVS_BRIDGE} "$1" tag={VID}\nip link set "$1" up\n'
    down = f'ip link set "$1" down\novs-vsctl del-port {OVS_BRIDGE} "$1"\n'
    return _script("ovs-script", "ovs-vsctl script, tag", "ovs", OVS_BRIDGE, folder, up, down)


def _stock_row() -> Row:
    down = (str(STOCK_DOWN), TAP) if os.access(STOCK_DOWN, os.X_OK) else None
    return Row(
        "stock", str(STOCK_UP), "plain", (str(STOCK_UP), TAP), down, BRIDGE, detaches=False
    )


def _our_row(
    key: str, label: str, host: HostName, bridge: str, prefix: Path, policy: Path
) -> Row:
    up, down = (str(prefix / "bin" / name) for name in ("pyqemu-ifup", "pyqemu-ifdown"))
    env = {"PYQEMU_IFUP_POLICY": str(policy)}
    text = {str(policy): policy.read_text()}
    return Row(key, label, host, (up, TAP), (down, TAP), bridge, env=env, text=text)


def _write_policy(folder: Path, name: str, bridge: str, vid: int | None) -> Path:
    vlan = "" if vid is None else f"    vlan: {vid}\n"
    path = folder / f"{name}.yaml"
    path.write_text(
        f"version: 1\n"
        f"networks:\n"
        f"  bench:\n"
        f"    bridge: {bridge}\n"
        f"rules:\n"
        f"  - tap: bench*\n"
        f"    network: bench\n"
        f"    isolated: true\n{vlan}"
    )
    path.chmod(0o644)
    return path


def environment(row: Row) -> dict[str, str]:
    """Return the environment that the row's commands get: this one's, without what steers them."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "OVS_", "PYQEMU_IFUP_"))
    }
    return {**kept, **row.env}
