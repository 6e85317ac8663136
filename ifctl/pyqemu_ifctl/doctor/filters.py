"""Doctor's checks of the packet filters: those of this host, and those of networks with NAT."""

from __future__ import annotations

from collections.abc import Iterator

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Policy
from pyqemu_ifconf.shell import ifctl, nft_command, quote, readable, sh
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifup.drivers.nft_table import table_name
from pyqemu_ifup.kinds.check import Finding, finding_of
from pyqemu_ifup.made.guard import OLDER, find_guarded
from pyqemu_ifup.made.nat.firewalls import dropped_ways


def find_netfilter(scene: Scene) -> Iterator[Finding]:
    """Bridged frames that go through a FORWARD chain which drops."""
    for kind, families in (("iptables", ("ip", "inet")), ("ip6tables", ("ip6", "inet"))):
        dropping = [
            each for each in scene.chains if each.hook == "forward" and each.family in families
        ]
        if not dropping or not scene.bridges():
            continue
        where = dropping[0]
        chain = f"{where.family} {readable(where.table)} {readable(where.name)}"
        why = "guests on one bridge have ARP and no IP: their packets are dropped in silence"
        if kind in scene.call_iptables:
            yield Finding(
                f"br_netfilter sends bridged frames through {kind}, where {chain} drops",
                why,
                sh("sysctl", "-w", f"net.bridge.bridge-nf-call-{kind}=0"),
            )
        elif kind == "iptables":
            for name, bridge in scene.bridges().items():
                if bridge.calls_iptables:
                    yield Finding(
                        f"{quote(name)} sends its frames through iptables, where {chain} drops",
                        why,
                        sh(
                            "ip",
                            "link",
                            "set",
                            "dev",
                            name,
                            "type",
                            "bridge",
                            "nf_call_iptables",
                            "0",
                        ),
                    )


def find_bridge_filters(scene: Scene) -> Iterator[Finding]:
    """A chain of nftables' family bridge that drops what is forwarded."""
    for each in scene.chains:
        if each.family != "bridge" or each.hook not in ("prerouting", "forward", "postrouting"):
            continue
        if not scene.bridges():
            continue
        chain = f"{readable(each.table)} {readable(each.name)}"
        if each.rule is None:
            how = "by its policy"
            command = nft_command(
                "add chain bridge {table} {chain} {{ policy accept; }}",
                table=each.table,
                chain=each.name,
            )
        else:
            how = "by a rule without a condition"
            command = nft_command(
                f"delete rule bridge {{table}} {{chain}} handle {each.rule:d}",
                table=each.table,
                chain=each.name,
            )
        yield Finding(
            f"the nftables chain bridge {chain} ({readable(each.hook)}) drops frames {how}",
            "what no rule of its accepts, no guest on a Linux bridge sends or gets",
            command,
        )


def find_nat_filters(scene: Scene) -> Iterator[Finding]:
    """A FORWARD chain that drops what is forwarded for a network with NAT."""
    networks = [] if isinstance(scene.policy, Failure) else list(scene.policy.networks.values())
    for network in networks:
        if network.made is None:
            continue
        for chain in scene.chains:
            ways = dropped_ways(chain, network.place.name, network.made)
            if not ways:
                continue
            yield Finding(
                f"the chain {chain.family} {readable(chain.table)} {readable(chain.name)} drops "
                f"what is forwarded for network {quote(network.name)}",
                "its guests reach each other and this host, and nobody beyond it",
                chain.accepting(network.place.name, ways),
            )


def find_nat_tables(scene: Scene) -> Iterator[Finding]:
    """A network with NAT whose nft table is gone, not as loaded, or not as the policy says."""
    in_force = scene.policy if isinstance(scene.policy, Policy) else None
    networks = find_guarded(in_force, scene.links)
    for network, fault in scene.tables.items():
        what = f"the nft table inet {table_name(network)} of network {network} is {fault}"
        why = (
            "nothing keeps its guests from other networks, or others from its guests, and what "
            "they send may leave with their own addresses"
        )
        if fault == OLDER:
            why = "what the policy says since is not in force"
            yield Finding(what, why, ifctl("apply"))
        elif fault and networks[network].made is None:
            why += ", and the policy does not have what to load"
            yield Finding(what, why, None, do=networks[network].remedy)
        elif fault:
            yield Finding(what, why, ifctl("gc"))


def find_unmade(scene: Scene) -> Iterator[Finding]:
    """A network with NAT that an up could not make, or bring to what the policy says."""
    for network, failures in scene.unmet.items():
        for failure in failures:
            yield finding_of(
                failure,
                f"a start of a QEMU with a tap on network {quote(network)} fails "
                f"(status {int(failure.status)}) where that is needed",
            )
