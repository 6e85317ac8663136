"""pyqemu-ifup TAP: attach the tap as the policy says."""

from __future__ import annotations

import os
import sys
import syslog
from collections.abc import Sequence

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.names import bounded, check_tap_name
from pyqemu_ifconf.policy import (
    DEFAULT_TIMEOUT,
    LEAVE_IS_ROOTS,
    MATCH_KEYS,
    Caller,
    Deny,
    Leave,
    MatchKey,
    Policy,
    Port,
    Rule,
    choose,
    policy_asks,
    port_on,
)
from pyqemu_ifconf.shell import ifctl, quote, readable, sh
from pyqemu_ifup.agent import USERS_UNIT
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.hook import (
    log,
    narrator,
    program_name,
    prove_tap,
    reading_policy,
    run_hook,
    waiting_for,
)
from pyqemu_ifup.qemu.caller import UNREADABLE, find_caller

PROGRAM = "pyqemu-ifup"


class Left(Failure):
    """A `leave` rule has the tap stay as it is (77 for whoever must have it on a network)."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(
            Status.DENIED,
            "left alone",
            f"the rule at {rule.position} leaves it as it is",
            "nothing is to be done",
        )
        self.rule = rule


def main() -> int:
    """Run the hook with the arguments of this process and return its exit status."""
    return run_hook(PROGRAM, DEFAULT_TIMEOUT, up)


def up(tap: str, inherited: list[str], deadline: Deadline) -> None:
    """Attach `tap` for the parent process. Raises Failure."""
    check_tap_name(tap)
    prove_tap(tap, inherited)

    from pyqemu_ifconf.load import find_place, load_host_policy

    parent = os.getppid()
    with reading_policy(find_place(os.environ)):
        policy = load_host_policy(os.environ)
    deadline = deadline.allowing(policy.timeout)
    with waiting_for("the kernel does not tell who calls"):
        caller = find_caller(tap, parent, want_user=policy_asks(policy, "user"))
    network = program_name(sys.argv).partition("@")[2]
    narrator(PROGRAM, tap)(inputs(policy, caller, parent, network))
    tell = narrator(PROGRAM, tap)
    try:
        port = wanted_port(policy, caller, network)
    except Left as left:
        if os.geteuid() != 0:
            raise denial(Deny(LEAVE_IS_ROOTS, left.rule), policy, caller) from None
        from pyqemu_ifup.host import Host
        from pyqemu_ifup.leave import leave

        with Host(tap, deadline, tell, ovsdbs=policy.databases) as host:
            host.finish(leave(host, tap, left.rule, parent))
        return
    deadline.check()

    with waiting_for("the libraries that it takes are not loaded yet"):
        from pyqemu_ifup.attach import attach, success_line
        from pyqemu_ifup.holder import Handed, Holder
        from pyqemu_ifup.host import Host

    handed = Handed(inherited.count(tap))
    holder = Holder(caller, parent, by_name=bool(network), handed=handed)
    try:
        with Host(tap, deadline, tell, ovsdbs=policy.databases) as host:
            host.finish(attach(host, port, holder))
    except Forbidden as forbidden:
        if os.geteuid() == 0:
            raise
        raise by_the_agent(forbidden, policy, port) from forbidden
    log(syslog.LOG_INFO, success_line(port, caller))


def by_the_agent(forbidden: Forbidden, policy: Policy, port: Port) -> Failure:
    """Return what a user is told whose hook had to do without an agent: how that does it."""
    position = policy.networks[port.network].position
    return Failure(
        forbidden.status,
        forbidden.what,
        forbidden.why,
        "the agent does it for you: let root start it "
        f"({sh('systemctl', 'start', USERS_UNIT)}) and have your login name among users: of "
        f"network {quote(port.network)} ({position})",
    )


def wanted_port(policy: Policy, caller: Caller, network: str, *, made: bool = False) -> Port:
    """Return the Port that `caller` shall have: on `network` where one is named, else by the rules.

    Raises Failure: 77 where no rule, or a `deny` rule, matches, or there is no such network, 71
    where another tap is on the same hub of the QEMU's; and Left.
    """
    port = _find_port(policy, caller, network, made=made)
    if caller.joined:
        from pyqemu_ifup.qemu.hubs import refuse_joined

        refuse_joined(caller)
    return port


def _find_port(policy: Policy, caller: Caller, network: str, *, made: bool) -> Port:
    if network:
        if bounded(network) is None:
            raise Failure(
                Status.DENIED,
                "no network is called so",
                f"its name has {len(network)} letters",
                "name one of the policy's behind the @",
            )
        return port_on(policy, network, caller.tap, made=made)
    decision = choose(policy, caller)
    if isinstance(decision, Deny):
        raise denial(decision, policy, caller)
    if isinstance(decision, Leave):
        raise Left(decision.rule)
    return decision.port


def denial(decision: Deny, policy: Policy, caller: Caller) -> Failure:
    """Return the Failure (77) of a tap that no rule, or a `deny` rule, keeps out.

    It says what was known of the caller, of what the rules ask for.
    """
    asked = [key for key in MATCH_KEYS if key != "tap" and policy_asks(policy, key)]
    told = f" (known of it: {tell_known(caller, asked)})" if asked else ""
    options = [f"--{key}={value}" for key in asked if (value := getattr(caller, key)) is not None]
    explain = ifctl("explain", caller.tap, options=options)
    if decision.rule is None:
        files = ", ".join(policy.files)
        return Failure(
            Status.DENIED,
            "denied",
            f"no rule of {files} matches" + told,
            f"add one; {explain} tells why each does not",
        )
    more = f"; {explain} tells why none before it matches" if asked else ""
    return Failure(
        Status.DENIED,
        "denied",
        f"{decision.because}{told}",
        f"see the rule at {decision.rule.position}{more}",
    )


def tell_known(caller: Caller, keys: Sequence[MatchKey]) -> str:
    """Return in words what is known of a caller, and why the rest is not."""
    known = [
        f"{key} {readable(value)}" for key in keys if (value := getattr(caller, key)) is not None
    ]
    words = [", ".join(known) or "nothing"]
    unread = caller.unclear == UNREADABLE
    if "vm" in keys and caller.vm is None and not unread:
        words.append("not its vm: its QEMU has no -name")
    silent = ("vm", "netdev", "mac") if unread else ("netdev", "mac")
    lost = [key for key in silent if key in keys and getattr(caller, key) is None]
    if lost:
        words.append(f"not its {' and '.join(lost)}: {caller.unclear or 'nobody tells'}")
    return "; ".join(words)


def inputs(policy: Policy, caller: Caller, pid: int, network: str) -> str:
    """Return, as a comment for a shell, all that the decision is made by."""
    keys = [key for key in MATCH_KEYS if key != "user" or policy_asks(policy, "user")]
    # NOTE: the hook serves nobody but who has started it; the agent is root, and tells of others.
    who = "root's" if os.geteuid() == 0 and not caller.unprivileged else "an unprivileged user's"
    by = f"by the network's name {readable(network)}" if network else "by the rules"
    return (
        f"# asked for by process {pid}, {who}: {tell_known(caller, keys)}; decided {by} of "
        f"{', '.join(map(readable, policy.files))}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
