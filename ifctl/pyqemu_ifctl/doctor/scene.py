"""One look at all that doctor judges: policy, links, Open vSwitch, packet filters, running QEMUs.

Changes nothing. What may not be looked at is told in `unseen`, and never taken for absent.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.policy import Network, Policy
from pyqemu_ifconf.shell import Command, sh
from pyqemu_ifctl.bounded import ALL, Parts
from pyqemu_ifctl.databases import (
    addresses,
    in_patience,
    look_for_unmet,
    open_each,
    take_policy,
    take_sights,
)
from pyqemu_ifctl.doctor.chains import called_tables, look_at_filters
from pyqemu_ifctl.doctor.daemons import Daemon, find_daemons, find_ovs_service, settled
from pyqemu_ifctl.doctor.running import Qemu, look_at_qemus, look_at_words
from pyqemu_ifctl.doctor.wanted import Wanted, wants
from pyqemu_ifctl.place import Hooks, know_hooks
from pyqemu_ifctl.rights import Lost, find_lost, find_off
from pyqemu_ifctl.taps import wanted as is_wanted
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.nft_program import DroppingChain
from pyqemu_ifup.drivers.tun import TUN, require_tun
from pyqemu_ifup.host import Host, filters, is_there
from pyqemu_ifup.look import Link, OvsPort, OvsSwitch, Vid, has_networks
from pyqemu_ifup.made.needs import is_ours
from pyqemu_ifup.manners import SAFE_PATH
from pyqemu_ifup.on_port import Sights
from pyqemu_ifup.stamp import Here, find_here
from pyqemu_ifup.system.own_mac import this_host


@dataclass(frozen=True)
class Scene:
    """This host at one moment.

    `vids` are those of every port of a Linux bridge that filters VLANs, None where there was no
    time to look, as with `sights`. `pinned` tells of a Linux bridge whether its MAC was set (None:
    not known). `switches` are the databases that answered, `failed` those that did not, `unasked`
    those that there was no time for, `absent` those of the policy that are not there at all;
    `daemons` tells of the ovs-vswitchd of each, as far as it is known. `call_iptables` are the
    kinds of tables that bridged frames go through ("iptables", "ip6tables"). `chains` are those
    that drop.
    `tables` tells of each network with NAT that taps are on what has become of its nft table, ""
    for nothing, `unmet` of each network with NAT of the policy's why an up could not make it.
    `tun` is why no tap can be made, `tun_mode` the mode of /dev/net/tun, None where there is none;
    `right` is why root may change no link. `ovs_service` is the unit of Open vSwitch, None without
    systemd, and `install_ovs` the command that installs its package. `unseen` is what may not be
    looked at, `unread` are the processes that do not let themselves be. `otherwise` is what the
    process of a tap says of itself by now that the tap's mark says otherwise. `hooks` are those of
    this installation, None for none. `host_id` is no other host's. `sights` are
    its links with their addresses, and its routes. `off` are the taps of running guests that the
    policy attaches, and that are down or nowhere.
    """

    policy: Policy | Failure
    here: Here
    links: tuple[Link, ...]
    vids: Mapping[int, tuple[Vid, ...]] | None
    pinned: Mapping[str, bool | None]
    switches: Mapping[str, OvsSwitch]
    ports: tuple[OvsPort, ...]
    failed: Mapping[str, Failure]
    absent: frozenset[str]
    daemons: Mapping[str, tuple[Daemon, int]]
    call_iptables: frozenset[str]
    chains: tuple[DroppingChain, ...]
    tables: Mapping[str, str]
    tun_mode: int | None
    qemus: tuple[Qemu, ...]
    ovs_service: str | None
    install_ovs: Command
    unseen: tuple[str, ...]
    unread: tuple[str, ...] = ()
    lost: tuple[Lost, ...] = ()
    off: tuple[Link, ...] = ()
    away: frozenset[int] = frozenset()
    otherwise: Mapping[str, str] = field(default_factory=dict)
    host_id: str = ""
    sights: Sights | None = None
    unasked: frozenset[str] = frozenset()
    hooks: Hooks | None = None
    unmet: Mapping[str, list[Failure]] = field(default_factory=dict)
    tun: Failure | None = None
    right: Failure | None = None

    @cached_property
    def wanted(self) -> dict[str, list[Wanted]]:
        """What the policy wants of each bridge."""
        found: dict[str, list[Wanted]] = {}
        for want in wants(self.policy):
            found.setdefault(want.network.bridge, []).append(want)
        return found

    def may_be_on(self, network: Network) -> bool:
        """Tell whether a network's bridge may be in a database that has not told what it has."""
        if network.ovsdb in self.failed or network.ovsdb in self.unasked:
            return network.kind != "linux"
        return network.kind == "openvswitch" and network.ovsdb in self.absent

    def link(self, name: str) -> Link | None:
        """Return the link of this name."""
        return next((link for link in self.links if link.name == name), None)

    def is_other_s(self, network: Network) -> bool:
        """Tell whether what has the name of the bridge that a network makes is somebody else's."""
        link = self.link(network.bridge) if network.nat is not None else None
        return link is not None and not is_ours(link, network.name)

    def bridges(self) -> dict[str, Link]:
        """Return the Linux bridges that the policy's taps are on, or are to be."""
        if isinstance(self.policy, Failure):
            return {}
        networks = self.policy.networks.values()
        names = {network.bridge for network in networks if not self.is_other_s(network)}
        return {
            link.name: link for link in self.links if link.kind == "bridge" and link.name in names
        }

    def uplinks(self, bridge: Link) -> list[Link]:
        """Return the ports of a Linux bridge that are no taps: they lead elsewhere."""
        return [link for link in self.links if link.master == bridge.index and link.kind != "tun"]


def look(environ: Mapping[str, str], deadline: Deadline, tell: Callable[[str], None]) -> Scene:
    """Look at all there is. Raises Failure where not even the links can be listed."""
    deadline = deadline.allowing(min(ALL, deadline.seconds))
    parts = Parts(deadline)
    policy = take_policy(parts, environ)
    unseen: list[str] = []
    late: list[str] = []
    with Host(None, deadline, tell, details=True) as host:
        failed = open_each(host, addresses(policy))
        looked = parts.take("how Open vSwitch is", lambda: settled(host, failed))
        switches = looked or {}
        unasked = frozenset(host.databases if looked is None else ())
        # NOTE: ports before links: a tap is there before its port is.
        ports = host.ports()
        links = tuple(host.kernel.links())
        aware = {link.index for link in links if filters(link)}
        vids = parts.take(
            "the VLANs of ports",
            lambda: {
                link.index: host.kernel.vids(link.index) for link in links if link.master in aware
            },
        )
        ported = {port.name for port in ports}
        sights = take_sights(
            parts,
            links,
            {link.index for link in links if link.master is not None or link.name in ported},
        )
        tables = (
            parts.take(
                "the nft tables of networks",
                lambda: _look_at_tables(host, policy, links, unseen, late),
            )
            or {}
        )
        unmet = (
            parts.take(
                "what networks with NAT need", lambda: _look_at_needs(host, policy, unseen, late)
            )
            or {}
        )
        right = _find_right(host)
        lost = (
            parts.take(
                "whose right has ended",
                lambda: find_lost(
                    host, policy, links, lambda tap, stamp: is_wanted(policy, tap, stamp)
                ),
            )
            or []
        )
        gone = {each.link.index for each in lost}
        off = (
            parts.take(
                "whose tap is down",
                lambda: find_off(
                    [link for link in links if link.index not in gone],
                    ports,
                    {each for each, database in host.databases.items() if database.is_connected},
                    lambda tap, stamp: is_wanted(policy, tap, stamp),
                ),
            )
            or []
        )
    networks = policy.networks.values() if isinstance(policy, Policy) else ()
    wanted = {each.ovsdb for each in networks if each.kind == "openvswitch"}
    unseen += [str(each) for each in failed.values() if each.status == Status.DENIED]
    if isinstance(policy, Failure) and is_closed(policy):
        unseen.append(str(policy))
    pinned = {link.name: _is_pinned(link) for link in links if link.kind == "bridge"}
    named = {network.bridge for network in networks}
    unseen += [
        f"whether the MAC of {name} is set: /sys is of another network namespace"
        for name, known in pinned.items()
        if known is None and name in named
    ]
    chains, hidden = look_at_filters(parts, deadline)
    unseen += hidden
    running = look_at_qemus(parts, policy, deadline)
    words = parts.take_apart("what guests say of themselves", lambda: look_at_words(links))
    otherwise, silent = words or (dict[str, str](), [])
    daemons = parts.take_apart("ovs-vswitchd", lambda: find_daemons(switches.values())) or {}
    tun = parts.take_apart("/dev/net/tun", _tun_fault)
    parts.end()
    return Scene(
        policy=policy,
        here=find_here(),
        links=links,
        vids=vids,
        pinned=pinned,
        switches=switches,
        ports=ports,
        failed=failed,
        absent=frozenset(
            each
            for each in wanted - switches.keys() - failed.keys() - unasked
            if not is_there(each)
        ),
        daemons=daemons,
        call_iptables=called_tables(),
        chains=chains,
        tables=tables,
        sights=sights,
        unmet=unmet,
        tun=tun,
        tun_mode=_tun_mode(),
        right=right,
        qemus=running.qemus,
        away=running.away,
        ovs_service=find_ovs_service(),
        install_ovs=(
            sh("dnf", "install", "openvswitch")
            if shutil.which("dnf", path=SAFE_PATH)
            else sh("apt-get", "install", "openvswitch-switch")
        ),
        unseen=(*unseen, *running.unseen),
        unread=(*parts.missed, *late, *running.unread, *silent),
        lost=tuple(lost),
        off=tuple(off),
        unasked=unasked,
        otherwise=otherwise,
        host_id=this_host(),
        hooks=know_hooks(sys.argv[0]),
    )


def _look_at_tables(
    host: Host,
    policy: Policy | Failure,
    links: tuple[Link, ...],
    unseen: list[str],
    late: list[str],
) -> dict[str, str]:
    """Return what has become of the tables, but of those that are told in `unseen` or `late`."""
    if not has_networks(links):
        return {}
    from pyqemu_ifup.made.network import find_table_faults

    found = {}
    in_force = policy if isinstance(policy, Policy) else None
    with in_patience(host):
        faults = host.finish(find_table_faults(host, in_force, links))
    for network, fault in faults.items():
        if isinstance(fault, Failure):
            told = late if fault.status == Status.TRY_AGAIN else unseen
            told.append(f"the nft table of network {network}: {fault}")
        else:
            found[network] = fault
    return found


def _look_at_needs(
    host: Host, policy: Policy | Failure, unseen: list[str], late: list[str]
) -> dict[str, list[Failure]]:
    """Return why networks with NAT could not be made, none of those that could.

    What may not be looked at is told in `unseen`, and what did not answer in time in `late`. All
    networks together take PATIENCE.
    """
    found = {}
    with in_patience(host):
        for network in policy.networks.values() if isinstance(policy, Policy) else ():
            if network.nat is None:
                continue
            what = f"whether network {network.name} can be made"
            if not host.deadline.remaining():
                late.append(f"{what}: the time was up before")
                continue
            known = []
            for each in look_for_unmet(host, network.name, network.bridge, network.nat):
                if isinstance(each, Forbidden):
                    unseen.append(f"{what}: {each}")
                elif each.status == Status.TRY_AGAIN:
                    late.append(f"{what}: {each.what}: {each.why}")
                else:
                    known.append(each)
            found[network.name] = known
    return found


def _find_right(host: Host) -> Failure | None:
    """Return why root may change no link here; others have that done for them."""
    if os.geteuid() != 0:
        return None
    try:
        host.kernel.require_right()
    except Failure as failure:
        return failure
    return None


def is_closed(failure: Failure) -> bool:
    """Tell whether it is only that this user may not read the policy."""
    return failure.status == Status.NO_POLICY and failure.why.endswith(os.strerror(errno.EACCES))


def _is_pinned(bridge: Link) -> bool | None:
    """Tell whether somebody has set the bridge's MAC (NET_ADDR_SET of linux/netdevice.h).

    NOTE: rtnetlink does not tell, and /sys is of the network namespace that it was mounted in.
    """
    folder = f"/sys/class/net/{bridge.name}"
    try:
        found = [_read(f"{folder}/{name}") for name in ("ifindex", "address", "addr_assign_type")]
    except (FileNotFoundError, NotADirectoryError):
        return None
    if found[:2] != [str(bridge.index), bridge.mac]:
        return None
    return found[2] == "3"


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read().strip()


def _tun_mode() -> int | None:
    try:
        found = os.stat(TUN)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.S_IMODE(found.st_mode) if stat.S_ISCHR(found.st_mode) else None


def _tun_fault() -> Failure | None:
    """Return why no tap can be made here; what only other users may open is none for root."""
    try:
        require_tun()
    except Failure as failure:
        return None if isinstance(failure, Forbidden) else failure
    return None
