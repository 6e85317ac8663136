"""Leaves a tap as it is, as a `leave` rule says: what of it carries an old mark of ours goes."""

from __future__ import annotations

import syslog

from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.names import is_network_name
from pyqemu_ifconf.policy import Rule
from pyqemu_ifconf.shell import quote
from pyqemu_ifup import kinds
from pyqemu_ifup.claims import no_such_tap, refuse_anothers
from pyqemu_ifup.host import Host
from pyqemu_ifup.manners import log
from pyqemu_ifup.plan import plan_leaving
from pyqemu_ifup.stamp import BRIDGE_MARK, Stamp, find_here
from pyqemu_ifup.system.lock import lock_by_name, network_folders


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
        stamp = link.stamp
        if stamp is not None:
            refuse_anothers(stamp, parent)
        marked = [stamp.ovsdb] if stamp is not None and stamp.ovsdb is not None else []
        # NOTE: the frames of a port of ours that a dead tap has left would reach this one.
        await host.open_databases([DEFAULT_OVSDB, *host.ovsdbs, *marked])
        await host.catch_up(link)
        for op in plan_leaving(kinds.look(host, tap, None), find_here()):
            host.deadline.check()
            await host.run(op)
    if stamp is not None:
        await leave_networks(host, stamp)
    log(syslog.LOG_INFO, f"{quote(tap)}: left as it is, " + rule.position.name)


async def leave_networks(host: Host, stamp: Stamp | None) -> None:
    """Take away the networks that were made for taps, where the last one has left, or a part.

    With a stamp only that tap's own. A part is what a run has left that was stopped.
    """
    if stamp is not None:
        bridge = host.kernel.look_up(stamp.bridge) if stamp.ovsdb is None else None
        bridges = [bridge] if bridge is not None else []
    else:
        bridges = [link for link in host.kernel.links() if link.kind == "bridge"]
    bridges = [link for link in bridges if link.alias.startswith(BRIDGE_MARK)]
    networks = {name.partition("@")[0] for name in network_folders()}
    # NOTE: most taps are of none, whatever others have; a hook need not load what makes one.
    if not bridges and not (networks if stamp is None else stamp.network in networks):
        return
    from pyqemu_ifup.made.nat import network_of
    from pyqemu_ifup.made.network import folders, ports_of
    from pyqemu_ifup.made.network import leaving as leaving_network

    found = {network_of(link.alias): link for link in bridges}
    for network, link in found.items():
        if network is not None and is_network_name(network) and not ports_of(host, link):
            await leaving_network(host, network, link.name)
    for network in folders():
        if network not in found and (stamp is None or stamp.network == network):
            await leaving_network(host, network, "")
