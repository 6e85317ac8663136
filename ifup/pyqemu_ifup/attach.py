"""Makes it so: look, plan, apply, prove; and when that fails, the way back."""

from __future__ import annotations

import os
import syslog
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.policy import Caller, Port
from pyqemu_ifconf.shell import ifctl, quote, readable
from pyqemu_ifup import kinds, made
from pyqemu_ifup.claims import (
    is_open_to_all,
    is_ours_to_touch,
    refuse_foreign_ports,
    refuse_shared,
    refuse_strangers,
)
from pyqemu_ifup.holder import Admit, Holder, anyone
from pyqemu_ifup.hook import log, tell_left
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.base import PortKind
from pyqemu_ifup.look import Link, Seen, show_vlan
from pyqemu_ifup.mark import Mark, find_here, is_anothers
from pyqemu_ifup.ops import Plan, SetDown
from pyqemu_ifup.plan import plan_undo, plan_up
from pyqemu_ifup.settings import was_before
from pyqemu_ifup.steps import take_all_back, take_back
from pyqemu_ifup.system.lock import lock_by_name
from pyqemu_ifup.verify import tell_of_sitting, tell_taken_over, verify

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.ovsdb import Database

ASKING = 0.75
"""Of the time for the way back, what databases that do not answer may take; the kernel does."""


async def attach(host: Host, port: Port, holder: Holder, admit: Admit = anyone) -> None:
    """Attach the tap as `port` says, for `holder`, and prove that it is so.

    `admit` raises Failure where whoever asks may not have this tap. Raises Failure; then the tap
    is down, attached nowhere, and as it was before, but for somebody else's tap or name, which is
    not touched.
    """
    with await lock_by_name(port.tap, host.deadline):
        # NOTE: whoever asked may have done it himself since, or have gone: then nothing is touched.
        host.deadline.check()
        await attach_alone(host, port, holder, admit)


async def attach_alone(host: Host, port: Port, holder: Holder, admit: Admit = anyone) -> None:
    """Do as `attach`, with the tap's lock held."""
    async with AsyncExitStack() as network:
        before, holder = await _make_ready(host, port, holder, admit, network)
        try:
            if port.made is not None:
                # NOTE: its bridge may have been made meanwhile.
                before = kinds.look(host, port.tap, port.place.name)
            kinds.require(host.databases, port, before)
            kind = kinds.find(port, before)
            mark = holder.mark_for(port, kind)
            if holder.mark is None:
                mark = replace(mark, was=was_before(before))
            await take(host, port, kind, before, plan_up(port, kind, before, mark, find_here()))
            host.deadline.last_check()
        except BaseException as error:
            with host.until(host.deadline.undo()):
                is_left = await _undo_join(host, port, holder, before)
            if is_left:
                tell_left(error, host.deadline.stopped, port.tap)
            raise
    tell_taken_over(before)
    tell_of_sitting(host, port, before.tap)


async def _make_ready(
    host: Host, port: Port, holder: Holder, admit: Admit, network: AsyncExitStack
) -> tuple[Seen, Holder]:
    """See to all that the tap needs before it is touched, and that it is nobody else's.

    Returns what was seen of it before, and for whom it is attached, now that this is known. The
    network that is made for it, if any, is nobody else's to take away until `network` ends. Raises
    Failure; then the tap is taken from where it was attached before.
    """
    link = host.kernel.look_up(port.tap)
    async with _undoing(host, port, holder, admit):
        await _open_databases(host, port, link)
    before = kinds.look(host, port.tap, port.place.name)
    link = refuse_strangers(port.tap, before, holder.pid)
    admit(link)
    refuse_shared(link, holder.uid if holder.uid is not None else os.getuid())
    refuse_foreign_ports(before, find_here())
    by_us = holder.made or (link.mark is not None and link.mark.made)
    async with _undoing(host, port, holder, admit):
        if holder.uid is None and not by_us:
            await own_it(host, link, holder)
        await network.enter_async_context(made.ensure(host, port))
    return before, replace(holder, made=by_us)


async def _open_databases(host: Host, port: Port, link: Link | None) -> None:
    """Connect to all databases that may have something of the tap's name. Raises Failure."""
    mark = link.mark if link is not None else None
    left = [mark.ovsdb] if mark is not None and mark.ovsdb is not None else []
    # NOTE: first the one that the way back needs.
    await host.open_databases([*left, *port.place.databases, DEFAULT_OVSDB, *host.ovsdbs])
    await host.catch_up(link)
    there = [each for each in port.place.databases if each in host.databases]
    if there and host.kernel.look_up(port.place.name) is None:
        # NOTE: the row of a bridge is there before its interface, whose MTU is looked at.
        for address in there:
            await host.databases[address].made(port.place.name, host.deadline)


async def take(host: Host, port: Port, kind: PortKind, before: Seen, plan: Plan) -> None:
    """Take the steps of a plan; before frames may pass, and at the end, prove that all is so.

    Raises Failure.
    """
    told = False
    for op in plan:
        host.deadline.check()
        if op.opens:
            await verify(host, port, kind, before, up=False, told=told)
        await host.run(op)
        told = op.told
    host.deadline.check()
    await verify(host, port, kind, before, up=True)


async def own_it(host: Host, link: Link, holder: Holder) -> None:
    """See to it that nobody but root has a tap of root's, or can open it. Raises Failure (77).

    One with our mark has been looked at before it got that. The rest is as for `give_to_root`.
    """
    is_new = link.mark is None and (link.multi_queue or link.persistent)
    if is_open_to_all(link) or (is_new and link.group is None and link.owner == os.getuid()):
        # NOTE: most taps are neither, and a hook need not have it loaded.
        from pyqemu_ifup.owner import give_to_root

        await give_to_root(host.kernel, link, holder.pid, *holder.handed)


@asynccontextmanager
async def _undoing(host: Host, port: Port, holder: Holder, admit: Admit) -> AsyncIterator[None]:
    """Take the tap from where it was attached before, where the block fails that comes first."""
    try:
        yield
    except BaseException as error:
        with host.until(host.deadline.undo()):
            is_left = await _undo(host, port, holder, admit)
        if is_left:
            tell_left(error, host.deadline.stopped, port.tap)
        raise


async def _undo(host: Host, port: Port, holder: Holder, admit: Admit) -> bool:
    """Take a tap from where it was attached before, though nothing has been done to it yet.

    One that somebody else has a claim to stays as it is. Tells whether something is left that
    could not be taken back. Raises Failure as `admit`.
    """
    is_left = False
    link = host.kernel.look_up(port.tap)
    mark = link.mark if link is not None else None
    unasked, why = None, "it cannot be asked"
    with host.until(host.deadline.child(host.deadline.remaining() * ASKING)):
        if (
            link is not None
            and mark is not None
            and not is_anothers(mark, holder.pid)
            and mark.ovsdb is not None
            and _may_be_port(host, link, mark)
        ):
            admit(link)
            if link.up:
                # NOTE: first of all, for a mute server may take all the time there is.
                is_left |= not await take_back(host, SetDown(link.name, link.index))
            # NOTE: it has not been tried yet where another one has failed before.
            try:
                await host.open_databases([mark.ovsdb])
            except Failure as failure:
                why = str(failure)
            unasked = mark.ovsdb
        is_left |= not await ask_again(host, port.tap)
        before = look_back(host, port)
        if before is None:
            return True
        if before.tap is None:
            return is_left
        is_ours = is_ours_to_touch(port.tap, before, holder.pid)
        if unasked is not None and unasked not in host.databases:
            _tell_of_port(port.tap, unasked, why)
            is_left = True
            # NOTE: of a port that no row tells of, the mark alone says whose it is.
            is_ours = is_ours or (link is not None and before.tap.index == link.index)
        if not is_ours:
            return is_left
        admit(before.tap)
        return not await _go_back(host, holder, before, before) or is_left


def _may_be_port(host: Host, link: Link, mark: Mark) -> bool:
    """Tell whether the tap may be where its mark says, though the kernel does not tell."""
    master = host.kernel.look_at(link.master) if link.master is not None else None
    return link.master is None or (
        master is not None and master.kind in kinds.master_kinds(mark.kind)
    )


async def _undo_join(host: Host, port: Port, holder: Holder, before: Seen) -> bool:
    """Take back what was done, as far as it can be; what cannot is told in syslog, and here."""
    link = host.kernel.look_up(port.tap)
    is_back = True
    with host.until(host.deadline.child(host.deadline.remaining() * ASKING)):
        if link is not None and link.up:
            # NOTE: first of all, for a mute server may take all the time there is.
            is_back &= await take_back(host, SetDown(link.name, link.index))
        is_back &= await ask_again(host, port.tap)
        now = look_back(host, port)
        if now is None:
            return True
        return not await _go_back(host, holder, before, now) or not is_back


def look_back(host: Host, port: Port) -> Seen | None:
    """Look at what there is to take back; None where that cannot be told, as syslog is."""
    try:
        return kinds.look(host, port.tap, port.place.name)
    except Failure as failure:
        log(syslog.LOG_ERR, f"{quote(port.tap)}: cannot look at what is left: {failure}")
        return None


async def _go_back(host: Host, holder: Holder, before: Seen, now: Seen) -> bool:
    """Take the steps back; tell whether all were taken."""
    plan = plan_undo(before, now, find_here(), again=holder.mark is not None)
    return await take_all_back(host, plan)


async def ask_again(host: Host, tap: str, remedy: str = "") -> bool:
    """See to it that the databases say what is: what became of a commit that was given up, too.

    Tells whether they do.

    One that has talked nonsense is connected to anew; one that does not answer is asked nothing
    more, as syslog is told, with the `remedy` where there is a better one than gc.
    """
    is_told = True
    for address, database in list(host.databases.items()):
        try:
            await _ask_one_again(host, address, database)
        except Failure as failure:
            _tell_of_port(tap, address, str(failure), remedy)
            is_told = False
    return is_told


def _tell_of_port(tap: str, address: str, why: str, remedy: str = "") -> None:
    """Tell syslog of a port that may be left in a database, and whoever asked that something is."""
    log(
        syslog.LOG_ERR,
        f"{quote(tap)}: a port may be left in {quote(address)}: {why}; "
        + (remedy or f"{ifctl('gc', tap)} removes it"),
    )


async def _ask_one_again(host: Host, address: str, database: Database) -> None:
    if database.fault is None:
        if not database.unsure:
            return
        try:
            await database.sync(host.deadline)
            return
        except Failure:
            if database.fault is None:
                raise
    await host.reconnect(address)


def success_line(port: Port, caller: Caller) -> str:
    """Return what syslog is told of a tap that is attached."""
    words = [f"attached to {quote(port.place.name)}"]
    if port.settings.vlan is not None:
        words.append(f"vlan {show_vlan(port.settings.vlan)}")
    if port.settings.isolated:
        words.append("isolated")
    words.append(f"network {quote(port.network)}")
    words.append(port.position.name)
    if caller.vm:
        words.append(f"vm {readable(caller.vm)}")
    return f"{quote(port.tap)}: " + ", ".join(words)
