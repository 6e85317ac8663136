"""Who may plug what in: the users of a network, and QEMU's bridge.conf as a further source.

Pure, but for `identity`, which asks the host's user database.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Collection

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.globs import matches
from pyqemu_ifconf.names import is_made_of, is_valid_name
from pyqemu_ifconf.policy import Network, Policy, Port, Vlan, Vm
from pyqemu_ifd.bridge_conf import NOTHING, BridgeConf
from pyqemu_ifup.look import Link

ROOT = 0


def identity(uid: int) -> tuple[str, tuple[str, ...]]:
    """Return the login name of `uid` and the names of its groups, numbers where there are none.

    A user without a name is in no group.
    """
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return str(uid), ()
    return entry.pw_name, tuple(map(_group, os.getgrouplist(entry.pw_name, entry.pw_gid)))


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def may_use(
    network: Network,
    uid: int,
    login: str,
    groups: Collection[str],
    bridge_conf: BridgeConf = NOTHING,
    port: Port | None = None,
) -> None:
    """Check that the user may plug a QEMU in on `network`; root always may.

    `port` is the tap's there where a rule may have changed it, None where it is as the network
    says. Raises Failure (77) that says who may not, where, and why.
    """
    if uid == ROOT:
        return
    what = f"user {login} may not use network {network.name}"
    place = f"({network.place})"
    denied = _first(network.deny_users, login, groups)
    if denied is not None:
        raise Failure(
            Status.DENIED, what, f"{denied} is among its deny_users {place}",
            "ask who keeps the policy",
        )
    if bridge_conf.denies(network.bridge):
        raise Failure(
            Status.DENIED, what, f"bridge.conf denies its bridge {network.bridge}",
            "ask who keeps it",
        )
    if _first(network.users, login, groups) is not None:
        return
    because = f"neither the user nor one of the user's groups is among its users {place}"
    if bridge_conf.allows(network.bridge):
        if not _is_trunk(network, port):
            return
        because += f", and that bridge.conf allows {network.bridge} admits to no trunk"
        if port is not None and port.place != network.place:
            because += f" ({port.place})"
    raise Failure(
        Status.DENIED, what, because, f"whoever keeps the policy can add {login} to users:"
    )


def may_have(vm: Vm, uid: int, login: str, groups: Collection[str]) -> None:
    """Check that the user, who may use its networks, may have the taps of the guest `vm`.

    Their settings may be others than those of the network, another VLAN say. Raises Failure (77).
    """
    if uid == ROOT or vm.users is None or _first(vm.users, login, groups) is not None:
        return
    raise Failure(
        Status.DENIED, f"user {login} may not have the taps of guest {vm.name}",
        "neither the user nor one of the user's groups is among the guest's users "
        f"({vm.place})", f"whoever keeps the policy can add {login} to its users:",
    )


def _first(names: Collection[str], login: str, groups: Collection[str]) -> str | None:
    """Return the first of `names` that is the user or, with @, one of the groups."""
    known = {f"@{group}" for group in groups}
    return next(
        (name for name in names if (name in known if name.startswith("@") else name == login)), None
    )


def _is_trunk(network: Network, port: Port | None) -> bool:
    vlan = port.vlan if port is not None else network.settings.given.get("vlan")
    return isinstance(vlan, Vlan) and bool(vlan.trunk)


def find_network(
    policy: Policy,
    name: str,
    uid: int,
    login: str,
    groups: Collection[str],
    bridge_conf: BridgeConf = NOTHING,
) -> Network:
    """Return the network that `name` means to this user: one called so, else one on that bridge.

    On a bridge it is the only one that is open to the user. Raises Failure (77) where there is
    none, where there are more, and where the user may not use it.
    """
    called = policy.networks.get(name)
    if called is not None:
        may_use(called, uid, login, groups, bridge_conf)
        return called
    there = [network for network in policy.networks.values() if network.bridge == name]
    refusals: list[Failure] = []
    open_to = []
    for network in there:
        try:
            may_use(network, uid, login, groups, bridge_conf)
        except Failure as failure:
            refusals.append(failure)
        else:
            open_to.append(network.name)
    if len(open_to) == 1:
        return policy.networks[open_to[0]]
    if open_to:
        raise Failure(
            Status.DENIED,
            f"bridge {ascii(name)[1:-1]} is not enough",
            f"the networks {' and '.join(open_to)} are on it",
            f"give the name of one, as in br={open_to[0]}",
        )
    if len(refusals) == 1:
        raise refusals[0]
    if refusals:
        raise Failure(
            Status.DENIED,
            f"user {login} may use no network on bridge {ascii(name)[1:-1]}",
            "; ".join(str(failure.why) for failure in refusals),
            f"whoever keeps the policy can add {login} to users:",
        )
    raise Failure(
        Status.DENIED,
        f"no network and no bridge {ascii(name)[1:-1]}",
        f"{', '.join(policy.files)} names none",
        "give the name of a network of the policy",
    )


def pick_name(policy: Policy, network: Network, wish: str, uid: int) -> str:
    """Return the name, or the pattern of it, for a new tap on `network`; `wish` may be empty.

    A name that the policy gives to another network, or denies, is not for everyone to take: a
    QEMU of root's would find it taken. Nor is that of a bridge, which may not be there yet. Raises
    Failure: 64 for a wish that is no name, 77.
    """
    if not wish:
        refuse_bridge_name(policy, network.tap_name)
        return network.tap_name
    if not is_valid_name(wish) or "%" in wish:
        raise Failure(
            Status.USAGE, f"{ascii(wish)} is not a tap name",
            "a name is 1 to 15 bytes of 0x21 to 0x7e, without /, : and %, not . or ..",
        )
    refuse_bridge_name(policy, wish)
    if uid == ROOT or is_made_of(wish, network.tap_name):
        return wish
    for rule in policy.rules:
        globs = [glob for glob in rule.match.get("tap", ()) if glob.strip("*")]
        if rule.network != network.name and any(matches(glob, wish) for glob in globs):
            raise Failure(
                Status.DENIED,
                f"the name {wish} is not for network {network.name}",
                f"the rule at {rule.place} is about it",
                f"take another, such as {network.tap_name.replace('%d', '0')}, or none",
            )
    return wish


def refuse_bridge_name(policy: Policy, name: str) -> None:
    """Check that a new tap does not take the name of a bridge of the policy's.

    That bridge may not be there yet, and could not be made then. Raises Failure (77).
    """
    for network in policy.networks.values():
        if network.bridge == name:
            raise Failure(
                Status.DENIED,
                f"the name {name} is not for a tap",
                f"it is that of the bridge of network {network.name} ({network.place})",
                "take another, or let the network's tap_name make others",
            )


def check_owner(link: Link, uid: int) -> None:
    """Check that the tap belongs to the user (TUNSETOWNER); root may use any.

    Raises Failure (77).
    """
    if uid in (ROOT, link.owner):
        return
    owner = "nobody" if link.owner is None else f"user {link.owner}"
    raise Failure(
        Status.DENIED,
        f"somebody else's tap: {owner} owns it, not user {uid}",
        "",
        f"let its maker give it to you: ip tuntap add dev {link.name} mode tap user {uid}",
    )


def check_quota(network: Network, uid: int, login: str, names: Collection[str]) -> None:
    """Check that the user, who has the taps `names` on the network, may have one more.

    Raises Failure (77).
    """
    if uid == ROOT or len(names) < network.max_taps:
        return
    taps = "1 tap" if len(names) == 1 else f"{len(names)} taps"
    raise Failure(
        Status.DENIED,
        f"user {login} has {taps} on network {network.name} already",
        f"max_taps is {network.max_taps} ({network.place})",
        "end a QEMU that has one",
    )


def taps_of(links: Collection[Link], network: str, uid: int) -> set[str]:
    """Return the names of the taps of ours on `network` that are the user's.

    A tap is the user's whom its stamp names; else, where a hook put it there, its owner's. Whoever
    holds a tap can give it another owner, but not another stamp.
    """
    return {
        link.name
        for link in links
        if (stamp := link.stamp) is not None
        and stamp.network == network
        and uid == (stamp.uid if stamp.uid is not None else link.owner)
    }
