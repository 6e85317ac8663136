"""What a guest's tap shall have by the policy: for its up, and later, when its mark tells."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.names import bounded
from pyqemu_ifconf.policy import Caller, Policy, Port, policy_asks, why_not, why_void
from pyqemu_ifconf.shell import readable
from pyqemu_ifup.access import ROOT, User, may_still
from pyqemu_ifup.main import PROGRAM, inputs, wanted_port
from pyqemu_ifup.mark import Mark, is_alive
from pyqemu_ifup.qemu.caller import find_caller, find_hook
from pyqemu_ifup.system.process import real_uid


def find_asked(policy: Policy, pid: int, uid: int | None) -> int | None:
    """Return the number of the user whom `find_port` must know, None where it asks for none.

    `uid` is the user whom the agent served, None for root; then it is whoever runs the QEMU `pid`.
    """
    if uid is not None:
        return uid
    return real_uid(pid) if policy_asks(policy, "user") else None


def find_port(
    policy: Policy,
    tap: str,
    pid: int,
    uid: int | None,
    network: str,
    user: User | None,
    *,
    root_made: bool,
    tell: Callable[[str], None] = lambda words: None,
) -> tuple[Caller, Port]:
    """Return who the QEMU `pid` is and what the policy says of its tap, for the user `uid` or root.

    `user` is whom `find_asked` tells; `network` is the one that was asked for by its name, empty
    where the rules decide; whether its users allow it is not asked. `root_made`: as in Caller.
    `tell` is told what it is decided by. Raises Failure (77) where the rules deny it.
    """
    caller = find_caller(tap, pid, want_user=False)
    caller = replace(caller, unprivileged=uid is not None, root_made=root_made)
    if user is not None and policy_asks(policy, "user"):
        caller = replace(caller, user=user.login)
    tell(inputs(policy, caller, pid, network))
    return caller, wanted_port(policy, caller, network)


class Unsaid(Failure):
    """A tap is left where it is (77): a rule asks for what its mark does not say."""


def find_user_said(policy: Policy, mark: Mark) -> int | None:
    """Return the number of the user whom `find_marked` must know, None where it needs none."""
    if mark.uid is not None:
        return mark.uid
    if "user" in mark.unsaid or not policy_asks(policy, "user"):
        return None
    return mark.user or ROOT


def said_by(mark: Mark, tap: str, login: str | None, *, root_made: bool) -> Caller:
    """Return who the tap is for as its mark says; `login` is of whom `find_user_said` tells."""
    return Caller(
        tap,
        None if "vm" in mark.unsaid else mark.vm or None,
        mark.netdev,
        mark.mac,
        login,
        unprivileged=mark.uid is not None,
        root_made=root_made,
    )


def check_said(policy: Policy, caller: Caller, mark: Mark) -> None:
    """Check that no rule which may decide asks for what the mark does not say. Raises Unsaid."""
    for rule in policy.rules if mark.unsaid and not mark.by_name else ():
        asked = [key for key in rule.match if key in mark.unsaid]
        known = {key: globs for key, globs in rule.match.items() if key not in asked}
        said = replace(rule, match=known)
        if why_not(said, caller) is None and why_void(policy, rule, caller) is None:
            if not asked:
                return
            raise Unsaid(
                Status.DENIED,
                f"left on network {mark.network}",
                f"the rule at {rule.position} asks for {' and '.join(asked)}, which the tap's mark "
                "does not say",
                "start its QEMU anew",
            )


def check_place(port: Port, mark: Mark) -> None:
    """Check that the rules alone have the tap where they have it now. Raises Unsaid."""
    if "by" in mark.unsaid and port.network != mark.network:
        raise Unsaid(
            Status.DENIED,
            f"left on network {mark.network}",
            f"the rule at {port.position} has it on network {port.network}, but its mark is lost, "
            "and may have said that it was asked for by a network's name",
            "start its QEMU anew",
        )


def find_marked(
    policy: Policy, tap: str, mark: Mark, user: User | None, *, root_made: bool
) -> tuple[Caller, Port]:
    """Return who the tap is for and what the policy says of it now, by its mark alone.

    What its process says of itself by now counts for nothing: a guest may have taken it over.
    `user` is whom `find_user_said` tells; `root_made` is as in Caller. Raises Failure (77) where
    the rules, or the network's users, deny it, and Unsaid.
    """
    login = user.login if user is not None and policy_asks(policy, "user") else None
    caller = said_by(mark, tap, login, root_made=root_made)
    check_said(policy, caller, mark)
    network = mark.network if mark.by_name else ""
    port = wanted_port(policy, caller, network, made=mark.made)
    check_place(port, mark)
    if mark.uid is not None:
        assert user is not None
        may_still(policy, port, user)
    return caller, port


@dataclass(frozen=True)
class Other:
    """What a tap's process says of itself by now, and what its mark says, None where nothing."""

    setting: str
    mark: str | None
    says: str


@dataclass
class Patience:
    """How long what processes of others than root say of themselves is read yet, in seconds."""

    left: float = 1.0


def find_otherwise(tap: str, mark: Mark, patience: Patience) -> tuple[Other, ...] | None:
    """Return what the tap's process says of itself by now and did not.

    None where it has ended, or there was no `patience` left, which is one for all taps.
    """
    if not is_alive(mark):
        return None
    if real_uid(mark.pid) == 0:
        return _find_otherwise(tap, mark)
    if patience.left <= 0:
        return None
    begun = time.monotonic()
    found = _find_otherwise(tap, mark)
    patience.left -= time.monotonic() - begun
    return found


def _find_otherwise(tap: str, mark: Mark) -> tuple[Other, ...]:
    now = find_caller(tap, mark.pid, want_user=False)
    said = said_by(mark, tap, None, root_made=False)
    pairs = [
        (key, getattr(said, key), getattr(now, key))
        for key in ("vm", "netdev", "mac")
        if key not in mark.unsaid
    ]
    if "vm" in mark.unsaid and now.vm is not None and not now.vm.startswith(mark.vm):
        pairs.append(("vm", mark.guest, now.vm))
    hook, _, network = (find_hook(tap, mark.pid) or "").rpartition("/")[2].partition("@")
    if hook == PROGRAM and "by" not in mark.unsaid:
        pairs.append(("network", mark.network if mark.by_name else None, bounded(network)))
    return tuple(
        Other(key, was or None, says)
        for key, was, says in pairs
        if says is not None and says != was
    )


def tell_otherwise(mark: Mark, others: tuple[Other, ...] | None) -> str:
    """Return in words what `find_otherwise` has found, empty for nothing."""
    if others is None and is_alive(mark):
        return f"there was no time to read what its process {mark.pid} says of itself by now"
    words = [
        f"{other.setting} {readable(other.says)} "
        f"(its mark: {readable(other.mark) if other.mark is not None else 'none'})"
        for other in others or ()
    ]
    if not words:
        return ""
    return f"its process {mark.pid} says of itself by now: {', '.join(words)}; the mark counts"
