"""Puts the policy of now in force on the taps of the guests that run."""

from __future__ import annotations

import os
import syslog
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Caller, Policy, Port
from pyqemu_ifconf.shell import Command, ifctl, readable
from pyqemu_ifctl.bounded import attempt, within
from pyqemu_ifctl.databases import addresses, open_each
from pyqemu_ifctl.qemu.running import guest_of, is_qemu, leads_to, runs_qemu, tap_of
from pyqemu_ifctl.rights import cut_command
from pyqemu_ifctl.taps import natural
from pyqemu_ifdown.detach import detach_alone
from pyqemu_ifup import kinds, made
from pyqemu_ifup.access import ROOT, check_given, find_user, is_root_made, may_still
from pyqemu_ifup.attach import success_line
from pyqemu_ifup.change import Change, change, find_change
from pyqemu_ifup.deadline import GRACE
from pyqemu_ifup.guest import Unsaid, find_asked, find_marked, find_port, find_user_said
from pyqemu_ifup.holder import Holder
from pyqemu_ifup.hook import log, narrator
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds.base import Difference
from pyqemu_ifup.look import FRESH, Link, Seen
from pyqemu_ifup.main import Left
from pyqemu_ifup.mark import Here, Mark, find_here, is_alive
from pyqemu_ifup.ops import SetDown
from pyqemu_ifup.qemu.caller import find_hook, find_hook_at_work
from pyqemu_ifup.system.holders import all_holders
from pyqemu_ifup.system.lock import Lock, lock_tap
from pyqemu_ifup.system.process import command_line, is_here, real_uid
from pyqemu_ifup.task import RETRY, pause

HOOK = "pyqemu-ifup"
HOOK_SECONDS = 0.5
"""Seconds that a script's path may take: where it leads, its maker decides."""
TELL = 2.0
"""Seconds that a QEMU may take to tell its guest."""
SETTLE = 2.0
"""Seconds that a script of the tap's QEMU is waited for."""
Result = Literal[
    "changed", "would change", "unchanged", "left", "denied", "cut", "would cut", "failed"
]


@dataclass(frozen=True)
class Guest:
    """A tap that a running guest has, or that was asked for by its name.

    `mark` is our mark, None where there is none; `pid` the QEMU (or else the process) that holds
    the tap, None where none does; `network` the one that was asked for by its name, empty where
    the rules decide. `ours` tells whether we have attached it, or its QEMU calls us for it.
    """

    tap: str
    mark: Mark | None
    pid: int | None
    network: str
    ours: bool

    @property
    def serves(self) -> int:
        """The process that the mark shall name: that which it names, as long as that lives."""
        mark = self.mark
        if mark is None:
            return self.pid or 0
        return mark.pid if is_alive(mark) or self.pid is None else self.pid


@dataclass(frozen=True)
class Outcome:
    """What became of one tap; `failure` says why it did not get what the policy wants.

    `untold` says why the guest was not told that it is on another network; None where there is
    nothing to tell, empty where it was told.
    """

    guest: Guest
    result: Result
    port: Port | None = None
    vm: str | None = None
    differences: tuple[Difference, ...] = ()
    moves: bool = False
    commands: tuple[Command, ...] = ()
    failure: Failure | None = None
    untold: str | None = None


def apply_policy(
    host: Host,
    policy: Policy,
    taps: Sequence[str] = (),
    *,
    dry_run: bool = False,
    cut: bool = False,
) -> tuple[list[Outcome], list[str]]:
    """Put `policy` in force on the taps of running guests, on `taps` alone where given.

    Returns what became of each, and what there is to say beside. A database that fails keeps back
    only the taps that it may hold. Raises Failure where the links cannot be had.
    """
    deadline = host.deadline
    links = host.kernel.links()
    named = [link.mark.ovsdb for link in links if link.mark and link.mark.ovsdb]
    failed = open_each(host, dict.fromkeys([*addresses(policy), *named]))
    outcomes = []
    for guest in find_guests(host, links, taps):
        if deadline.interrupted() is not None:
            break
        of_one = deadline.renewed(policy.timeout + SETTLE + 2 * GRACE + 2 * TELL)
        host.tell = narrator("pyqemu-ifctl", guest.tap)

        with host.until(of_one.child(policy.timeout + SETTLE)):
            outcome = attempt(
                partial(
                    _put, host, policy, guest, failed, named=bool(taps), dry_run=dry_run, cut=cut
                )
            )
        if isinstance(outcome, Failure):
            foreign = not taps and guest.mark is None and not guest.ours
            vm = _vm(guest, Caller(guest.tap))
            outcome = None if foreign else Outcome(guest, "failed", vm=vm, failure=outcome)
        if outcome is not None:
            outcomes.append(outcome)
    used = {each.guest.tap for each in outcomes if each.failure in failed.values()}
    return outcomes, [] if used else [str(failure) for failure in failed.values()]


def _put(
    host: Host,
    policy: Policy,
    guest: Guest,
    failed: Mapping[str, Failure],
    *,
    named: bool,
    dry_run: bool,
    cut: bool,
) -> Outcome | None:
    """Put the policy in force on one tap; None where it is no affair of ours. Raises Failure."""

    async def put() -> Outcome | None:
        async with _alone(host, guest, dry_run=dry_run) as alone:
            outcome = await _apply_one(host, policy, alone, failed, named=named, dry_run=dry_run)
            if outcome is None or outcome.result != "denied":
                return outcome
            return await _deny(host, outcome, cut=cut, dry_run=dry_run)

    return host.finish(put())


def find_guests(host: Host, links: Iterable[Link], taps: Sequence[str]) -> list[Guest]:
    """Return the taps of ours and those that a QEMU holds, or just `taps`, there or not.

    Ours are those with our mark, whoever holds them, in another network namespace say, or nobody.
    """
    held = all_holders()
    here = find_here()
    by_name = {link.name: link for link in links}
    names = list(dict.fromkeys(taps)) or sorted(
        (name for name, link in by_name.items() if kinds.is_ports(link)), key=natural
    )
    found = []
    for name in names:
        link, pids = by_name.get(name), list(filter(is_here, held.of(name)))
        guest = attempt(partial(_guest, host, name, link, pids, here))
        if isinstance(guest, Failure):
            if guest.status is not Status.BUG:
                raise guest
            mark = link.mark if link is not None else None
            guest = Guest(name, mark, None, "", mark is not None)
        found.append(guest)
    return [guest for guest in found if taps or guest.mark is not None or _is_running(guest)]


def _is_running(guest: Guest) -> bool:
    """Tell whether somebody has the tap: a process that lives, by its mark or its descriptor."""
    return guest.pid is not None or (guest.mark is not None and is_alive(guest.mark))


def _guest(host: Host, tap: str, link: Link | None, pids: Sequence[int], here: Here) -> Guest:
    mark = link.mark if link is not None else None
    if mark is None and link is not None and not link.alias:
        # A tap that has lost its mark, but not its port.
        mark = kinds.lost_mark(Seen(link, ports=tuple(host.ports(tap))), here)
    if mark is None:
        # NOTE: what it gets is what those may have who are not root.
        pids = [pid for pid in pids if real_uid(pid) not in (ROOT, None)] or pids
    pid = next(filter(runs_qemu, pids), next(iter(pids), None))
    if mark is not None and is_alive(mark) and (mark.pid in pids or not pids):
        pid = mark.pid
    if mark is not None:
        return Guest(tap, mark, pid, mark.network if mark.by_name else "", ours=True)
    hook = find_hook(tap, pid) if pid is not None else None
    name, _, network = os.path.basename(hook or "").partition("@")
    if name != HOOK:
        network = ""
    ours = name == HOOK or (hook is not None and pid is not None and _leads_to_ours(pid, hook))
    return Guest(tap, None, pid, network, ours)


def _leads_to_ours(pid: int, hook: str) -> bool:
    try:
        path = within(HOOK_SECONDS, partial(leads_to, pid, hook))
    except TimeoutError:
        return False
    return os.path.basename(path or "") == HOOK


@asynccontextmanager
async def _alone(host: Host, guest: Guest, *, dry_run: bool) -> AsyncIterator[Guest]:
    """Have the tap for ourselves; yields the guest as whoever had it before has left it.

    A script of its QEMU's that is at work on it comes first. A dry run takes it as it is. Raises
    Failure.
    """
    begun = time.monotonic()
    before = host.kernel.look_up(guest.tap)
    while True:
        lock = Lock(None)
        if before is not None and not dry_run:
            lock = await lock_tap(before.index, host.deadline)
        with lock:
            now = host.kernel.look_up(guest.tap)
            if now is not None and (before is None or before.index != now.index):
                raise Failure(
                    Status.TRY_AGAIN,
                    "in other hands",
                    "the tap has been made anew meanwhile",
                    "try again",
                )
            if _is_settled(guest, now, time.monotonic() - begun):
                yield guest if dry_run else await _anew(host, guest, now)
                return
        host.deadline.check()
        await pause(RETRY)


def _is_settled(guest: Guest, link: Link | None, waited: float) -> bool:
    """Tell whether no script of its QEMU's has a tap in hand, nor waits for it.

    One takes the link down first and brings it up last, and marks the tap before all else. Raises
    Failure (75) where it has `waited` long enough, in seconds.
    """
    if link is None or guest.pid is None or (link.up and link.mark is not None):
        return True
    script = find_hook_at_work(guest.tap, guest.pid)
    if script is not None and waited > SETTLE:
        raise Failure(
            Status.TRY_AGAIN,
            "in other hands",
            f"its QEMU {guest.pid} runs a script for it just now, process {script:d}",
            "try again when that has ended",
        )
    return script is None


async def _anew(host: Host, guest: Guest, link: Link | None) -> Guest:
    """Look at a guest again, with its tap's lock held. Raises Failure."""
    mark = link.mark if link is not None else None
    for ovsdb in {each.ovsdb for each in (guest.mark, mark) if each is not None}:
        if ovsdb in host.databases:
            await host.databases[ovsdb].sync(host.deadline)
    if mark == guest.mark and (mark is None or is_alive(mark)):
        return guest
    (now,) = find_guests(host, host.kernel.links(), [guest.tap])
    if guest.mark is not None and now.mark is None and link is not None and not link.up:
        # NOTE: its down has been here, and it has yet to let the tap go.
        return replace(now, pid=None)
    return now


async def _apply_one(
    host: Host,
    policy: Policy,
    guest: Guest,
    failed: Mapping[str, Failure],
    *,
    named: bool,
    dry_run: bool,
) -> Outcome | None:
    """Do what is to be done about one tap; None where it is no affair of ours."""
    caller, port, outcome = Caller(guest.tap), None, None
    try:
        link = _find_link(host, guest, named=named)
        judged = _judge(policy, guest, link, named=named) if link is not None else None
        if judged is None or isinstance(judged, Outcome):
            return judged
        caller, port, uid = judged
        async with _network(host, port, guest.mark, dry_run=dry_run) as network:
            by_name = guest.mark is None and bool(guest.network)
            holder = Holder(caller, guest.serves, uid, by_name=by_name, mark=guest.mark)
            wanted = find_change(host, port, holder, failed, network.assumed)
            outcome = _unchanged(guest, caller, wanted, network)
            if not wanted.is_needed and not network.differences:
                return outcome
            if dry_run:
                return replace(outcome, result="would change")
            await change(host, wanted)
        if _was_let_go(host, wanted):
            await _leave_let_go(host, guest, named=named)
            return None
    except Failure as failure:
        if outcome is not None:
            log(syslog.LOG_ERR, f"{readable(guest.tap)}: not changed: {failure}")
            return replace(outcome, result="failed", failure=failure)
        if not named and host.kernel.look_up(guest.tap) is None:
            return None
        return Outcome(guest, "failed", port, _vm(guest, caller), failure=failure)
    was = "; ".join(f"{each.setting} was {each.found}" for each in outcome.differences)
    log(syslog.LOG_INFO, f"{success_line(port, caller)}: {was}")
    return replace(outcome, result="changed", untold=_tell_guest(guest, wanted))


def _find_link(host: Host, guest: Guest, *, named: bool) -> Link | None:
    """Return the link of a tap, None where it is no affair of ours.

    Raises Failure: 69 where there is none, 71 where nobody tells which guest it is for.
    """
    mark = guest.mark
    if not named and mark is None and not _is_running(guest):
        return None  # Its QEMU has ended since.
    link = host.kernel.look_up(guest.tap)
    if link is None:
        raise Failure(
            Status.UNAVAILABLE,
            "there is no such tap in this network namespace",
            "",
            "pyqemu-ifctl status lists them all",
        )
    if not named and mark is None and (link.master is not None or link.alias):
        return None
    if guest.pid is None and mark is None:
        raise Failure(
            Status.REFUSED,
            "no process holds it",
            "nobody tells which guest it is for",
            "start its QEMU, which calls pyqemu-ifup itself",
        )
    return link


def _judge(
    policy: Policy, guest: Guest, link: Link, *, named: bool
) -> tuple[Caller, Port, int | None] | Outcome | None:
    """Return who has a tap, what the policy wants of it, and the user whose it is (None: root's).

    Or what becomes of a tap that is left or denied; None where it is no affair of ours. Raises
    Failure.
    """
    mark, vm = guest.mark, _vm(guest, Caller(guest.tap))
    pid = guest.pid if guest.pid is not None else guest.serves
    is_strange = mark is None and not named
    try:
        uid = mark.uid if mark is not None else _find_uid(pid)
        if is_strange and uid is not None and guest.ours:
            return Outcome(guest, "left", failure=_unmarked(guest, uid))
        check_given(link)
        caller, port = _wanted(policy, guest, link, pid, uid)
    except (Unsaid, Left) as left:
        return None if is_strange else Outcome(guest, "left", vm=vm, failure=left)
    except Failure as failure:
        if is_strange:
            return None
        if failure.status is not Status.DENIED:
            raise
        return Outcome(guest, "denied", vm=vm, failure=failure)
    if is_strange and not guest.ours:
        if not runs_qemu(pid):
            return None
        return Outcome(guest, "left", port, caller.vm, failure=_left(guest, port))
    return replace(caller, vm=_vm(guest, caller)), port, uid


def _unchanged(guest: Guest, caller: Caller, wanted: Change, network: _Network) -> Outcome:
    """Return the outcome of a tap that nothing has been done to yet: what differs, what to do."""
    steps = [line for op in wanted.plan for line in op.commands()]
    return Outcome(
        guest,
        "unchanged",
        wanted.port,
        caller.vm,
        (*network.differences, *wanted.differences),
        wanted.moves,
        (*network.before, *steps, *network.after),
    )


async def _leave_let_go(host: Host, guest: Guest, *, named: bool) -> None:
    """Take a tap down that its QEMU has let go meanwhile. Raises Failure (75) if it is `named`."""
    await detach_alone(host, guest.tap, guest.serves)
    if named:
        raise Failure(
            Status.TRY_AGAIN,
            "its QEMU has let it go meanwhile",
            "",
            "start it, which calls pyqemu-ifup itself",
        )


def _was_let_go(host: Host, change: Change) -> bool:
    """Tell whether the last descriptor of a tap has been closed since: a tap has no carrier then.

    Its down may have run before we began, and left it to nobody.
    """
    before, now = change.before.tap, host.kernel.look_up(change.port.tap)
    return before is not None and before.carrier and (now is None or not now.carrier)


async def _deny(host: Host, outcome: Outcome, *, cut: bool, dry_run: bool) -> Outcome:
    """Say what becomes of a tap that the policy denies by now; `cut`: take the link of ours down.

    Raises Failure.
    """
    guest, failure = outcome.guest, outcome.failure
    link = host.kernel.look_up(guest.tap)
    if failure is None or link is None:
        return outcome
    cut = cut and guest.mark is not None
    if not cut or dry_run:
        place = _place(host, guest)
        outcome = replace(outcome, failure=_denied(guest, failure, place, up=link.up))
    if not cut:
        return outcome
    down = SetDown(link.name, link.index)
    if dry_run:
        steps = tuple(down.commands()) if link.up else ()
        return replace(outcome, result="would cut", commands=steps)
    if link.up:
        await host.run(down)
        log(syslog.LOG_NOTICE, f"{readable(guest.tap)}: cut off: {failure.why or failure.what}")
    why = Failure(Status.DENIED, "cut off, its link is down", f"{failure.what}: {failure.why}")
    return replace(outcome, result="cut", failure=why)


def _place(host: Host, guest: Guest) -> str | None:
    """Return the bridge that a tap is on just now, None for none. Raises Failure."""
    seen = host.look(guest.tap, None)
    if seen.master is not None and seen.master.kind == "bridge":
        return seen.master.name
    bridge = next((port.bridge for port in seen.ports if port.bridge), None)
    if bridge is not None or seen.master is None:
        return bridge
    # NOTE: all ports of Open vSwitch have one master, and its database may not have been asked.
    return guest.mark.bridge if guest.mark is not None else seen.master.name


def _find_uid(pid: int) -> int | None:
    """Return the user as whose request a tap without a mark counts, None for root's own.

    A process without root's right writes its own command line. Raises Failure (75) where it has
    ended.
    """
    uid = real_uid(pid)
    if uid is None:
        raise Failure(Status.TRY_AGAIN, f"its process {pid} has ended meanwhile", "", "try again")
    return uid if uid != ROOT else None


def _wanted(
    policy: Policy, guest: Guest, link: Link, pid: int, uid: int | None
) -> tuple[Caller, Port]:
    """Return who the guest is and what the policy says of its tap, by its mark if it has one.

    `uid` is the user whose tap it is, None for root. Raises Failure (77) where it is denied, and
    Unsaid.
    """
    mark = guest.mark
    asked = find_asked(policy, pid, uid) if mark is None else find_user_said(policy, mark)
    user = find_user(asked) if asked is not None else None
    root_made = is_root_made(link, uid)
    if mark is not None:
        return find_marked(policy, guest.tap, mark, user, root_made=root_made)
    caller, port = find_port(policy, guest.tap, pid, uid, guest.network, user, root_made=root_made)
    if uid is not None:
        assert user is not None
        may_still(policy, port, user)
    return caller, port


def _tell_guest(guest: Guest, change: Change) -> str | None:
    """Have the guest see its link go down and up, where it is on another network than before.

    Returns what Outcome.untold says.
    """
    before = change.before
    lost = before.master is None and not before.ports
    if not change.moves or lost or guest.pid is None:
        return None
    words = command_line(guest.pid)
    if not words or not is_qemu(words):
        return None
    # NOTE: it costs a fifth of a second, and most runs tell no guest anything.
    from pyqemu_ifctl.qemu.qmp import renew_link

    qemu = guest_of(guest.pid, words, all_holders().of_process(guest.pid))
    why = "its QEMU has no QMP socket"
    until = time.monotonic() + TELL
    for address in qemu.monitors:
        seconds = until - time.monotonic()
        if seconds <= 0:
            break
        done = attempt(
            partial(
                renew_link, address, lambda backend: tap_of(backend, qemu) == guest.tap, seconds
            )
        )
        if done is True:
            return ""
        why = str(done) if isinstance(done, Failure) else "no netdev of its QEMU has this tap"
    return why


@dataclass(frozen=True)
class _Network:
    """What is to be done to the network of a tap itself: nothing, if others make it.

    `assumed` stands for its bridge where a dry run makes none. `differences` are what of a network
    that is there is not as the policy says, `before` and `after` the commands that come before and
    after those for the tap.
    """

    assumed: Link | None = None
    differences: tuple[Difference, ...] = ()
    before: tuple[Command, ...] = ()
    after: tuple[Command, ...] = ()


async def _look_at_network(host: Host, port: Port, *, dry_run: bool) -> _Network:
    """Return what is to be done to the network of a tap. Raises Failure."""
    if port.made is None:
        return _Network()
    from pyqemu_ifup.made.base import WantedNetwork
    from pyqemu_ifup.made.network import commands_of, find_differences, plan_to_make

    wanted = WantedNetwork(port.network, port.place.name, port.made)
    found = await find_differences(host, wanted)
    is_new = host.kernel.look_up(wanted.bridge) is None
    if not found and not (dry_run and is_new):
        return _Network()
    before, after = commands_of(await plan_to_make(host, wanted))
    bridge = replace(
        FRESH, name=wanted.bridge, kind="bridge", tap=False, up=True, mtu=wanted.made.mtu
    )
    return _Network(
        bridge if is_new else None,
        (Difference("nat", "as the policy says", "; ".join(found)),) if found else (),
        before,
        after,
    )


@asynccontextmanager
async def _network(
    host: Host, port: Port, mark: Mark | None, *, dry_run: bool
) -> AsyncIterator[_Network]:
    """Have a network that is made there while a tap comes to it, and gone that one has left last.

    Yields what is done to the network itself, or would be. Raises Failure.
    """
    network = await _look_at_network(host, port, dry_run=dry_run)
    # NOTE: held until the tap is on the bridge, so that nobody takes it away before. It gets what
    # the policy says of it now, too.
    async with nullcontext() if dry_run else made.ensure(host, port):
        yield network
    if not dry_run and mark is not None and mark.bridge != port.place.name:
        try:
            await made.leave(host, mark)
        except Failure as failure:
            log(
                syslog.LOG_ERR,
                f"{readable(port.tap)}: its network is left: {failure}; {ifctl('gc')} removes it",
            )


def _vm(guest: Guest, caller: Caller) -> str | None:
    return caller.vm or (guest.mark.guest if guest.mark is not None else "") or None


def _denied(guest: Guest, failure: Failure, place: str | None, *, up: bool = True) -> Failure:
    """Return what is to be said of a tap that runs and that the policy denies by now.

    `place` is the bridge that it is on, None for none; `up` tells whether its link is.
    """
    where = (f"on {readable(place)}" if place else "on no bridge") + ("" if up else ", down")
    is_cut = up and guest.mark is not None
    cut = f"cut it off: {cut_command(guest.tap)}; or " if is_cut else ""
    return Failure(
        Status.DENIED,
        f"{failure.what} by now, and left as it is, {where}"
        if failure.what == "denied"
        else f"{failure.what}; it is left as it is, {where}",
        failure.why,
        f"{cut}end its QEMU, or mend the policy",
    )


def _unmarked(guest: Guest, uid: int) -> Failure:
    return Failure(
        Status.DENIED,
        "left alone",
        f"it has no mark of ours, and user {uid}, as whom its process {guest.pid} runs, writes "
        "what that says of itself",
        f"start its QEMU anew, or attach it by that user's right: {ifctl('apply', guest.tap)}",
    )


def _left(guest: Guest, port: Port) -> Failure:
    return Failure(
        Status.DENIED,
        "left alone",
        f"its QEMU {guest.pid} did not call pyqemu-ifup for it, though the rule at {port.position} "
        f"is about it",
        f"attach it: {ifctl('apply', guest.tap)}",
    )
