"""Who is asking, told by a real QEMU's script; and what QEMU really does with its scripts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.checkout import ROOT
from lab.needs import QEMU, require
from lab.netns import Namespace
from lab.qemu import Qemu, QmpError, end_daemon
from lab.spellings import HOOK, MAC, SPELLINGS, Spelling
from pyqemu_ifup.qemu.command_line import FLAGS

# The script: asks who is asking, and writes down that and what it was given.
RECORDER = """#!{python} -I
import os, sys
sys.path[:0] = {sources}
from pyqemu_ifup.qemu.caller import find_caller
from pyqemu_ifup.system.process import process_start
caller = find_caller(sys.argv[1], os.getppid(), want_user=True)
import dataclasses, fcntl, json
said = dataclasses.asdict(caller)
del said["unclear"]
taps = []
for fd in map(int, os.listdir("/proc/self/fd")):
    try:
        if os.readlink(f"/proc/self/fd/{{fd}}") == "/dev/net/tun":
            TUNGETIFF = 0x800454D2
            taps.append(fcntl.ioctl(fd, TUNGETIFF, bytes(40)).split(b"\\0")[0].hex())
    except FileNotFoundError:
        continue  # of the listing itself
status = open("/proc/self/status").read().splitlines()
record = dict(
    script="{script}",
    arguments=[os.fsencode(argument).hex() for argument in sys.argv[1:]],
    caller=said,
    start=process_start(os.getppid()),
    parent=os.getppid(),
    uid=os.getuid(),
    taps=taps,
    stdio=[os.readlink(f"/proc/self/fd/{{fd}}") for fd in range(3)],
    blocked=int(next(line for line in status if line.startswith("SigBlk:")).split()[1], 16),
    umask=os.umask(0),
    cwd=os.getcwd(),
    environment=dict(os.environ),
)
with open({log!r}, "a") as file:
    file.write(json.dumps(record) + "\\n")
sys.stdout.write(os.environ.get("RECORDER_SAYS", ""))
sys.exit(int(os.environ.get("RECORDER_STATUS_{script}", "0")))
"""


@dataclass(frozen=True)
class Recorder:
    """Two scripts that write down how they are called: `up` and `down`."""

    up: Path
    down: Path
    log: Path

    @property
    def calls(self) -> list[dict[str, Any]]:
        """All calls up to now, in their order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def scripts(self) -> list[str]:
        """The calls' scripts and taps, in their order: "up web0"."""
        return [
            f"{call['script']} {bytes.fromhex(call['arguments'][0]).decode(errors='replace')}"
            for call in self.calls
        ]

    def netdev(self, id: str, ifname: str = "", more: str = "") -> tuple[str, str]:
        """Return a -netdev with both scripts."""
        name = f",ifname={ifname}" if ifname else ""
        return "-netdev", f"tap,id={id},script={self.up},downscript={self.down}{name}{more}"


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    """The two scripts, in a folder of their own."""
    require("qemu")
    log = tmp_path / "calls"
    for script in ("up", "down"):
        path = tmp_path / script
        path.write_text(
            RECORDER.format(
                python=sys.executable,
                sources=[str(ROOT / "conf"), str(ROOT / "ifup")],
                script=script,
                log=str(log),
            )
        )
        path.chmod(0o755)
    return Recorder(tmp_path / "up", tmp_path / "down", log)


def caller(tap: str, vm: str | None, netdev: str | None, mac: str | None) -> dict[str, object]:
    """Return what the recorder writes of a caller that is this user."""
    user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    return {
        "tap": tap,
        "vm": vm,
        "netdev": netdev,
        "mac": mac,
        "user": user,
        "unprivileged": False,
        "root_made": False,
        "joined": [],
    }


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.title)
def test_spelling(spelling: Spelling, recorder: Recorder, netns: Namespace) -> None:
    argv = [word.replace(HOOK, str(recorder.up)) for word in spelling.argv]
    # No option ROM is needed, and none may be installed.
    argv += ["-S", "-global", "virtio-net-pci.romfile="]
    with Qemu(*argv, netns=netns.name, machine="q35") as qemu:
        network = ""
        if spelling.starts:
            network = qemu.hmp("info network")
            assert qemu.quit() == 0, qemu.stderr
        else:
            assert qemu.wait() == 1
    calls = {bytes.fromhex(call["arguments"][0]).decode(): call for call in recorder.calls}
    assert len(recorder.calls) == len(calls) == spelling.taps
    expected = caller(spelling.tap, spelling.vm, spelling.netdev, spelling.mac)
    assert calls[spelling.tap]["caller"] == expected
    # QEMU's own word for it.
    lines = network.splitlines()
    at = next((i for i, line in enumerate(lines) if f"ifname={spelling.tap}," in line), None)
    assert (at is not None) is spelling.starts, network
    if at is not None and spelling.netdev is not None:
        assert f" {spelling.netdev}: index=0,type=tap" in f" {lines[at]}"
    if at is not None and spelling.mac is not None:
        # On a hub, all are listed below it; else the tap is listed below its device.
        device = network if "hub 0" in lines else lines[at - 1]
        assert f"macaddr={spelling.mac}" in device


def test_hot_plugged_netdev_is_unknown(recorder: Recorder, netns: Namespace) -> None:
    scripts = {"script": str(recorder.up), "downscript": str(recorder.down)}
    first = recorder.netdev("n0")
    with Qemu(*first, "-name", "web", netns=netns.name) as qemu:
        plug = {"type": "tap", "id": "n1", "ifname": "web7", **scripts}
        qemu.execute("netdev_add", plug)
        assert "web7" in netns.links()
        qemu.execute("netdev_del", {"id": "n1"})
        assert "web7" not in netns.links()
        assert qemu.quit() == 0
    assert recorder.scripts == ["up tap0", "up web7", "down web7", "down tap0"]
    known, unknown = caller("tap0", "web", "n0", None), caller("web7", "web", None, None)
    assert [call["caller"] for call in recorder.calls] == [known, unknown, unknown, known]


def test_queues_call_once(recorder: Recorder, netns: Namespace) -> None:
    argv = recorder.netdev("n0", "web0", ",queues=4")
    with Qemu(*argv, netns=netns.name) as qemu:
        assert qemu.hmp("info network").count("ifname=web0") == 4
        assert netns.link("web0")["linkinfo"]["info_data"]["multi_queue"] is True
        assert qemu.quit() == 0
    assert recorder.scripts == ["up web0", "down web0"]
    assert recorder.calls[0]["caller"] == caller("web0", None, "n0", None)


def test_script_inherits_the_tap(recorder: Recorder, netns: Namespace) -> None:
    with Qemu(*recorder.netdev("n0", "web0"), netns=netns.name) as qemu:
        assert qemu.quit() == 0
        pid = qemu.pid
    up, down = recorder.calls
    assert up["taps"] == down["taps"] == [b"web0".hex()]
    assert up["arguments"] == down["arguments"] == [b"web0".hex()]
    assert up["parent"] == down["parent"] == pid
    assert up["start"] == down["start"] is not None


def test_script_inherits_blocked_signals(recorder: Recorder, netns: Namespace) -> None:
    with Qemu(*recorder.netdev("n0", "web0"), netns=netns.name) as qemu:
        assert qemu.quit() == 0
    blocked = (signal.SIGBUS, signal.SIGUSR1, signal.SIGALRM, signal.SIGIO)
    assert {call["blocked"] for call in recorder.calls} == {
        sum(1 << (number - 1) for number in blocked)
    }


def test_script_inherits_sigpipe_ignored(tmp_path: Path, netns: Namespace) -> None:
    require("qemu")
    script = tmp_path / "up"
    # NOTE: not in Python, which ignores SIGPIPE itself.
    script.write_text("#!/bin/sh\nexec cat /proc/self/status\n")
    script.chmod(0o755)
    argv = ("-netdev", f"tap,id=n0,ifname=web0,script={script},downscript=no")
    with Qemu(*argv, netns=netns.name) as qemu:
        assert qemu.quit() == 0
        (line,) = [line for line in qemu.stdout.splitlines() if line.startswith(b"SigIgn:")]
    assert int(line.split()[1], 16) & 1 << (signal.SIGPIPE - 1)


def test_script_stdout_is_qmp(recorder: Recorder, netns: Namespace) -> None:
    argv = recorder.netdev("n0", "web0")
    with Qemu(*argv, netns=netns.name, env={"RECORDER_SAYS": "not JSON\n"}) as qemu:
        assert qemu.quit() == 0
        assert qemu.stdout.startswith(b'not JSON\n{"QMP": ')
        assert qemu.stdout.count(b"not JSON\n") == 2
    assert recorder.scripts == ["up web0", "down web0"]


def test_script_inherits_environment_folder_and_umask(
    recorder: Recorder, netns: Namespace, tmp_path: Path
) -> None:
    argv = recorder.netdev("n0", "web0")
    with Qemu(*argv, netns=netns.name, cwd=tmp_path, env={"FOO": "bar"}) as qemu:
        assert qemu.quit() == 0
    umask = os.umask(0)
    os.umask(umask)
    for call in recorder.calls:
        assert call["environment"]["FOO"] == "bar"
        assert (call["cwd"], call["umask"]) == (str(tmp_path), umask)


def test_daemonized_scripts(recorder: Recorder, netns: Namespace, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    argv = (*recorder.netdev("n0", "web0"), "-daemonize", "-pidfile", str(pidfile), "-name", "web")
    with Qemu(*argv, netns=netns.name, qmp="socket") as qemu:
        assert qemu.wait() == 0
        pid = int(pidfile.read_text())
        assert qemu.greeting and "ifname=web0" in qemu.hmp("info network")
        end_daemon(pid, signal.SIGTERM)
    up, down = recorder.calls
    assert (up["script"], down["script"]) == ("up", "down")
    assert up["caller"] == down["caller"] == caller("web0", "web", "n0", None)
    assert up["parent"] == down["parent"] == pid
    assert down["stdio"] == ["/dev/null"] * 3
    assert (down["cwd"], down["umask"]) == ("/", 0o027)
    assert "web0" not in netns.links()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach and write to, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp(prefix="pyqemu-ifup-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_down_script_runs_as_the_user_of_runas(open_folder: Path, netns: Namespace) -> None:
    require("qemu")
    log = open_folder / "log"
    log.touch()
    log.chmod(0o666)
    for name in ("up", "down"):
        script = open_folder / name
        script.write_text(f'#!/bin/sh\necho "{name} $1 $(id -un)" >>{log}\n')
        script.chmod(0o755)
    scripts = f"script={open_folder}/up,downscript={open_folder}/down"
    argv = ("-netdev", f"tap,id=n0,ifname=web0,{scripts}", "-runas", "nobody")
    with Qemu(*argv, netns=netns.name) as qemu:
        assert qemu.quit() == 0
    assert log.read_text().splitlines() == ["up web0 root", "down web0 nobody"]


ENDS = (
    ("quit", None),
    ("SIGTERM", signal.SIGTERM),
    ("SIGINT", signal.SIGINT),
    ("SIGHUP", signal.SIGHUP),
)


@pytest.mark.parametrize("number", [row[1] for row in ENDS], ids=[row[0] for row in ENDS])
def test_down_script_runs(
    number: signal.Signals | None, recorder: Recorder, netns: Namespace
) -> None:
    with Qemu(*recorder.netdev("n0", "web0"), netns=netns.name) as qemu:
        assert qemu.greeting
        assert (qemu.quit() if number is None else qemu.signal(number)) == 0
    assert recorder.scripts == ["up web0", "down web0"]
    assert recorder.calls[1]["taps"] == [b"web0".hex()], "the tap is there while down runs"
    assert "web0" not in netns.links()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_down_script_does_not_run(
    number: signal.Signals, recorder: Recorder, netns: Namespace
) -> None:
    with Qemu(*recorder.netdev("n0", "web0"), netns=netns.name) as qemu:
        assert qemu.greeting
        assert qemu.signal(number) == -number
    assert recorder.scripts == ["up web0"]
    assert "web0" not in netns.links()


def test_failed_up_script_has_no_down(recorder: Recorder, netns: Namespace) -> None:
    argv = recorder.netdev("n0", "web0")
    with Qemu(*argv, netns=netns.name, env={"RECORDER_STATUS_up": "3"}) as qemu:
        assert qemu.wait() == 1
        assert f"network script {recorder.up} failed with status 768\n" in qemu.stderr
    assert recorder.scripts == ["up web0"]


def test_failed_hot_plug_keeps_qemu(recorder: Recorder, netns: Namespace) -> None:
    with Qemu(netns=netns.name, env={"RECORDER_STATUS_up": "65"}) as qemu:
        plug = {"type": "tap", "id": "n0", "ifname": "web0", "script": str(recorder.up)}
        with pytest.raises(QmpError, match=r"failed with status 16640$"):
            qemu.execute("netdev_add", {**plug, "downscript": str(recorder.down)})
        assert "web0" not in netns.links()
        assert qemu.quit() == 0
    assert recorder.scripts == ["up web0"]


def test_failed_down_script_changes_nothing(recorder: Recorder, netns: Namespace) -> None:
    argv = recorder.netdev("n0", "web0")
    with Qemu(*argv, netns=netns.name, env={"RECORDER_STATUS_down": "3"}) as qemu:
        assert qemu.quit() == 0
        assert f"network script {recorder.down} failed with status 768\n" in qemu.stderr


def test_later_fault_runs_the_down_script(recorder: Recorder, netns: Namespace) -> None:
    argv = (*recorder.netdev("n0", "web0"), "-device", f"nosuch,netdev=n0,mac={MAC}")
    with Qemu(*argv, netns=netns.name) as qemu:
        assert qemu.wait() == 1
    assert recorder.scripts == ["up web0", "down web0"]
    assert recorder.calls[0]["caller"] == caller("web0", None, "n0", MAC)


def test_second_netdev_fails(recorder: Recorder, netns: Namespace) -> None:
    second = ("-netdev", "tap,id=n1,ifname=web1,script=/bin/false,downscript=/bin/false")
    with Qemu(*recorder.netdev("n0", "web0"), *second, netns=netns.name) as qemu:
        assert qemu.wait() == 1
        assert "network script /bin/false failed with status 256\n" in qemu.stderr
    assert recorder.scripts == ["up web0", "down web0"]


# What is asked for, and what the script gets. QEMU neither escapes nor refuses.
ODD_NAMES = (
    ("abcdefghijklmno", b"abcdefghijklmno"),
    ("abcdefghijklmnop", b"abcdefghijklmno"),
    ("-rf", b"-rf"),
    ("--help", b"--help"),
    ("a;id>x", b"a;id>x"),
    ("$(id)`id`", b"$(id)`id`"),
    ("'\"\\", b"'\"\\"),
    (os.fsdecode(b"\xff\xfe"), b"\xff\xfe"),
    ("\u20ac" * 6, ("\u20ac" * 5).encode()),
    ("q%d", b"q0"),
    ("...", b"..."),
)


@pytest.mark.parametrize(("asked", "given"), ODD_NAMES, ids=[ascii(row[0]) for row in ODD_NAMES])
def test_odd_name(asked: str, given: bytes, recorder: Recorder, netns: Namespace) -> None:
    with Qemu(*recorder.netdev("n0", asked), netns=netns.name) as qemu:
        assert qemu.quit() == 0, qemu.stderr
    assert [call["arguments"] for call in recorder.calls] == [[given.hex()]] * 2
    assert [call["taps"] for call in recorder.calls] == [[given.hex()]] * 2
    assert {call["caller"]["netdev"] for call in recorder.calls} == {"n0"}


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a b", "a:b", "a\tb", "%d%d", "all", "default"])
def test_name_that_the_kernel_refuses(name: str, recorder: Recorder, netns: Namespace) -> None:
    with Qemu(*recorder.netdev("n0", name), netns=netns.name) as qemu:
        assert qemu.wait() == 1
        assert f"could not configure /dev/net/tun ({name}): Invalid argument" in qemu.stderr
    assert recorder.calls == []


def test_flags_are_those_of_qemu() -> None:
    require("qemu")
    done = subprocess.run([QEMU, "-h"], check=True, capture_output=True, text=True)
    told: set[str] = set()
    for line in done.stdout.splitlines():
        # "-h or -help  display ...", "-fda/-fdb file  use ...", "--preconfig  pause ..."
        words = line.split("  ")[0].replace("/", " ").split()
        if line.startswith("-"):
            told |= {word.lstrip("-") for word in words if word.startswith("-")}
    assert {"h", "help", "fdb", "netdev", "preconfig", "name", "S", "daemonize"} <= told
    flags: set[str] = set()
    others: set[str] = set()
    for option in told | FLAGS:
        # QEMU reads all its options once before it acts on any: the first that is not one ends it.
        argv = [QEMU, f"-{option}", "-swallowed-or-not", "-end"]
        fault = subprocess.run(argv, capture_output=True, text=True).stderr
        if f"-{option}: invalid option" not in fault:
            assert "invalid option" in fault
            (flags if "-swallowed-or-not: " in fault else others).add(option)
    assert others and flags <= FLAGS
    assert not others & FLAGS
