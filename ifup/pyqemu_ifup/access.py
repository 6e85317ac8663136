"""Who may use a network: its `users`, `deny_users`, and QEMU's bridge.conf where it is heeded."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Collection

from pyqemu_ifconf.bridge_conf import NOTHING, BridgeConf, read_bridge_conf
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Network, Policy, Port, Vlan, Vm, find_nic

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


def may_still(policy: Policy, port: Port, uid: int) -> None:
    """Check that an unprivileged user may have a tap as `port` says. Raises Failure (77)."""
    login, groups = identity(uid)
    network = policy.networks[port.network]
    may_use(network, uid, login, groups, heeded_bridge_conf(policy, uid), port)
    found = find_nic(policy, port.network, port.tap)
    if found is not None and found[1].place == port.place:
        may_have(found[0], uid, login, groups)


def heeded_bridge_conf(policy: Policy, uid: int) -> BridgeConf:
    """Return what QEMU's bridge.conf says to this user, nothing where the policy heeds it not.

    Raises Failure as read_bridge_conf.
    """
    return read_bridge_conf() if policy.bridge_conf and uid != ROOT else NOTHING
