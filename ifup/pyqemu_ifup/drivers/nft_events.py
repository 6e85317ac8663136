"""Hears of changes to the nftables of this network namespace (NFNLGRP_NFTABLES of nfnetlink)."""

from __future__ import annotations

import errno
import os

from pyqemu_ifup.drivers.netlink import (
    NETLINK_NETFILTER,
    NFGENMSG,
    Subscription,
    attributes,
    messages,
)
from pyqemu_ifup.drivers.nft_rules import NFNL_SUBSYS_NFTABLES
from pyqemu_ifup.drivers.nft_rules import TABLE as FILTERS_TABLE
from pyqemu_ifup.drivers.nft_table import TABLE

FILTERS = ""
"""Stands for the table that holds all filters at links; no network is called so."""
NFNLGRP_NFTABLES = 7
NFT_MSG_NEWGEN = 15
TABLE_NAME = 1
"""NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE and so on (linux/netfilter/nf_tables.h)."""


class NftEvents(Subscription):
    """A subscription; raises OSError, EPROTONOSUPPORT on a kernel without nfnetlink."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER, 1 << (NFNLGRP_NFTABLES - 1))

    def read(self) -> set[str] | None:
        """Return the networks whose tables were touched since; None where some of that is lost.

        FILTERS among them stands for the table of the filters at links.
        """
        networks: set[str] = set()
        lost = False
        for data in self.packets():
            if data is None:
                lost = True
                continue
            try:
                networks |= _touched(data)
            except OSError:
                lost = True
        return None if lost else networks


def _touched(data: bytes) -> set[str]:
    """Return the networks whose tables a packet is about. Raises OSError where it is cut."""
    networks: set[str] = set()
    for kind, _, _, begin, end in messages(data):
        if kind >> 8 != NFNL_SUBSYS_NFTABLES or kind & 0xFF == NFT_MSG_NEWGEN:
            continue
        found = attributes(data[begin + NFGENMSG.size : end])
        name = os.fsdecode(found.get(TABLE_NAME, b"").rstrip(b"\0"))
        if name == FILTERS_TABLE:
            networks.add(FILTERS)
        elif name.startswith(TABLE):
            networks.add(name.removeprefix(TABLE))
    return networks


def open_events() -> NftEvents | None:
    """Return a subscription, None on a kernel that has no nftables."""
    try:
        return NftEvents()
    except OSError as error:
        if error.errno not in (errno.EPROTONOSUPPORT, errno.ENOENT):
            raise
        return None
