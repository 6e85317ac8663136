"""Networks that are made for their first port, and taken away after their last.

What the engine knows of them is here: `ensure` before a port joins, `leave` when one has left. A
run that is about no such network loads nothing else of this package.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext

from pyqemu_ifconf.policy import Port
from pyqemu_ifup.host import Host
from pyqemu_ifup.mark import BRIDGE_MARK, Mark
from pyqemu_ifup.system.lock import network_folders


def ensure(host: Host, port: Port) -> AbstractAsyncContextManager[None]:
    """See to it that the network of `port` is there, and stays while the port joins in the block.

    A network that others make is left to them. Raises Failure; if it does, or the block does, the
    network is what it was before.
    """
    if port.made is None:
        return nullcontext()
    from pyqemu_ifup.made.base import WantedNetwork
    from pyqemu_ifup.made.network import ensure

    return ensure(host, WantedNetwork(port.network, port.place.name, port.made), port.tap)


async def leave_bridge(host: Host, bridge: str) -> None:
    """Take away the network that a bridge was made for, if it has no port. Raises Failure."""
    link = host.kernel.look_up(bridge)
    if link is not None and link.alias.startswith(BRIDGE_MARK):
        from pyqemu_ifup.made.network import leave_all

        await leave_all(host, [link], "")


async def leave(host: Host, mark: Mark | None) -> None:
    """Take away each network that was made and has no port any more, or of which a part is left.

    With a mark, only the network that it names. A part is what a run leaves that is stopped.
    Raises Failure.
    """
    if mark is not None:
        bridge = host.kernel.look_up(mark.bridge) if mark.ovsdb is None else None
        bridges = [bridge] if bridge is not None else []
    else:
        bridges = [link for link in host.kernel.links() if link.kind == "bridge"]
    bridges = [link for link in bridges if link.alias.startswith(BRIDGE_MARK)]
    networks = {name.partition("@")[0] for name in network_folders()}
    if not bridges and not (networks if mark is None else mark.network in networks):
        return
    from pyqemu_ifup.made.network import leave_all

    await leave_all(host, bridges, None if mark is None else mark.network)
