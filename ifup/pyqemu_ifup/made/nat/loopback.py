"""What keeps the guests of a network with `nat:` from this host's loopback addresses, as an op."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import Command, sh
from pyqemu_ifup.drivers import bolt
from pyqemu_ifup.host import Host
from pyqemu_ifup.made.bridge import MadeOp, find_own


@dataclass(frozen=True)
class ShutBolt(MadeOp):
    """Have the bridge drop what comes for 127.0.0.0/8, whatever becomes of the network's table.

    `needed` tells whether such a frame would be taken in if no table dropped it.
    """

    needed: bool

    def commands(self) -> tuple[Command, ...]:
        """Return what tc(8) is told."""
        words = "ingress pref 1 protocol all bpf da bytecode".split()
        return (
            sh("tc", "qdisc", "add", "dev", self.port, "clsact"),
            sh("tc", "filter", "add", "dev", self.port, *words, bolt.BYTECODE),
        )

    async def run(self, host: Host) -> None:
        """Shut it. Raises Failure if it is needed and this kernel does not take it: 77, 71."""
        try:
            bolt.shut(find_own(host, self).index)
        except OSError as error:
            if self.needed:
                raise Failure(
                    Status.DENIED if error.errno == errno.EPERM else Status.REFUSED,
                    f"cannot keep the guests from this host's loopback addresses, to which a "
                    f"forward of network {self.network}, or net.ipv4.conf.all.route_localnet, "
                    "opens a way",
                    f"this kernel does not take a classifier: {error.strerror}",
                    "see whether it has sch_ingress and cls_bpf, or give each forward an address",
                ) from error


def is_shut(index: int) -> bool:
    """Tell whether the bridge with this ifindex drops such frames. Raises OSError, not EOPNOTSUPP.

    A kernel that has no classifiers has none there.
    """
    try:
        return bolt.is_shut(index)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
