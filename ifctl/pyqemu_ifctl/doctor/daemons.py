"""How the Open vSwitch of each database is: its daemon, and whether it does what it is told."""

from __future__ import annotations

import os
import socket
import time
from typing import Any, Literal

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import DEFAULT_OVSDB
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import OvsSwitch, is_local
from pyqemu_ifup.system.process import as_seen_by, command_line, read_program, read_stat, real_uid

OVS_RUN = os.path.dirname(DEFAULT_OVSDB[len("unix:") :])
SETTLE = 1.0
"""Seconds in which a healthy ovs-vswitchd has taken in what is configured."""


Daemon = Literal["running", "stopped", "gone"]


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


def find_daemons(switches: Any) -> dict[str, tuple[Daemon, int]]:
    """Return how the ovs-vswitchd of each local database is, and its process (0: none)."""
    found: dict[str, tuple[Daemon, int]] = {}
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


def find_ovs_service() -> str | None:
    """Return the unit of Open vSwitch, None without systemd."""
    if not os.path.isdir("/run/systemd/system"):
        return None
    debian = any(
        os.path.exists(f"{folder}/systemd/system/openvswitch-switch.service")
        for folder in ("/etc", "/usr/lib", "/lib")
    )
    return "openvswitch-switch" if debian else "openvswitch"
