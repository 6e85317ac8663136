"""Makes a network with `nat:` for its first tap, and takes it away after its last.

A lock file serialises all who do so; what is there, and whose it is, the live system says: the
bridge's ifalias, the mark in the nft table, and `dnsmasq.look`.
"""

from __future__ import annotations

import errno
import os
import syslog
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from pyqemu_ifconf.failure import Failure, Lacking, Status
from pyqemu_ifconf.names import is_network_name
from pyqemu_ifconf.policy import Nat, Policy, Port
from pyqemu_ifconf.shell import Command, ifctl, quote, readable, sh
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers import bolt, dnsmasq
from pyqemu_ifup.drivers import nft_program as nft
from pyqemu_ifup.drivers.links import NO_ADDRESS
from pyqemu_ifup.drivers.sysctl import is_writable, key, read_sysctl, write_sysctl
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link
from pyqemu_ifup.made.nat import (
    Table,
    adding_command,
    astray,
    bridge_alias,
    bridge_mac,
    dnsmasq_settings,
    ipv4_settings,
    making_commands,
    needed,
    network_of,
    replacing,
    ruleset,
    switches,
    table_name,
    wanted_table,
    wants_dnsmasq,
    wants_forwarding,
    wants_loopback,
)
from pyqemu_ifup.made.needs import (
    Wanted,
    folder_of,
    forwarding_that_is_off,
    is_ours,
    lacking_programs,
    own_bridge,
    require,
)
from pyqemu_ifup.manners import log, tell_left
from pyqemu_ifup.ops import BY_MAC, SetAlias, SetIpv6, SetMtu, SetUp
from pyqemu_ifup.system.lock import (
    RUN,
    Lock,
    cannot_use,
    lock_file,
    make_folder,
    network_folders,
    open_lock,
)
from pyqemu_ifup.task import Task

HOLD = 2.0
"""Seconds that a user's up or down may have a network's lock; 2 s more take back what it did."""
HINT = 1.0
"""Seconds that an up may look for who else drops, at most a quarter of its time."""
OLDER = "not as the policy says"
"""What is wrong with a table that is as it was loaded, by an older policy."""


@dataclass(frozen=True)
class Before:
    """What a network that taps are on was, before an up has changed it.

    `sysctls` are those below /proc/sys/net, `ipv4` as for `set_ipv4`, `served` the settings that
    its dnsmasq had, or None.
    """

    link: Link
    addresses: frozenset[str]
    sysctls: Mapping[str, str]
    ipv4: Mapping[int, int]
    table: Table | None
    served: list[str] | None


class Held(Lock):
    """A network whose lock is held: nobody makes it or takes it away meanwhile.

    `changed` tells whether it has been changed since, and `before` what it was then, None where no
    tap was on it.
    """

    def __init__(self, network: str, bridge: str, folder: str, descriptor: int) -> None:
        super().__init__(descriptor)
        self.network = network
        self.bridge = bridge
        self.folder = folder
        self.changed = False
        self.before: Before | None = None


@asynccontextmanager
async def holding(host: Host, network: str, bridge: str) -> AsyncIterator[Held]:
    """Wait for the network's lock, and hold it for the block; a user's have it for HOLD at most.

    Raises Failure: 75, telling who has it, else as `cannot_use`.
    """
    folder = folder_of(network)
    try:
        descriptor = await _locking(folder, network, host)
    except OSError as error:
        raise cannot_use(folder, error) from error
    with Held(network, bridge, folder, descriptor) as held, _briefly(host):
        yield held


def _briefly(host: Host) -> AbstractContextManager[object]:
    """Have what is done for a user under a network's lock end in HOLD seconds."""
    if host.brief and host.deadline.remaining() > HOLD:
        return host.until(host.deadline.child(HOLD))
    return nullcontext()


async def _locking(folder: str, network: str, host: Host) -> int:
    path = f"{folder}/lock"
    while True:
        for each in (RUN, folder):
            make_folder(each)
        try:
            lock = open_lock(path)
        except FileNotFoundError:
            continue  # NOTE: who takes the network away removes its folder.
        try:
            await lock_file(lock, host.deadline, f"network {network}", last=host.brief)
            if _is_same(path, lock):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _is_same(path: str, descriptor: int) -> bool:
    """Tell whether the path still is the file that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# Looking


def ports_of(host: Host, bridge: Link) -> list[str]:
    """Return the names of the bridge's ports."""
    return [link.name for link in host.kernel.links() if link.master == bridge.index]


# Making


@asynccontextmanager
async def making(host: Host, port: Port) -> AsyncIterator[Held]:
    """See to it that the network of `port` is there, held while a tap joins it in the block.

    Raises Failure. Where it fails, or the block does, the network is what it was before.
    """
    assert port.made is not None
    try:
        async with holding(host, port.network, port.place.name) as held:
            try:
                await _making(host, held, port.made)
                yield held
            except BaseException as error:
                if not await taking_back(host, held):
                    tell_left(error, host.deadline.stopped, port.tap)
                raise
    except Lacking:
        # NOTE: what else this container lacks is told with it.
        await require(host, Wanted(port.network, port.place.name, port.made))
        raise


async def differing(host: Host, port: Port) -> list[str]:
    """Return in words what `making` would change of a network that is there; it changes nothing.

    Raises Failure: 75 with the host's deadline, 77 where its bridge is somebody else's.
    """
    assert port.made is not None
    if own_bridge(host, port.network, port.place.name) is None:
        return []
    async with holding(host, port.network, port.place.name) as held:
        return await differences(host, held, port.made)


async def _making(host: Host, held: Held, nat: Nat) -> None:
    link = own_bridge(host, held.network, held.bridge)
    if lacking := lacking_programs(held.network, nat):
        raise lacking[0]
    if link is not None and not (await differences(host, held, nat)):
        return
    await require(host, Wanted(held.network, held.bridge, nat))
    if link is not None and ports_of(host, link):
        held.before = await _looking(host, held, link, nat)
    held.changed = True
    await _bring_about(host, held, nat)
    if found := (await differences(host, held, nat)):
        raise Failure(
            Status.REFUSED,
            f"network {held.network}: what was read back differs",
            "; ".join(found),
            "see who else manages this bridge",
        )
    if link is None:
        log(syslog.LOG_INFO, f"network {held.network}: made, on bridge {quote(held.bridge)}")
        await _telling_of_firewalls(held, nat, host.deadline)


async def _bring_about(host: Host, held: Held, nat: Nat) -> None:
    """Make what is not there, isolation before connectivity."""
    link = await _bridge(host, held, nat)
    await _filtering(host, held, nat)
    present = {text for index, text in host.kernel.addresses() if index == link.index}
    for address in filter(None, (nat.ipv4, nat.ipv6)):
        if _compact(address) not in present:
            host.tell(sh("ip", "address", "add", address, "dev", held.bridge))
            host.kernel.add_address(link.index, address)
    if not link.up:
        await host.run(SetUp(held.bridge, link.index))
    _forwarding(held, nat)
    await _serving(host, held, nat)


def _compact(address: str) -> str:
    from ipaddress import ip_interface

    return str(ip_interface(address))


async def _bridge(host: Host, held: Held, nat: Nat) -> Link:
    """Return the network's bridge, made where it is not there; it is down then."""
    link = host.kernel.look_up(held.bridge)
    if link is None:
        mac = bridge_mac(held.network)
        # NOTE: an MTU that is set to what it is pins nothing, and a port could lower it.
        host.tell(adding_command(held.network, held.bridge, nat))
        host.kernel.add_bridge(held.bridge, mac, nat.mtu + 1)
        link = host.kernel.look_up(held.bridge)
        if link is None or not is_ours(link, held.network):
            raise Failure(
                Status.REFUSED,
                f"the bridge {quote(held.bridge)} has gone again",
                "somebody has deleted it, or taken its name, meanwhile",
                "try again",
            )
    if not link.alias:
        alias = bridge_alias(held.network)
        await host.run(SetAlias(held.bridge, link.index, alias))
    if link.mtu != nat.mtu:
        await host.run(SetMtu(held.bridge, link.index, nat.mtu))
    _bolt(held, link, nat)
    await _settings_of_link(host, held, nat, link)
    return link


async def _settings_of_link(host: Host, held: Held, nat: Nat, link: Link) -> None:
    """Set how the bridge takes IPv4 and IPv6, over netlink where /proc/sys cannot be written."""
    host.kernel.set_ipv4(
        link.index, {number: value for (_, number), value in ipv4_settings(nat).items()}
    )
    if not _gives_itself_right(link.addrgenmode, nat):
        mode = _mode_of(nat)
        await host.run(SetIpv6(held.bridge, link.index, None, mode))
    must = needed(held.bridge, nat)
    for name, value in switches(held.bridge, nat).items():
        if name in must or is_writable(name):
            write_sysctl(name, value)


def _gives_itself_right(mode: int | None, nat: Nat) -> bool:
    """Tell whether by this addrgenmode a link has an IPv6 address if the network has, else none."""
    return mode is None or (mode == NO_ADDRESS) is (nat.ipv6 is None)


def _mode_of(nat: Nat) -> int:
    """Return the addrgenmode that a bridge gets whose own is not right."""
    return NO_ADDRESS if nat.ipv6 is None else BY_MAC


def _bolt(held: Held, link: Link, nat: Nat) -> None:
    """Keep the guests from loopback addresses. Raises Failure where that is needed, and cannot."""
    try:
        bolt.shut(link.index)
    except OSError as error:
        if _needs_bolt(nat):
            raise Failure(
                Status.DENIED if error.errno == errno.EPERM else Status.REFUSED,
                f"cannot keep the guests from this host's loopback addresses, to which a forward "
                f"of network {held.network}, or net.ipv4.conf.all.route_localnet, opens a way",
                f"this kernel does not take a classifier: {error.strerror}",
                "see whether it has sch_ingress and cls_bpf, or give each forward an address",
            ) from error


def _needs_bolt(nat: Nat) -> bool:
    """Tell whether a frame for 127.0.0.0/8 would be taken in, if no table of ours dropped it."""
    return wants_loopback(nat) or read_sysctl("ipv4/conf/all/route_localnet") == "1"


async def _filtering(host: Host, held: Held, nat: Nat) -> None:
    """Load the network's table where it is not as it shall be."""
    table = await nft.read_table(held.network, host.deadline)
    if table != wanted_table(held.network, held.bridge, nat):
        await _loading(host, held, nat)
        await forgetting(host, held.network, nat)


async def _loading(host: Host, held: Held, nat: Nat) -> None:
    host.tell(sh("nft", "-f", "-"))
    await nft.load(ruleset(held.network, held.bridge, nat), host.deadline)


async def forgetting(host: Host, network: str, nat: Nat) -> None:
    """Have no flow go on that does not go by the network's table. Raises Failure."""
    own = {text.partition("/")[0] for _, text in host.kernel.addresses()}
    # NOTE: who fills what the kernel tracks may delay this, and no more.
    limit = host.deadline.child(host.deadline.remaining() / 2)
    if not (await host.kernel.forget_flows(astray(nat, own), limit)):
        log(
            syslog.LOG_WARNING,
            f"network {network}: the kernel tracks more flows than there was time to look at; "
            "some that other rules let in may go on; see whose they are: conntrack -L",
        )


async def guarding(
    host: Host, network: str, bridge: str, nat: Nat | None, *, dry_run: bool = False
) -> str:
    """Load the table of a network that taps are on, where it is not as it was loaded.

    One that is as it was loaded by an older policy stays; without `nat` it is only looked at.
    `forgetting` is due then, for which nobody needs to wait. Returns in words what was wrong, ""
    for nothing. Raises Failure: 75 with the host's deadline, 77, 71.
    """
    async with holding(host, network, bridge) as held:
        link = _bridge_of(host, held)
        if link is None or link.name != bridge or not ports_of(host, link):
            return ""
        table = await nft.read_table(network, host.deadline)
        fault = Table.fault(table)
        if nat is not None and not dry_run:
            _bolt(held, link, nat)
            if fault:
                await _loading(host, held, nat)
        return fault


async def find_table_faults(
    host: Host, policy: Policy | None, links: Iterable[Link]
) -> dict[str, str | Failure]:
    """Return in words what is wrong with the table of each network that taps are on, or "".

    A Failure in place of each that could not be read.
    """
    found: dict[str, str | Failure] = {}
    for name, each in guarded(policy, links).items():
        try:
            table = await nft.read_table(name, host.deadline)
        except Failure as failure:
            found[name] = failure
            continue
        found[name] = Table.fault(table)
        if each.nat is not None and not found[name]:
            wanted = wanted_table(name, each.bridge, each.nat)
            found[name] = "" if table == wanted else OLDER
    return found


@dataclass(frozen=True)
class Guarded:
    """A network that taps are on: its bridge, and what the policy wants of it there.

    `nat` is None where the policy has no such network, or another bridge for it.
    """

    bridge: str
    nat: Nat | None

    @property
    def remedy(self) -> str:
        """What is to be done where the policy does not say what to load."""
        return (
            "take its taps down, or have the policy give the network back its nat: and bridge: "
            f"{quote(self.bridge)}"
        )


def guarded(policy: Policy | None, links: Iterable[Link]) -> dict[str, Guarded]:
    """Return the networks that were made for taps and have some; `policy` None: there is none."""
    links = list(links)
    masters = {link.master for link in links}
    found = {}
    for link in links:
        name = network_of(link.alias) if link.kind == "bridge" else None
        if name is not None and is_network_name(name) and link.index in masters:
            network = policy.networks.get(name) if policy is not None else None
            wanted = network is not None and network.place.name == link.name
            found[name] = Guarded(link.name, network.made if network and wanted else None)
    return found


def _forwarding(held: Held, nat: Nat) -> None:
    """Turn forwarding on where it is off, and say so; it is left on."""
    for name in forwarding_that_is_off(nat):
        write_sysctl(name, "1")
        said = f"{quote(key(name))} turned on; it is left on"
        log(syslog.LOG_NOTICE, f"network {held.network}: {said}")


async def _serving(host: Host, held: Held, nat: Nat) -> None:
    """Have a dnsmasq run that has the settings which it shall have, and no other."""
    wanted = _settings(held, nat)
    if wanted is None:
        await dnsmasq.end(held.folder, host.deadline)
    else:
        await dnsmasq.serve(held.folder, wanted, host.deadline, host.tell)


def _settings(held: Held, nat: Nat) -> list[str] | None:
    """Return the settings that the network's dnsmasq shall have, None where it needs none."""
    if not wants_dnsmasq(nat):
        return None
    return dnsmasq_settings(held.bridge, nat, held.folder, dnsmasq.account().name)


async def differences(host: Host, held: Held, nat: Nat) -> list[str]:
    """Look again, and return in words what of the network is not as it shall be."""
    link = host.kernel.look_up(held.bridge)
    if link is None:
        return [f"there is no bridge {quote(held.bridge)}"]
    found = []
    if link.alias != bridge_alias(held.network):
        found.append("the bridge does not carry our mark")
    if not link.up:
        found.append("the bridge is down")
    if link.mtu != nat.mtu:
        found.append(f"the bridge's MTU is {link.mtu}, not {nat.mtu}")
    present = {text for index, text in host.kernel.addresses() if index == link.index}
    for address in filter(None, (nat.ipv4, nat.ipv6)):
        if _compact(address) not in present:
            found.append(f"the bridge does not have {address}")
    must = needed(held.bridge, nat)
    values = {
        name: value
        for name, value in switches(held.bridge, nat).items()
        if name in must or is_writable(name)
    }
    for (name, _), number in ipv4_settings(nat).items():
        values[f"ipv4/conf/{held.bridge}/{name}"] = str(number)
    for name, value in values.items():
        if (now := read_sysctl(name)) not in (value, None):
            found.append(f"{quote(key(name))} is {now}, not {value}")
    if not link.ipv6_disabled and not _gives_itself_right(link.addrgenmode, nat):
        found.append(
            "the bridge gives itself IPv6 addresses"
            if nat.ipv6 is None
            else "the bridge gives itself no IPv6 address"
        )
    found += [f"{key(name)} is 0, not 1" for name in forwarding_that_is_off(nat)]
    if _needs_bolt(nat) and not bolt.is_shut(link.index):
        found.append("the bridge is open to this host's loopback addresses")
    table = await nft.read_table(held.network, host.deadline)
    if table != wanted_table(held.network, held.bridge, nat):
        found.append(f"the nft table inet {table_name(held.network)} is not as the policy says")
    server = await dnsmasq.look(held.folder, host.deadline)
    if server.settings != _settings(held, nat):
        found.append(
            "no dnsmasq runs"
            if server.settings is None
            else "its dnsmasq does not run as the policy says"
        )
    return found


async def _telling_of_firewalls(held: Held, nat: Nat, deadline: Deadline) -> None:
    """Say in syslog who drops what this host is to pass on for the network.

    Raises Failure (75) with `watch` alone: whoever else cannot tell takes nothing back.
    """
    if not wants_forwarding(nat):
        return
    try:
        chains = await nft.find_dropping_chains(deadline.child(min(HINT, deadline.remaining() / 4)))
    except Failure as failure:
        deadline.check()
        log(
            syslog.LOG_WARNING,
            f"network {held.network}: cannot tell whether another firewall drops what is "
            f"forwarded for its guests: {failure}",
        )
        return
    for chain in chains:
        if ways := chain.ways_of(held.bridge, nat):
            log(
                syslog.LOG_WARNING,
                f"network {held.network}: the chain {chain.family} {readable(chain.table)} "
                f"{readable(chain.name)} drops what it does not know, and so what is forwarded "
                f"for its guests; {chain.accepting(held.bridge, ways)}",
            )


# The way back


async def _looking(host: Host, held: Held, link: Link, nat: Nat) -> Before:
    """Look at what of a network that taps are on may be changed. Raises Failure."""
    read = {name: read_sysctl(name) for name in switches(held.bridge, nat)}
    return Before(
        link,
        frozenset(text for index, text in host.kernel.addresses() if index == link.index),
        {name: value for name, value in read.items() if value is not None},
        {
            number: int(read_sysctl(f"ipv4/conf/{held.bridge}/{name}") or 0)
            for name, number in ipv4_settings(nat)
        },
        await nft.read_table(held.network, host.deadline),
        (await dnsmasq.look(held.folder, host.deadline)).settings,
    )


async def taking_back(host: Host, held: Held) -> bool:
    """Take back what was done to a network for a tap that could not join.

    A network that no tap is on goes. What cannot be taken back is told in syslog, so that the
    cause is what the caller hears of, and here.
    """
    if not held.changed and _bridge_of(host, held) is None:
        # NOTE: what an earlier run has left is for the next one, which has to find it.
        if not any(os.path.exists(f"{held.folder}/{name}") for name in dnsmasq.FILES):
            _forget(held)
        return True
    try:
        with host.until(host.deadline.undo()):
            if not await leaving_held(host, held) and held.before is not None:
                await _restoring(host, held, held.before)
    except Failure as failure:
        log(
            syslog.LOG_ERR,
            f"network {held.network}: not taken back: {failure}; {ifctl('gc')} removes what no tap "
            f"is on, and {ifctl('apply')} puts the policy in force",
        )
        return False
    return True


async def _restoring(host: Host, held: Held, before: Before) -> None:
    """Give a network back to the taps that are on it as it was. Raises Failure.

    A table that was not as it had been loaded, and a dnsmasq that had ended, stay mended.
    """
    await _each(
        partial(part, host, held, before)
        for part in (_restoring_table, _restoring_link, _restoring_server)
    )


async def _restoring_table(host: Host, held: Held, before: Before) -> None:
    if before.table is not None and not Table.fault(before.table):
        host.tell(sh("nft", "-f", "-"))
        await nft.load(replacing(held.network, before.table), host.deadline)


async def _restoring_link(host: Host, held: Held, before: Before) -> None:
    bridge = before.link
    host.kernel.set_ipv4(bridge.index, before.ipv4)
    link = host.kernel.look_at(bridge.index)
    if link is not None and bridge.addrgenmode not in (None, link.addrgenmode):
        mode = SetIpv6(held.bridge, bridge.index, None, bridge.addrgenmode)
        await host.run(mode)
    for name, value in before.sysctls.items():
        write_sysctl(name, value)
    now = {text for index, text in host.kernel.addresses() if index == bridge.index}
    for address in sorted(now - before.addresses):
        host.tell(sh("ip", "address", "del", address, "dev", held.bridge))
        host.kernel.remove_address(bridge.index, address)
    for address in sorted(before.addresses - now):
        host.tell(sh("ip", "address", "add", address, "dev", held.bridge))
        host.kernel.add_address(bridge.index, address)
    await host.run(SetMtu(held.bridge, bridge.index, bridge.mtu))


async def _restoring_server(host: Host, held: Held, before: Before) -> None:
    if before.served is not None:
        await dnsmasq.serve(held.folder, before.served, host.deadline, host.tell)


async def _each(parts: Iterable[Callable[[], Task[None]]]) -> None:
    """Do each part, whatever becomes of the others. Raises the first Failure."""
    failures = []
    for part in parts:
        try:
            await part()
        except Failure as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


# Telling


def commands_to_make(host: Host, network: str, bridge: str, nat: Nat) -> list[Command]:
    """Return the commands that make a network which is not there, as `making` would do it."""
    folder, server = folder_of(network), None
    if wants_dnsmasq(nat):
        words = dnsmasq_settings(bridge, nat, folder, dnsmasq.account().name)
        server = host.finish(dnsmasq.server_of(folder, words, host.deadline))
    values = switches(bridge, nat)
    for (name, _), number in ipv4_settings(nat).items():
        values[f"ipv4/conf/{bridge}/{name}"] = str(number)
    # NOTE: a new link has what stands below `default`.
    given = {name: read_sysctl(name.replace(f"/{bridge}/", "/default/")) for name in values}
    written = {name: value for name, value in values.items() if given[name] not in (value, None)}
    written |= dict.fromkeys(forwarding_that_is_off(nat), "1")
    mode = read_sysctl("ipv6/conf/default/addr_gen_mode")
    by_netlink: tuple[Command, ...] = ()
    if not _gives_itself_right(int(mode) if mode is not None else None, nat):
        by_netlink = SetIpv6(bridge, 0, None, _mode_of(nat)).commands()
    return making_commands(network, bridge, nat, by_netlink, written, folder, server)


# Taking away


async def leaving(host: Host, network: str, bridge: str) -> bool:
    """Take the network away where no tap is on it; tell whether that was so. Raises Failure."""
    async with holding(host, network, bridge) as held:
        return await leaving_held(host, held)


async def leaving_held(host: Host, held: Held) -> bool:
    """Do as `leaving`, with the lock held."""
    link = _bridge_of(host, held)
    if link is not None and ports_of(host, link):
        return False
    with host.until(host.deadline.lasting()):
        await _taking_away(host, held)
    return True


def _bridge_of(host: Host, held: Held) -> Link | None:
    """Return the network's bridge as we have made it, whatever it is called; None without one."""
    return next((link for link in host.kernel.links() if is_ours(link, held.network)), None)


def _forget(held: Held) -> None:
    """Remove the network's files."""
    for name in (*dnsmasq.FILES, "lock"):
        try:
            os.unlink(f"{held.folder}/{name}")
        except FileNotFoundError:
            continue
    try:
        os.rmdir(held.folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


async def _taking_away(host: Host, held: Held) -> None:
    """Take away what there is of the network. Raises Failure.

    Its folder is there until nothing else is, so that what is left is found.
    """
    await _each(
        (
            partial(dnsmasq.end, held.folder, host.deadline),
            partial(_deleting_bridge, host, held),
            partial(_deleting_table, host, held),
        )
    )
    _forget(held)
    log(syslog.LOG_INFO, f"network {held.network}: taken away")


async def _deleting_bridge(host: Host, held: Held) -> None:
    link = _bridge_of(host, held)
    if link is not None:
        host.tell(sh("ip", "link", "del", "dev", link.name))
        host.kernel.delete_link(link.index)


async def _deleting_table(host: Host, held: Held) -> None:
    if not nft.is_there():
        return
    table = await nft.read_table(held.network, host.deadline)
    if table is not None and table.ours:
        host.tell(sh("nft", "delete", "table", "inet", table_name(held.network)))
        await nft.delete_table(held.network, host.deadline)


async def networks_left(host: Host) -> list[tuple[str, str]]:
    """Return the networks of ours on which no tap is, or of which a part is left, with the bridge.

    The bridge's name is empty where only other parts are left.
    """
    links = host.kernel.links()
    masters = {link.master for link in links}
    in_use: set[str] = set()
    found: dict[str, str] = {}
    for link in links:
        network = network_of(link.alias) if link.kind == "bridge" else None
        if network is not None and is_network_name(network):
            if link.index in masters:
                in_use.add(network)
            else:
                found[network] = link.name
    for network in await nft.table_networks(host.deadline):
        if network not in found:
            table = await nft.read_table(network, host.deadline)
            if table is not None and table.ours:
                found[network] = ""
    for network in folders():
        found.setdefault(network, "")
    return [(name, bridge) for name, bridge in sorted(found.items()) if name not in in_use]


def folders() -> list[str]:
    """Return the networks that have a folder in this network namespace, whatever else of them."""
    networks = {name.partition("@")[0] for name in network_folders()}
    return sorted(
        network
        for network in networks
        if is_network_name(network) and os.path.isdir(folder_of(network))
    )
