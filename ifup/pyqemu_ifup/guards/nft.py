"""What a guest whose link is its own may send and hears, as chains of nftables at that link.

What the guest sends passes the link's egress hook, what comes to it the ingress hook. The holder of
its descriptor may change the link's MAC (SIOCSIFHWADDR of drivers/net/tap.c): so the filters name
the MAC that the guest has been given, and with another it neither sends nor hears more.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyqemu_ifup.drivers.nft_rules import (
    ETHERNET,
    Act,
    Base,
    Chain,
    Compare,
    Count,
    Expression,
    Hook,
    Mask,
    Payload,
    Rule,
    Verdict,
    chain_name,
    mark,
)

Match = tuple[Expression, ...]
"""Expressions that go on with the rule for the frames that they are about."""
EGRESS = "egress"
"""The end of the name of a link's second chain."""

TAGS = tuple(bytes.fromhex(each) for each in ("8100", "88a8", "9100", "9200", "9300"))
"""The EtherTypes of VLAN tags: of 802.1Q, of 802.1ad, and what served for that before it."""
DESTINATION, SOURCE, TYPE, VID, INNER = (
    Payload(0, 6),
    Payload(6, 6),
    Payload(12, 2),
    Payload(14, 2),
    Payload(16, 2),
)
GROUP = bytes.fromhex("010000000000")
"""The bit of a MAC that makes it one of several receivers."""
UNTAGGED: Match = tuple(part for tag in TAGS for part in (TYPE, Compare(tag, unlike=True)))
PRIORITY_TAGGED: Match = (
    *(TYPE, Compare(TAGS[0])),
    *(VID, Mask(b"\x0f\xff"), Compare(bytes(2))),
    *(part for tag in TAGS for part in (INNER, Compare(tag, unlike=True))),
)
"""One 802.1Q tag of VID 0, and no other behind it: such a frame is in no VLAN."""


def link_chains(device: str, index: int, *, mac: bytes | None, tags: bool) -> tuple[Chain, ...]:
    """Return the chains for a guest's own link, with our mark; none if nothing is to be filtered.

    `device` is the link's name, `index` its ifindex. `mac`: the guest sends with no other source,
    and hears what is for it or for a group of receivers; None lets all else pass too. `tags`: a
    frame with a VLAN tag passes neither way, unless the tag is one of VID 0.

    Each chain counts in its last rule what it drops.
    """
    own = None if mac is None else Compare(mac)
    sent = own and [(SOURCE, own)]
    heard = own and [(DESTINATION, own), (DESTINATION, Mask(GROUP), Compare(GROUP))]
    chains: list[Chain] = []
    for hook, part, passing in ((Hook.EGRESS, EGRESS, sent), (Hook.INGRESS, "", heard)):
        rules: tuple[Rule, ...] = ()
        if tags:
            name = chain_name(index, f"{part}-tags".lstrip("-"))
            chains.append(Chain(name, _only([UNTAGGED, PRIORITY_TAGGED], Act.RETURN)))
            rules = (Rule((Verdict(Act.JUMP, name),)),)
        if passing:
            rules += _only(passing, Act.ACCEPT)
        if rules:
            chains.append(Chain(chain_name(index, part), rules, Base(hook, (device,))))
    return mark(chains, device)


def _only(passing: Sequence[Match], act: Act) -> tuple[Rule, ...]:
    """Return the rules by which these frames pass and all else is counted and dropped.

    NOTE: a rule never matches a frame that is too short for it, however it compares. So what passes
    is what was seen to be right, and no rule drops what is seen to be wrong.
    """
    accepting = [Rule((*ETHERNET, *match, Verdict(act))) for match in passing]
    return (*accepting, Rule((Count(), Verdict(Act.DROP))))
