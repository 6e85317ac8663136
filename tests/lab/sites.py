"""A place to plug into: a switch with two networks, and our hooks with a policy for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch

HOME, OTHER, FLAT = "home", "other", "flat"
"""The networks. On Open vSwitch the first two are VLANs of one bridge, and FLAT is a Linux one."""
VLAN = {HOME: 100, OTHER: 200}
LINUX = {HOME: "br0", OTHER: "br1"}
HWADDR = "02:00:00:00:00:{:02x}"


@dataclass
class Site:
    """A namespace with the switch of `kind` and the hooks; `ovs` is None on Linux bridges."""

    kind: Literal["linux", "openvswitch"]
    netns: Namespace
    hooks: Hooks
    ovs: OpenVSwitch | None = None

    def __post_init__(self) -> None:
        """Make the bridges, their MACs pinned."""
        if self.ovs is None:
            self.bridges = LINUX
            for number, name in enumerate(LINUX.values()):
                self.netns.add_bridge(name, mac=HWADDR.format(number))
        else:
            self.bridges = {FLAT: "br0"}
            self.netns.add_bridge("br0", mac=HWADDR.format(0))
            self.ovs.add_bridge("br-int", hwaddr=HWADDR.format(9), mtu=1500)

    def write_policy(self, *rules: dict[str, Any], timeout: int = 10) -> None:
        """Put a policy of these rules in force."""
        networks: dict[str, Any] = {name: {"bridge": it} for name, it in self.bridges.items()}
        if self.ovs is not None:
            for name, vid in VLAN.items():
                networks[name] = {"bridge": "br-int", "vlan": vid, "ovsdb": self.ovs.db}
        policy = {"version": 1, "timeout": timeout, "networks": networks, "rules": rules}
        # NOTE: JSON is YAML, and in quotes each name stays what it is.
        self.hooks.write_policy(json.dumps(policy, indent=1))

    def all_on(self, network: str, *, timeout: int = 10) -> None:
        """Put a policy in force that plugs each tap into `network`."""
        self.write_policy({"tap": "*", "network": network}, timeout=timeout)

    def network_of(self, tap: str) -> str | None:
        """Return the network that the tap is in, proven by the live system; None: in none.

        A tap that is half attached, down for example, fails.
        """
        link = self.netns.links().get(tap)
        row = self.ovs.find("Port", tap) if self.ovs is not None else None
        if row is None:
            if link is None or "master" not in link:
                assert link is None or not link.get("ifalias"), link
                return None
            assert "UP" in link["flags"], link
            return next(name for name, it in self.bridges.items() if it == link["master"])
        assert self.ovs is not None and link is not None and "UP" in link["flags"], (row, link)
        assert "master" not in link or link["master"] == "ovs-system", link
        assert row["_uuid"] in self.ovs.row("Bridge", "br-int")["ports"]
        interface = self.ovs.row("Interface", tap)
        assert interface["ifindex"] == link["ifindex"] and interface["ofport"] > 0, interface
        assert row["vlan_mode"] == "access", row
        return next(name for name, vid in VLAN.items() if vid == row["tag"])

    def is_clean(self, tap: str) -> bool:
        """Tell whether nothing of ours is left of the tap, be it there or not."""
        link = self.netns.links().get(tap)
        if link is not None and (link.get("ifalias") or "master" in link or "UP" in link["flags"]):
            return False
        return self.ovs is None or self.ovs.find("Port", tap) is None

    def qemu_arguments(self, tap: str, *, id: str = "n0", more: str = "") -> list[str]:
        """Return QEMU's arguments for a tap netdev with both of our hooks."""
        scripts = f"script={self.hooks.ifup},downscript={self.hooks.ifdown}"
        return ["-netdev", f"tap,id={id},ifname={tap.replace(',', ',,')},{scripts}{more}"]


def both_switches(netns: Namespace, ovs: OpenVSwitch, folder: Path) -> Hooks:
    """Make br0 and Open vSwitch's br-int; return hooks with a rule for `lan*` and one for `sw*`."""
    netns.add_bridge("br0", mac=HWADDR.format(11))
    ovs.add_bridge("br-int", mtu=1500)
    hooks = Hooks(folder, netns=netns.name)
    hooks.write_policy(
        "version: 1\n"
        "networks:\n"
        "  lan: {bridge: br0}\n"
        f"  sw: {{bridge: br-int, ovsdb: '{ovs.db}', vlan: 100}}\n"
        "rules: [{tap: lan*, network: lan}, {tap: sw*, network: sw}]\n"
    )
    return hooks
