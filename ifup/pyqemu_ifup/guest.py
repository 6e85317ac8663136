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
    policy: Policy, tap: str, pid: int, network: str, user: User | None
) -> tuple[Caller, Port]:
    """Return who the QEMU `pid` is and what the policy says of its tap, for `user` or root.

    `network` is the one that was asked for by its name, empty where the rules decide; whether its
    users allow it is not asked. Raises Failure (77) where the rules deny it.
    """
    caller = find_caller(tap, pid, want_user=False)
    if user is not None and policy_asks(policy, "user"):
        caller = replace(caller, user=user.login)
    return caller, wanted_port(policy, caller, network)


def find_wanted(
    policy: Policy, tap: str, pid: int, uid: int | None, network: str, user: User | None
) -> tuple[Caller, Port]:
    """Return who the QEMU `pid` is that has the tap, and what the policy says of it now.

    `uid` is the user whom the agent served, None for root, and `user` whom `find_asked` tells;
    `network` is the one that was asked for by its name, empty where the rules decide. Raises
    Failure (77) where they, or the network's users, deny it.
    """
    caller, port = find_port(policy, tap, pid, network, user)
    if uid is not None:
        assert user is not None
        may_still(policy, port, user)
    return caller, port
