"""What explain prints of a network that is made for its first tap, run as a person pastes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab.dns import servers
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.taps import Tap

NAT = {
    "both families, and all there is": {
        "ipv4": "192.168.76.1/24", "ipv6": "fd00:76::1/64", "dns": {"domain": "lab.test"},
        "dhcp": {"range": "192.168.76.100-199", "hosts": {"52:54:00:aa:00:01": "192.168.76.10"}},
        "forward": [{"from": "127.0.0.1:2222/tcp", "to": "192.168.76.10:22"}],
        "host": ["5000/tcp", "6000-6010/udp"],
    },
    "IPv4, without a dnsmasq": {"ipv4": "192.168.76.1/24", "dhcp": False, "dns": False},
}  # fmt: skip
FORWARDING = ("ipv4/ip_forward", "ipv6/conf/all/forwarding")


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path) -> Hooks:
    require("dnsmasq")
    return Hooks(tmp_path / "hooks", netns.name)


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
        "addresses": [(each["local"], each["prefixlen"]) for each in addresses],
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
    tap = netns.tap("web0")
    netns.ip("link", "set", "web0", "address", "02:00:00:00:00:77")
    return tap


def pasted(text: str) -> str:
    """Return the lines of a block of commands, as whoever marks them with the mouse has them."""
    lines = text.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("commands, "))
    end = next((n for n in range(begin, len(lines)) if not lines[n]), len(lines))
    return "\n".join(lines[begin + 1 : end]) + "\n"


@pytest.mark.parametrize(("nat", "shell"), list(zip(NAT, ("dash", "bash"), strict=True)))
def test_the_look_afterwards_is_that_after_an_up(
    netns: Namespace, hooks: Hooks, nat: str, shell: str
) -> None:
    networks = {"lab": {"bridge": "labbr0", "mtu": 1400, "nat": NAT[nat]}}
    rules = [{"tap": "*", "network": "lab"}]
    hooks.write_policy(json.dumps({"version": 1, "networks": networks, "rules": rules}))
    before = [netns.run(["cat", f"/proc/sys/net/{name}"]).stdout for name in FORWARDING]
    tap = a_tap(netns)
    assert hooks.up("web0").returncode == 0
    wanted = looked_at(netns)
    assert hooks.down("web0").returncode == 0
    tap.close()
    for name, value in zip(FORWARDING, before, strict=True):
        netns.run(["sh", "-c", f"echo {value.strip()} >/proc/sys/net/{name}"])
    # Told before the tap is there, in text and as JSON.
    told = pasted(hooks.ctl("explain", "web0").stdout)
    lines = json.loads(hooks.ctl_warm("explain", "web0", "--json").stdout)["commands"]
    assert [line.strip() for line in told.splitlines()] == lines
    tap = a_tap(netns)
    netns.run([shell, "-e"], input=told)
    found = looked_at(netns)
    for key, value in wanted.items():
        assert found[key] == value
    (row,) = json.loads(hooks.ctl_warm("status", "--json").stdout)["taps"]
    assert (row["state"], row["differences"]) == ("ok", [])
    # And it is ours to take away: nothing of it is left.
    assert hooks.down("web0").returncode == 0
    tap.close()
    assert "labbr0" not in netns.links() and not servers(netns)
    for name, value in zip(FORWARDING, before, strict=True):
        netns.run(["sh", "-c", f"echo {value.strip()} >/proc/sys/net/{name}"])
