"""pyqemu-ifctl status: every tap of this host, and what is ours of it."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.names import check_tap_name
from pyqemu_ifconf.shell import quote, readable, shown
from pyqemu_ifctl.answer import (
    FOUND,
    TIMEOUT,
    Answer,
    Table,
    add_json,
    by_name,
    json_differences,
    json_vlan,
    lay_out,
    to_json,
    wrap,
)
from pyqemu_ifctl.program import PROGRAM, put
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.hook import narrator, within_deadline
from pyqemu_ifup.look import show_vlan

if TYPE_CHECKING:
    from pyqemu_ifctl.taps import Row, View

FOREVER = 1e8
"""Seconds of a verb that goes on until it is stopped."""
CLEAR = "\x1b[H\x1b[2J"
"""Home, and erase the screen (ECMA-48)."""
HEADS = ("TAP", "STATE", "BRIDGE", "NETWORK", "VLAN", "MTU", "PID", "VM")
LONG = (3, 4, 7)
"""The columns that may be cut: NETWORK, VLAN, VM."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options and arguments."""
    add_json(parser)
    parser.add_argument("tap", metavar="TAP", nargs="?", help="show all there is to this one")
    parser.add_argument(
        "--watch", action="store_true", help="go on, and show it again whenever it changes"
    )
    parser.add_argument(
        "--graph",
        choices=("dot", "svg"),
        metavar="dot|svg",
        help="draw guests, taps, VLANs, bridges and uplinks",
    )
    parser.add_argument(
        "--exit-code", action="store_true", help="end 1 if a tap differs or is stale"
    )


def run(args: argparse.Namespace) -> Answer:
    """Show the taps, once or again and again. Raises Failure."""
    tap = check_tap_name(args.tap) if args.tap is not None else None
    tell = narrator(PROGRAM, tap)
    if args.graph and (args.json or args.watch):
        raise Failure(
            Status.USAGE, "--graph goes with neither --json nor --watch", "", "give one of them"
        )
    if args.watch and args.exit_code:
        raise Failure(Status.USAGE, "--exit-code does not go with --watch", "", "give one of them")
    if args.watch:
        with within_deadline(FOREVER, hook=False) as deadline:
            watch(tap, os.environ, deadline, tell, as_json=args.json)
        return Answer("")
    with within_deadline(TIMEOUT, hook=False) as deadline:
        answer = status(
            tap,
            os.environ,
            deadline,
            tell,
            as_json=args.json,
            graph=args.graph,
            exit_code=args.exit_code,
        )
    return answer.by_name()


def status(
    tap: str | None,
    environ: Mapping[str, str],
    deadline: Deadline,
    tell: Callable[[str], None],
    *,
    as_json: bool,
    graph: str | None = None,
    exit_code: bool = False,
) -> Answer:
    """Show every tap, or all there is to `tap`; raises Failure (69) where that is no tap.

    With `exit_code` the status is 1 where one of them differs or is stale, and not 0 where that
    cannot be told.
    `graph` is `dot` or `svg` for a picture. Neither a policy that cannot be had nor a database
    that fails keeps the rest from being shown.
    """
    from pyqemu_ifctl.taps import find_view
    from pyqemu_ifup.host import Host

    with Host(tap if graph is None else None, deadline, tell) as host:
        view = find_view(host, tap, environ)
    if tap is not None and not view.rows and not view.failures:
        raise Failure(
            Status.UNAVAILABLE,
            f"no tap of this network namespace, and nothing of ours, is called {quote(tap)}",
            "",
            "pyqemu-ifctl status lists them all",
        )
    if graph is not None:
        from pyqemu_ifctl.graph import as_dot, as_svg

        out = as_dot(view.rows, view.snapshot)
        out = as_svg(out, deadline.remaining()) if graph == "svg" else out
    else:
        out = as_shown(view.rows, tap, as_json=as_json)
    return Answer(out, _status(view, exit_code), view.remarks)


def _status(view: View, exit_code: bool) -> int:
    from pyqemu_ifctl.databases import worst

    status = worst(view.failures)
    if exit_code and status == Status.DONE:
        differs = any(row.state in ("differs", "stale") for row in view.rows)
        return FOUND if differs else worst(view.unknown)
    return status


def watch(
    tap: str | None,
    environ: Mapping[str, str],
    deadline: Deadline,
    tell: Callable[[str], None],
    *,
    as_json: bool,
) -> None:
    """Show every tap, or `tap`, and again after each change, until it is interrupted.

    On a terminal each is put in the place of the one before; else one follows the other, with an
    empty line between. Ends too where nobody reads any more. Raises Failure where the links cannot
    be had.
    """
    from pyqemu_ifctl.watch import each_view

    redraw = sys.stdout is not None and sys.stdout.isatty()
    before: str | None = None
    said: tuple[str, ...] = ()
    try:
        with closing(each_view(tap, environ, deadline, tell)) as views:
            for view in views:
                text = as_shown(view.rows, tap, as_json=as_json)
                text = text or f"no tap is called {quote(tap or '')}\n"
                if text != before:
                    lead = CLEAR if redraw else "" if before is None else "\n"
                    put(sys.stdout, f"{lead}{text}")
                    before = text
                if view.remarks != said:
                    for line in view.remarks:
                        put(sys.stderr, f"{by_name(line)}\n")
                    said = view.remarks
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise


def as_shown(found: list[Row], tap: str | None, *, as_json: bool) -> str:
    """Return the rows as they are printed: all of them, or those of `tap` at length."""
    if as_json:
        return as_object(found)
    return as_table(found) if tap is None else "\n".join(map(as_list, found))


def as_object(found: list[Row]) -> str:
    """Return the rows as JSON."""
    return to_json(
        {
            "taps": [
                {
                    "tap": row.tap,
                    "ifindex": row.ifindex,
                    "kind": row.kind,
                    "bridge": row.bridge,
                    "network": row.network,
                    "mtu": row.mtu,
                    "mac": row.mac,
                    "vlan": json_vlan(row.vlan),
                    "isolated": row.isolated,
                    "vm": row.vm,
                    "pid": row.pid,
                    "state": row.state,
                    "differences": json_differences(row.differences),
                    "otherwise": None
                    if row.otherwise is None
                    else [
                        {"setting": each.setting, "mark": each.mark, "says": each.says}
                        for each in row.otherwise
                    ],
                }
                for row in found
            ]
        }
    )


def as_table(found: list[Row]) -> str:
    """Return the rows as a table, and below it what does not fit there, tap by tap."""
    if not found:
        return "no taps\n"
    table: Table = lay_out(HEADS, [_cells(row) for row in found], LONG)
    lines = list(table.lines)
    details = []
    for number, row in enumerate(found):
        said = [str(each) for each in row.differences or ()]
        said += [row.because] if row.because else []
        if number in table.cut:
            cells = _cells(row)
            said += [
                f"{HEADS[at]} {cells[at] if HEADS[at] == 'VLAN' else readable(cells[at])}"
                for at in LONG
                if cells[at] != "-"
            ]
        if said:
            details += wrap(shown(f"{readable(row.tap)}: {'; '.join(said)}"))
    return "\n".join([*lines, *([""] if details else []), *details]) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    vlan = show_vlan(row.vlan).removeprefix("none") or "-"
    cells = (row.tap, row.state or "?", row.bridge, row.network, vlan, row.mtu, row.pid, row.vm)
    return tuple("-" if cell is None else str(cell) for cell in cells)


def as_list(row: Row) -> str:
    """Return all that is known of one row, a line for each."""
    pairs: list[tuple[str, object]] = [
        ("tap", row.tap),
        ("state", row.state or "not known"),
        ("ifindex", row.ifindex),
        ("kind", row.kind),
        ("bridge", row.bridge),
        ("network", row.network),
        ("mtu", row.mtu),
        ("mac", row.mac),
        ("vlan", show_vlan(row.vlan).removeprefix("none") or None),
        ("isolated", None if row.isolated is None else str(row.isolated).lower()),
        ("vm", row.vm),
        ("pid", row.pid),
    ]
    lines = [f"{name:<11}  {'-' if value is None else value}" for name, value in pairs]
    if row.differences is None:
        lines.append("differences  not known")
    for each in row.differences or ():
        lines.append(f"differences  {each.sides}")
        lines += [f"  because    {each.because}"] if each.because else []
    lines += [f"because      {row.because}"] if row.because else []
    return "\n".join(line for each in lines for line in wrap(shown(each), " " * 13)) + "\n"
