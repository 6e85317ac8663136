"""Doctor's checks of the host: its packet filters, /dev/net/tun, and the QEMUs that run."""

from __future__ import annotations

import hashlib
import os
import pwd
from collections.abc import Iterator, Sequence

from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import Policy, is_left
from pyqemu_ifconf.shell import all_of, ifctl, nft_command, quote, readable, sh, takeover
from pyqemu_ifctl.doctor.finding import Fault, fault_of
from pyqemu_ifctl.doctor.scene import DEFAULT_SCRIPTS, HELPERS, Qemu, Scene, helpers_of, script_of
from pyqemu_ifctl.qemu.running import tap_of
from pyqemu_ifup.drivers.sysctl import is_writable
from pyqemu_ifup.drivers.tun import TUN
from pyqemu_ifup.made.nat import table_name
from pyqemu_ifup.made.network import OLDER, guarded
from pyqemu_ifup.ops import SetIpv6
from pyqemu_ifup.qemu.caller import Option, bounded
from pyqemu_ifup.qemu.hubs import (
    NAMED_MAX,
    REMEDY,
    WHY,
    WHY_MIXED,
    Hub,
    call_it,
    find_hubs,
    tap_name,
)
from pyqemu_ifup.settings import ADDRESS_MAY_COME, OF_CONTAINER, UNWRITABLE, gets_address


def find_netfilter(scene: Scene) -> Iterator[Fault]:
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
            yield Fault(
                f"br_netfilter sends bridged frames through {kind}, where {chain} drops",
                why,
                sh("sysctl", "-w", f"net.bridge.bridge-nf-call-{kind}=0"),
            )
        elif kind == "iptables":
            for name, bridge in scene.bridges().items():
                if bridge.calls_iptables:
                    yield Fault(
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


def find_nat_filters(scene: Scene) -> Iterator[Fault]:
    """A FORWARD chain that drops what is forwarded for a network with NAT."""
    networks = [] if isinstance(scene.policy, Failure) else list(scene.policy.networks.values())
    for network in networks:
        if network.nat is None:
            continue
        for chain in scene.chains:
            ways = chain.ways_of(network.bridge, network.nat)
            if not ways:
                continue
            yield Fault(
                f"the chain {chain.family} {readable(chain.table)} {readable(chain.name)} drops "
                f"what is forwarded for network {quote(network.name)}",
                "its guests reach each other and this host, and nobody beyond it",
                chain.accepting(network.bridge, ways),
            )


def find_nat_tables(scene: Scene) -> Iterator[Fault]:
    """A network with NAT whose nft table is gone, or is not as it was loaded, or as it shall be."""
    in_force = scene.policy if isinstance(scene.policy, Policy) else None
    networks = guarded(in_force, scene.links)
    for network, fault in scene.tables.items():
        what = f"the nft table inet {table_name(network)} of network {network} is {fault}"
        why = (
            "nothing keeps its guests from other networks, or others from its guests, and what "
            "they send may leave with their own addresses"
        )
        if fault == OLDER:
            why = "what the policy says since is not in force"
            yield Fault(what, why, ifctl("apply"))
        elif fault and networks[network].nat is None:
            why += ", and the policy does not have what to load"
            yield Fault(what, why, None, do=networks[network].remedy)
        elif fault:
            yield Fault(what, why, ifctl("gc"))


def find_bridge_filters(scene: Scene) -> Iterator[Fault]:
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
        yield Fault(
            f"the nftables chain bridge {chain} ({readable(each.hook)}) drops frames {how}",
            "what no rule of its accepts, no guest on a Linux bridge sends or gets",
            command,
        )


def find_no_tun(scene: Scene) -> Iterator[Fault]:
    """A /dev/net/tun that is not there, or cannot be opened."""
    if scene.tun is not None:
        yield fault_of(scene.tun, "no QEMU can open a tap")


def find_no_right(scene: Scene) -> Iterator[Fault]:
    """A root that may change no link, as in a container without CAP_NET_ADMIN."""
    if scene.right is not None:
        yield fault_of(scene.right, "each start of a QEMU with a tap fails (status 77)")


def find_unmade(scene: Scene) -> Iterator[Fault]:
    """A network with NAT that an up could not make, or bring to what the policy says."""
    for network, failures in scene.unmet.items():
        for failure in failures:
            yield fault_of(
                failure,
                f"a start of a QEMU with a tap on network {quote(network)} fails "
                f"(status {int(failure.status)}) where that is needed",
            )


def find_closed_tun(scene: Scene) -> Iterator[Fault]:
    """A /dev/net/tun that only some may open."""
    if scene.tun_mode is not None and scene.tun_mode & 0o006 != 0o006:
        yield Fault(
            f"{TUN} may not be opened by everybody (mode {scene.tun_mode:04o})",
            "a QEMU of another user's cannot open a tap that was made for that user; opening it "
            "gives nobody any right",
            sh("chmod", "0666", TUN),
        )


def is_ours(path: str | None, program: str) -> bool:
    """Tell whether what a script= leads to is this program of ours."""
    return os.path.basename(path or "").partition("@")[0] == program


def find_stock_scripts(scene: Scene) -> Iterator[Fault]:
    """A QEMU whose tap had no script=, so that QEMU's own script was called."""
    for qemu in scene.qemus:
        for option in qemu.guest.options:
            script = script_of(option, "script")
            if script is None or "script" in option.keys:
                continue
            if _is_left(scene, qemu, tap_name(option)):
                continue
            if not is_ours(qemu.scripts.get(script), "pyqemu-ifup"):
                yield Fault(
                    f"{qemu.name} has a tap without script=, and {readable(script)} is not ours",
                    "the distribution's script knows no policy: it guesses a bridge, or none",
                    takeover(),
                )
                break


def find_foreign_helpers(scene: Scene) -> Iterator[Fault]:
    """A QEMU whose tap came by a bridge helper that is not ours, past the policy."""
    for qemu in scene.qemus:
        paths = {path for option in qemu.guest.options for path in helpers_of(option)}
        named = {tap_name(option) for option in qemu.guest.options}
        links = filter(None, map(scene.link, sorted(set(qemu.guest.taps.values()) - named)))
        past = [
            link for link in links if link.stamp is None and not _is_left(scene, qemu, link.name)
        ]
        if not paths or not past:
            continue
        master = next((each for each in scene.links if each.index == past[0].master), None)
        place = f" on {quote(master.name)}" if master is not None else ""
        what = f"{qemu.name} has {quote(past[0].name)}{place} by a bridge helper that is not ours"
        why = "that knows no policy: bridge.conf alone let it in, with no rule, VLAN or isolation"
        foreign = {
            path
            for path in paths
            if (target := qemu.scripts.get(path)) is not None
            and not is_ours(target, "pyqemu-bridge-helper")
        }
        if foreign & set(HELPERS):
            yield Fault(what, why, takeover("--helper"))
        elif foreign:
            yield Fault(
                what,
                why,
                None,
                f"when {_process(qemu)} starts the next time, let its helper= be "
                "pyqemu-bridge-helper, by its whole path",
            )
        else:
            yield Fault(
                what,
                why,
                None,
                f"end {_process(qemu)} and start it anew: its helper is ours by now",
            )


def _is_left(scene: Scene, qemu: Qemu, tap: str | None) -> bool:
    """Tell whether a `leave` rule of the policy has the tap; None: all that QEMU does not name."""
    if tap is None:
        named = {tap_name(option) for option in qemu.guest.options}
        taps = set(qemu.guest.taps.values()) - named
        return bool(taps) and taps <= qemu.left
    return tap in qemu.left or (isinstance(scene.policy, Policy) and is_left(scene.policy, tap))


def find_no_downscripts(scene: Scene) -> Iterator[Fault]:
    """A QEMU whose tap our script attached, and whose downscript= is missing or not ours."""
    for qemu in scene.qemus:
        for option in qemu.guest.options:
            script = script_of(option, "script")
            ours = qemu.scripts.get(script) if script is not None else None
            if script is None or ours is None or not is_ours(ours, "pyqemu-ifup"):
                continue
            down = script_of(option, "downscript")
            if is_ours(qemu.scripts.get(down or ""), "pyqemu-ifdown"):
                continue
            if _is_left(scene, qemu, tap_name(option)):
                continue
            if down is None and not _stays(scene, qemu, option):
                # NOTE: a tap that goes with its QEMU is gone from a Linux bridge too.
                continue
            what = f"{qemu.name} has no downscript="
            if down is not None:
                is_missing = qemu.scripts.get(down) is None
                what = f"the downscript{_path(qemu, down)} of {qemu.name} is "
                what += "missing" if is_missing else "not ours"
            why = (
                "when it ends, nobody takes its tap away: a port of Open vSwitch, and a persistent "
                "tap on its bridge, stays until gc"
            )
            if down == DEFAULT_SCRIPTS["downscript"]:
                yield Fault(what, why, takeover())
            else:
                add = "give its tap the path of pyqemu-ifdown as downscript="
                if scene.hooks is not None:
                    add = f"add: downscript={quote(scene.hooks.ifdown)}"
                yield Fault(what, why, None, f"when {_process(qemu)} starts the next time, {add}")
            break


def _stays(scene: Scene, qemu: Qemu, option: Option) -> bool:
    """Tell whether something of a tap is left when its QEMU ends without a downscript=."""
    name = tap_name(option)
    links = filter(None, map(scene.link, [name] if name else qemu.guest.taps.values()))
    return any(
        link.persistent or link.stamp.kind == "openvswitch"
        for link in links
        if link.stamp is not None
    )


def _path(qemu: Qemu, script: str) -> str:
    """Return a script's path for a sentence, empty where another user has chosen it.

    NOTE: what comes from another user's command line is nothing that root should have in hand.
    """
    own = qemu.guest.uid == os.geteuid() or script in DEFAULT_SCRIPTS.values()
    return f" {readable(script)}" if own else ""


def _process(qemu: Qemu) -> str:
    """Return which process a QEMU is, and whose."""
    if qemu.guest.uid is None:
        return f"process {qemu.guest.pid}"
    try:
        login = pwd.getpwuid(qemu.guest.uid).pw_name
    except KeyError:
        login = str(qemu.guest.uid)
    return f"process {qemu.guest.pid} of user {readable(login)}"


def find_joined_taps(scene: Scene) -> Iterator[Fault]:
    """A QEMU that joins two taps, whose links are up, on a hub of its own."""
    up = {link.name for link in scene.links if link.up}
    for qemu in scene.qemus:
        told = False
        for hub in find_hubs(qemu.guest.options):
            taps = _held_ends(hub, _held(scene, qemu) & up)
            if len(taps) < 2 or not _is_still_joined(qemu, taps):
                continue
            told = True
            running = [name for tap in taps if (name := tap_name(tap)) is not None]
            yield Fault(
                f"{' and '.join(map(call_it, taps[:NAMED_MAX]))} of {qemu.name} are on one hub",
                WHY,
                sh("ip", "link", "set", "dev", running[-1], "down") if len(running) > 1 else None,
                f"when {_process(qemu)} starts the next time, {REMEDY}",
            )
        for hub_now, names in () if told else _joined_now(qemu):
            running = sorted(name for name in names if name in up)
            if len(running) > 1:
                yield Fault(
                    f"{' and '.join(map(quote, running[:NAMED_MAX]))} of {qemu.name} are on one "
                    "hub, which was made while it ran",
                    WHY,
                    sh("ip", "link", "set", "dev", running[-1], "down"),
                    f"take hub {hub_now} of {_process(qemu)} apart: over QMP, netdev_del of each "
                    "hubport on it",
                )


def _held(scene: Scene, qemu: Qemu) -> frozenset[str]:
    """Return the taps that a QEMU holds; those whose mark names it, where that cannot be seen.

    NOTE: anybody can write any name on a command line; which taps are held, the kernel tells.
    """
    if not qemu.hidden:
        return frozenset(qemu.guest.taps.values())
    return frozenset(
        link.name
        for link in scene.links
        if link.stamp is not None and link.stamp.pid == qemu.guest.pid
    )


def _held_ends(hub: Hub, held: frozenset[str]) -> list[Option]:
    """Return the taps of a hub that are among those `held`; one without a name may be any other."""
    named = {tap_name(tap) for tap in hub.taps}
    left = len(held - named)
    found: dict[object, Option] = {}
    for tap in hub.taps:
        name = tap_name(tap)
        left -= name is None
        if name in held or (name is None and left >= 0):
            found.setdefault(name or id(tap), tap)
    return list(found.values())


def _is_still_joined(qemu: Qemu, taps: Sequence[Option], *, to_others: bool = False) -> bool:
    """Tell whether what a command line has on one hub is so by what the QEMU tells, if it does.

    That are `taps`, with each other, or `to_others` with what is no tap.
    """
    if qemu.joints is None:
        return True
    names = {tap_name(tap) for tap in taps}
    for joint in qemu.joints:
        there = [tap_of(each, qemu.guest) for each in joint.backends if each.type == "tap"]
        # NOTE: of one that a helper has brought, neither side knows the name.
        found = sum(name is None or None in names or name in names for name in there)
        if (found and len(there) < len(joint.backends)) if to_others else found > 1:
            return True
    return False


def _joined_now(qemu: Qemu) -> Iterator[tuple[int, list[str]]]:
    """Yield each hub that a QEMU tells of, and which of the taps that it holds are on it.

    NOTE: it may say anything of itself; which taps are held, the kernel tells.
    """
    held = set(qemu.guest.taps.values())
    for joint in qemu.joints or ():
        names = dict.fromkeys(tap_of(each, qemu.guest) for each in joint.backends)
        yield joint.hub, [name for name in names if name is not None and name in held]


def find_taps_off(scene: Scene) -> Iterator[Fault]:
    """A tap of a running guest's, of the policy's, that is down or was taken from its bridge."""
    # NOTE: one of two that a hub joins is down for good reason.
    joined: set[str | None] = set()
    for qemu in scene.qemus:
        for hub in find_hubs(qemu.guest.options):
            taps = _held_ends(hub, _held(scene, qemu))
            if len(taps) > 1 and _is_still_joined(qemu, taps):
                joined.update(map(tap_name, taps))
        for _, names in _joined_now(qemu):
            joined.update(name for name in names if len(names) > 1)
    for link in scene.off:
        if link.stamp is not None and link.name not in joined:
            state = "down" if not link.up else f"not on {quote(link.stamp.bridge)}"
            yield Fault(
                f"the tap {quote(link.name)} is {state}, and the policy has it attached",
                "its guest has no network; one that is down is not brought back by itself",
                ifctl("apply", link.name),
            )


def find_addressed_taps(scene: Scene) -> Iterator[Fault]:
    """A tap of ours whose host's end may get an IPv6 address, as its guest advertises one."""
    for link in scene.links:
        if link.stamp is not None and link.up and gets_address(link):
            what = f"the tap {quote(link.name)}: {ADDRESS_MAY_COME}"
            keeping = SetIpv6(link.name, link.index, disabled=True, addrgenmode=None)
            if is_writable("ipv6/conf/default/disable_ipv6"):
                why = "its disable_ipv6 is 0: somebody else has set that, or up could not"
                yield Fault(what, why, all_of(*keeping.commands()))
            else:
                yield Fault(what, UNWRITABLE, None, OF_CONTAINER)


def find_mixed_hubs(scene: Scene) -> Iterator[Fault]:
    """A QEMU that joins a tap and a backend that is none on a hub of its own."""
    for qemu in scene.qemus:
        for hub in find_hubs(qemu.guest.options):
            taps = _held_ends(hub, _held(scene, qemu))
            types = {bounded(end.keys.get("type")) for end in hub.others}
            if taps and types and _is_still_joined(qemu, taps, to_others=True):
                others = sorted(readable(each) if each else "something else" for each in types)
                what = " and ".join(others[:NAMED_MAX])
                yield Fault(
                    f"{call_it(taps[0])} of {qemu.name} is on one hub with {what}",
                    WHY_MIXED,
                    None,
                    f"when {_process(qemu)} starts the next time, {REMEDY}",
                )


def find_unconfined(scene: Scene) -> Iterator[Fault]:
    """A QEMU whose system calls are not filtered."""
    for qemu in scene.qemus:
        if qemu.confined is False:
            yield Fault(
                f"{qemu.name} runs without -sandbox" + (", as root" if qemu.guest.uid == 0 else ""),
                "a guest that breaks out of it may use all of the kernel, and gain privilege",
                None,
                f"when {_process(qemu)} starts the next time, add: -sandbox on",
            )


def find_twins(scene: Scene) -> Iterator[Fault]:
    """Two running QEMUs with the same MAC on one bridge, or where that cannot be told."""
    places = _find_places(scene)
    taken = {nic.mac for qemu in scene.qemus for nic in qemu.nics}
    seen: dict[str, dict[str | None, Qemu]] = {}
    for qemu in scene.qemus:
        if qemu.guest.pid in scene.away:
            continue
        own: dict[str, set[str | None]] = {}
        for nic in qemu.nics:
            if nic.mac is not None and nic.type != "user":
                own.setdefault(nic.mac, set()).add(places.get(nic.tap or ""))
        for mac, where in own.items():
            others = seen.setdefault(mac, {})
            twin = next(
                (
                    other
                    for place, other in others.items()
                    if place is None or None in where or place in where
                ),
                None,
            )
            if twin is not None:
                fresh = _fresh(taken, f"{mac} {qemu.name}")
                yield Fault(
                    f"{qemu.name} has the MAC {mac}, and so has {twin.name}",
                    "the switch sends the frames of both to whichever has sent last",
                    None,
                    f"end {_process(qemu)}, and start it with another MAC: mac={fresh}",
                )
            for place in where:
                others.setdefault(place, qemu)


def _find_places(scene: Scene) -> dict[str, str]:
    """Return the bridge that each link is on, but of those that are on none."""
    ports = {each.name: f"{each.ovsdb} {each.bridge}" for each in scene.ports if each.bridge}
    names = {link.index: link.name for link in scene.links}
    places = {link.name: names[link.master] for link in scene.links if link.master in names}
    return places | {link.name: ports[link.name] for link in scene.links if link.name in ports}


def _fresh(taken: set[str | None], seed: str) -> str:
    """Return a MAC for one of two guests, always the same, and add it to those that are taken."""
    digest = seed.encode()
    while True:
        digest = hashlib.sha256(digest).digest()
        found = "52:54:00:" + digest[:3].hex(":")
        if found not in taken:
            taken.add(found)
            return found
