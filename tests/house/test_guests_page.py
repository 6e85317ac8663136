"""The examples of docs/guests.md are right: what args prints, and what a real QEMU reads."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from lab.checkout import ROOT
from lab.versions import VERSIONS, qemu_of
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Policy
from pyqemu_ifctl.place import Hooks
from pyqemu_ifctl.qemu.arguments import by_hooks, legacy, legacy_on_netdevs, modern, on_hubs
from pyqemu_ifctl.qemu.binary import check_arguments, find_qemu
from pyqemu_ifup.nic_macs import macs_of

PAGE = ROOT / "docs" / "guests.md"
HOOKS = Hooks("/usr/local/bin/pyqemu-ifup", "/usr/local/bin/pyqemu-ifdown")
_BLOCK = re.compile(r"^```(yaml)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"`pyqemu-ifctl args (\S+)( --machine (\S+))?( --legacy)?`\s+prints")


@dataclass(frozen=True)
class Example:
    """A guest of a policy, how args is asked for it, and the words that it prints."""

    policy: Policy
    vm: str
    machine: str | None
    is_legacy: bool
    words: list[str]


def examples() -> list[Example]:
    """Return the examples of the page: the policy above, the command, and the block below it."""
    found = []
    policy = ""
    text = PAGE.read_text()
    for block in _BLOCK.finditer(text):
        if block[1] == "yaml":
            policy = block[2]
            continue
        command = list(_COMMAND.finditer(text[: block.start()]))[-1]
        words = block[2].split()
        parsed = parse_policy([Source("guests.md", policy.encode())])
        found.append(Example(parsed, command[1], command[3], bool(command[4]), words))
    return found


def test_the_page_has_an_example_of_each_way() -> None:
    ways = [(each.words[0], each.words[1].partition(",")[0]) for each in examples()]
    assert ways == [
        ("-netdev", "tap"),
        ("-netdev", "tap"),
        ("-netdev", "user"),
        ("-net", "nic"),
        ("-netdev", "tap"),
    ]
    assert [
        bool(network.made) for each in examples() for network in each.policy.networks.values()
    ] == [False, True, False, False]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.vm)
def test_args_prints_what_stands_there(example: Example) -> None:
    form = legacy if example.is_legacy else modern
    vm = example.policy.vms[example.vm]
    macs = macs_of(example.policy, None)
    assert form(example.policy, vm, macs, by_hooks(HOOKS)) == example.words


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("example", examples(), ids=lambda example: example.vm)
def test_a_real_qemu_reads_it(example: Example, version: str) -> None:
    form = legacy_on_netdevs if example.is_legacy else modern
    vm = example.policy.vms[example.vm]
    words = form(example.policy, vm, macs_of(example.policy, None), on_hubs(vm))
    check_arguments(find_qemu(qemu_of(version)), example.machine, words)
