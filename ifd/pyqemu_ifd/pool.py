"""What the agent keeps open between requests: one netlink socket, and its databases."""

from __future__ import annotations

import socket
import syslog
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.hook import log
from pyqemu_ifup.host import Host, is_there

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.ovsdb import Database


AWAY = 1.0
"""Seconds after which, at the latest, a database that has gone is tried again."""


class Interest:
    """What a database waits for, gathered as ovs.poller.Poller would gather it."""

    def __init__(self) -> None:
        self.events: dict[int, int] = {}
        self.due: float | None = None

    def fd_wait(self, descriptor: int | socket.socket, events: int) -> None:
        """Wake up for `events` of poll(2) on a descriptor."""
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self.events[number] = self.events.get(number, 0) | events

    def timer_wait(self, milliseconds: int) -> None:
        """Wake up after so long."""
        due = time.monotonic() + milliseconds / 1000
        self.due = due if self.due is None else min(self.due, due)

    def timer_wait_until(self, milliseconds: int) -> None:
        """Wake up at a time of ovs.timeval.msec(), which is the monotonic clock's."""
        due = milliseconds / 1000
        self.due = due if self.due is None else min(self.due, due)

    def immediate_wake(self) -> None:
        """Wake up at once."""
        self.due = 0.0


class Pool:
    """The netlink socket and the databases of the agent, each database opened once."""

    def __init__(self) -> None:
        self.kernel = Netlink()
        self.databases: dict[str, Database] = {}

    def close(self) -> None:
        """Close them all."""
        for database in self.databases.values():
            database.close()
        self.kernel.close()

    def refresh(self) -> None:
        """Take in what the databases have sent; one that talks nonsense is given up."""
        for address, database in list(self.databases.items()):
            database.refresh()
            self._give_up(address, database)

    def _give_up(self, address: str, database: Database) -> bool:
        """Close a database that has talked nonsense; tell whether it has."""
        if database.fault is None:
            return False
        log(syslog.LOG_ERR, str(database.fault))
        del self.databases[address]
        database.close()
        return True

    def host(
        self,
        tap: str,
        deadline: Deadline,
        tell: Callable[[str], None],
        *,
        ovsdbs: Iterable[str] = (),
        brief: bool = False,
    ) -> Host:
        """Return a Host of one request, on the agent's own sockets, which stay open."""
        shared = Shared(self)
        return Host(
            tap, deadline, tell, self.kernel, ovsdbs=ovsdbs, connections=shared, brief=brief
        )

    def open_new(self, addresses: Iterable[str]) -> None:
        """Begin to connect to those of the databases that this host has and that are not open."""
        for address in dict.fromkeys(addresses):
            if address not in self.databases and is_there(address):
                self._open(address)

    def _open(self, address: str) -> Database:
        from pyqemu_ifup.drivers.ovsdb import Database

        database = self.databases[address] = Database(address, None, AWAY)
        return database

    async def connected(self, address: str, deadline: Deadline) -> Database:
        """Return the database, its rows there.

        Raises Failure as Host.open_databases does.
        """
        from pyqemu_ifup.drivers.ovsdb_connection import try_connect

        database = self.databases.get(address)
        if database is None or self._give_up(address, database) or not database.is_connected:
            await try_connect(address, deadline)
            # NOTE: another request may have opened it meanwhile.
            database = self.databases.get(address) or self._open(address)
            await database.connected(deadline)
        return database


class Shared:
    """The pool's connections, for a Host of one request: they stay open."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def connect(self, address: str, deadline: Deadline) -> Database:
        """Return the pool's own."""
        return await self._pool.connected(address, deadline)

    def refresh(self, database: Database) -> None:
        """Leave it to the agent's loop, which does so whenever there is something new."""

    def close(self) -> None:
        """Leave them open."""
