"""What root reads and pastes: no name of anybody's is more than one word of a command.

The remedies are run by shells that find no program but stand-ins, which note their words.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock
from urllib.parse import unquote

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from lab.needs import require
from lab.netns import Namespace
from lab.ovs import SCHEMA, OpenVSwitch
from lab.paste import HOSTILE, HOSTILE_TEXTS, SHELLS, words_of
from lab.ports import place_on
from lab.public import NOBODY
from pyqemu_ifconf import shell as of_shell
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.bridge import BridgePlace
from pyqemu_ifconf.kinds.linux import LinuxPlace
from pyqemu_ifconf.kinds.openvswitch import OvsPlace
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.names import is_network_name
from pyqemu_ifconf.policy import (
    Attach,
    Caller,
    Deny,
    Kind,
    Nat,
    Policy,
    Port,
    PortSettings,
    Position,
    Vlan,
)
from pyqemu_ifconf.shell import Command, ifctl, readable, sh
from pyqemu_ifconf.trust import read_trusted
from pyqemu_ifctl.doctor.checks import find_all
from pyqemu_ifctl.doctor.running import Qemu
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifctl.explanation import View, explain_port
from pyqemu_ifctl.in_force import Guest as Applied
from pyqemu_ifctl.in_force import _denied, _left, _unmarked
from pyqemu_ifctl.qemu.cards import Side, Told, view_of
from pyqemu_ifctl.qemu.cards import _with_twins as with_twins
from pyqemu_ifctl.qemu.command_nics import nics_of
from pyqemu_ifctl.qemu.qmp import Backend, GuestNic
from pyqemu_ifctl.qemu.running import Guest
from pyqemu_ifctl.rights import find_lost
from pyqemu_ifctl.taps import Row
from pyqemu_ifctl.verbs.args import arguments
from pyqemu_ifctl.verbs.info import as_text as info_text
from pyqemu_ifd import thin
from pyqemu_ifd.reconcile import Reconciler
from pyqemu_ifdown.detach import leave_to_gc
from pyqemu_ifup import change, kinds
from pyqemu_ifup.attach import ask_again
from pyqemu_ifup.claims import refuse_foreign_ports, refuse_shared, refuse_strangers
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.nft_program import DroppingChain
from pyqemu_ifup.drivers.ovsdb import Database
from pyqemu_ifup.drivers.ovsdb_connection import wait as wait_for
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.drivers.tun import making_anew
from pyqemu_ifup.entitled import check_owner
from pyqemu_ifup.hook import half_done, left_to_gc
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.linux import JoinBridge, LeaveBridge, SetIsolated, SetVlans, target_vids
from pyqemu_ifup.kinds.macvtap import AddMacvtap, AddVlan, DropVlan, KeepFromHost, taken
from pyqemu_ifup.kinds.openvswitch import AddPort, DelPort, SetPort
from pyqemu_ifup.kinds.vswitchd import Vswitchd
from pyqemu_ifup.look import Link, OvsBridge, OvsPort, OvsSwitch, Seen, Vid
from pyqemu_ifup.made.base import WantedNetwork
from pyqemu_ifup.made.names import bridge_alias
from pyqemu_ifup.made.nat.firewalls import tell_of_firewalls
from pyqemu_ifup.made.network import leave
from pyqemu_ifup.main import denial
from pyqemu_ifup.mark import VERSION, Here, Mark, format_alias
from pyqemu_ifup.on_port import Address, Route, Sights, find_sitting
from pyqemu_ifup.ops import DelTap, SetAlias, SetDown, SetIpv6, SetMac, SetMtu, SetTxQueueLen, SetUp
from pyqemu_ifup.plan import check_bridge_mtu
from pyqemu_ifup.qemu.command_line import read_options
from pyqemu_ifup.steps import take_back
from pyqemu_ifup.taps import _failure
from pyqemu_ifup.task import finish
from pyqemu_ifup.verify import _tell_of_mac

HERE = Here("boot", "4:42")
DB = "unix:/run/x y;id"
EVIL = "--reuid=0;id"
PLAIN = "plainname"
ROOT = Path(__file__).parents[2]


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
    databases = tuple(changes.get("switches", ()))
    scene = Scene(
        policy=a_policy(bridge), here=HERE, ovs_bridges={bridge: databases}, tun_mode=0o666
    )
    return replace(scene, **changes)


def each_scene(name: str) -> Iterator[Scene]:
    """Yield hosts on which something of this name is wrong."""
    yield a_scene(name)
    yield a_scene(name, links=(a_link("other", altnames=(name,)),))
    bridge = a_link(
        name,
        kind="bridge",
        tap=False,
        up=False,
        stp=True,
        forward_delay=1500,
        vlan_filtering=False,
        calls_iptables=True,
    )
    uplink = a_link(f"{name}u", index=8, kind=None, tap=False, up=False, master=7)
    chains = (
        DroppingChain("ip", name, name, "forward"),
        DroppingChain("bridge", name, name, "forward", 3),
    )
    yield a_scene(name, links=(bridge,), pinned={name: False}, chains=chains)
    yield a_scene(
        name,
        links=(replace(bridge, vlan_filtering=True), uplink),
        chains=chains,
        call_iptables=frozenset({"iptables"}),
    )
    database = "unix:/run/openvswitch/db.sock"
    switch = OvsSwitch(database, "2.5.0", False, (OvsBridge(database, name, True, False),))
    port = a_port(f"{name}u", ovsdb=database, bridge=name, error="a\x1b[2J;id", tag=4)
    tap = a_link(f"{name}u")
    yield a_scene(
        name,
        links=(a_link(name, kind="openvswitch", tap=False),),
        switches={database: switch},
        ports=(port,),
    )
    yield a_scene(
        name,
        links=(tap,),
        switches={database: switch},
        ports=(replace(port, tag=None, error=None),),
    )
    yield a_scene(name, switches={database: switch}, ovs_bridges={})
    local = a_link(name, kind="openvswitch", tap=False)
    yield a_scene(
        name,
        links=(local,),
        switches={database: switch},
        vswitchd=Vswitchd({database: ("stopped", 7)}),
    )
    for changes in ({"tag": None, "vlan_mode": "access"}, {"tag": None, "trunks": (5,)}):
        yield a_scene(name, switches={database: switch}, ports=(replace(port, **changes),))
    ours = (
        ("pyqemu-ifup", VERSION),
        ("pyqemu-boot-id", HERE.boot_id),
        ("pyqemu-netns", HERE.netns),
        ("pyqemu-ifindex", "7"),
    )
    yield a_scene(name, ports=(replace(port, external_ids=ours),))
    yield a_scene(name, failed={database: Failure(Status.TRY_AGAIN, name)})
    yield a_scene(name, off=(a_link(name, alias=format_alias(MARK)),))
    for failure in (
        Failure(Status.NO_POLICY, f"/x y/{name}"),
        Failure(Status.UNSAFE, name, "", "run chmod"),
        Failure(Status.UNSAFE, name, "", "run chown"),
        Failure(Status.UNSAFE, name, "it is a symbolic link"),
        Failure(Status.UNSAFE, name, "it has 2 hard links"),
    ):
        yield replace(a_scene("br"), policy=failure)
    for policy in each_policy(name):
        yield replace(a_scene("br"), policy=policy)


def each_policy(name: str) -> Iterator[Policy | Failure]:
    """Yield policies of a file of this name with which something is wrong."""
    head = "version: 1\nnetworks: {lan: {bridge: br}}\nrules:\n"
    for rules in (
        "- {tap: '*', network: lan}\n- {tap: x, network: lan}\n",
        "- {tap: sixteen-letters-, network: lan}\n",
        "- {}\n",
    ):
        try:
            yield parse_policy([Source(name, (head + rules).encode())])
        except Failure as failure:
            yield failure


def each_command(name: str) -> Iterator[Command]:
    """Yield what doctor and a plan print about something of this name."""
    for scene in each_scene(name):
        for _, finding in find_all(scene)[0]:
            if finding.command is not None:
                yield finding.command
            assert all(map(str.isprintable, (finding.what, finding.why)))
    ids = (("k", "it's \";id"), ("a=b", ";id"))
    for op in (
        SetAlias(name, 7, "x y"),
        SetMtu(name, 7, 9),
        SetIpv6(name, 7, True, 1),
        JoinBridge(name, 7, name, 8),
        AddMacvtap(name, name, 7, "vepa", "52:54:00:aa:00:01"),
        AddVlan(name, name, 7, 30),
        KeepFromHost(name, 7),
        DropVlan(name, 7, 8),
        SetIsolated(name, 7, True),
        DelPort(DB, name, name, ids),
        SetVlans(name, 7, (Vid(5, True, True),)),
        AddPort(DB, name, name, 7, Vlan(5), True, ids),
        SetPort(DB, name, (), None, None, (), False, False, ids, ("k", ";id")),
    ):
        yield from op.commands()


def without_end(words: list[str]) -> list[str]:
    """Return the words of a verb of ours without the `--` by which no name is an option."""
    if words[0] != "pyqemu-ifctl":
        return words
    own, rest = words[:2], words[2:]
    if rest[:1] == ["--cut"]:
        own, rest = words[:3], words[3:]
    while own[1] == "explain" and re.match("--(vm|netdev|mac|user|host)=", rest[0]):
        own, rest = [*own, rest[0]], rest[1:]
    if rest[:1] == ["--"]:
        return [*own, *rest[1:]]
    assert not any(word.startswith("-") for word in rest), words
    return words


def bare(commands: list[list[str]], name: str) -> list[list[str]]:
    """Return commands without what goes by the name on purpose, and with PLAIN in its place.

    A MAC is made of the name, a mark escapes it, QEMU wants each comma twice; `./` keeps it from
    being an option; nft and ovs-vsctl are not told of names that they have no words for.
    """
    found = []
    for words in commands:
        if words[0] == "nft":
            continue
        if name == "--" and (words[0] in ("ovs-vsctl", "cut") or words[:2] == ["ip", "-o"]):
            # NOTE: the index of a port's link is asked for in a line for ovs-vsctl.
            continue
        words = [unquote(word) if word.startswith("pyqemu-ifup/1 ") else word for word in words]
        words = [re.sub("02(:[0-9a-f]{2}){5}", "MAC", word) for word in words]
        words = [word[2:] if word[:3] in ("./-", "./+") else word for word in words]
        words = [word.replace(",,", ",") for word in words]
        found.append(words)
    return found


@pytest.mark.parametrize("shell", SHELLS[::2], ids=" ".join)
def test_no_name_is_more_than_a_word_of_a_command(shell: tuple[str, ...], tmp_path: Path) -> None:
    """The very commands that come for plain names come for all others."""
    compare({name: list(each_command(name)) for name in (PLAIN, *HOSTILE)}, tmp_path, shell)


def compare(lines: Mapping[str, Sequence[str]], folder: Path, shell: tuple[str, ...]) -> None:
    """Check that the lines of each name are those of PLAIN, with that name in its place."""
    runs: list[list[list[str]]] = [[]]
    text = "\n".join(line for found in lines.values() for line in (*found, sh("touch")))
    for words in words_of(text, folder, shell):
        if words == ["touch"]:
            runs.append([])
        else:
            runs[-1].append(words)
    told = runs[0]
    assert len(told) > 40 and len({words[0] for words in told}) > 8
    for name, found in zip(lines, runs[:-1], strict=True):
        wanted = [[word.replace(PLAIN, name) for word in words] for words in told]
        own = [without_end(words) for words in found]
        # NOTE: the ends of a pipe run at once.
        assert sorted(bare(own, name)) == sorted(bare(wanted, name))
        for words in found:
            if words[0] == "nft":
                assert len(words) == 2 and ";" not in words[1].replace("policy accept;", "")


def fail(failure: Failure) -> None:
    """Raise it."""
    raise failure


def failures(name: str) -> Iterator[tuple[Failure, list[str]]]:
    """Yield what is refused about a tap or a bridge of this name, and what is told to do."""
    where, vlan = Position("p.yaml", 1, 1), PortSettings(vlan=Vlan(10))
    port = Port(name, "lan", BridgePlace(name), where, vlan)
    tap, bridge = a_link(name), a_link(name, kind="bridge", tap=False, vlan_filtering=False)
    for check, words in (
        (
            lambda: kinds.find(replace(port, place=LinuxPlace(name)), Seen(None)),
            ["ip", "link", "add", "name", name, "up", "type", "bridge", "vlan_filtering", "1"],
        ),
        (
            lambda: kinds.load("linux").claim(port, Seen(None, bridge=replace(bridge, up=False))),
            ["ip", "link", "set", "dev", name, "up"],
        ),
        (lambda: fail(taken(name)), ["ip", "-d", "link", "show", "dev", name]),
        (
            lambda: refuse_strangers(name, Seen(replace(tap, alias=name)), 0),
            ["ip", "link", "set", "dev", name, "alias", ""],
        ),
        (
            lambda: refuse_strangers(name, Seen(tap, master=bridge), 0),
            ["ip", "link", "set", "dev", name, "nomaster"],
        ),
        (
            lambda: refuse_foreign_ports(Seen(tap, ports=(a_port(name, bridge=name),)), HERE),
            ["ovs-vsctl", f"--db={DB}", "del-port", name],
        ),
        (
            lambda: target_vids(port, bridge),
            ["ip", "link", "set", "dev", name, "type", "bridge", "vlan_filtering", "1"],
        ),
    ):
        with pytest.raises(Failure) as caught:
            check()
        yield caught.value, words
    applied = Applied(name, None, 7, "", ours=True)
    end = ["--"] if name[0] == "-" else []
    yield (
        _denied(replace(applied, mark=MARK), Failure(Status.DENIED, "denied", name), None),
        ["pyqemu-ifctl", "apply", "--cut", *end, name],
    )
    for left in (_left(applied, port), _unmarked(applied, NOBODY)):
        yield left, ["pyqemu-ifctl", "apply", *end, name]


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
                text = remedy[start.start() :].removesuffix(")")
                lines.append(text.replace("; or end its QEMU, or mend the policy", ""))
                wanted.append(words)
        assert words_of("\n".join(lines), tmp_path, shell) == wanted


@pytest.mark.parametrize(("uid", "login"), [(1 << 20, str(1 << 20)), (NOBODY, "nobody")])
def test_nothing_of_another_user_s_command_line_is_printed(uid: int, login: str) -> None:
    """It says what to add, to which process of which user: setpriv took options from argv[0]."""
    words = (
        EVIL,
        "-name",
        "web; reboot",
        "-netdev",
        f"tap,id=a,script=/x/pyqemu-ifup,downscript=/{EVIL}",
        "-device",
        "e1000,netdev=a",
    )
    scripts = {"/x/pyqemu-ifup": "/x/pyqemu-ifup", f"/{EVIL}": None}
    guest = Guest(7, "web; reboot", {}, (), uid, tuple(read_options(words)[1]))
    qemu = Qemu(guest, False, scripts, nics_of(guest, 8))
    twin = replace(qemu, guest=replace(guest, pid=8, vm=None))
    found = [
        (check.name, finding)
        for check, finding in find_all(a_scene("br", qemus=(qemu, twin)))[0]
        if check.name.startswith("qemu-")
    ]
    assert {name for name, _ in found} == {"qemu-downscript", "qemu-mac", "qemu-sandbox"}
    for _, each in found:
        assert each.command is None and each.do is not None
        assert EVIL not in f"{each.what} {each.why} {each.do}"
        # Where the hooks are not found, no word is printed that stands for their folder.
        assert "PREFIX" not in each.do
        pid = 8 if "QEMU 8" in each.what.partition(", and")[0] else 7
        assert f"process {pid} of user {login}" in each.do
        assert "'web; reboot' (QEMU" in each.what or "QEMU 8" in each.what


def hub_findings(*words: str, **changes: Any) -> dict[str, str]:
    """Return what is told, by its check, of a user's QEMU with these arguments that holds web1.

    web0, web1 and web2 are taps of ours that are up.
    """
    mark = format_alias(replace(MARK, pid=6))
    links = [a_link(f"web{n}", alias=mark) for n in range(3)]
    guest = Guest(7, None, {3: "web1"}, (), NOBODY, tuple(read_options(["q", *words])[1]))
    scene = a_scene("br", qemus=(Qemu(guest, True, {}, **changes),), links=tuple(links))
    found = find_all(replace(scene, off=(links[0],)))[0]
    wanted = ("tap-off", *HUB_CHECKS)
    return {check.name: each.what for check, each in found if check.name in wanted}


HUB_CHECKS = ("qemu-hub", "qemu-hub-mixed")


@pytest.mark.parametrize(
    "words",
    [
        "-net tap,ifname=web0 -net tap,ifname=zz",
        "-net tap,ifname=web0 -net tap,ifname=web2",
        "-net tap,ifname=web0 -net user",
        "-net tap -net tap,ifname=web0 -net user",
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_command_line_tells_of_no_tap_that_its_process_does_not_hold(
    hidden: bool, words: str
) -> None:
    told = hub_findings(*words.split(), hidden=hidden)
    assert "the tap web0 is " in told.pop("tap-off")
    assert not told or (not hidden and told.keys() == {"qemu-hub-mixed"}), told
    assert not any("web0" in what for what in told.values())


def test_what_a_hub_joins_is_told_in_few_words() -> None:
    """A backend has any type, one of any length, or none; and there are as many as fit."""
    netdevs = ("-netdev", "id=x", "-netdev", "hubport,id=h,hubid=0,netdev=x")
    tap = ("-net", "tap,ifname=web1")
    assert hub_findings(*netdevs).keys() == {"tap-off"}
    assert hub_findings(*netdevs, *tap)["qemu-hub-mixed"].endswith(" with something else")
    assert hub_findings(*tap, "-net", "A" * 200000)["qemu-hub-mixed"].endswith(" something else")
    many = [word for n in range(3000) for word in ("-net", f"kind{n:04}")]
    told = hub_findings(*tap, *many)["qemu-hub-mixed"]
    assert told.endswith(" with kind0000 and kind0001 and kind0002 and kind0003")
    backends = tuple(Backend(f"n{n}", "user", "") for n in range(3000))
    nic = GuestNic("net0", "e1000", "52:54:00:00:00:01", None, None, backends, hub=0)
    (card,) = view_of(Guest(7, None, {}, ()), Told((nic,), "q"), {}, a_policy("br")).cards
    assert sum(map(len, card.faults)) < 500


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=lambda text: ascii(text)[1:20])
def test_info_quotes_what_a_guest_says(text: str) -> None:
    """A QEMU that a guest has taken over says what it likes, over QMP too."""
    said = []
    for name in (PLAIN, text):
        backend = Backend(name, name, name)
        tap = Backend(name, "tap", name, ifname=name)
        guest = Guest(7, name, {3: name}, ())
        nic = GuestNic(name, name, name, name, "01.0", (backend, tap), False, 9000)
        row = Row(name, "loose", bridge=name, network=name, mtu=1500)
        sides = {name: Side(row, None)}
        views = [view_of(guest, Told(nics, name), sides, a_policy("br")) for nics in ((nic,), None)]
        lines = info_text(with_twins([*views, replace(views[0], guest=replace(guest, pid=8))]))
        said.append("".join(line.removeprefix("      ") for line in lines.split("\n")))
    assert PLAIN in said[0]
    wanted = said[0].replace(PLAIN, readable(text))
    assert said[1].replace(" ", "") == wanted.replace(" ", ""), said[1]


WATCHED = {"sh", "vsctl", "ifctl", "nft_command", "write", "into", "edit"}
"""The functions of pyqemu_ifconf.shell by which others make a command of names."""
NO_NAME = {
    ("ifctl/pyqemu_ifctl/agents.py", "_connect"): "a unit of ours, one of two",
    ("ifctl/pyqemu_ifctl/agents.py", "_mute"): "likewise",
    ("ifctl/pyqemu_ifctl/agents.py", "outdated_line"): "likewise",
    ("ifctl/pyqemu_ifctl/agents.py", "_no_agent"): "likewise",
    ("ifup/pyqemu_ifup/tap_client.py", "_connect"): "likewise",
    ("ifup/pyqemu_ifup/main.py", "by_the_agent"): "likewise",
    ("ifup/pyqemu_ifup/kinds/vswitchd.py", "start"): "a unit of the distribution's",
    ("ifup/pyqemu_ifup/drivers/tun.py", "no_tun"): "/dev/net/tun",
    ("ifup/pyqemu_ifup/drivers/tun.py", "require_tun"): "likewise",
    ("ifup/pyqemu_ifup/drivers/tun.py", "_making"): "likewise",
    ("ifctl/pyqemu_ifctl/doctor/taps.py", "find_closed_tun"): "likewise",
    (
        "ifctl/pyqemu_ifctl/doctor/hubs.py",
        "find_joined_taps",
    ): "a tap that its QEMU holds: the kernel tells its name, sh() quotes it",
    ("ifctl/pyqemu_ifctl/verbs/args.py", "_refuse_made"): "a guest of the policy's",
    ("ifup/pyqemu_ifup/kinds/macvtap.py", "_explain"): "a module of the kernel's",
    ("ifup/pyqemu_ifup/kinds/macvtap.py", "run"): "a device of our making, told as it is deleted",
    ("ifctl/pyqemu_ifctl/verbs/run.py", "take_back"): "a tap that we make, of a plain name",
    ("ifup/pyqemu_ifup/drivers/nft.py", "_check_owner"): "a chain of a name that ours have",
    ("ifup/pyqemu_ifup/drivers/nft_words.py", "commands"): "likewise: the link's is quoted",
    ("ifup/pyqemu_ifup/drivers/dnsmasq.py", "serving_commands"): "a network's name",
    ("ifup/pyqemu_ifup/drivers/dnsmasq.py", "ending_commands"): "likewise",
    ("ifup/pyqemu_ifup/drivers/dnsmasq.py", "_recorded"): "likewise",
    ("ifup/pyqemu_ifup/drivers/nft_table.py", "commands_of"): "likewise",
    ("ifup/pyqemu_ifup/drivers/nft_table.py", "replacing_command"): "likewise",
    ("ifup/pyqemu_ifup/made/nat/needs.py", "_table"): "likewise",
    ("ifup/pyqemu_ifup/made/nat/needs.py", "_install"): "a package",
    ("ifup/pyqemu_ifup/made/nat/needs.py", "_ports_taken"): "the number of a port",
    ("ifup/pyqemu_ifup/made/bridge.py", "commands"): "the bridge of a network with nat:",
    ("ifup/pyqemu_ifup/made/nat/loopback.py", "commands"): "likewise",
    ("ifup/pyqemu_ifup/made/nat/server.py", "commands"): "a network's name",
    (
        "ifup/pyqemu_ifup/made/nat/needs.py",
        "_advertisements",
    ): "a card of this host's that heeds advertisements: no tap of ours does",
}
"""(file, function) -> why no name of others' comes there."""


def places() -> dict[tuple[str, str, int, int], str]:
    """Return where the toolkit makes commands of what may be a name: file, function, lines."""
    found = {}
    for path in sorted(ROOT.glob("*/pyqemu_if*/**/*.py")):
        tree = ast.parse(path.read_text())
        inside: list[tuple[ast.AST, str]] = [(tree, "")]
        while inside:
            node, function = inside.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                function = node.name
            inside += [(child, function) for child in ast.iter_child_nodes(node)]
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in WATCHED
                and path.name != "shell.py"
                and not all(isinstance(each, ast.Constant) for each in node.args)
            ):
                at = str(path.relative_to(ROOT))
                found[at, function, node.lineno, node.end_lineno or 0] = ast.unparse(node)
    return found


@contextmanager
def noting(reached: list[tuple[str, int, Command]]) -> Iterator[None]:
    """Note each command that code of ours makes meanwhile, and where."""

    def note(frame: FrameType, event: str, value: object) -> None:
        caller = frame.f_back
        if (
            event == "return"
            and isinstance(value, Command)
            and caller is not None
            and (frame.f_code.co_name in WATCHED and caller.f_code.co_filename != of_shell.__file__)
        ):
            reached.append((caller.f_code.co_filename, caller.f_lineno, value))

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


MARK = Mark("lan", "linux", "br0", "", 1 << 22, 1, uid=NOBODY, made=True)


class Elsewhere:
    """The places that need more than values: a database, sockets, files, links, a ruleset."""

    def __init__(self, ovs: OpenVSwitch) -> None:
        self.ovs = ovs
        self.database = Database(ovs.db, None)
        self.tell: Callable[[str], None] = lambda line: None

    def host(self) -> Host:
        return Host(None, Deadline(10), self.tell)

    def walk(self, name: str) -> None:
        """Go where a command is made about something of this name."""
        for step in (
            self.bridges,
            self.taps,
            self.looked_at,
            self.sitting,
            self.explained,
            self.files,
            self.undone,
            self.databases,
            self.networks,
        ):
            step(name)
        assert left_to_gc(name).isprintable() and half_done(name, "mute").isprintable()
        leave_to_gc(name, Failure(Status.DENIED, "a test's"))

    def refused(self, work: Callable[[], object]) -> None:
        with pytest.raises(Failure) as caught:
            work()
        assert str(caught.value).isprintable()

    def bridges(self, name: str) -> None:
        port = Port(name, "lan", BridgePlace(name), Position("p.yaml", 1, 1))
        bridge = a_link(name, kind="bridge", tap=False, vlan_filtering=True, default_pvid=0)
        before, now = (Seen(a_link(name), bridge=replace(bridge, mtu=mtu)) for mtu in (1500, 9))
        self.refused(lambda: target_vids(port, bridge))
        self.refused(lambda: check_bridge_mtu(port, kinds.load("linux"), before, now))
        self.refused(lambda: check_bridge_mtu(port, kinds.load("openvswitch"), before, now))
        self.refused(lambda: kinds.find(replace(port, place=OvsPlace(name)), Seen(None)))
        taken = Seen(
            replace(before.tap, mac="fe:00:00:00:00:01"),  # type: ignore[type-var]
            bridge=replace(bridge, mac="fe:00:00:00:00:01"),
        )
        _tell_of_mac(port, before, taken)
        nat = parse_policy(
            [
                Source(
                    "p",
                    b"version: 1\nnetworks: {lan: {bridge: br, nat: "
                    b"{ipv4: 10.0.0.1/24}}}\nrules: [{tap: x, network: lan}]",
                )
            ]
        )
        chains = tuple(
            DroppingChain(family, name, name, "forward", legacy=legacy)
            for family in ("ip", "ip6")
            for legacy in (True, False)
        )
        list(find_all(a_scene("br", policy=nat, chains=chains, otherwise={name: "says a"}))[0])

    def taps(self, name: str) -> None:
        ovs = a_link("ovs-system", index=9, kind="openvswitch", tap=False)
        for ports in ((), (a_port(name),)):
            seen = Seen(a_link(name), master=ovs, ports=ports)
            self.refused(partial(refuse_strangers, name, seen, 0))
        other = a_port(
            name,
            external_ids=(
                ("pyqemu-ifup", VERSION),
                ("pyqemu-boot-id", "boot"),
                ("pyqemu-netns", "n"),
            ),
        )
        self.refused(lambda: refuse_foreign_ports(Seen(a_link(name), ports=(other,)), HERE))
        self.refused(lambda: refuse_shared(a_link(name, multi_queue=True, owner=5), 6))
        assert making_anew(name, "root", queues=False).isprintable()
        self.refused(lambda: check_owner(a_link(name, owner=5), 6, "lan"))
        self.refused(lambda: check_owner(a_link(name, owner=5, persistent=True), 6, "lan"))
        raise_ = _failure(name, OSError(errno.EBUSY, "busy"))
        assert str(raise_).isprintable()
        policy = parse_policy(
            [
                Source(
                    "p",
                    b"version: 1\nnetworks: {other: {bridge: br}}\n"
                    b"rules: [{tap: '*', network: other}]",
                )
            ]
        )
        marked = a_link(name, alias=format_alias(replace(MARK, uid=None, made=False)))
        self.refused(lambda: Reconciler._wanted(policy, marked, replace(MARK, uid=None), None))
        own, other_end = socket.socketpair()
        other_end.close()
        with own:
            client = thin.Client("pyqemu-ifup", name, own)
            assert client._wait() is None
        # NOTE: it imports nothing, and says here what ifctl() would.
        assert f" {ifctl('gc', name)} " in client.left
        with self.host() as host:
            deny = Deny("no", None)
            for mark in (MARK, replace(MARK, uid=None, made=False)):
                link = a_link(name, alias=format_alias(mark), carrier=False)
                assert len(find_lost(host, policy, [link], lambda tap, mark: deny)) == 1

    def looked_at(self, name: str) -> None:
        for op in (
            SetDown(name, 7),
            SetUp(name, 7),
            SetMac(name, 7, "02:00:00:00:00:01"),
            SetTxQueueLen(name, 7, 9),
            LeaveBridge(name, 7, name),
            DelTap(name, 7),
        ):
            op.commands()

    def sitting(self, name: str) -> None:
        port, bridge = a_link(name), a_link(name, index=9, kind="bridge", tap=False, up=False)
        device = a_link(name, index=8, kind="macvlan", tap=False, under=7)
        routes = [Route(7, 4, "default", "192.0.2.9")]
        sights = Sights((bridge, port, device), [Address(7, "192.0.2.1/24")], routes)
        address, on_it = find_sitting(port, name, sights)
        assert address.remedy.isprintable() and on_it.remedy.isprintable()
        busy = SimpleNamespace(
            look_at=lambda index: port,
            links=lambda: [device],
            set_link=Mock(side_effect=NetlinkError(errno.EBUSY)),
        )
        self.refused(lambda: Netlink.join(cast(Netlink, busy), name, 7, name, 9))

    def explained(self, name: str) -> None:
        caller = Caller(name, vm="web; reboot")
        asks = parse_policy([Source("p", b"version: 1\nrules: [{vm: x, deny: no}]")])
        assert str(denial(Deny("no", None), asks, caller)).isprintable()
        rows: tuple[tuple[Kind, tuple[str, ...], Link | None], ...] = (
            ("linux", (), None),
            ("openvswitch", (DB,), None),
            ("linux", (), a_link(name, kind="bridge", tap=False, vlan_filtering=False)),
        )
        for kind, ovs_bridges, bridge in rows:
            port = Port(
                name,
                "lan",
                place_on(name, kind, DB),
                Position("p.yaml", 1, 1),
                PortSettings(vlan=Vlan(10), external_ids=(("a", "b;id"),) if ovs_bridges else ()),
            )
            seen = Seen(None, bridge=bridge, ovs_bridges=ovs_bridges)
            view = View(seen, HERE, frozenset(), True, databases=frozenset({DB}))
            found = explain_port(caller, Attach(port, None), view)
            assert found.forms[0].commands

    def files(self, name: str) -> None:
        path = Path(name)
        path.write_text("version: 1\n")
        path.chmod(0o666)
        self.refused(lambda: read_trusted(name, 9))
        path.chmod(0o600)
        os.chown(path, NOBODY, 0)
        self.refused(lambda: read_trusted(name, 9))
        path.unlink()
        path.mkdir()
        for hook in ("pyqemu-ifup", "pyqemu-ifdown"):
            (path / hook).write_text("")
            (path / hook).chmod(0o755)
        policy = Path("policy.yaml").absolute()
        policy.write_text(
            "version: 1\nnetworks: {lan: {bridge: br}}\n"
            "vms: {web: {nics: [{network: lan, mac: '52:54:00:00:00:01'}]}}\n"
        )
        before, sys.argv = sys.argv, [str(path.absolute() / "pyqemu-ifctl")]
        try:
            arguments(
                "web",
                {"PYQEMU_IFUP_POLICY": str(policy)},
                qemu="",
                machine=None,
                check=False,
                as_legacy=False,
                as_json=False,
            )
        finally:
            sys.argv = before

    def undone(self, name: str) -> None:
        step = SetMtu(name, 1 << 24, 9)
        with self.host() as host:
            assert not host.finish(take_back(host, step))
            assert not host.finish(take_back(host, step, change._again(name)))
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(f"{name}.sock")
                self.refused(lambda: host.finish(host.open_databases([f"unix:{name}.sock"])))

    def databases(self, name: str) -> None:
        wait = partial(wait_for, [self.database], Deadline(10))
        for bridge in (name, "br0"):
            op = AddPort(self.ovs.db, bridge, name, 7, None, False, (("pyqemu-ifup", VERSION),))
            self.refused(partial(finish, self.database.add_port(op, Deadline(10)), wait))
        self.ovs.server.stop()
        try:
            deadline = Deadline(0.02)
            self.refused(lambda: finish(self.database.sync(deadline), wait))
            with self.host() as host:
                host.databases[self.ovs.db] = self.database
                with host.until(deadline):
                    host.finish(ask_again(host, name))
        finally:
            self.ovs.server.cont()
        finish(self.database.sync(Deadline(10)), wait)

    def networks(self, name: str) -> None:
        chain = {
            "family": "inet",
            "table": name,
            "name": name,
            "type": "filter",
            "hook": "forward",
            "prio": 0,
            "policy": "drop",
        }
        table = {"table": {"family": "inet", "name": name}}
        self.nft({"add": table}, {"add": {"chain": chain}})
        wanted = WantedNetwork("lan", "lanbr0", Nat("10.0.0.1/24"))
        with self.host() as host:
            host.finish(tell_of_firewalls(host, wanted))
        self.nft({"delete": table})
        if "%" in name:
            # NOTE: no link is called so; its command is another's all the same.
            DelTap(name, 7).commands()
            return
        subprocess.run(["ip", "link", "add", "name", name, "type", "bridge"], check=True)
        subprocess.run(["ip", "link", "set", "dev", name, "alias", bridge_alias("lan")], check=True)
        with self.host() as host:
            assert host.finish(leave(host, "lan"))

    @staticmethod
    def nft(*does: dict[str, Any]) -> None:
        given = json.dumps({"nftables": does})
        subprocess.run(["nft", "-j", "-f", "-"], input=given, text=True, check=True)


@pytest.fixture
def elsewhere(
    inside: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Elsewhere]:
    """The rest of what the walk needs, with a port of each name in Open vSwitch's database."""
    require("ovs")
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        ovs = OpenVSwitch(inside)
        stack.callback(ovs.close)
        subprocess.run(["ovsdb-tool", "create", ovs.dir / "conf.db", SCHEMA], check=True)
        ovs.start_server()
        ovs.vsctl("--no-wait", "init", "--", "add-br", "br0")
        rows = []
        for number, name in enumerate((PLAIN, *HOSTILE)):
            rows += [
                {
                    "op": "insert",
                    "table": "Interface",
                    "uuid-name": f"i{number}",
                    "row": {"name": name},
                },
                {
                    "op": "insert",
                    "table": "Port",
                    "uuid-name": f"p{number}",
                    "row": {"name": name, "interfaces": ["named-uuid", f"i{number}"]},
                },
                {
                    "op": "mutate",
                    "table": "Bridge",
                    "where": [],
                    "mutations": [["ports", "insert", ["named-uuid", f"p{number}"]]],
                },
            ]
        done = subprocess.run(
            ["ovsdb-client", "transact", ovs.db, json.dumps(["Open_vSwitch", *rows])],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "error" not in done.stdout
        found = Elsewhere(ovs)
        stack.callback(found.database.close)
        finish(
            found.database.connected(Deadline(10)),
            partial(wait_for, [found.database], Deadline(10)),
        )
        yield found


def test_every_place_that_makes_a_command_is_walked(elsewhere: Elsewhere) -> None:
    reached: list[tuple[str, int, Command]] = []
    with noting(reached):
        list(each_command(PLAIN))
        list(failures(PLAIN))
        elsewhere.walk(PLAIN)
    lines = {(os.path.relpath(file, ROOT), line) for file, line, _ in reached}
    missed = {
        (file, function): f"{file}:{begin}: {text}"
        for (file, function, begin, end), text in places().items()
        if not any((file, line) in lines for line in range(begin, end + 1))
    }
    new = [text for at, text in missed.items() if at not in NO_NAME]
    assert not new, "walk there with a hostile name, or say why none can come:\n" + "\n".join(new)
    assert not (extra := NO_NAME.keys() - missed.keys()), f"what is walked needs no reason: {extra}"
    assert [name for name in HOSTILE if is_network_name(name)] == ["up"]


def test_each_of_them_makes_one_word_of_a_name(elsewhere: Elsewhere, tmp_path: Path) -> None:
    lines = {}
    for name in (PLAIN, *HOSTILE):
        reached: list[tuple[str, int, Command]] = []
        with noting(reached):
            elsewhere.walk(name)
        # NOTE: the arguments of a QEMU are words of a command of the reader's own.
        lines[name] = [
            f"id {line}" if file.endswith("/args.py") else line for file, _, line in reached
        ]
    assert len(lines[PLAIN]) > 60
    for each in SHELLS[::2]:
        compare(lines, tmp_path, each)
