"""The hosts that the rows run on, without and with Open vSwitch, each with an agent.

Each is a network namespace with a Linux bridge, a spawner and an agent in it, in mount namespaces
where /run/openvswitch is empty, or the private Open vSwitch's own, whatever runs on this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.agent import Agent
from lab.netns import Namespace
from lab.ovs import OpenVSwitch

BRIDGE, OVS_BRIDGE = "br0", "ovs0"
MTU = 1500
VID = 100
MACS = {BRIDGE: "02:00:00:00:00:01", OVS_BRIDGE: "02:00:00:00:00:02"}
RUN_OPENVSWITCH, ETC_QEMU = Path("/run/openvswitch"), Path("/etc/qemu")
PATIENCE = 10.0
"""Seconds that a command's children have to end when they are asked to."""
SPAWNER = Path(__file__).with_name("spawner.py")

# NOTE: `ip netns exec` gives its command a mount namespace of its own, with a /sys of the netns.
MOUNT = f"""\
[ -z "$1" ] || mount --bind "$1" {RUN_OPENVSWITCH}
[ -n "$1" ] || [ ! -d {RUN_OPENVSWITCH} ] || mount -t tmpfs none {RUN_OPENVSWITCH}
[ -z "$2" ] || mount --bind "$2" {ETC_QEMU}
shift 2
exec "$@"
"""

QEMU_LIKE = (
    "-name",
    "guest=bench",
    "-netdev",
    "tap,id=n0,ifname=bench0",
    "-netdev",
    "tap,id=n1,ifname=bench1",
)
"""What a hook finds when it reads the command line of its parent."""


class BenchError(Exception):
    """It cannot be measured; the text says what failed."""


@dataclass(frozen=True)
class Run:
    """One script, run to its end: exit status (minus the signal's number), stderr, seconds."""

    status: int
    stderr: str
    wall: float
    cpu: float


@dataclass(frozen=True)
class Crowd:
    """Many commands that were run at once: of each its status and seconds, and of all of them."""

    statuses: list[int]
    walls: list[float]
    all: float
    stderr: str


@dataclass(frozen=True)
class Place:
    """Where the processes of a host run: a network namespace, and what is mounted for them.

    `run_openvswitch` and `etc_qemu` are mounted in the place of those; None: nothing is.
    """

    netns: Namespace
    run_openvswitch: Path | None = None
    etc_qemu: Path | None = None

    def argv(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs `words` there, as the same process."""
        mounts = [str(path or "") for path in (self.run_openvswitch, self.etc_qemu)]
        inside = ["ip", "netns", "exec", self.netns.name]
        return [*inside, "sh", "-euc", MOUNT, "sh", *mounts, *words]


class InstalledAgent(Agent):
    """The agent of an installation, run in a host's place with a policy file of its own."""

    warm = False
    # NOTE: where there is no syslog it says each up and down.
    tells = False

    def __init__(self, place: Place, prefix: Path, policy: Path) -> None:
        super().__init__(place.netns, policy)
        self.place = place
        self.program = str(prefix / "bin" / "pyqemu-ifd")

    def argv(self) -> list[str]:
        """Return the command that runs it."""
        options = ["--policy", str(self.policy), "--socket", self.path]
        return self.place.argv([self.program, *options])

    @property
    def memory(self) -> float:
        """What it has of the memory, in MB (VmRSS of proc(5))."""
        with open(f"/proc/{self.pid}/status", encoding="ascii") as file:
            kilobytes = next(line.split()[1] for line in file if line.startswith("VmRSS:"))
        return int(kilobytes) * 1024 / 1e6


class Spawner:
    """A process inside a host that holds taps and runs scripts; a context manager."""

    def __init__(self, place: Place) -> None:
        python = [sys.executable, "-I", "-S", str(SPAWNER), *QEMU_LIKE]
        # NOTE: in a session of its own, so that a terminal's ^C reaches this process alone.
        self.process = subprocess.Popen(
            place.argv(python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Spawner:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()
        # NOTE: the last request may still be on its way.
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        self.process.wait()

    def open(self, tap: str) -> None:
        """Open a tap and hold it."""
        self._ask({"do": "open", "tap": tap})

    def hold(self, names: Sequence[str]) -> None:
        """Open many taps and hold them: the crowd."""
        self._ask({"do": "hold", "names": list(names)})

    def close(self) -> None:
        """Close every tap; each goes with its descriptor."""
        self._ask({"do": "close"})

    def run(self, argv: Sequence[str], env: Mapping[str, str]) -> Run:
        """Run `argv` as QEMU runs its scripts, with the tap's descriptor open."""
        return Run(**self._ask({"do": "run", "argv": list(argv), "env": dict(env)}))

    def help(self, argv: Sequence[str], env: Mapping[str, str]) -> tuple[Run, str]:
        """Run `argv` as QEMU runs its helper; return the name of the tap that it gave, too."""
        answer = self._ask({"do": "help", "argv": list(argv), "env": dict(env)})
        tap = answer.pop("tap")
        return Run(**answer), tap

    def at_once(self, argv: Sequence[str], env: Mapping[str, str]) -> Crowd:
        """Run `argv`, and a tap's name, for each of the crowd at the same time."""
        return Crowd(**self._ask({"do": "at_once", "argv": list(argv), "env": dict(env)}))

    def attach(self, agent: str) -> None:
        """Have the agent attach the crowd, without a hook. Raises BenchError where it does not."""
        said = self._ask({"do": "attach", "path": agent})["said"]
        if said:
            raise BenchError(f"the agent does not attach {len(said)} lines: {said[0]}")

    def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise BenchError("the process that stands in for QEMU has ended; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Host:
    """A place with bridges, what runs scripts in it, its agent, and its Open vSwitch if any."""

    place: Place
    spawner: Spawner
    agent: InstalledAgent
    ovs: OpenVSwitch | None

    @property
    def netns(self) -> Namespace:
        """Its network namespace."""
        return self.place.netns

    def master(self, tap: str) -> str | None:
        """Return the bridge that the tap is on and up: Linux or Open vSwitch; None for none."""
        link = self.netns.link(tap)
        if "UP" not in link["flags"]:
            return None
        if self.ovs is not None and self.ovs.find("Port", tap) is not None:
            return self.ovs.vsctl("port-to-br", tap).stdout.strip()
        master: str | None = link.get("master")
        return master


def filters_vlans() -> bool:
    """Tell whether this kernel's bridges filter VLANs, on a bridge made for the question."""
    with Namespace() as netns:
        words = ["ip", "link", "add", BRIDGE, "type", "bridge", "vlan_filtering", "1"]
        done = netns.run(words, check=False)
    if done.returncode != 0 and "not supported" not in done.stderr:
        raise BenchError(f"`{' '.join(words)}` ended {done.returncode}: {done.stderr.strip()}")
    return done.returncode == 0


@dataclass(frozen=True)
class Plan:
    """What each host is made with.

    The installation in `prefix`, the policy file of the agent, whether the Linux bridges filter
    VLANs, and a folder for what `etc_qemu` puts there: QEMU's bridge.conf.
    """

    prefix: Path
    policy: Path
    vlan_filtering: bool
    folder: Path

    @property
    def vid(self) -> int | None:
        """The VLAN of a tap on a Linux bridge, where its bridges have any."""
        return VID if self.vlan_filtering else None


@contextmanager
def plain_host(plan: Plan) -> Iterator[Host]:
    """A host without Open vSwitch; the default route is through its bridge."""
    with _mounted_on(ETC_QEMU), Namespace() as netns:
        _add_bridge(netns, plan.vlan_filtering)
        # NOTE: the stock /etc/qemu-ifup takes the bridge of the default route.
        netns.ip("address", "add", "192.0.2.1/24", "dev", BRIDGE)
        netns.ip("route", "add", "default", "via", "192.0.2.2")
        with _host(Place(netns, None, _bridge_conf(plan.folder)), plan, None) as host:
            yield host


@contextmanager
def ovs_host(plan: Plan) -> Iterator[Host]:
    """A host with Open vSwitch, userspace datapath, and both kinds of bridge."""
    with _mounted_on(RUN_OPENVSWITCH), Namespace() as netns:
        _add_bridge(netns, plan.vlan_filtering)
        with OpenVSwitch(netns, datapath="netdev") as ovs:
            ovs.add_bridge(OVS_BRIDGE, hwaddr=MACS[OVS_BRIDGE], mtu=MTU)
            with _host(Place(netns, ovs.dir), plan, ovs) as host:
                yield host


@contextmanager
def _host(place: Place, plan: Plan, ovs: OpenVSwitch | None) -> Iterator[Host]:
    with ExitStack() as stack:
        agent = InstalledAgent(place, plan.prefix, plan.policy)
        stack.enter_context(agent)
        yield Host(place, stack.enter_context(Spawner(place)), agent, ovs)


def _add_bridge(netns: Namespace, vlan_filtering: bool) -> None:
    netns.add_bridge(BRIDGE, mac=MACS[BRIDGE], vlan_filtering=vlan_filtering)
    netns.ip("link", "set", "dev", BRIDGE, "mtu", str(MTU))


def _bridge_conf(folder: Path) -> Path:
    """Return a folder with a bridge.conf that has QEMU's own helper use the bridge."""
    path = folder / "etc-qemu"
    path.mkdir(exist_ok=True)
    (path / "bridge.conf").write_text(f"allow {BRIDGE}\n")
    return path


@contextmanager
def _mounted_on(path: Path) -> Iterator[None]:
    """Have a folder to mount on; made here, it goes again."""
    try:
        path.mkdir()
    except FileExistsError:
        yield
        return
    try:
        yield
    finally:
        path.rmdir()


def run_in_session(words: Sequence[str], env: Mapping[str, str]) -> str:
    """Run a command with all its children and return what it printed.

    When this process is stopped meanwhile, the whole of it gets TERM and is waited for. Raises
    BenchError where it fails.
    """
    with _start_session(words, env) as process:
        try:
            printed, _ = process.communicate()
        except BaseException:
            _end_session(process)
            raise
    if process.returncode != 0:
        raise BenchError(f"`{' '.join(words)}` ended {process.returncode}:\n{printed}")
    return printed


def _start_session(words: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a command; a signal that comes meanwhile counts when the command is known."""
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    process = subprocess.Popen(
        words,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if came:
        _end_session(process)
        signal.raise_signal(came[0])
    return process


def _end_session(process: subprocess.Popen[str]) -> None:
    """End a process and all of its group; return when they are gone."""
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    end = time.monotonic() + PATIENCE
    try:
        while True:
            # NOTE: not our children, so there is no event to wait for.
            os.killpg(process.pid, 0 if time.monotonic() < end else signal.SIGKILL)
            time.sleep(0.02)
    except ProcessLookupError:
        return
