"""pyqemu-ifctl agent: how the agents are."""

from __future__ import annotations

import argparse

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.shell import shown
from pyqemu_ifctl.agents import Told, ask, moment, outdated_line
from pyqemu_ifctl.answer import Answer, add_json, count, lay_out, to_json, wrap
from pyqemu_ifup.agent import ROOT_SOCKET, USERS_SOCKET, find_socket

LABEL = 14
"""Columns of the names on the left."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its option."""
    add_json(parser)


def run(args: argparse.Namespace) -> Answer:
    """Show the agents. Raises Failure."""
    return agent(as_json=args.json).by_name()


def agent(*, as_json: bool) -> Answer:
    """Show what the agent of this user tells of itself, and for root that of the users too.

    Raises Failure as `ask`. Where that of the users is not there, or does not answer, a remark
    tells so.
    """
    path = find_socket()
    told = ask(path)
    users, remarks = None, tuple[str, ...]()
    if path == ROOT_SOCKET:
        try:
            users = ask(USERS_SOCKET)
        except Failure as failure:
            remarks = (str(failure),)
    remarks += outdated_line(told, path)
    if users is not None:
        remarks += outdated_line(users, USERS_SOCKET)
    if as_json:
        return Answer(
            to_json({**told.text, "users": users.text if users is not None else None}),
            remarks=remarks,
        )
    texts = [as_text(told, path)]
    if users is not None:
        texts.append(as_text(users, USERS_SOCKET))
    return Answer("\n".join(texts), remarks=remarks)


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
        pairs.append(("loaded", f"{moment(told.loaded)}{kept}"))
    if told.policy_error is not None:
        pairs.append(("policy error", told.policy_error))
    pairs += [
        ("database", f"{address}, {'connected' if connected else 'not connected'}")
        for address, connected in told.databases.items()
    ]
    if told.last_error is not None and told.last_error_at is not None:
        pairs.append(("last error", f"{moment(told.last_error_at)} {told.last_error}"))
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
