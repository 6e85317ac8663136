"""How ovs-vswitchd is, and how it is run here: for doctor and explain."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.shell import Command, quote, sh
from pyqemu_ifup.hook import SAFE_PATH
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.check import Finding
from pyqemu_ifup.look import OvsSwitch, is_local
from pyqemu_ifup.system.process import as_seen_by, command_line, read_program, read_stat, real_uid

OVS_RUN = os.path.dirname(DEFAULT_OVSDB[len("unix:") :])
SETTLE = 1.0
"""Seconds in which a healthy ovs-vswitchd has taken in what is configured."""


OVS_CTL = "/usr/share/openvswitch/scripts/ovs-ctl"

LOOKING = "how Open vSwitch is"
"""What `settled` looks at, for whom it is too late."""
LOOKING_FOR_IT = "ovs-vswitchd"
"""What `look` looks at, likewise."""

State = Literal["running", "stopped", "gone"]
RUNNING: tuple[State, int] = ("running", 0)


@dataclass(frozen=True)
class Vswitchd:
    """How ovs-vswitchd is run on this host.

    `states` tells how the one of each local database is, and its process (0: none), as far as it is
    known. `service` is its unit, None without systemd. `install` is the
    command that installs its package.
    """

    states: Mapping[str, tuple[State, int]] = field(default_factory=dict)
    service: str | None = None
    install: Command | None = None

    def start(self, verb: Literal["start", "restart"] = "start") -> Command:
        """Return the command that starts it: its service, or the script of Open vSwitch's own."""
        if self.service is None:
            return sh(OVS_CTL, "--system-id=random", verb)
        return sh("systemctl", verb, self.service)


def look(switches: Collection[OvsSwitch]) -> Vswitchd:
    """Return how it is run here, of these databases."""
    install = sh("apt-get", "install", "openvswitch-switch")
    if shutil.which("dnf", path=SAFE_PATH):
        install = sh("dnf", "install", "openvswitch")
    return Vswitchd(find_states(switches), find_service(), install)


def find_fault(switch: OvsSwitch, vswitchd: Vswitchd) -> Finding | None:
    """Return why the ovs-vswitchd of a database would not see to a new port."""
    why = "a tap that is to be attached waits until the deadline (status 75)"
    where = f"({quote(switch.ovsdb)})"
    state, pid = vswitchd.states.get(switch.ovsdb, RUNNING)
    if state == "gone":
        return Finding(f"ovs-vswitchd does not run {where}", why, vswitchd.start())
    if state == "stopped":
        mend = sh("kill", "-CONT", str(pid))
        return Finding(f"ovs-vswitchd is stopped, process {pid} {where}", why, mend)
    if switch.behind:
        return Finding(
            f"ovs-vswitchd has not taken in what is configured {where}",
            why,
            vswitchd.start("restart"),
        )
    return None


def has_ended(address: str) -> Failure:
    """Return why a database that has answered tells no more."""
    return Failure(
        Status.UNAVAILABLE,
        f"Open vSwitch is not there: nothing answers at {quote(address)}",
        "it has ended meanwhile",
        "start Open vSwitch by its own service",
    )


def settled(host: Host, failed: dict[str, Failure]) -> dict[str, OvsSwitch]:
    """Return how each Open vSwitch is, once it has taken in what is configured, or does not.

    A database that cannot tell is added to those that have `failed`.
    """
    until = time.monotonic() + SETTLE
    while True:
        found: dict[str, OvsSwitch] = {}
        for address, database in list(host.databases.items()):
            try:
                found[address] = database.switch()
            except Failure as failure:
                # NOTE: one that talks nonsense tells no ports either.
                failed[address] = failure
                del host.databases[address]
        if time.monotonic() > until or not any(each.behind for each in found.values()):
            return found
        host.deadline.check()
        time.sleep(0.05)
        host.ports()


def find_states(switches: Iterable[OvsSwitch]) -> dict[str, tuple[State, int]]:
    """Return how the ovs-vswitchd of each local database is, and its process (0: none)."""
    found: dict[str, tuple[State, int]] = {}
    local = [each for each in switches if is_local(each.ovsdb) and each.ovsdb.startswith("unix:")]
    if not local:
        return found
    running = [
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and os.path.basename(read_program(int(name))) == "ovs-vswitchd"
    ]
    for switch in local:
        # NOTE: anybody may have a process that is called so.
        owners = (0, _owner(switch.ovsdb[len("unix:") :]))
        pids = [pid for pid in running if real_uid(pid) in owners and _serves(pid, switch.ovsdb)]
        if pids:
            halted = all(_is_halted(pid) for pid in pids)
            found[switch.ovsdb] = ("stopped" if halted else "running", pids[0])
        elif not _answers(switch):
            found[switch.ovsdb] = ("gone", 0)
    return found


def _serves(pid: int, ovsdb: str) -> bool:
    """Tell whether an ovs-vswitchd is of this database, by its command line.

    It may call the socket by another path, through a link or in mounts of its own.
    """
    words = command_line(pid)
    named = [word for word in words if word.startswith("unix:")]
    if not words or ovsdb in named:
        return bool(words)
    try:
        socket_of = os.stat(ovsdb[len("unix:") :])
    except FileNotFoundError:
        return False
    for word in named or [DEFAULT_OVSDB]:
        # NOTE: a path that does not begin with a slash is one of its run-time folder.
        path = os.path.join(OVS_RUN, word[len("unix:") :])
        for seen in (as_seen_by(pid, path), path):
            try:
                if os.path.samestat(os.stat(seen), socket_of):
                    return True
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
    return False


def _owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except FileNotFoundError:
        return None


def _is_halted(pid: int) -> bool:
    """Tell whether a process is stopped by a signal or a debugger (proc(5), stat)."""
    found = read_stat(pid)
    return found is not None and found.state in ("T", "t")


def _answers(switch: OvsSwitch) -> bool:
    """Tell whether an ovs-vswitchd that cannot be seen listens, or may, at one of its bridges.

    It does so in its run-time folder, which is the database's (ovs-ofctl(8)).
    """
    folder = os.path.dirname(os.path.realpath(switch.ovsdb[len("unix:") :]))
    for bridge in switch.bridges:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(f"{folder}/{bridge.name}.mgmt")
            except (FileNotFoundError, ConnectionRefusedError):
                continue
            except PermissionError:
                return True
            return True
    return False


def find_service() -> str | None:
    """Return the unit of Open vSwitch, None without systemd."""
    if not os.path.isdir("/run/systemd/system"):
        return None
    debian = any(
        os.path.exists(f"{folder}/systemd/system/openvswitch-switch.service")
        for folder in ("/etc", "/usr/lib", "/lib")
    )
    return "openvswitch-switch" if debian else "openvswitch"
