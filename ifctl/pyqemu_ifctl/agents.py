"""What the agents of this host tell of themselves, each asked over its socket. docs/agent.md"""

from __future__ import annotations

import _socket
import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import readable, sh, shown
from pyqemu_ifup.agent import (
    ROOT_SOCKET,
    SOCKET_VARIABLE,
    USERS_SOCKET,
    default_socket,
    find_socket,
)
from pyqemu_ifup.wire import connect, open_socket, receive, send

PATIENCE = 2.5
"""Seconds that the agent may take for its answer."""
LEAST = 0.001
"""No time at all would be no limit to connect(2)."""


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


def outdated_line(told: Told, path: str) -> tuple[str, ...]:
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
        lines += outdated_line(told, each)
    # NOTE: two that have the same to say say it once.
    return tuple(dict.fromkeys(lines))


def _in_force(told: Told) -> str:
    if told.loaded is None:
        return "the agent has no policy"
    return f"the agent keeps to the policy of {moment(told.loaded)}"


def ask(path: str, seconds: float = PATIENCE) -> Told:
    """Ask the agent at `path`, which may take so many seconds.

    Raises Failure: 69 if there is none, 75 if it does not answer, 77 if this user may not ask it,
    71 if what answers is no agent of this version.
    """
    if not path:
        raise Failure(
            Status.UNAVAILABLE,
            "there is no agent",
            f"{SOCKET_VARIABLE} is empty",
            f"unset it for the one at {default_socket()}",
        )
    seconds = max(seconds, LEAST)
    end = time.monotonic() + seconds
    connection = _connect(path, seconds)
    try:
        send(connection, "agent")
        data = _receive(connection, path, end)
    except (TimeoutError, BlockingIOError):
        raise _mute(path, seconds) from None
    except (BrokenPipeError, ConnectionResetError):
        raise _gone(path) from None
    finally:
        connection.close()
    try:
        return _read(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_agent(path, "what it says of itself is not to be understood") from error


def _connect(path: str, seconds: float) -> _socket.socket:
    connection = open_socket(seconds)
    try:
        connect(connection, path)
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
    return connection


def _receive(connection: _socket.socket, path: str, end: float) -> bytes:
    """Return the data of the answer. Raises Failure, and OSError as recv(2) does."""
    data = b""
    lines: list[str] = []
    while True:
        kind, rest, _ = receive(connection, max(LEAST, end - time.monotonic()))
        if not kind:
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
    """Return what the agent's JSON says. Raises KeyError and others if it has another form."""
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


def moment(seconds: float) -> str:
    """Return a moment, in seconds since 1970, as the date and time of day here."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
