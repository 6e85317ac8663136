"""The two hosts that the rows run on, one without and one with Open vSwitch.

Each is a network namespace with a Linux bridge and a spawner in it, in a mount namespace where
/run/openvswitch is empty, or the private Open vSwitch's own, whatever runs on this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.netns import Namespace
from lab.ovs import OpenVSwitch

BRIDGE, OVS_BRIDGE = "br0", "ovs0"
MTU = 1500
MACS = {BRIDGE: "02:00:00:00:00:01", OVS_BRIDGE: "02:00:00:00:00:02"}
RUN_OPENVSWITCH = Path("/run/openvswitch")
PATIENCE = 10.0
"""Seconds that a command's children have to end when they are asked to."""
SPAWNER = Path(__file__).with_name("spawner.py")

# NOTE: `ip netns exec` gives its command a mount namespace of its own, with a /sys of the netns.
MOUNT = """\
[ -z "$1" ] || mount --bind "$1" /run/openvswitch
[ -n "$1" ] || [ ! -d /run/openvswitch ] || mount -t tmpfs none /run/openvswitch
shift
exec "$@"
"""

QEMU_LIKE = "-name", "guest=bench", "-netdev", "tap,id=n0,ifname=bench0"
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


class Spawner:
    """A process inside a host that holds taps and runs scripts; a context manager."""

    def __init__(self, netns: str, run_openvswitch: Path | None) -> None:
        python = [sys.executable, "-I", "-S", str(SPAWNER), *QEMU_LIKE]
        mounted = str(run_openvswitch or "")
        # NOTE: in a session of its own, so that a terminal's ^C reaches this process alone.
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", netns, "sh", "-euc", MOUNT, "sh", mounted, *python],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
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

    def close(self) -> None:
        """Close the tap; it goes with its descriptor."""
        self._ask({"do": "close"})

    def run(self, argv: Sequence[str], env: Mapping[str, str]) -> Run:
        """Run `argv` as QEMU runs its scripts, with the tap's descriptor open."""
        return Run(**self._ask({"do": "run", "argv": list(argv), "env": dict(env)}))

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
    """A network namespace with bridges, what runs scripts in it, and its Open vSwitch if any."""

    netns: Namespace
    spawner: Spawner
    ovs: OpenVSwitch | None

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


@contextmanager
def plain_host(vlan_filtering: bool) -> Iterator[Host]:
    """A host without Open vSwitch; the default route is through its bridge."""
    with Namespace() as netns:
        _add_bridge(netns, vlan_filtering)
        # NOTE: the stock /etc/qemu-ifup takes the bridge of the default route.
        netns.ip("address", "add", "192.0.2.1/24", "dev", BRIDGE)
        netns.ip("route", "add", "default", "via", "192.0.2.2")
        with Spawner(netns.name, None) as spawner:
            yield Host(netns, spawner, None)


@contextmanager
def ovs_host(vlan_filtering: bool) -> Iterator[Host]:
    """A host with Open vSwitch, userspace datapath, and both kinds of bridge."""
    with _run_openvswitch(), Namespace() as netns:
        _add_bridge(netns, vlan_filtering)
        with OpenVSwitch(netns, datapath="netdev") as ovs:
            ovs.add_bridge(OVS_BRIDGE, hwaddr=MACS[OVS_BRIDGE], mtu=MTU)
            with Spawner(netns.name, ovs.dir) as spawner:
                yield Host(netns, spawner, ovs)


def _add_bridge(netns: Namespace, vlan_filtering: bool) -> None:
    netns.add_bridge(BRIDGE, mac=MACS[BRIDGE], vlan_filtering=vlan_filtering)
    netns.ip("link", "set", "dev", BRIDGE, "mtu", str(MTU))


@contextmanager
def _run_openvswitch() -> Iterator[None]:
    """Have a folder to mount on; made here, it goes again."""
    try:
        RUN_OPENVSWITCH.mkdir()
    except FileExistsError:
        yield
        return
    try:
        yield
    finally:
        RUN_OPENVSWITCH.rmdir()


def run_in_session(words: Sequence[str], env: Mapping[str, str]) -> str:
    """Run a command with all its children and return what it printed.

    When this process is stopped meanwhile, the whole of it gets TERM and is waited for. Raises
    BenchError where it fails.
    """
    with subprocess.Popen(
        words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate()
        except BaseException:
            _end_session(process)
            raise
    if process.returncode != 0:
        raise BenchError(f"`{' '.join(words)}` ended {process.returncode}:\n{printed}")
    return printed


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
