"""What a running QEMU says of its NICs, and tells its guest, over its machine protocol (QMP).

The only module that imports qemu.qmp. It changes nothing but a link's state, for a moment.

Who answers there may be anybody: what is said is bounded, and of the type that it must have, or is
no answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, Message, QMPClient, QMPError

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import readable
from pyqemu_ifctl.bounded import within

PLACES = ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached")
"""Where QEMU keeps its devices: those with an id, those without, and those of the board."""
_CLIENT = re.compile(
    r"(?: \\ )?(?:(?P<port>[^:]+): )??(?P<name>[^:]+): "
    r"index=(?P<index>[0-9]{1,9}),type=(?P<type>[a-z-]+),(?P<rest>.*)"
)

NETWORK_MAX = 1 << 18
"""Letters of an answer to `info network`."""
HUBS_MAX = 64
"""Hubs of one QEMU that are looked at."""
OBJECTS_MAX = 1024
"""Devices in one place of QEMU's tree, and properties of one."""
TEXT_MAX = 255
"""Letters of a name, a type, a MAC."""
DEVFN_MAX, MTU_MAX = 255, 65535
GRACE = 0.5
"""Seconds that a talk may take to end once it is told to."""
DOWN = 0.2
"""Seconds that a guest's link stays down, for the guest to see it."""
T = TypeVar("T")
Address = str | tuple[str, int]
"""The path of a unix socket, or host and port."""


@dataclass(frozen=True)
class Backend:
    """The other end of a NIC: its netdev's id, its type (`tap`, `user` ...), and QEMU's words.

    `queues` counts pairs; `ifname` and `descriptor` are a tap's, as far as it tells them.
    """

    id: str
    type: str
    words: str
    queues: int = 1
    ifname: str | None = None
    descriptor: int | None = None


@dataclass(frozen=True)
class GuestNic:
    """A NIC as QEMU has it. `addr` is slot and function on `bus`; None where there is none.

    `mq` and `host_mtu` are virtio's, None elsewhere. On a `hub` of QEMU's, `backends` are all that
    the hub joins.
    """

    name: str
    model: str
    mac: str
    bus: str | None
    addr: str | None
    backends: tuple[Backend, ...]
    mq: bool | None = None
    host_mtu: int | None = None
    hub: int | None = None


@dataclass(frozen=True)
class Joint:
    """A hub of QEMU's that joins several backends; of hubs that are joined, the least one."""

    hub: int
    backends: tuple[Backend, ...]


@dataclass(frozen=True)
class State:
    """How a QEMU is just now (RunState of its QAPI), and what its hubs join, None: not asked."""

    state: str
    joints: tuple[Joint, ...] | None = None


def ask_nics(address: Address, seconds: float) -> tuple[list[GuestNic], list[Joint]]:
    """Return the NICs of the QEMU whose QMP socket is at `address`, and what its hubs join.

    Raises Failure: 69 where nobody answers there, 71 where it does not speak as QEMU does, 75 where
    it is mute for so long, as it is while somebody else is connected, 77.
    """
    return _talk(lambda: _ask(address), address, seconds)


def ask_state(address: Address, seconds: float, *, joints: bool = False) -> State:
    """Return the state of the QEMU whose QMP socket is at `address`, with its hubs for `joints`.

    Raises Failure as ask_nics.
    """
    return _talk(lambda: _ask_state(address, joints), address, seconds)


async def _ask_state(address: Address, joints: bool) -> State:
    async with _connected(address) as client:
        told: object = await client.execute("query-status")
        if not isinstance(told, dict):
            raise _Nonsense("no object")
        state = _text(told.get("status"))
        network = await _ask_network(client) if joints else []
        return State(state, tuple(joints_of(network)) if joints else None)


def renew_link(address: Address, is_it: Callable[[Backend], bool], seconds: float) -> bool:
    """Take the guest's link of a backend down and up again; tell whether there is such a one.

    A guest asks for its addresses anew then. Raises Failure as ask_nics.
    """
    return _talk(lambda: _renew(address, is_it, seconds), address, seconds)


async def _renew(address: Address, is_it: Callable[[Backend], bool], seconds: float) -> bool:
    async with _connected(address) as client:
        ends = [end for end in await _ask_network(client) if end.type != "nic"]
        names = [backend.id for backend in _backends(ends) if is_it(backend)]
        for name in names:
            try:
                await client.execute("set_link", {"name": name, "up": False})
                # NOTE: a guest that finds it up again when it looks has not seen it down.
                await asyncio.sleep(DOWN)
            finally:
                up = client.execute("set_link", {"name": name, "up": True})
                await asyncio.wait_for(up, seconds)
        return bool(names)


class _Nonsense(Exception):
    """What is said is no answer of QEMU's; the text says what it is not."""


class _Client(QMPClient):
    """The library's client, which is given just what it reads without a look at its type."""

    async def _do_recv(self) -> Message:
        message = await super()._do_recv()
        for key in ("id", "event"):
            if not isinstance(message.get(key), str | None):
                raise _Nonsense(f"its {key} is no text")
        if message.keys().isdisjoint(("QMP", "event", "return", "error")):
            raise _Nonsense("neither an answer nor an event")
        return message


def _talk(talk: Callable[[], Awaitable[T]], address: Address, seconds: float) -> T:
    # NOTE: the library logs what it raises as well.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)

    async def bounded() -> T:
        # NOTE: what its tasks have raised that nobody waits for is printed as a traceback else.
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        return await asyncio.wait_for(talk(), seconds)

    try:
        # NOTE: the library waits for its peer when it hangs up, however long that takes.
        return within(seconds + GRACE, lambda: asyncio.run(bounded()))
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise Failure(
            Status.TRY_AGAIN,
            f"its QMP socket {readable(show(address))} does not answer",
            f"waited {seconds:g} s: somebody else may be connected, and QEMU serves one at a time",
            "give it a second -qmp for this",
        ) from error
    except (
        _Nonsense,
        ValueError,
        RecursionError,
        AssertionError,
        QMPError,
        OSError,
        EOFError,
    ) as error:
        raise _failure(address, error) from error


def _failure(address: Address, error: BaseException) -> Failure:
    """Return the Failure of a talk: 69: nobody is there, 71: it is no QEMU, 77.

    NOTE: that is the first of the causes; a line of JSON may be too long, too deep, no UTF-8, or
    have too long a number.
    """
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    what = f"its QMP socket {readable(show(address))} cannot be asked"
    if isinstance(cause, PermissionError):
        return Failure(
            Status.DENIED, what, cause.strerror or "", "run as root, or as the user of that QEMU"
        )
    if isinstance(cause, OSError | EOFError | ExecuteError):
        why = getattr(cause, "strerror", None) or _told(cause) or "it has hung up"
        return Failure(Status.UNAVAILABLE, what, why, "see its -qmp")
    return Failure(
        Status.REFUSED,
        what,
        f"what it says is not QEMU's: {_told(cause) or type(cause).__name__}",
        "see its -qmp",
    )


def _told(error: BaseException) -> str:
    """Return what an error says, which may be what its peer has sent."""
    try:
        text = str(error)[:TEXT_MAX]
    except (ValueError, RecursionError):
        # NOTE: the library shows what it was sent as JSON.
        text = ""
    return readable(text) if text else ""


def show(address: Address) -> str:
    """Return an address as a person reads it."""
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


@asynccontextmanager
async def _connected(address: Address) -> AsyncIterator[_Client]:
    client = _Client("pyqemu-ifctl")
    await client.connect(address)
    try:
        yield client
    finally:
        await client.disconnect()


async def _ask_network(client: _Client) -> list[Client]:
    told = await client.execute("human-monitor-command", {"command-line": "info network"})
    return read_network(_text(told, NETWORK_MAX))


async def _ask(address: Address) -> tuple[list[GuestNic], list[Joint]]:
    async with _connected(address) as client:
        network = await _ask_network(client)
        found = []
        for place in PLACES:
            for name, type in (await _list(client, place)).items():
                if type.startswith("child<"):
                    path = f"{place}/{name}"
                    values = await _device(client, path)
                    if values is not None:
                        found.append(nic_of(path, values, network))
        nics = sorted(found, key=lambda nic: (nic.bus or "", nic.addr or "", nic.name))
        return nics, joints_of(network)


async def _list(client: _Client, path: str) -> dict[str, str]:
    """Return what an object of QEMU's has: names and their types."""
    listed: object = await client.execute("qom-list", {"path": path})
    if not isinstance(listed, list) or len(listed) > OBJECTS_MAX:
        raise _Nonsense(f"no list of at most {OBJECTS_MAX} objects")
    found = {}
    for each in listed:
        if not isinstance(each, dict):
            raise _Nonsense("no object")
        found[_text(each.get("name"))] = _text(each.get("type"))
    return found


async def _device(client: _Client, path: str) -> dict[str, Any] | None:
    """Return what is of interest of a device, None where it is no NIC."""
    names = await _list(client, path)
    if not {"netdev", "mac"} <= names.keys():
        return None
    wanted = ("type", "netdev", "mac", "addr", "parent_bus", "mq", "host_mtu")
    values: dict[str, Any] = {}
    for name in wanted:
        if name in names:
            values[name] = await client.execute("qom-get", {"path": path, "property": name})
    return values


def _text(value: object, most: int = TEXT_MAX) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise _Nonsense(f"no text of at most {most} letters")
    return value


def _number(value: object, most: int) -> int | None:
    """Return a number from 0 to `most`; None for none, and for a negative one, which says none."""
    if value is None or (isinstance(value, int) and value < 0):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value > most:
        raise _Nonsense(f"no number up to {most}")
    return value


@dataclass(frozen=True)
class Client:
    """A line of `info network`: a NIC or a backend, and the hub port that it is on, if any."""

    name: str
    index: int
    type: str
    rest: str
    hub: int | None
    port: str | None
    peer: str | None
    """The NIC of the line before, of a line that is indented."""


def read_network(text: str) -> list[Client]:
    """Return the clients that the monitor's `info network` lists (net/net.c and net/hub.c)."""
    found: list[Client] = []
    hub: int | None = None
    above: str | None = None
    for line in text.splitlines():
        heading = re.fullmatch(r"hub (-?[0-9]{1,10})", line)
        if heading is not None:
            hub = int(heading[1])
            continue
        match = _CLIENT.fullmatch(line)
        if match is None:
            continue
        indented = line.startswith(" ")
        if not indented:
            hub = None
            above = match["name"]
        on_hub = hub is not None and indented
        found.append(
            Client(
                match["name"],
                int(match["index"]),
                match["type"],
                match["rest"],
                hub if on_hub else None,
                match["port"] if on_hub else None,
                above if indented and not on_hub else None,
            )
        )
    return found


def nic_of(path: str, values: Mapping[str, Any], network: list[Client]) -> GuestNic:
    """Return the NIC at a path of QEMU's object tree, with its backends from `info network`."""
    netdev = _text(values["netdev"])
    own = path.removeprefix("/machine/peripheral/") if "/peripheral/" in path else ""
    port = next((c for c in network if c.port == netdev), None)
    hubs: set[int] = set()
    if port is not None and port.hub is not None:
        name = own or port.name
        hubs = _joined_hubs(network, port.hub)
        backends = _ends_on(network, hubs)
    else:
        ends = [c for c in network if c.name == netdev and c.type != "nic"]
        backends = _backends(ends)
        name = own or next((c.peer for c in ends if c.peer), netdev)
    bus = _text(values.get("parent_bus") or "").rpartition("/")[2] or None
    devfn = _number(values.get("addr"), DEVFN_MAX)
    mq = values.get("mq")
    if not isinstance(mq, bool | None):
        raise _Nonsense("mq is neither true nor false")
    return GuestNic(
        name=name or path.rpartition("/")[2],
        model=_text(values.get("type")),
        mac=_text(values["mac"]),
        bus=bus,
        addr=f"{devfn >> 3:02x}.{devfn & 7}" if devfn is not None else None,
        backends=tuple(backends),
        mq=mq,
        host_mtu=_number(values.get("host_mtu"), MTU_MAX) or None,
        hub=min(hubs, default=None),
    )


def joints_of(network: list[Client]) -> list[Joint]:
    """Return the hubs that join several backends, those without a NIC too."""
    found: list[Joint] = []
    seen: set[int] = set()
    for hub in sorted({client.hub for client in network if client.hub is not None})[:HUBS_MAX]:
        if hub not in seen:
            hubs = _joined_hubs(network, hub)
            seen |= hubs
            backends = _ends_on(network, hubs)
            if len(backends) > 1:
                found.append(Joint(min(hubs), tuple(backends)))
    return found


def _ends_on(network: list[Client], hubs: set[int]) -> list[Backend]:
    """Return the backends that are on some of these hubs."""
    return _backends([c for c in network if c.hub in hubs and c.type not in ("nic", "hubport")])


def _joined_hubs(network: list[Client], hub: int) -> set[int]:
    """Return a hub and those that are joined to it: a port of one may have a port of another."""
    hub_of = {client.port: client.hub for client in network if client.hub is not None}
    joined: dict[int, set[int]] = {}
    for client in network:
        other = hub_of.get(client.name) if client.type == "hubport" else None
        if client.hub is not None and other is not None:
            joined.setdefault(client.hub, set()).add(other)
            joined.setdefault(other, set()).add(client.hub)
    found, waiting = {hub}, [hub]
    while waiting:
        new = joined.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def _backends(ends: list[Client]) -> list[Backend]:
    found: dict[str, Backend] = {}
    for end in ends:
        before = found.get(end.name)
        if before is not None:
            found[end.name] = Backend(
                before.id,
                before.type,
                before.words,
                before.queues + 1,
                before.ifname,
                before.descriptor,
            )
            continue
        # NOTE: no regular expression: one that looks for the end anew from each start takes time as
        # the square of what a stranger says.
        rest = f",{end.rest}"
        _, ifname, after = rest.partition(",ifname=")
        name, script, _ = after.partition(",script=")
        descriptor = re.search(r",fd=([0-9]{1,9})(?![0-9])", rest)
        found[end.name] = Backend(
            end.name,
            end.type,
            end.rest,
            1,
            name if ifname and script else None,
            int(descriptor[1]) if descriptor else None,
        )
    return list(found.values())
