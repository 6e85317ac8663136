"""What the agent does for one request: `up`, `down` and `tap`, as a task."""

from __future__ import annotations

import os
import syslog
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure, Status, for_user
from pyqemu_ifconf.names import check_tap_name
from pyqemu_ifconf.policy import Policy
from pyqemu_ifconf.shell import quote
from pyqemu_ifd.asking import Process, find_asking
from pyqemu_ifd.cache import PolicyCache
from pyqemu_ifd.connection import Connection
from pyqemu_ifd.keyed_lock import KeyedLock
from pyqemu_ifd.pool import Pool
from pyqemu_ifd.users import Users
from pyqemu_ifd.wire import Peer, Place, Request
from pyqemu_ifdown.detach import detach, leave_to_gc
from pyqemu_ifdown.main import TIMEOUT as DOWN_TIMEOUT
from pyqemu_ifdown.main import present_name
from pyqemu_ifup.access import ROOT, is_root_made
from pyqemu_ifup.attach import attach, success_line
from pyqemu_ifup.deadline import TAKEN_BACK, TOO_LATE, Deadline
from pyqemu_ifup.guest import find_asked, find_port
from pyqemu_ifup.holder import Handed, Holder
from pyqemu_ifup.hook import left_to_gc, log, prove_tap
from pyqemu_ifup.leave import leave
from pyqemu_ifup.look import Link
from pyqemu_ifup.main import Left
from pyqemu_ifup.mark import Here
from pyqemu_ifup.qemu.caller import find_helped
from pyqemu_ifup.system.process import find_parent
from pyqemu_ifup.tap_request import attach_tap, make_tap, may_attach, parse_wish
from pyqemu_ifup.taps import close_all
from pyqemu_ifup.task import Task, pause

QUEUED = 0.5
"""Seconds behind other requests, after which the deadline is counted, and told, anew."""


@dataclass(frozen=True)
class Context:
    """What a request is served with: the agent's own things, and its client."""

    pool: Pool
    cache: PolicyCache
    tap_lock: KeyedLock
    users: Users
    here: Here
    client: Connection
    name: Callable[[str], None]
    """Is told the tap's name, where the request has none."""

    def begin(self, deadline: Deadline) -> Deadline:
        """Return the request's deadline, counted from now where it has waited long for others."""
        self.client.begin()
        if time.monotonic() <= deadline.start + QUEUED:
            return deadline
        self.client.allow(deadline.seconds)
        return deadline.renewed(deadline.seconds)

    def deadline(self, seconds: float, process: Process, left: str = "") -> Deadline:
        """Return the deadline of the request, which the client stops, and tell it how long that is.

        So does, at the last, the end of the process for which it asks. `left` tells what becomes
        of what a request that takes nothing back has left.
        """
        self.client.stand_in_line(seconds)
        return Deadline(
            seconds,
            self.client.why_stopped,
            at_last=process.why_ended,
            stopped=left or TAKEN_BACK,
            late=f"try again; {left}" if left else TOO_LATE,
        )

    def follow(self, deadline: Deadline, policy: Policy) -> Deadline:
        """Return the request's deadline by a policy that may have come since it was made."""
        if policy.timeout == deadline.seconds:
            return deadline
        self.client.allow(policy.timeout)
        return deadline.allowing(policy.timeout)

    def process(self, find: Callable[[int], int | None]) -> Process:
        """Return the process for which the client asks. Raises Failure as `find_asking`."""
        return find_asking(self.client.socket, self.client.peer, find)

    def teller(self, program: str, tap: str, debug: str) -> Callable[[str], None]:
        """Return what tells the client each step, where it wants that."""
        if debug != "debug":
            return lambda command: None
        return lambda command: self.client.say(f"{program}: {quote(tap)}: {command}")


async def serve(request: Request, place: Place | None, context: Context) -> None:
    """Do what the client asks for. Raises Failure.

    It first yields when the client has been told how long it may last, and nothing is done yet.
    """
    try:
        await _serve(request, place, context)
    except Failure as failure:
        if context.client.peer.uid == ROOT:
            raise
        raise for_user(failure) from failure


def _serve(request: Request, place: Place | None, context: Context) -> Task[None]:
    if request.verb == "up":
        tap, network, debug = request.fields
        return _up(tap, network, debug, place, context)
    if request.verb == "down":
        tap, debug = request.fields
        return _down(tap, debug, place, context)
    return _tap(request.fields, context)


async def _up(tap: str, network: str, debug: str, place: Place | None, context: Context) -> None:
    check_tap_name(tap)
    peer = context.client.peer
    held = _held(place, peer)
    prove_tap(tap, held)
    process = context.process(find_parent)
    parent = process.pid
    deadline = context.deadline(context.cache.timeout, process)
    kernel = context.pool.kernel
    uid = peer.uid if peer.uid != ROOT else None

    def admit(link: Link) -> None:
        if uid is not None:
            assert user is not None
            may_attach(policy, port, user, link, kernel.links())
            if caller.root_made and not is_root_made(link, uid):
                raise Failure(Status.TRY_AGAIN, "another tap by now", "", "try again")

    with context.tap_lock.queue(tap) as ticket:
        await pause(0.0)
        deadline = context.begin(deadline)
        await ticket.acquire(deadline)
        policy = await context.cache.current(deadline)
        deadline = context.follow(deadline, policy)
        asked = find_asked(policy, parent, uid)
        user = (await context.users.find(asked, deadline)) if asked is not None else None
        link = kernel.look_up(tap) if uid is not None else None
        root_made = link is not None and is_root_made(link, uid)
        tell = context.teller("pyqemu-ifup", tap, debug)
        try:
            caller, port = find_port(
                policy, tap, parent, uid, network, user, root_made=root_made, tell=tell
            )
        except Left as left:
            with context.pool.host(tap, deadline, tell, ovsdbs=policy.databases) as host:
                await leave(host, tap, left.rule, parent)
            return
        deadline.check()
        queue = place.queue if place is not None else None
        handed = Handed(len(held), queue.fileno() if queue is not None else None)
        holder = Holder(caller, parent, uid, by_name=bool(network), handed=handed)
        brief = uid is not None
        with (
            queue or nullcontext(),
            context.pool.host(tap, deadline, tell, ovsdbs=policy.databases, brief=brief) as host,
        ):
            await attach(host, port, holder, admit)
    log(syslog.LOG_INFO, success_line(port, caller))


async def _down(tap: str, debug: str, place: Place | None, context: Context) -> None:
    check_tap_name(tap)
    held = _held(place, context.client.peer)
    process = context.process(find_parent)
    tap = present_name(tap, held)
    deadline = context.deadline(DOWN_TIMEOUT, process, left_to_gc(tap))
    with context.tap_lock.queue(tap) as ticket:
        await pause(0.0)
        deadline = context.begin(deadline)
        await ticket.acquire(deadline)
        tell = context.teller("pyqemu-ifdown", tap, debug)
        by_user = context.client.peer.uid != ROOT
        with context.pool.host(tap, deadline, tell, brief=by_user) as host:
            try:
                index = place.index if place is not None else None
                # NOTE: whoever has ended has no tap any more, and whoever has its pid may have one.
                parent = 0 if process.has_ended() else process.pid
                await detach(host, tap, parent, index, by_user=by_user)
            except Failure as failure:
                leave_to_gc(tap, failure)


async def _tap(fields: tuple[str, ...], context: Context) -> None:
    wish = parse_wish(fields)
    process = context.process(find_helped if wish.for_parent else lambda pid: pid)
    deadline = context.deadline(context.cache.timeout, process)
    peer = context.client.peer
    await pause(0.0)
    deadline = context.begin(deadline)
    user = await context.users.find(peer.uid, deadline)
    deadline.check()
    policy = await context.cache.current(deadline)
    deadline = context.follow(deadline, policy)
    new = make_tap(context.pool.kernel, policy, user, process.pid, wish)
    context.name(new.name)
    # NOTE: it has its name alone, so that it waits for nobody; others may have to wait for it.
    with (
        context.tap_lock.queue(new.name),
        context.pool.host(
            new.name,
            deadline,
            lambda command: None,
            ovsdbs=policy.databases,
            brief=peer.uid != ROOT,
        ) as host,
    ):
        await attach_tap(host, policy, new)
    try:
        context.client.send(b">" + os.fsencode(new.name), tuple(new.descriptors))
    finally:
        close_all(new.descriptors)


def _held(place: Place | None, peer: Peer) -> list[str]:
    """Return the tap that was handed over; only root may do without one. Raises Failure (77)."""
    held = [place.tap] if place is not None and place.tap is not None else []
    if not held and peer.uid != ROOT:
        raise Failure(
            Status.DENIED,
            f"user {peer.uid} has not handed over the tap",
            "",
            "let QEMU call the hook, which holds the tap, or call it as root",
        )
    return held
