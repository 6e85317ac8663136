"""The table of doctor's checks, and what they find in a Scene. All is pure."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import readable
from pyqemu_ifconf.values import listed
from pyqemu_ifctl.bounded import attempt
from pyqemu_ifctl.doctor import bridges, filters, hubs, policy, qemus, taps
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifup import kinds
from pyqemu_ifup.kinds.check import SEVERITIES, Check, Finding


def _all(check: Check[Scene], scene: Scene) -> list[Finding]:
    return list(check.find(scene))


def find_all(
    scene: Scene, checks: Sequence[Check[Scene]] = ()
) -> tuple[list[tuple[Check[Scene], Finding]], list[str]]:
    """Return what `checks`, or all, find, the gravest first, and which failed, and why."""
    found: list[tuple[Check[Scene], Finding]] = []
    failed: list[str] = []
    for check in checks or CHECKS:
        findings = attempt(partial(_all, check, scene))
        if isinstance(findings, Failure):
            failed.append(f"{check.name}: {findings}")
            continue
        found += [(check, finding) for finding in findings]
    return sorted(found, key=lambda each: SEVERITIES.index(each[0].severity)), failed


def checks_of(names: Sequence[str]) -> list[Check[Scene]]:
    """Return the checks of these names. Raises Failure (64) if a name has none."""
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


CHECKS: tuple[Check[Scene], ...] = (
    Check("policy", "error", policy.find_policy),
    Check("unreachable-rule", "warning", policy.find_unreachable_rules),
    Check("long-tap-glob", "warning", policy.find_long_globs),
    Check("tap-right", "error", taps.find_lost_rights),
    Check("tap-off", "error", taps.find_taps_off),
    Check("tap-ipv6", "warning", taps.find_addressed_taps),
    Check("bridge-missing", "error", bridges.find_missing_bridges),
    Check("bridge-kind", "error", bridges.find_other_kinds),
    Check("bridge-refuses", "error", bridges.find_refusing_bridges),
    Check("port-address", "error", bridges.find_port_addresses),
    Check("port-device", "warning", bridges.find_port_devices),
    Check("bridge-alone", "advice", bridges.find_lonely_bridges),
    Check("bridge-mtu", "warning", bridges.find_small_bridges),
    Check("bridge-filter", "warning", filters.find_bridge_filters),
    Check("br-netfilter", "error", filters.find_netfilter),
    Check("nat-needs", "error", filters.find_unmade),
    Check("nat-table", "error", filters.find_nat_tables),
    Check("nat-filter", "warning", filters.find_nat_filters),
    Check("uplink-down", "warning", bridges.find_uplinks_down),
    Check("uplink-vlan", "warning", bridges.find_lost_vlans),
    Check("uplink-mtu", "warning", bridges.find_small_uplinks),
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
    *(check for view in kinds.views() for check in view.checks),
    *(check for view in kinds.link_views() for check in view.checks),
)
"""The kinds' own come last."""
