"""Macvtaps held as QEMU holds them, and the frames that filters at such a link are tried with."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lab.netns import Namespace, setns
from lab.taps import (
    BROADCAST,
    IFF_NO_PI,
    IFF_TAP,
    IFF_VNET_HDR,
    LOCAL_EXPERIMENT,
    SIOCSIFHWADDR,
    TUNSETIFF,
    VNET_HDR_LEN,
    Raw,
    Tap,
    mac,
)
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifdown.detach import detach
from pyqemu_ifup.access import find_user
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.host import Host
from pyqemu_ifup.tap_request import Wish, attach_tap, make_tap
from pyqemu_ifup.task import Task

ARPHRD_ETHER = 1
TUNGETIFF = 0x800454D2
OWN, FOREIGN, PEER = mac(6), mac(0x99), mac(0x77)
"""The MAC that the guest is given, one that it takes, and that of somebody on the wire."""
GROUP = bytes.fromhex("333300000001")
NAMES = {OWN: "own", FOREIGN: "foreign", BROADCAST: "broadcast", GROUP: "group"}
ARRIVAL, LINGER = 30.0, 0.3
"""Seconds that a frame is given which comes through, and those behind it which must not."""


class Macvtap(Tap):
    """A macvtap of the namespace, held by one descriptor: `send` and `recv` are the guest's."""

    def __init__(self, namespace: Namespace, name: str) -> None:
        # NOTE: /dev/tapN is named by the ifindex alone, so that one of another namespace may be
        # there by that name; and sysfs shows the links of the namespace that it was mounted in.
        told = subprocess.run(
            ["ip", "netns", "exec", namespace.name, "sh", "-c"]
            + ["cat /sys/class/net/$0/macvtap/tap*/dev", name],
            check=True,
            capture_output=True,
            text=True,
        )
        numbers = os.makedev(*map(int, told.stdout.split(":")))
        with tempfile.TemporaryDirectory() as folder:
            node = Path(folder, "tap")
            os.mknod(node, 0o20600, numbers)
            self.fd = os.open(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.name = name
        self.header = bytes(VNET_HDR_LEN)
        request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
        fcntl.ioctl(self.fd, TUNSETIFF, request)

    @classmethod
    def held(cls, name: str, descriptor: int) -> Macvtap:
        """Return the macvtap of a queue that is open already, with the header that it has."""
        macvtap = cls.__new__(cls)
        macvtap.fd, macvtap.name = descriptor, name
        macvtap.header = bytes(VNET_HDR_LEN if macvtap.has_header() else 0)
        return macvtap

    def has_header(self) -> bool:
        """Tell whether a header with the guest's offloads stands before each frame."""
        told = fcntl.ioctl(self.fd, TUNGETIFF, bytes(40))
        (flags,) = struct.unpack_from("H", told, 16)
        return bool(flags & IFF_VNET_HDR)

    def __enter__(self) -> Macvtap:
        return self

    def set_mac(self, address: bytes) -> None:
        """Give the link another MAC, as whoever holds the descriptor may."""
        request = struct.pack("16sH6s16x", self.name.encode(), ARPHRD_ETHER, address)
        fcntl.ioctl(self.fd, SIOCSIFHWADDR, request)


CLONE_NEWNS = 0x20000
MS_REC, MS_PRIVATE = 0x4000, 0x40000


@contextmanager
def given(namespace: Namespace, text: str, *taps: str) -> Iterator[dict[str, Macvtap]]:
    """Give root the taps of guests of a policy, as `pyqemu-ifctl run` does; take them away again.

    In a thread that has a /sys of the namespace's own.
    """
    policy = parse_policy([Source("p.yaml", text.encode())])
    found: dict[str, Macvtap] = {}
    libc = ctypes.CDLL(None, use_errno=True)

    def call(done: int) -> None:
        if done != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def run(work: Callable[[Host], Task[None]]) -> None:
        with Host(None, Deadline(60), lambda command: None) as host:
            host.finish(work(host))

    def begin() -> None:
        setns_of(namespace)
        call(libc.unshare(CLONE_NEWNS))
        call(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
        call(libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None))

    def give(tap: str) -> None:
        nic = next(nic for vm in policy.vms.values() for nic in vm.nics if nic.tap == tap)
        wish = Wish(nic.network or "", tap, 1, vnet_hdr=True, for_parent=False)
        with Netlink() as kernel:
            new = make_tap(kernel, policy, find_user(0), os.getpid(), wish)
        run(lambda host: attach_tap(host, policy, new))
        found[tap] = Macvtap.held(tap, new.descriptors[0])

    with ThreadPoolExecutor(1) as thread:
        thread.submit(begin).result()
        try:
            for tap in taps:
                thread.submit(give, tap).result()
            yield found
        finally:
            for name, macvtap in found.items():
                macvtap.close()
                thread.submit(run, partial(detach, tap=name, parent=os.getpid())).result()


def setns_of(namespace: Namespace) -> None:
    """Put the calling thread into a namespace, for good."""
    with open(namespace.path) as file:
        setns(file.fileno())


def tag(vid: int, ethertype: int = 0x8100, priority: int = 0) -> bytes:
    """Return a VLAN tag as a frame has it."""
    return struct.pack("!HH", ethertype, priority << 13 | vid)


UNTAGGED = "untagged"
TAGGED = {
    "[0]": tag(0),
    "[0] of priority 5": tag(0, priority=5),
    "[20]": tag(20),
    "[4095]": tag(4095),
    "[0][20]": tag(0) + tag(20),
    "[20][0]": tag(20) + tag(0),
    "[0][0]": tag(0) + tag(0),
    "[0][0][20]": tag(0) + tag(0) + tag(20),
    "88a8[20]": tag(20, 0x88A8),
    "88a8[0]": tag(0, 0x88A8),
    "[0]88a8[20]": tag(0) + tag(20, 0x88A8),
    "9100[20]": tag(20, 0x9100),
    "9200[20]": tag(20, 0x9200),
    "9300[20]": tag(20, 0x9300),
    "[0]9100[20]": tag(0) + tag(20, 0x9100),
}
"""What stands before the type of a frame, by its name; the outermost tag first."""
IN_NO_VLAN = (UNTAGGED, "[0]", "[0] of priority 5")


@dataclass(frozen=True)
class Case:
    """A frame, the way it goes, and what stops it: "tags", "macs" or "kernel", whichever filters.

    `changed`: the guest has taken FOREIGN for its MAC before.
    """

    out: bool
    source: bytes
    destination: bytes
    tags: str
    stopped_by: frozenset[str] = frozenset()
    changed: bool = False
    token: bytes = field(default_factory=lambda: os.urandom(12), compare=False)

    @property
    def name(self) -> str:
        """What the case is called."""
        way = "sends" if self.out else "hears"
        end = self.source if self.out else self.destination
        other = " to one" if self.out and self.destination == PEER else ""
        return f"{'changed ' if self.changed else ''}{way} {NAMES[end]}{other} {self.tags}"

    @property
    def frame(self) -> bytes:
        """The frame as it is sent."""
        head = self.destination + self.source + TAGGED.get(self.tags, b"")
        return (head + struct.pack("!H", LOCAL_EXPERIMENT) + self.token).ljust(60, b"\0")


def _cases() -> tuple[Case, ...]:
    found: list[Case] = []

    def add(
        out: bool, end: bytes, tags: Sequence[str], *stopped: str, changed: bool = False
    ) -> None:
        source, destination = (end, BROADCAST) if out else (PEER, end)
        for each in tags:
            by = {*stopped} | (set() if each in IN_NO_VLAN else {"tags"})
            found.append(Case(out, source, destination, each, frozenset(by), changed))

    every, some = (UNTAGGED, *TAGGED), (UNTAGGED, "[0]", "[20]")
    add(True, OWN, every)
    add(True, FOREIGN, some, "macs")
    found.append(Case(True, OWN, PEER, UNTAGGED))
    add(False, OWN, every)
    add(False, BROADCAST, every)
    add(False, GROUP, some)
    # A macvlan looks frames to one receiver up by the MAC.
    add(False, FOREIGN, some, "kernel")
    add(True, OWN, some, changed=True)
    add(True, FOREIGN, some, "macs", changed=True)
    add(False, FOREIGN, some, "macs", changed=True)
    add(False, OWN, some, "kernel", changed=True)
    add(False, BROADCAST, some, changed=True)
    return tuple(found)


CASES = _cases()


def arriving(macvtap: Macvtap, wire: Raw, on_wire: bytes = b"") -> set[str]:
    """Send the frames of all cases; return the names of those that arrive, as they were sent.

    `wire` is the other end of the parent's wire, and `on_wire` the tag that each frame has there.
    Leaves the link with FOREIGN for its MAC. Raises RuntimeError if nothing comes through at all.
    """
    found: set[str] = set()
    for changed in (False, True):
        if changed:
            macvtap.set_mac(FOREIGN)
        for out in (True, False):
            cases = [each for each in CASES if (each.out, each.changed) == (out, changed)]
            # NOTE: a broadcast to the guest takes another way through the kernel, and longer.
            last = Case(out, OWN if out else PEER, BROADCAST, UNTAGGED)
            for each in (*cases, last):
                if out:
                    macvtap.send(each.frame)
                else:
                    wire.send(tagged(each.frame, on_wire))
            got = received(wire.recv if out else macvtap.recv, last.token)
            there = on_wire if out else b""
            found |= {each.name for each in cases if tagged(each.frame, there) in got}
    return found


def tagged(data: bytes, before: bytes) -> bytes:
    """Return the frame with a tag before all that it has."""
    return data[:12] + before + data[12:]


def received(recv: Callable[[float], bytes | None], last: bytes) -> list[bytes]:
    """Return what comes in until a while after the frame that holds `last`.

    Raises RuntimeError if that does not come.
    """
    found: list[bytes] = []
    end = time.monotonic() + ARRIVAL
    while (data := recv(max(0.0, end - time.monotonic()))) is not None:
        if last in data:
            end = time.monotonic() + LINGER
        found.append(data)
    if not any(last in each for each in found):
        raise RuntimeError("a frame that nothing should stop does not come")
    return found
