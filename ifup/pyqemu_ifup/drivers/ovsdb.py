"""Open vSwitch over its database protocol (RFC 7047): looks, and executes what changes a port.

The only module that imports ovs. A Database is one connection; every wait on it ends with the
Deadline that it is given. Rows and columns: ovs-vswitchd.conf.db(5).
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Protocol, TypeVar

import ovs.db.idl
from ovs.db.data import Atom
from ovs.db.error import Error
from ovs.db.idl import ROW_CREATE, ROW_DELETE, Idl, SchemaHelper, Transaction
from ovs.db.types import UuidType
from ovs.poller import Poller

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.shell import quote, vsctl
from pyqemu_ifup.deadline import Deadline, Unconfirmed
from pyqemu_ifup.look import OvsBridge, OvsPort, OvsSwitch
from pyqemu_ifup.stamp import KEY_VERSION, OUR_KEYS
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


REVALIDATION = 0.02
"""Seconds after a change in which old flows may still forward; measured: 2 ms at the most.

Longer where ovs-vswitchd gets no processor (seen once, in a virtual machine that stood still).
"""
_MISREAD = (Error, AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What the library raises on a message that is valid JSON-RPC and not what it has asked for.

So does the use of a row that such a message has told: a column of a wrong type has a value of none.
"""
_CONNECTING = (errno.EAGAIN, errno.EINPROGRESS, errno.EALREADY)


T = TypeVar("T")


class SeenPort(Protocol):
    """What is to be known of a port that is to be deleted, as it was seen."""

    @property
    def port(self) -> str:
        """Its name."""

    @property
    def external_ids(self) -> tuple[tuple[str, str], ...]:
        """Its Interface row's external_ids, our mark among them."""


class NewPort(SeenPort, Protocol):
    """What is to be known of a port that is to be added."""

    @property
    def bridge(self) -> str:
        """The bridge's name."""

    @property
    def index(self) -> int:
        """The ifindex of the port's link."""

    @property
    def columns(self) -> tuple[str, int | None, tuple[int, ...]]:
        """Its vlan_mode, tag and trunks."""

    @property
    def protected(self) -> bool:
        """Whether it is kept from other protected ports."""


class ChangedPort(SeenPort, Protocol):
    """What is to be known of a port that is to be changed."""

    @property
    def seen(self) -> tuple[tuple[str, str], ...]:
        """The external_ids of its Interface row as they were seen, our mark among them."""

    @property
    def vlan_mode(self) -> str | None:
        """Its vlan_mode, None for the empty column."""

    @property
    def tag(self) -> int | None:
        """Its tag, None for the empty column."""

    @property
    def trunks(self) -> tuple[int, ...]:
        """Its trunks."""

    @property
    def protected(self) -> bool:
        """Whether it is kept from other protected ports."""

    @property
    def transient(self) -> bool:
        """Whether ovs-ctl(8) deletes it when the host starts."""

    @property
    def without(self) -> tuple[str, ...]:
        """The keys of external_ids that go."""


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


class Database:
    """One connection to an ovsdb-server, its rows of one tap (or all, `tap` None) replicated.

    With `details`, `switch` tells how that Open vSwitch is. A server that has gone is tried again
    and again, in the end every `away` seconds. Whoever drives the work that its methods return
    calls `refresh` when there is something new.
    """

    def __init__(
        self, address: str, tap: str | None, away: float = RETRY, *, details: bool = False
    ) -> None:
        self.address = address
        self._unsure: set[object] = set()
        self._deleted: dict[str, float] = {}
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

    def __enter__(self) -> Database:
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

    def has_bridge(self, name: str) -> bool:
        """Tell whether there is a bridge of this name."""
        return self._sane(lambda: self._bridge(name) is not None)

    async def made(self, bridge: str, deadline: Deadline) -> None:
        """Wait until ovs-vswitchd has made the bridge, or its row is not there.

        Raises Failure (75).
        """

        def is_made() -> bool:
            row = self._bridge(bridge)
            return row is None or bool(row.datapath_id)

        what = f"ovs-vswitchd has not made {quote(bridge)} yet ({quote(self.address)})"
        await self._until(is_made, deadline, what)

    def switch(self) -> OvsSwitch:
        """Return how this Open vSwitch is, of a database opened with `details`.

        Raises Failure, 69 where the database is empty, and as `check`.
        """
        return self._sane(self._switch)

    def _switch(self) -> OvsSwitch:
        root = self._root()
        return OvsSwitch(
            ovsdb=self.address,
            version=_one(root.ovs_version),
            behind=root.cur_cfg < root.next_cfg,
            bridges=tuple(
                OvsBridge(self.address, row.name, row.stp_enable, "hwaddr" in row.other_config)
                for row in self._rows("Bridge")
            ),
        )

    def ports(self, name: str | None = None) -> list[OvsPort]:
        """Return the ports replicated here, or those called `name`, with their Interface rows.

        Raises Failure as `check`.
        """
        return self._sane(lambda: self._ports(name))

    def _ports(self, name: str | None) -> list[OvsPort]:
        if name is None:
            ports, interfaces = self._rows("Port"), self._rows("Interface")
        else:
            ports, interfaces = self._named("Port", name), self._named("Interface", name)
        found = []
        of_ports = set()
        for port in ports:
            bridge = next((bridge.name for bridge in self._holders(port)), None)
            for interface in port.interfaces:
                of_ports.add(interface.uuid)
                found.append(self._port(port, interface, bridge))
        for interface in interfaces:
            if interface.uuid not in of_ports:
                found.append(self._port(None, interface, None))
        return found

    def _holders(self, port: Any) -> list[Any]:
        """Return the Bridge rows that hold a Port row; there may be none."""
        # NOTE: `bridge.ports` makes a list of rows of all of them, each time that it is read.
        uuid = Atom(UuidType, port.uuid)
        return [row for row in self._rows("Bridge") if uuid in row._data["ports"].values]

    def _port(self, port: Any, interface: Any, bridge: str | None) -> OvsPort:
        return OvsPort(
            ovsdb=self.address,
            bridge=bridge,
            name=interface.name if port is None else port.name,
            tag=_one(port.tag) if port else None,
            trunks=tuple(sorted(port.trunks)) if port else (),
            vlan_mode=_one(port.vlan_mode) if port else None,
            protected=bool(port and port.protected),
            transient=bool(port and port.other_config.get("transient") == "true"),
            external_ids=tuple(sorted(interface.external_ids.items())),
            ofport=_one(interface.ofport),
            error=_one(interface.error),
            ifindex=_one(interface.ifindex),
            link_state=_one(interface.link_state),
            internal=interface.type == "internal" or interface.name == bridge,
        )

    async def add_port(self, op: NewPort, deadline: Deadline) -> None:
        """Add the port and wait until ovs-vswitchd has taken it in.

        Raises Failure: 69 where the bridge has gone, 71 where vswitchd cannot use the tap, 75
        where it is mute, 77 where somebody else was faster with the name.
        """
        # NOTE: a port that vswitchd has yet to let go, deleted without waiting, and ours must not
        # reach it in one go: on the userspace datapath the new one would pass no frames.
        await self._applied(lambda: self._root().next_cfg, deadline)

        def compose(transaction: Any) -> None:
            bridge = self._sane(lambda: self._bridge(op.bridge))
            if bridge is None:
                raise Failure(
                    Status.UNAVAILABLE,
                    f"there is no bridge {quote(op.bridge)}",
                    "it has been deleted meanwhile",
                    f"make it: {vsctl(self.address, ('add-br', op.bridge))}",
                )
            if self._is_there(op):
                return
            interface = transaction.insert(self._idl.tables["Interface"])
            interface.name = op.port
            interface.external_ids = dict(op.external_ids)
            mode, tag, trunks = op.columns
            port = transaction.insert(self._idl.tables["Port"])
            port.name = op.port
            port.interfaces = [interface]
            port.vlan_mode = [mode]
            port.tag = [] if tag is None else [tag]
            port.trunks = list(trunks)
            port.protected = op.protected
            port.other_config = {"transient": "true"}
            bridge.verify("name")
            bridge.addvalue("ports", port)
            self._sane(self._root).increment("next_cfg")
            transaction.add_comment(f"pyqemu-ifup: add-port {op.bridge} {op.port}")

        await self._commit(compose, deadline)
        await self._applied(lambda: self._root().next_cfg, deadline)
        await self._until(
            lambda: self._is_usable(op),
            deadline,
            f"ovs-vswitchd does not take the port in ({quote(self.address)})",
        )
        # NOTE: on the kernel datapath it has the number of the port that has just gone, and with
        # it the flows of that port's VLAN.
        await self._revalidated(self._deleted.get(op.port, 0.0), deadline)

    def _is_there(self, op: NewPort) -> bool:
        """Tell whether our own commit came through, its reply lost with the connection."""
        rows = self.ports(op.port)
        if not rows:
            return False
        if any(not set(op.external_ids) <= set(row.external_ids) for row in rows):
            raise Failure(
                Status.DENIED,
                "Open vSwitch has a port of this name that is not ours",
                f"on {rows[0].owner}, added meanwhile",
                f"if it shall go: {vsctl(self.address, ('del-port', op.port))}",
            )
        return True

    def _is_usable(self, op: NewPort) -> bool:
        interface = self._own(op.port)
        error, ofport = _one(interface.error), _one(interface.ofport)
        if error is not None or ofport == -1:
            raise Failure(
                Status.REFUSED,
                f"{quote(op.bridge)} cannot use the tap",
                error or "ovs-vswitchd gave it no OpenFlow port",
                "see the log of ovs-vswitchd",
            )
        return ofport is not None and _one(interface.ifindex) == op.index

    async def set_port(self, op: ChangedPort, deadline: Deadline) -> None:
        """Change the port that `op` saw and wait until ovs-vswitchd has taken that in.

        Raises Failure: 69 where the server cannot write, 71 where the port has gone, 75 where it
        or ovs-vswitchd is mute.
        """

        def compose(transaction: Any) -> None:
            port, interface, ids, config = self._sane(lambda: self._seen(op.port, op.seen))
            # NOTE: as for a deletion: the library sends it only with a change of the row.
            interface.verify("external_ids")
            ids |= dict(op.external_ids)
            interface.external_ids = {key: ids[key] for key in ids if key not in op.without}
            port.vlan_mode = [] if op.vlan_mode is None else [op.vlan_mode]
            port.tag = [] if op.tag is None else [op.tag]
            port.trunks = list(op.trunks)
            port.protected = op.protected
            port.verify("other_config")
            config["transient"] = "true"
            if not op.transient:
                del config["transient"]
            port.other_config = config
            self._sane(self._root).increment("next_cfg")
            transaction.add_comment(f"pyqemu-ifup: set port {op.port}")

        done = await self._commit(compose, deadline)
        if done is not None:
            await self._applied(done.get_increment_new_value, deadline)
        await self._revalidated(time.monotonic(), deadline)

    async def _revalidated(self, since: float, deadline: Deadline) -> None:
        """Wait until old flows forward no more after a change that was taken in at `since`.

        NOTE: the revalidator threads of ovs-vswitchd renew the flows that it has in its datapath
        after it has taken a change in, and tell nobody when they have (udpif_revalidate).
        """
        end = since + REVALIDATION
        while (left := end - time.monotonic()) > 0:
            deadline.check()
            await pause(left)

    def _seen(
        self, tap: str, external_ids: Iterable[tuple[str, str]]
    ) -> tuple[Any, Any, dict[str, str], dict[str, str]]:
        """Return the Port and the Interface row that were seen, its external_ids and other_config.

        Raises Failure (71).
        """
        seen = _our_ids(external_ids)
        for port in self._named("Port", tap):
            for interface in port.interfaces:
                if seen.items() <= interface.external_ids.items():
                    return port, interface, dict(interface.external_ids), dict(port.other_config)
        raise self._gone()

    async def link_up(self, tap: str, deadline: Deadline) -> bool:
        """Wait until ovs-vswitchd sees the tap's link up; tell whether it did not at first.

        Raises Failure, 71 without the port.
        """

        def is_up() -> bool:
            return bool(_one(self._own(tap).link_state) == "up")

        if self._sane(is_up):
            return False
        await self._until(
            is_up, deadline, f"ovs-vswitchd does not see the tap's link up ({quote(self.address)})"
        )
        return True

    def _own(self, tap: str) -> Any:
        """Return the Interface row of the port that we have added.

        Raises Failure (71) where it has gone.
        """
        for port in self._named("Port", tap):
            for interface in port.interfaces:
                return interface
        raise self._gone()

    def _gone(self) -> Failure:
        return Failure(
            Status.REFUSED,
            f"the port in {quote(self.address)} has gone again",
            "somebody has deleted it, or its bridge, meanwhile",
            "try again",
        )

    async def del_port(
        self, op: SeenPort, deadline: Deadline, patience: float | None = None
    ) -> None:
        """Delete the port that `op` saw; gone already is success.

        Waits until vswitchd let it go, `patience` seconds at most where that is given. Raises
        Failure: 69 where the server cannot write, 75 where it is mute, and then Unconfirmed where
        the port is out of the database.
        """
        seen = _our_ids(op.external_ids)

        def compose(transaction: Any) -> None:
            for port, interfaces, bridges in self._sane(lambda: self._marked(op.port, seen)):
                for bridge in bridges:
                    bridge.delvalue("ports", port)
                for interface in interfaces:
                    # NOTE: verify() alone is lost: the library sends it only for a row that the
                    # transaction does something with.
                    interface.verify("external_ids")
                    interface.delete()
                port.delete()
                self._sane(self._root).increment("next_cfg")
                transaction.add_comment(f"pyqemu-ifup: del-port {op.port}")

        done = await self._commit(compose, deadline)
        if done is None:
            return
        limit = deadline.child(patience) if patience is not None else deadline
        try:
            await self._applied(done.get_increment_new_value, limit)
        except Failure as failure:
            if patience is None:
                raise
            raise Unconfirmed(failure.status, failure.what, failure.why) from failure
        finally:
            # NOTE: the agent has one connection for all guests: another's port goes meanwhile.
            now = time.monotonic()
            self._deleted = {
                tap: at for tap, at in self._deleted.items() if now - at < REVALIDATION
            }
            self._deleted[op.port] = now

    def _marked(self, tap: str, ids: dict[str, str]) -> list[tuple[Any, list[Any], list[Any]]]:
        """Return each Port row with these external_ids, its Interface rows and its Bridge rows."""
        found = []
        for port in self._named("Port", tap):
            interfaces = list(port.interfaces)
            if any(ids.items() <= each.external_ids.items() for each in interfaces):
                found.append((port, interfaces, self._holders(port)))
        return found

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
    databases: Iterable[Database], deadline: Deadline, seconds: float, also: int | None = None
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


def _our_ids(external_ids: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return by which of its external_ids a port of ours is known again."""
    # NOTE: others (ovn-controller) may add theirs at any time.
    seen = {key: value for key, value in external_ids if key in OUR_KEYS}
    if KEY_VERSION not in seen:
        raise ValueError("not a port of ours")
    return seen


def _detailed() -> dict[str, object]:
    """Return the schema with the columns of DETAILS."""
    schema: dict[str, Any] = json.loads(json.dumps(SCHEMA))
    for table, columns in DETAILS.items():
        schema["tables"][table]["columns"].update(columns)
    return schema


def _one(values: Any) -> Any:
    """Return the value of an optional column, None where it is empty."""
    return values[0] if values else None


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
