"""Somebody at a QMP socket who answers as a QEMU with one NIC, but for one message."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

NETWORK = (
    "nic0: index=0,type=nic,model=e1000,macaddr=52:54:00:00:00:01\r\n"
    " \\ n0: index=0,type=tap,ifname=web0,script=no,downscript=no\r\n"
)
VALUES: dict[str, Any] = {
    "type": "e1000",
    "netdev": "n0",
    "mac": "52:54:00:00:00:01",
    "addr": 16,
    "parent_bus": "/machine/x/pci.0",
    "mq": True,
    "host_mtu": 1500,
}
GREETING: dict[str, Any] = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""},
            "capabilities": ["oob"]},
}  # fmt: skip
Path_ = tuple[Any, ...]


def line(message: object) -> bytes:
    """Return a message as QEMU sends it, with whatever Python's JSON can hold."""
    return (json.dumps(message) + "\r\n").encode("utf-8", "surrogatepass")


def answer(command: str, arguments: dict[str, Any]) -> tuple[str, object]:
    """Return what the QEMU answers, and a name for that answer."""
    if command == "human-monitor-command":
        return "network", NETWORK
    if command == "qom-get":
        return arguments["property"], VALUES[arguments["property"]]
    if command == "qom-list" and arguments["path"].count("/") > 2:
        return "properties", [{"name": name, "type": "string"} for name in VALUES]
    if command == "qom-list":
        nics = [{"name": "nic0", "type": "child<e1000>"}]
        return "devices", nics if arguments["path"] == "/machine/peripheral" else []
    return "capabilities", {}


def messages() -> dict[str, dict[str, Any]]:
    """Return each message that the QEMU sends, by name; I stands for the request's id."""
    found = {"greeting": GREETING}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("qmp_capabilities", {}),
        ("human-monitor-command", {}),
        ("qom-list", {"path": "/machine/peripheral"}),
        ("qom-list", {"path": "/machine/peripheral/nic0"}),
        *(("qom-get", {"property": name}) for name in VALUES),
    ]
    for command, arguments in asked:
        name, value = answer(command, arguments)
        found[name] = {"return": value, "id": "I"}
    return found


def places(value: object, depth: int, path: Path_ = ()) -> Iterator[Path_]:
    """Yield where something stands in a message, as keys and indexes, at most so deep."""
    yield path
    if depth and isinstance(value, dict):
        for key in value:
            yield from places(value[key], depth - 1, (*path, key))
    elif depth and isinstance(value, list):
        yield from places(value[0], depth - 1, (*path, 0)) if value else ()


def put(message: object, path: Path_, value: object) -> object:
    """Return a message with another value at a place."""
    if not path:
        return value
    if isinstance(message, dict):
        return {key: put(each, path[1:], value) if key == path[0] else each
                for key, each in message.items()}  # fmt: skip
    assert isinstance(message, list)
    return [put(each, path[1:], value) if number == path[0] else each
            for number, each in enumerate(message)]  # fmt: skip


class Peer:
    """Serves one client at `path`; `send` is told each message's name and what QEMU would say."""

    def __init__(self, path: Path, send: Callable[[str, dict[str, Any]], bytes]) -> None:
        self._send = send
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Peer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._listener.close()

    def _serve(self) -> None:
        try:
            with self._listener.accept()[0] as connection:
                self._talk(connection)
        except OSError:
            # The client has gone, or never came.
            return

    def _talk(self, connection: socket.socket) -> None:
        connection.sendall(self._send("greeting", GREETING))
        decoder, heard = json.JSONDecoder(), ""
        while data := connection.recv(65536):
            heard += data.decode()
            while heard := heard.lstrip():
                try:
                    asked, end = decoder.raw_decode(heard)
                except ValueError:
                    break
                heard = heard[end:]
                name, value = answer(asked["execute"], asked.get("arguments", {}))
                said: dict[str, Any] = {"return": value}
                said |= {"id": asked["id"]} if "id" in asked else {}
                connection.sendall(self._send(name, said))
