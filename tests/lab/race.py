"""A guest that ends while somebody who has its tap in hand stands still.

The guest is a process that holds its tap under a command line like QEMU's; its hooks, and who races
them, are forked, and run what the programs run once they have read the policy. Who races is stopped
at a moment of its work: before each look at, and each change of, links, databases, /proc or a
lock.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pyqemu_ifctl.in_force
import pyqemu_ifup.system.lock
from lab.netns import Namespace
from lab.plug import ALLOWED, attach_now, detach_now
from lab.taps import Tap
from pyqemu_ifconf.policy import Caller, Port
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.ovsdb import Database
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.host import Host

PATIENCE = 60
"""Seconds after which a process that does not do its part fails its test."""
MOMENTS: tuple[tuple[Any, str], ...] = (
    (Host, "look"),
    (Netlink, "links"),
    (Netlink, "look_up"),
    (Netlink, "run"),
    (Database, "_commit"),
    (pyqemu_ifup.system.lock, "open_lock"),
    (pyqemu_ifup.system.lock.Lock, "close"),
    (pyqemu_ifctl.in_force, "all_holders"),
)
"""Where a process can be stopped: right before each call of these."""


def fork(run: Callable[[], object]) -> int:
    """Run `run` in a forked process, which ends with 0 where it returns; return its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(PATIENCE)
            run()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return pid


def wait(pid: int, seconds: float = PATIENCE) -> int | None:
    """Return the exit status of a child, None where it still runs after `seconds`."""
    handle = os.pidfd_open(pid)
    try:
        if not select.select([handle], [], [], seconds)[0]:
            return None
    finally:
        os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_stopped(pid: int) -> bool:
    """Wait until a child has stopped itself, True, or has ended, False."""
    seen = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return seen is not None and seen.si_code == os.CLD_STOPPED


def stop_at(number: int, moments: Sequence[tuple[Any, str]] = MOMENTS) -> None:
    """Have this process stop itself before the moment of this number, from 0."""
    counted = itertools.count()

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if next(counted) == number:
                os.kill(os.getpid(), signal.SIGSTOP)
            return real(*args, **more)

        return call

    for owner, name in moments:
        setattr(owner, name, wrap(getattr(owner, name)))


class Guest:
    """A guest on a tap of its own, attached as `port` says, or with `plugged` false not yet."""

    def __init__(
        self, netns: Namespace, port: Port, *, persist: bool, plugged: bool = True
    ) -> None:
        self.netns = netns
        self.port = port
        heard, self.life = os.pipe()
        told, tell = os.pipe()
        words = f"tap,ifname={port.tap},script=/usr/local/bin/pyqemu-ifup"

        def run() -> None:
            os.close(self.life)
            with netns.enter():
                tap = Tap(port.tap, persist=persist)
                os.set_inheritable(tap.fd, True)
                os.dup2(heard, 0)
                os.dup2(tell, 1)
                os.execv("/bin/sh", ["sh", "-c", "echo; read end", "qemu", "-netdev", words])

        self.ended = False
        self.pid = fork(run)
        os.close(heard)
        os.close(tell)
        assert os.read(told, 1) == b"\n"
        os.close(told)
        if plugged:
            assert wait(self.begin(port)) == 0

    def begin(self, port: Port) -> int:
        """Have it call its script, for what `port` says; return the script's process."""

        def run() -> None:
            caller = Caller(port.tap, vm="web")
            with self.netns.enter():
                attach_now(port, caller, self.pid, port.place.databases, Deadline(ALLOWED), _mute)

        return fork(run)

    def kill(self) -> None:
        """Have it end without its downscript."""
        os.close(self.life)
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """Return when it has ended, as often as it is asked."""
        if not self.ended:
            wait(self.pid)
        self.ended = True

    def end(self) -> int:
        """Have it call its downscript, and end with that; return the script's process."""

        def run() -> None:
            with self.netns.enter():
                detach_now(self.port.tap, self.pid, Deadline(ALLOWED), _mute)

        down = fork(run)
        os.close(self.life)
        return down


def _mute(_: str) -> None:
    """Tell nobody."""
