"""Which of the host's other firewalls drop what it forwards for a network with `nat:`."""

from __future__ import annotations

import syslog

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Nat
from pyqemu_ifconf.shell import readable
from pyqemu_ifup.drivers import nft_program as nft
from pyqemu_ifup.hook import log
from pyqemu_ifup.host import Host
from pyqemu_ifup.made.base import WantedNetwork
from pyqemu_ifup.made.nat.rules import wants_forwarding

HINT = 1.0
"""Seconds that an up may look for other firewalls, at most a quarter of its time."""


def dropped_ways(chain: nft.DroppingChain, bridge: str, nat: Nat) -> list[str]:
    """Return the ways ("iifname", "oifname") on which a chain drops what is forwarded for `nat`."""
    return chain.ways_of(bridge, ipv6=nat.ipv6 is not None) if wants_forwarding(nat) else []


async def tell_of_firewalls(host: Host, wanted: WantedNetwork) -> None:
    """Say in syslog which chains drop what this host is to forward for the network.

    Raises Failure (75) with the host's deadline alone: that it cannot be told takes nothing back.
    """
    nat, deadline = wanted.made, host.deadline
    if not wants_forwarding(nat):
        return
    try:
        chains = await nft.find_dropping_chains(deadline.child(min(HINT, deadline.remaining() / 4)))
    except Failure as failure:
        deadline.check()
        log(
            syslog.LOG_WARNING,
            f"network {wanted.network}: cannot tell whether another firewall drops what is "
            f"forwarded for its guests: {failure}",
        )
        return
    for chain in chains:
        if ways := dropped_ways(chain, wanted.bridge, nat):
            log(
                syslog.LOG_WARNING,
                f"network {wanted.network}: the chain {chain.family} {readable(chain.table)} "
                f"{readable(chain.name)} drops what it does not know, and so what is forwarded "
                f"for its guests; {chain.accepting(wanted.bridge, ways)}",
            )
