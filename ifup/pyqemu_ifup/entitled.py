"""Who may plug what in: which network a user means, which tap, by what name, and how many.

Pure.
"""

from __future__ import annotations

from collections.abc import Collection

from pyqemu_ifconf.bridge_conf import NOTHING, BridgeConf
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.bridge import OnBridge
from pyqemu_ifconf.names import is_made_of, is_user_name, is_valid_name
from pyqemu_ifconf.policy import Network, Nic, Policy, Vm, find_nic
from pyqemu_ifconf.shell import ifctl, quote, readable
from pyqemu_ifup.access import ROOT, User, check_given, may_have, may_use
from pyqemu_ifup.drivers.tun import making_anew
from pyqemu_ifup.look import Link
from pyqemu_ifup.mark import is_alive


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
    there = [
        network
        for network in policy.networks.values()
        if isinstance(network.place, OnBridge) and network.place.bridge == name
    ]
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
            f"bridge {readable(name)} is not enough",
            f"the networks {' and '.join(open_to)} are on it",
            f"give the name of one, as in br={open_to[0]}",
        )
    if len(refusals) == 1:
        raise refusals[0]
    if refusals:
        raise Failure(
            Status.DENIED,
            f"user {readable(login)} may use no network on bridge {readable(name)}",
            "; ".join(str(failure.why) for failure in refusals),
            f"whoever keeps the policy can add {readable(login)} to its users",
        )
    raise Failure(
        Status.DENIED,
        f"no network and no bridge {readable(name)}",
        f"{', '.join(policy.files)} names none",
        "give the name of a network of the policy",
    )


def pick_name(
    policy: Policy, network: Network, wish: str, user: User
) -> tuple[str, tuple[Vm, Nic] | None]:
    """Return the name, or the pattern of it, for a new tap on `network`; `wish` may be empty.

    A user has the choice of what the network's `tap_name` makes, and of the taps of the guests
    that the user may have; then that guest and its NIC are returned too. Every other name is that
    of somebody else: of root, or of another network. Nor is it a bridge's, which may not be there
    yet. Raises Failure: 64 for a wish that is no name, 77.
    """
    if not wish:
        refuse_bridge_name(policy, network.tap_name)
        return network.tap_name, None
    if not is_valid_name(wish) or "%" in wish:
        raise Failure(
            Status.USAGE,
            f"{readable(wish)} is not a tap name",
            "a name is 1 to 15 bytes of 0x21 to 0x7e, without /, : and %, not . or ..",
        )
    if user.uid != ROOT and not is_user_name(wish):
        raise Failure(
            Status.DENIED,
            f"{readable(wish)} is no name for a user's tap",
            "it has letters, digits, dots, hyphens and underscores, a letter or digit first",
        )
    refuse_bridge_name(policy, wish)
    found = find_nic(policy, network.name, wish)
    if found is not None:
        may_have(found[0], user.uid, user.login, user.groups)
    elif user.uid != ROOT and not is_made_of(wish, network.tap_name):
        raise Failure(
            Status.DENIED,
            f"the name {readable(wish)} is not for network {quote(network.name)}",
            f"its tap_name is {quote(network.tap_name)}, and no guest of vms: has it there "
            f"({network.position})",
            f"take another, such as {quote(network.tap_name.replace('%d', '0'))}, or none",
        )
    return wish, found


def refuse_bridge_name(policy: Policy, name: str) -> None:
    """Check that a new tap does not take the name of what a network of the policy's is on.

    A bridge may not be there yet, and could not be made then. Raises Failure (77).
    """
    for network in policy.networks.values():
        if network.place.name == name:
            raise Failure(
                Status.DENIED,
                f"the name {quote(name)} is not for a tap",
                f"it is that of the {network.place.noun} of network {quote(network.name)} "
                f"({network.position})",
                "take another, or let the network's tap_name make others",
            )


def check_owner(link: Link, uid: int, network: str) -> None:
    """Check that the tap belongs to the user, who wants it on `network`; root may use any.

    One that we have made is the user's whom its mark names, any other its owner's (TUNSETOWNER),
    but for one that root has had attached for a process that runs: that may have set the owner.
    Raises Failure (77).
    """
    mark = link.mark
    if mark is not None and mark.made and uid != ROOT:
        check_given(link)
        if mark.uid == uid:
            return
        whose = "root" if mark.uid is None else f"user {mark.uid}"
        raise Failure(
            Status.DENIED,
            f"somebody else's tap: it was made for {whose}, not for user {uid}",
            "",
            f"ask for another: {ifctl('run')}",
        )
    if uid != ROOT and mark is not None and mark.uid is None and is_alive(mark):
        raise Failure(
            Status.DENIED,
            f"root's tap: root has had it attached for process {mark.pid}",
            f"what user {uid} asks for moves it nowhere",
            "let root do it",
        )
    if uid in (ROOT, link.owner):
        return
    owner = "nobody" if link.owner is None else f"user {link.owner}"
    what = f"somebody else's tap: {owner} owns it, not user {uid}"
    if not link.persistent:
        # NOTE: a QEMU with CAP_NET_ADMIN, as a file's capability gives it, makes its own.
        raise Failure(
            Status.DENIED,
            what,
            "whoever holds it has made it, by a right that is not the user's",
            f"let the agent make it: start QEMU by {ifctl('run')} --nic {quote(network)}, "
            "or with our pyqemu-bridge-helper, by its whole path, as helper= and "
            f"br={quote(network)} in place of ifname= and script=; it needs no right of its own "
            "then",
        )
    anew = making_anew(link.name, str(uid), queues=link.multi_queue)
    raise Failure(Status.DENIED, what, "", f"let root make it anew for you: {anew}")


def check_quota(network: Network, uid: int, login: str, names: Collection[str]) -> None:
    """Check that the user, who has the taps `names` on the network, may have one more.

    Raises Failure (77).
    """
    if uid == ROOT or len(names) < network.max_taps:
        return
    taps = "1 tap" if len(names) == 1 else f"{len(names)} taps"
    raise Failure(
        Status.DENIED,
        f"user {readable(login)} has {taps} on network {quote(network.name)} already",
        f"max_taps is {network.max_taps} ({network.position})",
        "end a QEMU that has one",
    )


def taps_of(links: Collection[Link], network: str, uid: int) -> set[str]:
    """Return the names of the taps of ours on `network` that are the user's.

    A tap is the user's whom its mark names; else, where a hook put it there, its owner's. Whoever
    holds a tap can give it another owner, but not another mark.
    """
    return {
        link.name
        for link in links
        if (mark := link.mark) is not None
        and mark.network == network
        and uid == (mark.uid if mark.uid is not None else link.owner)
    }
