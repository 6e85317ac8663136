"""The hooks' own work in the test's process, and frames of every kind sent through the result.

`plug` and `unplug` are what the programs call once they have read the policy: the same code,
without an interpreter's start and imports, which take seconds inside the User Mode Linux.
"""

from __future__ import annotations

import errno
import json
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Protocol

import pytest

from lab.netns import Namespace
from lab.ports import place_on
from lab.taps import FRAME_MAX, Tap, frame, mac, tags
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.policy import Caller, Kind, Policy, Port, PortSettings, Position, Vlan
from pyqemu_ifctl.in_force import Outcome, apply_policy
from pyqemu_ifdown.detach import detach
from pyqemu_ifup.attach import attach
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.holder import Holder
from pyqemu_ifup.host import Host
from pyqemu_ifup.ops import Op

Tags = tuple[int, ...]
"""The VIDs of a frame's VLAN tags, the outermost first."""
UNTAGGED: Tags = ()
ALLOWED = 60.0
"""Seconds that an up or a down may take here; the hooks' own deadline has its own tests."""
RESEND = 0.3
ARRIVAL = 30.0
"""Seconds after which a frame that must come through is given up.

Far more than one takes: in a busy User Mode Linux ovs-vswitchd takes up to 10 s for a bridge.
"""
PACE = 0.0005
"""Seconds between one go of a guest that blasts and the next."""
LINGER = 0.3
"""Seconds that a frame is given which must not come through, after all others have."""


class Sender(Protocol):
    """Who sends as a guest does: a Tap, or a Station behind a QEMU."""

    def send(self, frame: bytes) -> None:
        """Send `frame`."""


def port_of(
    tap: str,
    bridge: str,
    *,
    vlan: Vlan | None = None,
    kind: Kind | None = None,
    ovsdb: str = DEFAULT_OVSDB,
    mtu: int | None = None,
    isolated: bool = False,
    external_ids: tuple[tuple[str, str], ...] = (),
    txqueuelen: int | None = None,
) -> Port:
    """Return what a policy with one network, `lan`, makes of the tap."""
    return Port(
        tap,
        "lan",
        place_on(bridge, kind, ovsdb),
        Position("policy.yaml", 1, 1),
        PortSettings(mtu, vlan, isolated, external_ids, txqueuelen),
    )


def attach_now(
    port: Port,
    caller: Caller,
    pid: int,
    ovsdbs: Iterable[str] = (),
    deadline: Deadline | None = None,
    tell: Callable[[str], None] = lambda _: None,
    *,
    brief: bool = False,
) -> None:
    """Attach the tap in this network namespace for the process `pid`, its QEMU. Raises Failure.

    `ovsdbs` are the databases of the policy's other networks; `brief` is as in Host.
    """
    limit = deadline or Deadline(ALLOWED)
    with Host(port.tap, limit, tell, ovsdbs=ovsdbs, brief=brief) as host:
        host.finish(attach(host, port, Holder(caller, pid)))


def detach_now(
    tap: str,
    pid: int,
    deadline: Deadline | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Detach the tap in this network namespace for the process `pid`, its QEMU. Raises Failure."""
    with Host(tap, deadline or Deadline(ALLOWED), tell) as host:
        host.finish(detach(host, tap, pid))


def plug(
    netns: Namespace, port: Port, *, ovsdbs: Iterable[str] = (), seconds: float = ALLOWED
) -> None:
    """Attach the tap in `netns` for this process, its QEMU. Raises Failure.

    `ovsdbs` are the databases of the policy's other networks.
    """
    caller = Caller(port.tap, vm="web")
    with netns.enter():
        attach_now(port, caller, os.getpid(), ovsdbs, Deadline(seconds))


def unplug(netns: Namespace, tap: str) -> None:
    """Detach the tap in `netns` for this process, its QEMU. Raises Failure."""
    with netns.enter():
        detach_now(tap, os.getpid())


def reapply(netns: Namespace, policy: Policy, *taps: str, dry_run: bool = False) -> list[Outcome]:
    """Put a policy in force on the taps in `netns`, as pyqemu-ifctl apply does."""
    with netns.enter(), Host(None, Deadline(ALLOWED), lambda _: None) as host:
        outcomes, remarks = apply_policy(host, policy, taps, dry_run=dry_run)
    assert remarks == []
    return outcomes


def meddle(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Op],
    act: Callable[[], object],
    *,
    after: bool = False,
) -> None:
    """Have somebody else `act` right before our first step of this kind, or right after it."""
    real = Host.run
    acted: list[Op] = []

    async def run(self: Host, step: Op) -> None:
        mine = isinstance(step, kind) and not acted
        if mine and not after:
            acted.append(step)
            act()
        await real(self, step)
        if mine and after:
            acted.append(step)
            act()

    monkeypatch.setattr(Host, "run", run)


def break_after_each(
    monkeypatch: pytest.MonkeyPatch, attempt: Callable[[], None], check: Callable[[], None]
) -> list[str]:
    """Have `attempt` fail after its first step, then after its second, and so on; `check` each.

    Returns the steps' names once it has come through.
    """
    real = Host.run
    names: list[str] = []
    until_broken = 0

    async def run(self: Host, step: Op) -> None:
        nonlocal until_broken
        await real(self, step)
        until_broken -= 1
        if until_broken == 0:
            names.append(type(step).__name__)
            raise Failure(Status.TRY_AGAIN, "broken by the test")

    with monkeypatch.context() as patch:
        patch.setattr(Host, "run", run)
        while True:
            until_broken = len(names) + 1
            try:
                attempt()
            except Failure as failure:
                if failure.what != "broken by the test":
                    raise
                check()
            else:
                return names


def vids_of(netns: Namespace, tap: str) -> dict[int, str]:
    """Return the VIDs of a bridge port with their flags in short: `pvid untagged`, or nothing."""
    printed = json.loads(netns.run(["bridge", "-j", "vlan", "show", "dev", tap]).stdout or "[]")
    found: dict[int, str] = {}
    for entry in (vlan for link in printed for vlan in link["vlans"]):
        flags = entry.get("flags", [])
        words = [
            word
            for flag, word in (("PVID", "pvid"), ("Egress Untagged", "untagged"))
            if flag in flags
        ]
        for vid in range(entry["vlan"], entry.get("vlanEnd", entry["vlan"]) + 1):
            found[vid] = " ".join(words)
    return found


def crossing(
    src: Sender, dst: Tap, expected: Mapping[Tags, Tags | None]
) -> dict[Tags, Tags | None]:
    """Send a broadcast of each kind of `expected` and return how each came out, None: not at all.

    Those that `expected` wants to come are sent again until they do, for a switch that has yet to
    learn of a link; the others are sent once more when they have, and given time to come.
    """
    payloads = {stack: f"crossing {os.urandom(6).hex()}".encode() for stack in expected}
    found: dict[Tags, Tags | None] = dict.fromkeys(expected)

    def send(stacks: Iterable[Tags]) -> None:
        for stack in stacks:
            src.send(frame(mac(1), payload=payloads[stack], vids=stack))

    def receive(until: float, awaited: Iterable[Tags]) -> None:
        awaited = set(awaited)
        while select.select([dst.fd], [], [], max(0.0, until - time.monotonic()))[0]:
            got = os.read(dst.fd, FRAME_MAX)[len(dst.header) :]
            for stack, payload in payloads.items():
                if payload in got:
                    found[stack] = tags(got)
                    awaited.discard(stack)
            if not awaited:
                return

    wanted = [stack for stack, result in expected.items() if result is not None]
    send(expected)
    end = time.monotonic() + ARRIVAL
    while missing := [stack for stack in wanted if found[stack] is None]:
        if time.monotonic() > end:
            return found
        receive(time.monotonic() + RESEND, missing)
        send(stack for stack in missing if found[stack] is None)
    unwanted = [stack for stack, result in expected.items() if result is None]
    if unwanted:
        send(unwanted)
        receive(time.monotonic() + LINGER, unwanted)
    return found


class Blast:
    """A guest that sends without a pause, from the tap's first moment; a context manager.

    A tap that is down takes no frame (EIO), so what comes out shows where the tap was when it was
    up. `seen` gives the tags of what `dst` has got.
    """

    def __init__(self, src: Sender, *observers: Tap) -> None:
        # NOTE: what another one has sent may still stand in an observer's queue.
        self.payload = b"blasted " + os.urandom(6).hex().encode()
        self.src = src
        self.observers = observers
        self._found: dict[str, set[Tags]] = {tap.name: set() for tap in observers}
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send)]
        self._threads += [threading.Thread(target=self._watch, args=(tap,)) for tap in observers]

    def __enter__(self) -> Blast:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        frames = [
            frame(mac(1), payload=self.payload, vids=stack)
            for stack in (UNTAGGED, (1,), (10,), (20,), (100,))
        ]
        while not self._stop.is_set():
            try:
                for each in frames:
                    self.src.send(each)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EAGAIN):
                    raise
            # NOTE: without a pause it would take a processor from the hook that it waits for.
            self._stop.wait(PACE)

    def _watch(self, tap: Tap) -> None:
        while not self._stop.is_set():
            if not select.select([tap.fd], [], [], 0.05)[0]:
                continue
            got = os.read(tap.fd, FRAME_MAX)[len(tap.header) :]
            if self.payload in got and tags(got) not in self._found[tap.name]:
                with self._changed:
                    self._found[tap.name].add(tags(got))
                    self._changed.notify_all()

    def seen(self, tap: Tap) -> set[Tags]:
        """Return the kinds of frames that `tap` has got so far."""
        return set(self._found[tap.name])

    def wait_for(self, tap: Tap, stack: Tags) -> None:
        """Return when `tap` has got a frame with these tags; raise TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: stack in self._found[tap.name], ARRIVAL):
                raise TimeoutError(f"{tap.name} gets no frame with tags {stack}")
