"""Filters at a link on a kernel that has nftables and none there (no CONFIG_NF_TABLES_NETDEV)."""

from __future__ import annotations

import pytest

from lab.macvtap import OWN
from lab.netns import Namespace
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.drivers import nft
from pyqemu_ifup.guards.nft import link_chains


def test_a_kernel_without_such_chains_has_none_of_ours_and_takes_none(inside: Namespace) -> None:
    inside.ip("link", "add", "v0", "type", "veth", "peer", "name", "v1")
    index = inside.link("v0")["ifindex"]
    wanted = link_chains("v0", index, mac=OWN, tags=True)
    assert nft.read("v0", index) == nft.read_all() == ()
    nft.remove("v0", index)
    nft.load("v0", index, ())
    nft.prove("v0", index, ())
    with pytest.raises(Failure) as failed:
        nft.load("v0", index, wanted)
    assert failed.value.status == Status.REFUSED
    assert str(failed.value) == (
        "the guest's frames cannot be filtered: this kernel filters nothing at a link; run a "
        "kernel with CONFIG_NF_TABLES_NETDEV, or do without"
    )
    with pytest.raises(Failure, match=r"chain t[0-9]+-egress-tags is not there$"):
        nft.prove("v0", index, wanted)
    inside.ip("link", "del", "v0")
