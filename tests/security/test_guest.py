"""What a guest of a network with nat: can send, and to whom: its frames, sniffed outside."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lab.nat_site import (
    GATEWAY,
    GATEWAY6,
    GUEST,
    GUEST6,
    MAC,
    OUTSIDE,
    OUTSIDE6,
    PUBLIC,
    SUBNET,
    SUBNET6,
    Listener,
    NatSite,
    drain,
    is_source,
    seen,
)
from lab.needs import require
from lab.netns import Namespace
from lab.taps import Tap

NEIGHBOUR, NEIGHBOUR6 = "198.51.100.7", "2001:db8:9::7"
"""Beyond the uplink's own link."""


@pytest.fixture
def site(netns: Namespace, tmp_path: Path) -> Iterator[NatSite]:
    with Namespace() as outside:
        found = NatSite(netns, outside, tmp_path, {})
        yield found
        outside.close_kept()


def ipv4_kinds() -> dict[str, Any]:
    """Return packets of many kinds from the guest to somebody outside, by name."""
    from scapy.layers.inet import (
        ICMP,
        IP,
        TCP,
        UDP,
        IPOption_LSRR,
        IPOption_Router_Alert,
        IPOption_RR,
        IPOption_SSRR,
        IPOption_Timestamp,
    )
    from scapy.layers.l2 import GRE
    from scapy.layers.sctp import SCTP, SCTPChunkAbort, SCTPChunkData, SCTPChunkInit

    def ip(**more: Any) -> Any:
        return IP(src=GUEST, dst=OUTSIDE, **more)

    inner = IP(src=NEIGHBOUR, dst=GUEST) / UDP(sport=53, dport=999)
    own = IP(src=GUEST, dst=NEIGHBOUR) / TCP(sport=999, dport=80)
    whole = bytes(UDP(sport=1000, dport=1004, len=72)) + b"x" * 64
    kinds = {
        "udp": ip() / UDP(sport=1000, dport=1001) / b"x",
        "udp-bad-sum": ip() / UDP(sport=1002, dport=1001, chksum=1) / b"x",
        "udp-short": ip(proto=17) / b"\0\1",
        "udp-length": ip() / UDP(sport=1003, dport=1, len=2) / b"x",
        "udp-port-0": ip() / UDP(sport=0, dport=0) / b"x",
        "icmp-code": ip() / ICMP(type=8, code=77),
        "icmp-unknown": ip() / ICMP(type=200),
        "icmp-bad-sum": ip() / ICMP(type=8, chksum=1),
        "icmp-reply": ip() / ICMP(type=0, id=9),
        "icmp-mask": ip() / ICMP(type=18),
        "icmp-router": ip() / ICMP(type=9),
        "icmp-redirect": ip() / ICMP(type=5, gw=GUEST) / inner,
        "icmp-port": ip() / ICMP(type=3, code=3) / inner,
        "icmp-own": ip() / ICMP(type=3, code=3) / own,
        "icmp-quench": ip() / ICMP(type=4) / inner,
        "icmp-time": ip() / ICMP(type=11) / inner,
        "icmp-parameter": ip() / ICMP(type=12) / inner,
        "icmp-short": ip(proto=1) / b"\3\3",
        "fragment-first": ip(id=7, flags="MF", proto=17) / whole[:40],
        "fragment-last": ip(id=7, frag=5, proto=17) / whole[40:],
        "fragment-alone": ip(id=9, frag=5, proto=17) / whole[40:],
        "fragment-tiny": ip(id=8, flags="MF", frag=0, proto=6) / b"\0\1\0\2\0\0\0\0",
        "gre": ip() / GRE() / inner,
        "gre-pptp": ip(proto=47) / bytes.fromhex("30 01 88 0b 00 04 00 01 00 00 00 01"),
        "ipip": ip(proto=4) / own,
        "ipv6-in": ip(proto=41) / (b"\x60" + bytes(39)),
        "esp": ip(proto=50) / bytes(32),
        "ah": ip(proto=51) / bytes(32),
        "igmp": ip(proto=2) / bytes.fromhex("1600 e9ff 0000 0000"),
        "ospf": ip(proto=89) / bytes(24),
        "dccp": ip(proto=33) / bytes(24),
        "udplite": ip(proto=136) / bytes(16),
        "raw": ip(proto=255) / b"x",
        "raw-0": ip(proto=0) / b"x",
        "sctp-init": ip() / SCTP(sport=5, dport=6) / SCTPChunkInit(init_tag=1),
        "sctp-data": ip() / SCTP(sport=7, dport=6, tag=9) / SCTPChunkData(data=b"x"),
        "sctp-abort": ip() / SCTP(sport=8, dport=6, tag=9) / SCTPChunkAbort(),
        "sctp-bare": ip() / SCTP(sport=9, dport=6, tag=9),
        "ttl-1": ip(ttl=1) / UDP(sport=1, dport=2),
        "option-record": ip(options=IPOption_RR()) / UDP(sport=11, dport=2),
        "option-time": ip(options=IPOption_Timestamp()) / UDP(sport=12, dport=2),
        "option-alert": ip(options=IPOption_Router_Alert()) / UDP(sport=13, dport=2),
        "option-loose": IP(src=GUEST, dst=GATEWAY, options=IPOption_LSRR(routers=[OUTSIDE]))
        / UDP(sport=14, dport=2),
        "option-strict": IP(src=GUEST, dst=GATEWAY, options=IPOption_SSRR(routers=[OUTSIDE]))
        / UDP(sport=15, dport=2),
        "land": IP(src=GATEWAY, dst=OUTSIDE) / UDP(sport=1, dport=2),
        "broadcast-source": IP(src=f"{SUBNET}255", dst=OUTSIDE) / UDP(sport=1, dport=2),
    }
    odd = ("A", "FA", "R", "RA", "SA", "SF", "SR", "", "FPU", "FSRPAU", "PA", "U", "SU", "F")
    for flags in odd:
        name = f"tcp-{flags or 'none'}"
        kinds[name] = ip() / TCP(sport=2000 + len(kinds), dport=80, flags=flags, seq=1, ack=1)
    kinds["tcp-offset"] = ip() / TCP(sport=3000, dport=80, flags="S", dataofs=2)
    kinds["tcp-bad-sum"] = ip() / TCP(sport=3001, dport=80, flags="S", chksum=1)
    kinds["tcp-short"] = ip(proto=6) / b"\0\1\0\2"
    return kinds


def ipv6_kinds() -> dict[str, Any]:
    """Return the same over IPv6."""
    from scapy.layers.inet import TCP, UDP
    from scapy.layers.inet6 import (
        ICMPv6DestUnreach,
        ICMPv6EchoReply,
        ICMPv6EchoRequest,
        ICMPv6MLReport2,
        ICMPv6ND_NA,
        ICMPv6ND_NS,
        ICMPv6ND_RA,
        ICMPv6ND_Redirect,
        ICMPv6ND_RS,
        ICMPv6PacketTooBig,
        ICMPv6TimeExceeded,
        IPv6,
        IPv6ExtHdrDestOpt,
        IPv6ExtHdrFragment,
        IPv6ExtHdrHopByHop,
        IPv6ExtHdrRouting,
    )

    def ip(**more: Any) -> Any:
        return IPv6(src=GUEST6, dst=OUTSIDE6, **more)

    inner = IPv6(src=NEIGHBOUR6, dst=GUEST6) / UDP(sport=53, dport=999)
    udp: Any = UDP(sport=1000, dport=1001) / b"x"
    return {
        "udp": ip() / udp,
        "udp-bad-sum": ip() / UDP(sport=1, dport=2, chksum=1) / b"x",
        "udp-short": ip(nh=17) / b"\0\1",
        "echo-reply": ip() / ICMPv6EchoReply(id=5),
        "echo-bad-sum": ip() / ICMPv6EchoRequest(cksum=1),
        "unreachable": ip() / ICMPv6DestUnreach() / inner,
        "too-big": ip() / ICMPv6PacketTooBig(mtu=1280) / inner,
        "time": ip() / ICMPv6TimeExceeded() / inner,
        "unknown": ip(nh=58) / bytes.fromhex("c800 0000 0000 0000"),
        "ns": ip() / ICMPv6ND_NS(tgt=OUTSIDE6),
        "na": ip() / ICMPv6ND_NA(tgt=GUEST6),
        "rs": ip() / ICMPv6ND_RS(),
        "ra": ip() / ICMPv6ND_RA(),
        "redirect": ip() / ICMPv6ND_Redirect(tgt=GUEST6, dst=NEIGHBOUR6),
        "mld": ip() / ICMPv6MLReport2(),
        "tcp-ack-reset": ip() / TCP(sport=3, dport=80, flags="RA"),
        "tcp-none": ip() / TCP(sport=4, dport=80, flags=""),
        "hop-by-hop": ip() / IPv6ExtHdrHopByHop() / udp,
        "destination": ip() / IPv6ExtHdrDestOpt() / UDP(sport=21, dport=2),
        "routing": ip() / IPv6ExtHdrRouting(addresses=[NEIGHBOUR6]) / UDP(sport=22, dport=2),
        "routing-0": IPv6(src=GUEST6, dst=GATEWAY6)
        / IPv6ExtHdrRouting(type=0, addresses=[OUTSIDE6]) / UDP(sport=23, dport=2),
        "segment": IPv6(src=GUEST6, dst=GATEWAY6)
        / IPv6ExtHdrRouting(type=4, addresses=[OUTSIDE6]) / UDP(sport=24, dport=2),
        "fragment": ip() / IPv6ExtHdrFragment(offset=0, m=1, id=9) / UDP(sport=25, dport=2)
        / bytes(32),
        "fragment-last": ip() / IPv6ExtHdrFragment(offset=99, m=0, id=10, nh=17) / bytes(32),
        "no-next": ip(nh=59),
        "esp": ip(nh=50) / bytes(32),
        "gre": ip(nh=47) / bytes(16),
        "sctp": ip(nh=132) / bytes(16),
        "unknown-next": ip(nh=253) / bytes(16),
        "ipip": ip(nh=4) / bytes(40),
        "land": IPv6(src=GATEWAY6, dst=OUTSIDE6) / udp,
    }  # fmt: skip


def beacon() -> Any:
    """Return a packet that is let through."""
    from scapy.layers.inet import IP, UDP

    head: Any = IP(src=GUEST, dst=OUTSIDE)
    return head / UDP(sport=7, dport=7) / b"and that is all"


@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_nothing_leaves_with_an_address_of_the_subnet(
    site: NatSite, netns: Namespace, tracked: bool
) -> None:
    """Of all kinds that connection tracking calls invalid, does not know, or is told to leave."""
    tap = site.up()
    if not tracked:
        netns.run(["nft", "add table inet other; add chain inet other first "
                   "{ type filter hook prerouting priority raw; policy accept; }; "
                   "add rule inet other first udp dport != 7 notrack"])  # fmt: skip
    drain(site.uplink)
    kinds = {**ipv4_kinds(), **{f"{name}-6": each for name, each in ipv6_kinds().items()}}
    for packet in kinds.values():
        tap.send(NatSite.frame(packet))
    tap.send(NatSite.frame(beacon()))
    found = seen(site.uplink, b"and that is all")
    leaked = [frame.hex() for frame in found if is_source(frame, (SUBNET, SUBNET6))]
    assert leaked == []
    assert tracked is (b"\x03\xe8\x03\xe9" in b"".join(found)), "what is translated leaves"
    if not tracked:
        netns.run(["nft", "delete", "table", "inet", "other"])
    site.close()


def ways_out() -> dict[str, Any]:
    """Return packets to where no guest may reach, all with the same words in them."""
    from scapy.layers.inet import IP, UDP
    from scapy.layers.inet6 import IPv6

    udp: Any = UDP(sport=5, dport=80) / b"out it goes"
    four = ("169.254.169.254", "169.254.1.1", "100.100.100.200", "168.63.129.16", "224.0.0.251",
            "239.1.2.3", "255.255.255.255", "127.0.0.1", "203.0.113.255")  # fmt: skip
    six = ("fd00:ec2::254", "fd20:ce::254", "fe80::1", "ff02::fb", "ff0e::1", "::1",
           "::ffff:127.0.0.1", "::ffff:169.254.169.254")  # fmt: skip
    found = {to: IP(src=GUEST, dst=to) / udp for to in four}
    found.update({to: IPv6(src=GUEST6, dst=to) / udp for to in six})
    # NOTE: of these the kernel itself is to see to it that they go nowhere.
    found["from nobody"] = IP(src="0.0.0.0", dst=OUTSIDE) / udp
    found["from nobody 6"] = IPv6(src="::", dst=OUTSIDE6) / udp
    found["from the link"] = IPv6(src="fe80::9", dst=OUTSIDE6) / udp
    found["from elsewhere"] = IP(src=NEIGHBOUR, dst=OUTSIDE) / udp
    found["from elsewhere 6"] = IPv6(src=NEIGHBOUR6, dst=OUTSIDE6) / udp
    return found


def test_no_metadata_multicast_or_link_local_address_is_passed_on(
    site: NatSite, netns: Namespace
) -> None:
    """Whatever routes this host has, and where it serves such an address itself."""
    tap = site.up()
    netns.ip("route", "add", "169.254.0.0/16", "dev", "eth0")
    netns.ip("route", "add", "224.0.0.0/4", "dev", "eth0")
    netns.ip("address", "add", "169.254.169.254/32", "dev", "eth0")
    netns.run(["sysctl", "-qw", "net.ipv4.conf.all.bc_forwarding=1"])
    netns.run(["sysctl", "-qw", "net.ipv4.conf.labbr0.bc_forwarding=1"])
    with Listener(netns, "169.254.169.254", 80) as metadata:
        drain(site.uplink)
        for packet in ways_out().values():
            tap.send(NatSite.frame(packet))
        tap.send(NatSite.frame(beacon()))
        found = seen(site.uplink, b"and that is all")
        assert [each.hex() for each in found if b"out it goes" in each] == []
        assert metadata.heard() == []
    netns.ip("address", "del", "169.254.169.254/32", "dev", "eth0")
    netns.ip("route", "del", "169.254.0.0/16", "dev", "eth0")
    netns.ip("route", "del", "224.0.0.0/4", "dev", "eth0")
    site.close()


def test_who_is_outside_does_not_come_in(site: NatSite, netns: Namespace) -> None:
    """Neither to a guest, nor by the network's own gateway, whatever he routes through us."""
    tap = site.up()
    with Listener(netns, "0.0.0.0", 8080) as four, Listener(netns, "::", 8081) as six:
        for family, to, port in (
            (socket.AF_INET, GUEST, 9), (socket.AF_INET6, GUEST6, 9),
            (socket.AF_INET, GATEWAY, 8080), (socket.AF_INET6, GATEWAY6, 8081),
        ):  # fmt: skip
            with site.outside.enter(), socket.socket(family, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"in it comes", (to, port))
        with site.outside.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"to its own", (PUBLIC, 8080))
        assert four.wait() == b"to its own"
        assert (four.heard(), six.heard()) == ([], [])
    assert tap.recv(0.1, lambda frame: b"in it comes" in frame) is None
    site.close()


def answered(site: NatSite, tap: Tap, packets: dict[str, Any], least: set[str]) -> set[str]:
    """Return those of the packets, by name, that this host answers; it answers the last of them.

    And `least` of all, which are waited for: a program may answer later than the kernel.
    """
    from scapy.layers.inet import ICMP, IP, TCP, UDP
    from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6ND_NA
    from scapy.layers.l2 import Ether

    found: set[str] = set()
    for name, packet in packets.items():
        tap.send(NatSite.frame(packet, broadcast=name == "dhcp"))
        last = name

    def note(frame: bytes) -> bool:
        got: Any = Ether(frame)
        for name, packet in packets.items():
            if got.haslayer(TCP) and packet.haslayer(TCP):
                fits = got[TCP].dport == packet[TCP].sport and got[TCP].flags == "SA"
            elif got.haslayer(UDP) and packet.haslayer(UDP):
                fits = got[UDP].dport == packet[UDP].sport
            elif got.haslayer(ICMP) and packet.haslayer(ICMP):
                fits = got[ICMP].type == 0 and got[IP].src == packet[IP].dst
            else:
                fits = any(got.haslayer(layer) and name.startswith(word) for word, layer in (
                    ("echo-6", ICMPv6EchoReply), ("neighbour", ICMPv6ND_NA)))  # fmt: skip
            if fits:
                found.add(name)
        return last in found and least <= found

    assert tap.recv(20, note) is not None, found
    return found


def to_host() -> dict[str, Any]:
    """Return packets to services of the host's, by name, that it answers where it lets them in."""
    from scapy.layers.dhcp import BOOTP, DHCP
    from scapy.layers.dns import DNS, DNSQR
    from scapy.layers.inet import ICMP, IP, TCP, UDP
    from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, IPv6

    found: dict[str, Any] = {}

    def add(name: str, *layers: Any) -> None:
        whole = layers[0]
        for layer in layers[1:]:
            whole = whole / layer
        found[name] = whole

    def syn(port: int) -> Any:
        return TCP(sport=30000 + len(found), dport=port, flags="S", seq=1)

    four, six = IP(src=GUEST, dst=GATEWAY), IPv6(src=GUEST6, dst=GATEWAY6)
    for port in (8080, 8085, 8086, 9090):
        add(f"tcp-{port}", four, syn(port))
        add(f"tcp-{port}-6", six, syn(port))
        add(f"tcp-{port}-public", IP(src=GUEST, dst=PUBLIC), syn(port))
    add("dhcp", IP(src="0.0.0.0", dst="255.255.255.255"), UDP(sport=68, dport=67),
        BOOTP(chaddr=MAC, xid=5), DHCP(options=[("message-type", "discover"), "end"]))  # fmt: skip
    question = DNS(rd=1, qd=DNSQR(qname="nobody.lab.test"))
    for name, head in (("", four), ("-6", six)):
        add(f"dns{name}", head, UDP(sport=31000 + len(found), dport=53), question)
        add(f"dns-tcp{name}", head, syn(53))
    add("echo-public", IP(src=GUEST, dst=PUBLIC), ICMP(id=9))
    add("neighbour", IPv6(src=GUEST6, dst=GATEWAY6, hlim=255), ICMPv6ND_NS(tgt=GATEWAY6))
    add("echo-6", six, ICMPv6EchoRequest(id=7))
    add("echo", four, ICMP(id=8))
    return found


SERVED = {"dhcp", "dns", "dns-6", "dns-tcp", "dns-tcp-6", "neighbour", "echo-6", "echo"}
LISTED = {f"tcp-{port}{end}" for port in (8080, 8085, 8086) for end in ("", "-6", "-public")}
HOSTS: list[tuple[Any, set[str]]] = [
    ("any", set()), ([], SERVED), (["8080/tcp", "8085-8085/tcp", "8086/tcp"], SERVED | LISTED),
    (["8080-8086/tcp", "8085/udp"], SERVED | LISTED),
]  # fmt: skip


@pytest.mark.parametrize(("host", "lets"), HOSTS, ids=[str(row[0]) for row in HOSTS])
def test_of_the_host_a_guest_reaches_what_the_policy_lists(
    site: NatSite, netns: Namespace, host: Any, lets: set[str]
) -> None:
    require("dnsmasq")
    site.write_policy({"host": host, "dhcp": True, "dns": {"domain": "lab.test"}})
    tap = site.up()
    packets = to_host()
    with ExitStack() as stack:
        for port in (8080, 8085, 8086, 9090):
            stack.enter_context(Listener(netns, "::", port))
        least = lets or set(packets)
        assert answered(site, tap, packets, least) == least
    site.close()


def test_a_list_of_services_is_for_what_has_begun_before_too(
    site: NatSite, netns: Namespace
) -> None:
    """A datagram of a flow that was let in, and the answer to what the host has sent itself."""
    from scapy.layers.inet import IP, UDP

    tap = site.up()
    with Listener(netns, GATEWAY, 9090) as mine:
        head: Any = IP(src=GUEST, dst=GATEWAY)
        packet = NatSite.frame(head / UDP(sport=1000, dport=9090) / b"one")
        tap.send(packet)
        assert mine.wait() == b"one"
        mine.udp.sendto(b"answer", (GUEST, 1000))
        tap.send(packet)
        assert mine.wait() == b"one"
        site.write_policy({"host": ["8080/tcp"]})
        second = site.up("web1")
        tap.send(packet)
        mine.udp.sendto(b"own", (GUEST, 2000))
        tap.send(NatSite.frame(head / UDP(sport=2000, dport=9090) / b"two"))
        assert mine.wait() == b"two"
        assert mine.heard() == []
    site.close("web0", "web1")
    second.close()


def test_another_network_s_gateway_is_not_reached(site: NatSite, netns: Namespace) -> None:
    """Whatever serves there, by either protocol, and though `host: any` is all of this host."""
    from scapy.layers.inet import IP, UDP
    from scapy.layers.inet6 import IPv6

    nat = {"ipv4": "192.168.77.1/24", "ipv6": "fd00:77::1/64", "dhcp": False, "dns": False}
    site.write_policy({}, other={"bridge": "otherbr0", "nat": nat})
    tap, second = site.up(), netns.tap("other0")
    assert site.hooks.up("other0").returncode == 0
    with Listener(netns, "::", 9090) as mine:
        packets: list[Any] = [
            IP(src=GUEST, dst="192.168.77.1"), IPv6(src=GUEST6, dst="fd00:77::1"),
            IP(src=GUEST, dst="192.168.77.5"), IP(src=GUEST, dst=PUBLIC),
        ]  # fmt: skip
        for packet in packets:
            tap.send(NatSite.frame(packet / UDP(sport=5, dport=9090) / str(packet.dst).encode()))
        assert mine.wait() == PUBLIC.encode()
        assert mine.heard() == []
    site.close("web0", "other0")
    second.close()
