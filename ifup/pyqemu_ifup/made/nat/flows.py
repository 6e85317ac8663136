"""The flows of a network with `nat:` that go on by other rules than its table has now.

A flow goes on as its first packet went, whatever the rules say since (nf_nat of the kernel).
"""

from __future__ import annotations

import syslog
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from socket import IPPROTO_UDP
from typing import TYPE_CHECKING

from pyqemu_ifconf.policy import Nat
from pyqemu_ifconf.shell import Command
from pyqemu_ifup.hook import log
from pyqemu_ifup.host import Host
from pyqemu_ifup.made.bridge import MadeOp
from pyqemu_ifup.made.nat.rules import families

if TYPE_CHECKING:
    from pyqemu_ifup.drivers.conntrack import Flow

ANY4 = bytes(4)


def astray(nat: Nat, own: Iterable[str]) -> Callable[[Flow], bool]:
    """Return what tells whether a flow does not go as the table would have it, were it begun now.

    `own` are this host's addresses. A flow goes on as its first packet went, whatever the rules
    say since (nf_nat of the kernel): UDP that a forward has led or would lead, and whatever left
    the subnet with an address of it.
    """
    from ipaddress import ip_address, ip_interface

    hosts = {ip_address(each).packed for each in own}
    networks = [ip_interface(address).network for _, address in families(nat)]
    # NOTE: a host tracks some 100,000 flows; that of an address's length, and its bits.
    subnets = {
        each.max_prefixlen // 8: (int(each.netmask), int(each.network_address)) for each in networks
    }
    led = {
        (forward.port, ip_address(forward.address or "0.0.0.0").packed)
        for forward in nat.forward
        if forward.protocol == "udp"
    }

    def is_within(address: bytes) -> bool:
        mask, bits = subnets.get(len(address), (0, 1))
        return int.from_bytes(address, "big") & mask == bits

    def is_astray(flow: Flow) -> bool:
        if flow.source == flow.answered and is_within(flow.source):
            return flow.destination not in hosts and not is_within(flow.destination)
        if nat.ipv4 is None or len(flow.source) != len(ANY4):
            return False
        protocol, port = flow.protocol
        if protocol != IPPROTO_UDP:
            return False
        if flow.answers != flow.destination:
            return is_within(flow.answers)
        return flow.destination in hosts and not led.isdisjoint(
            ((port, ANY4), (port, flow.destination))
        )

    return is_astray


async def forget(host: Host, network: str, nat: Nat) -> None:
    """Have no flow go on that does not go by the network's table. Raises Failure."""
    own = {text.partition("/")[0] for _, text in host.kernel.addresses()}
    # NOTE: whoever fills what the kernel tracks may delay this, and no more.
    limit = host.deadline.child(host.deadline.remaining() / 2)
    if not (await host.kernel.forget_flows(astray(nat, own), limit)):
        log(
            syslog.LOG_WARNING,
            f"network {network}: the kernel tracks more flows than there was time to look at; "
            "some that other rules let in may go on; see whose they are: conntrack -L",
        )


@dataclass(frozen=True)
class ForgetFlows(MadeOp):
    """Have no flow go on that does not go by the network's table."""

    nat: Nat

    def commands(self) -> tuple[Command, ...]:
        """Return none: which flows these are only a look at each of them tells."""
        return ()

    async def run(self, host: Host) -> None:
        """Forget them. Raises Failure."""
        await forget(host, self.network, self.nat)
