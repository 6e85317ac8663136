"""Verbs while something does not answer: they show what they have found, and tell who is mute."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import pyqemu_ifup.main
from lab.calls import Calls
from lab.crowd import crowd
from lab.fuse import mute_folder
from lab.hooks import SOURCE_ROOTS, Hooks
from lab.load import high_load
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from pyqemu_ifctl.doctor import running
from pyqemu_ifup.system import holders

HANG = """
import ctypes, sys, time
sys.path[:0] = {roots!r}
from pyqemu_ifctl import bounded
bounded.ALL = {seconds}
from pyqemu_ifctl import taps
from pyqemu_ifctl.doctor import chains, running, scene
from pyqemu_ifup.kinds import vswitchd
from pyqemu_ifup.hook import waiting_for

def hang(*_arguments):
    with waiting_for("the kernel does not answer"):
        time.sleep(60)

def lock(*_arguments):
    with waiting_for("the kernel does not answer"):
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

def nameless(*_arguments):
    time.sleep(60)

def compute(*_arguments):
    while True:
        pass

{part}
from pyqemu_ifctl.main import main
raise SystemExit(main())
"""
"""pyqemu-ifctl where one part of the look, which the test chooses, does not end."""
IN_TURN = "scene._look_at_needs = taps._with_tables = "
APART = "bounded.PART = 1.5; chains._nft_chains = "
LOAD = r"\(load \d+, processors \d+\)"
BUSY = rf"this host is busy, or something does not answer {LOAD}"


@pytest.fixture
def hooks(inside: Namespace, tmp_path: Path) -> Hooks:
    inside.add_bridge("br0", mac="02:00:00:00:00:01")
    hooks = Hooks(tmp_path / "hooks")
    hooks.write_policy(json.dumps({
        "version": 1, "networks": {"lan": {"bridge": "br0"}, "none": {"bridge": "br9"}},
        "rules": [{"tap": "*", "network": "lan"}],
    }))  # fmt: skip
    return hooks


def hanging(
    hooks: Hooks,
    *words: str,
    seconds: float = 2.0,
    part: str = f"{IN_TURN} hang",
    mounts: str = ":",
) -> subprocess.CompletedProcess[str]:
    code = HANG.format(roots=SOURCE_ROOTS, seconds=seconds, part=part)
    env = {**os.environ, "PYQEMU_IFUP_POLICY": str(hooks.policy)}
    return subprocess.run(
        [
            "unshare",
            "-m",
            "sh",
            "-euc",
            mounts + '\nexec "$@"',
            "sh",
            sys.executable,
            "-I",
            "-c",
            code,
            *words,
        ],
        env=env,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_doctor_shows_what_it_has_found_and_who_is_mute(inside: Namespace, hooks: Hooks) -> None:
    with crowd(inside, [0], "-netdev", "user,id=b") as (pid,):
        done = hanging(hooks, "doctor", "--json")
        told = json.loads(done.stdout)
    late = [each for each in told["unseen"] if "need" in each]
    assert late == ["what networks with NAT need: not done after 2 s: the kernel does not answer"]
    assert f"not seen: {late[0]}" in done.stderr
    assert checks(told) & {"bridge-missing"}, told
    assert done.returncode == 1
    assert f"QEMU {pid}" not in told["unseen"]


def test_status_shows_the_taps_and_who_is_mute(inside: Namespace, hooks: Hooks) -> None:
    inside.tap("web0")
    done = hanging(hooks, "status", "--json")
    assert [row["tap"] for row in json.loads(done.stdout)["taps"]] == ["web0"]
    assert "not seen: the nft tables of networks: not done after 2 s: the kernel does not " in (
        done.stderr
    )
    assert done.returncode == 75


def test_a_policy_in_a_folder_that_is_mute_leaves_the_rest_to_be_seen(
    inside: Namespace, hooks: Hooks, tmp_path: Path
) -> None:
    """The call of the kernel ends with its process alone."""
    mute = tmp_path / "mute"
    mute.mkdir()
    policy = str(mute / "policy.yaml")
    with mute_folder(mute), crowd(inside, [0], "-netdev", "user,id=b") as (pid,):
        told = json.loads(hooks.ctl("doctor", "--json", PYQEMU_IFUP_POLICY=policy).stdout)
    assert (
        f"the policy: not done after 3 s: the policy in {policy}, or a folder on the way to it, "
        "cannot be read"
    ) in told["unseen"]
    assert any(each["what"].startswith(f"QEMU {pid}") for each in told["findings"]), told


def test_qemus_that_say_nothing_over_qmp_leave_the_rest_to_be_seen(
    inside: Namespace, hooks: Hooks, tmp_path: Path
) -> None:
    """Each has two taps and waits for a migration: it would be asked for its hubs and its state."""
    path = tmp_path / "qmp"
    taps = [inside.tap(f"web{number}") for number in range(4)]
    words = (
        "-qmp", f"unix:{path},server=on,wait=off", "-incoming", "defer",
        "-netdev", "tap,id=a", "-device", "e1000,netdev=a,mac=52:54:00:00:00:01",
    )  # fmt: skip
    with (
        socket.socket(socket.AF_UNIX) as mute,
        crowd(inside, [0], *words, held=taps[:2]) as (one,),
        crowd(inside, [0], *words, held=taps[2:]) as (other,),
    ):
        mute.bind(str(path))
        mute.listen()
        done = hanging(hooks, "doctor", "--json", seconds=2.5, part="")
        assert done.returncode == 1, done
        told = json.loads(done.stdout)
    assert checks(told) & {"bridge-missing"}, told
    for pid in (one, other):
        assert any(f"QEMU {pid} waits for a migration" in each for each in told["unseen"]), told


def test_what_there_was_no_time_for_is_not_taken_for_absent(
    inside: Namespace, hooks: Hooks, ovs: OpenVSwitch
) -> None:
    """Bridges of an Open vSwitch, and an address of the host's."""
    inside.ip("address", "add", "192.0.2.1/24", "dev", "br0")
    ovs.add_bridge("br-int", hwaddr="02:00:00:00:00:0c", mtu=1500)
    hooks.write_policy(json.dumps({
        "version": 1,
        "networks": {
            "lan": {"bridge": "br0"},
            "sw": {"bridge": "br-int", "ovsdb": ovs.db},
        },
        "rules": [{"tap": "web*", "network": "lan"}],
    }))  # fmt: skip
    inside.tap("web0")
    assert hooks.up("web0").returncode == 0
    found = checks(json.loads(hooks.ctl("doctor", "--json").stdout))
    done = hanging(hooks, "doctor", "--json", part="vswitchd.settled = hang")
    told = json.loads(done.stdout)
    assert any(each.startswith("how Open vSwitch is: not done") for each in told["unseen"]), told
    assert checks(told) <= found, told
    ovs.vsctl("del-br", "br-int")


def test_routes_that_take_long_keep_nothing_from_being_seen(
    inside: Namespace, hooks: Hooks
) -> None:
    """They are of use where a port has an address alone: a router may have a million."""
    part = "from pyqemu_ifup.drivers import sights; sights.read_route = hang; bounded.PART = 2.0"
    inside.ip("address", "add", "192.0.2.1/24", "dev", "br0")
    inside.ip("route", "add", "198.51.100.0/24", "via", "192.0.2.2")
    inside.tap("web0")
    assert hooks.up("web0").returncode == 0
    done = hanging(hooks, "status", "--json", seconds=8.0, part=part)
    assert done.returncode == 0, done
    (row,) = json.loads(done.stdout)["taps"]
    assert row["state"] == "ok"
    done = hanging(hooks, "doctor", "--json", seconds=8.0, part=part)
    assert "addresses and routes" not in done.stderr
    inside.ip("address", "add", "192.0.2.9/24", "dev", "web0")
    for verb in ("status", "info", "doctor"):
        done = hanging(hooks, verb, "--json", seconds=8.0, part=part)
        assert f"not seen: {LATE}" in done.stderr.replace("\n", " "), done
        assert done.stdout, done
        if verb == "status":
            (row,) = json.loads(done.stdout)["taps"]
            assert (row["state"], row["differences"], done.returncode) == (None, None, 75)
    assert hooks.down("web0").returncode == 0


LATE = "addresses and routes: not done after 2 s: "
MUTE_NFT = """
nft=$(readlink -f $(command -v nft))
printf '#!/bin/sh\\necho $$ >>{folder}/called; exec sleep 60\\n' >{folder}/nft
chmod 755 {folder}/nft
mount --bind {folder}/nft "$nft"
"""


def test_an_nft_that_is_mute_is_no_fault_of_each_network_s(
    inside: Namespace, hooks: Hooks, tmp_path: Path
) -> None:
    """It has its time once, for all networks."""
    require("nft")
    nat = {"dhcp": False, "dns": False, "outbound": False}
    hooks.write_policy(json.dumps({
        "version": 1, "timeout": 30,
        "networks": {
            name: {"bridge": f"{name}br0", "nat": {"ipv4": f"192.168.{number}.1/24", **nat}}
            for number, name in enumerate(("aaa", "bbb", "ccc"), 76)
        },
        "rules": [{"tap": "*", "network": "aaa"}],
    }))  # fmt: skip
    inside.tap("web0")
    assert hooks.up("web0").returncode == 0
    done = hanging(
        hooks,
        "doctor",
        "--json",
        seconds=8.0,
        mounts=MUTE_NFT.format(folder=tmp_path),
        part="from pyqemu_ifctl import databases; databases.PATIENCE = 0.5",
    )
    called = (tmp_path / "called").read_text().split()
    left = [pid for pid in called if os.path.exists(f"/proc/{pid}")]
    assert hooks.down("web0").returncode == 0
    assert done.returncode in (1, 75) and done.stdout, done
    told = json.loads(done.stdout)
    late = [each for each in told["unseen"] if "nft table" in each or "can be made" in each]
    assert late[0].startswith("the nft table of network aaa: not done after "), late
    assert late[1].startswith("whether network aaa can be made: not done after "), late
    assert late[2:] == [
        f"whether network {name} can be made: the time was up before" for name in ("bbb", "ccc")
    ]
    assert "the nftables rules: not done after 2 s: nft does not end" in told["unseen"]
    assert called and not left, "doctor leaves an nft behind"
    assert "nat-needs" not in checks(told)
    assert done.returncode == 75, done


def test_who_holds_taps_is_seen_for_as_long_as_users_may_take(
    inside: Namespace, hooks: Hooks
) -> None:
    """It is in time by itself, and tells whom it did not get to: no part of the look cuts it."""
    inside.tap("web0")
    done = hanging(hooks, "doctor", "--json", seconds=8.0, part="bounded.PART = 0.0")
    told = json.loads(done.stdout)
    assert not any("the taps that processes hold" in each for each in told["unseen"]), told
    assert running.HOLDERS_SECONDS > holders.OTHERS + 2 * holders.PATIENCE


@pytest.mark.parametrize(("part", "why"), [
    ("hang", "the kernel does not answer"),
    ("nameless", f"(something does not answer|{BUSY})"),
    ("compute", f"(there is too much to look at|this host is busy) {LOAD}"),
])  # fmt: skip
def test_who_holds_up_a_part_that_is_looked_at_apart_is_told(
    inside: Namespace, hooks: Hooks, part: str, why: str
) -> None:
    """What works all the time waits for nobody, and who is left behind is not blamed again."""
    part = f"{APART}{part}\nfrom pyqemu_ifctl import databases; databases.read_policy = hang"
    done = hanging(hooks, "doctor", "--json", part=part, seconds=4.0)
    said = "\n".join(json.loads(done.stdout)["unseen"])
    assert "the policy: not done after 2 s: the kernel does not answer" in said
    assert re.search(rf"^the nftables rules: not done after 2 s: {why}$", said, re.MULTILINE), said


MUTE_PROCESS = """
MS_BIND = 0x1000
assert not ctypes.CDLL(None).mount({folder!r}, b"/proc/{pid}", None, MS_BIND, None)
bounded.PART = running.HOLDERS_SECONDS = 1.0
"""
"""NOTE: mount(8) would look at the folder."""


def test_a_process_that_cannot_be_looked_at_is_named(
    inside: Namespace, hooks: Hooks, tmp_path: Path
) -> None:
    mute = tmp_path / "mute"
    mute.mkdir()
    with mute_folder(mute), crowd(inside, [0], "-netdev", "user,id=b") as (pid,):
        part = MUTE_PROCESS.format(folder=os.fsencode(mute), pid=pid)
        done = hanging(hooks, "doctor", "--json", part=part, seconds=6.0)
    told = json.loads(done.stdout)
    why = f"not done after 1 s: process {pid} does not let "
    assert f"the taps that processes hold: {why}itself be looked at" in told["unseen"], told
    assert f"the guests: {why}its cmdline be read" in told["unseen"], told
    assert checks(told) & {"bridge-missing"}, told


def test_a_verb_that_a_call_of_the_c_library_does_not_let_go_tells_who_is_mute(
    inside: Namespace, hooks: Hooks
) -> None:
    inside.tap("web0")
    done = hanging(hooks, "status", part=f"{IN_TURN} lock", seconds=1.0)
    assert (done.returncode, done.stderr) == (
        75,
        "pyqemu-ifctl: not done in time: the kernel does not answer; try again\n",
    )


def test_a_busy_host_tells_its_load(inside: Namespace, hooks: Hooks, tmp_path: Path) -> None:
    folder = tmp_path / "mute"
    folder.mkdir()
    inside.tap("web0")
    calls = Calls(hooks)
    with ExitStack() as stack:
        stack.callback(calls.close)
        stack.enter_context(high_load(folder))
        doctor = hanging(hooks, "doctor", part=f"{IN_TURN} nameless")
        status = hanging(hooks, "status", part=f"{IN_TURN} nameless")
        apart = hanging(hooks, "doctor", part=f"{APART} nameless")
        hooks.write_policy(json.dumps({
            "version": 1, "timeout": 1, "networks": {"lan": {"bridge": "br0"}},
            "rules": [{"tap": "*", "network": "lan"}],
        }))  # fmt: skip
        hook = calls.up("web0", be_nameless)
    for done, what in (
        (doctor, "what networks with NAT need"),
        (status, "the nft tables of networks"),
        (apart, "the nftables rules"),
    ):
        line = rf"^pyqemu-ifctl: not seen: {what}: not done after \d s: {BUSY}$"
        assert re.search(line, done.stderr, re.MULTILINE), done.stderr
    assert hook.status == 75
    assert re.fullmatch(
        rf"pyqemu-ifup: web0: not done after 1 s: {BUSY}; "
        r"try again, or raise timeout: in the policy\n",
        hook.stderr,
    ), hook.stderr


def be_nameless() -> None:
    """Have the hook wait for somebody of whom nothing is known."""
    setattr(pyqemu_ifup.main, "wanted_port", lambda *_: time.sleep(60))  # noqa: B010


def checks(told: dict[str, Any]) -> set[str]:
    """Return the names of the checks that have found something."""
    return {each["check"] for each in told["findings"]}
