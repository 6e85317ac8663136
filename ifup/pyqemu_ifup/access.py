"""Who may use a network: its `users`, `deny_users`, and QEMU's bridge.conf where it is heeded."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyqemu_ifconf.bridge_conf import NOTHING, BridgeConf, read_bridge_conf
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.bridge import OnBridge
from pyqemu_ifconf.policy import Network, Policy, Port, Vm, find_nic
from pyqemu_ifconf.shell import ifctl, quote, readable

if TYPE_CHECKING:
    from pyqemu_ifup.look import Link

ROOT = 0


@dataclass(frozen=True)
class User:
    """A user's number, login name, and groups by name; a number stands for a name that is not."""

    uid: int
    login: str
    groups: tuple[str, ...]


def find_user(uid: int) -> User:
    """Return who has this number; a user without a name is in no group.

    It lasts as long as the directory of users does (nsswitch.conf(5)), which may be a server.
    """
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return User(uid, str(uid), ())
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return User(uid, entry.pw_name, tuple(map(_group, groups)))


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
    what = f"user {readable(login)} may not use network {quote(network.name)}"
    position = f"({network.position})"
    denied = _first(network.deny_users, login, groups)
    if denied is not None:
        raise Failure(
            Status.DENIED,
            what,
            f"{readable(denied)} is among its deny_users {position}",
            "ask who keeps the policy",
        )
    bridge = network.place.bridge if isinstance(network.place, OnBridge) else None
    if bridge is not None and bridge_conf.denies(bridge):
        raise Failure(
            Status.DENIED,
            what,
            f"bridge.conf denies its bridge {quote(bridge)}",
            "ask who keeps it",
        )
    if _first(network.users, login, groups) is not None:
        return
    because = f"neither the user nor one of the user's groups is among its users {position}"
    if bridge is not None and bridge_conf.allows(bridge):
        own = _own_setting(network, port)
        if own is None:
            return
        because += f", and that bridge.conf allows {quote(bridge)} admits to no network "
        because += f"with {own}"
        if port is not None and port.position != network.position:
            because += f" ({port.position})"
    raise Failure(
        Status.DENIED,
        what,
        because,
        f"whoever keeps the policy can add {readable(login)} to its users",
    )


def may_have(vm: Vm, uid: int, login: str, groups: Collection[str]) -> None:
    """Check that the user, who may use its networks, may have the taps of the guest `vm`.

    Their settings may be others than those of the network, another VLAN say. Raises Failure (77).
    """
    if uid == ROOT or vm.users is None or _first(vm.users, login, groups) is not None:
        return
    raise Failure(
        Status.DENIED,
        f"user {readable(login)} may not have the taps of guest {quote(vm.name)}",
        f"neither the user nor one of the user's groups is among the guest's users ({vm.position})",
        f"whoever keeps the policy can add {readable(login)} to its users",
    )


def _first(names: Collection[str], login: str, groups: Collection[str]) -> str | None:
    """Return the first of `names` that is the user or, with @, one of the groups."""
    known = {f"@{group}" for group in groups}
    return next(
        (name for name in names if (name in known if name.startswith("@") else name == login)), None
    )


def _own_setting(network: Network, port: Port | None) -> str | None:
    """Return which setting makes the network, or the port there, more than its bridge; or None.

    bridge.conf knows of bridges alone: it opens what is all of one.
    """
    given = network.settings.given
    if network.users:
        return "users:"
    if given.get("vlan") is not None or (port is not None and port.settings.vlan is not None):
        return "vlan:"
    if given.get("isolated") or (port is not None and port.settings.isolated):
        return "isolated:"
    return None


def may_still(policy: Policy, port: Port, user: User) -> None:
    """Check that an unprivileged user may have a tap as `port` says. Raises Failure (77)."""
    network = policy.networks[port.network]
    conf = heeded_bridge_conf(policy, user.uid)
    may_use(network, user.uid, user.login, user.groups, conf, port)
    found = find_nic(policy, port.network, port.tap)
    if found is not None and found[1].position == port.position:
        may_have(found[0], user.uid, user.login, user.groups)


def is_root_made(link: Link, uid: int | None) -> bool:
    """Tell whether root has made the tap for the user `uid`, and not we.

    An older mark does not say whether we have: ours are asked for by a network's name. One that
    root has had attached is root's, whatever owner its holder has given it. None is root, who
    needs no such tap.
    """
    mark = link.mark
    others = mark is not None and (mark.made or mark.by_name or mark.uid is None)
    return uid is not None and link.owner == uid and not others


def check_given(link: Link) -> None:
    """Check that a tap of our making is root's still. Raises Failure (77)."""
    if link.given_away:
        whom = "everybody" if link.owner is None else f"user {link.owner}"
        raise Failure(
            Status.DENIED,
            "its right has ended",
            f"whoever held it has given it to {whom}, and it was root's",
            f"end the process that holds it, and have another made: {ifctl('run')}",
        )


def heeded_bridge_conf(policy: Policy, uid: int) -> BridgeConf:
    """Return what QEMU's bridge.conf says to this user, nothing where the policy heeds it not.

    Raises Failure as read_bridge_conf.
    """
    return read_bridge_conf() if policy.bridge_conf and uid != ROOT else NOTHING
