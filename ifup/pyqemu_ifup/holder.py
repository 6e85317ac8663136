"""For whom a tap is attached: one value from the one who asks to the mark on the tap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from pyqemu_ifconf.policy import Caller, Port
from pyqemu_ifup.kinds.base import PortKind
from pyqemu_ifup.look import Link
from pyqemu_ifup.mark import Mark
from pyqemu_ifup.system.process import process_start, real_uid


class Handed(NamedTuple):
    """How many of a tap's queues were handed over to us, and a descriptor of one, if it is kept."""

    queues: int = 0
    descriptor: int | None = None


NOTHING = Handed()


@dataclass(frozen=True)
class Holder:
    """The QEMU that a tap serves: its process `pid`, and how it came to its network.

    `caller` is what is known of it. `uid` is the user whom the agent serves, None for root.
    `by_name`: the network was asked for by its name, whatever the rules say. `made`: the tap is of
    our making. `handed` is what of the tap the one who asks has handed over. `mark` is the mark
    that the tap has already and that goes on, None where there is none; then `start` is the
    process's own (field 22 of /proc/PID/stat, in clock ticks).
    """

    caller: Caller
    pid: int
    uid: int | None = None
    by_name: bool = False
    made: bool = False
    handed: Handed = NOTHING
    mark: Mark | None = None

    @property
    def start(self) -> int:
        """When the process started, in clock ticks since boot, 0 where that is not known."""
        return process_start(self.pid) or 0

    def mark_for(self, port: Port, kind: PortKind) -> Mark:
        """Return the mark of a tap that is attached to a bridge of this kind as `port` says.

        One that is there goes on saying what it says of its process.
        """
        if self.mark is not None:
            return replace(
                self.mark,
                network=port.network,
                kind=kind.name,
                bridge=port.place.name,
                ovsdb=kind.ovsdb(port),
                rule=port.position.name,
            )
        return Mark(
            network=port.network,
            kind=kind.name,
            bridge=port.place.name,
            vm=self.caller.vm or "",
            pid=self.pid,
            start=self.start,
            ovsdb=kind.ovsdb(port),
            uid=self.uid,
            by_name=self.by_name,
            rule=port.position.name,
            mac=self.caller.mac,
            netdev=self.caller.netdev,
            user=(real_uid(self.pid) or None) if self.uid is None else None,
            made=self.made,
        )


Admit = Callable[[Link], None]
"""Raises Failure where the one who asks may not have this tap."""


def anyone(link: Link) -> None:
    """Admit whoever asks: it is root, or the one whom the kernel itself lets change the tap."""
