"""Anybody's processes and QMP peers: what they say is bounded, and ends no verb for others."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lab.crowd import crowd
from lab.fuse import mute_folder
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import NOBODY, python
from lab.qemu import Qemu
from lab.race import fork, wait
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import POLICY_VARIABLE
from pyqemu_ifctl.answer import wrap
from pyqemu_ifctl.bounded import within
from pyqemu_ifctl.in_force import _guest
from pyqemu_ifctl.qemu.cards import ask_each
from pyqemu_ifctl.qemu.qmp import ask_nics
from pyqemu_ifctl.qemu.running import find_guests
from pyqemu_ifctl.taps import natural
from pyqemu_ifctl.verbs.info import info
from pyqemu_ifd.thin import may_change_links
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.guest import Patience, find_otherwise, tell_otherwise
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.vswitchd import find_states
from pyqemu_ifup.look import OvsSwitch
from pyqemu_ifup.mark import Mark, find_here
from pyqemu_ifup.qemu.caller import find_hook_at_work
from pyqemu_ifup.system.holders import all_holders
from pyqemu_ifup.system.process import process_start, read_status, real_uid

PR_SET_NAME = 15
WAIT = "import sys, time; print(flush=True); time.sleep(300)"
SECONDS = 25.0
"""That a verb may take beside hostile processes, on a machine that is busy."""
DEEP = '{"a":' * 20000
LINES: dict[str, list[str]] = {
    "JSON that is deep": ["-netdev", DEEP, "-device", DEEP],
    "JSON with a long number": ["-netdev", '{"type": "tap", "id": ' + "9" * 5000 + "}"],
    "JSON with half a character": [
        "-netdev",
        r'{"type": "tap", "id": "\ud800", "ifname": "\ud800", "script": "/\ud800"}',
    ],
    "JSON with a NUL": ["-netdev", r'{"type": "tap", "id": "a", "script": "/a\u0000b"}'],
    "a script that is a loop of links": ["-netdev", "tap,id=a,script={loop},downscript={loop}"],
    "a script of 300 letters": ["-netdev", f"tap,id=a,script=/{'x' * 300}"],
    "a script of 5000 letters": ["-netdev", f"tap,id=a,script={'/x' * 2500}"],
    "a port that is no number": [
        "-chardev",
        "socket,id=c,host=h,port=\N{SUPERSCRIPT TWO}",
        "-mon",
        "chardev=c,mode=control",
    ],
    "a port of 5000 digits": [
        "-qmp",
        f"tcp:h:{'9' * 5000}",
        "-chardev",
        f"socket,id=c,host=h,port={'9' * 5000}",
        "-mon",
        "chardev=c,mode=control",
    ],
    "a name of 100,000 letters": ["-name", "w" * 100_000],
    "many options": ["-netdev", f"tap{',ifname=' * 15000}"],
    "a name that is no UTF-8": ["-name", "\udcff\udcfe", "-netdev", "tap,id=\udcff,ifname=\udcff"],
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short folder that every user can read, for sockets."""
    found = Path(tempfile.mkdtemp(prefix="peer-", dir="/tmp"))
    found.chmod(0o755)
    os.symlink("loop", found / "loop")
    yield found
    shutil.rmtree(found)


@contextmanager
def neighbour(netns: Namespace, *words: str, name: str = "", open_files: int = 0) -> Iterator[int]:
    """Have a process of an ordinary user's that passes for a QEMU with these arguments."""
    code = WAIT
    if open_files:
        code = f"import os; [os.dup(0) for _ in range({open_files})]; {code}"
    if name:
        code = f"import ctypes; ctypes.CDLL(None).prctl(15, {name.encode()!r}); {code}"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with netns.enter():
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
        process = subprocess.Popen(
            ["qemu-system-x86_64", "-c", code, *map(os.fsencode, words)],
            executable=python(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"\n"
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path) -> Iterator[Hooks]:
    """Hooks in a namespace with br0, by a policy that has all taps on it."""
    netns.add_bridge("br0", mac="02:00:00:00:00:0b")
    found = Hooks(tmp_path / "hooks", netns.name)
    found.write_policy(
        '{version: 1, networks: {lan: {bridge: br0}}, rules: [{tap: "*", network: lan}]}'
    )
    yield found
    netns.ip("link", "del", "br0")


@contextmanager
def honest(netns: Namespace, hooks: Hooks, folder: Path) -> Iterator[Qemu]:
    """Have a guest web1 of root's, with a NIC on the tap web0, that answers QMP."""
    require("qemu")
    qemu = Qemu(
        "-S",
        "-name",
        "web1",
        "-qmp",
        f"unix:{folder}/web1,server=on,wait=off",
        "-netdev",
        f"tap,id=n0,ifname=web0,script={hooks.ifup},downscript={hooks.ifdown}",
        "-device",
        "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01",
        netns=netns.name,
        machine="q35",
        env=hooks.environ(),
    )
    with qemu:
        assert qemu.greeting
        yield qemu
        assert qemu.quit() == 0


def test_no_command_line_ends_a_verb(netns: Namespace, hooks: Hooks, folder: Path) -> None:
    """All of them at once, beside a guest of root's that each verb still shows and serves."""
    with honest(netns, hooks, folder) as qemu, ExitStack() as stack:
        pids = [
            stack.enter_context(
                neighbour(
                    netns,
                    *(
                        word.format(loop=folder / "loop") if "{loop}" in word else word
                        for word in words
                    ),
                )
            )
            for words in LINES.values()
        ]
        begun = time.monotonic()
        told = json.loads(hooks.ctl("info", "--json").stdout)
        guests = {guest["pid"]: guest for guest in told["guests"]}
        assert guests[qemu.pid]["nics"][0]["tap"] == "web0"
        assert guests.keys() >= set(pids)
        done = hooks.ctl("doctor", "--json")
        assert done.returncode in (0, 1), done.stderr
        checks = {each["check"] for each in json.loads(done.stdout)["findings"]}
        assert "qemu-sandbox" in checks, "web1 has none"
        assert time.monotonic() - begun < SECONDS
        hooks.write_policy(
            "{version: 1, networks: {lan: {bridge: br0}}, "
            'rules: [{tap: "*", network: lan, isolated: true}]}'
        )
        done = hooks.ctl("apply", "--json")
        results = {each["tap"]: each["result"] for each in json.loads(done.stdout)["taps"]}
        assert (done.returncode, results["web0"]) == (0, "changed"), done


def test_a_users_name_for_a_process_says_nothing(netns: Namespace) -> None:
    """Of what ends a line for us, the kernel escapes one character in a process's name."""
    with neighbour(netns, name="\rUid:\t0") as one, neighbour(netns, name="\x0cX") as two:
        assert real_uid(one) == NOBODY
        assert read_status(two, ("Name", "Uid")).keys() == {"Name", "Uid"}
        from pyqemu_ifctl.doctor.running import _is_confined

        assert _is_confined(two) is False


def test_a_hook_s_own_name_gives_it_no_privilege() -> None:
    """Its user chooses the name, and an agent that gives up would be passed by."""

    def unprivileged() -> None:
        os.setgroups([])
        os.setresuid(NOBODY, NOBODY, NOBODY)
        assert ctypes.CDLL(None).prctl(PR_SET_NAME, b"\rCapEff:\t3fffff") == 0
        assert not may_change_links()

    assert may_change_links()
    assert wait(fork(unprivileged)) == 0


def test_many_descriptors_hide_nobody_elses_tap(netns: Namespace, hooks: Hooks) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = min(200_000, most - 64)
    with neighbour(netns, open_files=many) as pid, netns.tap("web0"):
        begun = time.monotonic()
        with netns.enter():
            found = all_holders(others=-1.0)
        assert time.monotonic() - begun < 20
        assert pid in found.unread
        assert found.of("web0") == (os.getpid(),)
        done = hooks.ctl("info", "--json")
        assert json.loads(done.stdout)["version"] == 1, done


def test_who_is_not_reached_in_time_is_told(netns: Namespace) -> None:
    with neighbour(netns, "-name", "x") as pid, netns.enter():
        found = find_guests(others=-1.0)
    assert pid not in {guest.pid for guest in found.found}
    assert f"process {pid} was not reached in -1 s" in found.unread


def chain(folder: Path) -> Path:
    """Make a program that 38 links lead to, through 60,000 folders; return the first of them."""
    (folder / "d").mkdir()
    (folder / "link38").write_text("")
    (folder / "link38").chmod(0o755)
    for number in range(38):
        os.symlink("d/../" * 800 + f"link{number + 1}", folder / f"link{number}")
    return folder / "link0"


@pytest.mark.parametrize("kind", ["long", "mute"])
def test_no_script_s_path_ends_doctor(
    netns: Namespace, hooks: Hooks, folder: Path, kind: str
) -> None:
    """A path that is long takes its time, and one on a server that is mute has no end."""
    if kind == "long":
        first, users = chain(folder), [NOBODY] * 11
    else:
        (folder / "mute").mkdir()
        first, users = folder / "mute" / "x", [*range(70_000, 70_014)]
    words = [
        f"tap,id=a,script={folder}/{'./' * number}{first.relative_to(folder)}"
        for number in range(40)
    ]
    netdevs = [word for each in words for word in ("-netdev", each)]
    with ExitStack() as stack:
        if kind == "mute":
            stack.enter_context(mute_folder(folder / "mute"))
        hostile = stack.enter_context(crowd(netns, users, *netdevs))
        honest = stack.enter_context(crowd(netns, [71_000], "-netdev", "user,id=b"))
        own = stack.enter_context(crowd(netns, [0], "-netdev", "user,id=b"))
        told = json.loads(hooks.ctl("doctor", "--json").stdout)
    seen = {
        each["what"].partition(" runs")[0]
        for each in told["findings"]
        if each["check"] == "qemu-sandbox"
    }
    assert {f"QEMU {pid}" for pid in [*honest, *own]} <= seen, told
    late = {each.partition(":")[0] for each in told["unseen"] if "not seen in time" in each}
    assert {f"QEMU {pid}" for pid in hostile} <= (late if kind == "mute" else late | seen), told


def test_no_script_s_path_ends_apply(netns: Namespace, folder: Path) -> None:
    words = ["-netdev", f"tap,id=a,script={folder}/x"]
    with (
        mute_folder(folder),
        crowd(netns, [NOBODY], *words) as pids,
        Host(None, Deadline(30.0), print) as host,
    ):
        guest = within(20.0, lambda: _guest(host, "tap0", None, pids, find_here()))
    assert not guest.ours


def test_many_taps_of_one_user_end_no_verb(netns: Namespace) -> None:
    """Each of them may have a process whose command line takes long to read."""
    with crowd(netns, [NOBODY], *["-netdev", f"tap{',a' * 60_000}"] * 2) as (pid,):
        mark = Mark("lan", "linux", "br0", "", pid, process_start(pid) or 0, uid=NOBODY)
        patience, begun = Patience(), time.thread_time()
        found = [find_otherwise(f"tap{number}", mark, patience) for number in range(48)]
        assert time.thread_time() - begun < 4
        assert found[0] == () and found[-1] is None
        assert tell_otherwise(mark, None).startswith("there was no time to read what its process")


def test_many_nics_hide_no_twins_of_others(netns: Namespace, hooks: Hooks) -> None:
    """Once, the time grew with the square of the NICs, and more than that with those alike."""
    many = ["-nic", "tap,mac=52:54:00:00:00:01"] * 6000
    twin = ["-sandbox", "on", "-nic", "tap,mac=52:54:00:00:00:02"]
    with crowd(netns, [NOBODY, NOBODY + 1], *many) as hostile, crowd(netns, [0, 0], *twin) as own:
        told = json.loads(hooks.ctl("doctor", "--json").stdout)
    found = [each for each in told["findings"] if each["check"] == "qemu-mac"]
    assert [{int(pid) for pid in re.findall("QEMU ([0-9]+)", each["what"])} for each in found] in (
        [{*hostile}, {*own}],
        [{*own}, {*hostile}],
    )
    fresh = {each["do"].rpartition("mac=")[2] for each in found}
    assert len(fresh) == 2, "no MAC is told of twice"
    for pid in hostile:
        assert f"QEMU {pid} has more than 64 NICs: the others were not looked at" in told["unseen"]


def test_command_lines_of_no_qemu_take_no_time(netns: Namespace, folder: Path) -> None:
    """Once, all words of each process of the host were made before its first one was looked at."""
    switch = OvsSwitch(f"unix:{folder}/no.sock", None, False, ())
    with (
        crowd(netns, [NOBODY] * 120, *[""] * 125_000, name="idle") as idle,
        crowd(netns, [71_000], "-netdev", "user,id=b") as honest,
        netns.enter(),
    ):
        begun = time.thread_time()
        found = find_guests()
        assert find_states([switch]) == {switch.ovsdb: ("gone", 0)}
        assert find_hook_at_work("web0", idle[0]) is None
        assert time.thread_time() - begun < 2
        assert [guest.pid for guest in found.found] == honest
        assert found.unread == ()


# QMP peers.

GREETING: dict[str, Any] = {
    "QMP": {
        "version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""},
        "capabilities": [],
    }
}
Say = Callable[[str, dict[str, Any]], object]


class Peer:
    """What listens at a socket as a QEMU would, and answers each command as `say` has it.

    `say` returns what is to be returned, bytes to be sent as they are, or None for no answer.
    """

    def __init__(self, path: Path, say: Say, greeting: object = GREETING) -> None:
        self.say = say
        self.greeting = greeting
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        path.chmod(0o777)
        self.listener.listen(8)
        self.taken: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Hang up."""
        for each in [self.listener, *self.taken]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _serve(self) -> None:
        while True:
            try:
                taken, _ = self.listener.accept()
            except OSError:
                return
            self.taken.append(taken)
            threading.Thread(target=self._talk, args=(taken,), daemon=True).start()

    def _talk(self, taken: socket.socket) -> None:
        with suppress(OSError, ValueError):
            self._send(taken, self.greeting)
            # NOTE: nothing but its own end tells where a command ends; there is one at a time.
            while data := taken.recv(65536):
                command = json.loads(data)
                answer = self.say(command["execute"], command.get("arguments", {}))
                if isinstance(answer, bytes):
                    taken.sendall(answer)
                elif answer is not None:
                    self._send(taken, {"return": answer, "id": command.get("id")})

    @staticmethod
    def _send(taken: socket.socket, what: object) -> None:
        data = what if isinstance(what, bytes) else json.dumps(what).encode() + b"\r\n"
        taken.sendall(data)


def answering(**answers: object) -> Say:
    """Return what answers these commands so, and the others as a QEMU without NICs."""
    usual: dict[str, object] = {
        "qmp_capabilities": {},
        "human-monitor-command": "",
        "qom-list": [],
        "qom-get": "",
    }

    def say(command: str, arguments: dict[str, Any]) -> object:
        given = answers.get(command.replace("-", "_"), usual.get(command, {}))
        return given(arguments) if callable(given) else given

    return say


def nic(**values: object) -> Say:
    """Return what has one NIC with such properties."""
    given: dict[str, object] = {"type": "e1000", "netdev": "n0", "mac": "52:54:00:00:00:02"}
    given |= values

    def list_of(arguments: dict[str, Any]) -> object:
        if arguments["path"] == "/machine/peripheral":
            return [{"name": "a", "type": "child<e1000>"}]
        if arguments["path"].startswith("/machine/peripheral/"):
            return [{"name": name, "type": "str"} for name in given]
        return []

    return answering(qom_list=list_of, qom_get=lambda arguments: given[arguments["property"]])


LONG = b"9" * 5000
PEERS: dict[str, tuple[Say, object]] = {
    "deep JSON": (answering(qom_list=DEEP.encode() + b"\n"), GREETING),
    "a deep greeting": (answering(), DEEP.encode() + b"\n"),
    "a long number": (answering(qom_list=b'{"return": ' + LONG + b"}\n"), GREETING),
    "a long number in a greeting": (answering(), b'{"QMP": ' + LONG + b"}\n"),
    "bad UTF-8": (answering(qom_list=b'{"return": "\xff\xfe"}\n'), GREETING),
    "bad UTF-8 in a greeting": (answering(), b'{"QMP": "\xff"}\n'),
    "a greeting without keys": (answering(), {"QMP": {}}),
    "a greeting of another type": (answering(), [1, 2]),
    "an endless line": (answering(), b"x" * 20_000_000),
    "no text of info network": (answering(human_monitor_command=7), GREETING),
    "too much of info network": (answering(human_monitor_command="x\n" * 200_000), GREETING),
    "a number for a list": (answering(qom_list=3), GREETING),
    "a list of numbers": (answering(qom_list=[1, 2]), GREETING),
    "a list without keys": (answering(qom_list=[{}]), GREETING),
    "a list of ten thousand": (
        answering(qom_list=[{"name": f"a{n}", "type": "child<e>"} for n in range(10_000)]),
        GREETING,
    ),
    "a MAC of another type": (nic(mac=[1]), GREETING),
    "a long netdev": (nic(netdev="n" * 300), GREETING),
    "a large address": (nic(addr=1 << 4000), GREETING),
    "an address of another type": (nic(addr={"a": 1}), GREETING),
    "an MTU of another type": (nic(host_mtu=[1]), GREETING),
    "queues of another type": (nic(mq="yes"), GREETING),
    "mute": (lambda command, arguments: None, GREETING),
    "mute from the start": (answering(), b""),
}


@pytest.mark.parametrize("kind", PEERS)
def test_a_peer_gets_a_clear_failure(folder: Path, kind: str) -> None:
    say, greeting = PEERS[kind]
    peer = Peer(folder / "peer", say, greeting)
    begun = time.monotonic()
    try:
        with pytest.raises(Failure) as raised:
            ask_nics(str(folder / "peer"), 2.0)
    finally:
        peer.close()
    assert time.monotonic() - begun < 10
    assert str(folder / "peer") in raised.value.what
    assert len(str(raised.value)) < 1000
    assert ("does not answer" in raised.value.what) == kind.startswith("mute"), raised.value


def test_many_names_for_one_tap_take_no_time(folder: Path) -> None:
    """Once, the time grew with the square of what was said: hours for this."""
    said = "\n".join(
        [
            "a: index=0,type=nic,model=e1000,macaddr=52:54:00:00:00:02",
            " \\ n0: index=0,type=tap," + "ifname=," * 20_000,
        ]
    )
    say = nic()

    def all_of(command: str, arguments: dict[str, Any]) -> object:
        return said if command == "human-monitor-command" else say(command, arguments)

    peer = Peer(folder / "peer", all_of)
    begun = time.monotonic()
    try:
        ((found,), _) = ask_nics(str(folder / "peer"), 5.0)
    finally:
        peer.close()
    assert [each.ifname for each in found.backends] == [None]
    assert time.monotonic() - begun < 4


def test_no_peer_ends_info_for_others(netns: Namespace, hooks: Hooks, folder: Path) -> None:
    kinds = [
        "deep JSON",
        "a long number",
        "a list of numbers",
        "a large address",
        "mute",
        "mute",
        "mute from the start",
        "mute from the start",
    ]
    with honest(netns, hooks, folder) as qemu, ExitStack() as stack:
        hostile: dict[int, str] = {}
        for number, kind in enumerate(kinds):
            peer = Peer(folder / str(number), *PEERS[kind])
            stack.callback(peer.close)
            words = ["-name", kind, "-qmp", f"unix:{folder}/{number},server=on"]
            hostile[stack.enter_context(neighbour(netns, *words))] = kind
        begun = time.monotonic()
        done = hooks.ctl("info", "--json")
        assert time.monotonic() - begun < SECONDS
        guests = {guest["pid"]: guest for guest in json.loads(done.stdout)["guests"]}
        assert [each["tap"] for each in guests[qemu.pid]["nics"]] == ["web0"]
        assert guests[qemu.pid]["missing"] is None
        assert all(guests[pid]["missing"] for pid in hostile)
        assert done.returncode == 71, "who says nonsense is told, and the status says so"


def test_the_guest_of_each_user_is_asked(netns: Namespace, folder: Path) -> None:
    words = ["-qmp", f"unix:{folder}/none"]
    with (
        crowd(netns, range(70_000, 70_066), *words) as many,
        netns.enter(),
        crowd(netns, [71_000], *words) as honest,
    ):
        guests = find_guests().found
        told = ask_each(guests, None, Deadline(30.0))
        assert {guest.pid for guest in guests} == {*many, *honest}
        assert all("No such file or directory" in each.missing for each in told), told


def test_who_is_mute_leaves_time_to_tell_it(
    netns: Namespace, hooks: Hooks, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(folder / "peer", *PEERS["mute"])
    try:
        with crowd(netns, [NOBODY], *["-qmp", f"unix:{folder}/peer"] * 5) as pids, netns.enter():
            deadline = Deadline(3.0)
            (told,) = ask_each(find_guests().found, None, deadline)
            assert deadline.remaining() > 0.5
            assert told.status is Status.TRY_AGAIN
            monkeypatch.setattr("pyqemu_ifctl.qemu.cards.SPARE", 60.0)
            environ = {POLICY_VARIABLE: str(hooks.policy)}
            answer = info(None, None, environ, Deadline(60.0), print, as_json=True)
    finally:
        peer.close()
    (guest,) = json.loads(answer.out)["guests"]
    assert (guest["pid"], guest["missing"]) == (pids[0], "there was no time to ask it")
    assert answer.status is Status.TRY_AGAIN


def test_what_does_not_end_is_left_behind() -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        within(0.1, threading.Event().wait)
    assert time.monotonic() - begun < 5
    assert within(5.0, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)


# Rows of OVSDB.


def ids(**more: str) -> Sequence[str]:
    return [f"external_ids:{key.replace('_', '-')}={value}" for key, value in more.items()]


def test_rows_that_are_hard_to_read(netns: Namespace, hooks: Hooks, ovs: OpenVSwitch) -> None:
    ovs.add_bridge("br-int")
    hooks.write_policy(
        json.dumps(
            {
                "version": 1,
                "networks": {"sw": {"bridge": "br-int", "ovsdb": ovs.db}},
                "rules": [{"tap": "*", "network": "sw"}],
            }
        )
    )
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    place = netns.path.stat()
    mine = {"pyqemu_boot_id": boot, "pyqemu_netns": f"{place.st_dev}:{place.st_ino}"}
    digits = "9" * 6000
    for name, more in {
        "long0": {"pyqemu_ifup": "1", "pyqemu_ifindex": digits, "vm_pid": digits, **mine},
        "arab0": {"pyqemu_ifup": "1", "pyqemu_ifindex": "\N{ARABIC-INDIC DIGIT ONE}", **mine},
        "later0": {"pyqemu_ifup": "2", "pyqemu_ifindex": "7", **mine},
    }.items():
        ovs.vsctl(
            "--no-wait", "add-port", "br-int", name, "--", "set", "Interface", name, *ids(**more)
        )
    for verb in (["status"], ["doctor"], ["gc", "--dry-run"], ["apply"], ["info"]):
        done = hooks.ctl(*verb, "--json")
        assert done.returncode in (0, 1), (verb, done)
        assert digits not in done.stdout + done.stderr
    removed = {each["tap"] for each in hooks.ctl_json("gc")["removed"]}
    assert removed == {"long0", "arab0"}, "one of another version is not ours"
    ovs.vsctl("--no-wait", "del-br", "br-int")


def test_names_of_any_length_are_sorted_and_wrapped() -> None:
    assert sorted(["w10", "w9", "w" + "9" * 6000, "w09"], key=natural)[:3] == ["w09", "w9", "w10"]
    begun = time.monotonic()
    assert len(wrap("x" * 200_000)) > 2000
    assert time.monotonic() - begun < 10
