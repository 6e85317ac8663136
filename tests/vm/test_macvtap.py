"""Filters at a macvtap on a link of a VLAN, and on an older kernel than this machine's may be."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

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
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import nic_port
from pyqemu_ifup import kinds
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers import nft
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.guards.nft import link_chains
from pyqemu_ifup.host import Host
from pyqemu_ifup.kinds import macvtap
from pyqemu_ifup.kinds.macvtap import is_safe
from pyqemu_ifup.look import FRESH
from pyqemu_ifup.ops import Op

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


DEVICE = f"v0.{VID}"


def kept(namespace: Namespace) -> tuple[object, ...]:
    """Return what is set of the VLAN device, lest the host takes in what comes there, and marks."""
    path = f"/proc/sys/net/ipv4/conf/{DEVICE}/rp_filter"
    link = namespace.link(DEVICE)
    ipv6 = link.get("inet6_addr_gen_mode")
    filters = namespace.run(["cat", path]).stdout.strip()
    return filters, ipv6, link["ifalias"], link["group"], "UP" in link["flags"]


def test_vlans_of_a_provider_are_others(wired: Namespace) -> None:
    lines = f"link add link v0 name stag up type vlan proto 802.1ad id {VID}"
    wired.run(["ip", "-batch", "-"], input=lines)
    with given(wired, GUESTS, "web1-0"):
        assert wired.link("web1-0")["link"] == DEVICE
    assert sorted(wired.links()) == ["lo", "stag", "v0", "v1"]
    wired.ip("link", "del", "stag")


def test_a_vlan_that_a_guest_uses_is_never_made_anew(wired: Namespace) -> None:
    lines = (
        f"link add link v0 name {DEVICE} group {macvtap.GROUP} type vlan id {VID}",
        f"link set {DEVICE} up",
        f"link add link {DEVICE} name mv0 type macvtap mode bridge",
    )
    wired.run(["ip", "-batch", "-"], input="\n".join(lines))
    index = wired.link(DEVICE)["ifindex"]
    with given(wired, GUESTS, "web1-0"):
        assert wired.link("mv0")["link"] == wired.link("web1-0")["link"] == DEVICE
        assert wired.link(DEVICE)["ifindex"] == index
        assert kept(wired)[0] == "1"
    assert "mv0" in wired.links()
    wired.ip("link", "del", DEVICE)


@pytest.mark.parametrize("cleans", [True, False])
def test_a_vlan_that_is_half_made_is_never_brought_up(
    cleans: bool, wired: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Host.run

    async def fail(self: Host, op: Op) -> None:
        if isinstance(op, macvtap.KeepFromHost) or (
            isinstance(op, macvtap.DropVlan) and not cleans
        ):
            raise Failure(Status.REFUSED, type(op).__name__)
        await run(self, op)

    with monkeypatch.context() as patched:
        patched.setattr(Host, "run", fail)
        with pytest.raises(Failure) as refused, given(wired, GUESTS, "web1-0"):
            pass
    assert refused.value.what == "KeepFromHost"
    assert (DEVICE in wired.links()) == (not cleans)
    with given(wired, GUESTS, "web1-0"):
        assert kept(wired)[0] == "1"
    assert sorted(wired.links()) == ["lo", "v0", "v1"]


def test_what_is_printed_of_a_vlan_makes_the_same(wired: Namespace) -> None:
    policy = parse_policy([Source("p.yaml", GUESTS.encode())])
    port = nic_port(policy, policy.vms["web1"].nics[0])
    fresh = replace(FRESH, name="web1-0", mac=OWN.hex(":"), ipv6_disabled=False)
    ipv6 = os.path.exists("/proc/sys/net/ipv6")

    def commands() -> list[str]:
        with Netlink() as kernel:
            parent = kernel.look_up("v0")
            assert parent is not None
            link = fresh if ipv6 else replace(fresh, ipv6_disabled=None)
            plan = macvtap.making(port, link, parent, kernel.links())
        return [line for op in plan for line in op.commands()]

    with given(wired, GUESTS, "web1-0"):
        made = kept(wired)
        assert len(commands()) == 2
    wired.run(["sh", "-ec", "\n".join(commands())])
    assert kept(wired) == made
    wired.ip("link", "del", DEVICE)


def test_a_vlan_goes_though_two_guests_end_at_once(wired: Namespace) -> None:
    with given(wired, GUESTS, "web1-0", "web2-0"):
        with Host(None, Deadline(60), lambda command: None) as host:
            seen = [kinds.look(host, name, "v0") for name in ("web1-0", "web2-0")]
            for op in [op for each in seen for op in macvtap.unmake(each)]:
                host.finish(host.run(op))
        assert sorted(wired.links()) == ["lo", "v0", "v1"]


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
