"""One look at this host, for status, info, graph and doctor."""

from __future__ import annotations

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Policy, is_left
from pyqemu_ifctl.bounded import Parts
from pyqemu_ifctl.databases import addresses, open_each, take_sights
from pyqemu_ifup import kinds
from pyqemu_ifup.host import Host, filters, is_there
from pyqemu_ifup.kinds import vswitchd
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.look import Link, OvsSwitch
from pyqemu_ifup.mark import find_here
from pyqemu_ifup.system.own_mac import this_host


def look(host: Host, policy: Policy | Failure, parts: Parts, *, details: bool = False) -> Snapshot:
    """Look at all there is: for status, info, graph and doctor.

    `details` are those that doctor alone needs; the host's databases are opened with them then.
    Raises Failure if not even the links can be listed.
    """
    marks = [link.mark for link in host.kernel.links()]
    named = [mark.ovsdb for mark in marks if mark is not None and mark.ovsdb is not None]
    failed = open_each(host, dict.fromkeys([*addresses(policy), *named]))
    switches: dict[str, OvsSwitch] | None = {}
    if details:
        switches = parts.take(vswitchd.LOOKING, lambda: vswitchd.settled(host, failed))
    unknown = tuple(host.databases) if switches is None else ()
    # NOTE: ports before links: a tap is there before its port is.
    ports = host.ports()
    for address, database in host.databases.items():
        if not database.is_connected:
            failed[address] = vswitchd.has_ended(address)
    ports = tuple(port for port in ports if port.ovsdb not in failed)
    links = tuple(host.kernel.links())
    filtering = {link.index for link in links if filters(link)}
    vids = parts.take(
        "the VLANs of ports",
        lambda: {
            link.index: host.kernel.vids(link.index) for link in links if link.master in filtering
        },
    )
    rowed = {port.name for port in ports if details or port.ours}
    if details:
        shown = {each.index for each in links if each.master is not None or each.name in rowed}
    else:
        ours = (each for each in links if each.mark is not None or each.name in rowed)
        shown = {each.index for each in ours if kinds.is_ports(each)}
    networks = policy.networks.values() if isinstance(policy, Policy) else ()
    unasked = frozenset({*failed, *unknown})
    said = {
        address for each in networks if each.kind is not None for address in each.place.databases
    }
    return Snapshot(
        policy=policy,
        here=find_here(),
        links=links,
        ports=ports,
        vids=vids,
        ovs_bridges={
            bridge: tuple(
                address for address, each in host.databases.items() if each.has_bridge(bridge)
            )
            for bridge in {network.place.name for network in networks}
        },
        failed=failed,
        unasked=unasked,
        left=frozenset(
            link.name
            for link in links
            if link.tap
            and link.mark is None
            and isinstance(policy, Policy)
            and is_left(policy, link.name)
        ),
        own={link.index: kinds.see(host, link) for link in links if kinds.maker_of(link)},
        sights=take_sights(parts, links, shown),
        pinned={link.name: _is_pinned(link) for link in links if details and link.kind == "bridge"},
        switches=switches or {},
        absent=frozenset(each for each in said - unasked if not is_there(each)),
        host_id=this_host() if details else "",
    )


def _is_pinned(bridge: Link) -> bool | None:
    """Tell whether somebody has set the bridge's MAC (NET_ADDR_SET of linux/netdevice.h).

    NOTE: rtnetlink does not tell, and /sys is of the network namespace that it was mounted in.
    """
    folder = f"/sys/class/net/{bridge.name}"
    found = []
    try:
        for name in ("ifindex", "address", "addr_assign_type"):
            with open(f"{folder}/{name}", encoding="ascii", errors="replace") as file:
                found.append(file.read().strip())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found[2] == "3" if found[:2] == [str(bridge.index), bridge.mac] else None
