"""The ports of an Open vSwitch, by its database: looks, and executes what changes one."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import quote, vsctl
from pyqemu_ifup.deadline import Deadline, Unconfirmed
from pyqemu_ifup.drivers.ovsdb_connection import Connection
from pyqemu_ifup.look import OvsBridge, OvsPort, OvsSwitch
from pyqemu_ifup.mark import KEY_VERSION, OUR_KEYS
from pyqemu_ifup.task import RETRY, pause

REVALIDATION = 0.02
"""Seconds after a change in which old flows may still forward; measured: 2 ms at the most.

Longer where ovs-vswitchd gets no processor (seen once, in a virtual machine that stood still).
"""


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


class Database(Connection):
    """One Open vSwitch: its bridges and ports, of one tap or all. With `details`, `switch` too."""

    def __init__(
        self, address: str, tap: str | None, away: float = RETRY, *, details: bool = False
    ) -> None:
        super().__init__(address, tap, away, details=details)
        self._deleted: dict[str, float] = {}

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
            interface = self._insert(transaction, "Interface")
            interface.name = op.port
            interface.external_ids = dict(op.external_ids)
            mode, tag, trunks = op.columns
            port = self._insert(transaction, "Port")
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


def _our_ids(external_ids: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return by which of its external_ids a port of ours is known again."""
    # NOTE: others (ovn-controller) may add theirs at any time.
    seen = {key: value for key, value in external_ids if key in OUR_KEYS}
    if KEY_VERSION not in seen:
        raise ValueError("not a port of ours")
    return seen


def _one(values: Any) -> Any:
    """Return the value of an optional column, None where it is empty."""
    return values[0] if values else None
