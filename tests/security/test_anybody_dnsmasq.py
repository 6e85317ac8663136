"""What any local user, or a dnsmasq that a guest has taken over, can do by looking like ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lab.dns import servers
from lab.hooks import Hooks
from lab.needs import lack, require
from lab.netns import Namespace
from lab.public import NOBODY, as_user
from pyqemu_ifup.drivers import dnsmasq

NETWORK = {"bridge": "labbr0", "nat": {"ipv4": "192.168.76.1/24"}}
PRETENDERS = 15


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path, served: Callable[..., Hooks]) -> Hooks:
    require("dnsmasq")
    found = served(Hooks(tmp_path / "hooks", netns.name))
    rules = [{"tap": "*", "network": "lab"}]
    found.write_policy(json.dumps({"version": 1, "networks": {"lab": NETWORK}, "rules": rules}))
    return found


def folder(netns: Namespace) -> Path:
    return Path(f"/run/pyqemu-ifup/lab@{netns.inode}")


@contextmanager
def pretenders(netns: Namespace, uid: int, program: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Yield processes that a user has started, named dnsmasq, with what ours could be known by."""
    words = [f"--pid-file={folder(netns)}/dnsmasq.pid", f"--conf-file={folder(netns)}/dnsmasq.conf"]
    script = {
        # What it runs as is root; it asks for the password.
        "su": 'exec -a dnsmasq su -c "$1" root',
        "sh": 'exec -a dnsmasq sh -c "read line" "$@"',
    }[program]
    with ExitStack() as stack:
        made = []
        for _ in range(PRETENDERS):
            each = stack.enter_context(netns.popen(
                [*as_user(uid), "bash", "-c", script, "bash", *words], stdin=subprocess.PIPE,
            ))  # fmt: skip
            stack.callback(each.kill)
            made.append(each)
        end = time.monotonic() + 20
        for each in made:
            line = Path(f"/proc/{each.pid}/cmdline")
            while not line.read_bytes().startswith(b"dnsmasq\0"):
                assert time.monotonic() < end and each.poll() is None, each.communicate()
                time.sleep(0.01)
        yield made


@pytest.mark.parametrize("program", ["su", "sh"])
def test_processes_under_its_name_delay_nothing_and_are_left_alone(
    hooks: Hooks, netns: Namespace, program: str
) -> None:
    """As root by su, and as the very user that dnsmasq runs as."""
    if program == "su" and not os.access(shutil.which("su") or "", os.X_OK):
        lack("no su")
    uid = NOBODY if program == "su" else dnsmasq.account().uid
    for name in ("web0", "web1"):
        netns.tap(name)
    with pretenders(netns, uid, program) as made:
        if program == "su":
            assert {os.stat(f"/proc/{each.pid}").st_uid for each in made} == {0}
        assert (hooks.up("web0").returncode, hooks.up("web1").returncode) == (0, 0)
        (server,) = set(servers(netns)) - {each.pid for each in made}
        dry = hooks.ctl("apply", "--dry-run")
        assert dry.returncode == 0 and "dnsmasq" not in dry.stdout
        assert (hooks.down("web0").returncode, hooks.down("web1").returncode) == (0, 0)
        assert "labbr0" not in netns.links() and server not in servers(netns)
        assert [each.poll() for each in made] == [None] * PRETENDERS
    assert hooks.ctl("gc").stdout == "nothing to remove\n"
    netns.close_kept()


@pytest.mark.alone("the agent goes the same way")
def test_what_dnsmasq_s_user_writes_decides_nothing(hooks: Hooks, netns: Namespace) -> None:
    """In its pid file, which dnsmasq gives to its user: a process of root's."""
    netns.tap("web0")
    assert hooks.up("web0").returncode == 0
    ours = folder(netns)
    victim = netns.popen(["sleep", "infinity"])
    try:
        user = as_user(dnsmasq.account().uid)
        for path in ours.iterdir():
            netns.run(
                [*user, "sh", "-c", 'echo "$1" >"$2"', "sh", str(victim.pid), path], check=False
            )
        written = {path.name for path in ours.iterdir() if path.read_text() == f"{victim.pid}\n"}
        assert written <= {dnsmasq.READY}
        assert hooks.down("web0").returncode == 0
        assert victim.poll() is None and not servers(netns)
    finally:
        victim.kill()
        victim.communicate()
    netns.close_kept()


@pytest.mark.alone("the agent goes the same way")
def test_what_cannot_be_told_is_told(hooks: Hooks, netns: Namespace) -> None:
    """A record that is broken, and one of another PID namespace: no second dnsmasq is started."""
    netns.tap("web0"), netns.tap("web1")
    assert hooks.up("web0").returncode == 0
    running = servers(netns)
    record = folder(netns) / dnsmasq.RECORD
    kept = record.read_text()
    pid, start, _ = kept.split()
    for text in ("1\n", f"{pid} {start} 1\n"):
        record.write_text(text)
        done = hooks.up("web1")
        assert done.returncode == 71
        assert f"cannot tell whether the dnsmasq of {record} runs: " in done.stderr
        assert servers(netns) == running
    record.write_text(kept)
    assert hooks.up("web1").returncode == 0
    assert servers(netns) == running
    assert (hooks.down("web0").returncode, hooks.down("web1").returncode) == (0, 0)
    assert not servers(netns)
    netns.close_kept()


@pytest.mark.alone("the agent goes the same way")
def test_a_process_that_has_its_number_by_now_is_not_it(hooks: Hooks, netns: Namespace) -> None:
    netns.tap("web0"), netns.tap("web1")
    assert hooks.up("web0").returncode == 0
    (server,) = servers(netns)
    victim = netns.popen(["sleep", "infinity"])
    record = folder(netns) / dnsmasq.RECORD
    _, start, namespace = record.read_text().split()
    os.kill(server, 9)
    record.write_text(f"{victim.pid} {start} {namespace}\n")
    try:
        assert hooks.up("web1").returncode == 0
        (another,) = servers(netns)
        assert another != server
        assert (hooks.down("web0").returncode, hooks.down("web1").returncode) == (0, 0)
        assert victim.poll() is None and not servers(netns)
    finally:
        victim.kill()
        victim.communicate()
    netns.close_kept()
