"""The kinds of network as the suite that every kind runs needs them: a row each.

A new kind is one class here and its row in ROWS. What a row has to say is how to make one of its
places on a host, how the policy names that, what a port may be given there, and who else may have
to do with it; all else goes by the policy and the engine, as for every kind.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lab.inside import INSIDE
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.taps import Tap
from pyqemu_ifconf.kinds.base import KindName

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

    @abstractmethod
    def put(self, world: World, place: str) -> None:
        """Have somebody else make the tap a port of the place."""

    @abstractmethod
    def take(self, world: World, place: str) -> None:
        """Have somebody else take the tap from the place."""

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


ROWS: tuple[Row, ...] = (LinuxBridge(), OvsBridge(), FilteringBridge())
HERE = tuple(row for row in ROWS if row.lab == os.environ.get(INSIDE, HOST))
"""Those of the lab that this runs on."""
