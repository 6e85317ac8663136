"""The switches of this host as one thing to look at and to act on: netlink, and OVSDB if any.

Neither library is imported before it is needed, ovs only where this host has a database.
"""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.ids import is_alone
from pyqemu_ifconf.policy import DEFAULT_OVSDB
from pyqemu_ifconf.shell import quote, vsctl
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.linux_bridge import Netlink
from pyqemu_ifup.look import Link, OvsPort, Seen
from pyqemu_ifup.manners import waiting_for
from pyqemu_ifup.plan import AddPort, DelPort, SetPort, Step, commands
from pyqemu_ifup.stamp import find_here, row_ids
from pyqemu_ifup.sysctl import is_writable
from pyqemu_ifup.task import T, Task, finish

if TYPE_CHECKING:
    from pyqemu_ifup.openvswitch import Database


class Host:
    """This network namespace's links and the databases opened so far; use it in a `with`.

    `tap` limits the databases' rows to one tap's, None takes all of them. `tell` is told each
    command before it is run. A `kernel` that is given stays open. `details`: the databases are
    opened so that they can tell how their Open vSwitch is. `brief`: it works for a user, whom
    nobody waits for long.
    """

    def __init__(
        self,
        tap: str | None,
        deadline: Deadline,
        tell: Callable[[str], None],
        kernel: Netlink | None = None,
        *,
        details: bool = False,
        brief: bool = False,
    ) -> None:
        self.tap = tap
        self.left = False
        """Whether something of what was done could not be taken back."""
        self.brief = brief
        self.details = details
        self._deadline = deadline
        self.tell = tell
        self.databases: dict[str, Database] = {}
        self._open = ExitStack()
        self.kernel = kernel if kernel is not None else self._open.enter_context(Netlink())

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

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
            from pyqemu_ifup.openvswitch import wait

            wait(self.databases.values(), self.deadline, seconds)
        else:
            time.sleep(min(seconds, self.deadline.remaining()))

    def wait_for(self, descriptor: int, seconds: float) -> None:
        """Block until `descriptor` can be read, a database has something new, or time is up."""
        if self.databases:
            from pyqemu_ifup.openvswitch import wait

            wait(self.databases.values(), self.deadline, seconds, descriptor)
            return
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if self.deadline.wakeup is not None:
            poll.register(self.deadline.wakeup, select.POLLIN)
        poll.poll(min(seconds, self.deadline.remaining()) * 1000)

    async def open_databases(
        self, addresses: Iterable[str], deadline: Deadline | None = None
    ) -> None:
        """Connect to those of the databases that this host has.

        Raises Failure: 69 where no server answers, 77 where it may not be spoken to, 75 where it
        is mute until `watch` ends, or the host's own.
        """
        for address in dict.fromkeys(addresses):
            if address not in self.databases and is_there(address):
                self.tell(vsctl(address, ("show",)))
                await self._connect(address, deadline or self.deadline)

    async def _connect(self, address: str, deadline: Deadline) -> None:
        from pyqemu_ifup.openvswitch import Database, try_connect

        await try_connect(address, deadline)
        database = self._open.enter_context(Database(address, self.tap, details=self.details))
        self.databases[address] = database
        try:
            await database.connected(deadline)
        except BaseException:
            del self.databases[address]
            raise

    async def reconnect(self, address: str, deadline: Deadline) -> None:
        """Connect anew to a database that has talked nonsense, of which nothing is believed.

        Raises Failure as `open_databases`; then it is not open any more.
        """
        del self.databases[address]
        await self._connect(address, deadline)

    async def catch_up(self, link: Link | None) -> None:
        """Learn what others have made of a tap's port since, where its mark tells that they have.

        The mark is the kernel's, and true at once; a database that is kept open may lag behind.
        """
        stamp = link.stamp if link is not None else None
        database = self.databases.get(stamp.ovsdb or "") if stamp is not None else None
        if link is None or stamp is None or database is None:
            return
        ids = row_ids(stamp, link.index, find_here()).items()
        if not any(ids <= row.ids.items() for row in self.ports(link.name)):
            await database.sync(self.deadline)

    def ports(self, name: str | None = None) -> tuple[OvsPort, ...]:
        """Return the ports in the open databases, or those called `name`, as they are now."""
        found: list[OvsPort] = []
        for database in self.databases.values():
            self._refresh(database)
            found += database.ports(name)
        return tuple(found)

    def _refresh(self, database: Database) -> None:
        database.refresh()

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
        )

    async def run(self, step: Step, deadline: Deadline, patience: float | None = None) -> bool:
        """Execute one step, told first. Raises as the switch's own executor does.

        With `patience`, in seconds, ovs-vswitchd is waited for no longer to let a port go; tells
        whether it did.
        """
        for command in commands(step):
            self.tell(command)
        if isinstance(step, AddPort):
            await self.databases[step.ovsdb].add_port(step, deadline)
        elif isinstance(step, SetPort):
            await self.databases[step.ovsdb].set_port(step, deadline)
        elif isinstance(step, DelPort):
            return await self.databases[step.ovsdb].del_port(step, deadline, patience)
        else:
            does = "; ".join(commands(step)) or type(step).__name__
            with waiting_for(f"the kernel does not end: {does}"):
                self.kernel.run(step)
        return True


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
