"""What root reads and pastes: no name of anybody's is more than one word of a command.

The remedies are run by shells that find no program but stand-ins, which note their words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.paste import HOSTILE, SHELLS, words_of
from lab.public import NOBODY
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Place, Policy, Port, Vlan
from pyqemu_ifconf.shell import Command, sh
from pyqemu_ifctl.apply import Guest as Applied
from pyqemu_ifctl.apply import _denied, _left
from pyqemu_ifctl.findings import find_all
from pyqemu_ifctl.guests import Guest
from pyqemu_ifctl.scene import Chain, Qemu, Scene
from pyqemu_ifup.caller import find_options
from pyqemu_ifup.look import Link, OvsBridge, OvsPort, OvsSwitch, Seen, Vid
from pyqemu_ifup.plan import (
    AddPort,
    DelPort,
    JoinBridge,
    SetAlias,
    SetIpv6,
    SetIsolated,
    SetMtu,
    SetPort,
    SetVlans,
    commands,
    find_kind,
    refuse_foreign_ports,
    refuse_strangers,
    target_vids,
)
from pyqemu_ifup.stamp import Here

HERE = Here("boot", "4:42")
DB = "unix:/run/x y;id"
EVIL = "--reuid=0;id"


def a_link(name: str, **changes: Any) -> Link:
    link = Link(7, name, "tun", True, True, 1500, "52:54:00:00:00:01", 1000, None, "", True)
    return replace(link, **changes)


def a_port(name: str, **changes: Any) -> OvsPort:
    port = OvsPort(DB, "br", name, None, (), None, False, True, (), 1, None, 7, "up")
    return replace(port, **changes)


def a_policy(bridge: str) -> Policy:
    text = (
        "version: 1\nnetworks:\n"
        f"  lan: {{bridge: {json.dumps(bridge)}, vlan: 10, mtu: 9000}}\n"
        "rules: [{tap: x, network: lan}]\n"
    )
    return parse_policy([Source("policy.yaml", text.encode())])


def a_scene(bridge: str, **changes: Any) -> Scene:
    scene = Scene(
        a_policy(bridge), HERE, (), {}, {}, {}, (), {}, frozenset(), {}, frozenset(), (), {}, 0o666,
        True, (), None, sh("apt-get", "install", "x"), (),
    )
    return replace(scene, **changes)


def each_scene(name: str) -> Iterator[Scene]:
    """Yield hosts on which something of this name is wrong."""
    yield a_scene(name)
    bridge = a_link(name, kind="bridge", tap=False, up=False, stp=True, forward_delay=1500,
                    vlan_filtering=False, calls_iptables=True)
    uplink = a_link(f"{name}u", index=8, kind=None, tap=False, up=False, master=7)
    chains = (Chain("ip", name, name, "forward"), Chain("bridge", name, name, "forward", 3))
    yield a_scene(name, links=(bridge,), pinned={name: False}, chains=chains)
    yield a_scene(name, links=(replace(bridge, vlan_filtering=True), uplink), chains=chains,
                  call_iptables=frozenset({"iptables"}))
    database = "unix:/run/openvswitch/db.sock"
    switch = OvsSwitch(database, "2.5.0", False, (OvsBridge(database, name, True, False),))
    port = a_port(f"{name}u", ovsdb=database, bridge=name, error="a\x1b[2J;id", tag=4)
    tap = a_link(f"{name}u")
    yield a_scene(name, links=(a_link(name, kind="openvswitch", tap=False),),
                  switches={database: switch}, ports=(port,))
    yield a_scene(name, links=(tap,), switches={database: switch},
                  ports=(replace(port, tag=None, error=None),))
    yield a_scene(name, failed={database: Failure(Status.TRY_AGAIN, name)})
    for failure in (
        Failure(Status.NO_POLICY, f"/x y/{name}"), Failure(Status.UNSAFE, name, "", "run chmod"),
        Failure(Status.UNSAFE, name, "it is a symbolic link"),
        Failure(Status.UNSAFE, name, "it has 2 hard links"),
    ):
        yield replace(a_scene("br"), policy=failure)


def each_command(name: str) -> Iterator[Command]:
    """Yield what doctor and a plan print about something of this name."""
    for scene in each_scene(name):
        for finding in find_all(scene)[0]:
            if finding.command is not None:
                yield finding.command
            assert all(map(str.isprintable, (finding.what, finding.why)))
    ids = (("k", "it's \";id"), ("a=b", ";id"))
    for op in (
        SetAlias(name, 7, "x y"), SetMtu(name, 7, 9), SetIpv6(name, 7, True),
        JoinBridge(name, 7, name, 8), SetIsolated(name, 7, True), DelPort(DB, name, name, ids),
        SetVlans(name, 7, (Vid(5, True, True),)),
        AddPort(DB, name, name, 7, Vlan(5), True, ids),
        SetPort(DB, name, (), None, None, (), False, False, ids, ("k", ";id")),
    ):
        yield from commands(op)


def bare(commands: list[list[str]], name: str) -> list[list[str]]:
    """Return commands without what goes by the name on purpose, and with PLAIN in its place.

    A MAC is made of the name; `--` and `./` keep it from being an option; nft and ovs-vsctl are not
    told of names that they have no words for.
    """
    found = []
    for words in commands:
        if words[0] == "nft" or (words[0] == "ovs-vsctl" and name == "--"):
            continue
        if words[0] == "pyqemu-ifctl" and words[2:3] == ["--"]:
            words = [*words[:2], *words[3:]]
        words = [re.sub("^02(:[0-9a-f]{2}){5}$", "MAC", word) for word in words]
        words = [word[2:] if word[:3] in ("./-", "./+") else word for word in words]
        found.append(words)
    return found


@pytest.mark.parametrize("shell", SHELLS[::2], ids=" ".join)
def test_no_name_is_more_than_a_word_of_a_command(
    shell: tuple[str, ...], tmp_path: Path
) -> None:
    """The very commands that come for plain names come for all others."""
    plain = "plainname"
    lines = [line for name in (plain, *HOSTILE) for line in (*each_command(name), sh("touch"))]
    runs: list[list[list[str]]] = [[]]
    for words in words_of("\n".join(lines), tmp_path, shell):
        if words == ["touch"]:
            runs.append([])
        else:
            runs[-1].append(words)
    told = runs[0]
    assert len(told) > 40 and len({words[0] for words in told}) > 8
    for name, found in zip(HOSTILE, runs[1:-1], strict=True):
        wanted = [[word.replace(plain, name) for word in words] for words in told]
        assert bare(found, name) == bare(wanted, name)
        for words in found:
            if words[0] == "nft":
                assert len(words) == 2 and ";" not in words[1].replace("policy accept;", "")


def failures(name: str) -> Iterator[tuple[Failure, list[str]]]:
    """Yield what is refused about a tap or a bridge of this name, and what is told to do."""
    port = Port(name, "lan", name, Place("p.yaml", 1, 1), vlan=Vlan(10))
    tap, bridge = a_link(name), a_link(name, kind="bridge", tap=False, vlan_filtering=False)
    for check, words in (
        (lambda: find_kind(replace(port, kind="linux"), Seen(None)),
         ["ip", "link", "add", "name", name, "type", "bridge"]),
        (lambda: refuse_strangers(name, Seen(replace(tap, alias=name)), 0),
         ["ip", "link", "set", "dev", name, "alias", ""]),
        (lambda: refuse_strangers(name, Seen(tap, master=bridge), 0),
         ["ip", "link", "set", "dev", name, "nomaster"]),
        (lambda: refuse_foreign_ports(Seen(tap, ports=(a_port(name, bridge=name),)), HERE),
         ["ovs-vsctl", f"--db={DB}", "del-port", name]),
        (lambda: target_vids(port, bridge),
         ["ip", "link", "set", "dev", name, "type", "bridge", "vlan_filtering", "1"]),
    ):
        with pytest.raises(Failure) as caught:
            check()
        yield caught.value, words
    applied = Applied(name, None, 7, "", ours=True)
    end = ["--"] if name[0] == "-" else []
    yield (_denied(applied, Failure(Status.DENIED, "denied", name)),
           ["pyqemu-ifctl", "apply", "--cut", *end, name])
    yield _left(applied, port), ["pyqemu-ifctl", "apply", *end, name]


def test_a_remedy_says_the_command_that_is_meant(tmp_path: Path) -> None:
    for shell in SHELLS[::2]:
        lines, wanted = [], []
        for name in HOSTILE:
            for failure, words in failures(name):
                assert str(failure).isprintable()
                remedy = failure.remedy.replace(" or correct the policy", "")
                if name == "--" and words[0] == "ovs-vsctl":
                    assert "# ovs-vsctl cannot be told" in remedy
                    continue
                start = re.search(rf"(?<![\w'-]){words[0]} ", remedy)
                assert start is not None, remedy
                text = remedy[start.start():].removesuffix(")")
                lines.append(text.replace("; or end its QEMU, or mend the policy", ""))
                wanted.append(words)
        assert words_of("\n".join(lines), tmp_path, shell) == wanted


def test_nothing_of_another_user_s_command_line_is_printed() -> None:
    """It says what to add, to which process of which user: setpriv took options from argv[0]."""
    words = (EVIL, "-name", "web; reboot", "-netdev",
             f"tap,id=a,script=/x/pyqemu-ifup,downscript=/{EVIL}", "-device", "e1000,netdev=a")
    scripts = {"/x/pyqemu-ifup": "/x/pyqemu-ifup", f"/{EVIL}": None}
    for uid, login in ((1 << 20, str(1 << 20)), (NOBODY, "nobody")):
        qemu = Qemu(Guest(7, "web; reboot", {}, ()), words, tuple(find_options(words)), f"/{EVIL}",
                    uid, False, scripts)
        twin = replace(qemu, guest=Guest(8, None, {}, ()))
        found = [each for each in find_all(a_scene("br", qemus=(qemu, twin)))[0]
                 if each.check.startswith("qemu-")]
        assert {each.check for each in found} == {"qemu-downscript", "qemu-mac", "qemu-sandbox"}
        for each in found:
            assert each.command is None and each.do is not None
            assert EVIL not in f"{each.what} {each.why} {each.do}"
            pid = 8 if "QEMU 8" in each.what.partition(", and")[0] else 7
            assert f"process {pid} of user {login}" in each.do
            assert "'web; reboot' (QEMU" in each.what or "QEMU 8" in each.what
