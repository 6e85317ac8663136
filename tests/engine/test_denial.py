"""What a denial says of the caller, and what PYQEMU_IFUP_DEBUG=1 tells of the decision."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.qemu import Qemu

POLICY = """
version: 1
networks: {lan: {bridge: br0}}
rules:
  - {netdev: n0, network: lan}
  - {mac: "52:54:00:00:00:01", vm: web1, network: lan}
"""
DENY = "  - {tap: '*', deny: ask the network team}\n"


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path, served: Callable[..., Hooks]) -> Iterator[Hooks]:
    """Hooks in a namespace with the bridge br0."""
    require("qemu")
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    yield served(Hooks(tmp_path / "hooks", netns.name))
    netns.ip("link", "del", "br0")


def denied(hooks: Hooks, netns: Namespace, *argv: str, debug: bool = False) -> str:
    """Return what a QEMU says that is refused; its taps have no ifname=."""
    scripts = f"script={hooks.ifup},downscript={hooks.ifdown}"
    env = {**hooks.environ(), **({"PYQEMU_IFUP_DEBUG": "1"} if debug else {})}
    words = [word.replace("HOOKS", scripts) for word in argv]
    with Qemu("-S", *words, netns=netns.name, machine="pc", env=env) as qemu:
        assert qemu.wait() == 1
        return qemu.stderr


TWO = ("-netdev", "tap,id=n1,HOOKS", "-netdev", "tap,id=n2,HOOKS", "-name", "a b")


@pytest.mark.parametrize("end", ["", DENY], ids=["no rule", "a deny rule"])
def test_a_denial_says_what_was_known_and_why_the_rest_was_not(
    hooks: Hooks, netns: Namespace, end: str
) -> None:
    hooks.write_policy(POLICY + end)
    told = denied(hooks, netns, *TWO)
    why = (
        "(known of it: vm 'a b'; not its netdev and mac: 2 netdevs of its QEMU have no ifname=, so "
        "that the kernel names them)"
    )
    assert why in told
    # What it sends to says the same.
    command = re.search(r"(\S*pyqemu-ifctl explain .*?) tells why ", told)
    assert command is not None
    words = shlex.split(command[1])
    assert words[1:] == ["explain", "--vm=a b", "tap0"]
    done = hooks.ctl(*words[1:])
    assert done.returncode == 77 and "denied" in done.stdout


OTHER: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("no name, and a device without a MAC",
     ("-netdev", "tap,id=n1,HOOKS", "-device", "e1000,netdev=n1,romfile="),
     "(known of it: netdev n1; not its vm: its QEMU has no -name; not its mac: not one device with "
     "a MAC is on it)"),
    ("nothing", ("-nic", "tap,HOOKS"), "(known of it: nothing; not its vm: its QEMU has no -name; "
     "not its netdev and mac: "),
)  # fmt: skip


@pytest.mark.alone("the words are the same")
@pytest.mark.parametrize(("argv", "why"), [r[1:] for r in OTHER], ids=[r[0] for r in OTHER])
def test_each_reason_is_its_own(
    hooks: Hooks, netns: Namespace, argv: tuple[str, ...], why: str
) -> None:
    hooks.write_policy(POLICY)
    assert why in denied(hooks, netns, *argv)


@pytest.mark.alone("the words are the same")
def test_where_no_rule_asks_nothing_more_is_said(hooks: Hooks, netns: Namespace) -> None:
    hooks.write_policy("version: 1\nnetworks: {}\nrules: [{tap: web*, deny: no}]\n")
    told = denied(hooks, netns, *TWO)
    assert "matches; add one; " in told and "known of it" not in told


def test_debug_tells_all_that_the_decision_is_made_by(hooks: Hooks, netns: Namespace) -> None:
    hooks.write_policy(POLICY)
    told = denied(hooks, netns, *TWO, debug=True)
    assert re.search(
        r"pyqemu-ifup: tap0: # asked for by process \d+, root's: tap tap0, vm 'a b'; not its "
        r"netdev and mac: 2 netdevs .* names them; decided by the rules of \S*policy.yaml\n",
        told,
    ), told
