"""A private Open vSwitch: its own database, daemons and socket, inside one network namespace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lab.netns import Namespace

Datapath = Literal["netdev", "system"]
SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")
DAEMONS = {"server": "ovsdb-server", "vswitchd": "ovs-vswitchd"}
READY = 10.0
"""Seconds that a daemon may take to answer."""
COUNTS_PROCESSORS = 10.1
"""Seconds since boot: count_cpu_cores(), lib/ovs-thread.c, with a margin."""


class Daemon:
    """One daemon as our own child, so that its end is seen at once; can be stopped and killed."""

    def __init__(self, namespace: Namespace, argv: Sequence[str], env: dict[str, str]) -> None:
        self.namespace = namespace
        self.argv = list(argv)
        self.env = env
        self.process: subprocess.Popen[Any] | None = None

    @property
    def pid(self) -> int:
        """The running daemon's process id."""
        assert self.process is not None, f"{self.argv[0]} is not running"
        return self.process.pid

    def start(self) -> None:
        """Start the daemon; it dies with the thread that started it."""
        assert self.process is None, f"{self.argv[0]} is running"
        self.process = self.namespace.popen(
            ["setpriv", "--pdeathsig", "KILL", *self.argv],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.env,
        )

    def stop(self) -> None:
        """Stop the daemon (SIGSTOP) and return when it stands still: it is there, but mute."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def cont(self) -> None:
        """Let a stopped daemon go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill the daemon (SIGKILL) and return when it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self._wait()

    def end(self) -> None:
        """End the daemon in good order, stopped or not; already ended is fine."""
        if self.process is None:
            return
        # NOTE: unlike os.kill, these two tolerate a daemon that has just ended.
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(READY)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._wait()

    def _wait(self) -> None:
        assert self.process is not None
        self.process.wait()
        self.process = None


class OpenVSwitch:
    """A private Open vSwitch; a context manager.

    `datapath` is `netdev` (userspace: needs no kernel module) or `system` (the kernel's). `db` is
    the address of its OVSDB; with `tcp`, `tcp_db` is another, inside the namespace.
    """

    def __init__(
        self, namespace: Namespace, *, datapath: Datapath = "netdev", tcp: bool = False
    ) -> None:
        self.namespace = namespace
        self.datapath: Datapath = datapath
        # NOTE: not in TMPDIR: the path of a Unix socket has at most 107 bytes.
        self.dir = Path(tempfile.mkdtemp(prefix="ovs-", dir="/tmp"))
        self.db = f"unix:{self.dir}/db.sock"
        self.tcp_db = "tcp:127.0.0.1:6640" if tcp else None
        env = {name: value for name, value in os.environ.items() if not name.startswith("OVS_")}
        env |= {f"OVS_{kind}DIR": str(self.dir) for kind in ("RUN", "DB", "LOG", "SYSCONF")}
        self.env = env
        remotes = [f"--remote=punix:{self.dir}/db.sock"]
        if tcp:
            remotes.append("--remote=ptcp:6640:127.0.0.1")
        self.server = Daemon(
            namespace,
            ["ovsdb-server", f"{self.dir}/conf.db", *remotes, *self._options("server")],
            env,
        )
        self.vswitchd = Daemon(
            namespace, ["ovs-vswitchd", self.db, *self._options("vswitchd")], env
        )

    def _options(self, name: str) -> list[str]:
        return [
            f"--unixctl={self.dir}/{name}.ctl",
            f"--pidfile={self.dir}/{DAEMONS[name]}.pid",
            f"--log-file={self.dir}/{name}.log",
            "-vconsole:off",
            "--no-chdir",
        ]

    def __enter__(self) -> OpenVSwitch:
        try:
            subprocess.run(
                ["ovsdb-tool", "create", self.dir / "conf.db", SCHEMA], check=True, env=self.env
            )
            self.start_server()
            self.vsctl("--no-wait", "init", "--", "set", "Open_vSwitch", ".", "external_ids:lab=1")
            self.start_vswitchd()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End both daemons, the kernel datapath with them, and remove the folder."""
        try:
            if self.datapath == "system" and self.vswitchd.process is not None:
                self.vswitchd.cont()
                self.appctl("vswitchd", "exit", "--cleanup")
            self.vswitchd.end()
        finally:
            self.server.end()
            shutil.rmtree(self.dir)

    def start_server(self) -> None:
        """Start ovsdb-server and return when it takes connections; raise TimeoutError."""
        self.server.start()
        end = time.monotonic() + READY
        with socket.socket(socket.AF_UNIX) as probe:
            while True:
                try:
                    return probe.connect(f"{self.dir}/db.sock")
                except (FileNotFoundError, ConnectionRefusedError):
                    # NOTE: the file appears before it listens; there is no event to wait for.
                    if time.monotonic() > end:
                        raise TimeoutError(f"ovsdb-server in {self.dir} does not answer") from None
                    time.sleep(0.005)

    def start_vswitchd(self) -> None:
        """Start ovs-vswitchd and return when it has taken the whole configuration."""
        if self.datapath == "system":
            # NOTE: it counts the processors once the monotonic clock is past 10 s; until then it
            # starts no handler thread, and each frame is lost.
            time.sleep(max(0.0, COUNTS_PROCESSORS - time.monotonic()))
        self.vswitchd.start()
        # NOTE: ovs-vsctl waits for ovs-vswitchd only where it has changed something.
        self.vsctl("set", "Open_vSwitch", ".", f"external_ids:started={self.vswitchd.pid}")

    def running(self) -> dict[int, str]:
        """Return the running daemons: process id -> name."""
        daemons = (self.server, self.vswitchd)
        return {daemon.pid: daemon.argv[0] for daemon in daemons if daemon.process is not None}

    def vsctl(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ovs-vsctl on this OVSDB; it waits for ovs-vswitchd, 10 s at the most."""
        return self.namespace.run(
            ["ovs-vsctl", f"--db={self.db}", f"--timeout={READY:.0f}", *argv],
            check=check,
            env=self.env,
        )

    def appctl(self, daemon: Literal["server", "vswitchd"], *argv: str) -> str:
        """Run ovs-appctl on one daemon and return what it printed."""
        target = f"{self.dir}/{daemon}.ctl"
        return self.namespace.run(
            ["ovs-appctl", f"--timeout={READY:.0f}", "-t", target, *argv], env=self.env
        ).stdout

    def add_bridge(self, name: str, *, hwaddr: str | None = None, mtu: int | None = None) -> None:
        """Add a bridge of this datapath; `hwaddr` and `mtu` pin those of its local port."""
        argv = ["add-br", name, "--", "set", "Bridge", name, f"datapath_type={self.datapath}"]
        if hwaddr is not None:
            argv += [f'other_config:hwaddr="{hwaddr}"']
        if mtu is not None:
            argv += ["--", "set", "Interface", name, f"mtu_request={mtu}"]
        self.vsctl(*argv)

    def add_port(self, bridge: str, name: str, *settings: str) -> None:
        """Add a port in one transaction; `settings` are columns of its Port row."""
        columns = ["--", "set", "Port", name, *settings] if settings else []
        self.vsctl("add-port", bridge, name, *columns)

    def wait_up(self, *names: str) -> None:
        """Return when ovs-vswitchd has seen each of these links up: it drops frames until then."""
        for name in names:
            self.wait_until("Interface", name, "link_state=up")

    def del_port(self, name: str) -> None:
        """Delete the port `name`; one that is not there is fine."""
        self.vsctl("--if-exists", "del-port", name)

    def rows(self, *tables: str) -> dict[str, list[dict[str, Any]]]:
        """Return all rows of each of `tables`: column -> value, sets as lists, maps as dicts."""
        words: list[str] = []
        for table in tables:
            words += ["--", "list", table]
        printed = self.vsctl("--no-wait", "--format=json", *words).stdout
        return dict(zip(tables, map(_rows, printed.splitlines()), strict=True))

    def settle(self) -> None:
        """Return when no flow of before a change forwards: the revalidator threads are late.

        For a test of what is so in the end; on a machine that stands still they may take longer
        than our own code waits for.
        """
        self.appctl("vswitchd", "revalidator/wait")

    def find(self, table: str, name: str) -> dict[str, Any] | None:
        """Return the row of `table` whose name is `name`, None where there is none."""
        found = [row for row in self.rows(table)[table] if row["name"] == name]
        return found[0] if found else None

    def row(self, table: str, name: str) -> dict[str, Any]:
        """Return the row of `table` whose name is `name`; raise LookupError."""
        row = self.find(table, name)
        if row is None:
            raise LookupError(f"no {table} {name} in {self.db}")
        return row

    def wait_until(self, table: str, record: str, *conditions: str) -> None:
        """Return when the row holds `conditions` (`link_state=up`), as `ovs-vsctl wait-until`."""
        self.vsctl("wait-until", table, record, *conditions)


def _rows(printed: str) -> list[dict[str, Any]]:
    table = json.loads(printed)
    return [dict(zip(table["headings"], map(_plain, row), strict=True)) for row in table["data"]]


def _plain(value: Any) -> Any:
    """Turn a value of RFC 7047, section 5.1, into a plain one."""
    if isinstance(value, list):
        kind, inner = value
        if kind == "set":
            return [_plain(member) for member in inner]
        if kind == "map":
            return {key: _plain(member) for key, member in inner}
        return inner
    return value
