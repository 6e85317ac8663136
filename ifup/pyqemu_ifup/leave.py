"""Leaves a tap as it is, as a `leave` rule says: what of it carries an old mark of ours goes."""

from __future__ import annotations

import syslog

from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.policy import Rule
from pyqemu_ifconf.shell import quote
from pyqemu_ifup import kinds, made
from pyqemu_ifup.claims import no_such_tap, refuse_anothers
from pyqemu_ifup.hook import log
from pyqemu_ifup.host import Host
from pyqemu_ifup.mark import find_here
from pyqemu_ifup.plan import plan_leaving
from pyqemu_ifup.steps import take_steps
from pyqemu_ifup.system.lock import lock_by_name


async def leave(host: Host, tap: str, rule: Rule, parent: int) -> None:
    """Leave `tap` to whoever has set it up, as `rule` says, for the process `parent`.

    Raises Failure: 71 where there is no such link, 77 where it is attached for another process
    that lives, else as the switches do; what is ours of it is left to gc then.
    """
    with await lock_by_name(tap, host.deadline):
        host.deadline.check()
        link = host.kernel.look_up(tap)
        if link is None:
            raise no_such_tap()
        mark = link.mark
        if mark is not None:
            refuse_anothers(mark, parent)
        marked = [mark.ovsdb] if mark is not None and mark.ovsdb is not None else []
        # NOTE: the frames of a port of ours that a dead tap has left would reach this one.
        await host.open_databases([DEFAULT_OVSDB, *host.ovsdbs, *marked])
        await host.catch_up(link)
        await take_steps(host, plan_leaving(kinds.look(host, tap, None), find_here()))
    if mark is not None:
        await made.leave(host, mark)
    log(syslog.LOG_INFO, f"{quote(tap)}: left as it is, " + rule.position.name)
