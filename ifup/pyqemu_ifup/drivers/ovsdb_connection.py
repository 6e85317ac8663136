"""A connection to an ovsdb-server (RFC 7047): its rows, and transactions on them.

The only module that imports ovs. Every wait ends with the Deadline that it is given. Rows and
columns: ovs-vswitchd.conf.db(5).
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import uuid
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

import ovs.db.idl
from ovs.db.data import Atom
from ovs.db.error import Error
from ovs.db.idl import ROW_CREATE, ROW_DELETE, Idl, SchemaHelper, Transaction
from ovs.db.types import UuidType
from ovs.poller import Poller

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.shell import quote
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.task import RETRY, SLICE, pause

# NOTE: the library names each connection and transaction by a UUID of the time, for which libuuid
# waits for uuidd, or for a lock, as long as those like, deaf to signals; any is as good.
uuid.uuid1 = uuid.uuid4  # type: ignore[assignment]  # nobody gives it the arguments it may have


def _column(key: object, low: int = 1, high: object = 1, **more: object) -> dict[str, object]:
    return {"type": {"key": key, "min": low, "max": high, **more}}


_MANY = "unlimited"
_STRINGS = _column("string", 0, _MANY, value="string")
SCHEMA: dict[str, object] = {
    "name": "Open_vSwitch",
    "version": "0.0.0",
    "tables": {
        "Open_vSwitch": {
            "isRoot": True,
            "columns": {"cur_cfg": _column("integer"), "next_cfg": _column("integer")},
        },
        "Bridge": {
            "columns": {
                "name": _column("string"),
                "datapath_id": _column("string", 0),
                "ports": _column({"type": "uuid", "refTable": "Port"}, 0, _MANY),
            }
        },
        "Port": {
            "columns": {
                "name": _column("string"),
                "interfaces": _column({"type": "uuid", "refTable": "Interface"}, 1, _MANY),
                "tag": _column("integer", 0),
                "trunks": _column("integer", 0, _MANY),
                "vlan_mode": _column("string", 0),
                "protected": _column("boolean"),
                "other_config": _STRINGS,
            }
        },
        "Interface": {
            "columns": {
                "name": _column("string"),
                "type": _column("string"),
                "external_ids": _STRINGS,
                "ofport": _column("integer", 0),
                "error": _column("string", 0),
                "ifindex": _column("integer", 0),
                "link_state": _column("string", 0),
            }
        },
    },
}
"""Of the vswitchd schema what we need, so that nothing else is monitored."""
DETAILS: dict[str, dict[str, object]] = {
    "Open_vSwitch": {"ovs_version": _column("string", 0)},
    "Bridge": {"stp_enable": _column("boolean"), "other_config": _STRINGS},
}
"""What is needed beside that to tell how an Open vSwitch is, columns by table."""


_MISREAD = (Error, AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What the library raises on a message that is valid JSON-RPC and not what it has asked for.

So does the use of a row that such a message has told: a column of a wrong type has a value of none.
"""
_CONNECTING = (errno.EAGAIN, errno.EINPROGRESS, errno.EALREADY)


T = TypeVar("T")
C = TypeVar("C", bound="Connection")


class _Strict:
    """The library's log, where it notes what it cannot read, to go on as if that had not been told.

    It is raised here, so that nothing of such a server is believed.
    """

    def __init__(self, log: Any) -> None:
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def warn(self, text: str) -> None:
        """Raise Error for a column that cannot be read, or that was not asked for."""
        if text.startswith(("error parsing column", "unknown column")):
            raise Error(text)
        self._log.warn(text)

    def err(self, text: str) -> None:
        """Raise Error for a change of rows that cannot be read."""
        if ": error parsing update" in text:
            raise Error(text)
        self._log.err(text)


ovs.db.idl.vlog = _Strict(ovs.db.idl.vlog)


class _Idl(Idl):  # type: ignore[misc]  # the library has no types
    """The library's replica, which also notes what may have cost a guest its port."""

    def __init__(self, address: str, helper: Any) -> None:
        self.ports_changed: set[str] = set()
        self.bridges_new = False
        super().__init__(address, helper, probe_interval=0, leader_only=False)

    def notify(self, event: str, row: Any, updates: Any = None) -> None:
        """Note a bridge that has come, and a port that has come or gone; the library calls this."""
        if event == ROW_CREATE and row._table.name == "Bridge":
            self.bridges_new = True
        elif event in (ROW_CREATE, ROW_DELETE) and row._table.name == "Port":
            self.ports_changed.add(row.name)


class Connection:
    """One connection to an ovsdb-server, its rows of one tap (or all, `tap` None) replicated.

    With `details`, the columns of DETAILS are replicated too. A server that has gone is tried again
    and again, in the end every `away` seconds. Whoever drives the work that its methods return
    calls `refresh` when there is something new.
    """

    def __init__(
        self, address: str, tap: str | None, away: float = RETRY, *, details: bool = False
    ) -> None:
        self.address = address
        self._unsure: set[object] = set()
        self.fault: Failure | None = None
        """Why the server cannot be understood; nothing of it can be trusted then."""
        self._mute = f"the database of Open vSwitch at {quote(address)} does not answer"
        self._busy = f"ovs-vswitchd does not answer ({quote(address)})"
        helper = SchemaHelper(schema_json=_detailed() if details else SCHEMA)
        helper.register_all()
        self._idl: Any = _Idl(address, helper)
        # NOTE: a server that restarts is back within a fraction of a second; Reconnect.set_backoff
        # takes no less than a whole one.
        reconnect = self._idl._session.reconnect
        reconnect.min_backoff, reconnect.max_backoff = int(RETRY * 1000), int(away * 1000)
        if tap is not None:
            for table in ("Interface", "Port"):
                self._idl.cond_change(table, [["name", "==", tap]])
        for table in ("Interface", "Port"):
            self._idl.index_create(table, "name").add_column("name")
        self.refresh()

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._idl.close()

    def refresh(self) -> None:
        """Take in what the server has sent since; nonsense is kept for `check` to raise."""
        if self.fault is not None:
            return
        try:
            self._idl.run()
        except _MISREAD as error:
            self._blame(error)

    def _blame(self, error: Exception) -> Failure:
        """Keep, and return, that the server has talked nonsense, on which the library failed so."""
        self.fault = Failure(
            Status.REFUSED,
            f"what answers at {quote(self.address)} does not speak OVSDB",
            f"{type(error).__name__}: {error}",
            "see what listens there",
        )
        return self.fault

    def _sane(self, read: Callable[[], T]) -> T:
        """Return what `read` makes of the rows. Raises Failure (71) where they are nonsense."""
        self.check()
        try:
            return read()
        except _MISREAD as error:
            raise self._blame(error) from error

    def check(self) -> None:
        """Raise Failure (71) where the server has talked nonsense."""
        if self.fault is not None:
            raise self.fault

    def wait(self, poller: Any) -> None:
        """Let `poller`, an ovs.poller.Poller, wake up when there is something to take in."""
        self._idl.wait(poller)

    @property
    def is_connected(self) -> bool:
        """Whether the rows are those of a server that is connected now."""
        # NOTE: has_ever_connected() is true of a reply that could not be parsed, too.
        return bool(self._idl.state == Idl.IDL_S_MONITORING and self._idl._session.is_connected())

    @property
    def moment(self) -> tuple[bool, int]:
        """What is another value whenever a row, or the connection, has changed."""
        return self.is_connected, self._idl.change_seqno

    def take_news(self) -> tuple[bool, set[str]]:
        """Return whether a bridge has come since the last time, and the ports that came or went."""
        news = self._idl.bridges_new, self._idl.ports_changed
        self._idl.bridges_new, self._idl.ports_changed = False, set()
        return news

    async def connected(self, deadline: Deadline) -> None:
        """Wait until the rows are there. Raises Failure (75)."""
        await self._until(lambda: self.is_connected, deadline, self._mute)

    @property
    def unsure(self) -> bool:
        """Whether a commit was given up whose outcome nobody knows; `sync` tells."""
        return bool(self._unsure)

    async def sync(self, deadline: Deadline) -> None:
        """Take in all that the server has committed by now, commits that were given up included.

        It answers in order, and tells of each commit before it answers. Raises Failure, 75 where
        it is mute until the deadline.
        """
        before = set(self._unsure)
        await self._commit(lambda transaction: self._sane(self._root).fetch("cur_cfg"), deadline)
        self._unsure -= before

    def _holders(self, port: Any) -> list[Any]:
        """Return the Bridge rows that hold a Port row; there may be none."""
        # NOTE: `bridge.ports` makes a list of rows of all of them, each time that it is read.
        uuid = Atom(UuidType, port.uuid)
        return [row for row in self._rows("Bridge") if uuid in row._data["ports"].values]

    def _root(self) -> Any:
        row = next(iter(self._rows("Open_vSwitch")), None)
        if row is None:
            raise Failure(
                Status.UNAVAILABLE,
                f"the database at {quote(self.address)} is empty",
                "ovs-vsctl init has not been run",
                "start Open vSwitch by its own service",
            )
        return row

    def _rows(self, table: str) -> list[Any]:
        return list(self._idl.tables[table].rows.values())

    def _insert(self, transaction: Any, table: str) -> Any:
        """Return a new row of the table, which the transaction adds."""
        return transaction.insert(self._idl.tables[table])

    def _named(self, table: str, name: str) -> list[Any]:
        """Return the rows of Port or Interface with this name, by the library's index."""
        rows = self._idl.tables[table].rows
        return list(self._idl.index_equal(table, "name", rows.IndexEntry(name=name)))

    def _bridge(self, name: str) -> Any:
        return next((row for row in self._rows("Bridge") if row.name == name), None)

    async def _applied(self, find: Callable[[], int], deadline: Deadline) -> None:
        """Wait until ovs-vswitchd has taken in the configuration up to the one that is found."""
        next_cfg = self._sane(find)
        await self._until(lambda: bool(self._root().cur_cfg >= next_cfg), deadline, self._busy)

    async def _commit(self, compose: Callable[[Any], None], deadline: Deadline) -> Any:
        """Commit what `compose` writes, anew as often as the database had changed meanwhile.

        Returns the library's transaction, None where there was nothing to write.
        """
        while True:
            seqno: int = self._idl.change_seqno
            transaction = Transaction(self._idl)
            try:
                # NOTE: what else it raises is a fault of ours; of rows it reads by `_sane`.
                self.check()
                compose(transaction)
                status = self._sane(transaction.commit)
                while status == Transaction.INCOMPLETE:
                    self._unsure.add(transaction)
                    deadline.check(self._mute)
                    await pause(min(SLICE, deadline.remaining()))
                    status = self._sane(transaction.commit)
                self._unsure.discard(transaction)
            finally:
                transaction.abort()
            if status == Transaction.TRY_AGAIN:
                await self._changed(seqno, deadline)
                continue
            if status == Transaction.UNCHANGED:
                return None
            if status == Transaction.SUCCESS:
                return transaction
            raise _refusal(self.address, transaction.get_error())

    async def _changed(self, seqno: int, deadline: Deadline) -> None:
        await self._until(lambda: self._idl.change_seqno != seqno, deadline, self._mute)

    async def _until(self, done: Callable[[], bool], deadline: Deadline, doing: str) -> None:
        """Wait until `done` says so.

        Raises Failure: 75 by the deadline, telling what it was `doing`; 71 as `check`.
        """
        while True:
            if self._sane(done):
                return
            deadline.check(doing)
            await pause(min(SLICE, deadline.remaining()))


def wait(
    databases: Iterable[Connection], deadline: Deadline, seconds: float, also: int | None = None
) -> None:
    """Block until a database has something new or `seconds` have passed, and take it in.

    Ends by the deadline, when that is over or interrupted, and where the descriptor `also` can be
    read.
    """
    poller = Poller()
    for database in databases:
        database.wait(poller)
    if deadline.wakeup is not None:
        poller.fd_wait(deadline.wakeup, select.POLLIN)
    if also is not None:
        poller.fd_wait(also, select.POLLIN)
    poller.timer_wait(int(min(seconds, deadline.remaining()) * 1000) + 1)
    poller.block()
    for database in databases:
        database.refresh()


def _detailed() -> dict[str, object]:
    """Return the schema with the columns of DETAILS."""
    schema: dict[str, Any] = json.loads(json.dumps(SCHEMA))
    for table, columns in DETAILS.items():
        schema["tables"][table]["columns"].update(columns)
    return schema


def _refusal(address: str, error: str) -> Failure:
    """Return what the database's own error means."""
    try:
        told = json.loads(error)
        text = f"{told.get('error', '')} ({told.get('details', '')})"
    except (ValueError, AttributeError):
        told, text = {}, error
    if told.get("error") == "constraint violation":
        return Failure(
            Status.DENIED,
            "Open vSwitch has a port of this name that is not ours",
            f"{told.get('details', '')}",
            "see ovs-vsctl show",
        )
    if told.get("error") in ("not allowed", "I/O error", "permission error", "not owner"):
        return Failure(
            Status.UNAVAILABLE,
            f"the database of Open vSwitch at {quote(address)} cannot be written",
            text,
            "see the log of ovsdb-server",
        )
    return Failure(
        Status.REFUSED,
        f"the database of Open vSwitch at {quote(address)} refuses it",
        text,
        "see the log of ovsdb-server",
    )


async def try_connect(address: str, deadline: Deadline) -> None:
    """Connect once and hang up, for a clear answer: the IDL only retries in silence."""
    deadline.check()
    if address.startswith("unix:"):
        family, target = socket.AF_UNIX, address[len("unix:") :]
    else:
        host, _, port = address[len("tcp:") :].rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        target = (host, int(port))  # type: ignore[assignment]
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            # NOTE: EAGAIN is a unix socket whose queue is full; nothing tells when it is not.
            while (code := probe.connect_ex(target)) in _CONNECTING:
                deadline.check(f"the database of Open vSwitch at {quote(address)} does not answer")
                await pause(RETRY)
            if code not in (0, errno.EISCONN):
                raise OSError(code, os.strerror(code))
    except PermissionError as error:
        raise Forbidden(
            f"the database of Open vSwitch at {quote(address)} may not be used",
            os.strerror(error.errno or errno.EACCES),
        ) from error
    except OSError as error:
        raise Failure(
            Status.UNAVAILABLE,
            f"Open vSwitch is not there: nothing answers at {quote(address)}",
            error.strerror or str(error),
            "start Open vSwitch, or remove the socket if it shall not run",
        ) from error
