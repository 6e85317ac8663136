"""The clients that ask for a tap, beside an agent that says what it is told to say."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lab.hooks import Hooks

ROUND = 30.0
"""Seconds that one of the programs may take for anything here."""
FAKE_QEMU = """\
#!/bin/sh
grep SigIgn /proc/$$/status
exec {python} -I - "$@" <<'END'
import os, stat, sys
for number in map(int, os.listdir("/proc/self/fd")):
    try:
        if number > 2 and stat.S_ISFIFO(os.fstat(number).st_mode):
            print("inherited", number)
    except OSError:
        continue
print("pid", os.getpid())
print(*sys.argv[1:])
END
"""
IGNORED = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1


@dataclass
class Scripted:
    """An agent that takes one request for each of its `answers`, and sends those packets.

    A packet may come with descriptors; None in an answer closes the connection at once, and what
    is a function is called.
    """

    path: Path
    answers: list[list[tuple[bytes, list[int]] | Callable[[], object] | None]]
    requests: list[bytes] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Listen."""
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(self.path))
        self.listener.listen(8)
        self.listener.settimeout(ROUND)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        for answer in self.answers:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(ROUND)
                data, fds, _, _ = socket.recv_fds(connection, 5000, 4)
                self.requests.append(data)
                self.places += [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
                for fd in fds:
                    os.close(fd)
                for packet in answer:
                    if packet is None:
                        break
                    if callable(packet):
                        packet()
                        continue
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", packet[1]))]
                    connection.sendmsg([packet[0]], rights if packet[1] else [])

    def close(self) -> None:
        """Stop, once all answers are given or nobody asks any more."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join(ROUND)
        self.listener.close()


@pytest.fixture
def hooks(tmp_path: Path) -> Hooks:
    """The programs, which ask the agent that the test scripts."""
    hooks = Hooks(tmp_path / "bin", agent=str(tmp_path / "agent.sock"))
    qemu = hooks.folder / "fake-qemu"
    qemu.write_text(FAKE_QEMU.format(python=sys.executable))
    qemu.chmod(0o755)
    return hooks


Script = Callable[..., Scripted]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """Starts the agent that sends these answers."""
    started: list[Scripted] = []

    def start(*answers: list[tuple[bytes, list[int]] | Callable[[], object] | None]) -> Scripted:
        started.append(Scripted(tmp_path / "agent.sock", list(answers)))
        return started[-1]

    yield start
    for agent in started:
        agent.close()


@pytest.fixture
def pipe() -> Iterator[int]:
    """A descriptor that is known again: a pipe's."""
    read_end, write_end = os.pipe()
    yield read_end
    os.close(read_end)
    os.close(write_end)


def said(text: str) -> tuple[bytes, list[int]]:
    return text.encode(), []


def call_helper(
    hooks: Hooks, *arguments: str, shell: bool = False
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the helper as QEMU does; return it and what the descriptors that it sent are of."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = [str(hooks.folder / "pyqemu-bridge-helper"), *arguments]
        words = [word.replace("FD", str(theirs.fileno())) for word in words]
        done = subprocess.run(
            ["sh", "-c", " ".join(words)] if shell else words,
            pass_fds=[theirs.fileno()],
            env=hooks.environ(),
            capture_output=True,
            text=True,
            timeout=ROUND,
            check=False,
        )
        theirs.close()
        data, fds, _, _ = socket.recv_fds(ours, 10, 4)
        assert data == (b"\0" if fds else b"")
        names = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
        for fd in fds:
            os.close(fd)
    return done, names


@pytest.mark.parametrize("shell", [False, True])
@pytest.mark.parametrize("vnet", [False, True])
def test_the_helper_hands_the_tap_over(
    hooks: Hooks, script: Script, pipe: int, shell: bool, vnet: bool
) -> None:
    agent = script([said("!10"), (b">tap0", [pipe]), said("=0")])
    words = [*(["--use-vnet"] if vnet else []), "--fd=FD", "--br=lan"]
    done, names = call_helper(hooks, *words, shell=shell)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert names == [os.readlink(f"/proc/self/fd/{pipe}")]
    flag = "vnet_hdr" if vnet else ""
    assert agent.requests == [f"pyqemu-ifup/1\0tap\0lan\0\0001\0{flag}\0parent".encode()]
    assert agent.places == [os.readlink("/proc/self/ns/net")]


ENDS = [
    ([said("-pyqemu-ifd: a\nb: c"), said("=77")], 77, "pyqemu-ifd: a\\nb: c\n"),
    ([said("!10"), said("-one"), said("-two"), said("=71")], 71, "one\ntwo\n"),
    ([said("=70")], 70, "pyqemu-bridge-helper: the agent does not say why\n"),
    ([said("=0")], 71,
     "pyqemu-bridge-helper: the agent gave 0 descriptors for 1 queues; see whether more files "
     "may be open\n"),
    ([said(">tap0"), said("=0")], 71, "pyqemu-bridge-helper: the agent gave 0 descriptors"),
    ([said("?another network namespace")], 77,
     "pyqemu-bridge-helper: the agent is not for this process: another network namespace; run "
     "QEMU where the agent runs\n"),
    ([said("!10"), None], 75, "pyqemu-bridge-helper: the agent has gone; try again\n"),
    ([said("garbage"), said("!x"), said("="), said("=77x"), None], 75,
     "pyqemu-bridge-helper: the agent has gone; try again\n"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "status", "text"), ENDS, ids=[row[2][:40] for row in ENDS])
def test_the_helper_without_a_tap(
    hooks: Hooks,
    script: Script,
    answer: list[tuple[bytes, list[int]] | Callable[[], object] | None],
    status: int,
    text: str,
) -> None:
    script(answer)
    done, names = call_helper(hooks, "--use-vnet", "--br=lan", "--fd=FD")
    assert (done.returncode, done.stdout, names) == (status, "", [])
    assert done.stderr == text if text.endswith("\n") else done.stderr.startswith(text)


def test_a_tap_whose_making_failed_after_all_is_not_handed_over(
    hooks: Hooks, script: Script, pipe: int
) -> None:
    script([(b">tap0", [pipe]), said("-no"), said("=75")])
    done, names = call_helper(hooks, "--br=lan", "--fd=FD")
    assert (done.returncode, names) == (75, [])


USAGE = "usage: pyqemu-bridge-helper [--use-vnet] --br=NETWORK --fd=NUMBER\n"


@pytest.mark.parametrize(
    "words",
    [
        [], ["--br=lan"], ["--fd=FD"], ["--br=", "--fd=FD"], ["--br", "lan", "--fd=FD"],
        ["--br=lan", "--fd="], ["--br=lan", "--fd=-1"], ["--br=lan", "--fd=3x"],
        ["--br=lan", "--fd=" + "9" * 20], ["--br=lan", "--fd=FD", "--use-vnet=1"],
        ["--br=lan", "--fd=FD", "more"], ["--help"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_qemu_would_not_say_is_usage(hooks: Hooks, words: list[str]) -> None:
    done, names = call_helper(hooks, *words)
    assert (done.returncode, done.stdout, done.stderr, names) == (64, "", USAGE, [])


def test_a_socket_that_takes_no_descriptor_is_told_in_one_line(
    hooks: Hooks, script: Script, pipe: int
) -> None:
    script([said("!10"), (b">tap0", [pipe]), said("=0")])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wrong:
        done = subprocess.run(
            [hooks.folder / "pyqemu-bridge-helper", "--br=lan", f"--fd={wrong.fileno()}"],
            pass_fds=[wrong.fileno()],
            env=hooks.environ(),
            capture_output=True,
            text=True,
            timeout=ROUND,
            check=False,
        )
        assert done.returncode == 71
        assert done.stderr.startswith(
            f"pyqemu-bridge-helper: cannot hand the tap over by --fd={wrong.fileno()}: "
        )
        assert done.stderr.count("\n") == 1


def test_a_helper_that_may_open_no_file_tells_so_in_one_line(tmp_path: Path) -> None:
    code = (
        f"import os, sys; sys.path[:0] = {list(Hooks.roots)!r}\n"
        "from pyqemu_ifd.bridge_helper import main\n"
        "sys.argv[1:] = ['--br=lan', '--fd=' + sys.argv[1]]\n"
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "try:\n"
        "    while True: os.dup(2)\n"
        "except OSError:\n"
        "    sys.exit(main())"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            env={**os.environ, "PYQEMU_IFUP_SOCKET": str(tmp_path / "agent.sock")},
            capture_output=True, text=True, timeout=ROUND, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        71, "pyqemu-bridge-helper: cannot go on: Too many open files; see what limits QEMU's "
        "process\n",
    )  # fmt: skip


def test_a_bug_of_the_helper_is_one_line() -> None:
    code = (
        f"import sys; sys.path[:0] = {list(Hooks.roots)!r}\n"
        "from pyqemu_ifd import bridge_helper\n"
        "bridge_helper.help_qemu = lambda arguments: {}['x\\n']\n"
        "sys.exit(bridge_helper.main())"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=ROUND,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        70, "pyqemu-bridge-helper: internal error: KeyError: 'x\\n'; the traceback is in syslog, "
        "please report it\n",
    )  # fmt: skip


@pytest.mark.parametrize("number", ["0", "1", "999"])
def test_what_is_no_socket_is_usage(hooks: Hooks, number: str) -> None:
    done, _ = call_helper(hooks, "--br=lan", f"--fd={number}")
    assert done.returncode == 64
    assert done.stderr.startswith(f"pyqemu-bridge-helper: --fd={number} is no socket: ")


def test_the_last_of_two_networks_counts(hooks: Hooks, script: Script, pipe: int) -> None:
    agent = script([(b">tap0", [pipe]), said("=0")])
    call_helper(hooks, "--br=lan", "--fd=FD", "--br=web")
    assert b"\0web\0" in agent.requests[0]


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("", 69, "no agent: PYQEMU_IFUP_SOCKET is empty; "),
        ("/nowhere/agent.sock", 69, "no agent at /nowhere/agent.sock: No such file or directory; "),
        ("/dev/null", 69, "no agent at /dev/null: Connection refused; start one: "),
        ("x" * 200, 75, "the agent at xx"),
    ],
)
def test_no_agent(hooks: Hooks, path: str, status: int, text: str) -> None:
    hooks.agent = path
    done, _ = call_helper(hooks, "--br=lan", "--fd=FD")
    assert done.returncode == status
    assert done.stderr.startswith(f"pyqemu-bridge-helper: {text}")
    ran = hooks.run("pyqemu-ifctl", "run", "--nic", "lan", "--", "true")
    if status == 69:
        # NOTE: root does it without an agent, and has no policy here.
        assert ran.returncode == 66
        return
    assert ran.returncode == status
    assert ran.stderr.startswith(f"pyqemu-ifctl: lan: {text}" if path else f"pyqemu-ifctl: {text}")


def test_the_helper_stops_when_qemu_has_died(hooks: Hooks, script: Script, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gone = threading.Event()
    callers: list[int] = []
    agent = script(
        [said("!20"), lambda: os.kill(callers[0], signal.SIGKILL), lambda: gone.wait(ROUND)]
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        helper = hooks.folder / "pyqemu-bridge-helper"
        call = f"{helper} --br=lan --fd={theirs.fileno()} 2>{out}; exit"
        qemu = subprocess.Popen(["sh", "-c", call], pass_fds=[theirs.fileno()], env=hooks.environ())
        callers.append(qemu.pid)
        theirs.close()
        qemu.wait(ROUND)
        assert ours.recv(1) == b"", "the helper is still there"
    gone.set()
    assert out.read_text() == (
        f"pyqemu-bridge-helper: stopped: the calling process {qemu.pid} has ended\n"
    )
    assert len(agent.requests) == 1


def test_run_becomes_a_qemu_that_has_the_taps(hooks: Hooks, script: Script, pipe: int) -> None:
    agent = script(
        [said("!10"), (b">tap0", [pipe]), said("=0")], [(b">web0", [pipe, pipe]), said("=0")]
    )
    process = subprocess.Popen(
        hooks.argv(
            "pyqemu-ifctl",
            "run",
            "--nic",
            "lan",
            "--nic",
            "web,tap=web0,id=w,queues=2",
            "--",
            str(hooks.folder / "fake-qemu"),
            "-name",
            "a b",
            "--",
            "--nic",
        ),
        env=hooks.environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate(timeout=ROUND)
    assert (process.returncode, err) == (0, "")
    assert agent.requests == [
        b"pyqemu-ifup/1\0tap\0lan\0\x001\0vnet_hdr\0",
        b"pyqemu-ifup/1\0tap\0web\0web0\x002\0vnet_hdr\0",
    ]
    signals, *lines, pid, words = out.splitlines()
    assert not int(signals.split()[1], 16) & IGNORED
    fds = [line.removeprefix("inherited ") for line in lines]
    assert pid == f"pid {process.pid}"
    assert len(fds) == 3
    expected = [
        ["-netdev", f"tap,id=net0,fd={fds[0]}"],
        ["-netdev", f"tap,id=w,fds={fds[1]}:{fds[2]}"],
    ]
    assert words.split()[:5] == ["-name", "a", "b", "--", "--nic"]
    got = words.split()[5:]
    if os.path.exists("/dev/vhost-net"):
        assert all("vhost=on,vhostfd" in word for word in (got[1], got[3]))
        got = [word.partition(",vhost")[0] for word in got]
    assert sorted(got) == sorted(sum(expected, []))


def test_run_starts_nothing_where_one_of_the_taps_cannot_be_had(
    hooks: Hooks, script: Script, pipe: int
) -> None:
    script(
        [(b">tap0", [pipe]), said("=0")],
        [said("-pyqemu-bridge-helper: web: user x may not: why; what"), said("=77")],
    )
    done = hooks.run(
        "pyqemu-ifctl", "run", "--nic", "lan", "--nic", "web", "--", str(hooks.folder / "fake-qemu")
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        77,
        "",
        "pyqemu-ifctl: web: user x may not: why; what\n",
    )


def test_run_does_not_know_a_status_of_a_later_agent(hooks: Hooks, script: Script) -> None:
    script([said("-new"), said("=99")])
    done = hooks.run("pyqemu-ifctl", "run", "--nic", "lan", "--", "true")
    assert (done.returncode, done.stderr) == (71, "pyqemu-ifctl: new\n")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "run needs a guest of the policy's, or a --nic; write run VM"),
        (["--", "true"], "run needs a guest of the policy's, or a --nic; write run VM"),
        (["--nic", "lan"], "run needs a command; write -- and QEMU's command line"),
        (["--nic", "lan", "--"], "run needs a command; "),
        (["--nic", "lan", "true"], "run needs a command; write -- and QEMU's command line"),
        (["--nic", "lan", "vm", "true"], "unrecognized arguments: true"),
        (["--nic", "", "--", "true"], "--nic '': it does not begin with the name of a network; "),
        (["--nic", "tap=x", "--", "true"], "--nic tap=x: it does not begin with the name"),
        (["--nic", "lan,", "--", "true"], "--nic lan,: an empty word is none of tap=, id=,"),
        (["--nic", "lan,id=a,,b", "--", "true"], "--nic lan,id=a,,b: an empty word is none of"),
        (["--nic", "lan,mac=x", "--", "true"], "--nic lan,mac=x: mac= is the MAC of the"),
        (["--nic", "lan,tap", "--", "true"], "--nic lan,tap: tap is none of tap=, id=, queues="),
        (["--nic", "lan,tap=", "--", "true"], "--nic lan,tap=: tap= is empty"),
        (["--nic", "lan,id=a,id=b", "--", "true"], "--nic lan,id=a,id=b: id= is given twice"),
        (["--nic", "lan,id=0", "--", "true"], "--nic lan,id=0: 0 is no id: a letter, then"),
        (["--nic", "lan,queues=0", "--", "true"], "--nic lan,queues=0: queues= is a number from"),
        (["--nic", "lan,queues=65", "--", "true"], "--nic lan,queues=65: queues= is a number"),
        (["--nic", "lan,queues=1\n", "--", "true"], "--nic 'lan,queues=1\\n': queues= is a number"),
        (["--nic", "lan", "--nic", "lan,id=net0", "--", "true"], "two NICs have the id net0; "),
    ],
)
def test_usage_of_run(hooks: Hooks, words: list[str], text: str) -> None:
    done = hooks.run("pyqemu-ifctl", "run", *words)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith(f"pyqemu-ifctl: {text}")


def test_run_looks_for_the_program_before_it_asks_for_taps(hooks: Hooks) -> None:
    done = hooks.run("pyqemu-ifctl", "run", "--nic", "lan", "--", "/nowhere/qemu")
    assert done.returncode == 69
    assert done.stderr == (
        "pyqemu-ifctl: cannot run /nowhere/qemu: No such file or directory; give QEMU's program "
        "after --, such as qemu-system-x86_64\n"
    )


def test_run_says_that_a_program_cannot_be_started(hooks: Hooks, script: Script, pipe: int) -> None:
    script([(b">tap0", [pipe]), said("=0")])
    broken = hooks.folder / "broken"
    broken.write_text("#!/nowhere/interpreter\n")
    broken.chmod(0o755)
    done = hooks.run("pyqemu-ifctl", "run", "--nic", "lan", "--", str(broken))
    assert done.returncode == 69
    assert done.stderr.startswith(f"pyqemu-ifctl: cannot run {broken}: No such file")


def test_the_helper_imports_nothing_heavy() -> None:
    code = (
        f"import sys; sys.path[:0] = {list(Hooks.roots)!r}\n"
        "before = set(sys.modules)\n"
        "import pyqemu_ifd.bridge_helper\n"
        "print(*sorted(name for name in set(sys.modules) - before\n"
        "              if getattr(sys.modules[name], '__file__', '').endswith('.py')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= {
        "__future__", "pyqemu_ifconf", "pyqemu_ifconf.shell", "pyqemu_ifd",
        "pyqemu_ifd.bridge_helper", "pyqemu_ifd.thin", "pyqemu_ifup", "pyqemu_ifup.agent",
        "pyqemu_ifup.tap_client",
        "pyqemu_ifup.wire",
    }  # fmt: skip
