"""What the agent does for one request: `up`, `down` and `tap`, as Work."""

from __future__ import annotations

import os
import syslog
from collections.abc import Callable, Generator
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.names import check_tap_name
from pyqemu_ifconf.policy import Policy, policy_asks
from pyqemu_ifd.access import ROOT
from pyqemu_ifd.keeper import PolicyKeeper
from pyqemu_ifd.pool import AgentHost, Pool
from pyqemu_ifd.tap_request import NewTap, attach_tap, make_tap, may_attach
from pyqemu_ifd.taps import close_all
from pyqemu_ifd.wire import Peer, Place, Request
from pyqemu_ifdown.detach import detaching
from pyqemu_ifdown.main import TIMEOUT as DOWN_TIMEOUT
from pyqemu_ifup.attach import attaching, success_line
from pyqemu_ifup.caller import find_caller
from pyqemu_ifup.main import wanted_port
from pyqemu_ifup.manners import Watch, log, prove_tap
from pyqemu_ifup.stamp import Here
from pyqemu_ifup.work import Work


class Gone(Exception):
    """The request is not for this agent: the client does the work itself."""


@dataclass(frozen=True)
class Context:
    """What a request is served with: the agent's own things, and its client.

    `send` sends a packet with descriptors; `stopped` tells why the client wants no more.
    """

    pool: Pool
    keeper: PolicyKeeper
    here: Here
    peer: Peer
    send: Callable[..., None]
    stopped: Callable[[], str | None]

    def watch(self, seconds: float) -> Watch:
        """Return the watch of the request, and tell the client how long that is."""
        self.send(b"!%d" % seconds)
        return Watch(seconds, self.stopped)

    def teller(self, program: str, tap: str, debug: str) -> Callable[[str], None]:
        """Return what tells the client each step, where it wants that."""
        if debug != "debug":
            return lambda command: None
        return lambda command: self.send(b"-" + os.fsencode(f"{program}: {tap}: {command}"))


def serve(
    request: Request, place: Place | None, context: Context
) -> tuple[str, Generator[float, None, None]]:
    """Return the tap that the request is about, and the work.

    Raises Gone where it is of another network namespace.
    """
    if place is not None and place.netns != context.here.netns:
        raise Gone("another network namespace")
    tap = request.fields[0]
    if request.verb == "up":
        return tap, _up(tap, request.fields[1], request.fields[2], place, context)
    if request.verb == "down":
        # A tap that was renamed since QEMU opened it: QEMU knows the old name.
        tap = place.tap if place is not None and place.tap is not None else tap
        return tap, _down(tap, request.fields[1], place, context)
    policy = context.keeper.get()
    peer = context.peer
    try:
        new = make_tap(context.pool.kernel, policy, peer.uid, peer.pid, request.fields)
    except Failure as failure:
        log(syslog.LOG_ERR, f"no tap for process {peer.pid} of user {peer.uid}: {failure}")
        raise
    return new.name, _tap(new, policy, context)


def _tap(new: NewTap, policy: Policy, context: Context) -> Work[None]:
    watch = context.watch(policy.timeout)
    with AgentHost(context.pool, new.name, watch, lambda command: None) as host:
        yield from attach_tap(host, policy, new)
    try:
        context.send(b">" + os.fsencode(new.name), tuple(new.descriptors))
    finally:
        close_all(new.descriptors)


def _up(tap: str, network: str, debug: str, place: Place | None, context: Context) -> Work[None]:
    policy = context.keeper.get()
    watch = context.watch(policy.timeout)
    check_tap_name(tap)
    _prove(tap, place, context.peer)
    parent = parent_of(context.peer)
    caller = find_caller(tap, parent, want_user=policy_asks(policy, "user"))
    port = wanted_port(policy, caller, network)
    uid = context.peer.uid if context.peer.uid != ROOT else None
    if uid is not None:
        kernel = context.pool.kernel
        link = kernel.look_up(tap)
        if link is not None:
            may_attach(policy, port.network, uid, link, kernel.links())
    tell = context.teller("pyqemu-ifup", tap, debug)
    with AgentHost(context.pool, tap, watch, tell) as host:
        ovsdbs = [each.ovsdb for each in policy.networks.values()]
        yield from attaching(host, port, caller, parent, ovsdbs, uid)
    log(syslog.LOG_INFO, success_line(port, caller))


def _down(tap: str, debug: str, place: Place | None, context: Context) -> Work[None]:
    watch = context.watch(DOWN_TIMEOUT)
    check_tap_name(tap)
    _prove(tap, place, context.peer)
    tell = context.teller("pyqemu-ifdown", tap, debug)
    with AgentHost(context.pool, tap, watch, tell) as host:
        yield from detaching(host, tap, parent_of(context.peer))


def _prove(tap: str, place: Place | None, peer: Peer) -> None:
    """Check that the descriptor is the tap's; only root may do without one. Raises Failure (77)."""
    if peer.uid != ROOT and (place is None or place.tap is None):
        raise Failure(
            Status.DENIED, f"user {peer.uid} has not handed over the tap", "",
            "let QEMU call the hook, which holds the tap, or call it as root",
        )
    prove_tap(tap, [place.tap] if place is not None and place.tap is not None else [])


def parent_of(peer: Peer) -> int:
    """Return the process that started the client: QEMU, for a hook.

    Raises Failure (75) where the client has ended.
    """
    try:
        with open(f"/proc/{peer.pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("PPid:"):
                    return int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        raise Failure(Status.TRY_AGAIN, "stopped", "the client has ended") from None
    raise Failure(Status.REFUSED, f"/proc/{peer.pid}/status has no PPid", "", "see proc(5)")
