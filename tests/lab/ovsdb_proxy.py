"""A proxy before an ovsdb-server: it hears what a hook says, and can spoil what it is told."""

from __future__ import annotations

import json
import select
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

Spoil = Callable[["Session", dict[str, Any]], None]
"""What to do with a message from the server; `Session.give` hands it on as it is."""


def give(session: Session, message: dict[str, Any]) -> None:
    """Hand the server's message on as it is."""
    session.give(message)


@dataclass
class Session:
    """One connection of a hook: how many of the server's messages have come, from 1.

    `asked` are the hook's requests by their id.
    """

    client: socket.socket
    server: socket.socket
    count: int = 0
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)

    def give(self, message: dict[str, Any]) -> None:
        """Send `message` to the hook."""
        self.write(json.dumps(message).encode())

    def write(self, data: bytes) -> None:
        """Send these bytes to the hook."""
        self.client.sendall(data)

    def drop(self) -> None:
        """Close the hook's connection, and the server's with it."""
        for end in (self.client, self.server):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # NOTE: ENOTCONN: the other side was faster.

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the request that `message` answers, {} where it answers none."""
        return self.asked.get(json.dumps(message.get("id")), {})

    def answers_insert(self, message: dict[str, Any]) -> bool:
        """Tell whether `message` is the reply to a transaction that adds a port."""
        request = self.request(message)
        return request.get("method") == "transact" and any(
            op.get("op") == "insert" for op in request["params"][1:]
        )


class Proxy:
    """Listens on a unix socket for hooks and hands all on to the server; a context manager.

    `spoil` is given each of the server's messages.
    """

    def __init__(self, db: str, spoil: Spoil = give) -> None:
        self.db = db.removeprefix("unix:")
        self.spoil = spoil
        self.heard: list[dict[str, Any]] = []
        self.sessions: list[Session] = []
        self.folder = tempfile.TemporaryDirectory(prefix="ovsdb-", dir="/tmp")
        self.address = f"unix:{self.folder.name}/proxy.sock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(self.address.removeprefix("unix:"))
        self.listener.listen(64)
        self.threads: list[threading.Thread] = []
        self.closed = False

    def __enter__(self) -> Proxy:
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.closed = True
        self.listener.shutdown(socket.SHUT_RDWR)
        for session in self.sessions:
            session.drop()
        for thread in self.threads:
            thread.join()
        for session in self.sessions:
            session.client.close()
            session.server.close()
        self.listener.close()
        self.folder.cleanup()

    def requests(self, method: str) -> list[dict[str, Any]]:
        """Return the hooks' requests of this method, in order."""
        return [message for message in self.heard if message.get("method") == method]

    def _start(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run)
        self.threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return  # NOTE: EINVAL: `__exit__` has shut the listener down.
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                server.connect(self.db)
            except OSError:
                client.close()
                server.close()
                continue
            session = Session(client, server)
            self.sessions.append(session)
            if self.closed:
                session.drop()
            self._start(lambda session=session: self._serve(session))  # type: ignore[misc]

    def _serve(self, session: Session) -> None:
        buffers = {session.client: "", session.server: ""}
        while True:
            for end in select.select(list(buffers), [], [])[0]:
                try:
                    data = end.recv(65536)
                    if not data:
                        return session.drop()
                    if end is session.client:
                        session.server.sendall(data)
                    messages, buffers[end] = _split(buffers[end] + data.decode())
                    for message in messages:
                        self._take(session, end, message)
                except (BrokenPipeError, ConnectionResetError):
                    return session.drop()

    def _take(self, session: Session, end: socket.socket, message: dict[str, Any]) -> None:
        if end is session.client:
            self.heard.append(message)
            session.asked[json.dumps(message.get("id"))] = message
        else:
            session.count += 1
            self.spoil(session, message)


def _split(text: str) -> tuple[list[dict[str, Any]], str]:
    """Return the JSON objects that `text` begins with, and the rest."""
    decoder = json.JSONDecoder()
    found = []
    while text:
        try:
            message, end = decoder.raw_decode(text)
        except json.JSONDecodeError:
            break
        found.append(message)
        text = text[end:].lstrip()
    return found, text
