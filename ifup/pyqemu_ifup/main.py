"""pyqemu-ifup TAP: attach the tap as the policy says."""

from __future__ import annotations

import os
import sys
import syslog

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.names import check_tap_name
from pyqemu_ifconf.policy import (
    DEFAULT_TIMEOUT,
    LEAVE_IS_ROOTS,
    Caller,
    Deny,
    Leave,
    Policy,
    Port,
    Rule,
    choose,
    policy_asks,
    port_on,
)
from pyqemu_ifconf.shell import quote, sh
from pyqemu_ifup.agent import USERS_UNIT
from pyqemu_ifup.caller import bounded, find_caller
from pyqemu_ifup.manners import (
    Watch,
    log,
    narrator,
    program_name,
    prove_tap,
    run_hook,
    waiting_for,
)

PROGRAM = "pyqemu-ifup"


class Left(Failure):
    """A `leave` rule has the tap stay as it is (77 for whoever must have it on a network)."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(
            Status.DENIED, "left alone", f"the rule at {rule.place} leaves it as it is",
            "nothing is to be done",
        )
        self.rule = rule


def main() -> int:
    """Run the hook with the arguments of this process and return its exit status."""
    return run_hook(PROGRAM, DEFAULT_TIMEOUT, up)


def up(tap: str, inherited: list[str], watch: Watch) -> None:
    """Attach `tap` for the parent process. Raises Failure."""
    check_tap_name(tap)
    prove_tap(tap, inherited)

    from pyqemu_ifconf.load import load_host_policy

    parent = os.getppid()
    with waiting_for("the policy, or a folder on the way to it, cannot be read"):
        policy = load_host_policy(os.environ)
    watch.allow(policy.timeout)
    with waiting_for("the kernel does not tell who calls"):
        caller = find_caller(tap, parent, want_user=policy_asks(policy, "user"))
    network = program_name(sys.argv).partition("@")[2]
    ovsdbs = [each.ovsdb for each in policy.networks.values()]
    try:
        port = wanted_port(policy, caller, network)
    except Left as left:
        if os.geteuid() != 0:
            raise denial(Deny(LEAVE_IS_ROOTS, left.rule), policy) from None
        from pyqemu_ifup.leave import leave

        leave(tap, left.rule, parent, ovsdbs, watch, narrator(PROGRAM, tap))
        return
    watch.check()

    with waiting_for("the libraries that it takes are not loaded yet"):
        from pyqemu_ifup.attach import Handed, attach, success_line

    handed = Handed(inherited.count(tap))
    try:
        attach(port, caller, parent, ovsdbs, watch, narrator(PROGRAM, tap), bool(network), handed)
    except Forbidden as forbidden:
        if os.geteuid() == 0:
            raise
        raise by_the_agent(forbidden, policy, port) from forbidden
    log(syslog.LOG_INFO, success_line(port, caller))


def by_the_agent(forbidden: Forbidden, policy: Policy, port: Port) -> Failure:
    """Return what a user is told whose hook had to do without an agent: how that does it."""
    place = policy.networks[port.network].place
    return Failure(
        forbidden.status, forbidden.what, forbidden.why,
        "the agent does it for you: let root start it "
        f"({sh('systemctl', 'start', USERS_UNIT)}) and have your login name among users: of "
        f"network {quote(port.network)} ({place})",
    )


def wanted_port(policy: Policy, caller: Caller, network: str) -> Port:
    """Return the Port that `caller` shall have: on `network` where one is named, else by the rules.

    Raises Failure: 77 where no rule, or a `deny` rule, matches, or there is no such network, 71
    where another tap is on the same hub of the QEMU's; and Left.
    """
    port = _find_port(policy, caller, network)
    if caller.joined:
        from pyqemu_ifup.hubs import refuse_joined

        refuse_joined(caller)
    return port


def _find_port(policy: Policy, caller: Caller, network: str) -> Port:
    if network:
        if bounded(network) is None:
            raise Failure(
                Status.DENIED, "no network is called so", f"its name has {len(network)} letters",
                "name one of the policy's behind the @",
            )
        return port_on(policy, network, caller.tap)
    decision = choose(policy, caller)
    if isinstance(decision, Deny):
        raise denial(decision, policy)
    if isinstance(decision, Leave):
        raise Left(decision.rule)
    return decision.port


def denial(decision: Deny, policy: Policy) -> Failure:
    """Return the Failure (77) of a tap that no rule, or a `deny` rule, keeps out."""
    if decision.rule is None:
        files = ", ".join(policy.files)
        return Failure(
            Status.DENIED, "denied", f"no rule of {files} matches",
            "add one; pyqemu-ifctl explain tells why each does not",
        )
    return Failure(
        Status.DENIED, "denied", decision.because, f"see the rule at {decision.rule.place}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
