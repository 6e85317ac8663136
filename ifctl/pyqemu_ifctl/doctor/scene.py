"""One look at all that doctor judges: policy, links, Open vSwitch, packet filters, running QEMUs.

Changes nothing. What may not be looked at is told in `unseen`, and never taken for absent.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.policy import Network, Policy
from pyqemu_ifctl.bounded import ALL, Parts
from pyqemu_ifctl.databases import in_patience, look_for_unmet, take_policy
from pyqemu_ifctl.doctor.chains import called_tables, look_at_filters
from pyqemu_ifctl.doctor.running import Qemu, look_at_qemus, look_at_words
from pyqemu_ifctl.look import look as look_at_taps
from pyqemu_ifctl.place import Hooks, know_hooks
from pyqemu_ifctl.rights import Lost, find_lost, find_off
from pyqemu_ifctl.taps import wanted as is_wanted
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.nft_program import DroppingChain
from pyqemu_ifup.drivers.tun import TUN, require_tun
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.kinds.vswitchd import LOOKING_FOR_IT, Vswitchd
from pyqemu_ifup.kinds.vswitchd import look as look_at_vswitchd
from pyqemu_ifup.look import Link, has_networks
from pyqemu_ifup.made.base import WantedNetwork


@dataclass(frozen=True, kw_only=True)
class Scene(Snapshot):
    """This host at one moment, and all else that doctor judges.

    `call_iptables` are the kinds of tables that bridged frames go through ("iptables",
    "ip6tables"). `chains` are those that drop. `tables` tells of each network with NAT that taps
    are on what has become of its nft table, "" for nothing, `unmet` of each network with NAT of the
    policy's why an up could not make it. `tun` is why no tap can be made, `tun_mode` the mode of
    /dev/net/tun, None if there is none; `right` is why root may change no link. `unseen` is what
    may not be looked at, `unread` are the processes that do not let themselves be. `otherwise` is
    what the process of a tap says of itself by now that the tap's mark says otherwise. `hooks` are
    those of this installation, None for none. `lost` are the taps whose right has ended, `off`
    those of running guests that the policy attaches, and that are down or nowhere. `away` are the
    QEMUs whose guest runs elsewhere just now.
    """

    call_iptables: frozenset[str] = frozenset()
    chains: tuple[DroppingChain, ...] = ()
    tables: Mapping[str, str] = field(default_factory=dict)
    unmet: Mapping[str, list[Failure]] = field(default_factory=dict)
    tun: Failure | None = None
    tun_mode: int | None = None
    right: Failure | None = None
    qemus: tuple[Qemu, ...] = ()
    away: frozenset[int] = frozenset()
    lost: tuple[Lost, ...] = ()
    off: tuple[Link, ...] = ()
    otherwise: Mapping[str, str] = field(default_factory=dict)
    hooks: Hooks | None = None
    unseen: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def may_be_on(self, network: Network) -> bool:
        """Tell whether a network's bridge may be in a database that has not told what it has."""
        silent = self.unasked | (self.absent if network.kind is not None else frozenset())
        return not silent.isdisjoint(network.place.databases)

    def bridges(self) -> dict[str, Link]:
        """Return the links that are bridges, of those that the policy's taps are on or are to be.

        It is through these that the kernel's packet filters see frames.
        """
        names = {network.place.name for network in self.networks}
        return {
            link.name: link for link in self.links if link.kind == "bridge" and link.name in names
        }


def look(environ: Mapping[str, str], deadline: Deadline, tell: Callable[[str], None]) -> Scene:
    """Look at all there is. Raises Failure if not even the links can be listed."""
    deadline = deadline.allowing(min(ALL, deadline.seconds))
    parts = Parts(deadline)
    policy = take_policy(parts, environ)
    unseen: list[str] = []
    late: list[str] = []
    with Host(None, deadline, tell, details=True) as host:
        seen = look_at_taps(host, policy, parts, details=True)
        links = seen.links
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
                    host, policy, links, lambda tap, mark: is_wanted(policy, tap, mark)
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
                    {each: known for each, known in host.databases.items() if known.is_connected},
                    lambda tap, mark: is_wanted(policy, tap, mark),
                ),
            )
            or []
        )
    unseen += [str(each) for each in seen.failed.values() if each.status == Status.DENIED]
    if isinstance(policy, Failure) and is_closed(policy):
        unseen.append(str(policy))
    named = {network.place.name for network in seen.networks}
    unseen += [
        f"whether the MAC of {name} is set: /sys is of another network namespace"
        for name, known in seen.pinned.items()
        if known is None and name in named
    ]
    chains, hidden = look_at_filters(parts, deadline)
    unseen += hidden
    running = look_at_qemus(parts, policy, deadline)
    words = parts.take_apart("what guests say of themselves", lambda: look_at_words(links))
    otherwise, silent = words or (dict[str, str](), [])
    switches = tuple(seen.switches.values())
    vswitchd = parts.take_apart(LOOKING_FOR_IT, lambda: look_at_vswitchd(switches))
    tun = parts.take_apart("/dev/net/tun", _tun_fault)
    parts.end()
    # NOTE: not asdict(), which would take the values in it apart too.
    known = {each.name: getattr(seen, each.name) for each in fields(Snapshot)}
    return Scene(
        **{**known, "vswitchd": vswitchd or Vswitchd()},
        call_iptables=called_tables(),
        chains=chains,
        tables=tables,
        unmet=unmet,
        tun=tun,
        tun_mode=_tun_mode(),
        right=right,
        qemus=running.qemus,
        away=running.away,
        lost=tuple(lost),
        off=tuple(off),
        otherwise=otherwise,
        hooks=know_hooks(sys.argv[0]),
        unseen=(*unseen, *running.unseen),
        unread=(*parts.missed, *late, *running.unread, *silent),
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
    from pyqemu_ifup.made.guard import find_table_faults

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
            if network.made is None:
                continue
            what = f"whether network {network.name} can be made"
            if not host.deadline.remaining():
                late.append(f"{what}: the time was up before")
                continue
            known = []
            wanted = WantedNetwork(network.name, network.place.name, network.made)
            for each in look_for_unmet(host, wanted):
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
