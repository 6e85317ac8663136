"""The kinds of network as the suite that every kind runs needs them: a row each.

A new kind is one class here and its row in ROWS. What a row has to say is how to make one of its
places on a host, how the policy names that, what a port may be given there, and who else may have
to do with it; all else goes by the policy and the engine, as for every kind.
"""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lab.calls import CLONE_NEWNS, MS_PRIVATE, MS_REC
from lab.inside import INSIDE
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.plug import ALLOWED, attach_now, detach_now
from lab.taps import Tap
from pyqemu_ifconf.kinds.base import KindName
from pyqemu_ifconf.policy import Attach, Caller, Policy, decide
from pyqemu_ifup.access import find_user
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds import macvtap
from pyqemu_ifup.look import Link
from pyqemu_ifup.tap_request import attach_tap, make_tap, parse_wish

Tell = Callable[[str], None]
"""What is told each command before it is run."""
HOST, UML, VM = "", "uml", "vm"
"""The labs: this machine's own kernel, and the two Linuxes of the tests' own."""
TAP = "t0"
INDEX = 1000
"""The ifindex of each tap of the suite: what marks and rows say of it is the same each time."""
MAC = "02:00:00:00:00:10"


@dataclass
class World:
    """A host: its links, and its Open vSwitch."""

    netns: Namespace
    ovs: OpenVSwitch
    held: list[Tap] = field(default_factory=list)
    """The taps that are open."""


class Row(ABC):
    """A kind of network on one lab; what differs from a tap on a bridge is overridden."""

    kind: ClassVar[KindName]
    lab: ClassVar[str] = HOST
    title: ClassVar[str]
    """What it is called in the ids of the tests."""
    short: ClassVar[str]
    """What the names of its places begin with."""
    settings: ClassVar[tuple[Mapping[str, Any], ...]]
    """What a network's ports are given: each of its settings at least once, no two alike."""
    ops: ClassVar[int]
    """How many ops there are in an up of a tap that is on no bridge, with the first settings."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What of the machine its places need, by the names of lab.needs."""
    only: ClassVar[tuple[str, ...]] = ()
    """The states that it is tried from, if that is not all: a program starts slowly in User Mode
    Linux, and what all kinds have in common is tried from each state on this machine's kernel."""
    never: ClassVar[Mapping[str, str]] = {}
    """The states that its ports cannot be in, and why."""
    made: ClassVar[bool] = False
    """Whether an up makes the port's link: it changes none that is there, and refuses its name."""
    unsaid: ClassVar[Mapping[str, str]] = {}
    """What prints no commands by which a shell comes to the same, and why."""
    unmoved: ClassVar[tuple[str, ...]] = ()
    """The states in which no apply can put the policy in force while the guest runs."""

    def place(self, which: str) -> str:
        """Return the name of one of its places: `home`, `other` or `gone`."""
        return f"{self.short}-{which}"

    @abstractmethod
    def add(self, world: World, place: str) -> None:
        """Make a place of this name."""

    @abstractmethod
    def remove(self, world: World, place: str) -> None:
        """Take the place away."""

    @abstractmethod
    def network(self, world: World, place: str) -> dict[str, Any]:
        """Return what a policy says of a network that is this place, without settings."""

    def rules(self, network: str) -> dict[str, Any]:
        """Return what a policy says by which the tap is on this network."""
        return {"rules": [{"tap": TAP, "network": network}]}

    @abstractmethod
    def put(self, world: World, place: str) -> None:
        """Have somebody else make the tap a port of the place."""

    @abstractmethod
    def take(self, world: World, place: str) -> None:
        """Have somebody else take the tap from the place."""

    def attach(self, policy: Policy, pid: int, tell: Tell) -> None:
        """Attach the tap as the policy says, as its QEMU's hook does. Raises Failure."""
        caller = Caller(TAP, vm="web")
        decision = decide(policy, caller)
        assert isinstance(decision, Attach)
        attach_now(decision.port, caller, pid, policy.databases, tell=tell)

    def detach(self, pid: int, tell: Tell) -> None:
        """Detach the tap, as its QEMU's hook does. Raises Failure."""
        detach_now(TAP, pid, tell=tell)

    def is_marked(self, link: Link) -> bool:
        """Tell whether a link says that it is ours."""
        return link.mark is not None

    def open(self, world: World, *, index: int = INDEX, persist: bool = True) -> None:
        """Make the tap, attached nowhere, as its QEMU holds it."""
        with world.netns.enter():
            tap = Tap(TAP, persist=persist, owner=0, index=index)
        world.held.append(tap)
        world.netns.ip("link", "set", "dev", TAP, "address", MAC)

    def close(self, world: World) -> None:
        """Have the tap go with its QEMU; it may have gone already."""
        while world.held:
            tap = world.held.pop()
            tap.set_persist(False)
            tap.close()


class LinuxBridge(Row):
    """Linux bridges."""

    kind = "linux"
    title = "Linux bridge"
    short = "lx"
    filtering: ClassVar[bool] = False
    settings: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"mtu": 1400, "isolated": True, "txqueuelen": 77},
        {"mtu": 1300},
        {"isolated": True},
        {"txqueuelen": 0},
        {},
    )
    ops = 8

    def add(self, world: World, place: str) -> None:
        world.netns.add_bridge(place, mac="02:00:00:00:01:01", vlan_filtering=self.filtering)
        for mtu in ("1499", "1500"):
            # NOTE: pinned, it does not follow its ports'.
            world.netns.ip("link", "set", "dev", place, "mtu", mtu)

    def remove(self, world: World, place: str) -> None:
        world.netns.ip("link", "del", "dev", place)

    def network(self, world: World, place: str) -> dict[str, Any]:
        return {"bridge": place}

    def put(self, world: World, place: str) -> None:
        world.netns.ip("link", "set", "dev", TAP, "master", place)

    def take(self, world: World, place: str) -> None:
        world.netns.ip("link", "set", "dev", TAP, "nomaster")


class FilteringBridge(LinuxBridge):
    """Linux bridges that filter VLANs."""

    lab = UML
    title = "VLAN-aware Linux bridge"
    short = "vl"
    filtering = True
    settings = (
        {"vlan": {"native": 10, "trunk": [20, "30-39"]}, "isolated": True, "txqueuelen": 77},
        {"vlan": {"trunk": [20, 40]}},
    )
    ops = 9
    only = ("in place with other settings", "half made after op 6", "of another holder")


class OvsBridge(Row):
    """Bridges of Open vSwitch, on the datapath of this lab."""

    kind = "openvswitch"
    title = "Open vSwitch"
    short = "sw"
    settings: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "vlan": {"native": 10, "trunk": [20, "30-39"]},
            "isolated": True,
            "mtu": 1400,
            "txqueuelen": 77,
            "external_ids": {"owner": "a b"},
        },
        {"vlan": 100},
        {"vlan": {"trunk": [20, 40]}, "mtu": 1300},
        {"isolated": True},
        {"external_ids": {"iface-id": "it's"}},
        {},
    )
    ops = 7

    def add(self, world: World, place: str) -> None:
        world.ovs.add_bridge(place, hwaddr="02:00:00:00:02:01", mtu=1500)

    def remove(self, world: World, place: str) -> None:
        world.ovs.vsctl("del-br", place)

    def network(self, world: World, place: str) -> dict[str, Any]:
        return {"bridge": place, "kind": self.kind, "ovsdb": world.ovs.db}

    def put(self, world: World, place: str) -> None:
        world.ovs.add_port(place, TAP)

    def take(self, world: World, place: str) -> None:
        world.ovs.del_port(TAP)


class Macvtap(Row):
    """Macvtaps: the up makes the link itself, and the down takes it away."""

    kind = "macvtap"
    title = "macvtap"
    short = "mv"
    settings = ({"mtu": 1400, "txqueuelen": 77, "vlan": "any"}, {"macs": "none"}, {"mtu": 1300}, {})
    ops = 8
    needs = ("macvtap", "netdev-chains")
    made = True
    unsaid: ClassVar[Mapping[str, str]] = {
        "down": "some kernels keep the chains of a link that has gone: gc takes them away"
    }
    unmoved = ("on another bridge of its kind", "half made after op 1")
    never: ClassVar[Mapping[str, str]] = {
        "not there": "it is made by the up: that is how it begins",
        "on a bridge of the other kind": "no bridge has it for a port",
        "a link without its place": "it goes with its parent",
    }

    def add(self, world: World, place: str) -> None:
        world.netns.ip("link", "add", place, "up", "type", "veth", "peer", "name", f"{place}x")
        world.netns.ip("link", "set", "dev", f"{place}x", "up")

    def remove(self, world: World, place: str) -> None:
        world.netns.ip("link", "del", "dev", place)

    def network(self, world: World, place: str) -> dict[str, Any]:
        return {"parent": place}

    def rules(self, network: str) -> dict[str, Any]:
        """Return a NIC: a rule is for a tap that QEMU has made."""
        return {"vms": {"web": {"nics": [{"network": network, "tap": TAP, "mac": MAC}]}}}

    def put(self, world: World, place: str) -> None:
        world.netns.ip("link", "add", "link", place, "name", TAP, "type", "macvtap")

    def take(self, world: World, place: str) -> None:
        world.netns.ip("link", "del", "dev", TAP)

    def attach(self, policy: Policy, pid: int, tell: Tell) -> None:
        """Make it, as the agent does for `pyqemu-ifctl run`, and let go of it. Raises Failure."""

        def serve() -> None:
            _see_own_sysfs()
            with Host(TAP, Deadline(ALLOWED), tell, ovsdbs=policy.databases) as host:
                wish = parse_wish(["lan", TAP, "1", "", ""])
                tap = make_tap(host.kernel, policy, find_user(0), pid, wish)
                host.finish(attach_tap(host, policy, tap))
            for descriptor in tap.descriptors:
                os.close(descriptor)

        # NOTE: a thread of its own may have a mount namespace of its own.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(serve).result()

    def detach(self, pid: int, tell: Tell) -> None:
        """Take it away, as the agent and gc do when its process has ended. Raises Failure."""
        detach_now(TAP, pid, tell=tell)
        with Host(None, Deadline(ALLOWED), tell) as host:
            for stray in host.finish(macvtap.find_strays(host)):
                for op in stray.plan:
                    host.finish(host.run(op))

    def is_marked(self, link: Link) -> bool:
        """Tell whether it has its alias, or is in the group in which one is made."""
        return link.mark is not None or link.group_number == macvtap.GROUP

    def open(self, world: World, *, index: int = INDEX, persist: bool = True) -> None:
        """Make nothing: there is none before its up."""

    def close(self, world: World) -> None:
        """Delete the link, and its filters."""
        world.netns.run(["ip", "link", "del", "dev", TAP], check=False)
        world.netns.run(["nft", "delete", "table", "netdev", "pyqemu-ifup"], check=False)


def _see_own_sysfs() -> None:
    """Give the calling thread a /sys that shows the links of its network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        or libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None)
    ):
        raise OSError(ctypes.get_errno(), "cannot mount /sys")


ROWS: tuple[Row, ...] = (LinuxBridge(), OvsBridge(), Macvtap(), FilteringBridge())
HERE = tuple(row for row in ROWS if row.lab == os.environ.get(INSIDE, HOST))
"""Those of the lab that this runs on."""
