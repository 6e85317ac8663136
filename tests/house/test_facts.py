"""What QEMU, Open vSwitch and the Linux bridge really do, and the tests of our answer to it.

Each was measured (QEMU 7.2, Open vSwitch 3.1, Linux 6.1 and 6.18); the tests named here fail
where the answer is taken out of the code.
"""

from __future__ import annotations

import ast
from functools import cache

import pytest

from lab.checkout import ROOT

QEMU = "tests/engine/test_qemu_hooks.py"
SCRIPTS = "tests/engine/test_caller_qemu.py"
GUEST = "tests/engine/test_qemu_guest.py"
AWARE = "tests/uml/test_vlan_aware_bridge.py"
KERNEL = "tests/uml/test_ovs_kernel.py"

FACTS = {
    "a port can be added with success that does not work": (
        f"{QEMU}::test_port_that_openvswitch_cannot_use",
        f"{KERNEL}::test_tap_that_dies_before_it_is_added_is_refused",
    ),
    "an add that has timed out is committed": (
        f"{QEMU}::test_mute_vswitchd",
        f"{KERNEL}::test_commit_that_times_out_is_taken_back",
    ),
    "a port that is there keeps its tag when it is added again": (
        f"{QEMU}::test_crash_leaves_a_persistent_tap",
        f"{QEMU}::test_restart_after_a_crash_is_in_the_new_network",
        f"{KERNEL}::test_tap_that_is_attached_again_changes_its_vlan",
    ),
    "a stale row takes a new tap of its name into the old VLAN": (
        f"{QEMU}::test_crash",
        f"{QEMU}::test_restart_after_a_crash_is_in_the_new_network",
        f"{KERNEL}::test_stale_row_is_replaced_before_a_frame_passes",
        f"{KERNEL}::test_killed_qemu_comes_back_in_its_new_place",
    ),
    "on the userspace datapath a port replaced in one go passes no frames": (
        f"{QEMU}::test_stale_row_is_let_go_before_the_new_one_comes",
    ),
    "a tap that is up before its VLAN is set leaks": (
        f"{QEMU}::test_join_comes_before_up",
        f"{QEMU}::test_tap_that_is_up_is_taken_down_first",
        f"{QEMU}::test_port_comes_with_its_vlan",
        f"{AWARE}::test_no_frame_before_its_vlan",
        f"{AWARE}::test_wrong_order_leaks",
    ),
    "netlink takes a tap from another bridge in silence": (
        f"{QEMU}::test_tap_of_another_bridge_is_not_stolen",
        f"{QEMU}::test_name_of_a_foreign_row_is_not_stolen",
    ),
    "a script has QEMU's own descriptors": (
        f"{SCRIPTS}::test_script_stdout_is_qmp",
        f"{QEMU}::test_qmp_is_unharmed",
    ),
    "a script inherits blocked signals, and no deadline": (
        f"{SCRIPTS}::test_script_inherits_blocked_signals",
        f"{QEMU}::test_mute_vswitchd",
    ),
    "down is called at each orderly end": (
        f"{SCRIPTS}::test_down_script_runs",
        f"{QEMU}::test_end",
        f"{QEMU}::test_hot_plug",
        f"{QEMU}::test_second_tap_denied",
        f"{QEMU}::test_later_fault_of_qemu",
        f"{QEMU}::test_daemonized",
    ),
    "down is not called after a crash, nor after a failed up": (
        f"{SCRIPTS}::test_down_script_does_not_run",
        f"{QEMU}::test_crash",
        f"{QEMU}::test_denied",
    ),
    "down has no privilege left with -runas": (
        f"{SCRIPTS}::test_down_script_runs_as_the_user_of_runas",
        f"{QEMU}::test_runas",
    ),
    "a script that outlives QEMU keeps the tap": (
        f"{SCRIPTS}::test_script_inherits_the_tap",
        f"{QEMU}::test_qemu_killed_while_up_runs",
    ),
    "QEMU cuts long names, and passes odd ones on": (
        f"{SCRIPTS}::test_odd_name",
        f"{QEMU}::test_odd_name",
        f"{QEMU}::test_name_refused",
    ),
    "a sandboxed QEMU gives its scripts no new privileges, or has none": (
        f"{QEMU}::test_sandbox",
        f"{QEMU}::test_sandbox_without_children",
    ),
    "a guest's packets arrive": (
        f"{GUEST}::test_guest_on_a_linux_bridge",
        f"{GUEST}::test_guest_on_openvswitch",
    ),
}


@cache
def names_in(file: str) -> frozenset[str]:
    """Return the names of the test functions in a file."""
    tree = ast.parse((ROOT / file).read_text())
    return frozenset(
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


@pytest.mark.parametrize("fact", FACTS)
def test_fact_has_its_tests(fact: str) -> None:
    for node in FACTS[fact]:
        file, _, name = node.partition("::")
        assert name in names_in(file), f"{node} is gone: name the test that proves our answer"
