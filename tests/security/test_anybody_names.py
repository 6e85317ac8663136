"""A name of any length, which anybody may give a process, keeps nobody's tap from coming up."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab.agent import Agent
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.qemu import Qemu
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.globs import matches
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.names import TEXT_MAX
from pyqemu_ifconf.policy import Caller
from pyqemu_ifconf.shell import shown
from pyqemu_ifctl.answer import to_json
from pyqemu_ifup.main import wanted_port
from pyqemu_ifup.qemu.caller import read_command_line

POLICY = """\
version: 1
timeout: 30
networks: {lan: {bridge: br0}, named: {bridge: br1}}
rules:
  - {vm: "*", network: named}
  - {tap: "*", network: lan}
"""


@pytest.mark.parametrize(
    ("letters", "bridge"), [(200, "br1"), (255, "br1"), (256, "br0"), (1500, "br0")]
)
@pytest.mark.parametrize("served", [False, True], ids=["alone", "agent"])
def test_a_long_name_fails_no_up(served: bool, tmp_path: Path, letters: int, bridge: str) -> None:
    require("root", "tun", "ip", "qemu")
    with Namespace() as netns, ExitStack() as stack:
        for name in ("br0", "br1"):
            netns.add_bridge(name)
        hooks = Hooks(tmp_path, netns=netns.name)
        hooks.write_policy(POLICY)
        if served:
            hooks.agent = stack.enter_context(Agent(netns, hooks.policy)).path
        scripts = f"script={hooks.ifup},downscript={hooks.ifdown}"
        netdev = ["-netdev", f"tap,id=n0,ifname=web0,{scripts}"]
        words = ["-name", "v" * letters, *netdev]
        with Qemu(*words, netns=netns.name, env=hooks.environ()) as qemu:
            assert qemu.greeting, qemu.stderr
            link = netns.link("web0")
            alias = link["ifalias"]
            assert (link["master"], len(alias) <= 254) == (bridge, True)
            assert (" vm=v" in alias) == (bridge == "br1")
            assert qemu.quit() == 0


@pytest.mark.parametrize("letter", ["v", "é"])
def test_what_is_too_long_is_unknown(letter: str) -> None:
    most = TEXT_MAX // len(letter.encode())

    def read(length: int) -> Caller:
        text = letter * length
        netdev = {"type": "tap", "id": text, "ifname": "web0", "script": "x"}
        return read_command_line(
            ["qemu-system-x86_64", "-name", text, "-netdev", json.dumps(netdev)], "web0"
        )

    assert read(most) == Caller("web0", vm=letter * most, netdev=letter * most)
    assert read(most + 1) == Caller("web0")
    # Half a character, which JSON can name, is no name.
    half = '{"type": "tap", "id": "\\ud83d", "ifname": "web0", "script": "x"}'
    assert read_command_line(["qemu", "-netdev", half], "web0") == Caller("web0")


def test_a_long_network_is_refused_in_few_words() -> None:
    policy = parse_policy([Source("policy.yaml", POLICY.encode())])
    with pytest.raises(Failure) as caught:
        wanted_port(policy, Caller("web0"), "n" * 100_000)
    assert caught.value.status is Status.DENIED and len(str(caught.value)) < 200


def test_globs_take_time_that_grows_with_the_name() -> None:
    """Twenty globs of people's, against names that nearly match each of them."""
    words = ("web", "db", "fw", "a", "aa", "ab", "a-a", "-a", "b-", "mail")
    globs = [glob for word in words for glob in (f"*-{word}-*[0-9]", f"*{word}*{word}b")]

    def seconds(length: int) -> float:
        text = "-a" * (length // 2)
        best = 1e9
        for _ in range(3):
            begun = time.thread_time()
            assert not any(matches(glob, text) for glob in globs)
            best = min(best, time.thread_time() - begun)
        return best

    # Ten times the letters: a time that grew with their square would be a hundredfold.
    assert seconds(1_000_000) < 30 * max(seconds(100_000), 0.001)


IGNORED = (
    (0x00AD, 0x00AD),
    (0x034F, 0x034F),
    (0x061C, 0x061C),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x200B, 0x200F),
    (0x202A, 0x202E),
    (0x2060, 0x206F),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE0FFF),
)
"""Default_Ignorable_Code_Point of Unicode 16, DerivedCoreProperties.txt."""


@pytest.mark.parametrize(("first", "last"), [*IGNORED, (0x2800, 0x2800), (0x7F, 0xA0)], ids=hex)
def test_no_letter_is_unseen(first: int, last: int) -> None:
    for letter in map(chr, range(first, last + 1)):
        assert shown(letter).isascii(), ascii(letter)


def test_json_is_visible_ascii() -> None:
    """No terminal obeys it, and whoever reads it gets each letter; bytes that are none: `?`."""
    text = "".join(map(chr, (*range(0x180), 0x202E, 0x3164, 0x2028, 0x1F600)))
    out = to_json({"vm": text, "tap": "\udc80\ud83d"})
    assert set(out) <= {"\n", *map(chr, range(0x20, 0x7F))}
    read = json.loads(out)
    assert read["vm"] == text and read["tap"] == "??"
