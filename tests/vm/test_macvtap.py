"""Filters at a macvtap on a link of a VLAN, and on an older kernel than this machine's may be."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import test_netdev_chains as here

from lab.macvtap import (
    ARRIVAL,
    CASES,
    OWN,
    PEER,
    UNTAGGED,
    Case,
    Macvtap,
    arriving,
    given,
    received,
    tag,
    tagged,
)
from lab.netns import Namespace
from lab.taps import BROADCAST, holds
from pyqemu_ifconf.failure import Failure
from pyqemu_ifup.drivers import nft
from pyqemu_ifup.guards.nft import link_chains
from pyqemu_ifup.kinds.macvtap import is_safe

VID = 30
ON_WIRE = tag(VID)
wired = here.wired


@pytest.fixture
def on_vlan(inside: Namespace) -> Namespace:
    """The namespace, with this thread in it, a wire between v0 and v1, and a VLAN of it."""
    lines = (
        "link add v0 up type veth peer name v1",
        "link set v1 up",
        f"link add link v0 name v0.{VID} up type vlan id {VID}",
    )
    inside.run(["ip", "-batch", "-"], input="\n".join(lines))
    inside.kept.callback(inside.ip, "link", "del", "v0")
    return inside


def add_macvtap(namespace: Namespace) -> int:
    """Make mv0, a macvtap of the VLAN's link, and bring it up; return its ifindex."""
    lines = (
        f"link add link v0.{VID} name mv0 address {OWN.hex(':')} type macvtap mode bridge",
        "link set mv0 up allmulticast on",
    )
    namespace.run(["ip", "-batch", "-"], input="\n".join(lines))
    namespace.kept.callback(namespace.ip, "link", "del", "mv0")
    index: int = namespace.link("mv0")["ifindex"]
    return index


@pytest.mark.parametrize(
    ("mac", "tags", "filters"),
    [(OWN, True, {"kernel", "macs", "tags"}), (None, False, {"kernel"})],
    ids=("all", "nothing"),
)
def test_frames_pass_in_the_vlan(
    mac: bytes | None, tags: bool, filters: set[str], on_vlan: Namespace
) -> None:
    index = add_macvtap(on_vlan)
    chains = link_chains("mv0", index, mac=mac, tags=tags)
    nft.load("mv0", index, chains)
    nft.prove("mv0", index, chains)
    with Macvtap(on_vlan, "mv0") as macvtap:
        found = arriving(macvtap, on_vlan.raw("v1"), ON_WIRE)
    assert found == {case.name for case in CASES if not case.stopped_by & filters}
    nft.remove("mv0", index)


def test_frames_outside_the_vlan_are_not_heard(on_vlan: Namespace) -> None:
    add_macvtap(on_vlan)
    wire = on_vlan.raw("v1")
    cases = [Case(False, PEER, BROADCAST, UNTAGGED) for _ in range(4)]
    with Macvtap(on_vlan, "mv0") as macvtap:
        for case, outer in zip(cases, (b"", tag(0), tag(20), ON_WIRE), strict=True):
            wire.send(tagged(case.frame, outer))
        seen = received(macvtap.recv, cases[-1].token)
    heard = [case for case in cases if any(case.token in each for each in seen)]
    assert heard == cases[-1:]


def test_a_link_of_a_vlan_that_keeps_headers_lets_the_guest_out_of_it(on_vlan: Namespace) -> None:
    """A macvtap on a link with reorder_hdr off: what the guest has tagged leaves with no other tag.

    So the chains alone do not keep it in: VID 0, which passes them, is in no VLAN on the wire.
    """
    on_vlan.ip("link", "set", f"v0.{VID}", "type", "vlan", "reorder_hdr", "off")
    index = add_macvtap(on_vlan)
    chains = link_chains("mv0", index, mac=OWN, tags=True)
    nft.load("mv0", index, chains)
    wire = on_vlan.raw("v1")
    with Macvtap(on_vlan, "mv0") as macvtap:
        for tags, there in ((UNTAGGED, ON_WIRE), ("[0]", b"")):
            case = Case(True, OWN, BROADCAST, tags)
            macvtap.send(case.frame)
            assert wire.recv(ARRIVAL, holds(case.token)) == tagged(case.frame, there)
    nft.remove("mv0", index)
    on_vlan.ip("link", "set", f"v0.{VID}", "type", "vlan", "reorder_hdr", "on")


GUESTS = f"""
version: 1
networks:
  dmz: {{parent: v0, vlan: {VID}}}
vms:
  web1: {{nics: [{{network: dmz, mac: "{OWN.hex(":")}"}}]}}
  web2: {{nics: [{{network: dmz, mac: "52:54:00:00:00:08"}}]}}
"""


def test_guests_share_a_vlan_of_their_parent(wired: Namespace) -> None:
    """On a device that goes with the last of them; and without a header before their frames."""
    device = f"v0.{VID}"
    with given(wired, GUESTS, "web2-0"):
        with given(wired, GUESTS, "web1-0") as taps:
            macvtap = taps["web1-0"]
            assert macvtap.has_header() == is_safe(os.uname().release)
            found = arriving(macvtap, wired.raw("v1"), ON_WIRE)
            stopped = {"kernel", "macs", "tags"}
            assert found == {case.name for case in CASES if not case.stopped_by & stopped}
        assert wired.link(device)["ifalias"] == "pyqemu-ifup/1 vlan network=dmz"
    assert sorted(wired.links()) == ["lo", "v0", "v1"]


def test_a_vlan_of_somebody_else_s_stays_and_keeps_its_guests_in(on_vlan: Namespace) -> None:
    with given(on_vlan, GUESTS, "web1-0"):
        assert on_vlan.link("web1-0")["link"] == f"v0.{VID}"
    assert f"v0.{VID}" in on_vlan.links()
    on_vlan.ip("link", "set", f"v0.{VID}", "type", "vlan", "reorder_hdr", "off")
    with pytest.raises(Failure) as refused, given(on_vlan, GUESTS, "web1-0"):
        pass
    assert (refused.value.status, refused.value.what) == (71, f"v0.{VID} has reorder_hdr off")
    assert "web1-0" not in on_vlan.links()
    on_vlan.ip("link", "set", f"v0.{VID}", "type", "vlan", "reorder_hdr", "on")


@pytest.mark.parametrize(
    "check",
    [
        here.test_what_is_loaded_is_read_back_and_shown,
        here.test_no_frame_passes_while_chains_are_replaced,
        here.test_chains_of_an_older_link_go_with_the_load,
    ],
)
def test_it_is_so_on_this_kernel_too(check: Callable[[Namespace], None], wired: Namespace) -> None:
    check(wired)
