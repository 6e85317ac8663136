"""pyqemu-ifctl agent: what the agents tell of themselves. docs/agent.md"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import readable, sh, shown
from pyqemu_ifctl.answer import Answer, count, lay_out, to_json, wrap
from pyqemu_ifup.agent import (
    ROOT_SOCKET,
    SOCKET_VARIABLE,
    USERS_SOCKET,
    WIRE,
    default_socket,
    find_socket,
)

PATIENCE = 2.5
"""Seconds that the agent may take for its answer."""
LEAST = 0.001
"""No time at all would be no limit to connect(2)."""
PACKET_MAX = 1 << 20
TIMEVAL = struct.Struct("@ll")
LABEL = 14
"""Columns of the names on the left."""


@dataclass(frozen=True)
class Requests:
    """The requests of one verb: how many, how many of them failed, and milliseconds each took."""

    count: int
    failed: int
    median: float
    p99: float


@dataclass(frozen=True)
class Told:
    """What the agent tells: times in seconds, moments in seconds since 1970.

    `release` is its version, None of a checkout, and `outdated` whether another has been installed
    since it started. `policy_error` is what is wrong with the files as they are now. `text` is all
    that was told.
    """

    text: Mapping[str, object]
    release: str | None
    pid: int | None
    outdated: bool
    uptime: float
    connections: int
    refused: int
    requests: Mapping[str, Requests]
    files: tuple[str, ...] | None
    loaded: float | None
    policy_error: str | None
    databases: Mapping[str, bool]
    last_error: str | None
    last_error_at: float | None


def agent(*, as_json: bool) -> Answer:
    """Show what the agent of this user tells of itself, and for root that of the users too.

    Raises Failure: 69 where there is none, 75 where it does not answer, 77 where it is not to be
    asked, 71 where what answers is no agent of this version. Where that of the users is not there,
    or does not answer, a remark tells so.
    """
    path = find_socket()
    told = ask(path)
    users, remarks = None, tuple[str, ...]()
    if path == ROOT_SOCKET:
        try:
            users = ask(USERS_SOCKET)
        except Failure as failure:
            remarks = (str(failure),)
    remarks += _outdated(told, path)
    if users is not None:
        remarks += _outdated(users, USERS_SOCKET)
    if as_json:
        return Answer(
            to_json({**told.text, "users": users.text if users is not None else None}),
            remarks=remarks,
        )
    texts = [as_text(told, path)]
    if users is not None:
        texts.append(as_text(users, USERS_SOCKET))
    return Answer("\n".join(texts), remarks=remarks)


def _outdated(told: Told, path: str) -> tuple[str, ...]:
    """Return a line on an agent that is older than what is installed."""
    if not told.outdated:
        return ()
    return (
        f"the agent at {readable(path)} is older than what is installed; restart it: "
        f"{sh('systemctl', 'restart', _unit(path))}; nothing is lost by that",
    )


def remark(seconds: float) -> tuple[str, ...]:
    """Return a line on each agent whose policy is not that of its files, that is old, or mute.

    `seconds` is the time there is for it.
    """
    path = find_socket()
    end = time.monotonic() + seconds
    lines = []
    for each in (path, USERS_SOCKET) if path == ROOT_SOCKET else (path,):
        try:
            told = ask(each, min(end - time.monotonic(), PATIENCE))
        except Failure as failure:
            if failure.status is not Status.UNAVAILABLE:
                lines.append(str(failure))
            continue
        if told.policy_error is not None:
            lines.append(f"{_in_force(told)}: {told.policy_error}")
        lines += _outdated(told, each)
    # NOTE: two that have the same to say say it once.
    return tuple(dict.fromkeys(lines))


def _in_force(told: Told) -> str:
    if told.loaded is None:
        return "the agent has no policy"
    return f"the agent keeps to the policy of {_moment(told.loaded)}"


def ask(path: str, seconds: float = PATIENCE) -> Told:
    """Ask the agent at `path`, which may take so many seconds. Raises Failure as `agent` does."""
    if not path:
        raise Failure(
            Status.UNAVAILABLE,
            "there is no agent",
            f"{SOCKET_VARIABLE} is empty",
            f"unset it for the one at {default_socket()}",
        )
    seconds = max(seconds, LEAST)
    end = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        _connect(connection, path, seconds)
        try:
            connection.send(f"{WIRE}\0agent".encode(), socket.MSG_NOSIGNAL)
            data = _receive(connection, path, end)
        except (TimeoutError, BlockingIOError):
            raise _mute(path, seconds) from None
        except (BrokenPipeError, ConnectionResetError):
            raise _gone(path) from None
    try:
        return _read(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_agent(path, "what it says of itself is not to be understood") from error


def _connect(connection: socket.socket, path: str, seconds: float) -> None:
    # NOTE: where its queue is full, connect(2) waits that long, and a socket with a timeout of
    # Python's would not.
    limit = TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    try:
        connection.connect(path)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        if error.errno == errno.EAGAIN:
            raise _mute(path, seconds) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise Failure(
                Status.DENIED, f"cannot connect to {readable(path)}", why, "ask who runs the agent"
            ) from error
        if error.errno == errno.EPROTOTYPE:
            raise _no_agent(path, "its socket is of another type") from error
        raise Failure(
            Status.UNAVAILABLE,
            f"no agent listens at {readable(path)}",
            why,
            f"start it: {sh('systemctl', 'start', _unit(path))}, or pyqemu-ifd"
            f"{' --users' if path == USERS_SOCKET else ''}; the hooks do without",
        ) from error


def _receive(connection: socket.socket, path: str, end: float) -> bytes:
    """Return the data of the answer. Raises Failure, and OSError as recv(2) does."""
    data = b""
    lines: list[str] = []
    while True:
        connection.settimeout(max(LEAST, end - time.monotonic()))
        packet = connection.recv(PACKET_MAX)
        kind, rest = packet[:1], packet[1:]
        if not packet:
            raise _gone(path)
        if kind == b"+":
            data += rest
        elif kind == b"-":
            lines.append(os.fsdecode(rest))
        elif kind == b"=" and rest == b"0":
            return data
        elif kind == b"?":
            raise _no_agent(path, os.fsdecode(rest))
        elif kind != b"!":
            raise _no_agent(path, "; ".join(lines) or "its answer is not to be understood")


def _unit(path: str) -> str:
    return "pyqemu-ifd-users" if path == USERS_SOCKET else "pyqemu-ifd"


def _mute(path: str, seconds: float) -> Failure:
    return Failure(
        Status.TRY_AGAIN,
        f"the agent at {readable(path)} does not answer",
        f"waited {seconds:.2g} s",
        f"try again, or restart it: {sh('systemctl', 'restart', _unit(path))}; "
        "nothing is lost by that",
    )


def _gone(path: str) -> Failure:
    return Failure(
        Status.TRY_AGAIN,
        f"the agent at {readable(path)} has hung up",
        "it has ended, or has too many connections",
        "try again",
    )


def _no_agent(path: str, why: str) -> Failure:
    return Failure(
        Status.REFUSED,
        f"what listens at {readable(path)} is no agent of this version",
        shown(why),
        f"restart it: {sh('systemctl', 'restart', _unit(path))}",
    )


def _read(told: Any) -> Told:
    """Return what the agent's JSON says. Raises KeyError and others where it is of another form."""
    if told.pop("version") != 1:
        raise ValueError("version")
    policy = told["policy"]
    return Told(
        text=told,
        release=None if told.get("release") is None else str(told["release"]),
        pid=None if told.get("pid") is None else int(told["pid"]),
        # NOTE: one that does not say so is of an earlier version.
        outdated=bool(told.get("outdated", True)),
        uptime=float(told["uptime"]),
        connections=int(told["connections"]),
        refused=int(told["refused"]),
        requests={
            str(verb): Requests(
                int(each["count"]), int(each["failed"]), float(each["median"]), float(each["p99"])
            )
            for verb, each in told["requests"].items()
        },
        files=None if policy["files"] is None else tuple(map(str, policy["files"])),
        loaded=None if policy["loaded"] is None else float(policy["loaded"]),
        policy_error=None if policy["error"] is None else str(policy["error"]),
        databases={str(each["ovsdb"]): bool(each["connected"]) for each in told["databases"]},
        last_error=None if told["last_error"] is None else str(told["last_error"]),
        last_error_at=None if told["last_error_at"] is None else float(told["last_error_at"]),
    )


def as_text(told: Told, path: str) -> str:
    """Return it for a person: a line for each thing, and a table of the requests."""
    connections = str(told.connections)
    if told.refused:
        connections += f" ({count(told.refused, 'more connection')} refused so far)"
    version = f"{told.release or 'not known'}, process {told.pid or 'not known'}"
    pairs = [("socket", path), ("version", version), ("uptime", span(told.uptime))]
    pairs += [("connections", connections)]
    pairs += [("policy", ", ".join(told.files) if told.files is not None else "none")]
    if told.loaded is not None:
        kept = "" if told.policy_error is None else ", in force until the error is mended"
        pairs.append(("loaded", f"{_moment(told.loaded)}{kept}"))
    if told.policy_error is not None:
        pairs.append(("policy error", told.policy_error))
    pairs += [
        ("database", f"{address}, {'connected' if connected else 'not connected'}")
        for address, connected in told.databases.items()
    ]
    if told.last_error is not None and told.last_error_at is not None:
        pairs.append(("last error", f"{_moment(told.last_error_at)} {told.last_error}"))
    if not told.requests:
        pairs.append(("requests", "none yet"))
    lines = [
        line
        for name, value in pairs
        for line in wrap(f"{name:<{LABEL}}{shown(value)}", " " * LABEL)
    ]
    if told.requests:
        cells = [
            (
                verb,
                str(each.count),
                str(each.failed),
                _milliseconds(each.median),
                _milliseconds(each.p99),
            )
            for verb, each in told.requests.items()
        ]
        heads = ("REQUESTS", "COUNT", "FAILED", "MEDIAN", "P99")
        lines += ["", *lay_out(heads, cells, [0]).lines]
    return "\n".join(lines) + "\n"


def span(seconds: float) -> str:
    """Return `3 days 4:05:06`, without the days `4:05:06`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}"
    return f"{count(days, 'day')} {clock}" if days else clock


def _milliseconds(number: float) -> str:
    return f"{number:.1f} ms"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
