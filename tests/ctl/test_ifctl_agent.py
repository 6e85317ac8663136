"""pyqemu-ifctl agent, and what status says of an agent: by scripted agents, and the real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.hooks import SOURCE_ROOTS, Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.public import as_user, public_folder, publish

REQUEST = b"pyqemu-ifup/1\0agent"
UTC = {"TZ": "UTC0"}

NEW = {
    "version": 1,
    "release": "0.1.0",
    "pid": 17,
    "outdated": False,
    "uptime": 7.9,
    "connections": 1,
    "refused": 0,
    "requests": {},
    "policy": {"files": ["/etc/pyqemu-ifup/policy.yaml"], "loaded": 86400.5, "error": None},
    "databases": [],
    "last_error": None,
    "last_error_at": None,
}
OLD = {
    "version": 1,
    "release": None,
    "pid": 123456,
    "outdated": False,
    "uptime": 273907.2,
    "connections": 3,
    "refused": 12,
    "requests": {
        "down": {"count": 1, "failed": 0, "median": 2.5, "p99": 2.5},
        "up": {"count": 1234567, "failed": 89, "median": 4.04, "p99": 1203.96},
    },
    "policy": {
        "files": [f"/etc/pyqemu-ifup/policy.d/{name}.yaml" for name in ("10-lan", "20-dmz")],
        "loaded": 86400.5,
        "error": "policy invalid: /etc/pyqemu-ifup/policy.d/20-dmz.yaml:4:1: the policy has no "
        "key x; run pyqemu-ifctl check",
    },
    "databases": [
        {"ovsdb": "unix:/run/openvswitch/db.sock", "connected": True},
        {"ovsdb": "tcp:127.0.0.1:6640", "connected": False},
    ],
    "last_error": "web0: br0 is not there: \x1b[2J",
    "last_error_at": 86461.0,
}
BLANK = {
    **NEW,
    "requests": {"agent": {"count": 1, "failed": 0, "median": 0.1, "p99": 0.1}},
    "policy": {"files": None, "loaded": None, "error": "there is no policy on this host"},
}

TEXTS = [
    (
        "new",
        NEW,
        """\
socket        SOCKET
version       0.1.0, process 17
uptime        0:00:07
connections   1
policy        /etc/pyqemu-ifup/policy.yaml
loaded        1970-01-02 00:00:00
requests      none yet
""",
    ),
    (
        "old",
        OLD,
        """\
socket        SOCKET
version       not known, process 123456
uptime        3 days 4:05:07
connections   3 (12 more connections refused so far)
policy        /etc/pyqemu-ifup/policy.d/10-lan.yaml,
              /etc/pyqemu-ifup/policy.d/20-dmz.yaml
loaded        1970-01-02 00:00:00, in force until the error is mended
policy error  policy invalid: /etc/pyqemu-ifup/policy.d/20-dmz.yaml:4:1: the
              policy has no key x; run pyqemu-ifctl check
database      unix:/run/openvswitch/db.sock, connected
database      tcp:127.0.0.1:6640, not connected
last error    1970-01-02 00:01:01 web0: br0 is not there: \\x1b[2J

REQUESTS  COUNT    FAILED  MEDIAN  P99
down      1        0       2.5 ms  2.5 ms
up        1234567  89      4.0 ms  1204.0 ms
""",
    ),
    (
        "no policy",
        BLANK,
        """\
socket        SOCKET
version       0.1.0, process 17
uptime        0:00:07
connections   1
policy        none
policy error  there is no policy on this host

REQUESTS  COUNT  FAILED  MEDIAN  P99
agent     1      0       0.1 ms  0.1 ms
""",
    ),
]


@pytest.fixture
def hooks(tmp_path: Path) -> Hooks:
    # NOTE: not in the test's folder: the path of a Unix socket has at most 107 bytes.
    return Hooks(tmp_path / "hooks", agent=f"/tmp/ifctl-agent-{os.getpid()}.sock", env=UTC)


@contextmanager
def listening(path: str, kind: int = socket.SOCK_SEQPACKET) -> Iterator[socket.socket]:
    """Yield a socket that listens at `path` while the block runs."""
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(path)
        try:
            listener.listen(1)
            yield listener
        finally:
            os.unlink(path)


@contextmanager
def agent(path: str, *packets: bytes) -> Iterator[list[bytes]]:
    """Answer one request at `path` with `packets` and hang up; yield a list for the request."""
    heard: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            heard.append(connection.recv(65536))
            for packet in packets:
                connection.send(packet)

    with listening(path) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield heard
        thread.join(30)


def told(values: object) -> tuple[bytes, ...]:
    """Return the packets in which an agent tells `values`, in two parts."""
    data = json.dumps(values).encode()
    return b"!10", b"+" + data[:50], b"+" + data[50:], b"=0"


@pytest.mark.parametrize(("name", "values", "text"), TEXTS, ids=[row[0] for row in TEXTS])
def test_text(hooks: Hooks, name: str, values: object, text: str) -> None:
    with agent(hooks.agent, *told(values)) as heard:
        done = hooks.ctl("agent")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == text.replace("SOCKET", hooks.agent)
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert heard == [REQUEST]


@pytest.mark.parametrize(("name", "values", "text"), TEXTS, ids=[row[0] for row in TEXTS])
def test_json(hooks: Hooks, name: str, values: object, text: str) -> None:
    with agent(hooks.agent, *told(values)):
        done = hooks.ctl("agent", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert isinstance(values, dict)
    assert json.loads(done.stdout) == {**values, "users": None}
    assert done.stdout.startswith('{\n  "version": 1,\n')


OLDER = (
    "pyqemu-ifctl: the agent at SOCKET is older than what is installed; restart it: systemctl "
    "restart pyqemu-ifd; nothing is lost by that\n"
)


def test_an_agent_of_an_earlier_version(hooks: Hooks) -> None:
    """It does not tell of its version, nor whether it is older than what is installed."""
    values = {key: value for key, value in NEW.items() if key not in ("release", "pid", "outdated")}
    with agent(hooks.agent, *told(values)):
        done = hooks.ctl("agent")
    assert done.returncode == 0 and "\nversion       not known, process not known\n" in done.stdout
    assert done.stderr == OLDER.replace("SOCKET", hooks.agent)


AGAIN = "restart it: systemctl restart pyqemu-ifd"
OTHER = "what listens at SOCKET is no agent of this version"
UNCLEAR = f"{OTHER}: what it says of itself is not to be understood; {AGAIN}"
GONE = "the agent at SOCKET has hung up: it has ended, or has too many connections; try again"
ANSWERS: list[tuple[str, Sequence[bytes], int, str]] = [
    ("hangs up", (), 75, GONE),
    ("ends in the middle", (b"+{}",), 75, GONE),
    (
        "another version",
        (b"?another version of the wire",),
        71,
        f"{OTHER}: another version of the wire; {AGAIN}",
    ),
    (
        "a refusal",
        (b"-pyqemu-ifd: not a request", b"=64"),
        71,
        f"{OTHER}: pyqemu-ifd: not a request; {AGAIN}",
    ),
    ("a bare refusal", (b"=70",), 71, f"{OTHER}: its answer is not to be understood; {AGAIN}"),
    ("an unknown packet", (b"hello",), 71, f"{OTHER}: its answer is not to be understood; {AGAIN}"),
    ("no data", (b"=0",), 71, UNCLEAR),
    ("no JSON", (b"+{", b"=0"), 71, UNCLEAR),
    ("no object", (b"+[]", b"=0"), 71, UNCLEAR),
    ("bytes", (b"+\xff", b"=0"), 71, UNCLEAR),
    ("a later form", told({**NEW, "version": 2}), 71, UNCLEAR),
    ("less", told({"version": 1}), 71, UNCLEAR),
    ("other types", told({**NEW, "policy": 3}), 71, UNCLEAR),
]


@pytest.mark.parametrize(
    ("name", "packets", "status", "line"), ANSWERS, ids=[row[0] for row in ANSWERS]
)
def test_what_is_no_answer(
    hooks: Hooks, name: str, packets: Sequence[bytes], status: int, line: str
) -> None:
    with agent(hooks.agent, *packets):
        done = hooks.ctl("agent")
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == f"pyqemu-ifctl: {line.replace('SOCKET', hooks.agent)}\n"


START = "start it: systemctl start pyqemu-ifd, or pyqemu-ifd; the hooks do without"


def test_no_agent(hooks: Hooks) -> None:
    done = hooks.ctl("agent")
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == (
        f"pyqemu-ifctl: no agent listens at {hooks.agent}: No such file or directory; {START}\n"
    )


def test_an_agent_that_has_died(hooks: Hooks) -> None:
    path = hooks.agent
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
    try:
        done = hooks.ctl("agent")
    finally:
        os.unlink(path)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == (
        f"pyqemu-ifctl: no agent listens at {path}: Connection refused; {START}\n"
    )


def test_no_agent_is_wanted(hooks: Hooks) -> None:
    done = hooks.ctl("agent", PYQEMU_IFUP_SOCKET="")
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == (
        "pyqemu-ifctl: there is no agent: PYQEMU_IFUP_SOCKET is empty; "
        "unset it for the one at /run/pyqemu-ifup/agent.sock\n"
    )


def test_a_path_that_is_too_long(hooks: Hooks) -> None:
    path = "/tmp/" + "x" * 120
    done = hooks.ctl("agent", PYQEMU_IFUP_SOCKET=path)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == (
        f"pyqemu-ifctl: no agent listens at {path}: AF_UNIX path too long; {START}\n"
    )


def test_a_socket_of_another_type(hooks: Hooks) -> None:
    with listening(hooks.agent, socket.SOCK_STREAM):
        done = hooks.ctl("agent")
    assert (done.returncode, done.stdout) == (71, "")
    line = f"{OTHER}: its socket is of another type; {AGAIN}"
    assert done.stderr == f"pyqemu-ifctl: {line.replace('SOCKET', hooks.agent)}\n"


def test_a_socket_that_is_not_for_everyone(hooks: Hooks) -> None:
    require("root")
    with public_folder() as folder, listening(hooks.agent):
        os.chmod(hooks.agent, 0o600)
        theirs = publish(hooks, folder)
        done = subprocess.run(
            [*as_user(12345), str(theirs.folder / "pyqemu-ifctl"), "agent"],
            env=theirs.environ(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr == (
        f"pyqemu-ifctl: cannot connect to {hooks.agent}: Permission denied; "
        "ask who runs the agent\n"
    )


def fill(path: str) -> list[socket.socket]:
    """Connect to `path` until its queue is full; return the connections."""
    made = []
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.append(connection)
        connection.setblocking(False)
        try:
            connection.connect(path)
        except BlockingIOError:
            return made


MUTE = (
    "pyqemu-ifctl: the agent at SOCKET does not answer: waited 2.5 s; try again, or restart it: "
    "systemctl restart pyqemu-ifd; nothing is lost by that\n"
)


@pytest.mark.parametrize("occupy", [lambda path: [], fill], ids=["accepts", "full"])
def test_a_mute_agent(hooks: Hooks, occupy: Callable[[str], list[socket.socket]]) -> None:
    with listening(hooks.agent):
        held = occupy(hooks.agent)
        start = time.monotonic()
        done = hooks.ctl("agent")
        took = time.monotonic() - start
        for connection in held:
            connection.close()
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == MUTE.replace("SOCKET", hooks.agent)
    assert took < 4, "2.5 s, and a start"


POLICY = 'version: 1\nnetworks: {lan: {bridge: br0}}\nrules: [{tap: "*", network: lan}]\n'


@contextmanager
def real_agent(
    netns: Namespace, hooks: Hooks, roots: Sequence[str] = SOURCE_ROOTS
) -> Iterator[int]:
    """Run pyqemu-ifd in the namespace on the hooks' policy, from when it answers; yield its pid."""
    code = (
        f"import sys; sys.path[:0] = {list(roots)!r}\n"
        f"from pyqemu_ifd.main import main; raise SystemExit(main())\n"
    )
    words = ["--policy", str(hooks.policy), "--socket", hooks.agent]
    ready = f"{hooks.agent}.ready"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(ready)
        notified.settimeout(30)
        process = netns.popen(
            [sys.executable, "-I", "-c", code, *words],
            env={**os.environ, "NOTIFY_SOCKET": ready},
            stdout=None,
            stderr=None,
        )
        try:
            assert notified.recv(100) == b"READY=1"
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            os.unlink(ready)


def test_the_real_agent(netns: Namespace, hooks: Hooks) -> None:
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    netns.tap("t0")
    hooks.netns = netns.name
    hooks.write_policy(POLICY)
    with real_agent(netns, hooks):
        assert hooks.up("t0").returncode == 0
        assert hooks.up("t1").returncode == 71
        assert hooks.down("t0").returncode == 0
        told = hooks.ctl_json("agent")
        text = hooks.ctl("agent")
    netns.ip("link", "del", "dev", "br0")
    assert (text.returncode, text.stderr) == (0, "")
    assert {verb: (row["count"], row["failed"]) for verb, row in told["requests"].items()} == {
        "up": (2, 1),
        "down": (1, 0),
    }
    assert all(0 < row["median"] <= row["p99"] < 10000 for row in told["requests"].values())
    assert told["policy"]["files"] == [str(hooks.policy)]
    assert told["policy"]["error"] is None
    assert abs(told["last_error_at"] - time.time()) < 60
    assert told["last_error"].startswith("t1: ")
    lines = text.stdout.splitlines()
    assert lines[0] == f"socket        {hooks.agent}"
    assert [line.split()[:3] for line in lines[-3:]] == [
        ["REQUESTS", "COUNT", "FAILED"],
        ["down", "1", "0"],
        ["up", "2", "1"],
    ]


def test_an_agent_that_is_older_than_what_is_installed(
    netns: Namespace, hooks: Hooks, tmp_path: Path
) -> None:
    """Files are put in the place of those that it was started from, as dpkg and make do."""
    hooks.netns = netns.name
    hooks.write_policy(POLICY)
    copy = tmp_path / "ifd"
    shutil.copytree(SOURCE_ROOTS[-1], copy)
    with real_agent(netns, hooks, (*SOURCE_ROOTS[:-1], str(copy))) as pid:
        fresh = hooks.ctl_json("agent")
        for file in (copy / "pyqemu_ifd").glob("*.py"):
            shutil.copy2(file, f"{file}.new")
            os.replace(f"{file}.new", file)
        stale = hooks.ctl("agent")
        status = hooks.ctl("status")
        shutil.rmtree(copy)
        gone = hooks.ctl_json("agent")
    assert (fresh["pid"], fresh["outdated"], gone["outdated"]) == (pid, False, True)
    version = hooks.ctl("version").stdout.split()[1]
    assert f"\nversion       {version}, process {pid}\n" in stale.stdout
    assert (stale.returncode, status.returncode) == (0, 0)
    assert stale.stderr == status.stderr == OLDER.replace("SOCKET", hooks.agent)


def test_status_tells_of_a_broken_edit(netns: Namespace, hooks: Hooks) -> None:
    hooks.netns = netns.name
    hooks.write_policy(POLICY)
    error = f"{hooks.policy}:4:1: the policy has no key x"
    with real_agent(netns, hooks):
        done = hooks.ctl("status")
        assert (done.returncode, done.stdout, done.stderr) == (0, "no taps\n", "")
        hooks.write_policy(POLICY + "x: 1\n")
        end = time.monotonic() + 10
        while (found := hooks.ctl_json("agent")["policy"])["error"] is None:
            assert time.monotonic() < end, "the agent does not see the edit"
        done = hooks.ctl("status")
    assert (done.returncode, done.stdout) == (0, "no taps\n")
    first, second = done.stderr.splitlines()
    assert first.startswith(f"pyqemu-ifctl: what is wanted is not known: policy invalid: {error}")
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(found["loaded"]))
    assert second.startswith(
        f"pyqemu-ifctl: the agent keeps to the policy of {moment}: policy invalid: {error}"
    )


def test_a_mute_agent_keeps_status_from_nothing(netns: Namespace, hooks: Hooks) -> None:
    hooks.netns = netns.name
    hooks.write_policy(POLICY)
    with listening(hooks.agent):
        done = hooks.ctl("status")
    assert (done.returncode, done.stdout) == (0, "no taps\n")
    assert done.stderr == MUTE.replace("SOCKET", hooks.agent)
