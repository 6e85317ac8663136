"""pyqemu-ifctl status --watch: the state of the taps, shown again whenever it changes."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping

from pyqemu_ifconf.shell import quote
from pyqemu_ifctl.taps import as_shown, find_view
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.host import Host
from pyqemu_ifup.links import LinkEvents

LOOK = 10.0
"""Seconds that one look may take."""
QUIET, PATIENCE = 0.05, 0.5
"""Seconds without a change after which what belongs together has come; those waited at most."""
AGAIN = 2.0
"""Seconds after which a database that does not answer is tried again."""
FOREVER = 3600.0
CLEAR = "\x1b[H\x1b[2J"
"""Home, and erase the screen (ECMA-48)."""


def watch_status(
    tap: str | None,
    environ: Mapping[str, str],
    deadline: Deadline,
    tell: Callable[[str], None],
    show: Callable[[str], None],
    complain: Callable[[str], None],
    *,
    as_json: bool,
    redraw: bool,
) -> None:
    """Show every tap, or `tap`, and again after each change, until it is interrupted.

    It is the kernel and the databases that tell of a change. `redraw` puts each in the place of
    the one before, as on a terminal; else one follows the other, with an empty line between. Ends
    too where nobody reads any more. Raises Failure where the links cannot be had.
    """
    events = LinkEvents()
    try:
        with Host(None, deadline, tell) as host:
            _go_on(host, events, tap, environ, show, complain, as_json=as_json, redraw=redraw)
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
    finally:
        events.close()


def _go_on(
    host: Host,
    events: LinkEvents,
    tap: str | None,
    environ: Mapping[str, str],
    show: Callable[[str], None],
    complain: Callable[[str], None],
    *,
    as_json: bool,
    redraw: bool,
) -> None:
    deadline = host.deadline
    before: str | None = None
    said: tuple[str, ...] = ()
    while deadline.interrupted() is None:
        moment = _moment(host)
        with host.until(deadline.child(LOOK)):
            view = find_view(host, tap, environ)
        if deadline.interrupted() is not None:
            return
        text = as_shown(view.rows, tap, as_json=as_json) or f"no tap is called {quote(tap or '')}\n"
        if text != before:
            show(f"{CLEAR}{text}" if redraw else text if before is None else f"\n{text}")
            before = text
        if view.remarks != said:
            for line in view.remarks:
                complain(line)
            said = view.remarks
        limit = AGAIN if view.failures else FOREVER
        _wait_for_change(host, events, moment, limit)


def _moment(host: Host) -> dict[str, object]:
    return {address: database.moment for address, database in host.databases.items()}


def _wait_for_change(
    host: Host, events: LinkEvents, moment: dict[str, object], seconds: float
) -> None:
    """Return when something has changed, and then nothing for a moment; or after `seconds`."""
    end = time.monotonic() + seconds
    changed_at: float | None = None
    first: float | None = None
    while host.deadline.interrupted() is None:
        now = time.monotonic()
        seen = _moment(host)
        # NOTE: a database that was opened by the look itself is no change.
        if events.drain() or any(moment.get(each, seen[each]) != seen[each] for each in seen):
            changed_at = now
            first = first if first is not None else now
        moment = seen
        if changed_at is not None and first is not None:
            if now - changed_at >= QUIET or now - first >= PATIENCE:
                return
            host.wait_for(events.fileno(), QUIET)
        elif now >= end:
            return
        else:
            host.wait_for(events.fileno(), end - now)
