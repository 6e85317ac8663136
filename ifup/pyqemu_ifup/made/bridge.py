"""The bridge of a made network, as ops: it is added, given its addresses and switches, and deleted.

An op goes by the bridge's name, since a plan is made before the kernel has numbered the bridge. It
touches only the one that is the network's own.
"""

from __future__ import annotations

import syslog
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import Command, quote, sh, write
from pyqemu_ifup.drivers.sysctl import key, write_sysctl
from pyqemu_ifup.hook import log
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link
from pyqemu_ifup.made.names import bridge_alias, bridge_mac, find_bridge, is_ours
from pyqemu_ifup.ops import SetAlias, SetIpv6, SetMtu, SetUp


@dataclass(frozen=True)
class MadeOp(ABC):
    """What the ops for a made network have in common: its name, and that of its bridge."""

    opens: ClassVar[bool] = False
    told: ClassVar[bool] = False
    blind: ClassVar[bool] = False
    network: str
    port: str

    @abstractmethod
    def commands(self) -> tuple[Command, ...]:
        """Return the shell commands that do the same, as an administrator would type them."""

    def commands_of_new(self) -> tuple[Command, ...]:
        """Return those for a bridge that is not there yet: the same."""
        return self.commands()

    @abstractmethod
    async def run(self, host: Host) -> None:
        """Do it. Raises Failure, 75 with the host's deadline."""


def find_own(host: Host, op: MadeOp) -> Link:
    """Return the bridge that an op is for. Raises Failure (71) if it is not the network's own."""
    link = host.kernel.look_up(op.port)
    if link is None or not is_ours(link, op.network):
        raise Failure(
            Status.REFUSED,
            f"the bridge {quote(op.port)} has gone again",
            "somebody has deleted it, or taken its name, meanwhile",
            "try again",
        )
    return link


@dataclass(frozen=True)
class AddBridge(MadeOp):
    """Add the bridge, down, with a MAC and an MTU that no port changes."""

    mtu: int

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        words = ("address", bridge_mac(self.network), "mtu", str(self._first), "type", "bridge")
        return (sh("ip", "link", "add", "name", self.port, *words),)

    @property
    def _first(self) -> int:
        # NOTE: an MTU that is set to what it is pins nothing, and a port could lower it.
        return self.mtu + 1

    async def run(self, host: Host) -> None:
        """Add it; its MTU is one more, so that the next change pins it."""
        host.kernel.add_bridge(self.port, bridge_mac(self.network), self._first)


@dataclass(frozen=True)
class SetOnBridge(MadeOp):
    """Change a setting of the bridge that any link has, as `change` does with any ifindex."""

    change: SetAlias | SetIpv6 | SetMtu | SetUp

    def commands(self) -> tuple[Command, ...]:
        """Return what the change is said by."""
        return self.change.commands()

    async def run(self, host: Host) -> None:
        """Change it."""
        await replace(self.change, index=find_own(host, self).index).run(host)


@dataclass(frozen=True)
class MarkBridge(SetOnBridge):
    """Mark the bridge as ours: from here on it goes when it has no port."""

    @classmethod
    def of(cls, network: str, bridge: str) -> MarkBridge:
        """Return the op that marks a network's bridge."""
        return cls(network, bridge, SetAlias(bridge, 0, bridge_alias(network)))


@dataclass(frozen=True)
class AddAddress(MadeOp):
    """Give the bridge an ADDRESS/LENGTH."""

    address: str

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-address(8) is told."""
        return (sh("ip", "address", "add", self.address, "dev", self.port),)

    async def run(self, host: Host) -> None:
        """Give it; there already is success."""
        host.kernel.add_address(find_own(host, self).index, self.address)


@dataclass(frozen=True)
class RemoveAddress(MadeOp):
    """Take an ADDRESS/LENGTH from the bridge."""

    address: str

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-address(8) is told."""
        return (sh("ip", "address", "del", self.address, "dev", self.port),)

    async def run(self, host: Host) -> None:
        """Take it; gone already is success."""
        host.kernel.remove_address(find_own(host, self).index, self.address)


@dataclass(frozen=True)
class SetIpv4(MadeOp):
    """Set how the bridge takes IPv4: each switch by its name, its number (linux/ip.h) and a value.

    A container may have the files below /proc/sys read-only; netlink sets the same.
    """

    settings: tuple[tuple[str, int, int], ...]

    def commands(self) -> tuple[Command, ...]:
        """Return what is written below /proc/sys."""
        folder = f"/proc/sys/net/ipv4/conf/{self.port}"
        return tuple(write(str(value), f"{folder}/{name}") for name, _, value in self.settings)

    async def run(self, host: Host) -> None:
        """Set them over netlink."""
        values = {number: value for _, number, value in self.settings}
        host.kernel.set_ipv4(find_own(host, self).index, values)


@dataclass(frozen=True)
class WriteSwitch(MadeOp):
    """Write a value to a file below /proc/sys/net."""

    name: str
    value: str

    def commands(self) -> tuple[Command, ...]:
        """Return what writes it."""
        return (write(self.value, f"/proc/sys/net/{self.name}"),)

    async def run(self, host: Host) -> None:
        """Write it where it is not so yet; a kernel that does not have it is passed over."""
        write_sysctl(self.name, self.value)


@dataclass(frozen=True)
class TurnOn(WriteSwitch):
    """Turn a switch of the whole host on; it is left on, and syslog is told so."""

    async def run(self, host: Host) -> None:
        """Write it."""
        await super().run(host)
        said = f"{quote(key(self.name))} turned on; it is left on"
        log(syslog.LOG_NOTICE, f"network {self.network}: {said}")


@dataclass(frozen=True)
class DeleteBridge(MadeOp):
    """Delete the network's bridge."""

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (sh("ip", "link", "del", "dev", self.port),)

    async def run(self, host: Host) -> None:
        """Delete it, whatever its name is by now; gone already is success."""
        link = find_bridge(host.kernel.links(), self.network)
        if link is not None:
            host.kernel.delete_link(link.index)
