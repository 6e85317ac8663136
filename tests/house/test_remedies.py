"""Every command that the product prints as a remedy is run where it is printed, and mends that.

What makes a command is listed from the code; what is new there needs a line in REMEDIES, which
names the test that runs it. What nobody has run elsewhere is run here, for a hook that fails.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.calls import Calls, Ended
from lab.checkout import ROOT, find_test
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import NOBODY
from pyqemu_ifup import owner
from pyqemu_ifup.drivers import dnsmasq

MAKERS = {"sh", "vsctl", "ifctl", "nft_command", "write", "into", "edit"}
"""The functions of pyqemu_ifconf.shell that make a command of words."""

# Who runs it.
DOCTOR = "test_ifctl_doctor.py::test_on_a_linux_bridge"
OF_OVS = "test_ifctl_doctor.py::test_with_open_vswitch"
OF_QEMU = "test_ifctl_doctor.py::test_of_a_qemu"
VLANS = "uml/test_doctor.py::test_vlans"
WHOLE = "test_port_address.py::test_what_is_on_a_port_is_moved_whole"
FORETOLD = "test_foretold.py::test_what_up_ends_with_is_foretold"
HERE = "test_remedies.py::test_the_command_of_a_refusal_mends_it"
HERE_OVS = "test_remedies.py::test_the_command_of_a_refusal_mends_open_vswitch"
IN_SYSLOG = "test_remedies.py::test_what_syslog_is_told_mends_it"
NETWORK_LEFT = "test_apply.py::test_a_network_that_a_tap_has_left_and_that_stays_is_told"
STAYS_DOWN = (
    "test_apply.py::test_one_whose_database_talks_nonsense_in_the_middle_is_told_that_it_is_down"
)
NOT_CHANGED_BACK = "test_apply.py::test_what_is_not_taken_back_is_told_with_what_tries_again"
UNCALLED = "test_apply.py::test_running_qemu"
UNMARKED = (
    "security/test_escaped_guest.py::test_without_a_mark_it_gets_no_more_than_its_user_may_ask_for"
)
OF_NOBODY = "security/test_user.py::test_apply_deals_with_a_tap_that_nobody_holds"
RUN_LEAVES = "test_ifctl_args.py::test_root_s_run_says_what_it_leaves_in_openvswitch"
RUN_TAKES_NOT_BACK = "test_ifctl_args.py::test_what_root_s_run_cannot_take_back_is_told"
EVERY_STATE = "test_ifctl_status.py::test_every_state_for_real"
ELSEWHERE = "test_reconcile.py::test_where_the_policy_has_it_elsewhere_by_now_what_moves_it_is_told"
TOO_LATE = "test_openvswitch_faults.py::test_commit_that_comes_too_late_is_for_gc"
STOPPED_MUTE = (
    "test_openvswitch_faults.py::test_stopped_while_the_database_is_mute_it_says_what_may_be_left"
)
NAT_HELD_UP = "test_nat.py::test_a_way_back_that_nft_holds_up_ends_in_time_and_the_cause_is_told"
NAT_NOT_GIVEN_BACK = (
    "test_nat.py::test_what_other_guests_are_not_given_back_is_told_with_what_mends_it"
)
WITHOUT = "test_half_made.py::test_a_down_without_privilege"
OWNERLESS = "test_remedies.py::test_a_tap_that_cannot_be_given_an_owner_is_made_anew"
HARD_END = "test_half_made.py::test_a_hard_end"
NOT_TAKEN_BACK = "test_half_made.py::test_a_step_that_is_not_taken_back"
PORT_NOT_TAKEN_BACK = "test_half_made.py::test_a_port_that_is_not_taken_back"
HALF_DOWN = "test_half_made.py::test_a_down_that_was_stopped"
AGENT = "test_systemd.py::test_what_is_told_of_an_agent_brings_it_back"
AGENT_OF_USERS = "test_systemd.py::test_what_a_user_is_told_where_no_agent_is_has_it_do_the_work"
OF_RUN = "test_macvtap.py::test_qemu_cannot_open_it_itself"
OF_NETWORK = "test_macvtap.py::test_a_nic_by_its_network_has_the_mac_that_is_given"
OF_LINK = "test_macvtap.py::test_what_explain_prints_makes_the_same"
PLAN = "test_ifctl_explain.py::test_its_commands_do_what_up_does_on_open_vswitch"
NETWORK = "test_explain_nat.py::test_the_look_afterwards_is_that_after_an_up"
CHANGED = "test_explain_nat.py::test_the_look_after_a_change_is_that_after_an_apply"
USER = "security/test_user.py::test_what_the_policy_denies_by_now_is_told_and_cut"
ANEW = "test_unprivileged.py::test_what_root_makes_anew_for_a_user_is_the_user_s"
CHAINS = "test_netdev_chains.py::test_what_is_printed_loads_the_same"
OTHERS_CHAINS = "test_netdev_chains.py::test_what_is_somebody_else_s_is_left_alone"
ADVERTISED = "test_nat.py::test_ipv6_by_advertisements_is_not_given_up"
FILTERING = (
    "uml/test_vlan_aware_bridge.py::test_bridge_that_does_not_filter_is_refused_with_the_command"
)
LOWERED = "test_openvswitch.py::test_mtu_that_would_lower_the_bridge_s_is_undone"

# Why nobody does.
TOLD = "no remedy: a step that PYQEMU_IFUP_DEBUG=1 tells as it is taken"
SHOWS = "no remedy: it shows what a person has to know"
PACKAGE = "a package of the distribution's: tests/lab/chroot has none to fetch"
START = "a QEMU is started, which the tests of the hooks do"
KERNEL = "a module of the kernel's, or its device, which no namespace has of its own"

IFCTL, IFUP = "ifctl/pyqemu_ifctl/", "ifup/pyqemu_ifup/"
REMEDIES: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {
    ("conf/pyqemu_ifconf/failure.py", "__init__"): (1, (SHOWS,)),
    ("conf/pyqemu_ifconf/trust.py", "_check_owner"): (1, (HERE,)),
    ("conf/pyqemu_ifconf/trust.py", "_check_owner_and_mode"): (1, (HERE,)),
    (f"{IFCTL}agents.py", "outdated_line"): (1, (AGENT,)),
    (f"{IFCTL}agents.py", "_connect"): (1, (AGENT,)),
    (f"{IFCTL}agents.py", "_mute"): (1, (AGENT,)),
    (f"{IFCTL}agents.py", "_no_agent"): (1, (AGENT,)),
    (f"{IFCTL}in_force.py", "_network"): (1, (NETWORK_LEFT,)),
    (f"{IFCTL}in_force.py", "_unmarked"): (1, (UNMARKED,)),
    (f"{IFCTL}in_force.py", "_left"): (1, (UNCALLED,)),
    (f"{IFCTL}verbs/args.py", "_refuse_made"): (1, (OF_RUN,)),
    (f"{IFCTL}verbs/args.py", "arguments"): (1, (SHOWS,)),
    (f"{IFCTL}doctor/bridges.py", "find_missing_bridges"): (1, (DOCTOR,)),
    (f"{IFCTL}doctor/bridges.py", "find_other_kinds"): (1, (DOCTOR,)),
    (f"{IFUP}kinds/linux_view.py", "find_bridges_down"): (1, (DOCTOR,)),
    (f"{IFUP}kinds/linux_view.py", "find_no_filtering"): (1, (VLANS,)),
    (f"{IFUP}kinds/linux_view.py", "carrying"): (1, (VLANS,)),
    (f"{IFUP}kinds/linux_view.py", "_set_mac"): (1, (DOCTOR,)),
    (f"{IFUP}kinds/linux_view.py", "find_slow_bridges"): (1, (DOCTOR,)),
    (f"{IFUP}kinds/openvswitch_view.py", "carrying"): (3, (OF_OVS,)),
    (f"{IFUP}kinds/openvswitch_view.py", "adding"): (1, (OF_OVS,)),
    (f"{IFUP}kinds/openvswitch_view.py", "raising"): (1, (OF_OVS,)),
    (f"{IFUP}kinds/openvswitch_view.py", "find_loose_macs"): (1, (OF_OVS,)),
    (f"{IFUP}kinds/openvswitch_view.py", "find_slow_bridges"): (1, (OF_OVS,)),
    (f"{IFUP}kinds/openvswitch_view.py", "find_errors"): (1, (OF_OVS,)),
    (f"{IFUP}kinds/openvswitch_view.py", "find_stale_ports"): (1, (OF_OVS,)),
    (f"{IFUP}kinds/openvswitch_view.py", "find_trunks"): (1, (OF_OVS,)),
    (f"{IFUP}kinds/vswitchd.py", "find_fault"): (1, (OF_OVS,)),
    (f"{IFUP}kinds/vswitchd.py", "start"): (2, (OF_OVS,)),
    (f"{IFUP}kinds/vswitchd.py", "look"): (2, (PACKAGE,)),
    (f"{IFCTL}explanation.py", "_lines"): (2, (PLAN,)),
    (f"{IFCTL}doctor/filters.py", "find_netfilter"): (2, (DOCTOR,)),
    (f"{IFCTL}doctor/filters.py", "find_nat_tables"): (2, (DOCTOR,)),
    (f"{IFCTL}doctor/filters.py", "find_bridge_filters"): (2, (DOCTOR,)),
    (f"{IFCTL}doctor/taps.py", "find_closed_tun"): (1, (DOCTOR,)),
    (f"{IFCTL}doctor/hubs.py", "find_joined_taps"): (2, (OF_QEMU,)),
    (f"{IFCTL}doctor/taps.py", "find_taps_off"): (1, (DOCTOR, OF_OVS)),
    (f"{IFCTL}doctor/policy.py", "find_policy"): (8, (DOCTOR,)),
    (f"{IFCTL}doctor/policy.py", "find_unreachable_rules"): (1, (DOCTOR,)),
    (f"{IFCTL}doctor/policy.py", "find_long_globs"): (1, (DOCTOR,)),
    (f"{IFCTL}doctor/policy.py", "find_otherwise"): (1, (SHOWS,)),
    (f"{IFCTL}rights.py", "find_lost"): (1, (OF_NOBODY,)),
    (f"{IFCTL}rights.py", "cut_command"): (1, (USER,)),
    (f"{IFCTL}verbs/run.py", "tell_what_stays"): (1, (RUN_LEAVES,)),
    (f"{IFCTL}verbs/run.py", "take_back"): (1, (RUN_TAKES_NOT_BACK,)),
    (f"{IFCTL}taps.py", "rows"): (1, (EVERY_STATE,)),
    ("ifd/pyqemu_ifd/reconcile.py", "_wanted"): (1, (ELSEWHERE,)),
    ("ifdown/pyqemu_ifdown/detach.py", "leave_to_gc"): (1, (WITHOUT,)),
    (f"{IFUP}access.py", "check_given"): (1, (START,)),
    (f"{IFUP}attach.py", "_tell_of_port"): (1, (TOO_LATE,)),
    (f"{IFUP}steps.py", "take_back"): (1, (NOT_TAKEN_BACK, PORT_NOT_TAKEN_BACK)),
    (f"{IFUP}change.py", "_again"): (1, (NOT_CHANGED_BACK, STAYS_DOWN)),
    (f"{IFUP}drivers/dnsmasq.py", "account"): (1, (PACKAGE,)),
    (f"{IFUP}drivers/dnsmasq.py", "_recorded"): (1, (HERE,)),
    (f"{IFUP}drivers/dnsmasq.py", "serving_commands"): (8, (NETWORK,)),
    (f"{IFUP}drivers/dnsmasq.py", "ending_commands"): (4, (CHANGED, TOLD)),
    (f"{IFUP}drivers/nft.py", "_check_owner"): (2, (OTHERS_CHAINS,)),
    (f"{IFUP}drivers/nft_words.py", "commands"): (3, (CHAINS,)),
    (f"{IFUP}entitled.py", "check_owner"): (2, (START,)),
    (f"{IFUP}host.py", "open_databases"): (1, (TOLD,)),
    (f"{IFUP}drivers/rtnetlink.py", "join"): (1, (HERE,)),
    (f"{IFUP}main.py", "by_the_agent"): (1, (AGENT_OF_USERS,)),
    (f"{IFUP}main.py", "denial"): (1, (SHOWS,)),
    (f"{IFUP}hook.py", "half_done"): (1, (HARD_END,)),
    (f"{IFUP}hook.py", "left_to_gc"): (1, (HALF_DOWN, NAT_HELD_UP, STOPPED_MUTE)),
    (f"{IFUP}drivers/nft_table.py", "commands_of"): (1, (NETWORK,)),
    (f"{IFUP}drivers/nft_table.py", "replacing_command"): (2, (CHANGED,)),
    (f"{IFUP}made/bridge.py", "commands"): (6, (NETWORK, CHANGED, TOLD)),
    (f"{IFUP}made/nat/filter.py", "commands"): (1, (TOLD,)),
    (f"{IFUP}made/nat/server.py", "commands"): (1, (CHANGED, TOLD)),
    (f"{IFUP}made/nat/loopback.py", "commands"): (2, (NETWORK,)),
    (f"{IFUP}made/nat/needs.py", "_install"): (2, (FORETOLD,)),
    (f"{IFUP}made/nat/needs.py", "_table"): (1, (HERE,)),
    (f"{IFUP}made/nat/needs.py", "_advertisements"): (1, (ADVERTISED,)),
    (f"{IFUP}made/nat/needs.py", "_ports_taken"): (1, (SHOWS,)),
    (f"{IFUP}made/network.py", "take_back"): (2, (NAT_HELD_UP, NAT_NOT_GIVEN_BACK)),
    (f"{IFUP}drivers/nft_program.py", "accepting"): (2, (DOCTOR, IN_SYSLOG)),
    (f"{IFUP}on_port.py", "find_sitting"): (1, (VLANS,)),
    (f"{IFUP}on_port.py", "_moving"): (4, (DOCTOR, WHOLE)),
    (f"{IFUP}drivers/ovsdb.py", "compose"): (1, (OF_OVS,)),
    (f"{IFUP}drivers/ovsdb.py", "_is_there"): (1, (HERE_OVS,)),
    (f"{IFUP}claims.py", "refuse_strangers"): (1, (HERE, HERE_OVS)),
    (f"{IFUP}claims.py", "refuse_shared"): (1, (HERE,)),
    (f"{IFUP}kinds/linux.py", "adding_bridge"): (1, (HERE, DOCTOR)),
    (f"{IFUP}kinds/linux.py", "commands"): (3, (PLAN,)),
    (f"{IFUP}kinds/__init__.py", "_require_link"): (1, (OF_RUN,)),
    (f"{IFUP}kinds/macvtap.py", "_explain"): (1, (KERNEL,)),
    (f"{IFUP}kinds/macvtap.py", "_make_vlan"): (1, (KERNEL,)),
    (f"{IFUP}kinds/macvtap.py", "adding"): (1, (SHOWS,)),
    (f"{IFUP}kinds/macvtap.py", "commands"): (3, (OF_LINK, TOLD)),
    (f"{IFUP}kinds/macvtap.py", "run"): (1, (TOLD,)),
    (f"{IFUP}kinds/macvtap.py", "taken"): (1, (SHOWS,)),
    (f"{IFUP}kinds/openvswitch.py", "adding"): (1, (OF_OVS,)),
    (f"{IFUP}kinds/openvswitch.py", "commands"): (3, (PLAN, TOLD)),
    (f"{IFUP}kinds/openvswitch.py", "commands_of_new"): (3, (PLAN,)),
    (f"{IFUP}kinds/openvswitch.py", "pinning"): (1, (LOWERED,)),
    (f"{IFUP}kinds/openvswitch.py", "refuse_foreign"): (1, (HERE_OVS,)),
    (f"{IFUP}kinds/openvswitch.py", "releasing"): (2, (HERE_OVS,)),
    (f"{IFUP}ops.py", "commands"): (2, (PLAN,)),
    (f"{IFUP}ops.py", "commands_of_new"): (2, (PLAN,)),
    (f"{IFUP}ops.py", "set_link"): (1, (PLAN, HERE, LOWERED, FILTERING)),
    (f"{IFUP}tap_client.py", "_connect"): (2, (AGENT_OF_USERS, SHOWS)),
    (f"{IFUP}tap_client.py", "check"): (1, (SHOWS,)),
    (f"{IFUP}tap_request.py", "_mac_of"): (1, (OF_NETWORK,)),
    (f"{IFUP}taps.py", "taken"): (1, (SHOWS,)),
    (f"{IFUP}drivers/tun.py", "require_tun"): (1, (KERNEL,)),
    (f"{IFUP}drivers/tun.py", "no_tun"): (2, (DOCTOR, KERNEL)),
    (f"{IFUP}drivers/tun.py", "making_anew"): (2, (ANEW, OWNERLESS)),
    (f"{IFUP}drivers/tun.py", "_making"): (2, (DOCTOR,)),
    (f"{IFUP}drivers/tun.py", "_loading"): (1, (KERNEL,)),
    (f"{IFUP}verify.py", "_tell_of_mac"): (1, (IN_SYSLOG,)),
}
"""(file, function) -> how many commands it makes, and the tests that run them, or why none does."""
REASONS = (TOLD, SHOWS, START, PACKAGE, KERNEL)


def commands_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the function, and the text, of each call that makes a command of words.

    One that is a part of another counts with that.
    """
    inside: list[tuple[ast.AST, str]] = [(ast.parse(path.read_text()), "")]
    while inside:
        node, function = inside.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and (node.func.id in MAKERS)
        ):
            yield function, ast.unparse(node)
            continue
        inside += [(child, function) for child in ast.iter_child_nodes(node)]


def test_each_command_has_a_situation() -> None:
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(ROOT.glob("*/pyqemu_if*/**/*.py")):
        if path.name != "shell.py":
            for function, text in commands_of(path):
                found.setdefault((str(path.relative_to(ROOT)), function), []).append(text)
    counted = {place: len(texts) for place, texts in found.items()}
    wanted = {place: number for place, (number, _) in REMEDIES.items()}
    differing = {
        place: found.get(place, [])
        for place in counted.keys() | wanted.keys()
        if counted.get(place) != wanted.get(place)
    }
    assert not differing, (
        "run each of these where it is printed, see that it mends that, and name the test in "
        f"REMEDIES; or take from there what is gone: {differing}"
    )


def functions_of(path: Path) -> set[str]:
    return {
        each.name
        for each in ast.walk(ast.parse(path.read_text()))
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_each_situation_is_a_test() -> None:
    named = {who for _, each in REMEDIES.values() for who in each} - set(REASONS)
    named |= {who for who in IN_WORDS.values() if "::" in who}
    files = {who.partition("::")[0] for who in named}
    there = {file: functions_of(find_test(file)) for file in files}
    for who in named:
        file, _, name = who.partition("::")
        assert name in there[file], who


def test_a_new_command_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "new.py"
    source.write_text("def f(tap):\n    return all_of(sh('ip', output(sh('a'))), ifctl('gc'))\n")
    assert sorted(commands_of(source)) == [("f", "ifctl('gc')"), ("f", "sh('ip', output(sh('a')))")]


# What is told in words.

FAILURES = {"Failure", "Forbidden", "OfCaller", "Finding", "Lacking", "Unsaid", "NoTap", "NoAgent"}
TYPED = re.compile(
    r"\b(pyqemu-(ifctl|ifup|ifdown|ifd|takeover|bridge-helper)|systemctl|journalctl|modprobe|sysctl|"
    r"dmesg|unshare|setcap|apt-get|dnf|make install|dbus-uuidgen|systemd-machine-id-setup|mount|"
    r"conntrack|ovs-vsctl|ip (-\S+ )*(link|address|route|tuntap|netns)|chmod|chown|kill|"
    r"nft (add|delete|list|monitor)|bridge vlan)(?![-/@:]|\([5-8]\))\b|"
    r"\bas root\b|--(sysctl|tmpfs|cap-add|device)\b"
)
"""What a person would type, where it stands in a sentence and is no Command: it has no names."""
LISTS = "it lists what is there"
AS_ROOT = "the same as root is what the other tests of that verb do"
WHO = "no remedy: who calls, or what was called"
HELP = "no remedy: it describes a verb, or a key of the policy"
CONTAINER = "test_container.py::test_a_network_with_nat_in_a_container"
DECODED = "test_remedies.py::test_what_decode_sends_to_says_why"
IN_WORDS = {
    "mount /sys in the network namespace that this runs in": KERNEL,
    "mount devtmpfs on /dev": KERNEL,
    "{}: somebody else has removed or changed its filters, which are loaded again; see who manages "
    "the ruleset: nft monitor": SHOWS,
    # Failures and findings.
    "run as root": AS_ROOT,
    "run as root, or with {}": WITHOUT,
    "give it {}, a container by --cap-add=NET_ADMIN": CONTAINER,
    "see which capability root lacks here (capabilities(7)), or in dmesg(1) what AppArmor or "
    "SELinux denies": SHOWS,
    "{} key {} is one that pyqemu-ifup writes itself ({}); take another": WHO,
    "start it: {}, or pyqemu-ifd{}; the hooks do without": AGENT,
    "its QEMU {} did not call pyqemu-ifup for it, though the rule at {} is about it": WHO,
    "pyqemu-ifctl status lists them all": LISTS,
    "pyqemu-ifctl info lists them all": LISTS,
    "start its QEMU, which calls pyqemu-ifup itself": START,
    "start it, which calls pyqemu-ifup itself": START,
    "make one: systemd-machine-id-setup, or: dbus-uuidgen --ensure=/etc/machine-id; or give each "
    "NIC of the guest a mac of its own": "test_nics.py::test_a_host_without_an_id_makes_no_mac",
    "install them: make install": "test_install.py::test_what_is_printed_finds_what_is_installed",
    "ask pyqemu-ifctl explain for a tap that such a rule is for": SHOWS,
    "give its tap the path of pyqemu-ifdown as downscript=": START,
    "when {} starts the next time, let its helper= be "
    "pyqemu-bridge-helper, by its whole path": START,
    ", as root": "no remedy: it says as whom a QEMU runs",
    "; run as root": AS_ROOT,
    "the taps that {} of other users may hold; run as root": AS_ROOT,
    "run as root, or as the user of that QEMU": AS_ROOT,
    "run as root, or see syslog": AS_ROOT,
    "run chown": "no remedy: by this it knows that of trust.py",
    "run chmod": "no remedy: by this it knows that of trust.py",
    "let QEMU call the hook, which holds the tap, or call it as root": AS_ROOT,
    "run the agent as root, with CAP_NET_ADMIN": AS_ROOT,
    "no agent: {} is empty; unset it, or name the socket of pyqemu-ifd": SHOWS,
    "see whether systemd answers: systemctl status": SHOWS,
    "see journalctl --unit={}": SHOWS,
    "see dmesg(1)": SHOWS,
    "see who does: nft monitor": SHOWS,
    "see ovs-vsctl show": SHOWS,
    "ovs-vsctl init has not been run": "no remedy: it says what is not so",
    "see pyqemu-ifd.socket: ListenSequentialPacket=": SHOWS,
    "let the agent make it: start QEMU by {} --nic {}, or with our pyqemu-bridge-helper, by its "
    "whole path, as helper= and br={} in place of ifname= and script=; it needs no right of its "
    "own then": START,
    "have a /run of one's own: unshare -Urnm, and in it: mount "
    "-t tmpfs run /run": "test_container.py::test_a_network_with_nat_rootless",
    "--tmpfs /run": CONTAINER,
    "--cap-add={}": CONTAINER,
    "--sysctl {}": CONTAINER,
    "give a container --device={}, a unit DeviceAllow={}": KERNEL,
    "have whoever starts this container give it --sysctl "
    "net.ipv6.conf.default.disable_ipv6=1": CONTAINER,
    "there are no modules of kernel {} here: after an upgrade of the kernel, reboot; for a "
    "container, load it on its host: modprobe tun": KERNEL,
    # What is said elsewhere.
    "the policy is invalid; pyqemu-ifctl check tells where": DECODED,
    "the policy cannot be read, or there is none; see pyqemu-ifctl check": DECODED,
    "denied: no rule, a deny rule, missing privilege, or somebody else's tap, name or port; see "
    "pyqemu-ifctl explain": DECODED,
    "the policy's ownership or mode is unsafe; pyqemu-ifctl check tells which": DECODED,
    "{} {} again and again, and was loaded again as often: {} times in {} s; see who else manages "
    "the ruleset: nft monitor": SHOWS,
    "network {}: the kernel tracks more flows than there was time to look at; some that other "
    "rules let in may go on; see whose they are: conntrack -L": SHOWS,
    "the agent does not answer, see pyqemu-ifctl agent": AGENT,
    "{}; see pyqemu-ifctl agent": AGENT,
    "pyqemu-ifctl gc {}{} removes what is "
    "left": "test_half_made.py::test_an_agent_that_ends_while_an_up_is_stopped",
    "QEMU's device; virtio-net-pci. pyqemu-ifctl models lists them.": HELP,
    "The guests whose NICs pyqemu-ifctl args tells QEMU of, by name.": HELP,
    "The policy of pyqemu-ifup": HELP,
    "The resident agent of pyqemu-ifup; it stays in the foreground.": HELP,
    "pyqemu-ifup bridge {}": "no remedy: a MAC is made of it",
    "Shows and explains what pyqemu-ifup does with the taps of this host.": HELP,
}
"""A text of the toolkit's, `{}` for what is put in -> the test that does it, or why none does."""
TAKEOVER = "test_packages.py::test_what_the_takeover_refuses"
OF_A_FILE = "what is to be at that path, the person decides who named it"
GONE = "who asked has gone: nobody reads it"
NAMES = "what a name may be says what to do"
PASSED_ON = "another failure's words, or its own sentence, say it"
SEEN = "it is told as what is not seen"
FILTERED = "the network that has frames filtered says what to do"
UNTOLD = {
    ("conf/pyqemu_ifconf/load.py", "_read_sources"): OF_A_FILE,
    ("conf/pyqemu_ifconf/trust.py", "_unreadable"): OF_A_FILE,
    ("conf/pyqemu_ifconf/trust.py", "_not_regular"): OF_A_FILE,
    ("conf/pyqemu_ifconf/trust.py", "_check_folder"): OF_A_FILE,
    ("conf/pyqemu_ifconf/names.py", "check_tap_name"): NAMES,
    (f"{IFUP}drivers/nft.py", "prove"): FILTERED,
    (f"{IFUP}drivers/nft.py", "_failure"): FILTERED,
    (f"{IFUP}drivers/nft.py", "_check_link"): FILTERED,
    (f"{IFUP}entitled.py", "pick_name"): NAMES,
    (f"{IFCTL}in_force.py", "_deny"): "it is what was asked for",
    (f"{IFCTL}bounded.py", "bounded"): PASSED_ON,
    (f"{IFCTL}bounded.py", "attempt"): PASSED_ON,
    (f"{IFCTL}verbs/gc.py", "_end"): PASSED_ON,
    (f"{IFCTL}verbs/gc.py", "_strays"): PASSED_ON,
    (f"{IFCTL}qemu/running.py", "ask_any"): PASSED_ON,
    (f"{IFCTL}doctor/chains.py", "_nft_chains"): SEEN,
    (f"{IFCTL}doctor/chains.py", "_legacy_chains"): SEEN,
    (f"{IFCTL}taps.py", "_find_view"): PASSED_ON,
    ("ifd/pyqemu_ifd/cache.py", "take"): PASSED_ON,
    ("ifd/pyqemu_ifd/asking.py", "check_holder"): GONE,
    ("ifd/pyqemu_ifd/asking.py", "_ended"): GONE,
    ("ifd/pyqemu_ifd/wire.py", "peer_pidfd"): GONE,
    ("ifd/pyqemu_ifd/bridge_helper.py", "help_qemu"): GONE,
    ("ifd/pyqemu_ifd/bridge_helper.py", "_usage"): "it is the usage",
    (f"{IFUP}tap_client.py", "check"): GONE,
    (f"{IFUP}tap_client.py", "_end"): PASSED_ON,
}
"""(file, function) of a failure that does not say what is to be done -> why."""


def failures_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield the function, and the call, of each failure or finding that a module makes."""
    inside: list[tuple[ast.AST, str]] = [(ast.parse(path.read_text()), "")]
    while inside:
        node, function = inside.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and (node.func.id in FAILURES)
        ):
            yield function, node
        inside += [(child, function) for child in ast.iter_child_nodes(node)]


def texts_of(tree: ast.Module) -> Iterator[str]:
    """Yield the texts of a module, but for its docstrings and those of its Commands.

    One that is no sentence, but a name alone, is left out.
    """
    inside: list[ast.AST] = [tree]
    while inside:
        node = inside.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and (node.func.id in MAKERS)
        ):
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [str(each.value) if isinstance(each, ast.Constant) else "{}" for each in parts]
        if isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str)
        ):
            text = "".join(texts)
            yield from [text] if " " in text or text.startswith("--") else []
            inside += [each for each in parts if isinstance(each, ast.FormattedValue)]
        else:
            inside += ast.iter_child_nodes(node)


def test_each_text_that_names_a_program_is_known() -> None:
    found = {
        text
        for path in sorted(ROOT.glob("*/pyqemu_if*/**/*.py"))
        if path.name != "shell.py"
        for text in texts_of(ast.parse(path.read_text()))
        if TYPED.search(text)
    }
    assert found == IN_WORDS.keys(), (found - IN_WORDS.keys(), IN_WORDS.keys() - found)


def test_a_new_text_is_seen() -> None:
    source = """
def f(tap):
    \"\"\"Have pyqemu-ifctl gc called.\"\"\"
    if tap == "pyqemu-ifctl":
        return sh("ip", "link", "set up")
    return Other(f"{tap} is there; run pyqemu-ifctl gc {tap + 'as root: ' + g('x')}")
"""
    found = {text for text in texts_of(ast.parse(source)) if TYPED.search(text)}
    assert found == {"{} is there; run pyqemu-ifctl gc {}", "as root: "}


def test_each_refusal_of_the_takeover_is_walked() -> None:
    """What it says is to be done, a person does to a file of his own, or root does it again."""
    file, _, name = TAKEOVER.partition("::")
    tree = ast.parse(find_test(file).read_text())
    (test,) = [
        each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) and each.name == name
    ]
    text = ast.unparse(test)
    script = (ROOT / "conf" / "takeover.in").read_text().replace("\\\n", "")
    told = re.findall(r"fail \d+ .*?(?:; |: )([\w -]+)\"(?:$| \|\|| ;;)", script, re.MULTILINE)
    assert len(told) >= 4 and not [each for each in told if each not in text], told


def test_each_failure_says_what_to_do() -> None:
    untold: set[tuple[str, str]] = set()
    for path in sorted(ROOT.glob("*/pyqemu_if*/**/*.py")):
        for function, call in failures_of(path):
            # NOTE: Forbidden and Lacking have a remedy of their own, a Finding a command or `do`.
            name = getattr(call.func, "id", "")
            if (name in ("Failure", "OfCaller", "Unsaid") and len(call.args) < 4) or (
                name in ("NoTap", "NoAgent")
                and "; "
                not in "".join(
                    each.value
                    for each in ast.walk(call)
                    if isinstance(each, ast.Constant) and isinstance(each.value, str)
                )
            ):
                untold.add((str(path.relative_to(ROOT)), function))
    assert untold == UNTOLD.keys(), untold ^ UNTOLD.keys()


def test_what_decode_sends_to_says_why(tmp_path: Path) -> None:
    """The number is what QEMU prints of a hook that failed so."""
    hooks = Hooks(tmp_path)
    cases: list[tuple[int, str, Callable[[], object]]] = [
        (65, "has no key ovs", lambda: hooks.write_policy("version: 1\novs: 1\n")),
        (78, "everybody can write it", lambda: hooks.policy.chmod(0o666)),
        (66, "it does not exist", hooks.policy.unlink),
        (
            77,
            "no rule",
            lambda: hooks.write_policy(
                "version: 1\nnetworks: {lan: {bridge: br0}}\nrules: [{tap: x, network: lan}]\n"
            ),
        ),
    ]
    for status, why, make in cases:
        make()
        assert hooks.up("t0").returncode == status
        said = hooks.ctl("decode", str(status * 256)).stdout
        (verb,) = re.findall(r"pyqemu-ifctl (check|explain)\b", said)
        done = hooks.ctl(verb, *(["t0"] if verb == "explain" else []))
        assert done.returncode == status and why in done.stdout + done.stderr, done


# A hook that fails, and what it says is to be done.


@dataclass(frozen=True)
class Place:
    """A namespace with the hooks, the bridge br0, and with Open vSwitch br-int."""

    netns: Namespace
    calls: Calls
    ovs: OpenVSwitch | None = None

    @property
    def switch(self) -> OpenVSwitch:
        """The Open vSwitch."""
        assert self.ovs is not None
        return self.ovs

    def policy(self, network: str) -> None:
        """Put a policy in force that has each tap on this network."""
        self.calls.hooks.write_policy(
            f'version: 1\nnetworks: {{lab: {{{network}}}}}\nrules: [{{tap: "*", network: lab}}]\n'
        )

    def on_ovs(self, more: str = "") -> None:
        """Have each tap on br-int."""
        self.policy(f"bridge: br-int, ovsdb: '{self.switch.db}'{more}")

    def run(self, command: str) -> None:
        """Run a command as a person who pastes it."""
        env = {**os.environ, **(self.ovs.env if self.ovs is not None else {})}
        env["PATH"] = f"{self.calls.hooks.folder}:{env['PATH']}"
        env["PYQEMU_IFUP_POLICY"] = str(self.calls.hooks.policy)
        done = subprocess.run(
            ["sh", "-euc", command],
            env=env,
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (command, done)


Situation = Callable[[Place], Iterator[None]]
"""Makes it, up to the first `yield`; goes on when the command has been run, before the next up;
and when the tap has come down again, takes away what it needed."""


def somebody_s_alias(place: Place) -> Iterator[None]:
    place.netns.ip("tuntap", "add", "dev", "t0", "mode", "tap", "user", "0")
    place.netns.ip("link", "set", "t0", "alias", "uplink of db")
    yield
    yield
    place.netns.ip("link", "del", "t0")


def on_another_bridge(place: Place) -> Iterator[None]:
    place.netns.add_bridge("br1", mac="02:00:00:00:00:02")
    place.netns.ip("tuntap", "add", "dev", "t0", "mode", "tap", "user", "0")
    place.netns.ip("link", "set", "t0", "master", "br1")
    yield
    yield
    place.netns.ip("link", "del", "t0")
    place.netns.ip("link", "del", "br1")


def of_many_queues(place: Place) -> Iterator[None]:
    place.netns.ip("tuntap", "add", "t0", "mode", "tap", "user", str(NOBODY), "multi_queue")
    yield
    assert "t0" not in place.netns.links()
    place.netns.tap("t0", multi_queue=True)
    yield
    place.netns.close_kept()


def under_another_device(place: Place) -> Iterator[None]:
    place.netns.ip("tuntap", "add", "dev", "t0", "mode", "tap", "user", "0")
    place.netns.ip("link", "add", "link", "t0", "name", "mv0", "type", "macvlan")
    yield
    yield
    place.netns.ip("link", "del", "t0")


def small_beside_a_bridge(place: Place) -> Iterator[None]:
    """Of an MTU that nobody has set, which follows the least of the ports'."""
    place.netns.ip("link", "add", "br1", "address", "02:00:00:00:00:02", "up", "type", "bridge")
    place.policy("bridge: br1, mtu: 1400")
    place.netns.tap("t0")
    yield
    yield
    assert place.netns.link("br1")["mtu"] == 1500
    place.netns.close_kept()
    place.netns.ip("link", "del", "br1")


def down(place: Place) -> Iterator[None]:
    place.netns.add_bridge("br1", mac="02:00:00:00:00:02")
    place.netns.ip("link", "set", "br1", "down")
    place.policy("bridge: br1")
    place.netns.tap("t0")
    yield
    yield
    place.netns.close_kept()
    place.netns.ip("link", "del", "br1")


def not_there(place: Place) -> Iterator[None]:
    place.policy("bridge: br1, kind: linux")
    place.netns.tap("t0")
    yield
    yield
    place.netns.close_kept()
    place.netns.ip("link", "del", "br1")


def writable(place: Place) -> Iterator[None]:
    place.netns.tap("t0")
    place.calls.hooks.policy.chmod(0o666)
    yield
    yield
    place.netns.close_kept()


def owned(place: Place) -> Iterator[None]:
    place.netns.tap("t0")
    os.chown(place.calls.hooks.policy, NOBODY, 0)
    yield
    yield
    place.netns.close_kept()


def with_a_table_of_its_name(place: Place) -> Iterator[None]:
    require("dnsmasq")
    place.policy("bridge: labbr0, nat: {ipv4: 192.168.76.1/24, dhcp: false, dns: false}")
    place.netns.run(
        [
            "nft",
            "add table inet pyqemu-ifup-lab; add chain inet pyqemu-ifup-lab x; "
            "add rule inet pyqemu-ifup-lab x counter",
        ]
    )
    place.netns.tap("t0")
    yield
    yield
    place.netns.close_kept()


def with_an_unreadable_record(place: Place) -> Iterator[None]:
    """Of its network's dnsmasq: whether that runs cannot be told."""
    require("dnsmasq")
    place.policy("bridge: labbr0, nat: {ipv4: 192.168.76.1/24}")
    folder = Path(f"/run/pyqemu-ifup/lab@{place.netns.inode}")
    folder.mkdir(parents=True)
    (folder / dnsmasq.RECORD).write_text("garbage\n")
    place.netns.tap("t0")
    yield
    yield
    place.netns.close_kept()


def with_a_row_of_its_name(place: Place) -> Iterator[None]:
    place.on_ovs()
    place.netns.tap("t0")
    place.switch.add_port("br-int", "t0")
    yield
    yield
    place.netns.close_kept()


def with_a_row_from_elsewhere(place: Place) -> Iterator[None]:
    place.on_ovs()
    place.netns.tap("t0")
    place.switch.add_port("br-int", "t0")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    place.switch.vsctl(
        "set",
        "Interface",
        "t0",
        "external_ids:pyqemu-ifup=1",
        f"external_ids:pyqemu-boot-id={boot}",
        'external_ids:pyqemu-netns="0:1"',
    )
    yield
    yield
    place.netns.close_kept()


SITUATIONS: list[tuple[Situation, int, str, str]] = [
    (somebody_s_alias, 77, "if it is not, remove it: ", ""),
    (on_another_bridge, 77, "if it shall go, take it out: ", ""),
    (of_many_queues, 77, "make it anew without an owner: ", ""),
    (under_another_device, 71, "take it away: ", ""),
    (small_beside_a_bridge, 71, "pin it: ", ""),
    (down, 69, "bring it up: ", ""),
    (not_there, 69, "make it (", ") or correct the policy"),
    (writable, 78, "run ", ""),
    (owned, 78, "run ", ""),
    (with_a_table_of_its_name, 77, "if it shall go: ", ""),
    (with_an_unreadable_record, 71, "end it, if it does, and ", ""),
]
OVS_SITUATIONS: list[tuple[Situation, int, str, str]] = [
    (with_a_row_of_its_name, 77, "if it shall go: ", ""),
    (with_a_row_from_elsewhere, 77, "if it shall go: ", ""),
]


@pytest.fixture
def place(inside: Namespace, tmp_path: Path) -> Iterator[Place]:
    inside.add_bridge("br0", mac="02:00:00:00:00:01")
    calls = Calls(Hooks(tmp_path / "hooks"))
    place = Place(inside, calls)
    place.policy("bridge: br0")
    yield place
    calls.close()
    inside.ip("link", "del", "br0")


def told(ended: Ended) -> str:
    """Return what the hook says is to be done."""
    assert ended.stderr.count("\n") == 1, ended
    return re.sub(r"^.*?; ", "", ended.stderr.strip(), count=1)


def mend(place: Place, situation: Situation, status: int, before: str, after: str) -> None:
    """See the hook refuse, run what it says, and see it do its work."""
    steps = situation(place)
    next(steps)
    ended = place.calls.up("t0")
    assert ended.status == status, ended
    does = told(ended)
    assert does.startswith(before) and does.endswith(after), does
    place.run(does[len(before) : len(does) - len(after)])
    next(steps)
    done = place.calls.up("t0")
    assert (done.status, done.stderr) == (0, ""), done
    assert place.calls.down("t0").status == 0
    assert next(steps, "ended") == "ended"


def names(value: object) -> str:
    return str(getattr(value, "__name__", ""))


@pytest.mark.parametrize(("situation", "status", "before", "after"), SITUATIONS, ids=names)
def test_the_command_of_a_refusal_mends_it(
    place: Place, situation: Situation, status: int, before: str, after: str
) -> None:
    mend(place, situation, status, before, after)


@pytest.mark.parametrize(("situation", "status", "before", "after"), OVS_SITUATIONS, ids=names)
def test_the_command_of_a_refusal_mends_open_vswitch(
    place: Place, ovs: OpenVSwitch, situation: Situation, status: int, before: str, after: str
) -> None:
    ovs.add_bridge("br-int", hwaddr="02:00:00:00:00:0c", mtu=1500)
    mend(Place(place.netns, place.calls, ovs), situation, status, before, after)
    ovs.vsctl("del-br", "br-int")


# What a hook says in syslog while it does its work.


def an_unset_mac(place: Place) -> Iterator[None]:
    place.netns.ip("link", "add", "br1", "up", "type", "bridge")
    place.policy("bridge: br1")
    yield
    own = place.netns.link("br1")["address"]
    place.netns.close_kept()
    assert place.netns.link("br1")["address"] == own
    place.netns.tap("t0")
    yield
    place.netns.ip("link", "del", "br1")


NAT = "bridge: labbr0, nat: {ipv4: 192.168.76.1/24, dhcp: false, dns: false}"


def a_firewall_of_iptables(place: Place) -> Iterator[None]:
    """As iptables-nft(8) makes it, which this host need not have."""
    yield from a_firewall(place, "ip", "filter", "FORWARD")


def a_firewall_of_nft(place: Place) -> Iterator[None]:
    yield from a_firewall(place, "inet", "firewall", "passing")


def a_firewall(place: Place, family: str, table: str, chain: str) -> Iterator[None]:
    place.policy(NAT)
    place.netns.run(
        [
            "nft",
            f"add table {family} {table}; add chain {family} {table} {chain} "
            "{ type filter hook forward priority 0; policy drop; }",
        ]
    )
    yield
    # NOTE: it is told as the network is made.
    assert place.calls.down("t0").status == 0
    yield
    place.netns.run(["nft", f"delete table {family} {table}"])


@pytest.mark.parametrize(
    ("situation", "before"),
    [
        (an_unset_mac, "has taken the tap's; pin one: "),
        (a_firewall_of_iptables, "what is forwarded for its guests; "),
        (a_firewall_of_nft, "what is forwarded for its guests; "),
    ],
    ids=names,
)
def test_what_syslog_is_told_mends_it(place: Place, situation: Situation, before: str) -> None:
    steps = situation(place)
    next(steps)
    place.netns.tap("t0")
    ended = place.calls.up("t0")
    (line,) = [line for line in ended.log if before in line]
    assert ended.status == 0
    place.run(line.partition(before)[2])
    next(steps)
    ended = place.calls.up("t0")
    assert ended.status == 0 and not [line for line in ended.log if before in line], ended.log
    assert place.calls.down("t0").status == 0
    place.netns.close_kept()
    assert next(steps, "ended") == "ended"


@pytest.mark.parametrize("more", [[], ["multi_queue"]], ids=["one queue", "multi_queue"])
def test_a_tap_that_cannot_be_given_an_owner_is_made_anew(place: Place, more: list[str]) -> None:
    def refuse() -> None:
        def denied(descriptor: int, uid: int) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        setattr(owner, "set_owner", denied)  # noqa: B010  mypy lets no function be assigned

    place.netns.ip("tuntap", "add", "dev", "t0", "mode", "tap", *more)
    ended = place.calls.up("t0", refuse)
    assert ended.status == 77, ended
    _, before, command = told(ended).partition("make it anew with one: ")
    assert before, ended
    place.run(command)
    ended = place.calls.up("t0", refuse)
    assert (ended.status, ended.stderr) == (0, ""), ended
    assert place.calls.down("t0").status == 0
    place.netns.ip("link", "del", "t0")
