"""What a running guest's tap shall have by now, asked of its own process and not of a parent."""

from __future__ import annotations

from dataclasses import replace

from pyqemu_ifconf.policy import Caller, Policy, Port, policy_asks
from pyqemu_ifup.access import identity, may_still
from pyqemu_ifup.caller import find_caller
from pyqemu_ifup.main import wanted_port


def find_wanted(
    policy: Policy, tap: str, pid: int, uid: int | None, network: str
) -> tuple[Caller, Port]:
    """Return who the QEMU `pid` is that has the tap, and what the policy says of it now.

    `uid` is the user whom the agent served, None for root; `network` is the one that was asked
    for by its name, empty where the rules decide. Raises Failure (77) where they, or the network's
    users, deny it.
    """
    wants_user = policy_asks(policy, "user")
    caller = find_caller(tap, pid, want_user=wants_user and uid is None)
    if wants_user and uid is not None:
        caller = replace(caller, user=identity(uid)[0])
    port = wanted_port(policy, caller, network)
    if uid is not None:
        may_still(policy, port, uid)
    return caller, port
