"""Tells when ports go from Open vSwitch's database, by the event and not by asking again."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable
from typing import Any

from side_by_side.hosts import BenchError

RECEIVE = 1 << 16


class PortMonitor:
    """A `monitor` (RFC 7047, section 4.1.5) of the names of all ports; a context manager."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._waiting = ""
        self.names: dict[str, str] = {}
        """The ports that there are, by their row's UUID."""
        self._send("monitor", ["Open_vSwitch", None, {"Port": {"columns": ["name"]}}])
        self._take(self._next(time.monotonic() + 10)["result"])

    def __enter__(self) -> PortMonitor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def wait_gone(self, names: Iterable[str], seconds: float) -> None:
        """Return when none of the ports is there. Raises BenchError after so many seconds."""
        wanted = set(names)
        end = time.monotonic() + seconds
        while left := wanted & set(self.names.values()):
            message = self._next(end)
            if message.get("method") == "echo":
                self._socket.sendall(
                    json.dumps(
                        {"id": message["id"], "result": message["params"], "error": None}
                    ).encode()
                )
            elif message.get("method") == "update":
                self._take(message["params"][1])
            else:
                raise BenchError(f"ovsdb-server says {message} with {len(left)} ports left")

    def _send(self, method: str, params: list[object]) -> None:
        request = {"method": method, "params": params, "id": 0}
        self._socket.sendall(json.dumps(request).encode())

    def _take(self, tables: dict[str, dict[str, dict[str, dict[str, str]]]]) -> None:
        for uuid, change in tables.get("Port", {}).items():
            if "new" in change:
                self.names[uuid] = change["new"]["name"]
            else:
                del self.names[uuid]

    def _next(self, end: float) -> dict[str, Any]:
        """Return the next message; they come one after the other, with nothing between them."""
        decoder = json.JSONDecoder()
        while True:
            try:
                message, length = decoder.raw_decode(self._waiting)
            except json.JSONDecodeError:
                self._receive(end)
            else:
                self._waiting = self._waiting[length:]
                found: dict[str, Any] = message
                return found

    def _receive(self, end: float) -> None:
        self._socket.settimeout(max(0.01, end - time.monotonic()))
        try:
            data = self._socket.recv(RECEIVE)
        except TimeoutError:
            raise BenchError(f"ports are left in Open vSwitch: {len(self.names)}") from None
        if not data:
            raise BenchError("ovsdb-server has hung up")
        self._waiting += data.decode()
