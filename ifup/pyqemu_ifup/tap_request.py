"""A tap for a caller who may make none: the wire's `tap`, as a task."""

from __future__ import annotations

import syslog
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import (
    Caller,
    Network,
    Nic,
    Policy,
    Port,
    Vm,
    nic_port,
    port_on,
    refuses_taps,
)
from pyqemu_ifconf.shell import ifctl, quote, readable
from pyqemu_ifconf.vms import is_mac
from pyqemu_ifup import kinds
from pyqemu_ifup.access import ROOT, User, heeded_bridge_conf, may_still, may_use
from pyqemu_ifup.attach import attach, look_back, success_line
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.entitled import (
    check_owner,
    check_quota,
    find_network,
    pick_name,
    refuse_bridge_name,
    taps_of,
)
from pyqemu_ifup.holder import Holder
from pyqemu_ifup.hook import log
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link
from pyqemu_ifup.nic_macs import find_macs
from pyqemu_ifup.plan import plan_unmade
from pyqemu_ifup.qemu.caller import find_caller, find_helped_mac
from pyqemu_ifup.qemu.hubs import refuse_joined
from pyqemu_ifup.steps import take_all_back
from pyqemu_ifup.taps import close_all, open_taps, taken
from pyqemu_ifup.wire import QUEUES_MAX

_under_way: dict[str, tuple[str, int]] = {}
"""The taps that are made just now, which may have no mark yet: network and user of each."""


@dataclass(frozen=True)
class Wish:
    """What a `tap` request asks for; `name` is empty where any will do.

    `for_parent`: the tap is for the process that started the client. `mac` is that of the guest's
    device, empty where it is not told.
    """

    network: str
    name: str
    queues: int
    vnet_hdr: bool
    for_parent: bool
    mac: str = ""


def parse_wish(fields: Sequence[str]) -> Wish:
    """Return the wish of a request's fields after `tap`. Raises Failure (64)."""
    if len(fields) not in (5, 6):
        raise _bad(f"tap takes 5 or 6 fields, not {len(fields)}")
    network, name, queues, vnet_hdr, parent, mac = (*fields, "")[:6]
    if not network:
        raise _bad("it names no network")
    if not (queues.isascii() and queues.isdigit() and len(queues) <= 3):
        raise _bad(f"queues is {ascii(queues)}, not a number")
    if not 1 <= int(queues) <= QUEUES_MAX:
        raise _bad(f"queues is {int(queues)}, not 1 to {QUEUES_MAX}")
    if vnet_hdr not in ("", "vnet_hdr"):
        raise _bad(f"{ascii(vnet_hdr)} stands for vnet_hdr")
    if parent not in ("", "parent"):
        raise _bad(f"{ascii(parent)} stands for parent")
    if mac and not is_mac(mac):
        raise _bad(f"{ascii(mac)} is not the MAC of a device")
    return Wish(network, name, int(queues), bool(vnet_hdr), bool(parent), mac.lower())


def _bad(why: str) -> Failure:
    return Failure(Status.USAGE, "not a request", why, "see docs/agent.md")


@dataclass(frozen=True)
class NewTap:
    """A tap that has just been made: whose it is, and which process is to hold it.

    `nic` is that of a guest of the policy's for which it was asked by name, None for any other.
    `mac` is that of the guest's device, None where it is not known. Where the network's kind makes
    the links of its ports, there is none yet, and `descriptors` are to come: as `wish` asks.
    """

    name: str
    descriptors: list[int]
    network: str
    uid: int
    login: str
    holder: int
    wish: Wish
    nic: tuple[Vm, Nic] | None = None
    mac: str | None = None


def make_tap(kernel: Netlink, policy: Policy, user: User, holder: int, wish: Wish) -> NewTap:
    """Make the tap that a request asks for, where the user may have it; `attach_tap` must follow.

    It is for the process `holder`. Raises Failure: 64 for a name that is none, 71, 77 where the
    user may not, or another request makes a link of this name just now.
    """
    uid, login, groups = user.uid, user.login, user.groups
    conf = heeded_bridge_conf(policy, uid)
    network = find_network(policy, wish.network, uid, login, groups, conf)
    pattern, found = pick_name(policy, network, wish.name, user)
    if found is not None:
        may_use(network, uid, login, groups, conf, nic_port(policy, found[1]))
    # NOTE: nothing waits between the count and _under_way, so that no two requests count the same.
    if uid != ROOT:
        check_quota(network, uid, login, _taps(kernel.links(), network, uid))
    mac: str | None = None
    descriptors: list[int] = []
    if refuses_taps(network):
        name, mac = _pick_free(kernel, pattern), _mac_of(policy, network, found, wish, holder)
    else:
        name, descriptors = open_taps(kernel, pattern, wish.queues, wish.vnet_hdr)
    try:
        refuse_bridge_name(policy, name)
        if name in _under_way:
            raise taken(name)
    except Failure:
        close_all(descriptors)
        raise
    _under_way[name] = (network.name, uid)
    return NewTap(name, descriptors, network.name, uid, login, holder, wish, found, mac)


def _pick_free(kernel: Netlink, pattern: str) -> str:
    """Return the name that a pattern makes with the first number that is free."""
    if "%d" not in pattern:
        return pattern
    names = {link.name for link in kernel.links()} | _under_way.keys()
    return next(name for n in count() if (name := pattern.replace("%d", str(n))) not in names)


def _mac_of(
    policy: Policy, network: Network, found: tuple[Vm, Nic] | None, wish: Wish, holder: int
) -> str:
    """Return the MAC of the guest's device. Raises Failure (71) if it is not known.

    What QEMU's own command line says counts, for its user may choose any.
    """
    if found is not None:
        return find_macs(policy, found[0])[found[0].name, found[1].id]
    mac = wish.mac or (find_helped_mac(holder, wish.network) if wish.for_parent else None)
    # NOTE: QEMU takes any, a multicast one too.
    if mac and is_mac(mac):
        return mac
    run = ifctl("run", options=[f"--nic={network.name},mac=52:54:00:12:34:56"])
    raise Failure(
        Status.REFUSED,
        "the MAC of the guest's device is not known",
        f"network {quote(network.name)} ({network.position}) passes no other",
        f"give it to -device, and to run as well: {run}",
    )


async def attach_tap(host: Host, policy: Policy, tap: NewTap) -> None:
    """Attach a tap that has just been made.

    Raises Failure as `attach`; then its descriptors are closed, and nothing is left of it.
    """
    try:
        # NOTE: the netdev is not known: QEMU's helper has no name for it.
        asking = find_caller(tap.name, tap.holder, want_user=False, helped=True)
        refuse_joined(asking)
        vm = asking.vm
        if tap.nic is not None:
            guest, nic = tap.nic
            port, vm = nic_port(policy, nic), vm or guest.name
        else:
            port = port_on(policy, tap.network, tap.name, made=True)
        caller = Caller(tap.name, vm=vm, mac=tap.mac, user=tap.login)
        uid = tap.uid if tap.uid != ROOT else None
        holder = Holder(caller, tap.holder, uid, by_name=tap.nic is None, made=True)
        async with _made(host, port, holder, tap):
            await attach(host, port, holder)
    except BaseException:
        close_all(tap.descriptors)
        raise
    finally:
        del _under_way[tap.name]
    log(syslog.LOG_INFO, f"{success_line(port, caller)}, user {readable(tap.login)}")


@asynccontextmanager
async def _made(host: Host, port: Port, holder: Holder, tap: NewTap) -> AsyncIterator[None]:
    """Make the link of a port whose kind does that; where the block fails, nothing is left of it.

    Raises Failure as `LinkKind.make`.
    """
    kind = kinds.maker_at(port)
    if kind is None:
        yield
        return
    mark = holder.mark_for(port, kind)
    wish = tap.wish
    tap.descriptors.extend(await kind.make(host, port, mark, wish.queues, vnet_hdr=wish.vnet_hdr))
    try:
        yield
    except BaseException:
        with host.until(host.deadline.undo()):
            # NOTE: a look that fails is told of, and the cause is raised.
            seen = look_back(host, port)
            has = seen.tap.mark if seen is not None and seen.tap is not None else None
            if (
                seen is not None
                and has is not None
                and has.pid == mark.pid
                and has.start == mark.start
            ):
                await take_all_back(host, plan_unmade(seen))
        raise


def may_attach(
    policy: Policy, port: Port, user: User, link: Link | None, links: Collection[Link]
) -> None:
    """Check that an unprivileged user may have the tap `link` attached as `port` says.

    It must be the user's own where it is there (None: it is not), the network open to the user,
    and the user's other taps on it, of all `links`, within max_taps. Raises Failure (77).
    """
    if user.uid == ROOT:
        return
    if link is not None:
        check_owner(link, user.uid, port.network)
    may_still(policy, port, user)
    network = policy.networks[port.network]
    taps = _taps(links, network, user.uid) - {port.tap if link is None else link.name}
    check_quota(network, user.uid, user.login, taps)


def _taps(links: Collection[Link], network: Network, uid: int) -> set[str]:
    """Return the user's taps on the network, those that are made just now among them."""
    now = {name for name, whose in _under_way.items() if whose == (network.name, uid)}
    return taps_of(links, network.name, uid) | now
