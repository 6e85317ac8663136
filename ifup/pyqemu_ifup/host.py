"""The switches of this host as one thing to look at and to act on: netlink, and OVSDB if any.

Neither library is imported before it is needed, ovs only where this host has a database.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.linux_bridge import Netlink, read_ipv6_disabled
from pyqemu_ifup.look import Link, OvsPort, Seen
from pyqemu_ifup.manners import Watch
from pyqemu_ifup.plan import AddPort, DelPort, Step, commands

if TYPE_CHECKING:
    from pyqemu_ifup.openvswitch import Database


class Host:
    """This network namespace's links and the databases opened so far; use it in a `with`.

    `tap` limits the databases' rows to one tap's, None takes all of them. `tell` is told each
    command before it is run.
    """

    def __init__(self, tap: str | None, watch: Watch, tell: Callable[[str], None]) -> None:
        self.tap = tap
        self.watch = watch
        self.tell = tell
        self.kernel = Netlink()
        self.databases: dict[str, Database] = {}
        self._open = ExitStack()
        self._open.enter_context(self.kernel)

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def open_databases(self, addresses: Iterable[str]) -> None:
        """Connect to those of the databases that this host has. Raises as Database does."""
        for address in dict.fromkeys(addresses):
            if address in self.databases or not is_there(address):
                continue
            from pyqemu_ifup.openvswitch import Database

            self.tell(f"ovs-vsctl --db={address} show")
            database = Database(address, self.tap, self.watch)
            self.databases[address] = self._open.enter_context(database)

    def ports(self) -> tuple[OvsPort, ...]:
        """Return the ports in the open databases, as they are now."""
        found: list[OvsPort] = []
        for database in self.databases.values():
            database.refresh()
            found += database.ports()
        return tuple(found)

    def look(self, tap: str, bridge: str | None) -> Seen:
        """Look at the tap, its master, the wanted bridge and the tap's rows in the databases."""
        link = self.kernel.look_up(tap)
        ports = self.ports()
        master = None
        if link is not None and link.master is not None:
            master = self.kernel.look_at(link.master)
        return Seen(
            tap=link,
            ipv6_disabled=read_ipv6_disabled(tap) if link is not None else None,
            master=master,
            bridge=self.kernel.look_up(bridge) if bridge is not None else None,
            vids=self.kernel.vids(link.index) if link and filters(master) else (),
            ports=tuple(port for port in ports if port.name == tap),
            ovs_bridges=tuple(
                address
                for address, database in self.databases.items()
                if bridge is not None and database.has_bridge(bridge)
            ),
        )

    def run(self, step: Step, watch: Watch, patience: float | None = None) -> bool:
        """Execute one step, told first. Raises as the switch's own executor does.

        With `patience`, in seconds, ovs-vswitchd is waited for no longer to let a port go; tells
        whether it did.
        """
        for command in commands(step):
            self.tell(command)
        if isinstance(step, AddPort):
            self.databases[step.ovsdb].add_port(step, watch)
        elif isinstance(step, DelPort):
            return self.databases[step.ovsdb].del_port(step, watch, patience)
        else:
            self.kernel.run(step)
        return True


def filters(link: Link | None) -> bool:
    """Tell whether the link is a Linux bridge that filters VLANs."""
    return link is not None and bool(link.vlan_filtering)


def is_there(address: str) -> bool:
    """Tell whether this host has the database: a unix socket that exists, or any tcp address.

    Raises Failure (77) where that cannot be told.
    """
    if not address.startswith("unix:"):
        return True
    try:
        return stat.S_ISSOCK(os.stat(address[len("unix:"):]).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as error:
        raise Failure(
            Status.DENIED, f"cannot look for Open vSwitch at {address}",
            str(error.strerror), "run as root",
        ) from error


