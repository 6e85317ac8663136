"""The taps of this host again and again, whenever something changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping

from pyqemu_ifctl.taps import View, find_view
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.links import LinkEvents
from pyqemu_ifup.host import Host

LOOK = 10.0
"""Seconds that one look may take."""
QUIET, PATIENCE = 0.05, 0.5
"""Seconds without a change after which what belongs together has come; those waited at most."""
AGAIN = 2.0
"""Seconds after which a database that does not answer is tried again."""
FOREVER = 3600.0


def each_view(
    tap: str | None, environ: Mapping[str, str], deadline: Deadline, tell: Callable[[str], None]
) -> Generator[View, None, None]:
    """Yield what there is to be shown of every tap, or of `tap`, now and after each change.

    It is the kernel and the databases that tell of a change. Ends where it is interrupted. Raises
    Failure where the links cannot be had.
    """
    events = LinkEvents()
    try:
        with Host(None, deadline, tell) as host:
            while deadline.interrupted() is None:
                moment = _moment(host)
                with host.until(deadline.child(LOOK)):
                    view = find_view(host, tap, environ)
                if deadline.interrupted() is not None:
                    return
                yield view
                _wait_for_change(host, events, moment, AGAIN if view.failures else FOREVER)
    finally:
        events.close()


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
