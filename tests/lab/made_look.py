"""Networks with `nat:` of each form, and all that making one sets, looked at as one value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lab.dns import servers
from lab.netns import Namespace
from lab.taps import Tap

NAT: dict[str, dict[str, Any]] = {
    "both families, and all there is": {
        "ipv4": "192.168.76.1/24", "ipv6": "fd00:76::1/64", "dns": {"domain": "lab.test"},
        "dhcp": {"range": "192.168.76.100-199", "hosts": {"52:54:00:aa:00:01": "192.168.76.10"}},
        "forward": [{"from": "127.0.0.1:2222/tcp", "to": "192.168.76.10:22"}],
        "host": ["5000/tcp", "6000-6010/udp"],
    },
    "IPv4, without a dnsmasq": {"ipv4": "192.168.76.1/24", "dhcp": False, "dns": False},
    "IPv4, with DHCP alone": {"ipv4": "192.168.76.1/24", "dns": False},
    "IPv4, with DNS alone": {"ipv4": "192.168.76.1/24", "dhcp": False},
    "IPv6 alone": {"ipv6": "fd00:76::1/64"},
    "IPv6, without DNS": {"ipv6": "fd00:76::1/64", "dns": False},
    "nothing beyond this host": {
        "ipv4": "192.168.76.1/24", "ipv6": "fd00:76::1/64", "outbound": False, "host": [],
    },
    "a forward of all addresses": {
        "ipv4": "192.168.76.1/24", "outbound": False,
        "forward": [{"from": "0.0.0.0:2222/udp", "to": "192.168.76.10:22"}],
    },
}  # fmt: skip
FORWARDING = ("ipv4/ip_forward", "ipv6/conf/all/forwarding")
CHANGES = [(old, new) for old, new in zip(NAT, [*NAT][1:] + [*NAT][:1], strict=True)]
"""Edits of the policy: each form in the place of another."""


def looked_at(netns: Namespace) -> dict[str, Any]:
    """Return all that making the network sets."""
    look = netns.run
    links: dict[str, dict[str, Any]] = {}
    for name in ("labbr0", "web0"):
        link = netns.link(name)
        links[name] = {
            key: link.get(key)
            for key in (
                "flags",
                "mtu",
                "address",
                "master",
                "txqlen",
                "ifalias",
                "inet6_addr_gen_mode",
            )
        }
    mark = links["web0"].pop("ifalias").split()
    folder = Path(f"/run/pyqemu-ifup/lab@{netns.inode}")
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    words = ["ip", "-j", "address", "show", "dev", "labbr0"]
    addresses = json.loads(look(words).stdout)[0]["addr_info"]
    return {
        **links,
        "mark": [word for word in mark if not word.startswith(("pid=", "start="))],
        "addresses": sorted((each["local"], each["prefixlen"]) for each in addresses),
        "switches": look(
            [
                "sh",
                "-c",
                "cd /proc/sys/net && grep -rs . ipv4/conf/labbr0 ipv6/conf/labbr0 "
                f"ipv6/conf/web0 {' '.join(FORWARDING)} | grep -v stable_secret",
            ]
        ).stdout,
        "table": look(["nft", "list", "ruleset"]).stdout,
        "filters": look(["tc", "filter", "show", "dev", "labbr0", "ingress"]).stdout,
        "files": sorted(files - {"leases", "lock"}),
        "settings": (folder / "dnsmasq.conf").read_text() if "dnsmasq.conf" in files else None,
        "servers": len(servers(netns)),
    }


def a_tap(netns: Namespace) -> Tap:
    """Return a tap `web0` that has the same MAC each time."""
    tap = netns.tap("web0")
    netns.ip("link", "set", "web0", "address", "02:00:00:00:00:77")
    return tap
