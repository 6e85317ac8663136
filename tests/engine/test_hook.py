"""How the hooks behave as QEMU's children: what they are given, what they say, how they end."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import pytest
from pyroute2 import NetlinkError

import pyqemu_ifup.main
import pyqemu_ifup.qemu.caller
from lab.calls import QEMU_BLOCKS, Calls, Ended, at_op, on_ops, stop
from lab.hooks import SOURCE_ROOTS, Hooks
from lab.netns import Namespace
from lab.taps import Tap
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import Command, quote
from pyqemu_ifup import hook
from pyqemu_ifup.deadline import GRACE
from pyqemu_ifup.drivers.links import LinkReader
from pyqemu_ifup.drivers.rtnetlink import ATTEMPTS, Netlink
from pyqemu_ifup.ops import LinkOp
from pyqemu_ifup.system.lock import RUN

POLICY = """\
version: 1
{top}
networks:
  lan: {{bridge: br0, isolated: true, txqueuelen: 500, mtu: 9000}}
  plain: {{bridge: br0}}
rules:
  - {{tap: no*, deny: ask the network team}}
  - {{user: nosuchuser, network: lan}}
  - {{tap: t*, network: lan}}
"""
OPS = (
    "SetAlias",
    "SetMac",
    "SetMtu",
    "SetTxQueueLen",
    "SetIpv6",
    "JoinBridge",
    "SetIsolated",
    "SetUp",
)
"""The ops of an up of this policy, in their order."""
DOWN_OPS = ("SetDown", "LeaveBridge", "SetAlias")
EACH_OP = [(number, after) for number in range(len(OPS)) for after in (False, True)]
each_op = pytest.mark.parametrize(
    ("op", "after"),
    EACH_OP,
    ids=[f"{'after' if after else 'before'} {OPS[op]}" for op, after in EACH_OP],
)
each_op_of_a_down = pytest.mark.parametrize("op", range(len(DOWN_OPS)), ids=DOWN_OPS)
ERROR, INFO = 3 * 8 + 3, 3 * 8 + 6
"""Syslog's facility daemon with these levels."""


@pytest.fixture
def hooks(tmp_path: Path) -> Hooks:
    hooks = Hooks(tmp_path)
    hooks.write_policy(POLICY.format(top=""))
    return hooks


@pytest.fixture
def calls(inside: Namespace, hooks: Hooks, served: Callable[..., Hooks]) -> Iterator[Calls]:
    """The hooks in a namespace with a bridge br0 and nobody's tap in it."""
    inside.add_bridge("br0", mac="02:00:00:00:00:01")
    calls = Calls(hooks)
    served(hooks, calls.syslog.path)
    yield calls
    calls.close()


def fresh(netns: Namespace, name: str = "t0") -> Tap:
    """Return a tap of which an up changes all that it can."""
    tap = Tap(name)
    netns.ip("link", "set", name, "address", "02:00:00:00:00:10")
    return tap


def state(netns: Namespace, tap: str = "t0") -> dict[str, Any]:
    """Return all of a tap that an up changes."""
    link = netns.link(tap)
    return {
        "up": "UP" in link["flags"],
        "master": link.get("master"),
        "mtu": link["mtu"],
        "mac": link["address"],
        "txqueuelen": link["txqlen"],
        "alias": link.get("ifalias"),
        "addrgenmode": link["inet6_addr_gen_mode"],
        "disable_ipv6": Path(f"/proc/sys/net/ipv6/conf/{tap}/disable_ipv6").read_text().strip(),
    }


def is_attached(now: dict[str, Any]) -> bool:
    return (now["up"], now["master"], now["mtu"]) == (True, "br0", 9000)


def said(
    ended: Ended, tap: str = "t0", program: str = "pyqemu-ifup", *, logged: bool = True
) -> str:
    """Return what the hook said of its failure: once on stderr, once in syslog, no more.

    Where it is not `logged`, no more than on stderr.
    """
    assert ended.stdout == b"" and ended.stdin_read == 0
    start = f"{program}: {quote(tap)}: "
    assert ended.stderr.startswith(start) and ended.stderr.count("\n") == 1, ended
    text = ended.stderr[len(start) : -1]
    lines = [line.partition("]: ")[2] for line in ended.log]
    assert lines == [f"{quote(tap)}: {text}"] * logged, ended
    assert ended.priorities == (ERROR,) * logged
    return text


def was_done(ended: Ended) -> None:
    assert (ended.status, ended.stdout, ended.stderr, ended.stdin_read) == (0, b"", "", 0)


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def act() -> NoReturn:
        raise error

    return act


def kill(number: signal.Signals) -> Callable[[], None]:
    """Return what sends the hook a signal from within."""
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.alone("changes the hook's own process")
def test_the_ops_are_these(calls: Calls, inside: Namespace) -> None:
    # NOTE: else the tests of every op would miss some.
    seen = calls.hooks.folder / "ops"

    def note(number: int, op: LinkOp, done: bool) -> None:
        if done:
            with seen.open("a") as file:
                file.write(f"{type(op).__name__}\n")

    with fresh(inside):
        was_done(calls.up("t0", on_ops(note)))
        assert tuple(seen.read_text().split()) == OPS
        seen.write_text("")
        was_done(calls.down("t0", on_ops(note)))
        assert tuple(seen.read_text().split()) == DOWN_OPS


# What QEMU hands over


@pytest.mark.parametrize("closed", list(product((False, True), repeat=3)))
@pytest.mark.parametrize("execute", [False, True], ids=["forked", "executed"])
def test_any_standard_descriptor_may_be_closed(
    calls: Calls, inside: Namespace, closed: tuple[bool, ...], execute: bool
) -> None:
    def close() -> None:
        for number in range(3):
            if closed[number]:
                os.close(number)

    for tap, status in (("t0", 0), ("other", 77)):
        with fresh(inside, tap) as held:
            os.set_inheritable(held.fd, True)
            ended = calls.start("pyqemu-ifup", tap, change=close, execute=execute).wait()
            assert (ended.status, ended.stdout, ended.stdin_read) == (status, b"", 0)
            assert ended.stderr.count("\n") == (1 if status and not closed[2] else 0)
            assert len(ended.log) == 1
            assert state(inside, tap)["up"] == (status == 0)


def test_stdout_is_never_written_whatever_writes_it(calls: Calls, inside: Namespace) -> None:
    def print_much() -> None:
        up = pyqemu_ifup.main.up

        def loud(*args: Any) -> None:
            os.write(1, b"{}")
            up(*args)

        setattr(pyqemu_ifup.main, "up", loud)  # noqa: B010

    with fresh(inside):
        was_done(calls.up("t0", print_much))


def wait_stopped(pid: int) -> None:
    """Wait until a process that is not our child has stopped."""
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.alone("changes the hook's own process")
def test_the_hook_keeps_no_tap_alive(calls: Calls, inside: Namespace) -> None:
    # NOTE: or a QEMU that was killed and started anew would find its tap busy.
    held: list[Tap] = []
    for op in range(len(OPS)):
        call = calls.start(
            "pyqemu-ifup", "t0", change=at_op(op, stop), caller=lambda: held.append(fresh(inside))
        )
        wait_stopped(call.pid)
        assert "t0" in inside.links()
        call.end_caller()
        with fresh(inside):
            before = state(inside)
            call.go_on()
            ended = call.wait()
            assert ended.status == 71
            assert "gone meanwhile" in said(ended)
            assert state(inside) == before, OPS[op]


def test_a_descriptor_of_another_tap_is_refused(calls: Calls, inside: Namespace) -> None:
    with fresh(inside, "t0"), Tap("other") as other:
        inside_fds = [other.fd]

        def only_the_other() -> None:
            for name in os.listdir("/proc/self/fd"):
                number = int(name)
                if number > 2 and number not in inside_fds:
                    close_quietly(number)

        before = state(inside)
        ended = calls.start("pyqemu-ifup", "t0", change=only_the_other).wait()
        assert ended.status == 77
        assert said(ended) == (
            "not the tap that was handed over: its descriptor is of other; call the hook "
            "with the name of the caller's own tap"
        )
        assert state(inside) == before


def close_quietly(number: int) -> None:
    try:
        os.close(number)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise


def test_a_name_that_qemu_would_not_hand_over_is_shown_in_ascii(
    calls: Calls, inside: Namespace
) -> None:
    with Tap("other"):
        inside.ip("link", "set", "other", "name", "é")
        ended = calls.up("t0")
        assert (ended.status, said(ended)) == (
            77,
            "not the tap that was handed over: its descriptor is of '\\xe9'; call the hook "
            "with the name of the caller's own tap",
        )


SURROUNDINGS: dict[str, Callable[[], object]] = {
    "no working directory": lambda: gone_directory(),
    "umask 0": lambda: os.umask(0),
    "umask 077": lambda: os.umask(0o077),
    "many descriptors": lambda: [os.dup(0) for _ in range(200)],
    "few descriptors": lambda: few_descriptors(),
    "no file may grow": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    "all signals blocked": lambda: signal.pthread_sigmask(signal.SIG_SETMASK, range(1, 32)),
    "low priority": lambda: os.nice(10),
    "its own session": lambda: os.setsid(),
    "OVS_RUNDIR": lambda: os.environ.update(OVS_RUNDIR="/nowhere", OVS_CTL_TIMEOUT="1"),
    "no PATH": lambda: os.environ.pop("PATH", None),
    "PATH elsewhere": lambda: os.environ.update(PATH="/tmp"),
    "LC_ALL": lambda: os.environ.update(LC_ALL="tr_TR.UTF-8", LANG="C"),
    "a low deadline": lambda: None,
}


def gone_directory() -> None:
    os.mkdir("/tmp/gone-directory-of-a-test")
    os.chdir("/tmp/gone-directory-of-a-test")
    os.rmdir("/tmp/gone-directory-of-a-test")


def few_descriptors() -> None:
    """Leave room for 24 descriptors, as few as Python and pyroute2 start with, and a tap's."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            close_quietly(int(name))
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_any_surroundings_will_do(calls: Calls, inside: Namespace, name: str) -> None:
    if name == "a low deadline":
        calls.hooks.write_policy(POLICY.format(top="timeout: 1"))
    with fresh(inside):
        for program in ("pyqemu-ifup", "pyqemu-ifdown"):
            was_done(calls.start(program, "t0", change=SURROUNDINGS[name]).wait())
            assert is_attached(state(inside)) == (program == "pyqemu-ifup")


def test_no_descriptor_left_is_told(calls: Calls, inside: Namespace) -> None:
    def none_left() -> None:
        few_descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))

    with fresh(inside):
        before = state(inside)
        ended = calls.up("t0", none_left)
        assert (ended.status, ended.stderr) == (
            71,
            "pyqemu-ifup: t0: cannot go on: Too many open files; raise the limit of open "
            "files of the calling process\n",
        )
        assert state(inside) == before


@pytest.mark.alone("changes the hook's own process")
def test_signals_that_qemu_blocks_are_ours_again(calls: Calls, inside: Namespace) -> None:
    seen = calls.hooks.folder / "mask"

    def look(number: int, op: LinkOp, done: bool) -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        ignored = signal.getsignal(signal.SIGPIPE)
        seen.write_text(f"{blocked} {ignored!r}")

    with fresh(inside):
        was_done(calls.up("t0", on_ops(look)))
    assert QEMU_BLOCKS and seen.read_text() == f"set() {signal.SIG_IGN!r}"


# What is said

NAMES: list[bytes] = [
    b"",
    b".",
    b"..",
    b"a/b",
    b"/",
    b"a:b",
    b"a b",
    b" ",
    b"a\tb",
    b"a\nb",
    b"\x1b[2J",
    b"\x7f",
    b"\xff",
    b"tap\xff0",
    "tapü".encode(),
    b"a" * 16,
    b"a" * 4096,
    b"../../etc",
    b"a\rb",
]
"""No tap's names: printed by ascii(), refused with 64."""
ODD: list[bytes] = [
    b"-rf",
    b"--help",
    b"-h",
    b"--version",
    b"--",
    b"-",
    b"$(id)",
    b"a;id>x",
    b"`id`",
    b"a'b",
    b'a"b',
    b"a&b",
    b"%s%n",
    b"*",
    b"a\\b",
    b"#",
    b"~root",
    b"!!",
    b"a=b",
    b"{x}",
    b"a,b",
    b"all",
    b"default",
    b"@",
    b"a" * 15,
    b"0",
    b"...",
    b"x..",
    b"[a]",
    b"a|b",
    b"<a>",
    b"a?b",
]
"""Names that a tap may have, though the kernel has no such link here."""


@pytest.mark.parametrize("program", ["pyqemu-ifup", "pyqemu-ifdown"])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[2:20])
def test_what_is_no_taps_name(calls: Calls, name: bytes, program: str) -> None:
    ended = calls.start(program, os.fsdecode(name)).wait()
    assert ended.status == 64 and ended.stdout == b""
    assert ended.stderr.isascii() and ended.stderr.count("\n") == 1
    assert ended.stderr[:-1].isprintable()
    if len(name) < 100:
        assert ended.stderr.endswith(
            f"{os.fsdecode(name)!a} is not a tap name: a name is 1 to 15 bytes of "
            "0x21 to 0x7e, without / and :, not . or ..\n"
        )
    assert len(ended.log) == 1


def test_an_option_is_a_name_like_any_other(calls: Calls, inside: Namespace) -> None:
    calls.hooks.write_policy(
        'version: 1\nnetworks: {n: {bridge: br0}}\nrules: [{tap: "*", network: n}]\n'
    )
    for name in ODD:
        tap = os.fsdecode(name)
        ended = calls.up(tap)
        assert (ended.status, said(ended, tap)) == (
            71,
            "there is no such tap in this network namespace; the caller must open it first, "
            "as QEMU does",
        ), name
        was_done(calls.down(tap))
    for tap in ("-rf", "--help", "$(id)", "a;id>x", "a" * 15):
        with Tap(tap):
            was_done(calls.up(tap))
            assert inside.links()[tap]["master"] == "br0"
            was_done(calls.down(tap))


@pytest.mark.parametrize("program", ["pyqemu-ifup", "pyqemu-ifdown"])
@pytest.mark.parametrize(
    "arguments",
    [(), ("t0", "t1"), ("t0", ""), ("--help", "x", "y")],
    ids=["nothing", "two taps", "an empty word", "an option"],
)
def test_usage(calls: Calls, inside: Namespace, arguments: tuple[str, ...], program: str) -> None:
    with fresh(inside):
        before = state(inside)
        ended = calls.start(program, *arguments).wait()
        assert (ended.status, ended.stdout, ended.stderr) == (64, b"", f"usage: {program} TAP\n")
        assert state(inside) == before


DENIALS = [
    (
        "no1",
        "denied: ask the network team (known of it: user root); see the rule at {policy}:7; "
        "pyqemu-ifctl explain --user=root no1 tells why none before it matches",
    ),
    (
        "x1",
        "denied: no rule of {policy} matches (known of it: user root); add one; pyqemu-ifctl "
        "explain --user=root x1 tells why each does not",
    ),
]


@pytest.mark.parametrize(("tap", "text"), DENIALS)
def test_a_denial(calls: Calls, inside: Namespace, tap: str, text: str) -> None:
    with fresh(inside, tap):
        before = state(inside, tap)
        ended = calls.up(tap)
        assert ended.status == 77
        assert said(ended, tap) == text.format(policy=calls.hooks.policy)
        assert state(inside, tap) == before


def test_a_program_named_for_a_network_plugs_into_it(calls: Calls, inside: Namespace) -> None:
    calls.hooks.on_network("plain")
    calls.hooks.on_network("nope")
    with fresh(inside, "no1"):
        was_done(calls.start("pyqemu-ifup@plain", "no1").wait())
        assert state(inside, "no1")["mtu"] == 1500
        was_done(calls.down("no1"))
        ended = calls.start("pyqemu-ifup@nope", "no1").wait()
        assert ended.status == 77
        assert said(ended, "no1") == (
            "network nope: the policy does not define it; the networks are lan, plain"
        )


@pytest.mark.alone("the agent keeps to the last good policy")
def test_a_policy_that_is_missing_or_wrong_or_unsafe(calls: Calls, inside: Namespace) -> None:
    path = calls.hooks.policy
    with fresh(inside):
        before = state(inside)
        calls.hooks.write_policy("version: 1\nrules: [{tap: x, netwrk: lan}]\n")
        ended = calls.up("t0")
        assert ended.status == 65
        assert said(ended).startswith(f"policy invalid: {path}:2:")
        path.chmod(0o666)
        ended = calls.up("t0")
        assert ended.status == 78
        assert said(ended) == (f"{path}: everybody can write it (mode 0666); run chmod go-w {path}")
        path.unlink()
        ended = calls.up("t0")
        assert ended.status == 66 and said(ended)
        assert state(inside) == before


@pytest.mark.alone("changes the hook's own process")
def test_a_bug_is_told_in_one_line_and_its_traceback_in_syslog(
    calls: Calls, inside: Namespace
) -> None:
    def broken() -> None:
        setattr(pyqemu_ifup.main, "find_caller", lambda *a, **k: 1 // 0)  # noqa: B010

    with fresh(inside):
        before = state(inside)
        ended = calls.up("t0", broken)
        line = (
            "t0: internal error: ZeroDivisionError: integer division or modulo by zero; the "
            "traceback is in syslog, please report it"
        )
        assert (ended.status, ended.stdout, ended.stderr) == (70, b"", f"pyqemu-ifup: {line}\n")
        texts = [text.partition("]: ")[2] for text in ended.log]
        assert texts[0] == "Traceback (most recent call last):"
        assert texts[-2] == "ZeroDivisionError: integer division or modulo by zero"
        assert texts[-1] == line
        assert set(ended.priorities) == {ERROR}
        assert state(inside) == before


@each_op
@pytest.mark.alone("changes the hook's own process")
def test_a_bug_in_the_midst_is_taken_back(
    calls: Calls, inside: Namespace, op: int, after: bool
) -> None:
    with fresh(inside):
        before = state(inside)
        ended = calls.up("t0", at_op(op, raising(KeyError("oops")), after=after))
        assert ended.status == 70
        assert state(inside) == before


def test_each_step_is_told_first_where_that_is_asked_for(calls: Calls, inside: Namespace) -> None:
    calls.hooks.env["PYQEMU_IFUP_DEBUG"] = "1"
    with fresh(inside):
        ended = calls.up("t0")
        alias = state(inside)["alias"]
        assert (ended.status, ended.stdout) == (0, b"")
        decided, *steps = ended.stderr.splitlines()
        assert decided.startswith("pyqemu-ifup: t0: # asked for by process ")
        assert decided.endswith(f"; decided by the rules of {calls.hooks.policy}")
        assert steps == [
            f"pyqemu-ifup: t0: {words}"
            for words in (
                f"ip link set dev t0 alias '{alias}'",
                "ip link set dev t0 address fe:00:00:00:00:10",
                "ip link set dev t0 mtu 9000",
                "ip link set dev t0 txqueuelen 500",
                "ip link set dev t0 addrgenmode none",
                "echo 1 > /proc/sys/net/ipv6/conf/t0/disable_ipv6",
                "ip link set dev t0 master br0",
                "bridge link set dev t0 isolated on",
                "ip link set dev t0 up",
            )
        ]
        ended = calls.down("t0")
        assert ended.stderr.splitlines() == [
            "pyqemu-ifdown: t0: ip link set dev t0 down",
            "pyqemu-ifdown: t0: ip link set dev t0 nomaster",
            "pyqemu-ifdown: t0: ip link set dev t0 alias ''",
        ]
        calls.hooks.env["PYQEMU_IFUP_DEBUG"] = "0"
        was_done(calls.up("t0"))


def broken_pipe() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    os.dup2(write_end, 2)


def full_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


def read_only() -> None:
    os.dup2(os.open("/dev/null", os.O_RDONLY), 2)


@pytest.mark.parametrize("stderr", [broken_pipe, full_disk, read_only])
def test_nobody_need_read_what_is_said(
    calls: Calls, inside: Namespace, stderr: Callable[[], None]
) -> None:
    calls.hooks.env["PYQEMU_IFUP_DEBUG"] = "1"
    with fresh(inside):
        assert calls.up("t0", stderr).status == 0
        assert is_attached(state(inside))
        assert calls.down("t0", stderr).status == 0
        ended = calls.up("x", stderr)
        assert (ended.status, len(ended.log)) == (77, 1)


@pytest.mark.parametrize(("tap", "status"), [("t0", 0), ("no1", 77)], ids=["attached", "refused"])
def test_a_stderr_that_nobody_empties_holds_nothing_up(
    calls: Calls, inside: Namespace, tap: str, status: int
) -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write_end, bytes(4096))
    os.set_blocking(write_end, True)
    calls.hooks.env["PYQEMU_IFUP_DEBUG"] = "1"
    with fresh(inside, tap):
        ended = calls.up(tap, lambda: os.dup2(write_end, 2))
        assert (ended.status, len(ended.log)) == (status, 1)
        assert ended.seconds < 5
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize(("tap", "status"), [("t0", 0), ("x", 77)], ids=["attached", "refused"])
def test_a_syslog_that_nobody_empties_holds_nothing_up(
    calls: Calls, inside: Namespace, tap: str, status: int
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, fresh(inside):
        sender.setblocking(False)
        sender.connect(calls.syslog.path)
        with pytest.raises(BlockingIOError):
            while True:
                sender.send(b"<27>Jan  1 00:00:00 other[1]: busy")
        calls.syslog.deaf = True
        ended = calls.up(tap)
        assert ended.status == status and ended.seconds < 5
        assert is_attached(state(inside)) is (status == 0)
        calls.syslog.deaf = False
        calls.syslog.hear()


@pytest.mark.parametrize("listener", [None, "dead", "stream"])
def test_no_syslog_is_no_matter(calls: Calls, inside: Namespace, listener: str | None) -> None:
    def replaced() -> None:
        os.unlink("/dev/log")
        if listener is not None:
            kind = socket.SOCK_STREAM if listener == "stream" else socket.SOCK_DGRAM
            bound = socket.socket(socket.AF_UNIX, kind)
            bound.bind("/dev/log")
            bound.close()

    with fresh(inside):
        was_done(calls.up("t0", replaced))
        ended = calls.up("x", replaced)
        assert (ended.status, ended.log) == (77, ()) and ended.stderr.count("\n") == 1


# Failures, at each op

CODES = [
    (errno.EPERM, 77),
    (errno.EACCES, 77),
    (errno.EINVAL, 71),
    (errno.ENODEV, 71),
    (errno.EOPNOTSUPP, 71),
    (errno.EXFULL, 71),
    (errno.ENOBUFS, 71),
    (errno.EBUSY, 71),
]
REFUSED = [
    (op, code, status)
    for op in range(len(OPS))
    for code, status in (CODES if op in (0, 5) else CODES[:3])
]
"""Which op the kernel refuses, and why; what the hook then ends with."""


def failing(number: int, code: int, times: int = ATTEMPTS) -> Callable[[], None]:
    """Let the kernel refuse the op of this number with an errno, as often as it is tried."""

    def change() -> None:
        run = Netlink.run
        count = {"op": -1, "left": times}

        def refusing(
            self: Netlink, change: Callable[[Netlink], None], commands: Sequence[Command]
        ) -> None:
            count["op"] += 1
            here = count["op"] == number

            def refuse(links: Netlink) -> None:
                if here and count["left"]:
                    count["left"] -= 1
                    raise NetlinkError(code)
                change(links)

            run(self, refuse, commands)

        setattr(Netlink, "run", refusing)  # noqa: B010  mypy lets no method be assigned

    return change


@pytest.mark.parametrize(
    ("op", "code", "status"),
    REFUSED,
    ids=[f"{OPS[op]}-{errno.errorcode[code]}" for op, code, _ in REFUSED],
)
@pytest.mark.alone("changes the hook's own process")
def test_the_kernel_may_refuse_each_op(
    calls: Calls, inside: Namespace, op: int, code: int, status: int
) -> None:
    with fresh(inside):
        before = state(inside)
        ended = calls.up("t0", failing(op, code))
        assert ended.status == status
        assert " failed: " in said(ended)
        assert state(inside) == before


def test_what_passes_is_tried_again(calls: Calls, inside: Namespace) -> None:
    with fresh(inside):
        for number in range(len(OPS)):
            was_done(calls.up("t0", failing(number, errno.ENOBUFS, ATTEMPTS - 1)))
            assert is_attached(state(inside))
            was_done(calls.down("t0"))
            inside.ip("link", "set", "t0", "address", "02:00:00:00:00:10")


@each_op
@pytest.mark.alone("changes the hook's own process")
def test_each_failure_before_and_after_each_op_is_taken_back(
    calls: Calls, inside: Namespace, op: int, after: bool
) -> None:
    with fresh(inside):
        before = state(inside)
        failure = Failure(Status.REFUSED, "made", "by a test")
        ended = calls.up("t0", at_op(op, raising(failure), after=after))
        assert (ended.status, said(ended)) == (71, "made: by a test")
        assert state(inside) == before


@pytest.mark.parametrize("op", range(8))
@pytest.mark.alone("changes the hook's own process")
def test_an_up_that_failed_on_an_attached_tap_leaves_it_detached(
    calls: Calls, inside: Namespace, op: int
) -> None:
    failure = Failure(Status.REFUSED, "made", "by a test")
    with fresh(inside):
        was_done(calls.up("t0"))
        ended = calls.up("t0", at_op(op, raising(failure)))
        assert (ended.status, said(ended)) == (71, "made: by a test")
        now = state(inside)
        assert (now["up"], now["master"], now["alias"]) == (False, None, None)


@each_op
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.alone("changes the hook's own process")
def test_a_signal_at_each_op_is_taken_back(
    calls: Calls, inside: Namespace, number: signal.Signals, op: int, after: bool
) -> None:
    done = calls.hooks.folder / "done"

    def note(kind: str) -> None:
        with done.open("a") as file:
            file.write(f"{kind} ")

    with fresh(inside):
        before = state(inside)
        done.write_text("")

        def act(current: int, step: LinkOp, is_done: bool) -> None:
            if (current, is_done) == (op, after):
                kill(number)()
            if is_done:
                note(type(step).__name__)

        ended = calls.up("t0", on_ops(act))
        assert (ended.status, said(ended)) == (
            75,
            f"stopped: received {number.name}; nothing is left of it",
        )
        assert state(inside) == before
        # What was begun is finished; what comes after that only takes it back.
        assert tuple(done.read_text().split()[: op + 1]) == OPS[: op + 1]
        assert ("SetUp" in done.read_text()) == (OPS[op] == "SetUp")


@pytest.mark.parametrize("number", [signal.SIGPIPE, signal.SIGXFSZ])
def test_these_signals_do_nothing(calls: Calls, inside: Namespace, number: signal.Signals) -> None:
    with fresh(inside):
        was_done(calls.up("t0", at_op(3, kill(number))))
        assert is_attached(state(inside))


@each_op_of_a_down
@pytest.mark.alone("changes the hook's own process")
def test_a_signal_in_a_down_ends_it_early_and_the_next_one_does_it(
    calls: Calls, inside: Namespace, op: int
) -> None:
    with fresh(inside):
        was_done(calls.up("t0"))
        ended = calls.down("t0", at_op(op, kill(signal.SIGTERM)))
        last = op == len(DOWN_OPS) - 1
        assert ended.status == (0 if last else 75)
        was_done(calls.down("t0"))
        now = state(inside)
        assert (now["up"], now["master"], now["alias"]) == (False, None, None)


def end_the_caller() -> None:
    parent = os.getppid()
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.001)


@each_op
@pytest.mark.alone("changes the hook's own process")
def test_the_caller_ends_at_each_op(calls: Calls, inside: Namespace, op: int, after: bool) -> None:
    # NOTE: the tap is not the caller's here, so that what is left of it can be seen.
    with fresh(inside):
        before = state(inside)
        change = at_op(op, end_the_caller, after=after)
        call = calls.start("pyqemu-ifup", "t0", change=change, caller=lambda: None)
        caller = call.caller
        ended = call.wait()
        assert (ended.status, said(ended)) == (
            75,
            f"stopped: the calling process {caller} has ended; nothing is left of it",
        )
        assert state(inside) == before


@each_op
@pytest.mark.alone("changes the hook's own process")
def test_a_hook_that_is_killed_leaks_nothing_and_the_next_up_does_it(
    calls: Calls, inside: Namespace, op: int, after: bool
) -> None:
    with fresh(inside):
        ended = calls.up("t0", at_op(op, kill(signal.SIGKILL), after=after))
        assert ended.status == -signal.SIGKILL
        now = state(inside)
        last = (OPS[op], after) == ("SetUp", True)
        assert now["up"] == last
        assert (now["alias"] is not None) == ((op, after) != (0, False))
        was_done(calls.up("t0"))
        assert is_attached(state(inside))
        was_done(calls.down("t0"))
    assert set(inside.links()) == {"lo", "br0"}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@each_op_of_a_down
@pytest.mark.alone("changes the hook's own process")
def test_a_down_that_is_killed_is_done_by_the_next(
    calls: Calls, inside: Namespace, op: int, after: bool
) -> None:
    with fresh(inside):
        was_done(calls.up("t0"))
        ended = calls.down("t0", at_op(op, kill(signal.SIGKILL), after=after))
        assert ended.status == -signal.SIGKILL
        was_done(calls.down("t0"))
        now = state(inside)
        assert (now["up"], now["master"], now["alias"]) == (False, None, None)


# The deadline


def hang() -> None:
    time.sleep(60)


@pytest.mark.parametrize(("op", "told"), [(1, "address fe:"), (5, "master br0;"), (7, "up;")])
@pytest.mark.alone("changes the hook's own process")
def test_an_op_that_does_not_end_is_broken_off(
    calls: Calls, inside: Namespace, op: int, told: str
) -> None:
    calls.hooks.write_policy(POLICY.format(top="timeout: 1"))
    with fresh(inside):
        before = state(inside)
        ended = calls.up("t0", at_op(op, hang))
        assert ended.status == 75
        line = said(ended)
        assert line.startswith(
            f"not done after 1 s: the kernel does not end: ip link set dev t0 {told}"
        ), line
        assert line.endswith("; try again, or raise timeout: in the policy")
        assert 1 <= ended.seconds < 6
        assert state(inside) == before


@pytest.mark.alone("changes the hook's own process")
def test_a_look_that_does_not_end_is_named(calls: Calls, inside: Namespace) -> None:
    calls.hooks.write_policy(POLICY.format(top="timeout: 1"))

    def mute_kernel() -> None:
        setattr(LinkReader, "by_name", lambda *_: hang())  # noqa: B010

    with fresh(inside):
        line = said(calls.up("t0", mute_kernel))
    assert line.startswith("not done after 1 s: cannot look at link t0: the kernel does not answer")


@pytest.mark.alone("changes the hook's own process")
def test_who_is_asking_may_take_no_longer_either(calls: Calls, inside: Namespace) -> None:
    calls.hooks.write_policy(POLICY.format(top="timeout: 1"))

    def mute_directory() -> None:
        setattr(pyqemu_ifup.main, "find_caller", lambda *a, **k: hang())  # noqa: B010

    with fresh(inside):
        before = state(inside)
        ended = calls.up("t0", mute_directory)
        assert ended.status == 75 and said(ended)
        assert state(inside) == before


@pytest.mark.alone("changes the hook's own process")
def test_an_undo_that_does_not_end_either_is_given_up(calls: Calls, inside: Namespace) -> None:
    calls.hooks.write_policy(POLICY.format(top="timeout: 1"))

    def always(number: int, op: LinkOp, done: bool) -> None:
        if number >= 5 and not done:
            hang()

    with fresh(inside):
        ended = calls.up("t0", on_ops(always))
        assert ended.status == 75
        assert 1 <= ended.seconds < 8
        assert ended.log[-1].endswith(
            "what was begun could not be taken back; pyqemu-ifctl gc t0 will"
        )
        assert not state(inside)["up"]
        was_done(calls.down("t0"))
        assert state(inside)["alias"] is None


def wait_for_ever(library: type[ctypes.CDLL]) -> Callable[[], object]:
    """Return what waits for a lock in the C library, which goes on after each signal."""

    def wait() -> None:
        lock = library(None).pthread_mutex_lock
        mutex = ctypes.create_string_buffer(64)
        lock(mutex)
        lock(mutex)

    return wait


@pytest.mark.parametrize("library", [ctypes.CDLL, ctypes.PyDLL])
@pytest.mark.alone("changes the hook's own process")
def test_a_call_that_heeds_no_signal_is_ended_with_the_process(
    calls: Calls, inside: Namespace, library: type[ctypes.CDLL]
) -> None:
    """The mark stays, for gc and the next up; PyDLL's calls stop all of Python meanwhile."""
    calls.hooks.write_policy(POLICY.format(top="timeout: 1"))
    with fresh(inside):
        ended = calls.up("t0", at_op(6, wait_for_ever(library)))
        assert ended.status == 75
        assert 1 + GRACE <= ended.seconds < 8
        who = "the kernel does not end: bridge link set dev t0 isolated on"
        if library is ctypes.PyDLL:
            who = "something does not answer"
        assert said(ended, logged=library is ctypes.CDLL) == (
            f"not done in time: {who}; what was begun could not be taken back; "
            "pyqemu-ifctl gc t0 will"
        )
        now = state(inside)
        assert not now["up"] and now["alias"] is not None
        was_done(calls.up("t0"))
        was_done(calls.down("t0"))


def test_what_is_done_is_not_broken_off(calls: Calls, inside: Namespace) -> None:
    calls.hooks.write_policy(POLICY.format(top="timeout: 1"))

    def slow_log() -> None:
        log = hook.log

        def late(priority: int, line: str) -> None:
            time.sleep(1.5)
            log(priority, line)

        setattr(pyqemu_ifup.main, "log", late)  # noqa: B010

    with fresh(inside):
        was_done(calls.up("t0", slow_log))
        assert is_attached(state(inside))


# What is imported

REPORT = """\
import atexit, json, os, sys
path = {path!r}
def report():
    with open(path, "w") as file:
        json.dump(sorted(sys.modules), file)
atexit.register(report)
sys.path[:0] = {sources!r}
sys.argv[:] = {argv!r}
from {hook}.main import main
raise SystemExit(main())
"""


def imported(hooks: Hooks, hook: str, tap: str, *, status: int, **options: Any) -> set[str]:
    """Run the hook of this package by itself, and return the modules that it has imported."""
    path = hooks.folder / "modules.json"
    script = REPORT.format(path=str(path), sources=SOURCE_ROOTS, argv=[hook, tap], hook=hook)
    done = subprocess.run(
        [sys.executable, "-I", "-c", script],
        env=hooks.environ(),
        capture_output=True,
        timeout=60,
        check=False,
        **options,
    )
    assert (done.returncode, done.stdout) == (status, b""), done.stderr
    return set(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("tap", "status", "there", "absent"),
    [
        ("no1", 77, {"yaml"}, {"pyroute2", "ovs"}),
        ("x", 77, {"yaml"}, {"pyroute2", "ovs"}),
        ("a/b", 64, set(), {"yaml", "pyroute2", "ovs"}),
        ("t0", 0, {"yaml", "pyroute2"}, {"ovs"}),
    ],
)
@pytest.mark.alone("about the hook's own imports")
def test_what_is_not_needed_is_not_imported(
    calls: Calls, inside: Namespace, tap: str, status: int, there: set[str], absent: set[str]
) -> None:
    with fresh(inside) as held:
        names = imported(
            calls.hooks,
            "pyqemu_ifup",
            tap,
            status=status,
            pass_fds=() if tap != "t0" else (held.fd,),
        )
    assert there <= names and not absent & names


@pytest.mark.alone("about the hook's own imports")
@pytest.mark.parametrize(("folder", "loads"), [("nat0@1", False), ("lan@1", True)])
def test_a_down_loads_what_makes_networks_for_a_tap_that_may_be_of_one(
    calls: Calls, inside: Namespace, folder: str, *, loads: bool
) -> None:
    network = Path(RUN, folder)
    with fresh(inside):
        was_done(calls.up("t0"))
        network.mkdir(parents=True)
        try:
            names = imported(calls.hooks, "pyqemu_ifdown", "t0", status=0)
        finally:
            network.rmdir()
        assert state(inside)["master"] is None
    assert ("pyqemu_ifup.made.network" in names) is loads
