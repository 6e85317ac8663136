"""What a crash left behind: finds what is ours and whose tap is gone, and removes just that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifdown.detach import detach_alone
from pyqemu_ifup import kinds
from pyqemu_ifup.deadline import Unconfirmed
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.base import Leftover
from pyqemu_ifup.look import Link, OvsPort
from pyqemu_ifup.mark import find_here, is_alive
from pyqemu_ifup.ops import Op
from pyqemu_ifup.qemu.caller import find_hook_at_work
from pyqemu_ifup.system.holders import OTHERS, Holders, find_holders
from pyqemu_ifup.system.lock import lock_by_name
from pyqemu_ifup.system.process import process_start, real_uid

PATIENCE = 2.0
"""Seconds that a mute ovs-vswitchd is waited for, once a port is out of its database."""


@dataclass(frozen=True)
class Ended:
    """A tap of ours that is to go from its bridge, and why: its process has ended, or let it go."""

    link: Link
    because: str


async def find_ended(
    links: Iterable[Link], seconds: float = OTHERS, *, roots: bool = False
) -> list[Ended]:
    """Return the users' taps whose process has ended, and which no process of that user holds.

    With `roots` root's too, which are persistent, and which nobody at all holds. A user may keep a
    tap from going with its process (TUNSETPERSIST), or pass it on. The processes of others than
    root may take `seconds` to be looked at; who is not seen then may hold it.
    """
    left = [
        link
        for link in links
        if kinds.is_ports(link)
        and (mark := link.mark) is not None
        and (mark.uid is not None or (roots and not _tells_holder(link)))
        and not is_alive(mark)
    ]
    if not left:
        return []
    # NOTE: only now: who has a tap from a process that has ended since is a process by now.
    holders = await find_holders(seconds)
    return [
        Ended(link, because) for link in left if (because := _why_ended(link, holders)) is not None
    ]


async def find_let_go(links: Iterable[Link], *, named: bool = False) -> list[Ended]:
    """Return the taps whose process lives, but which nobody holds: an up, or a down, came half way.

    As after a hook that was killed, of a QEMU which goes on without the tap. Their link is down,
    as nothing of ours leaves it: whoever runs a launcher may attach a tap before its QEMU opens it.
    That of one which a person has `named` may be up.
    """
    left = [
        link
        for link in links
        if kinds.is_ports(link)
        and not _tells_holder(link)
        and (named or not link.up)
        and (mark := link.mark) is not None
        and is_alive(mark)
        and find_hook_at_work(link.name, mark.pid) is None
    ]
    if not left:
        return []
    holders = await find_holders(OTHERS)
    unseen = {*holders.hidden, *holders.unread}
    uids = {real_uid(pid) for pid in unseen} - {None}
    return [
        Ended(link, f"nobody holds it, though its process {link.mark.pid} runs")
        for link in left
        if link.mark is not None
        and not holders.of(link.name)
        # NOTE: of a process that cannot be looked into nobody can tell that it holds none. Some of
        # root's cannot on many hosts, as a container's maker; the carrier speaks for those.
        and link.mark.pid not in unseen
        and link.mark.uid not in uids
    ]


async def find_why_held(link: Link) -> str:
    """Return in a clause who holds a tap of ours that stays."""
    holders = await find_holders(OTHERS)
    pids = holders.of(link.name)
    if pids:
        return f"process {pids[0]} holds it"
    if holders.hidden or holders.unread:
        return "a process that cannot be looked into may hold it"
    return (
        "somebody holds it" if _tells_holder(link) else "a script has, or has just had, it in hand"
    )


def _tells_holder(link: Link) -> bool:
    """Tell whether a tap has a carrier, which it has while somebody holds it.

    That of another link is its parent's.
    """
    return link.tap and link.carrier


def _why_ended(link: Link, holders: Holders) -> str | None:
    mark = link.mark
    assert mark is not None
    pids = holders.of(link.name)
    uids = {pid: real_uid(pid) for pid in (*pids, *holders.hidden, *holders.unread)}
    if mark.uid is None and pids:
        return None
    if mark.uid is not None and mark.uid in uids.values():
        return None
    # NOTE: no carrier tells of who holds such a link. Whoever has it of its process began later.
    unseen = () if link.tap else (*holders.hidden, *holders.unread)
    if mark.uid is None and any((process_start(pid) or 0) > mark.start for pid in unseen):
        return None
    if not pids and _tells_holder(link):
        # NOTE: somebody holds it, or it is on its way, in a message.
        return None
    by = f"process {pids[0]} of user {uids[pids[0]]}, not of user {mark.uid}" if pids else "nobody"
    return f"its process {mark.pid} has ended, and {by} holds it"


async def end(host: Host, ended: Ended) -> bool:
    """Take a tap from its bridge that has no process any more; a user's, of our making, is deleted.

    One that its process has let go likewise. Tells whether it was still the same. Raises Failure
    as `detach_alone`, 77 where it may not be.
    """
    name, before = ended.link.name, ended.link
    with await lock_by_name(name, host.deadline):
        now = host.kernel.look_up(name)
        if now is None or (now.index, now.alias, now.carrier, now.up) != (
            before.index,
            before.alias,
            before.carrier,
            before.up,
        ):
            return False
        pid = before.mark.pid if before.mark is not None else 0
        await detach_alone(host, name, pid, before.index)
        now = host.kernel.look_at(before.index)
        if now is not None and now.alias:
            raise Failure(
                Status.DENIED,
                "not taken from its bridge",
                ended.because,
                "run as root, or see syslog",
            )
    return True


def collect(host: Host, *, tap: str | None, dry_run: bool) -> Iterator[tuple[Leftover, bool]]:
    """Remove what is left of taps that are gone, of `tap` alone where it is given.

    Looks in the databases that `host` has open. Yields what was found, each when it has been
    dealt with, and whether ovs-vswitchd has let it go (a `dry_run` removes nothing). Raises
    Failure as Host does; what was yielded before stays done.
    """
    ports = [port for port in host.ports() if tap is None or port.name == tap]
    for leftover in kinds.judge(ports, host.kernel.links(), find_here()):
        if leftover.remove is None or dry_run:
            yield leftover, True
            continue
        host.deadline.check()
        let_go = host.finish(_remove(host, leftover.port))
        if let_go is not None:
            yield leftover, let_go


async def _remove(host: Host, port: OvsPort) -> bool | None:
    """Remove a port as `collect`; None: it is none to be removed any more, or has gone."""
    with await lock_by_name(port.name, host.deadline):
        database = host.databases[port.ovsdb]
        await database.sync(host.deadline)
        link = host.kernel.look_up(port.name)
        links = [link] if link is not None else []
        now = kinds.judge(database.ports(port.name), links, find_here())
        op = next((each.remove for each in now if each.port.ids == port.ids), None)
        return await remove(host, op) if op is not None else None


async def remove(host: Host, op: Op) -> bool:
    """Remove what a crash has left; tell whether ovs-vswitchd has let it go. Raises Failure."""
    try:
        with host.patient(PATIENCE):
            await host.run(op)
    except Unconfirmed:
        return False
    return True
