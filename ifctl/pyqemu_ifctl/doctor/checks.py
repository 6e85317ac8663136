"""The table of doctor's checks, and what they find in a Scene. Nothing here looks at the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Literal

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import readable
from pyqemu_ifconf.values import listed
from pyqemu_ifctl.bounded import attempt
from pyqemu_ifctl.doctor import bridges, filters, hubs, openvswitch, policy, qemus, taps
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifup.kinds.check import Finding

Severity = Literal["error", "warning", "advice"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "advice")


@dataclass(frozen=True)
class Check:
    """One check of the table."""

    name: str
    severity: Severity
    find: Callable[[Scene], Iterator[Finding]]


def _all(check: Check, scene: Scene) -> list[Finding]:
    return list(check.find(scene))


def find_all(
    scene: Scene, checks: Sequence[Check] = ()
) -> tuple[list[tuple[Check, Finding]], list[str]]:
    """Return what `checks`, or all, find, the gravest first, and which failed, and why."""
    found: list[tuple[Check, Finding]] = []
    failed: list[str] = []
    for check in checks or CHECKS:
        findings = attempt(partial(_all, check, scene))
        if isinstance(findings, Failure):
            failed.append(f"{check.name}: {findings}")
            continue
        found += [(check, finding) for finding in findings]
    return sorted(found, key=lambda each: SEVERITIES.index(each[0].severity)), failed


def checks_of(names: Sequence[str]) -> list[Check]:
    """Return the checks of these names. Raises Failure (64) where there is none of a name."""
    known = {check.name: check for check in CHECKS}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise Failure(
                Status.USAGE,
                f"doctor has no check {readable(name)}",
                "",
                f"did you mean {near[0]}?" if near else f"its checks are {listed([*known], 'and')}",
            )
    return [check for check in CHECKS if check.name in names]


CHECKS: tuple[Check, ...] = (
    Check("policy", "error", policy.find_policy),
    Check("unreachable-rule", "warning", policy.find_unreachable_rules),
    Check("long-tap-glob", "warning", policy.find_long_globs),
    Check("tap-right", "error", taps.find_lost_rights),
    Check("tap-off", "error", taps.find_taps_off),
    Check("tap-ipv6", "warning", taps.find_addressed_taps),
    Check("bridge-missing", "error", bridges.find_missing_bridges),
    Check("bridge-kind", "error", bridges.find_other_kinds),
    Check("bridge-down", "error", bridges.find_bridges_down),
    Check("bridge-refuses", "error", bridges.find_refusing_bridges),
    Check("port-address", "error", bridges.find_port_addresses),
    Check("port-device", "warning", bridges.find_port_devices),
    Check("bridge-stp", "warning", bridges.find_slow_bridges),
    Check("bridge-mac", "warning", bridges.find_loose_macs),
    Check("bridge-no-mac", "error", bridges.find_zero_macs),
    Check("bridge-alone", "advice", bridges.find_lonely_bridges),
    Check("bridge-mtu", "warning", bridges.find_small_bridges),
    Check("bridge-filter", "warning", filters.find_bridge_filters),
    Check("br-netfilter", "error", filters.find_netfilter),
    Check("nat-needs", "error", filters.find_unmade),
    Check("nat-table", "error", filters.find_nat_tables),
    Check("nat-filter", "warning", filters.find_nat_filters),
    Check("vlan-filtering", "error", bridges.find_no_filtering),
    Check("uplink-down", "warning", bridges.find_uplinks_down),
    Check("uplink-vlan", "warning", bridges.find_lost_vlans),
    Check("uplink-mtu", "warning", bridges.find_small_uplinks),
    Check("ovs-down", "error", openvswitch.find_ovs_down),
    Check("ovs-vswitchd", "error", openvswitch.find_vswitchd_down),
    Check("ovs-version", "warning", openvswitch.find_old_ovs),
    Check("ovs-error", "error", openvswitch.find_ovs_errors),
    Check("ovs-stale", "warning", openvswitch.find_stale_ports),
    Check("ovs-trunk", "error", openvswitch.find_trunks),
    Check("net-admin", "error", taps.find_no_right),
    Check("tun-missing", "error", taps.find_no_tun),
    Check("tun-closed", "advice", taps.find_closed_tun),
    Check("qemu-script", "warning", qemus.find_stock_scripts),
    Check("qemu-helper", "warning", qemus.find_foreign_helpers),
    Check("qemu-downscript", "warning", qemus.find_no_downscripts),
    Check("qemu-hub", "error", hubs.find_joined_taps),
    Check("qemu-hub-mixed", "warning", hubs.find_mixed_hubs),
    Check("qemu-mac", "error", qemus.find_twins),
    Check("qemu-otherwise", "warning", policy.find_otherwise),
    Check("qemu-sandbox", "advice", qemus.find_unconfined),
)
