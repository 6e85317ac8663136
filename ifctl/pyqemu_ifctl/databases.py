"""The policy, the databases of Open vSwitch, and what networks need: as far as it is to be had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import DEFAULT_OVSDB, Nat, Policy
from pyqemu_ifup.host import Host

PATIENCE = 3.0
"""Seconds that one database may take, so that a mute one leaves time for the others."""


def read_policy(environ: Mapping[str, str]) -> Policy | Failure:
    """Return this host's policy, or why there is none to be had."""
    from pyqemu_ifconf.load import load_host_policy

    try:
        return load_host_policy(environ)
    except Failure as failure:
        return failure


def addresses(policy: Policy | Failure) -> list[str]:
    """Return the databases in which ports of ours may be: the policy's, and the default one."""
    networks = policy.networks.values() if isinstance(policy, Policy) else ()
    return list(dict.fromkeys([DEFAULT_OVSDB, *(network.ovsdb for network in networks)]))


def open_each(host: Host, ovsdbs: Iterable[str]) -> dict[str, Failure]:
    """Open those of `ovsdbs` that are there; return those which failed, each with its failure.

    Raises Failure (75) once the host's watch is interrupted: the others are not looked at.
    """
    failed: dict[str, Failure] = {}
    watch = host.watch
    for address in ovsdbs:
        host.watch = watch.within(PATIENCE)
        try:
            host.finish(host.open_databases([address]))
        except Failure as failure:
            if watch.interrupted() is not None:
                raise
            failed[address] = failure
        finally:
            host.watch = watch
    return failed


def find_unmet(host: Host, network: str, bridge: str, nat: Nat) -> list[Failure]:
    """Return why an up could not make a network with `nat:`, at last a Failure (75) of who is mute.

    Raises Failure (75) once the host's watch is interrupted.
    """
    from pyqemu_ifup.nat_needs import Wanted
    from pyqemu_ifup.nat_needs import find_unmet as finding

    watch = host.watch
    host.watch = watch.within(PATIENCE)
    try:
        found = host.finish(finding(host, Wanted(network, bridge, nat)))
    finally:
        host.watch = watch
    if found and watch.interrupted() is not None:
        raise found[-1]
    return found


def worst(failures: Iterable[Failure]) -> Status:
    """Return the status to end with: that of the first failure, 0 without one."""
    return next((failure.status for failure in failures), Status.DONE)
