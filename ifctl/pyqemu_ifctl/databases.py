"""The policy, the databases of Open vSwitch, and what networks need: as far as it is to be had."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.policy import Policy
from pyqemu_ifctl.bounded import Parts
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.hook import reading_policy
from pyqemu_ifup.host import Host
from pyqemu_ifup.look import Link
from pyqemu_ifup.made.base import WantedNetwork
from pyqemu_ifup.on_port import Sights

PATIENCE = 3.0
"""Seconds that one database may take, or nft, so that one that is mute leaves time for the rest."""


def find_policy(environ: Mapping[str, str]) -> Policy:
    """Return this host's policy. Raises Failure as `load_host_policy`."""
    from pyqemu_ifconf.load import find_place, load_host_policy

    with reading_policy(find_place(environ)):
        return load_host_policy(environ)


def read_policy(environ: Mapping[str, str]) -> Policy | Failure:
    """Return this host's policy, or why there is none to be had."""
    try:
        return find_policy(environ)
    except Failure as failure:
        return failure


def take_policy(parts: Parts, environ: Mapping[str, str]) -> Policy | Failure:
    """Return this host's policy as a part of a look, or why there is none to be had in time."""
    found = parts.take_apart("the policy", lambda: read_policy(environ))
    if found is None:
        return Failure(Status.TRY_AGAIN, "the policy cannot be read in time", "", "see its files")
    return found


def take_sights(parts: Parts, links: Sequence[Link], routes_of: Collection[int]) -> Sights | None:
    """Return links with addresses and routes as a part of a look, None if that takes too long.

    The routes are read only if one of the links `routes_of` has an address.
    """

    def read() -> Sights:
        # NOTE: one of its own: what is late goes on, and reads from it still.
        with Netlink() as kernel:
            return kernel.sights(links, routes_of)

    return parts.take_apart("addresses and routes", read)


def addresses(policy: Policy | Failure) -> list[str]:
    """Return the databases in which ports of ours may be: the policy's, and the default one."""
    named = policy.databases if isinstance(policy, Policy) else ()
    return list(dict.fromkeys([DEFAULT_OVSDB, *named]))


def open_each(host: Host, ovsdbs: Iterable[str]) -> dict[str, Failure]:
    """Open those of `ovsdbs` that are there; return those which failed, each with its failure.

    Raises Failure (75) once the host's deadline is interrupted: the others are not looked at.
    """
    failed: dict[str, Failure] = {}
    for address in ovsdbs:
        try:
            with in_patience(host):
                host.finish(host.open_databases([address]))
        except Failure as failure:
            if host.deadline.interrupted() is not None:
                raise
            failed[address] = failure
    return failed


@contextmanager
def in_patience(host: Host) -> Iterator[None]:
    """Have all that is asked of a host in the block take PATIENCE at the most."""
    with host.until(host.deadline.child(PATIENCE)):
        yield


def look_for_unmet(host: Host, wanted: WantedNetwork) -> list[Failure]:
    """Return why an up could not make a network, at last a Failure (75) of who is mute.

    Raises Failure (75) once the host's deadline is interrupted.
    """
    from pyqemu_ifup.made.network import find_unmet

    with in_patience(host):
        found = list(host.finish(find_unmet(host, wanted)))
    if found and host.deadline.interrupted() is not None:
        raise found[-1]
    return found


def worst(failures: Iterable[Failure]) -> Status:
    """Return the status to end with: that of the first failure, 0 without one."""
    return next((failure.status for failure in failures), Status.DONE)
