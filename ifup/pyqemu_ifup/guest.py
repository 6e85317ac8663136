"""What a guest's tap shall have by the policy, as its QEMU's own process tells who it is."""

from __future__ import annotations

from dataclasses import replace

from pyqemu_ifconf.policy import Caller, Policy, Port, policy_asks
from pyqemu_ifup.access import User, may_still
from pyqemu_ifup.caller import find_caller, real_uid
from pyqemu_ifup.main import wanted_port


def find_asked(policy: Policy, pid: int, uid: int | None) -> int | None:
    """Return the number of the user whom `find_wanted` must know, None where it asks for none.

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
) -> tuple[Caller, Port]:
    """Return who the QEMU `pid` is and what the policy says of its tap, for the user `uid` or root.

    `user` is whom `find_asked` tells; `network` is the one that was asked for by its name, empty
    where the rules decide; whether its users allow it is not asked. `root_made`: as in Caller.
    Raises Failure (77) where the rules deny it.
    """
    caller = find_caller(tap, pid, want_user=False)
    caller = replace(caller, unprivileged=uid is not None, root_made=root_made)
    if user is not None and policy_asks(policy, "user"):
        caller = replace(caller, user=user.login)
    return caller, wanted_port(policy, caller, network)


def find_wanted(
    policy: Policy,
    tap: str,
    pid: int,
    uid: int | None,
    network: str,
    user: User | None,
    *,
    root_made: bool,
) -> tuple[Caller, Port]:
    """Return who the QEMU `pid` is that has the tap, and what the policy says of it now.

    As `find_port`, but raises Failure (77) also where the network's users deny it.
    """
    caller, port = find_port(policy, tap, pid, uid, network, user, root_made=root_made)
    if uid is not None:
        assert user is not None
        may_still(policy, port, user)
    return caller, port
