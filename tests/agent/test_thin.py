"""The hooks as clients: real processes, and an agent at the other end that plays a given part."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import string
import subprocess
import sys
import syslog
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.hooks import Hooks
from lab.netns import Namespace
from lab.taps import Tap
from pyqemu_ifconf import names, shell
from pyqemu_ifconf.failure import Failure
from pyqemu_ifd import thin, wire
from pyqemu_ifup import agent, hook
from pyqemu_ifup.deadline import GRACE, Deadline

PATIENCE = 30.0
"""Seconds after which whatever does not happen fails its test."""
HERE = 42
"""How a hook ends that does the work itself: what stands for the rest tells what it has found."""

STAND_IN = """
import json, os, signal, sys
from pyqemu_ifup_tests import inherited_taps

def main():
    found = {
        "words": sys.argv,
        "taps": inherited_taps(),
        "handlers": [signal.getsignal(number) == 0 for number in (1, 2, 15)],
        "cwd": os.getcwd(),
    }
    os.write(2, json.dumps(found).encode())
    return 42
"""

TAPS = """
import fcntl, os

def inherited_taps():
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(fcntl.ioctl(int(number), 0x800454D2, bytes(40)).split(b"\\0")[0].decode())
        except OSError:
            continue
    return found
"""


@dataclass
class Agent:
    """A socket that plays `part` to the first who connects.

    Bytes are a packet; "ask" takes the request, "get" waits for it, "stop" waits for the client to
    shut down its side, "mute" for it to be gone; "on and on" says so until then. Then it hangs up.
    """

    path: str
    part: Sequence[str | bytes]
    requests: list[bytes] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Agent:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(self.path)
        self.listener.listen(8)
        self.over, self.nobody_comes = socket.socketpair()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.over.close()
        self.thread.join()
        self.nobody_comes.close()
        self.listener.close()

    def _serve(self) -> None:
        ready = select.select([self.listener, self.nobody_comes], [], [], PATIENCE)[0]
        if self.listener not in ready:
            return
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(PATIENCE)
            for step in self.part:
                if isinstance(step, bytes):
                    connection.send(step)
                elif step == "ask":
                    self._ask(connection)
                elif step == "stop":
                    assert connection.recv(100) == b""
                elif step == "on and on":
                    with pytest.raises((BrokenPipeError, ConnectionResetError)):
                        while True:
                            connection.send(b"-on and on")
                else:
                    poll = select.poll()
                    poll.register(connection, select.POLLIN if step == "get" else 0)
                    assert poll.poll(PATIENCE * 1000)

    def _ask(self, connection: socket.socket) -> None:
        request, descriptors, flags, _ = socket.recv_fds(connection, 5000, 4)
        assert not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
        self.requests.append(request)
        for descriptor in descriptors:
            self.places.append(place(descriptor))
            os.close(descriptor)
        self.asked.set()


def place(descriptor: int) -> str:
    """Tell what a descriptor is of: a tap, by its name, or a namespace, by its inode."""
    try:
        answer = fcntl.ioctl(descriptor, thin.TUNGETIFF, bytes(40))
    except OSError:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return answer[:16].partition(b"\0")[0].decode()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: the path of a socket has at most 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="thin-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def hooks(folder: Path) -> Hooks:
    """Hooks that ask at `agent`, and that tell on stderr what they find where they do not."""
    (ifd,) = (root for root in Hooks.roots if root.endswith("/ifd"))
    for package in ("pyqemu_ifup", "pyqemu_ifdown"):
        (folder / "here" / package).mkdir(parents=True)
        (folder / "here" / package / "main.py").write_text(STAND_IN)
    (folder / "here" / "pyqemu_ifup_tests.py").write_text(TAPS)
    here = str(folder / "here")
    return Hooks(folder / "hooks", agent=str(folder / "agent"), roots=(here, ifd))


def changed(hooks: Hooks, line: str) -> None:
    """Have pyqemu-ifup run `line` before it starts."""
    launcher = Path(hooks.ifup)
    text = launcher.read_text()
    assert text.count("\nposix._exit(") == 1
    launcher.write_text(text.replace("\nposix._exit(", f"\n{line}\nposix._exit("))


def start(
    hooks: Hooks,
    *words: str | bytes,
    program: str | None = None,
    pass_fds: Sequence[int] = (),
    before: Callable[[], object] | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a hook with `words`, its standard descriptors pipes; `before` runs in it first."""
    return subprocess.Popen(
        [program or hooks.ifup, *words],
        env={**hooks.environ(), **(env or {})},
        pass_fds=pass_fds,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=before,
    )


@dataclass(frozen=True)
class Ended:
    """How a hook ended."""

    status: int
    stderr: str

    @property
    def here(self) -> Any:
        """What the stand-in has found; raises where the work was not left to be done here."""
        assert self.status == HERE, self
        return json.loads(self.stderr[self.stderr.index("{") :])


def end(hook: subprocess.Popen[bytes]) -> Ended:
    """Wait for the end of a hook, which writes nothing to stdout."""
    try:
        stdout, stderr = hook.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        hook.kill()
        hook.communicate()
        raise
    assert stdout == b""
    return Ended(hook.returncode, stderr.decode())


def run(hooks: Hooks, part: Sequence[str | bytes], env: Mapping[str, str] | None = None) -> Ended:
    """Run pyqemu-ifup on web0 against an agent that plays `part`."""
    with Agent(hooks.agent, part):
        return end(start(hooks, "web0", env=env))


def test_what_stands_here_twice_is_the_same() -> None:
    assert thin.ROOT_SOCKET.decode() == agent.ROOT_SOCKET
    assert thin.USERS_SOCKET.decode() == agent.USERS_SOCKET
    assert thin.VERSION == wire.VERSION
    assert thin.TUNGETIFF == hook.TUNGETIFF
    assert thin.MARGIN > GRACE
    assert (thin.LINE_MAX, thin.PATIENCE) == (hook.LINE_MAX, hook.PATIENCE)
    assert thin.LOG_ERR == syslog.LOG_DAEMON | syslog.LOG_ERR
    assert set(thin.SIGNALS) == set(hook.STOP_SIGNALS)
    for number, name in thin.SIGNALS.items():
        assert signal.Signals(number).name == name


@given(st.text(st.characters() | st.sampled_from(string.printable + "\udc80"), max_size=17))
def test_a_name_is_valid_as_elsewhere(name: str) -> None:
    assert thin.is_valid_name(name) == names.is_valid_name(name)


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=15))
def test_a_name_is_quoted_as_elsewhere(name: str) -> None:
    assert thin.quote(name) == shell.quote(name)


REQUESTS: list[tuple[str, str | bytes, dict[str, str], bytes]] = [
    ("up", "pyqemu-ifup", {}, b"up\0web0\0\0"),
    ("up, told", "pyqemu-ifup", {"PYQEMU_IFUP_DEBUG": "1"}, b"up\0web0\0\0debug"),
    ("up, not told", "pyqemu-ifup", {"PYQEMU_IFUP_DEBUG": "yes"}, b"up\0web0\0\0"),
    ("an empty policy", "pyqemu-ifup", {"PYQEMU_IFUP_POLICY": ""}, b"up\0web0\0\0"),
    ("a network", "pyqemu-ifup@lan", {}, b"up\0web0\0lan\0"),
    ("a network told", "pyqemu-ifup@lan", {"PYQEMU_IFUP_DEBUG": "1"}, b"up\0web0\0lan\0debug"),
    ("two ats", "pyqemu-ifup@a@b", {}, b"up\0web0\0a@b\0"),
    ("no network", "pyqemu-ifup@", {}, b"up\0web0\0\0"),
    ("no UTF-8", b"pyqemu-ifup@\xff\xc3\xa9", {}, b"up\0web0\0\xff\xc3\xa9\0"),
    ("down", "pyqemu-ifdown", {}, b"down\0web0\0"),
    ("down, told", "pyqemu-ifdown", {"PYQEMU_IFUP_DEBUG": "1"}, b"down\0web0\0debug"),
    ("down of a network", "pyqemu-ifdown@lan", {}, b"down\0web0\0"),
]


@pytest.mark.parametrize(
    ("name", "program", "env", "request_"), REQUESTS, ids=[row[0] for row in REQUESTS]
)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_request(
    hooks: Hooks, name: str, program: str | bytes, env: dict[str, str], request_: bytes, locale: str
) -> None:
    path = os.path.join(os.fsencode(hooks.folder), os.fsencode(program))
    if not os.path.lexists(path):
        os.symlink(os.fsencode(program).partition(b"@")[0], path)
    with Agent(hooks.agent, ("ask", b"!10", b"=0")) as agent:
        hook = start(hooks, "web0", program=os.fsdecode(path), env={"LC_ALL": locale, **env})
        assert end(hook) == Ended(0, "")
    assert agent.requests == [b"pyqemu-ifup/1\0" + request_]
    assert agent.places == [os.readlink("/proc/self/ns/net")]
    if "an empty" not in name:
        verb, fields = wire.parse_request(agent.requests[0], 1), request_.split(b"\0")[1:]
        assert [os.fsencode(each) for each in verb.fields] == fields


LINE = b"-pyqemu-ifup: web0: denied: no rule matches"
ANSWERS: list[tuple[str, Sequence[str | bytes], int, str]] = [
    ("done", ("ask", b"!10", b"=0"), 0, ""),
    ("failed", ("ask", b"!10", LINE, b"=77"), 77, f"{LINE[1:].decode()}\n"),
    ("refused", ("ask", b"-not now", b"=64"), 64, "not now\n"),
    ("lines", ("ask", b"!10", b"-", b"-\xc3\xa9", b"-a", b"=0"), 0, "\n\u00e9\na\n"),
    ("a long line", ("ask", b"!10", b"-" + 60000 * b"x", b"=71"), 71, 2000 * "x" + "\n"),
    ("told twice how long", ("ask", b"!1", b"!300", b"=0"), 0, ""),
    ("before it has been asked", (b"!10", b"=0", "ask"), 0, ""),
    (
        "packets that are unknown",
        ("ask", b"!", b"!ten", b"!-1", b"=", b"=-1", b"=0x", b"+data", b">web0", b"\0", b"=0"),
        0,
        "",
    ),
]


@pytest.mark.parametrize(
    ("name", "part", "status", "stderr"), ANSWERS, ids=[row[0] for row in ANSWERS]
)
def test_answer(
    hooks: Hooks, name: str, part: Sequence[str | bytes], status: int, stderr: str
) -> None:
    assert run(hooks, part) == Ended(status, stderr)


DEATHS: list[tuple[str, Sequence[str | bytes], str]] = [
    ("not for this agent", ("ask", b"?another network namespace"), ""),
    ("not for it, as it finds later", ("ask", b"!10", b"-told", b"?another"), "told\n"),
    ("at once", (), ""),
    ("it does not read", (b"!10", b"-told", "get"), "told\n"),
    ("when it has read", ("ask",), ""),
    ("when it has begun", ("ask", b"!10"), ""),
    ("in the middle", ("ask", b"!10", b"-told"), "told\n"),
]


@pytest.mark.parametrize(("name", "part", "told"), DEATHS, ids=[row[0] for row in DEATHS])
@pytest.mark.parametrize("program", ["pyqemu-ifup", "pyqemu-ifdown"])
def test_an_agent_that_goes_leaves_the_work_to_the_hook(
    hooks: Hooks, name: str, part: Sequence[str | bytes], told: str, program: str
) -> None:
    path = str(hooks.folder / program)
    with Agent(hooks.agent, part):
        ended = end(start(hooks, "web0", program=path))
    assert ended.here["words"] == [path, "web0"]
    assert ended.here["handlers"] == [True, True, True]
    assert ended.stderr.startswith(told + "{")


NOT_ASKED: list[tuple[str, tuple[str | bytes, ...], dict[str, str]]] = [
    ("no argument", (), {}),
    ("two arguments", ("web0", "web1"), {}),
    ("no name", ("",), {}),
    ("too long", ("x" * 16,), {}),
    ("a slash", ("a/b",), {}),
    ("two dots", ("..",), {}),
    ("a blank", ("a b",), {}),
    ("not ASCII", ("\u00e9",), {}),
    ("not UTF-8", (b"\xff",), {}),
    ("a policy of its own", ("web0",), {"PYQEMU_IFUP_POLICY": "policy.yaml"}),
    ("told that there is none", ("web0",), {"PYQEMU_IFUP_SOCKET": ""}),
]


@pytest.mark.parametrize(("name", "words", "env"), NOT_ASKED, ids=[row[0] for row in NOT_ASKED])
def test_it_is_not_asked(
    hooks: Hooks, name: str, words: tuple[str | bytes, ...], env: dict[str, str]
) -> None:
    with Agent(hooks.agent, ("ask", b"=0")) as agent:
        ended = end(start(hooks, *words, env=env))
    assert not agent.requests
    assert ended.here["words"] == [hooks.ifup, *map(os.fsdecode, words)]
    assert ended.here["cwd"] == os.getcwd(), "a relative name of a policy is to be found"


def test_a_name_that_begins_with_a_dash_is_a_name(hooks: Hooks) -> None:
    with Agent(hooks.agent, ("ask", b"=0")) as agent:
        assert end(start(hooks, "--help")) == Ended(0, "")
    assert agent.requests == [b"pyqemu-ifup/1\0up\0--help\0\0"]


def listening(path: str, kind: socket.SocketKind, backlog: int) -> socket.socket:
    """Return a socket of another kind, or one with which nobody ever speaks."""
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(path)
    made.listen(backlog)
    return made


@pytest.mark.parametrize(
    "what",
    ["nothing", "a file", "nobody", "a stream", "a full queue", "a long path", "below a file"],
)
def test_without_an_agent_the_hook_does_the_work(hooks: Hooks, what: str) -> None:
    path = hooks.agent
    held: list[socket.socket] = []
    if what in ("a file", "below a file"):
        Path(path).write_text("")
        path += "/agent" if what == "below a file" else ""
    elif what == "nobody":
        listening(path, socket.SOCK_SEQPACKET, 1).close()
    elif what == "a stream":
        held.append(listening(path, socket.SOCK_STREAM, 1))
    elif what == "a full queue":
        held.append(listening(path, socket.SOCK_SEQPACKET, 0))
        held.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        held[-1].connect(path)
    elif what == "a long path":
        path = "/" + 200 * "x"
    try:
        ended = end(start(hooks, "web0", env={"PYQEMU_IFUP_SOCKET": path}))
        assert ended.here["words"][1:] == ["web0"]
    finally:
        for each in held:
            each.close()


def test_the_folder_of_the_caller_is_where_a_relative_socket_is(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(hooks.agent).parent)
    assert run(hooks, ("ask", b"=3"), {"PYQEMU_IFUP_SOCKET": "agent"}).status == 3


MUTE = "pyqemu-ifup: web0: the agent does not answer: waited {} s; see pyqemu-ifctl agent\n"


@pytest.mark.parametrize("part", [("mute",), ("ask", "mute"), ("ask", b"-told", "mute")])
def test_an_agent_that_never_begins(hooks: Hooks, part: Sequence[str | bytes]) -> None:
    """The hook hangs up, and does the work itself."""
    changed(hooks, "thin['ACCEPT'] = 0.5")
    ended = run(hooks, part)
    assert ended.here["words"] == [hooks.ifup, "web0"]
    assert ended.here["handlers"] == [True, True, True]
    assert ended.stderr.startswith("told\n{" if b"-told" in part else "{")


def test_an_agent_that_hangs(hooks: Hooks) -> None:
    assert run(hooks, ("ask", b"!1", b"-told", "mute")) == Ended(75, "told\n" + MUTE.format("4"))


def test_an_agent_that_never_ends(hooks: Hooks) -> None:
    changed(hooks, "thin['MARGIN'] = 0.3")
    ended = run(hooks, ("ask", b"!0", "on and on"))
    assert ended.status == 75
    assert ended.stderr.startswith("on and on\non and on\n")
    assert ended.stderr.endswith(MUTE.format("0.3"))


STOPPED = b"-pyqemu-ifup: web0: stopped: the client has hung up; nothing is left of it"
STOPS: list[tuple[str, Sequence[str | bytes], int, str]] = [
    ("taken back", ("ask", b"!10", "stop", STOPPED, b"=75"), 75, "nothing is left of it"),
    ("taken back, not told", ("ask", b"!10", "stop", b"=75"), 75, "nothing is left of it"),
    ("before it began", ("ask", "stop", b"=75"), 75, "nothing is left of it"),
    ("not for this agent", ("ask", "stop", b"?another"), 75, "nothing is left of it"),
    ("done nevertheless", ("ask", b"!10", "stop", b"=0"), 0, ""),
    ("failed meanwhile", ("ask", b"!10", "stop", LINE, b"=77"), 77, LINE[1:].decode()),
    (
        "it goes too",
        ("ask", b"!10", "stop"),
        75,
        "the agent has ended, pyqemu-ifctl gc web0 removes what is left",
    ),
    (
        "it hangs",
        ("ask", b"!0", "stop", "mute"),
        75,
        "the agent does not answer, see pyqemu-ifctl agent",
    ),
]


@pytest.mark.parametrize(("name", "part", "status", "left"), STOPS, ids=[row[0] for row in STOPS])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_it(
    hooks: Hooks,
    name: str,
    part: Sequence[str | bytes],
    status: int,
    left: str,
    number: signal.Signals,
) -> None:
    changed(hooks, "thin['MARGIN'] = 1")
    with Agent(hooks.agent, part) as agent:
        # NOTE: blocked at first, as whoever calls may have it.
        hook = start(hooks, "web0", before=lambda: signal.pthread_sigmask(0, [number]))
        assert agent.asked.wait(PATIENCE)
        hook.send_signal(number)
        ended = end(hook)
    if status == 75:
        left = f"pyqemu-ifup: web0: stopped: received {number.name}; {left}"
    assert ended == Ended(status, f"{left}\n" if left else "")


def test_its_words_are_those_of_a_hook_without_an_agent() -> None:
    deadline = Deadline(10, lambda: "received SIGTERM")
    with pytest.raises(Failure) as caught:
        deadline.check()
    assert str(caught.value) == "stopped: received SIGTERM; nothing is left of it"


def test_the_end_of_its_parent_stops_it(hooks: Hooks) -> None:
    calls = f"import subprocess; subprocess.run([{hooks.ifup!r}, 'web0'])"
    with Agent(hooks.agent, ("ask", b"!10", "stop", STOPPED, b"=75")) as agent:
        parent = subprocess.Popen(
            [sys.executable, "-I", "-c", calls], env=hooks.environ(), stderr=subprocess.PIPE
        )
        assert agent.asked.wait(PATIENCE)
        parent.kill()
        _, stderr = parent.communicate(timeout=PATIENCE)
    assert stderr.decode() == (
        f"pyqemu-ifup: web0: stopped: the calling process {parent.pid} has ended;"
        " nothing is left of it\n"
    )


def wait_until_it_waits(hook: subprocess.Popen[bytes]) -> None:
    """Wait for the line of an agent that has let go of what it was passed."""
    assert hook.stderr is not None
    assert hook.stderr.readline() == b"waits\n"


def test_what_it_holds_while_it_waits(hooks: Hooks) -> None:
    read_end, write_end = os.pipe()
    with Agent(hooks.agent, ("ask", b"!10", b"-waits", "stop", b"=75")):
        hook = start(hooks, "web0", pass_fds=(read_end, write_end))
        wait_until_it_waits(hook)
        proc = f"/proc/{hook.pid}"
        held = {int(name): os.readlink(f"{proc}/fd/{name}") for name in os.listdir(f"{proc}/fd")}
        cwd = os.readlink(f"{proc}/cwd")
        status = dict(
            line.split(":\t", 1) for line in Path(f"{proc}/status").read_text().splitlines()
        )
        hook.terminate()
        end(hook)
    os.close(read_end)
    os.close(write_end)
    others = [path for number, path in held.items() if number > 2]
    assert held[0] == held[1] == "/dev/null"
    assert len(others) == 1 and others[0].startswith("socket:"), held
    assert (cwd, status["Umask"]) == ("/", "0077")
    assert int(status["SigIgn"], 16) >> (signal.SIGPIPE - 1) & 1
    assert int(status["SigBlk"], 16) == 0


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_closed_standard_descriptors(hooks: Hooks, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    with Agent(hooks.agent, ("ask", b"!10", b"-told", b"+data", b"=7")) as agent:
        assert end(start(hooks, "web0", before=close)).status == 7
    assert agent.places == [os.readlink("/proc/self/ns/net")]


def test_nobody_reads_what_it_says(hooks: Hooks) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with Agent(hooks.agent, ("ask", b"!10", b"-told", b"=7")):
        hook = start(hooks, "web0", before=lambda: os.dup2(write_end, 2))
        os.close(write_end)
        assert end(hook) == Ended(7, "")


@pytest.fixture
def inner(inside: Namespace, hooks: Hooks) -> Hooks:
    """Hooks in a network namespace of the test's own, in which the test is too."""
    return replace(hooks, netns=inside.name)


@pytest.mark.parametrize("others", [(), ("web1",), ("a0", "z0")], ids=str)
def test_it_passes_the_tap(inner: Hooks, others: tuple[str, ...]) -> None:
    """And holds none, of all that it was given: each goes with whom it belongs to."""
    with Tap("web0") as tap:
        more = [Tap(name) for name in others]
        fds = [each.fd for each in (*more, tap)]
        with Agent(inner.agent, ("ask", b"!10", b"-waits", "stop", b"=75")) as agent:
            hook = start(inner, "web0", pass_fds=fds)
            wait_until_it_waits(hook)
            for each in (*more, tap):
                each.close()
            assert not {name for _, name in socket.if_nameindex()} & {"web0", *others}
            hook.terminate()
            assert end(hook).status == 75
    assert agent.places == ["web0"]


def test_another_s_tap_is_left_to_be_told(inner: Hooks) -> None:
    with Tap("web1") as tap, Agent(inner.agent, ("ask", b"=0")) as agent:
        ended = end(start(inner, "web0", pass_fds=[tap.fd]))
    assert not agent.requests
    assert ended.here["taps"] == ["web1"]


def test_without_an_agent_the_tap_is_still_open(inner: Hooks) -> None:
    with Tap("web0") as tap:
        ended = end(start(inner, "web0", pass_fds=[tap.fd]))
    assert ended.here["taps"] == ["web0"]


def test_the_real_hook_does_the_work_of_an_agent_that_dies(inside: Namespace, folder: Path) -> None:
    plain = Hooks(folder / "hooks", netns=inside.name)
    plain.write_policy(
        "version: 1\nnetworks: {lan: {bridge: br0}}\nrules: [{tap: web0, network: lan}]\n"
    )
    asking = Hooks(folder / "asking", netns=inside.name, agent=str(folder / "agent"))
    inside.ip("link", "add", "br0", "up", "type", "bridge")
    try:
        with Tap("web0"):
            up = plain.up("web0")
            assert (up.returncode, up.stderr) == (0, "")
            assert inside.link("web0")["master"] == "br0"
            with Agent(asking.agent, ("ask", b"!10")) as agent:
                down = asking.down("web0")
            assert agent.requests
            assert (down.returncode, down.stderr) == (0, "")
            assert "master" not in inside.link("web0")
    finally:
        inside.ip("link", "del", "br0")


def test_it_loads_no_python(hooks: Hooks) -> None:
    """No module but the interpreter's C modules, beyond what a bare one has at its end."""
    changed(
        hooks,
        "import sys\n"
        "def tell():\n"
        "    posix.write(2, ' '.join(sorted(sys.modules)).encode())\n"
        "leave = posix._exit\n"
        "posix._exit = lambda status: (tell(), leave(status))",
    )
    ended = run(hooks, ("ask", b"!10", b"=0"))
    bare = subprocess.run(
        [sys.executable, "-IS", "-c", "import sys; print(*sorted(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    more = set(ended.stderr.split()) - set(bare.stdout.split())
    assert ended.status == 0
    assert more >= {"_socket", "fcntl"}
    assert more <= {"_socket", "fcntl", "errno", "posix", "time", "_signal"}
