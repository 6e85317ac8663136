"""Takes the steps of a plan of ops, one after the other, and steps of a way back."""

from __future__ import annotations

import syslog

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.shell import ifctl, quote
from pyqemu_ifup.deadline import Unconfirmed
from pyqemu_ifup.hook import log
from pyqemu_ifup.host import Host
from pyqemu_ifup.ops import Op, Plan

PATIENCE = 0.5
"""Seconds that a failed up waits for ovs-vswitchd to let the port go, once its row is gone."""


async def take_steps(host: Host, plan: Plan) -> None:
    """Take the steps of a plan. Raises Failure, 75 with the host's deadline."""
    for op in plan:
        host.deadline.check()
        await host.run(op)


async def take_each(host: Host, plan: Plan) -> None:
    """Take each step, whatever becomes of the others. Raises the first Failure."""
    failures = []
    for op in plan:
        try:
            await host.run(op)
        except Failure as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


async def take_back(host: Host, op: Op, remedy: str = "") -> bool:
    """Take one step of a way back; return whether it is taken. Syslog is told if it is not.

    The `remedy` is told if there is a better one than gc.
    """
    try:
        with host.patient(PATIENCE):
            await host.run(op)
    except Unconfirmed:
        return True
    except Failure as failure:
        log(
            syslog.LOG_ERR,
            f"{quote(op.port)}: not taken back: {failure}; "
            + (remedy or f"{ifctl('gc', op.port)} will"),
        )
        return False
    return True


async def take_all_back(host: Host, plan: Plan) -> bool:
    """Take the steps of a way back, each as `take_back`; return whether all are taken."""
    return all([await take_back(host, op) for op in plan])
