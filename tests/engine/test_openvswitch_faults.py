"""The hooks while the daemons of Open vSwitch fail: each ends in time, says so, and is mended.

The faults are real: daemons are killed, stopped and started, and a disk is full. What no daemon
can be made to do, such as to lose a reply, a proxy before the database does.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pyqemu_ifdown.main
import pyqemu_ifup.deadline
import pyqemu_ifup.hook
import pyqemu_ifup.kinds.openvswitch
from lab.calls import Call, Calls, Change, Ended
from lab.clinic import until
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.ovsdb_proxy import Proxy, Session, Spoil
from lab.plug import plug, port_of
from lab.snapshot import Snapshot, leftovers
from lab.told import run_told
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifdown.gc import collect
from pyqemu_ifup.deadline import GRACE, Deadline
from pyqemu_ifup.drivers import ovsdb_connection
from pyqemu_ifup.drivers.ovsdb import Database
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.openvswitch import AddPort, DelPort
from pyqemu_ifup.look import Seen
from pyqemu_ifup.ops import Op
from pyqemu_ifup.task import finish

# The hook imports it when it gets there, and is forked: so it has it already.
IMPORTED = pyqemu_ifup.drivers.ovsdb

TIMEOUT = 1
"""Seconds that an up may take here, the least that a policy can say."""
DOWN_TIMEOUT = 3.0
"""Seconds that a down may take here: more than it waits for a mute ovs-vswitchd."""
SHORT_DOWN = f"import pyqemu_ifdown.main; pyqemu_ifdown.main.TIMEOUT = {DOWN_TIMEOUT}"
MARGIN = 1.0
"""Seconds for a loaded machine, beyond deadline and grace."""
HWADDR = "52:54:00:ff:00:01"


@dataclass
class Site:
    """The bridge br-int of a private Open vSwitch, a tap web0, and hooks for it."""

    netns: Namespace
    ovs: OpenVSwitch
    calls: Calls

    def __post_init__(self) -> None:
        """Make the bridge and the policy."""
        self.ovs.add_bridge("br-int", hwaddr=HWADDR, mtu=1500)
        self.policy()

    def open(self) -> None:
        """Open web0, as QEMU does, and remember how it all is."""
        self.tap = self.netns.tap("web0")
        self.clean = Snapshot.take(self.netns, self.ovs)

    def policy(self, ovsdb: str = "", timeout: int = TIMEOUT, bridge: str = "br-int") -> None:
        """Put a policy in force that plugs each tap into `bridge`."""
        self.calls.hooks.write_policy(
            f"version: 1\ntimeout: {timeout}\n"
            f'networks: {{lan: {{bridge: {bridge}, vlan: 10, ovsdb: "{ovsdb or self.ovs.db}"}}}}\n'
            f'rules: [{{tap: "*", network: lan}}]\n'
        )

    def up(self, change: Change | None = None) -> Ended:
        """Run pyqemu-ifup on web0, bounded by its deadline and the grace."""
        ended = self.calls.up("web0", change)
        # NOTE: the agent may still be cleaning up after the tap before, through a proxy that ends.
        while "other work on this tap is under way" in ended.stderr:
            ended = self.calls.up("web0", change)
        _check(ended)
        assert ended.seconds < TIMEOUT + GRACE + MARGIN
        return ended

    def down(self) -> Ended:
        """Run pyqemu-ifdown on web0, bounded by its deadline."""
        ended = self.calls.down("web0", shorten_down)
        _check(ended)
        assert ended.seconds < DOWN_TIMEOUT + MARGIN
        return ended

    def gc(self) -> list[tuple[str, bool, bool]]:
        """Collect: each port found, whether it was removed, and whether vswitchd has let it go."""
        with Host(None, Deadline(TIMEOUT), lambda command: None) as host:
            host.finish(host.open_databases([self.ovs.db]))
            return [
                (leftover.port.name, leftover.remove is not None, let_go)
                for leftover, let_go in collect(host, tap=None, dry_run=False)
            ]

    def is_clean(self) -> bool:
        """Tell whether all is as it was before the first up."""
        lines = leftovers(self.clean, self.netns, self.ovs)
        print(*lines, sep="\n")
        return lines == []

    def row(self) -> dict[str, Any] | None:
        """Return the Port row of web0."""
        return self.ovs.find("Port", "web0")


def _check(ended: Ended) -> None:
    assert ended.status != Status.BUG, (ended.stderr, ended.log)
    assert ended.stdout == b""
    assert ended.stderr.count("\n") == (ended.status != 0), ended.stderr


def shorten_down() -> None:
    """Give a down a deadline that a test has the patience for."""
    setattr(pyqemu_ifdown.main, "TIMEOUT", DOWN_TIMEOUT)  # noqa: B010  mypy knows its value


@pytest.fixture
def site(
    inside: Namespace, ovs_netdev: OpenVSwitch, tmp_path: Path, served: Callable[..., Hooks]
) -> Iterator[Site]:
    calls = Calls(Hooks(tmp_path))
    served(calls.hooks, calls.syslog.path, SHORT_DOWN)
    yield Site(inside, ovs_netdev, calls)
    calls.close()


# Faults that are there before the hook comes


@dataclass(frozen=True)
class Fault:
    """A fault, its end, and the exit statuses of up, down and gc meanwhile.

    `told` is part of what up and down say where they fail.
    """

    begin: Callable[[OpenVSwitch], object]
    end: Callable[[OpenVSwitch], object]
    up: int
    down: int
    gc: int
    told: str


def remove_server(ovs: OpenVSwitch) -> None:
    """End ovsdb-server in good order: it takes its socket with it."""
    ovs.server.end()
    assert not Path(ovs.db.removeprefix("unix:")).exists()


def begin_read_only(ovs: OpenVSwitch) -> None:
    """Make the server the backup of one that is not there."""
    ovs.appctl("server", "ovsdb-server/set-active-ovsdb-server", f"unix:{ovs.dir}/none")
    ovs.appctl("server", "ovsdb-server/connect-active-ovsdb-server")


def end_read_only(ovs: OpenVSwitch) -> None:
    ovs.appctl("server", "ovsdb-server/disconnect-active-ovsdb-server")


def fill_disk(ovs: OpenVSwitch) -> None:
    """Leave no byte free where the database is."""
    with open(ovs.dir / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            assert shutil.disk_usage(ovs.dir).free == 0
    # The database's last page too.
    pad = f"external_ids:pad={'x' * 100}"
    number = 0
    while (
        ovs.vsctl("--no-wait", "set", "Open_vSwitch", ".", f"{pad}{number}", check=False).returncode
        == 0
    ):
        number += 1


def free_disk(ovs: OpenVSwitch) -> None:
    (ovs.dir / "filler").unlink()
    ovs.vsctl("remove", "Open_vSwitch", ".", "external_ids", "pad")


FAULTS = {
    "no socket": Fault(
        remove_server,
        OpenVSwitch.start_server,
        69,
        0,
        0,
        "Open vSwitch is not there: no socket at {db}: br-int of network lan is its bridge; start",
    ),
    "server down": Fault(
        lambda ovs: ovs.server.kill(),
        OpenVSwitch.start_server,
        69,
        69,
        69,
        "Open vSwitch is not there: nothing answers at {db}: Connection refused; start",
    ),
    "server hung": Fault(
        lambda ovs: ovs.server.stop(),
        lambda ovs: ovs.server.cont(),
        75,
        75,
        75,
        "the database of Open vSwitch at {db} does not answer; try again",
    ),
    "read-only": Fault(
        begin_read_only,
        end_read_only,
        69,
        69,
        69,
        "the database of Open vSwitch at {db} cannot be written: not allowed (",
    ),
    "disk full": Fault(
        fill_disk,
        free_disk,
        69,
        69,
        69,
        "the database of Open vSwitch at {db} cannot be written: I/O error (",
    ),
    "vswitchd down": Fault(
        lambda ovs: ovs.vswitchd.kill(),
        OpenVSwitch.start_vswitchd,
        75,
        0,
        0,
        "ovs-vswitchd does not answer ({db}); try again",
    ),
    "vswitchd hung": Fault(
        lambda ovs: ovs.vswitchd.stop(),
        lambda ovs: ovs.vswitchd.cont(),
        75,
        0,
        0,
        "ovs-vswitchd does not answer ({db}); try again",
    ),
}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> Fault:
    name: str = request.param
    return FAULTS[name]


@pytest.fixture
def switch(inside: Namespace, fault: Fault) -> Iterator[OpenVSwitch]:
    """A private Open vSwitch, its database on a small disk of its own where that shall be full."""
    switch = OpenVSwitch(inside, datapath="netdev")
    small = fault.begin is fill_disk
    if small:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", switch.dir], check=True)
    try:
        with switch:
            yield switch
            if small:
                # NOTE: before the switch removes the folder.
                subprocess.run(["umount", "--lazy", switch.dir], check=True)
                small = False
    finally:
        if small:
            subprocess.run(["umount", "--lazy", switch.dir], check=True)


@pytest.fixture
def faulty(
    inside: Namespace, switch: OpenVSwitch, tmp_path: Path, served: Callable[..., Hooks]
) -> Iterator[Site]:
    calls = Calls(Hooks(tmp_path))
    served(calls.hooks, calls.syslog.path, SHORT_DOWN)
    yield Site(inside, switch, calls)
    calls.close()


def mend(site: Site, fault: Fault) -> None:
    """End the fault, and wait till ovs-vswitchd has found its server again."""
    fault.end(site.ovs)
    site.ovs.vsctl("set", "Open_vSwitch", ".", "external_ids:mended=1")


def tells(ended: Ended, fault: Fault, site: Site) -> bool:
    """Tell whether stderr and syslog say what the fault is."""
    told = fault.told.replace("{db}", site.ovs.db)
    return told in ended.stderr and any(told in line for line in ended.log)


def test_up_during_a_fault(faulty: Site, fault: Fault) -> None:
    faulty.open()
    fault.begin(faulty.ovs)
    ended = faulty.up()
    link = faulty.netns.link("web0")
    assert "UP" not in link["flags"] and "ifalias" not in link
    mend(faulty, fault)
    assert ended.status == fault.up, ended
    assert tells(ended, fault, faulty), ended
    assert faulty.is_clean()
    assert faulty.up().status == 0
    assert faulty.down().status == 0


def test_down_during_a_fault(faulty: Site, fault: Fault) -> None:
    faulty.open()
    assert faulty.up().status == 0
    fault.begin(faulty.ovs)
    ended = faulty.down()
    mend(faulty, fault)
    assert ended.status == fault.down, ended
    if ended.status:
        assert tells(ended, fault, faulty), ended
    faulty.tap.close()
    faulty.gc()
    assert faulty.row() is None


@pytest.mark.alone("the agent collects it at once")
def test_gc_during_a_fault(faulty: Site, fault: Fault) -> None:
    faulty.open()
    assert faulty.up().status == 0
    faulty.tap.close()
    fault.begin(faulty.ovs)
    status, found = 0, []
    try:
        found = faulty.gc()
    except Failure as failure:
        status = int(failure.status)
    mend(faulty, fault)
    assert status == fault.gc
    if found:
        assert found == [("web0", True, False)]
    else:
        assert faulty.gc() == [("web0", True, True)]
    assert faulty.row() is None


# Faults that come while the hook runs


def at_add(act: Callable[[], object], *, after: bool = False) -> Change:
    """Return a change: run `act` before, or right `after`, the port is added."""

    def change() -> None:
        run = Host.run

        async def faulty_run(self: Host, step: Op) -> None:
            if not isinstance(step, AddPort):
                await run(self, step)
                return
            if not after:
                act()
            await run(self, step)
            if after:
                act()

        setattr(Host, "run", faulty_run)  # noqa: B010  a method is no variable to mypy

    return change


def stop_itself() -> None:
    """Stop this process, for the test to do something meanwhile."""
    os.kill(os.getpid(), signal.SIGSTOP)


@contextmanager
def stopped_at_add(site: Site, timeout: int = 10, bridge: str = "br-int") -> Iterator[Call]:
    """Yield an up that stands before its commit, and let it go on after the block."""
    site.policy(timeout=timeout, bridge=bridge)
    call = site.calls.start("pyqemu-ifup", "web0", change=at_add(stop_itself))
    assert call.wait_stopped()
    yield call
    call.go_on()


@pytest.mark.alone("changes the hook's own process")
def test_server_that_restarts_is_found_again(site: Site) -> None:
    """It has gone when the commit is sent, and is back while the hook waits."""
    site.open()
    with stopped_at_add(site) as call:
        site.ovs.server.kill()
    site.ovs.start_server()
    ended = call.wait()
    _check(ended)
    assert ended.status == 0, ended
    # NOTE: ovs-vswitchd backs off for a second before it connects again.
    assert ended.seconds < 5
    row = site.row()
    assert row is not None and row["tag"] == 10
    assert site.down().status == 0


@pytest.mark.alone("changes the hook's own process")
def test_vswitchd_that_restarts_takes_the_port_in(site: Site) -> None:
    site.open()
    with stopped_at_add(site) as call:
        site.ovs.vswitchd.kill()
    site.ovs.vswitchd.start()
    ended = call.wait()
    _check(ended)
    assert ended.status == 0, ended
    assert site.ovs.row("Interface", "web0")["link_state"] == "up"
    assert site.down().status == 0


def begin_bridge(site: Site, timeout: int) -> Call:
    """Stop ovs-vswitchd, have a bridge made meanwhile, and begin an up on it."""
    site.open()
    site.policy(timeout=timeout, bridge="br-new")
    site.ovs.vswitchd.stop()
    site.ovs.vsctl(
        "--no-wait", "add-br", "br-new", "--", "set", "Bridge", "br-new", "datapath_type=netdev"
    )
    return site.calls.start("pyqemu-ifup", "web0")


def test_bridge_that_vswitchd_has_yet_to_make_is_waited_for(site: Site) -> None:
    """Its row is there; its interface, whose MTU the tap gets, comes while the hook waits."""
    call = begin_bridge(site, 30)
    time.sleep(1)
    site.ovs.vswitchd.cont()
    ended = call.wait()
    assert ended.status == 0, ended
    assert site.ovs.row("Interface", "web0")["link_state"] == "up"
    assert site.down().status == 0
    site.ovs.vsctl("del-br", "br-new")


def test_bridge_that_vswitchd_does_not_make(site: Site) -> None:
    ended = begin_bridge(site, TIMEOUT).wait()
    assert ended.status == 75, ended
    assert (
        f"not done after {TIMEOUT} s: ovs-vswitchd has not made br-new yet ({site.ovs.db}); "
        "try again"
    ) in ended.stderr
    site.ovs.vswitchd.cont()
    site.ovs.vsctl("del-br", "br-new")
    assert site.is_clean()


@pytest.mark.alone("changes the hook's own process")
def test_commit_whose_time_ran_out_is_taken_back(site: Site) -> None:
    """The server makes it only when it goes on, within the grace: the undo asks it."""
    site.open()
    with stopped_at_add(site, timeout=1) as call:
        site.ovs.server.stop()
    on = threading.Timer(1.5, site.ovs.server.cont)
    on.start()
    ended = call.wait()
    on.join()
    _check(ended)
    assert ended.status == 75, ended
    assert f"{site.ovs.db} does not answer" in ended.stderr
    assert site.is_clean()
    log = site.ovs.namespace.run(
        ["ovsdb-tool", "-mm", "show-log", str(site.ovs.dir / "conf.db")], env=site.ovs.env
    ).stdout
    assert "pyqemu-ifup: add-port br-int web0" in log
    assert "pyqemu-ifup: del-port web0" in log


@pytest.mark.alone("changes the hook's own process")
def test_commit_that_comes_too_late_is_for_gc(site: Site) -> None:
    """The server goes on only when the hook has gone."""
    site.open()
    with stopped_at_add(site, timeout=1) as call:
        site.ovs.server.stop()
    ended = call.wait()
    _check(ended)
    assert ended.status == 75
    assert ended.seconds < 1 + GRACE + MARGIN
    told = [line for line in ended.log if "a port may be left in unix:" in line]
    assert "pyqemu-ifctl gc web0 removes it" in told[0]
    site.ovs.server.cont()
    link = site.netns.link("web0")
    assert "UP" not in link["flags"] and "ifalias" not in link
    site.ovs.wait_until("Port", "web0", "tag=10")
    site.tap.close()
    run_told(site.calls.hooks, told[0])
    assert site.row() is None
    site.netns.tap("web0")
    assert site.up().status == 0
    assert site.down().status == 0


@pytest.mark.alone("changes the hook's own process")
def test_bridge_that_is_deleted_before_the_commit(site: Site) -> None:
    site.open()
    site.ovs.add_bridge("br-x", hwaddr="52:54:00:ff:00:02")
    with stopped_at_add(site, bridge="br-x") as call:
        site.ovs.vsctl("del-br", "br-x")
    ended = call.wait()
    _check(ended)
    assert ended.status == 69, ended
    assert "there is no bridge br-x: it has been deleted meanwhile" in ended.stderr
    assert site.is_clean()


@pytest.mark.alone("changes the hook's own process")
def test_somebody_faster_keeps_the_name(site: Site) -> None:
    site.open()
    with stopped_at_add(site) as call:
        site.ovs.add_port("br-int", "web0", "tag=7")
    ended = call.wait()
    _check(ended)
    assert ended.status == 77, ended
    assert "Open vSwitch has a port of this name that is not ours" in ended.stderr
    row = site.row()
    assert row is not None and row["tag"] == 7
    site.ovs.del_port("web0")
    assert site.is_clean()


@pytest.mark.alone("changes the hook's own process")
def test_port_that_is_deleted_after_the_commit(site: Site) -> None:
    site.open()

    def delete() -> None:
        subprocess.run(["ovs-vsctl", f"--db={site.ovs.db}", "del-port", "web0"], check=True)

    ended = site.up(at_add(delete, after=True))
    assert ended.status == 71, ended
    assert "bridge is none, wanted br-int" in ended.stderr
    assert site.is_clean()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_the_wait_for_vswitchd(site: Site, number: signal.Signals) -> None:
    site.open()
    site.policy(timeout=30)
    site.ovs.vswitchd.stop()
    call = site.calls.start("pyqemu-ifup", "web0")
    site.ovs.vsctl("--no-wait", "--timeout=5", "wait-until", "Port", "web0")
    os.kill(call.pid, number)
    ended = call.wait()
    _check(ended)
    assert ended.status == 75
    assert f"stopped: received {number.name}; nothing is left of it" in ended.stderr
    assert ended.seconds < 5
    assert site.row() is None
    site.ovs.vswitchd.cont()
    assert site.is_clean()


def test_end_of_the_caller_ends_the_wait_for_vswitchd(site: Site) -> None:
    site.open()
    site.policy(timeout=30)
    site.ovs.vswitchd.stop()
    call = site.calls.start("pyqemu-ifup", "web0", caller=lambda: None)
    site.ovs.vsctl("--no-wait", "--timeout=5", "wait-until", "Port", "web0")
    call.end_caller()
    ended = call.wait()
    _check(ended)
    assert ended.status == 75
    assert "stopped: the calling process" in ended.stderr
    assert site.row() is None
    site.ovs.vswitchd.cont()
    assert site.is_clean()


# What no daemon can be made to do


def writing(data: bytes) -> Spoil:
    """Say `data` instead of the message."""
    return lambda session, message: session.write(data)


def answering(**answer: object) -> Spoil:
    """Put another result, or an error, into an answer."""

    def spoil(session: Session, message: dict[str, Any]) -> None:
        session.give({**message, **answer} if message.get("id") is not None else message)

    return spoil


def half(session: Session, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    session.write(data[: len(data) // 2])
    session.drop()


def by_bytes(session: Session, message: dict[str, Any]) -> None:
    for byte in json.dumps(message).encode():
        session.write(bytes([byte]))


@dataclass
class Nth:
    """Spoils the message of this number, from 1, over all connections; with `on` all later too."""

    number: int
    spoil: Spoil
    on: bool = False
    count: int = 0

    def __call__(self, session: Session, message: dict[str, Any]) -> None:
        self.count += 1
        if self.count == self.number or (self.on and self.count > self.number):
            self.spoil(session, message)
        else:
            session.give(message)


def shorten_grace() -> None:
    setattr(pyqemu_ifup.deadline, "GRACE", 0.3)  # noqa: B010  mypy knows its value


def spoiled_up(site: Site, nth: Nth) -> Ended:
    """Run an up through a proxy that spoils a message, and clean up as a down or gc would."""
    site.open()
    with Proxy(site.ovs.db, nth) as proxy:
        site.policy(proxy.address)
        ended = site.up(shorten_grace)
    link = site.netns.link("web0")
    assert ("UP" in link["flags"]) == ("ifalias" in link) == (ended.status == 0), ended
    if ended.status == 0:
        row = site.row()
        assert row is not None and row["tag"] == 10
        assert site.ovs.row("Interface", "web0")["link_state"] == "up"
    site.tap.close()
    site.gc()
    assert site.row() is None
    return ended


@pytest.mark.parametrize(
    "spoil",
    [
        lambda session, message: session.drop(),
        half,
        by_bytes,
        answering(result=None),
        *map(writing, (b"HTTP/1.1 400 Bad Request\r\n", b"[]", b'{"x": 1}', b"\xff", b"[" * 5000)),
    ],
    ids=["dropped", "half", "by bytes", "null", "HTTP", "list", "object", "no text", "deep"],
)
def test_connection_that_breaks_is_made_anew(site: Site, spoil: Spoil) -> None:
    """Whichever of the server's messages it is, the commit's own answer among them."""
    number = 1
    while True:
        nth = Nth(number, spoil)
        ended = spoiled_up(site, nth)
        assert ended.status == 0, (number, ended)
        if nth.count < number:
            break
        number += 1
    assert number > 5


@pytest.mark.parametrize(
    "spoil",
    [answering(result=[]), answering(result={}), answering(result=None, error="no such thing")],
    ids=["list", "object", "error"],
)
def test_answer_that_nobody_has_asked_for(site: Site, spoil: Spoil) -> None:
    statuses = set()
    number = 1
    while True:
        nth = Nth(number, spoil)
        ended = spoiled_up(site, nth)
        statuses.add(ended.status)
        if ended.status != 0:
            assert "unix:/tmp/ovsdb-" in ended.stderr, ended
        if nth.count < number:
            break
        number += 1
    assert statuses <= {0, 71, 75}
    # NOTE: the agent has connected before it is asked, and does so again.
    assert 71 in statuses or site.calls.hooks.agent


def test_server_that_falls_silent_is_given_up_in_time(site: Site) -> None:
    number = 1
    while True:
        nth = Nth(number, lambda session, message: None, on=True)
        ended = spoiled_up(site, nth)
        if ended.status == 0:
            break
        assert ended.status == 75, ended
        assert "unix:/tmp/ovsdb-" in ended.stderr and "; try again" in ended.stderr
        number += 2
    assert number > 5


def test_row_that_is_written_meanwhile_is_waited_for(inside: Namespace, ovs: OpenVSwitch) -> None:
    """What refuses a commit comes late: it is not tried anew, again and again, before that."""
    late: list[threading.Timer] = []
    hold = threading.Event()

    def delay(session: Session, message: dict[str, Any]) -> None:
        if hold.is_set() and message.get("method") != "echo" and message.get("id") is None:
            late.append(threading.Timer(1, session.give, (message,)))
            late[-1].start()
        else:
            session.give(message)

    deadline = Deadline(TIMEOUT * 30)
    ids = (("pyqemu-ifup", "1"), ("pyqemu-ifindex", "7"))
    ovs.add_bridge("br-int")
    ovs.add_port("br-int", "web0")
    ovs.vsctl("set", "interface", "web0", *(f"external_ids:{key}={value}" for key, value in ids))
    with Proxy(ovs.db, delay) as proxy, Database(proxy.address, "web0") as database:

        def wait(seconds: float) -> None:
            ovsdb_connection.wait([database], deadline, seconds)

        finish(database.connected(deadline), wait)
        hold.set()
        ovs.vsctl("set", "interface", "web0", "external_ids:other=1")
        began = time.monotonic()
        finish(database.del_port(DelPort(proxy.address, "br-int", "web0", ids), deadline), wait)
        assert time.monotonic() > began + 0.9
        # NOTE: it may be tried anew for each update that has come, whatever that was of.
        assert 2 <= len(proxy.requests("transact")) <= 1 + len(late)
        for timer in late:
            timer.join()
    assert ovs.find("Port", "web0") is None
    ovs.vsctl("del-br", "br-int")


def wrong(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Put something else into each row that a message tells."""

    def spoil(session: Session, message: dict[str, Any]) -> None:
        told = message.get("params") or message.get("result")
        tables = told[-1] if isinstance(told, list) and told else {}
        for rows in tables.values() if isinstance(tables, dict) else ():
            for row in rows.values():
                for kind in row.keys() & {"initial", "insert", "modify"}:
                    row[kind] = change(row[kind])
        session.give(message)

    return spoil


WRONG: list[Callable[[dict[str, Any]], object]] = [
    lambda row: [],
    lambda row: {key: {"a": 1} for key in row},
    lambda row: {key: [] for key in row},
    lambda row: {"a": 1},
]


@pytest.mark.parametrize("first", [0, 2])
def test_rows_of_a_wrong_type_are_believed_nowhere(site: Site, first: int) -> None:
    """Least of all on the way back, which takes away what they hide."""
    statuses = set()
    number = 1
    while True:
        nth = Nth(number, wrong(WRONG[(first + number) % len(WRONG)]))
        site.open()
        with Proxy(site.ovs.db, nth) as proxy:
            site.policy(proxy.address)
            ended = site.up()
            if ended.status != 0:
                assert "does not speak OVSDB" in ended.stderr, ended
                assert site.is_clean()
        statuses.add(ended.status)
        site.tap.close()
        site.gc()
        assert site.row() is None
        if nth.count < number:
            break
        number += 1
    assert statuses == {0, 71}


def test_a_fault_of_ours_is_no_nonsense_of_the_server_s(
    inside: Namespace, ovs: OpenVSwitch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported with its traceback, and the database is believed on the way back."""
    ovs.add_bridge("br-int", mtu=1500)
    inside.tap("web0")

    def fail(vlan: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(pyqemu_ifup.kinds.openvswitch, "vlan_columns", fail)
    with pytest.raises(KeyError, match="ours"):
        plug(inside, port_of("web0", "br-int", ovsdb=ovs.db))
    assert ovs.find("Port", "web0") is None
    assert "UP" not in inside.link("web0")["flags"]
    inside.close_kept()
    ovs.vsctl("del-br", "br-int")


@pytest.mark.parametrize("first", [True, False], ids=["wanted", "in the policy"])
def test_way_back_asks_the_database_that_the_mark_names(
    inside: Namespace, ovs: OpenVSwitch, tmp_path: Path, first: bool
) -> None:
    """Nobody answers at another one, which the tap is for by now, or which the policy names."""
    ovs.add_bridge("br-int", mtu=1500)
    inside.add_bridge("br0")
    inside.tap("web0", persist=True)
    plug(inside, port_of("web0", "br-int", ovsdb=ovs.db))
    dead = f"unix:{tmp_path}/dead"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(dead.removeprefix("unix:"))
    wanted = port_of("web0", "br-int", ovsdb=dead) if first else port_of("web0", "br0")
    with pytest.raises(Failure, match="nothing answers at"):
        plug(inside, wanted, ovsdbs=[dead])
    link = inside.link("web0")
    assert "UP" not in link["flags"] and not link.get("ifalias")
    assert ovs.find("Port", "web0") is None
    inside.close_kept()
    inside.ip("link", "del", "web0")
    inside.ip("link", "del", "br0")
    ovs.vsctl("del-br", "br-int")


@pytest.mark.alone("changes the hook's own process")
def test_way_back_has_its_time_from_the_first_look_on(site: Site) -> None:
    """On a busy host that look alone may last longer than the deadline had slack for."""
    site.open()
    assert site.up().status == 0
    site.ovs.server.stop()

    def look_slowly() -> None:
        look = Host.look

        def slow(self: Host, tap: str, bridge: str | None) -> Seen:
            time.sleep(3 * pyqemu_ifup.hook.SLACK)
            return look(self, tap, bridge)

        setattr(Host, "look", slow)  # noqa: B010  a method is no variable to mypy

    ended = site.up(look_slowly)
    link = site.netns.link("web0")
    site.ovs.server.cont()
    assert ended.status == 75, ended
    assert "UP" not in link["flags"] and "ifalias" not in link
    assert any("a port may be left in" in line for line in ended.log), ended.log
    site.gc()
    assert site.row() is None


def test_stopped_while_the_database_is_mute_it_says_what_may_be_left(site: Site) -> None:
    site.open()
    site.policy(timeout=30)
    site.ovs.vswitchd.stop()
    call = site.calls.start("pyqemu-ifup", "web0")
    site.ovs.vsctl("--no-wait", "--timeout=5", "wait-until", "Port", "web0")
    site.ovs.server.stop()
    os.kill(call.pid, signal.SIGTERM)
    told_what_is_left(site, call.wait())


@pytest.mark.alone("the agent knows the row already")
def test_stopped_before_it_knows_an_earlier_port_it_says_that_may_be_left(site: Site) -> None:
    site.open()
    with Proxy(site.ovs.db) as proxy:
        site.policy(proxy.address, timeout=30)
        assert site.calls.up("web0").status == 0
        asked: list[Session] = []
        proxy.spoil = lambda session, message: asked.append(session)
        call = site.calls.start("pyqemu-ifup", "web0")
        until(lambda: bool(asked), "the hook asks the database")
        os.kill(call.pid, signal.SIGTERM)
        told_what_is_left(site, call.wait())


def told_what_is_left(site: Site, ended: Ended) -> None:
    """Check what an up says that has been stopped, and that gc finds what it says."""
    _check(ended)
    site.ovs.server.cont()
    site.ovs.vswitchd.cont()
    assert ended.status == 75
    assert "stopped: received SIGTERM; pyqemu-ifctl gc web0 removes what is left" in ended.stderr
    link = site.netns.link("web0")
    assert "UP" not in link["flags"] and "ifalias" not in link
    # NOTE: where a proxy stands before the database, that is still mute.
    site.policy()
    run_told(site.calls.hooks, ended.stderr)
    assert site.row() is None


# Killed


@pytest.mark.alone("changes the hook's own process")
def test_killed_at_each_step_leaves_what_gc_and_the_next_up_mend(site: Site) -> None:
    """SIGKILL before and after each step: the row goes with the tap, and an up converges."""

    def killed_at(number: int, *, after: bool) -> Change:
        def change() -> None:
            run = Host.run
            count = 0

            async def mortal(self: Host, step: Op) -> None:
                nonlocal count
                count += 1
                if count == number and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                await run(self, step)
                if count == number and after:
                    os.kill(os.getpid(), signal.SIGKILL)

            setattr(Host, "run", mortal)  # noqa: B010  a method is no variable to mypy

        return change

    site.policy(timeout=10)
    for program, least in (("pyqemu-ifup", 6), ("pyqemu-ifdown", 3)):
        for place in itertools.count(4):
            number, after, converge = place // 4, bool(place & 2), bool(place & 1)
            site.open()
            if program == "pyqemu-ifdown":
                assert site.calls.up("web0").status == 0
            call = site.calls.start(program, "web0", change=killed_at(number, after=after))
            killed = call.wait().status == -signal.SIGKILL
            if converge:
                up = site.calls.up("web0")
                assert up.status == 0, up
                row = site.row()
                assert row is not None and row["tag"] == 10
                assert site.calls.down("web0").status == 0
            site.tap.close()
            site.gc()
            assert site.row() is None
            clean = Snapshot(
                {name: value for name, value in site.clean.entries.items() if "web0" not in name}
            )
            assert leftovers(clean, site.netns, site.ovs) == []
            if not killed:
                assert number > least
                break
