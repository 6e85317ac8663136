"""The switches of this host as one thing to look at and to act on: netlink, and OVSDB if any.

Neither library is imported before it is needed, ovs only where this host has a database.
"""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.ids import is_alone
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.shell import Command, quote, vsctl
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.drivers.sysctl import is_writable
from pyqemu_ifup.hook import waiting_for
from pyqemu_ifup.look import Link, OvsPort, Seen
from pyqemu_ifup.mark import find_here, row_ids
from pyqemu_ifup.task import T, Task, finish

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.ovsdb import Database


class Connections(Protocol):
    """Who connects a Host to databases, and keeps them open."""

    async def connect(self, address: str, deadline: Deadline) -> Database:
        """Return the database, whose rows may be to come. Raises Failure as `open_databases`."""

    def refresh(self, database: Database) -> None:
        """Take in what the database has sent, if nobody else does."""

    def close(self) -> None:
        """Close what nobody else uses."""


class Runnable(Protocol):
    """What a Host can run: an op of a plan."""

    def commands(self) -> tuple[Command, ...]:
        """Return the shell commands that do the same."""

    async def run(self, host: Host) -> None:
        """Do it. Raises Failure."""


class Own:
    """A Host's own connections, whose rows are those of one tap, or all; see Host."""

    def __init__(self, tap: str | None, *, details: bool) -> None:
        self._tap = tap
        self._details = details
        self._open: list[Database] = []

    async def connect(self, address: str, deadline: Deadline) -> Database:
        """Connect anew."""
        from pyqemu_ifup.drivers.ovsdb import Database
        from pyqemu_ifup.drivers.ovsdb_connection import try_connect

        await try_connect(address, deadline)
        database = Database(address, self._tap, details=self._details)
        self._open.append(database)
        return database

    def refresh(self, database: Database) -> None:
        """Take in what it has sent."""
        database.refresh()

    def close(self) -> None:
        """Close them all."""
        while self._open:
            self._open.pop().close()


class Host:
    """This network namespace's links and the databases opened so far; use it in a `with`.

    `tap` limits the databases' rows to one tap's, None takes all of them. `tell` is told each
    command before it is run. `ovsdbs` are the databases of the policy, in each of which the tap's
    name is looked up. A `kernel` that is given stays open, and so do `connections`. `details`: the
    databases are opened so that they can tell how their Open vSwitch is. `brief`: it works for a
    user, whom nobody waits for long.
    """

    def __init__(
        self,
        tap: str | None,
        deadline: Deadline,
        tell: Callable[[str], None],
        kernel: Netlink | None = None,
        *,
        ovsdbs: Iterable[str] = (),
        connections: Connections | None = None,
        details: bool = False,
        brief: bool = False,
    ) -> None:
        self.tap = tap
        self.brief = brief
        self.tell = tell
        self.ovsdbs = tuple(ovsdbs)
        self.databases: dict[str, Database] = {}
        self._deadline = deadline
        self._patience: float | None = None
        self._connections = connections or Own(tap, details=details)
        self._own_kernel = kernel is None
        self.kernel = kernel if kernel is not None else Netlink()

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connections.close()
        if self._own_kernel:
            self.kernel.close()

    @property
    def deadline(self) -> Deadline:
        """When what is done on this host has to have ended, by the innermost `until`."""
        return self._deadline

    @contextmanager
    def until(self, deadline: Deadline) -> Iterator[Deadline]:
        """Have all that is done in the block end by `deadline`."""
        before, self._deadline = self._deadline, deadline
        try:
            yield deadline
        finally:
            self._deadline = before

    def finish(self, work: Task[T]) -> T:
        """Run `work` on this host to its end, blocking where it has to wait."""
        return finish(work, self._wait)

    def _wait(self, seconds: float) -> None:
        if self.databases:
            from pyqemu_ifup.drivers.ovsdb_connection import wait

            wait(self.databases.values(), self.deadline, seconds)
        else:
            time.sleep(min(seconds, self.deadline.remaining()))

    def wait_for(self, descriptor: int, seconds: float) -> None:
        """Block until `descriptor` can be read, a database has something new, or time is up."""
        if self.databases:
            from pyqemu_ifup.drivers.ovsdb_connection import wait

            wait(self.databases.values(), self.deadline, seconds, descriptor)
            return
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if self.deadline.wakeup is not None:
            poll.register(self.deadline.wakeup, select.POLLIN)
        poll.poll(min(seconds, self.deadline.remaining()) * 1000)

    @property
    def patience(self) -> float | None:
        """Seconds that ovs-vswitchd is waited for to let a port go, None: until the deadline."""
        return self._patience

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Have ovs-vswitchd waited for so many seconds in the block; then Unconfirmed is raised."""
        before, self._patience = self._patience, seconds
        try:
            yield
        finally:
            self._patience = before

    async def open_databases(self, addresses: Iterable[str]) -> None:
        """Connect to those of the databases that this host has.

        Raises Failure: 69 where no server answers, 77 where it may not be spoken to, 75 where it
        is mute until the deadline.
        """
        for address in dict.fromkeys(addresses):
            if address not in self.databases and is_there(address):
                self.tell(vsctl(address, ("show",)))
                await self._connect(address)

    async def _connect(self, address: str) -> None:
        database = await self._connections.connect(address, self.deadline)
        # NOTE: whoever drives this waits for what is in `databases`.
        self.databases[address] = database
        try:
            await database.connected(self.deadline)
        except BaseException:
            del self.databases[address]
            raise

    async def reconnect(self, address: str) -> None:
        """Connect anew to a database that has talked nonsense, of which nothing is believed.

        Raises Failure as `open_databases`; then it is not open any more.
        """
        del self.databases[address]
        await self._connect(address)

    async def catch_up(self, link: Link | None) -> None:
        """Learn what others have made of a tap's port since, where its mark tells that they have.

        The mark is the kernel's, and true at once; a database that is kept open may lag behind.
        """
        mark = link.mark if link is not None else None
        database = self.databases.get(mark.ovsdb or "") if mark is not None else None
        if link is None or mark is None or database is None:
            return
        ids = row_ids(mark, link.index, find_here()).items()
        if not any(ids <= row.ids.items() for row in self.ports(link.name)):
            await database.sync(self.deadline)

    def ports(self, name: str | None = None) -> tuple[OvsPort, ...]:
        """Return the ports in the open databases, or those called `name`, as they are now."""
        found: list[OvsPort] = []
        for database in self.databases.values():
            self._connections.refresh(database)
            found += database.ports(name)
        return tuple(found)

    def look(self, tap: str, bridge: str | None) -> Seen:
        """Look at the tap, its master, the wanted bridge and the tap's rows in the databases."""
        with waiting_for("the kernel does not tell what it has of the tap and its bridge"):
            return self._look(tap, bridge)

    def _look(self, tap: str, bridge: str | None) -> Seen:
        link = self.kernel.look_up(tap)
        ports = self.ports(tap)
        master = None
        if link is not None and link.master is not None:
            master = self.kernel.look_at(link.master)
        found = self.kernel.look_up(bridge) if bridge is not None else None
        above = found.master if found is not None else None
        over = self.kernel.look_at(above) if above is not None else None
        missing = bridge if found is None else None
        return Seen(
            tap=link,
            master=master,
            bridge=found,
            other_name_of=self.kernel.other_name_of(missing) if missing is not None else "",
            vids=self.kernel.vids(link.index) if link and filters(master) else (),
            ports=ports,
            ovs_bridges=tuple(
                address
                for address, database in self.databases.items()
                if bridge is not None and database.has_bridge(bridge)
            ),
            sysctl=is_writable("ipv6/conf/default/disable_ipv6"),
            above=over.name if over is not None else "",
        )

    async def run(self, op: Runnable) -> None:
        """Execute one op, told first. Raises Failure."""
        for command in op.commands():
            self.tell(command)
        await op.run(self)


def filters(link: Link | None) -> bool:
    """Tell whether the link is a Linux bridge that filters VLANs."""
    return link is not None and bool(link.vlan_filtering)


def is_there(address: str) -> bool:
    """Tell whether this host has the database: a unix socket that exists, or any tcp address.

    The default one of an ordinary user's own namespaces is the host's, and not there, if that user
    may not use it. Raises Failure, 77 or 71, where it cannot be told.
    """
    if not address.startswith("unix:"):
        return True
    path = address[len("unix:") :]
    try:
        with waiting_for(f"nothing tells whether there is a database at {quote(address)}"):
            if address == DEFAULT_OVSDB and is_alone() and not os.access(path, os.W_OK):
                return False
            return stat.S_ISSOCK(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        what, why = f"cannot look for Open vSwitch at {quote(address)}", str(error.strerror)
        if isinstance(error, PermissionError):
            raise Forbidden(what, why) from error
        raise Failure(Status.REFUSED, what, why, "correct ovsdb: in the policy") from error
