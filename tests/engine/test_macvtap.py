"""Macvtaps as `pyqemu-ifctl run` gives them: what passes, what is refused, and what is left."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab import boot
from lab.agent import Agent
from lab.hooks import SOURCE_ROOTS, Hooks
from lab.macvtap import CASES, OWN, PEER, Case, Macvtap, arriving, given
from lab.needs import lack, require
from lab.netns import Namespace
from lab.qemu import Qemu
from lab.taps import BROADCAST, holds
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import nic_port
from pyqemu_ifd.reconcile import DELAY
from pyqemu_ifup import kinds, tap_request
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers import nft
from pyqemu_ifup.drivers.nft_rules import Chain
from pyqemu_ifup.guards.nft import link_chains
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds import macvtap as kind
from pyqemu_ifup.look import FRESH, Link
from pyqemu_ifup.ops import DelTap, Op, SetAlias
from pyqemu_ifup.system.holders import Held, take_descriptor

NOBODY = 65534
MAC = OWN.hex(":")
WEB = f"vms:\n  web1:\n    nics:\n      - {{network: dmz, mac: '{MAC}'}}\n"
HOLD = ("/bin/sh", "-c", "echo held; read line")
"""A program that holds what it is given until its standard input ends."""


class Site:
    """A namespace with a wire between v0 and v1, and the programs in it."""

    def __init__(self, netns: Namespace, hooks: Hooks) -> None:
        self.netns = netns
        self.hooks = hooks

    def lay(self) -> None:
        """Make the wire, to go at the test's end with all that is ours."""
        lines = ("link add v0 up type veth peer name v1", "link set v1 up")
        self.netns.run(["ip", "-batch", "-"], input="\n".join(lines))
        self.netns.kept.callback(self.clean)

    def write(self, network: str = "parent: v0", rest: str = WEB) -> None:
        if not self.hooks.policy.exists():
            self.lay()
        self.hooks.write_policy(f"version: 1\nnetworks:\n  dmz: {{{network}}}\n{rest}")

    def argv(self, *command: str) -> list[str]:
        return self.hooks.argv("pyqemu-ifctl", "run", "web1", "--", *command)

    @contextmanager
    def held(self, *command: str, prefix: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
        """A guest's process that has its macvtap for as long as the block lasts."""
        with subprocess.Popen(
            [*prefix, *self.argv(*(command or HOLD))],
            env=self.hooks.environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None and process.stderr is not None
                assert process.stdout.readline() == "held\n", process.stderr.read()
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def queue(self, pid: int, name: str = "web1-0") -> Macvtap:
        """Return a copy of the queue that a process holds, as its guest uses it."""
        index = self.netns.link(name)["ifindex"]
        folder = Path(f"/proc/{pid}/fd")
        number = next(
            int(each.name) for each in folder.iterdir() if os.readlink(each) == f"/dev/tap{index}"
        )
        return Macvtap.held(name, take_descriptor(Held(pid, number, name)))

    def left(self) -> tuple[list[str], str]:
        """Return the links that are there beside the wire, and all rules of nftables."""
        links = sorted(self.netns.links().keys() - {"lo", "v0", "v1"})
        return links, self.netns.run(["nft", "list", "ruleset"]).stdout

    def clean(self) -> None:
        """Take away all that a test may have left."""
        self.hooks.ctl("gc")
        for name in ("v1", "br0", "web1-0"):
            self.netns.run(["ip", "link", "del", name], check=False)

    def row(self) -> Any:
        (row,) = self.hooks.ctl_json("status")["taps"]
        return row


@pytest.fixture
def site(netns: Namespace) -> Iterator[Site]:
    """A namespace whose programs users run too."""
    require("macvtap", "netdev-chains")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Site(netns, Hooks(Path(folder) / "hooks", netns.name))


def test_a_guest_gets_packets_through(site: Site) -> None:
    require("qemu")
    reason = boot.setup()
    if reason is not None:
        lack(reason)
    site.write()
    site.netns.ip("address", "add", "10.9.0.1/24", "dev", "v1")
    with boot.Console() as console:
        guest = boot.guest_arguments(console, ip="10.9.0.2/24", ping="10.9.0.1", count=3, hold=True)
        with Qemu(*guest, machine="pc", env=site.hooks.environ(), prefix=site.argv()) as qemu:
            assert console.wait("ping") == "ping 10.9.0.1 answered"
            assert "3 packets received" in console.wait("3 packets")
            assert site.row()["state"] == "ok"
            assert qemu.quit() == 0
    assert "removed web1-0 from v0" in site.hooks.ctl("gc").stdout
    assert site.left() == ([], "")


VARIANTS = [
    ("", {"kernel", "macs", "tags"}),
    (", macs: none", {"kernel", "tags"}),
    (", vlan: any", {"kernel", "macs"}),
    (", vlan: any, macs: none", {"kernel"}),
]


@pytest.mark.parametrize(("settings", "filters"), VARIANTS, ids=[row[0] for row in VARIANTS])
def test_frames_are_judged_as_the_policy_says(settings: str, filters: set[str], site: Site) -> None:
    site.write(f"parent: v0{settings}")
    with site.held() as process, site.queue(process.pid) as macvtap:
        found = arriving(macvtap, site.netns.raw("v1"))
        assert found == {case.name for case in CASES if not case.stopped_by & filters}
        # The guest has another MAC by now, as it may give itself one.
        differences = [each["setting"] for each in site.row()["differences"]]
        assert differences == ["mac"]


NEEDS_CSUM = 1


def test_no_checksum_is_written_where_the_filters_look(site: Site) -> None:
    """By the header of a frame its sender says where the kernel is to put a checksum."""
    site.write()
    with site.held() as process, site.queue(process.pid) as macvtap:
        wire = site.netns.raw("v1")
        assert macvtap.has_header() == kind.is_safe(os.uname().release)
        for start in range(0, 40, 2):
            case = Case(True, OWN, BROADCAST, "untagged")
            header = struct.pack("<BBHHHH", NEEDS_CSUM, 0, 0, 0, start, 0)
            if macvtap.has_header():
                try:
                    os.write(macvtap.fd, header + case.frame)
                except OSError:
                    # The kernel takes no such header.
                    assert start < 40
            else:
                macvtap.send(case.frame)
            seen = wire.recv(0.05, holds(case.token))
            assert seen is None or seen[:14] == case.frame[:14], start


@pytest.mark.parametrize(
    ("release", "safe"),
    [
        ("6.12.0", True),
        ("6.18.44-fc-v509", True),
        ("7.0-rc1", True),
        ("6.11.11", False),
        ("6.1.0-56-amd64", False),
        ("5.10.0", False),
        ("strange", False),
        ("6", False),
    ],
)
def test_which_kernels_write_checksums_safely(release: str, safe: bool) -> None:
    assert kind.is_safe(release) == safe


REFUSED: list[tuple[str, str, int, str]] = [
    # What is done before, the network, the status, and what is said.
    ("link set v0 name v9", "", 69, "there is no interface v0"),
    ("link set v0 down", "", 71, "v0 is down"),
    ("link add br0 type bridge\nlink set v0 master br0", "", 77, "v0 is a port of br0"),
    ("", ", mtu: 9000", 71, "web1-0 is to have an MTU of 9000, and v0 has 1500"),
    ("address add 192.0.2.1/24 dev v0", ", mode: passthru", 77, "it has an address"),
    ("link add link v0 name m0 type macvtap", ", mode: passthru", 77, "m0 is on it"),
    (
        "link add web1-0 type veth peer name web1-1",
        "",
        77,
        "an interface of this name is there already",
    ),
    (
        f"link add link v0 name m0 address {MAC} type macvtap mode bridge\nlink set m0 up",
        "",
        77,
        "has its MAC",
    ),
    (
        "link set v0 name v9\nlink add link v9 name v0 type macvtap",
        "",
        71,
        "v0 is a macvtap itself",
    ),
]


@pytest.mark.parametrize(
    ("before", "settings", "status", "said"), REFUSED, ids=[row[3] for row in REFUSED]
)
def test_what_is_refused_leaves_nothing(
    before: str, settings: str, status: int, said: str, site: Site
) -> None:
    site.write(f"parent: v0{settings}")
    site.netns.run(["ip", "-batch", "-"], input=before)
    links = site.netns.links().keys()
    done = site.hooks.run("pyqemu-ifctl", "run", "web1", "--", "true")
    assert (done.returncode, said in done.stderr) == (status, True), done.stderr
    assert site.netns.links().keys() == links
    assert site.left()[1] == ""


def test_doctor_tells_of_a_parent_that_is_down(site: Site) -> None:
    site.write()
    assert site.hooks.ctl("doctor", "parent").stdout.startswith("nothing")
    site.netns.ip("link", "set", "v0", "down")
    (finding,) = site.hooks.ctl_json("doctor", "parent")["findings"]
    assert finding["what"] == "v0 is down: it passes no frame"
    site.netns.run(["sh", "-c", finding["do"].removeprefix("bring it up: ")])
    assert site.hooks.ctl_json("doctor", "parent")["findings"] == []


def test_qemu_cannot_open_it_itself(site: Site) -> None:
    site.write()
    done = site.hooks.ctl("args", "web1")
    assert done.returncode == 71 and "start the guest with pyqemu-ifctl run web1" in done.stderr
    with site.netns.enter():
        tap = site.netns.tap("web1-0")
    done = site.hooks.up("web1-0")
    assert (
        done.returncode == 71 and "is a tap, which cannot be plugged in network dmz" in done.stderr
    )
    tap.close()
    done = site.hooks.run("pyqemu-ifctl", "run", "--nic", "dmz", "--", "true")
    assert done.returncode == 71 and "the MAC of the guest's device is not known" in done.stderr


def test_a_nic_by_its_network_has_the_mac_that_is_given(site: Site) -> None:
    site.write(rest="")
    run = site.hooks.argv("pyqemu-ifctl", "run", "--nic", f"dmz,queues=3,mac={MAC.upper()}", "--")
    look = "echo $2; ip -br link show tap0; ls -l /proc/self/fd | grep -c tap"
    done = subprocess.run(
        [*run, "/bin/sh", "-c", look, "sh"],
        env=site.hooks.environ(),
        capture_output=True,
        text=True,
        check=True,
    )
    netdev, link, count = done.stdout.splitlines()
    assert re.fullmatch("tap,id=net0,fds=[0-9]+:[0-9]+:[0-9]+", netdev.partition(",vhost")[0])
    assert MAC in link and count == "3"


def test_what_explain_prints_makes_the_same(site: Site) -> None:
    site.write("parent: v0, mtu: 1400, txqueuelen: 77")

    def look() -> tuple[Any, str]:
        link = site.netns.link("web1-0")
        for key in ("ifindex", "ifalias", "stats64", "link_index"):
            link.pop(key, None)
        rules = re.sub(r"\bt\d+|sum=\w+", "", site.left()[1])
        return link, rules

    said = site.hooks.ctl_json("explain", "web1-0")
    site.netns.run(["/bin/sh", "-ec", "\n".join(said["commands"])])
    by_hand = look()
    site.netns.ip("link", "del", "web1-0")
    site.netns.run(["nft", "flush", "ruleset"])
    with site.held():
        assert look() == by_hand


def test_filters_that_are_lost_are_told_of_and_set_again(site: Site) -> None:
    site.write()
    with site.held():
        before = site.left()
        site.netns.run(["nft", "flush", "ruleset"])
        row = site.row()
        assert row["state"] == "differs"
        assert {each["setting"] for each in row["differences"]} == {"filters"}
        assert site.hooks.ctl("apply").returncode == 0
        assert site.left() == before and site.row()["state"] == "ok"
        site.write("parent: v0, macs: none, mtu: 1300")
        assert site.hooks.ctl("apply", "web1-0").returncode == 0
        assert site.row()["state"] == "ok" and site.row()["mtu"] == 1300
        assert MAC not in site.left()[1]
        site.write("parent: v0, mode: vepa")
        done = site.hooks.ctl("apply", "web1-0")
        assert done.returncode == 71 and "it takes effect when the guest is started" in done.stderr


def test_what_a_living_process_holds_stays(site: Site) -> None:
    site.write()
    with site.held() as process:
        assert site.hooks.ctl("gc").stdout == "nothing to remove\n"
        # NOTE: as under -daemonize: another process goes on.
        copy = site.queue(process.pid)
        process.kill()
        process.wait()
        assert site.hooks.ctl("gc").stdout == "nothing to remove\n"
        copy.close()
    assert "nobody holds it" in site.hooks.ctl("gc").stdout
    assert site.left() == ([], "")


DYING = """
import os, signal, sys
sys.path[:0] = {roots!r}
from pyqemu_ifup.host import Host
count, run = iter(range(1000)), Host.run
async def dying(self, op):
    n = next(count)
    if n == {number} and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    await run(self, op)
    if n == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
Host.run = dying
from pyqemu_ifctl.main import main
sys.argv = ["pyqemu-ifctl", "run", "web1", "--", "true"]
raise SystemExit(main())
"""


@pytest.mark.parametrize("before", [True, False])
def test_nothing_is_left_of_one_that_is_killed_at_any_step(before: bool, site: Site) -> None:
    site.write()
    status = -signal.SIGKILL
    steps = 0
    while status == -signal.SIGKILL:
        code = DYING.format(roots=list(SOURCE_ROOTS), number=steps, before=before)
        done = subprocess.run(
            ["ip", "netns", "exec", site.netns.name, sys.executable, "-c", code],
            env=site.hooks.environ(),
            capture_output=True,
            text=True,
            check=False,
        )
        status = done.returncode
        assert status in (0, -signal.SIGKILL), done.stderr
        assert site.hooks.ctl("gc").returncode == 0
        assert site.left() == ([], ""), steps
        steps += 1
    assert steps > 7


def test_a_clean_up_that_fails_hides_no_cause(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.write()

    def look(*words: object) -> None:
        raise Failure(Status.REFUSED, "cannot look")

    async def attach(*words: object) -> None:
        monkeypatch.setattr(kinds, "look", look)
        raise Failure(Status.REFUSED, "the cause")

    monkeypatch.setattr(tap_request, "attach", attach)
    policy = site.hooks.policy.read_text()
    with pytest.raises(Failure, match="the cause"), given(site.netns, policy, "web1-0"):
        pass
    # NOTE: of a process that runs, it is left to whoever ends that.
    site.netns.run(["ip", "link", "del", "web1-0"])
    assert site.hooks.ctl("gc").returncode == 0
    assert site.left() == ([], "")


@contextmanager
def users_agent(site: Site, before: str = "") -> Iterator[Agent]:
    """The agents of root and of everybody else, in the namespace and with its /sys.

    Yields root's, which runs `before` first.
    """
    users = Agent(site.netns, site.hooks.policy, users=True)
    roots = Agent(site.netns, site.hooks.policy, before=before)
    for agent in (users, roots):
        agent.wrapper = ["ip", "netns", "exec", site.netns.name]
    with users, roots:
        site.hooks.agent = users.path
        yield roots


def test_the_agent_has_filters_back_that_somebody_flushes(site: Site) -> None:
    site.write("parent: v0, users: [nobody]")
    site.hooks.env["PYQEMU_IFUP_POLICY"] = str(site.hooks.policy)
    with users_agent(site), site.held():
        rules = re.sub(r"handle \d+", "", site.left()[1])
        assert "drop" in rules
        for _ in range(3):
            site.netns.run(["nft", "flush", "ruleset"])
            flushed = time.monotonic()
            while site.left()[1] != rules:
                assert time.monotonic() < flushed + 5.0
                time.sleep(0.02)
        site.hooks.env.clear()


COUNTED = """
import os
from pyqemu_ifd import reconcile

async def keep(self, host, keep=reconcile.Reconciler._keep_filters):
    folder = os.path.dirname(sys.argv[sys.argv.index("--socket") + 1])
    with open(f"{folder}/kept", "a") as file:
        file.write(f"{host.tap}\\n")
    await keep(self, host)

reconcile.Reconciler._keep_filters = keep
"""


def test_the_agent_looks_only_at_links_that_have_changed(site: Site) -> None:
    """What one more link takes does not grow with those that are there."""
    web2 = WEB + WEB.removeprefix("vms:\n").replace("web1", "web2").replace("06", "07")
    site.write("parent: v0, users: [nobody]", web2)
    site.hooks.env["PYQEMU_IFUP_POLICY"] = str(site.hooks.policy)
    with users_agent(site, COUNTED) as agent, site.held():
        kept = agent.folder / "kept"

        def looked_at() -> list[str]:
            """Return what it has looked at once it looks at no more."""
            before = None
            while before != (before := kept.read_text() if kept.exists() else ""):
                time.sleep(4 * DELAY)
            kept.write_text("")
            return before.split()

        assert set(looked_at()) == {"web1-0"}
        command = site.hooks.argv("pyqemu-ifctl", "run", "web2", "--", "true")
        subprocess.run(command, env=site.hooks.environ(), check=True)
        assert "web1-0" not in looked_at()
        site.netns.run(["nft", "add", "table", "netdev", "other"])
        site.netns.run(["nft", "delete", "table", "netdev", "other"])
        assert looked_at() == []
        # NOTE: that changes no chain of it.
        dormant = "table netdev pyqemu-ifup { flags dormant; }"
        site.netns.run(["nft", "-f", "-"], input=dormant)
        assert set(looked_at()) == {"web1-0"}
        site.netns.run(["nft", "flush", "ruleset"])
        assert set(looked_at()) == {"web1-0"}
        site.hooks.env.clear()


def test_qemu_s_helper_brings_one_for_its_only_device(site: Site) -> None:
    require("qemu")
    site.write("parent: v0, users: [nobody]", "")
    helper = site.hooks.folder / "pyqemu-bridge-helper"
    words = ("-S", "-netdev", f"bridge,id=n0,br=dmz,helper={helper}")
    inside = ("ip", "netns", "exec", site.netns.name)
    with users_agent(site):
        env = site.hooks.environ()
        device = ("-device", f"virtio-net-pci,netdev=n0,mac={MAC}")
        with Qemu(*words, *device, machine="pc", env=env, prefix=inside) as qemu:
            assert qemu.greeting
            assert site.netns.link("tap0")["address"] == MAC
            assert qemu.quit() == 0
        with Qemu(*words, "-device", "virtio-net-pci,netdev=n0", env=env, prefix=inside) as qemu:
            assert qemu.wait() == 1
            assert "the MAC of the guest's device is not known" in qemu.stderr
        site.hooks.env.clear()


def test_info_tells_what_the_guest_has_heard(site: Site, tmp_path: Path) -> None:
    require("qemu")
    site.write()
    path = f"{tmp_path}/qmp"
    words = ("-name", "web1", "-S", "-qmp", f"unix:{path},server=on,wait=off")
    env = site.hooks.environ()
    with Qemu(*words, machine="pc", env=env, prefix=site.argv(), qmp=None):
        wire = site.netns.raw("v1")
        end = time.monotonic() + 30
        while not Path(path).exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        for _ in range(9):
            wire.send(Case(False, PEER, OWN, "untagged").frame)
        said = site.hooks.ctl("info", "web1").stdout
        assert "web1-0 on v0, mtu 1500, network dmz" in said
        received = re.search("the guest received ([0-9]+) packets.*, sent ([0-9]+)", said)
        assert received is not None, said
        assert int(received[1]) >= 9 and int(received[2]) == 0


def test_the_device_of_another_namespace_is_never_given(site: Site) -> None:
    """/dev/tapN is one for all, and an ifindex is whoever's who makes a link with it."""
    site.write()
    following = max(link["ifindex"] for link in site.netns.links().values()) + 1
    with Namespace() as other:
        lines = ["link add v0 index 100 type veth peer name v1 index 101"]
        lines += [
            f"link add link v0 name m{n} index {n} type macvtap mode bridge"
            for n in range(following, following + 8)
        ]
        other.run(["ip", "-batch", "-"], input="\n".join(lines))
        with site.held() as process, site.queue(process.pid) as macvtap:
            assert site.netns.link("web1-0")["ifindex"] >= kind.INDEX_MIN
            assert arriving(macvtap, site.netns.raw("v1"))


def test_a_user_s_is_gone_a_second_after_its_process(site: Site) -> None:
    site.write("parent: v0, users: [nobody]")
    as_user = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    with users_agent(site):
        run = site.argv(*HOLD)
        at = run.index(str(site.hooks.folder / "pyqemu-ifctl"))
        command = [*run[:at], *as_user, *run[at:]]
        with subprocess.Popen(
            command,
            env={**site.hooks.environ(), "PYQEMU_IFUP_POLICY": str(site.hooks.policy)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == "held\n", process.stderr.read()
            assert site.left()[0] == ["web1-0"]
            assert f"uid={NOBODY}" in site.netns.link("web1-0")["ifalias"]
            process.kill()
            ended = time.monotonic()
        while site.left() != ([], ""):
            assert time.monotonic() < ended + 5.0
            time.sleep(0.02)
        assert time.monotonic() < ended + 1.0


GIVEN = f"""
version: 1
networks:
  dmz: {{parent: v0}}
vms:
  web1: {{nics: [{{network: dmz, mac: "{MAC}"}}]}}
"""


def refused(netns: Namespace) -> Failure:
    """Return why the guest does not get its macvtap."""
    with pytest.raises(Failure) as caught, given(netns, GIVEN, "web1-0"):
        pass
    return caught.value


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Op], Op]], None]:
    """What has each op pass through a function before it is done."""
    run = Host.run

    def through(function: Callable[[Op], Op]) -> None:
        async def changed(self: Host, op: Op) -> None:
            await run(self, function(op))

        monkeypatch.setattr(Host, "run", changed)

    return through


def test_the_cause_is_told_though_the_clean_up_fails(
    site: Site, ops: Callable[[Callable[[Op], Op]], None]
) -> None:
    site.lay()

    def fail(op: Op) -> Op:
        if isinstance(op, SetAlias | DelTap):
            raise Failure(Status.REFUSED, type(op).__name__)
        return op

    ops(fail)
    assert refused(site.netns).what == "SetAlias"
    assert "it was never finished" in site.hooks.ctl("gc").stdout
    assert site.left() == ([], "")


def test_a_number_that_another_link_has_is_no_name(
    site: Site, ops: Callable[[Callable[[Op], Op]], None]
) -> None:
    site.lay()
    index = site.netns.link("v1")["ifindex"]
    ops(lambda op: replace(op, index=index) if isinstance(op, kind.AddMacvtap) else op)
    failure = refused(site.netns)
    assert (failure.status, failure.why) == (75, "another link has its number, or had its name")
    assert site.left() == ([], "")


def test_no_queue_stays_open_where_the_time_runs_out(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.lay()
    ioctl = fcntl.ioctl

    def ring(descriptor: int, request: int, *rest: Any) -> Any:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith("/dev/tap"):
            raise Failure(Status.TRY_AGAIN, "as the handler of SIGALRM does")
        return ioctl(descriptor, request, *rest)

    monkeypatch.setattr(fcntl, "ioctl", ring)
    assert refused(site.netns).what == "as the handler of SIGALRM does"
    folder = Path("/proc/self/fd")
    opened = [os.readlink(each) for each in folder.iterdir() if each.is_symlink()]
    # NOTE: the mount of /dev that it was opened in has gone with its thread.
    assert not [each for each in opened if re.search("/tap[0-9]", each)]
    assert site.left() == ([], "")


def test_filters_of_a_link_that_is_made_meanwhile_are_no_strays(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.lay()
    read_all = nft.read_all

    def read_later() -> tuple[Chain, ...]:
        site.netns.ip("link", "add", "link", "v0", "name", "web1-0", "type", "macvtap")
        index = site.netns.link("web1-0")["ifindex"]
        nft.load("web1-0", index, link_chains("web1-0", index, mac=OWN, tags=True))
        return read_all()

    monkeypatch.setattr(nft, "read_all", read_later)
    with site.netns.enter(), Host(None, Deadline(60), lambda command: None) as host:
        assert host.finish(kind.find_strays(host)) == []
        monkeypatch.undo()
        site.netns.ip("link", "del", "web1-0")
        for stray in host.finish(kind.find_strays(host)):
            for op in stray.plan:
                host.finish(host.run(op))
    assert site.left() == ([], "")


@pytest.mark.parametrize("name", ["mine", "t7x", "t"])
def test_a_chain_that_somebody_renames_ends_no_gc(name: str, site: Site) -> None:
    site.lay()
    site.netns.ip("link", "add", "link", "v0", "name", "web1-0", "type", "macvtap")
    index = site.netns.link("web1-0")["ifindex"]
    with site.netns.enter():
        nft.load("web1-0", index, link_chains("web1-0", index, mac=OWN, tags=True)[:1])
    (chain,) = re.findall(r"chain (\S+)", site.left()[1])
    site.netns.run(["nft", "rename", "chain", "netdev", "pyqemu-ifup", chain, name])
    done = site.hooks.ctl("gc")
    assert (done.returncode, done.stdout) == (0, "nothing to remove\n"), done.stderr
    site.netns.run(["nft", "flush", "ruleset"])


PARENT = replace(FRESH, index=5, name="v0", kind="veth", tap=False, up=True)
OF_30 = replace(PARENT, index=6, name="v0.30", kind="vlan", under=5, vid=30, protocol=0x8100)
OF_PROVIDER = replace(OF_30, index=7, name="ad", protocol=0x88A8)
ADDED = f"ip link add link v0 name v0.30 group {kind.GROUP} type vlan id 30"
KEPT = [
    "ip link set dev v0.30 addrgenmode none",
    "echo 1 > /proc/sys/net/ipv6/conf/v0.30/disable_ipv6",
    "echo 1 > /proc/sys/net/ipv4/conf/v0.30/rp_filter",
    "ip link set dev v0.30 alias 'pyqemu-ifup/1 vlan network=dmz'",
]
RAISED = "ip link set dev v0.30 up"
OURS = replace(OF_30, alias=f"{kind.VLAN_MARK}dmz", group_number=kind.GROUP)


@pytest.mark.parametrize(
    ("links", "printed"),
    [
        ([], [ADDED, *KEPT, RAISED]),
        ([OF_PROVIDER], [ADDED, *KEPT, RAISED]),
        ([OF_PROVIDER, OF_30], []),
        ([OURS], []),
        ([replace(OURS, up=False)], [RAISED]),
        ([replace(OURS, alias="")], KEPT),
    ],
    ids=["nothing", "a provider's", "somebody's", "ours", "ours, down", "ours, unfinished"],
)
def test_what_is_printed_of_a_vlan_is_what_it_lacks(links: list[Link], printed: list[str]) -> None:
    text = GIVEN.replace("parent: v0", "parent: v0, vlan: 30")
    policy = parse_policy([Source("p.yaml", text.encode())])
    port = nic_port(policy, policy.vms["web1"].nics[0])
    link = replace(FRESH, name=port.tap, kind="macvtap", tap=False, mac=MAC, ipv6_disabled=False)
    plan = kind.making(port, link, PARENT, [PARENT, *links])
    lines = [line for op in plan for line in op.commands()]
    assert lines[:-2] == printed
    assert lines[-2].startswith("ip link add link v0.30 name web1-0 ")
