"""pyqemu-ifctl gc after crashes, on a private Open vSwitch: what goes, what stays, what is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from pyqemu_ifup.mark import Here


@pytest.fixture
def hooks(netns: Namespace, ovs: OpenVSwitch, tmp_path: Path) -> Iterator[Hooks]:
    """Programs with a policy for br-int, which is there."""
    ovs.add_bridge("br-int", mtu=1500)
    made = Hooks(tmp_path / "hooks", netns=netns.name)
    made.write_policy(
        "version: 1\n"
        f"networks: {{sw: {{bridge: br-int, ovsdb: '{ovs.db}', vlan: 100}}}}\n"
        'rules: [{tap: "*", network: sw}]\n'
    )
    yield made
    ovs.vsctl("del-br", "br-int")


def crash(netns: Namespace, hooks: Hooks, *names: str) -> dict[str, int]:
    """Attach taps whose holder then dies without a down; return their ifindexes."""
    indexes = {}
    taps = []
    for name in names:
        taps.append(netns.tap(name))
        done = hooks.up(name)
        assert done.returncode == 0, done.stderr
        indexes[name] = int(netns.link(name)["ifindex"])
    for tap in taps:
        tap.close()
    return indexes


def add_row(ovs: OpenVSwitch, name: str, here: Here, **ids: str) -> None:
    """Add a port as an up in `here` would have left it, without a device."""
    pairs = {
        "pyqemu-ifup": "1",
        "pyqemu-network": "sw",
        "pyqemu-ifindex": "99",
        "pyqemu-boot-id": here.boot_id,
        "pyqemu-netns": here.netns,
        **{key.replace("_", "-"): value for key, value in ids.items()},
    }
    # NOTE: without a device of the name, newer ones end with 65, the row committed.
    ovs.vsctl(
        "add-port",
        "br-int",
        name,
        "--",
        "set",
        "Interface",
        name,
        *(f'external_ids:{key}="{value}"' for key, value in pairs.items()),
        check=False,
    )


@pytest.fixture
def here(netns: Namespace) -> Here:
    """Where the programs run."""
    stat = netns.path.stat()
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return Here(file.read().strip(), f"{stat.st_dev}:{stat.st_ino}")


def test_after_a_crash(netns: Namespace, ovs: OpenVSwitch, hooks: Hooks) -> None:
    index = crash(netns, hooks, "web0")["web0"]
    because = f"its tap is gone: no link web0 with ifindex {index}"
    dry = hooks.ctl("gc", "--dry-run")
    expected = f"would remove web0 from br-int: {because}\n"
    assert (dry.returncode, dry.stdout, dry.stderr) == (0, expected, "")
    assert hooks.ctl_json("gc", "--dry-run") == {
        "version": 1,
        "removed": [{"tap": "web0", "bridge": "br-int", "because": because}],
        "kept": [],
        "networks": [],
        "tables": [],
    }
    assert ovs.find("Port", "web0") is not None
    done = hooks.ctl("gc")
    expected = f"removed web0 from br-int: {because}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
    assert ovs.find("Port", "web0") is None and ovs.find("Interface", "web0") is None
    again = hooks.ctl("gc")
    assert (again.returncode, again.stdout, again.stderr) == (0, "nothing to remove\n", "")
    nothing = {"version": 1, "removed": [], "kept": [], "networks": [], "tables": []}
    assert hooks.ctl_json("gc") == nothing


def test_only_what_is_ours_and_gone(
    netns: Namespace, ovs: OpenVSwitch, hooks: Hooks, here: Here
) -> None:
    index = crash(netns, hooks, "dead")["dead"]
    live = netns.tap("live")
    assert hooks.up("live").returncode == 0
    foreign = netns.tap("foreign")
    ovs.add_port("br-int", "foreign")
    add_row(ovs, "boot", Here("an-earlier-boot", "1:1"))
    add_row(ovs, "away", Here(here.boot_id, "1:1"))
    new = netns.tap("again")
    add_row(ovs, "again", here, pyqemu_ifindex="99")
    try:
        answer = hooks.ctl_json("gc")
        left = {row["name"] for row in ovs.rows("Port")["Port"]}
        text = hooks.ctl("gc").stdout
    finally:
        for name in ("foreign", "away"):
            ovs.del_port(name)
        assert hooks.down("live").returncode == 0
        for tap in (live, foreign, new):
            tap.close()
    gone = "its tap is gone: no link {} with ifindex {}"
    answer["removed"].sort(key=lambda row: row["tap"])
    answer["kept"].sort(key=lambda row: row["tap"])
    assert answer == {
        "version": 1,
        "removed": [
            {"tap": "again", "bridge": "br-int", "because": gone.format("again", 99)},
            {
                "tap": "boot",
                "bridge": "br-int",
                "because": "its tap is gone: it is of an earlier boot",
            },
            {"tap": "dead", "bridge": "br-int", "because": gone.format("dead", index)},
        ],
        "kept": [
            {"tap": "away", "bridge": "br-int", "because": "it is of another network namespace"},
            {"tap": "live", "bridge": "br-int", "because": "its tap is there"},
        ],
        "networks": [],
        "tables": [],
    }
    assert left == {"br-int", "foreign", "away", "live"}
    assert sorted(text.splitlines()) == [
        "kept away on br-int: it is of another network namespace",
        "kept live on br-int: its tap is there",
        "nothing to remove",
    ]


def test_one_tap_only(netns: Namespace, ovs: OpenVSwitch, hooks: Hooks) -> None:
    crash(netns, hooks, "web0", "web1")
    done = hooks.ctl("gc", "web1")
    assert done.stdout.startswith("removed web1 from br-int: ") and done.stdout.count("\n") == 1
    assert ovs.find("Port", "web0") is not None
    assert hooks.ctl("gc").stdout.startswith("removed web0 from br-int: ")


def test_another_namespace_removes_nothing(
    netns: Namespace, ovs: OpenVSwitch, hooks: Hooks
) -> None:
    crash(netns, hooks, "web0")
    with Namespace() as other:
        hooks.netns = other.name
        try:
            answer = hooks.ctl_json("gc")
        finally:
            hooks.netns = netns.name
    assert answer["removed"] == []
    assert [row["tap"] for row in answer["kept"]] == ["web0"]
    assert hooks.ctl("gc").returncode == 0
    assert ovs.find("Port", "web0") is None


def test_a_mute_vswitchd_is_told_and_does_not_hang(
    netns: Namespace, ovs: OpenVSwitch, hooks: Hooks
) -> None:
    crash(netns, hooks, *(f"web{number}" for number in range(3)))
    ovs.vswitchd.stop()
    try:
        start = time.monotonic()
        done = hooks.ctl("gc")
        took = time.monotonic() - start
        left = [row["name"] for row in ovs.rows("Port")["Port"]]
    finally:
        ovs.vswitchd.cont()
    assert done.returncode == 75
    assert done.stdout.count("removed web") == 3 and left == ["br-int"]
    assert done.stderr.splitlines()[0] == (
        f"pyqemu-ifctl: {done.stdout.split()[1]} is out of the database at {ovs.db}: but "
        "ovs-vswitchd does not answer; it lets the port go when it runs again"
    )
    assert took < 15


def test_a_broken_policy_is_told(netns: Namespace, ovs: OpenVSwitch, hooks: Hooks) -> None:
    hooks.policy.unlink()
    done = hooks.ctl("gc")
    assert (done.returncode, done.stdout) == (0, "nothing to remove\n")
    assert done.stderr == (
        f"pyqemu-ifctl: only the default database is looked at: {hooks.policy}: it does not exist\n"
    )


def test_a_signal_stops_it(netns: Namespace, ovs: OpenVSwitch, hooks: Hooks) -> None:
    """The server is mute, so that it waits; its end is told, not a traceback."""
    ovs.server.stop()
    try:
        with subprocess.Popen(
            hooks.argv("pyqemu-ifctl", "gc"),
            env={**hooks.environ(), "PYQEMU_IFUP_DEBUG": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            told = process.stderr.readline()
            os.kill(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=30)
    finally:
        ovs.server.cont()
    assert told == f"pyqemu-ifctl: all taps: ovs-vsctl --db={ovs.db} show\n"
    assert process.returncode == 75
    assert (out, err) == ("", "pyqemu-ifctl: stopped: received SIGINT; what was done stays done\n")


def test_its_parent_may_end(netns: Namespace, ovs: OpenVSwitch, hooks: Hooks) -> None:
    """As in `pyqemu-ifctl gc &` at the end of a script."""
    crash(netns, hooks, "web0")
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:])"
    ovs.server.stop()
    try:
        shell = subprocess.Popen(
            [sys.executable, "-I", "-W", "ignore", "-c", code, *hooks.argv("pyqemu-ifctl", "gc")],
            env=hooks.environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        shell.wait(30)
    finally:
        ovs.server.cont()
    # Both ends of the pipes are held by pyqemu-ifctl alone now.
    out, err = shell.communicate(timeout=30)
    assert out.startswith("removed web0 from br-int: ") and err == ""
