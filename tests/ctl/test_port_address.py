"""What doctor prints for an address of this host's on a bridge's port.

Pasted, it has the bridge have all that the port had; where that is not sure, it is words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab.clinic import Clinic
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch


@pytest.fixture
def clinic(netns: Namespace, tmp_path: Path) -> Clinic:
    """A host with a bridge."""
    return Clinic(netns, Hooks(tmp_path / "hooks", netns=netns.name), tmp_path)


W0 = ("link add w0 up type veth peer name w1", "link set w1 up", "address add 10.7.0.1/24 dev w0")
STATIC = ("address add 192.0.2.5/24 dev e0", "route add default via 192.0.2.254")
SIX = "address add 2001:db8::5/64 dev e0 nodad"
NEAR = ("address add 203.0.113.9/32 dev e0", "route add 10.255.255.1 dev e0")
WHOLE: dict[str, tuple[str, ...]] = {
    "secondaries": (
        STATIC[0],
        "address add 192.0.2.6/24 dev e0",
        SIX,
        STATIC[1],
        "route add 198.51.100.0/24 via 192.0.2.253",
        "-6 route add default via 2001:db8::1 dev e0",
    ),
    "a bridge that is down": ("link set br0 down", *STATIC),
    "a peer": ("address add 10.0.0.1 peer 10.0.0.2 dev e0", "route add default via 10.0.0.2"),
    "a peer of IPv6": ("address add 2001:db8::1 peer 2001:db8::2 dev e0 nodad",),
    "a router by its link's address": (SIX, "-6 route add default via fe80::1 dev e0"),
    "a router that is told to be near": (
        *NEAR,
        "route add default via 10.255.255.1 dev e0 proto static",
    ),
    "a broadcast": ("address add 192.0.2.5/24 broadcast + dev e0", STATIC[1]),
    "two networks": (
        STATIC[0],
        "address add 10.1.0.1/16 dev e0",
        "address add 10.1.0.2/16 dev e0",
        STATIC[1],
    ),
    "an address on both": (STATIC[0], "address add 192.0.2.5/24 dev br0", STATIC[1]),
    "another of its network on the bridge": ("address add 192.0.2.9/24 dev br0", *STATIC),
    "another default route": (*W0, *STATIC, "route add default via 10.7.0.254 metric 600"),
}
IN_WORDS: dict[str, tuple[tuple[str, ...], str]] = {
    "onlink": (
        (*NEAR, "route add default via 10.255.255.1 dev e0 onlink"),
        "the route default via 10.255.255.1 has onlink",
    ),
    "a metric": (
        (STATIC[0], "route add default via 192.0.2.254 metric 50"),
        "the route default via 192.0.2.254 has the metric 50",
    ),
    "a source": (
        (STATIC[0], "route add default via 192.0.2.254 src 192.0.2.5"),
        "the route default via 192.0.2.254 has more to it (prefsrc)",
    ),
    "an MTU of a route's": (
        (STATIC[0], "route add default via 192.0.2.254 mtu 1400"),
        "the route default via 192.0.2.254 has more to it (metrics)",
    ),
    "another table": (
        (*STATIC, "route add default via 192.0.2.253 table 100"),
        "the route default via 192.0.2.253 is in table 100",
    ),
    "a type of service": (
        (*STATIC, "route add 10.9.0.0/16 via 192.0.2.253 tos 0x10"),
        "the route 10.9.0.0/16 via 192.0.2.253 has the type 1, scope 0, tos 16",
    ),
    "several routers": (
        (STATIC[0], "route add default nexthop via 192.0.2.253 dev e0 nexthop via 192.0.2.254"),
        "the route default has several routers",
    ),
    "several routers of IPv6": (
        (SIX, "-6 route add default nexthop via 2001:db8::1 dev e0 nexthop via 2001:db8::2 dev e0"),
        "the route default has several routers",
    ),
    "a lease": (
        ("address add 192.0.2.5/24 dev e0 valid_lft 3600 preferred_lft 1800",),
        "192.0.2.5/24 has an end, as a DHCP client's",
    ),
    "an advertised address": (
        ("address add 2001:db8::5/64 dev e0 nodad valid_lft 3600 preferred_lft 1800",),
        "2001:db8::5/64 has an end, as a DHCP client's or an advertised one",
    ),
    "a DHCP client's route": (
        (STATIC[0], "route add default via 192.0.2.254 metric 100 proto dhcp"),
        "the route default via 192.0.2.254 is by the protocol dhcp",
    ),
    "a label": (("address add 192.0.2.5/24 dev e0 label e0:web",), "192.0.2.5/24 has a label"),
    "no route of its own": (
        ("address add 192.0.2.5/24 dev e0 noprefixroute",),
        "192.0.2.5/24 is without its route",
    ),
    "an address with a metric": (
        ("address add 192.0.2.5/24 dev e0 metric 7",),
        "192.0.2.5/24 has a metric",
    ),
    "a scope": (("address add 192.0.2.5/24 dev e0 scope link",), "192.0.2.5/24 has the scope 253"),
    "another default route": (
        (*W0, *STATIC, "route append default via 10.7.0.254"),
        "the route default via 192.0.2.254 has a twin by another link",
    ),
    "a router that is nowhere": (
        (*NEAR, "route add default via 10.255.255.1 dev e0", "route del 10.255.255.1 dev e0"),
        "the route default via 10.255.255.1 leads to a router that is on no network here",
    ),
}


def state(host: Namespace, link: str) -> tuple[list[Any], list[Any]]:
    """Return the addresses and the routes of a link, but for those that each link has."""
    (told,) = host.ip("address", "show", "dev", link)
    gone = {"label", "tentative"}
    addresses = [
        {key: value for key, value in each.items() if key not in gone}
        for each in told["addr_info"]
        if each["scope"] != "link"
    ]
    routes = [
        {key: value for key, value in each.items() if key not in ("dev", "flags")}
        for version in ("-4", "-6")
        for each in host.ip(version, "route", "show", "table", "all", "dev", link)
        if each["dst"] not in ("fe80::/64", "ff00::/8")
        and each.get("type") not in ("local", "broadcast", "multicast", "anycast")
    ]
    return addresses, sorted(routes, key=str)


def with_it(clinic: Clinic, lines: tuple[str, ...], bridge: str = "br0") -> None:
    """Have a link with what these commands make of it be a port of the bridge."""
    clinic.ip("link", "add", "e0", "up", "type", "veth", "peer", "name", "far")
    clinic.ip("link", "set", "far", "up")
    for line in lines:
        clinic.netns.run(["ip", *line.split()])
    if bridge == "br0":
        clinic.ip("link", "set", "e0", "master", bridge)
    else:
        clinic.switch.vsctl("add-port", bridge, "e0")


def without_it(clinic: Clinic) -> None:
    for link in ("e0", "w0"):
        clinic.netns.run(["ip", "link", "del", link], check=False)


def check_whole(clinic: Clinic, lines: tuple[str, ...], bridge: str = "br0") -> None:
    with_it(clinic, lines, bridge)
    before, there = state(clinic.netns, "e0"), state(clinic.netns, bridge)
    (found,) = clinic.find("port-address")
    clinic.mend(found["command"])
    addresses, routes = state(clinic.netns, bridge)
    assert state(clinic.netns, "e0") == ([], [])
    assert clinic.find("port-address") == []
    for each in before[0]:
        if each not in there[0]:
            # NOTE: beside one that the bridge has, an address of its network is a secondary one.
            like = [{**each, "secondary": True}, each] if there[0] else [each]
            assert any(other in addresses for other in like), (each, addresses)
    # NOTE: such a network's route is there already, of the address that the bridge has.
    near = {each["dst"] for each in there[1]}
    assert [each for each in before[1] if each not in routes and each["dst"] not in near] == []
    assert all(each in addresses for each in there[0])
    if not there[0]:
        assert addresses == before[0]


def test_what_is_on_a_port_is_moved_whole(clinic: Clinic) -> None:
    for title, lines in WHOLE.items():
        with clinic.healthy():
            clinic.ip("address", "flush", "dev", "br0")
            print(title)
            check_whole(clinic, lines)
            without_it(clinic)


@pytest.mark.parametrize(("lines", "why"), IN_WORDS.values(), ids=IN_WORDS)
def test_what_no_command_moves_whole_is_told_in_words(
    clinic: Clinic, lines: tuple[str, ...], why: str
) -> None:
    with clinic.healthy():
        with_it(clinic, lines)
        (found,) = clinic.find("port-address")
        assert found["command"] is None
        assert why in found["do"], found["do"]
        assert "configure br0 in its place" in found["do"]
        without_it(clinic)


def test_a_bridge_without_ipv6_is_given_none(clinic: Clinic) -> None:
    with clinic.healthy():
        clinic.netns.run(["sysctl", "-qw", "net.ipv6.conf.br0.disable_ipv6=1"])
        with_it(clinic, (*STATIC, SIX))
        (found,) = clinic.find("port-address")
        assert found["command"] is None
        assert "br0 has no IPv6 (disable_ipv6)" in found["do"]
        without_it(clinic)


def test_an_uplink_of_open_vswitch(clinic: Clinic, ovs: OpenVSwitch) -> None:
    clinic.ovs = ovs
    with clinic.healthy():
        clinic.ip("link", "set", "br-int", "down")
        check_whole(clinic, STATIC, "br-int")
        without_it(clinic)
