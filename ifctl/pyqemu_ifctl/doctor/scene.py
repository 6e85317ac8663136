"""One look at all that doctor judges: policy, links, Open vSwitch, packet filters, running QEMUs.

Changes nothing. What may not be looked at is told in `unseen`, and never taken for absent.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.policy import DEFAULT_OVSDB, Network, Policy
from pyqemu_ifconf.shell import Command, readable, sh
from pyqemu_ifctl.answer import count
from pyqemu_ifctl.bounded import ALL, Parts
from pyqemu_ifctl.databases import (
    addresses,
    in_patience,
    look_for_unmet,
    open_each,
    take_policy,
    take_sights,
)
from pyqemu_ifctl.doctor.wanted import Wanted, wants
from pyqemu_ifctl.place import Hooks, know_hooks
from pyqemu_ifctl.qemu.command_nics import CommandNic, nics_of
from pyqemu_ifctl.qemu.migration import States, find_away, find_states, may_be_away, may_join
from pyqemu_ifctl.qemu.running import (
    Guest,
    Guests,
    each_in_time,
    find_guests,
    is_left_for,
    leads_to,
)
from pyqemu_ifctl.rights import Lost, find_lost, find_off
from pyqemu_ifctl.taps import wanted as is_wanted
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers import nft_program as nft
from pyqemu_ifup.drivers.nft_program import DroppingChain
from pyqemu_ifup.drivers.programs import run_program
from pyqemu_ifup.drivers.tun import TUN, require_tun
from pyqemu_ifup.guest import Patience, find_otherwise, tell_otherwise
from pyqemu_ifup.host import Host, filters, is_there
from pyqemu_ifup.look import Link, OvsPort, OvsSwitch, Vid, has_networks, is_local
from pyqemu_ifup.made.needs import is_ours
from pyqemu_ifup.manners import SAFE_PATH
from pyqemu_ifup.on_port import Sights
from pyqemu_ifup.qemu.caller import Option, command_line, read_program, read_status, real_uid
from pyqemu_ifup.stamp import Here, find_here
from pyqemu_ifup.system.holders import LONGEST, Holders, find_holders
from pyqemu_ifup.system.own_mac import this_host
from pyqemu_ifup.task import finish

if TYPE_CHECKING:
    from pyqemu_ifctl.qemu.qmp import Joint

DEFAULT_SCRIPTS = {"script": "/etc/qemu-ifup", "downscript": "/etc/qemu-ifdown"}
"""What QEMU calls for a tap where it is told nothing (configure, --sysconfdir=/etc)."""
HELPERS = (
    "/usr/lib/qemu/qemu-bridge-helper",
    "/usr/libexec/qemu-bridge-helper",
    "/usr/lib/qemu-bridge-helper",
    "/usr/local/libexec/qemu-bridge-helper",
)
"""Where distributions, and QEMU's own `make install`, put its helper, as pyqemu-takeover has it."""
OVS_RUN = os.path.dirname(DEFAULT_OVSDB[len("unix:") :])
SETTLE = 1.0
"""Seconds in which a healthy ovs-vswitchd has taken in what is configured."""
FILTER_SECONDS = 2.0
"""Seconds that nft may take, and each program of iptables: less than a part, which kills none."""
KILLING = 0.2
"""Seconds that are left to kill it where the time is up."""
HOLDERS_SECONDS = LONGEST + 0.5
NICS_MAX = 64
"""NICs of one guest that are looked at."""
PATHS_SECONDS = 1.5
"""What all guests together may take to be looked at: where a path leads, its maker decides."""

Daemon = Literal["running", "stopped", "gone"]


@dataclass(frozen=True)
class Qemu:
    """One running QEMU.

    `scripts` holds each script=, downscript= and helper= that it has: what the path leads to, None
    where there is no such program. `confined`: system calls are filtered, and no privilege can be
    gained; None where that cannot be told. `nics` are the first of its NICs. `joints` is what its
    hubs join just now, None where its command line alone is known. `hidden`: which taps it holds
    could not be seen.
    """

    guest: Guest
    confined: bool | None
    scripts: Mapping[str, str | None]
    nics: tuple[CommandNic, ...] = ()
    left: frozenset[str] = frozenset()
    joints: tuple[Joint, ...] | None = None
    hidden: bool = False

    @property
    def name(self) -> str:
        """The guest's name, for a message, with its process."""
        if self.guest.vm is None:
            return f"QEMU {self.guest.pid}"
        return f"{readable(self.guest.vm)} (QEMU {self.guest.pid})"


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
    chains, hidden = _look_at_filters(parts, deadline)
    unseen += hidden
    # NOTE: it sees to it itself that who uses up its time hides nobody else.
    seen_holders = parts.take_apart("the taps that processes hold", find_holders, HOLDERS_SECONDS)
    holders = seen_holders or Holders((), ())
    hidden_pids = {*holders.hidden, *holders.unread}
    guests = parts.take_apart("the guests", lambda: find_guests(holders)) or Guests((), ())
    unread = late + list(guests.unread)
    qemus = []
    seen = each_in_time(
        guests.found, partial(_qemu, policy), min(PATHS_SECONDS, deadline.remaining())
    )
    for guest in guests.found:
        qemu = seen.get(guest.pid, "where its scripts lead was not seen in time")
        if isinstance(qemu, Qemu):
            qemus.append(qemu)
            if len(qemu.nics) > NICS_MAX:
                unread.append(
                    f"QEMU {guest.pid} has more than {NICS_MAX} NICs: the others were not looked at"
                )
        else:
            unread.append(f"QEMU {guest.pid}: {qemu}")
    migrating = may_be_away(
        [qemu.guest for qemu in qemus],
        {qemu.guest.pid: {nic.mac for nic in qemu.nics if nic.mac} for qemu in qemus},
    )
    told = _ask_qemus(parts, [qemu.guest for qemu in qemus], migrating)
    qemus = [
        replace(
            qemu,
            joints=_joints_of(told, qemu.guest.pid),
            hidden=seen_holders is None or qemu.guest.pid in hidden_pids,
        )
        for qemu in qemus
    ]
    away, unknown = find_away(migrating, told)
    unseen += [f"whether QEMU {pid} waits for a migration: {why}" for pid, why in unknown.items()]
    words = parts.take_apart("what guests say of themselves", lambda: _look_at_words(links))
    otherwise, silent = words or (dict[str, str](), [])
    unread += silent
    if holders.hidden and os.geteuid() != 0:
        processes = count(len(holders.hidden), "process")
        unseen.append(f"the taps that {processes} of other users may hold; run as root")
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
        call_iptables=_called_tables(),
        chains=chains,
        tables=tables,
        sights=sights,
        unmet=unmet,
        tun=tun,
        tun_mode=_tun_mode(),
        right=right,
        qemus=tuple(qemus),
        away=away,
        ovs_service=find_ovs_service(),
        install_ovs=(
            sh("dnf", "install", "openvswitch")
            if shutil.which("dnf", path=SAFE_PATH)
            else sh("apt-get", "install", "openvswitch-switch")
        ),
        unseen=tuple(unseen),
        unread=(*parts.missed, *unread),
        lost=tuple(lost),
        off=tuple(off),
        unasked=unasked,
        otherwise=otherwise,
        host_id=this_host(),
        hooks=know_hooks(sys.argv[0]),
    )


def _ask_qemus(parts: Parts, guests: Sequence[Guest], migrating: Sequence[Guest]) -> States:
    """Ask over QMP what is of use of each: those that may join taps, and those `migrating`."""
    joining = {guest.pid for guest in guests if may_join(guest)}
    asked = [guest for guest in guests if guest.pid in joining or guest in migrating]
    if not asked:
        return {}
    return (
        parts.take_apart("how QEMUs are, over QMP", lambda: find_states(asked, joints=joining))
        or {}
    )


def _joints_of(told: States, pid: int) -> tuple[Joint, ...] | None:
    """Return what the hubs of a QEMU join, None where it has not told."""
    state = told.get(pid)
    return None if isinstance(state, Failure) or state is None else state.joints


def _look_at_words(links: Iterable[Link]) -> tuple[dict[str, str], list[str]]:
    """Return what taps' processes say otherwise than their marks, and who was not read in time."""
    otherwise, unread = {}, []
    patience = Patience()
    for tap, stamp in ((link.name, link.stamp) for link in links if link.stamp is not None):
        others = find_otherwise(tap, stamp, patience)
        words = tell_otherwise(stamp, others)
        if words and others is None:
            unread.append(f"{readable(tap)}: {words}")
        elif words:
            otherwise[tap] = words
    return otherwise, unread


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


def find_ovs_service() -> str | None:
    """Return the unit of Open vSwitch, None without systemd."""
    if not os.path.isdir("/run/systemd/system"):
        return None
    debian = any(
        os.path.exists(f"{folder}/systemd/system/openvswitch-switch.service")
        for folder in ("/etc", "/usr/lib", "/lib")
    )
    return "openvswitch-switch" if debian else "openvswitch"


def is_closed(failure: Failure) -> bool:
    """Tell whether it is only that this user may not read the policy."""
    return failure.status == Status.NO_POLICY and failure.why.endswith(os.strerror(errno.EACCES))


def settled(host: Host, failed: dict[str, Failure]) -> dict[str, OvsSwitch]:
    """Return how each Open vSwitch is, once it has taken in what is configured, or does not.

    A database that cannot tell is added to those that have `failed`.
    """
    until = time.monotonic() + SETTLE
    while True:
        found: dict[str, OvsSwitch] = {}
        for address, database in list(host.databases.items()):
            try:
                found[address] = database.switch()
            except Failure as failure:
                # NOTE: one that talks nonsense tells no ports either.
                failed[address] = failure
                del host.databases[address]
        if time.monotonic() > until or not any(each.behind for each in found.values()):
            return found
        host.deadline.check()
        time.sleep(0.05)
        host.ports()


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


def find_daemons(switches: Any) -> dict[str, tuple[Daemon, int]]:
    """Return how the ovs-vswitchd of each local database is, and its process (0: none)."""
    found: dict[str, tuple[Daemon, int]] = {}
    local = [each for each in switches if is_local(each.ovsdb) and each.ovsdb.startswith("unix:")]
    if not local:
        return found
    running = [
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and os.path.basename(read_program(int(name))) == "ovs-vswitchd"
    ]
    for switch in local:
        # NOTE: anybody may have a process that is called so.
        owners = (0, _owner(switch.ovsdb[len("unix:") :]))
        pids = [pid for pid in running if real_uid(pid) in owners and _serves(pid, switch.ovsdb)]
        if pids:
            halted = all(_is_halted(pid) for pid in pids)
            found[switch.ovsdb] = ("stopped" if halted else "running", pids[0])
        elif not _answers(switch):
            found[switch.ovsdb] = ("gone", 0)
    return found


def _serves(pid: int, ovsdb: str) -> bool:
    """Tell whether an ovs-vswitchd is of this database, by its command line.

    It may call the socket by another path, through a link or in mounts of its own.
    """
    words = command_line(pid)
    named = [word for word in words if word.startswith("unix:")]
    if not words or ovsdb in named:
        return bool(words)
    try:
        socket_of = os.stat(ovsdb[len("unix:") :])
    except FileNotFoundError:
        return False
    for word in named or [DEFAULT_OVSDB]:
        # NOTE: a path that does not begin with a slash is one of its run-time folder.
        path = os.path.join(OVS_RUN, word[len("unix:") :])
        for root in (f"/proc/{pid}/root", ""):
            try:
                if os.path.samestat(os.stat(root + path), socket_of):
                    return True
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
    return False


def _owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except FileNotFoundError:
        return None


def _is_halted(pid: int) -> bool:
    """Tell whether a process is stopped by a signal or a debugger (proc(5), stat)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])
    except (FileNotFoundError, ProcessLookupError):
        return False


def _answers(switch: OvsSwitch) -> bool:
    """Tell whether an ovs-vswitchd that cannot be seen listens, or may, at one of its bridges.

    It does so in its run-time folder, which is the database's (ovs-ofctl(8)).
    """
    folder = os.path.dirname(os.path.realpath(switch.ovsdb[len("unix:") :]))
    for bridge in switch.bridges:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(f"{folder}/{bridge.name}.mgmt")
            except (FileNotFoundError, ConnectionRefusedError):
                continue
            except PermissionError:
                return True
            return True
    return False


def _called_tables() -> frozenset[str]:
    """Return the kinds of tables that bridged frames go through."""
    called = set()
    for kind in ("iptables", "ip6tables"):
        try:
            if _read(f"/proc/sys/net/bridge/bridge-nf-call-{kind}") == "1":
                called.add(kind)
        except FileNotFoundError:
            # br_netfilter is not loaded.
            continue
    return frozenset(called)


def _look_at_filters(
    parts: Parts, deadline: Deadline
) -> tuple[tuple[DroppingChain, ...], list[str]]:
    """Return the chains that drop, and what may not be seen; a mute program hides no other's."""
    chains: list[DroppingChain] = []
    unseen: list[str] = []
    looks = {"the nftables rules": _nft_chains}
    for kind, family in (("iptables", "ip"), ("ip6tables", "ip6")):
        looks[f"the rules of {kind}"] = partial(_legacy_chains, kind, family)
    for what, chains_of in looks.items():
        limit = deadline.child(max(0.0, min(FILTER_SECONDS, deadline.remaining() - KILLING)))
        if not limit.remaining():
            parts.missed.append(f"{what}: the time was up before")
            continue
        try:
            chains += parts.take_apart(what, partial(chains_of, limit)) or ()
        except Failure as failure:
            if failure.status == Status.TRY_AGAIN:
                raise
            unseen.append(": ".join(filter(None, (what, failure.what, failure.why))))
    return tuple(chains), unseen


def _nft_chains(limit: Deadline) -> list[DroppingChain]:
    """Return the chains of nftables that drop. Raises Failure."""
    if not nft.is_there():
        raise Failure(Status.UNAVAILABLE, "there is no nft(8) on this host")
    return finish(nft.dropping_chains(limit), time.sleep)


def _legacy_chains(kind: str, family: str, limit: Deadline) -> list[DroppingChain]:
    """Return the chains of iptables in its legacy form that drop. Raises Failure."""
    try:
        if "filter" not in _read(f"/proc/net/{family}_tables_names").split():
            return []
    except FileNotFoundError:
        return []
    except PermissionError as error:
        root = "run as root" if os.geteuid() != 0 else "this root may not read them"
        raise Failure(Status.DENIED, "they may not be read", root) from error
    form = "in its legacy form"
    program = shutil.which(f"{kind}-legacy", path=SAFE_PATH)
    if program is None:
        raise Failure(Status.UNAVAILABLE, form, "no program")
    done = finish(run_program([program, "-S", "FORWARD"], limit), time.sleep)
    if done.status != 0:
        lines = done.err.split("\n")
        why = lines[0].strip() or f"{program} has ended {done.status}"
        raise Failure(Status.UNAVAILABLE, form, why)
    return read_forward(family, done.out)


def read_forward(family: str, printed: str) -> list[DroppingChain]:
    """Return the chain FORWARD where it drops, of what `iptables-legacy -S FORWARD` prints."""
    lines = [line.split() for line in printed.split("\n")]
    if ["-P", "FORWARD", "DROP"] not in lines:
        return []
    ways = {"-i": "iifname", "-o": "oifname"}
    accepts = {
        (ways[words[2]], words[3])
        for words in lines
        if len(words) == 6 and words[2] in ways and words[4:] == ["-j", "ACCEPT"]
    }
    return [DroppingChain(family, "filter", "FORWARD", "forward", None, frozenset(accepts), True)]


def _qemu(policy: Policy | Failure, guest: Guest) -> Qemu:
    paths = {
        path
        for option in guest.options
        for key in DEFAULT_SCRIPTS
        if (path := script_of(option, key)) is not None
    }
    paths.update(path for option in guest.options for path in helpers_of(option))
    scripts = {path: leads_to(guest.pid, path) for path in paths}
    left = frozenset(tap for tap in guest.taps.values() if is_left_for(policy, guest, tap))
    return Qemu(guest, _is_confined(guest.pid), scripts, nics_of(guest, NICS_MAX + 1), left)


def script_of(option: Option, key: str) -> str | None:
    """Return the script= or downscript= that QEMU calls for a tap of its own, None for none."""
    if option.keys.get("type") != "tap" or option.keys.keys() & {"fd", "fds", "helper"}:
        return None
    path = option.keys.get(key, DEFAULT_SCRIPTS[key])
    return None if path in ("", "no") else path


def helpers_of(option: Option) -> tuple[str, ...]:
    """Return the bridge helper that QEMU calls for a tap; where none is named, all it may be."""
    kind, words = option.keys.get("type"), option.keys.get("helper", "").split()
    if kind not in ("bridge", "tap") or (kind == "tap" and not words):
        return ()
    # NOTE: with a space in it, QEMU has a shell run it.
    return (words[0],) if words else HELPERS


def _is_confined(pid: int) -> bool | None:
    """Tell whether -sandbox is on (Seccomp and NoNewPrivs of /proc/PID/status)."""
    found = read_status(pid, ("Seccomp", "NoNewPrivs"))
    if "Seccomp" not in found:
        return None
    return found["Seccomp"] == "2" and found.get("NoNewPrivs", "0") == "1"
