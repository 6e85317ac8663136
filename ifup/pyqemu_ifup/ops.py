"""Ops: each is a frozen value that says itself as an administrator would type it, and does itself.

Those here are of any link's own settings; a kind's own ops are in its module. A plan is a tuple of
them: one plan serves up, dry-run, explain and undo.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from pyqemu_ifconf.shell import Command, joined, output, piped, sh, write
from pyqemu_ifup.hook import waiting_for

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.rtnetlink import Netlink
    from pyqemu_ifup.host import Host

BY_MAC = 0
"""IN6_ADDR_GEN_MODE_EUI64, the kernel's own."""
ADDRGENMODES = ("eui64", "none", "stable_secret", "random")
"""What ip-link(8) calls each mode, by its number."""


class Op(Protocol):
    """One step of a plan, for the port `port`."""

    @property
    def port(self) -> str:
        """The name of the port, a tap's mostly, that it is for."""

    @property
    def opens(self) -> bool:
        """Whether frames may pass from here on, so that all that came before is proven first."""

    @property
    def told(self) -> bool:
        """Whether whoever serves the port has told all that it knows when the op has ended."""

    @property
    def blind(self) -> bool:
        """Whether it may be taken back where nobody can tell what a database has of the port."""

    def commands(self) -> tuple[Command, ...]:
        """Return the shell commands that do the same, as an administrator would type them."""

    def commands_of_new(self) -> tuple[Command, ...]:
        """Return those for a port that is not there yet.

        What only the kernel will know of it is left to a command's own output.
        """

    async def run(self, host: Host) -> None:
        """Do it. Raises Failure, 75 with the host's deadline."""


Plan = tuple[Op, ...]


class LinkOp(ABC):
    """What the ops that change a link over rtnetlink(7) have in common."""

    opens: ClassVar[bool] = False
    told: ClassVar[bool] = False
    blind: ClassVar[bool] = True

    @abstractmethod
    def commands(self) -> tuple[Command, ...]:
        """Return the shell commands that do the same, as an administrator would type them."""

    def commands_of_new(self) -> tuple[Command, ...]:
        """Return those for a port that is not there yet: the same."""
        return self.commands()

    @abstractmethod
    def change(self, links: Netlink) -> None:
        """Change the link. Raises NetlinkError, OSError, Failure."""

    async def run(self, host: Host) -> None:
        """Change the link. Raises Failure, 77 where the kernel forbids it, else 71."""
        commands = self.commands()
        with waiting_for(f"the kernel does not end: {'; '.join(commands)}"):
            host.kernel.run(self.change, commands)


def set_link(name: str, *words: str | Command) -> Command:
    """Return the command of ip-link(8) that sets something of a link."""
    return sh("ip", "link", "set", "dev", name, *words)


@dataclass(frozen=True)
class SetAlias(LinkOp):
    """Set the link's ifalias; the empty one removes it."""

    port: str
    index: int
    alias: str

    @property
    def blind(self) -> bool:  # type: ignore[override]  # the mark goes last
        """Whether it sets a mark: one stays until nothing of the port is left."""
        return bool(self.alias)

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (set_link(self.port, "alias", self.alias),)

    def change(self, links: Netlink) -> None:
        """Set it."""
        links.set_link(self.index, ("IFLA_IFALIAS", self.alias))


@dataclass(frozen=True)
class SetDown(LinkOp):
    """Take the link down."""

    blind: ClassVar[bool] = False
    port: str
    index: int

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (set_link(self.port, "down"),)

    def change(self, links: Netlink) -> None:
        """Take it down."""
        links.set_link(self.index, up=False)


@dataclass(frozen=True)
class SetUp(LinkOp):
    """Bring the link up: from here on frames pass."""

    opens: ClassVar[bool] = True
    blind: ClassVar[bool] = False
    port: str
    index: int

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (set_link(self.port, "up"),)

    def change(self, links: Netlink) -> None:
        """Bring it up."""
        links.set_link(self.index, up=True)


@dataclass(frozen=True)
class SetMac(LinkOp):
    """Set the link's MAC; of a tap, that of the host's end."""

    port: str
    index: int
    mac: str

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (set_link(self.port, "address", self.mac),)

    def commands_of_new(self) -> tuple[Command, ...]:
        """Return what keeps all but the first byte of the MAC that the kernel will choose."""
        own = piped(
            sh("ip", "-br", "link", "show", "dev", self.port), sh("awk", "{print substr($3, 3)}")
        )
        return (set_link(self.port, "address", joined(self.mac[:2], output(own))),)

    def change(self, links: Netlink) -> None:
        """Set it."""
        links.set_link(self.index, ("IFLA_ADDRESS", self.mac))


@dataclass(frozen=True)
class SetMtu(LinkOp):
    """Set the link's MTU, in bytes."""

    port: str
    index: int
    mtu: int

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (set_link(self.port, "mtu", str(self.mtu)),)

    def change(self, links: Netlink) -> None:
        """Set it."""
        links.set_link(self.index, ("IFLA_MTU", self.mtu))


@dataclass(frozen=True)
class SetTxQueueLen(LinkOp):
    """Set the link's transmit queue length, in packets."""

    port: str
    index: int
    length: int

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (set_link(self.port, "txqueuelen", str(self.length)),)

    def change(self, links: Netlink) -> None:
        """Set it."""
        links.set_link(self.index, ("IFLA_TXQLEN", self.length))


@dataclass(frozen=True)
class SetIpv6(LinkOp):
    """Set whether the link gets an IPv6 address, where it has IPv6; None leaves a part alone.

    `addrgenmode` is set over netlink, `disabled` by a file below /proc/sys, which a container may
    not have to write.
    """

    port: str
    index: int
    disabled: bool | None
    addrgenmode: int | None

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told, and what is written below /proc/sys."""
        lines = []
        if self.addrgenmode is not None:
            known = self.addrgenmode < len(ADDRGENMODES)
            mode = ADDRGENMODES[self.addrgenmode] if known else str(self.addrgenmode)
            lines.append(set_link(self.port, "addrgenmode", mode))
        if self.disabled is not None:
            path = f"/proc/sys/net/ipv6/conf/{self.port}/disable_ipv6"
            lines.append(write(str(int(self.disabled)), path))
        return tuple(lines)

    def change(self, links: Netlink) -> None:
        """Set both parts, as far as they can be set: whether an address is kept away is proven."""
        links.set_ipv6(self.port, self.index, self.disabled, self.addrgenmode)


@dataclass(frozen=True)
class DelTap(LinkOp):
    """Delete the tap, which is of our making; whoever holds it can do no more with it."""

    port: str
    index: int

    def commands(self) -> tuple[Command, ...]:
        """Return what ip-link(8) is told."""
        return (sh("ip", "link", "del", "dev", self.port),)

    def change(self, links: Netlink) -> None:
        """Delete it; gone already is success."""
        links.delete_link(self.index)
