"""Traffic from and to one guest while its VLANs change: a sender on each side, a sniffer on each.

Each frame says when it was sent. With the times at which each policy began and ended to be in
force, it is told for each that came through whether any policy between its start and its arrival
allows it.
"""

from __future__ import annotations

import errno
import os
import pickle
import random
import select
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from lab.netns import Namespace
from lab.plug import ALLOWED
from lab.taps import FRAME_MAX, Tap, frame, mac, tags
from pyqemu_ifconf.policy import Policy, Vlan
from pyqemu_ifctl.in_force import apply_policy
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.host import Host

UNTAGGED_VLAN = 0
VLANS = (UNTAGGED_VLAN, 10, 20, 30, 40)
GUEST = 0xFFFF
"""The guest's number as a sender; that of the others is their VLAN."""
FORM = struct.Struct("!8sdHH")
PACE = 0.001
"""Seconds between one go of all senders and the next."""
DWELL = 0.01
"""Seconds that a policy stays in force once it is."""


def vlan(vid: int) -> Vlan:
    """Return an access port's VLAN."""
    return Vlan(vid)


def trunk(*vids: int) -> Vlan:
    """Return a trunk."""
    return Vlan(None, vids)


def native(vid: int, *vids: int) -> Vlan:
    """Return a trunk with a native VLAN."""
    return Vlan(vid, vids)


def spelled(vlan: Vlan | None) -> str:
    """Return the VLAN as a policy has it."""
    if vlan is None:
        return "none"
    if not vlan.trunk:
        return str(vlan.native)
    of_native = f"native: {vlan.native}, " if vlan.native is not None else ""
    return f"{{{of_native}trunk: [{', '.join(map(str, vlan.trunk))}]}}"


@dataclass(frozen=True)
class Arrival:
    """A frame that came through: into or out of VLAN `vid`; `tag` is the guest's, 0 for none."""

    sent: float
    came: float
    from_guest: bool
    vid: int
    tag: int

    def is_allowed(self, vlan: Vlan | None, untagged: int) -> bool:
        """Tell whether a policy lets it through; without a VLAN it has `untagged`."""
        vlan = Vlan(untagged) if vlan is None else vlan
        if self.tag == 0:
            return self.vid == vlan.native
        # NOTE: a port takes a frame that is tagged with its own native VLAN, into that one.
        own = (vlan.native,) if self.from_guest else ()
        return self.vid == self.tag and self.vid in (*vlan.trunk, *own)


@dataclass(frozen=True)
class Reign:
    """When a policy may have been in force: from the start of its change to the end of the next."""

    vlan: Vlan | None
    begin: float
    settled: float
    end: float


class Storm:
    """The guest `web0`, and one more in each VLAN of VLANS, all of which send without a pause.

    A context manager. The sniffers' ports are the test's to make. `untagged` is the VLAN that a
    policy without one means.
    """

    def __init__(self, netns: Namespace, *, untagged: int = UNTAGGED_VLAN) -> None:
        self.netns = netns
        self.untagged = untagged
        self.guest = netns.tap("web0")
        self.sniffers = {vid: netns.tap(f"sniff{vid}", up=True) for vid in (*VLANS[1:], untagged)}
        self.reigns: list[Reign] = []
        self.arrivals: list[Arrival] = []
        self.magic = b"storm" + os.urandom(3)
        self._pid = 0

    def __enter__(self) -> Storm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pid:
            os.kill(self._pid, 9)
            os.waitpid(self._pid, 0)

    def run(self, policies: Sequence[tuple[Vlan | None, Policy]], changes: int) -> None:
        """Put one of the policies in force after the other, in a random order, under traffic."""
        stop_read, stop_write = os.pipe()
        read, write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(stop_write)
            self._traffic(stop_read, write)
            os._exit(0)
        os.close(write)
        choose = random.Random(4711)
        last: int | None = None
        begun: list[tuple[Vlan | None, float, float]] = []
        with self.netns.enter(), Host(None, Deadline(ALLOWED), lambda _: None) as host:
            for _ in range(changes):
                last = choose.choice([at for at in range(len(policies)) if at != last])
                vlan, policy = policies[last]
                begin = time.monotonic()
                (outcome,) = apply_policy(host, policy, ["web0"])[0]
                begun.append((vlan, begin, time.monotonic()))
                assert outcome.result == "changed", outcome.failure
                time.sleep(DWELL)
        os.close(stop_write)
        with os.fdopen(read, "rb") as pipe:
            self.arrivals = pickle.loads(pipe.read())
        os.waitpid(self._pid, 0)
        self._pid = 0
        os.close(stop_read)
        ends = [settled for _, _, settled in begun[1:]] + [time.monotonic()]
        self.reigns = [Reign(*each, end) for each, end in zip(begun, ends, strict=True)]

    def _traffic(self, stop: int, out: int) -> None:
        found: list[Arrival] = []
        taps = {self.guest.fd: GUEST} | {tap.fd: vid for vid, tap in self.sniffers.items()}
        due = 0.0
        while True:
            ready = select.select([*taps, stop], [], [], max(0.0, due - time.monotonic()))[0]
            if stop in ready:
                break
            for fd in ready:
                self._take(fd, taps[fd], found)
            if time.monotonic() >= due:
                for tag in VLANS:
                    self._send(self.guest, GUEST, tag)
                for vid, tap in self.sniffers.items():
                    self._send(tap, vid, 0)
                due = time.monotonic() + PACE
        with os.fdopen(out, "wb") as pipe:
            pickle.dump(found, pipe)

    def _send(self, tap: Tap, who: int, tag: int) -> None:
        payload = FORM.pack(self.magic, time.monotonic(), who, tag)
        try:
            tap.send(frame(mac(who & 0xFF), payload=payload, vids=(tag,) if tag else ()))
        except OSError as error:
            # EIO: the tap is down.
            if error.errno not in (errno.EIO, errno.EAGAIN):
                raise

    def _take(self, fd: int, who: int, found: list[Arrival]) -> None:
        while True:
            try:
                got = os.read(fd, FRAME_MAX)
            except BlockingIOError:
                return
            came = time.monotonic()
            at = got.find(self.magic)
            if at < 0:
                continue
            _, sent, sender, tag = FORM.unpack_from(got, at)
            stack = tags(got)
            if who == GUEST and sender != GUEST:
                found.append(Arrival(sent, came, False, sender, stack[0] if stack else 0))
            elif who != GUEST and sender == GUEST:
                # A sniffer's own port is an access port: what it gets is of its VLAN.
                found.append(Arrival(sent, came, True, who, tag))

    def wrong(self, *, older: int = 1) -> list[Arrival]:
        """Return the frames that no policy allows which was in force while they were under way.

        A policy, old or new, counts from the start of the change to it to the end of the change
        from it, and for as many more changes as `older` says: ovs-vswitchd renews its flows a
        little after it has said that it took a change in, so that 1 is for the change just made.
        """
        return [each for each in self.arrivals if not self._is_allowed(each, older)]

    def _is_allowed(self, arrival: Arrival, older: int) -> bool:
        last = len(self.reigns) - 1
        return any(
            reign.begin <= arrival.came
            and self.reigns[min(at + older, last)].end >= arrival.sent
            and arrival.is_allowed(reign.vlan, self.untagged)
            for at, reign in enumerate(self.reigns)
        )

    def quiet(self) -> int:
        """Return in how many reigns not one frame came through that was sent in it."""
        return sum(
            not any(reign.settled <= each.sent <= reign.end for each in self.arrivals)
            for reign in self.reigns
        )
