"""What is measured: one row for each way to bring a tap up and down."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from side_by_side.hosts import BRIDGE, MTU, OVS_BRIDGE, VID, Plan

TAP, OVS_TAP = "bench0", "bench1"
"""The taps; an agent's policy puts the second one on Open vSwitch."""
STOCK_UP, STOCK_DOWN = Path("/etc/qemu-ifup"), Path("/etc/qemu-ifdown")
QEMU_HELPERS = (Path("/usr/lib/qemu/qemu-bridge-helper"), Path("/usr/libexec/qemu-bridge-helper"))
"""Where distributions put QEMU's own helper."""

BARE, SCRIPT, PYROUTE2 = "python", "ip-script", "pyroute2"
OVS_SCRIPT, LONG_OVS_SCRIPT = "ovs-script", "ovs-script-long"
"""The keys of the rows that others are compared with; all of them with the first two."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what is run, on which host, and where the tap then is.

    `bridge` None: the row attaches nothing. `helper`: `up` makes the tap and hands it over, as
    QEMU has it, with --fd. `text` shows a script's own lines, by its path.
    """

    key: str
    label: str
    host: str
    up: tuple[str, ...]
    down: tuple[str, ...] | None = None
    bridge: str | None = None
    tap: str = TAP
    detaches: bool = True
    helper: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    text: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """A row that cannot be measured here, and why."""

    label: str
    because: str


def make_rows(
    plan: Plan, agents: Mapping[str, str], *, no_ovs: str | None
) -> tuple[list[Row], list[LeftOut]]:
    """Return the rows of the first part; their scripts and policies go to the plan's folder.

    `agents` are the sockets of the hosts' agents. `no_ovs` tells why there is no Open vSwitch;
    None where there is.
    """
    folder = plan.folder
    rows = [
        bare_row(plan.prefix, "plain"),
        bare_row(plan.prefix, "plain", site=True),
        _import_row(plan.prefix, "plain"),
        script_row(folder, "plain"),
        _long_script(folder, plan.vlan_filtering),
    ]
    left_out: list[LeftOut] = []
    if os.access(STOCK_UP, os.X_OK):
        rows.append(_stock_row())
    else:
        left_out.append(LeftOut(str(STOCK_UP), f"there is no {STOCK_UP} here"))
    linux, ovs = Target(BRIDGE, plan.vid), Target(OVS_BRIDGE, VID)
    alone = {"PYQEMU_IFUP_POLICY": str(write_policy(folder / "linux.yaml", {TAP: linux}))}
    rows += [
        hook_row("linux", "pyqemu-ifup, Linux bridge", "plain", BRIDGE, plan.prefix, alone),
        _asking("linux-agent", "Linux bridge", "plain", BRIDGE, plan, agents),
    ]
    theirs = [str(path) for path in QEMU_HELPERS if os.access(path, os.X_OK)]
    if theirs:
        rows.append(_helper_row("qemu-helper", "QEMU's qemu-bridge-helper", theirs[0], BRIDGE, {}))
    else:
        left_out.append(LeftOut("QEMU's qemu-bridge-helper", f"there is no {QEMU_HELPERS[0]} here"))
    rows.append(_our_helper(plan, agents))
    if no_ovs is not None:
        left_out.append(LeftOut("each with Open vSwitch", no_ovs))
        return rows, left_out
    alone_on_ovs = {"PYQEMU_IFUP_POLICY": str(write_policy(folder / "ovs.yaml", {TAP: ovs}))}
    rows += [
        hook_row("linux-ovs", "pyqemu-ifup, host with OVS", "ovs", BRIDGE, plan.prefix, alone),
        _asking("linux-ovs-agent", "host with OVS", "ovs", BRIDGE, plan, agents),
        ovs_script_row(folder, "ovs"),
        _long_ovs_script(folder),
        hook_row("ovs", "pyqemu-ifup, OVS bridge", "ovs", OVS_BRIDGE, plan.prefix, alone_on_ovs),
        _asking("ovs-agent", "OVS bridge", "ovs", OVS_BRIDGE, plan, agents, OVS_TAP),
    ]
    return rows, left_out


def bare_row(prefix: Path, host: str, *, site: bool = False) -> Row:
    """Return the row of an interpreter that does nothing, `site`: with its paths made up."""
    python = str(prefix / "lib" / "pyqemu-ifup" / "bin" / "python3")
    if site:
        return Row("python-site", "python3 -I -c pass", host, (python, "-I", "-c", "pass"))
    return Row(BARE, "python3 -I -S -c pass", host, (python, "-I", "-S", "-c", "pass"))


def _import_row(prefix: Path, host: str) -> Row:
    python = str(prefix / "lib" / "pyqemu-ifup" / "bin" / "python3")
    words = (python, "-c", "import pyroute2")
    return Row(PYROUTE2, "python3 -c 'import pyroute2'", host, words)


_TWO_LINES = f"""\
ip link set "$1" master {BRIDGE}
ip link set "$1" up
"""
_NOMASTER = """\
ip link set "$1" down
ip link set "$1" nomaster
"""
_DEL_PORT = f"""\
ip link set "$1" down
ovs-vsctl del-port {OVS_BRIDGE} "$1"
"""
_MAC_AND_MTU = f"""\
read -r mac <"/sys/class/net/$1/address"
ip link set "$1" address "fe:${{mac#*:}}"
ip link set "$1" mtu {MTU}
"""


def script_row(folder: Path, host: str, key: str = SCRIPT, more: str = "") -> Row:
    """Return the row of the two-line `ip` script; `more` joins its label."""
    return _script(key, f"ip script, two lines{more}", host, BRIDGE, folder, _TWO_LINES, _NOMASTER)


def ovs_script_row(folder: Path, host: str, key: str = OVS_SCRIPT, more: str = "") -> Row:
    """Return the row of the `ovs-vsctl` script; `more` joins its label."""
    up = f'ovs-vsctl add-port {OVS_BRIDGE} "$1" tag={VID}\nip link set "$1" up\n'
    return _script(key, f"ovs-vsctl script, tag{more}", host, OVS_BRIDGE, folder, up, _DEL_PORT)


def _long_ovs_script(folder: Path) -> Row:
    up = f"""\
{_MAC_AND_MTU}ovs-vsctl add-port {OVS_BRIDGE} "$1" tag={VID} vlan_mode=access protected=true
ip link set "$1" up
"""
    label = "ovs-vsctl script, tag MTU MAC"
    return _script(LONG_OVS_SCRIPT, label, "ovs", OVS_BRIDGE, folder, up, _DEL_PORT)


def _script(key: str, label: str, host: str, bridge: str, folder: Path, up: str, down: str) -> Row:
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
{_MAC_AND_MTU}ip link set "$1" master {BRIDGE}
bridge link set dev "$1" isolated on
{vlan}ip link set "$1" up
"""
    label = "ip script, MTU MAC isolation" + (" VLAN" if vlan else "")
    return _script("ip-script-long", label, "plain", BRIDGE, folder, up, _NOMASTER)


def _stock_row() -> Row:
    down = (str(STOCK_DOWN), TAP) if os.access(STOCK_DOWN, os.X_OK) else None
    return Row("stock", str(STOCK_UP), "plain", (str(STOCK_UP), TAP), down, BRIDGE, detaches=False)


def hook_row(
    key: str,
    label: str,
    host: str,
    bridge: str,
    prefix: Path,
    env: Mapping[str, str],
    tap: str = TAP,
) -> Row:
    """Return the row of our hooks; `env` names the policy, or the agent that has one."""
    up, down = (str(prefix / "bin" / name) for name in ("pyqemu-ifup", "pyqemu-ifdown"))
    policy = env.get("PYQEMU_IFUP_POLICY")
    text = {} if policy is None else {policy: Path(policy).read_text()}
    return Row(key, label, host, (up, tap), (down, tap), bridge, tap, env=env, text=text)


def _asking(
    key: str,
    where: str,
    host: str,
    bridge: str,
    plan: Plan,
    agents: Mapping[str, str],
    tap: str = TAP,
) -> Row:
    env = {"PYQEMU_IFUP_SOCKET": agents[host]}
    row = hook_row(key, f"  by the agent, {where}", host, bridge, plan.prefix, env, tap)
    return replace(row, text={str(plan.policy): plan.policy.read_text()})


def _our_helper(plan: Plan, agents: Mapping[str, str]) -> Row:
    program = str(plan.prefix / "bin" / "pyqemu-bridge-helper")
    env = {"PYQEMU_IFUP_SOCKET": agents["plain"]}
    return _helper_row("helper", "pyqemu-bridge-helper", program, "linux", env)


def _helper_row(key: str, label: str, program: str, network: str, env: Mapping[str, str]) -> Row:
    words = (program, "--use-vnet", f"--br={network}")
    return Row(key, label, "plain", words, bridge=BRIDGE, helper=True, env=env)


@dataclass(frozen=True)
class Target:
    """Where a policy puts a tap: a bridge, and a VLAN where it has one."""

    bridge: str
    vid: int | None

    @property
    def network(self) -> str:
        """The name of its network."""
        return "linux" if self.bridge == BRIDGE else "ovs"


def write_policy(path: Path, targets: Mapping[str, Target], before: Sequence[str] = ()) -> Path:
    """Write a policy: for each glob of taps a network, named for the kind of its bridge.

    `before` are lines of rules that come before those of `targets`. Returns the path.
    """
    lines = ["version: 1", "networks:"]
    for target in targets.values():
        lines += [f"  {target.network}:", f"    bridge: {target.bridge}"]
    lines += ["rules:", *before]
    for tap, target in targets.items():
        lines += [f"  - tap: {tap}", f"    network: {target.network}", "    isolated: true"]
        lines += [] if target.vid is None else [f"    vlan: {target.vid}"]
    path.write_text("\n".join(lines) + "\n")
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
