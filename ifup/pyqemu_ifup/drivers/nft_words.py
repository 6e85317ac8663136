"""Chains of nftables' family netdev in the words of nft(8): as its commands, and what differs.

A rule that looks into an Ethernet header begins as nft has it begin; so nft shows what we load in
these words, and loads the same by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from pyqemu_ifconf.shell import Command, nft_command, quote, sh
from pyqemu_ifup.drivers.nft_rules import (
    ETHERNET,
    TABLE,
    Base,
    Chain,
    Compare,
    Count,
    Expression,
    Mask,
    Payload,
    Rule,
    Verdict,
)

_FIELDS = {
    (0, 6): "ether daddr",
    (6, 6): "ether saddr",
    (12, 2): "ether type",
    (14, 2): "vlan id",
    (16, 2): "vlan type",
}
"""What lies where in an Ethernet header, by offset and length: linux/if_vlan.h, vlan_ethhdr."""
_VID = Mask(b"\x0f\xff")
_BASES = {0: "ll", 1: "nh", 2: "th", 3: "ih"}
"""How nft calls the headers of NFT_PAYLOAD_LL_HEADER and those behind it."""


def commands(chains: Sequence[Chain], replaced: Sequence[Chain] = ()) -> tuple[Command, ...]:
    """Return the commands of nft(8) that load these chains into our table.

    None of them is there yet, but those of the link that are `replaced`: by one command then, so
    that each frame meets the old ones or the new. If nft has no words for the name of a link, that
    is a comment which says so, alone.
    """
    forms = [_drop_form(chain) for chain in sorted(replaced, key=lambda old: old.base is None)]
    forms += [_table_form(), *map(_chain_form, chains)]
    told = [nft_command(form, **names) for form, names in forms]
    for command in told:
        if command.startswith("#"):
            return (command,)
    rules = [
        f"add rule netdev {TABLE} {chain.name} {rule_words(rule)}"
        for chain in chains
        for rule in chain.rules
    ]
    if not replaced:
        return (*told, *(sh("nft", rule) for rule in rules))
    return (sh("nft", "; ".join([*(form.format_map(names) for form, names in forms), *rules])),)


_Form = tuple[str, dict[str, str]]
"""A command of nft's, with the names that stand in it."""


def _table_form() -> _Form:
    return "add table netdev {table}", {"table": TABLE}


def _drop_form(chain: Chain) -> _Form:
    return "delete chain netdev {table} {chain}", {"table": TABLE, "chain": chain.name}


def _chain_form(chain: Chain) -> _Form:
    form, names = "add chain netdev {table} {chain}", {"table": TABLE, "chain": chain.name}
    if chain.base is None:
        return form, names
    (device,) = chain.base.devices
    told = _base_words(chain.base, "device {link}")
    return f"{form} {{{{ {told} }}}}", {**names, "link": f'"{device}"'}


def base_words(base: Base | None) -> str:
    """Return what nft(8) shows of a chain before its rules."""
    if base is None:
        return ""
    names = [f'"{name}"' for name in base.devices]
    one = len(names) == 1
    return _base_words(base, f"device {names[0]}" if one else f"devices = {{ {', '.join(names)} }}")


def _base_words(base: Base, devices: str) -> str:
    policy = "accept" if base.accepts else "drop"
    hook = f"type filter hook {base.hook.name.lower()} {devices} priority {base.priority};"
    return f"{hook} policy {policy};"


def rule_words(rule: Rule) -> str:
    """Return a rule in nft's words; what we have none for is its expression's name in brackets."""
    waiting = list(rule.expressions)
    is_ethernet = tuple(waiting[:2]) == ETHERNET
    if is_ethernet:
        del waiting[:2]
    words = []
    while waiting:
        taken, told = _words(waiting, is_ethernet)
        words.append(told)
        del waiting[:taken]
    # NOTE: by the names of fields nft knows which kind of link they are about.
    if is_ethernet and not any(each.startswith(("ether ", "vlan ")) for each in words):
        words.insert(0, "meta iiftype ether")
    if rule.comment:
        words.append(f'comment "{rule.comment}"')
    return " ".join(words)


def _words(waiting: Sequence[Expression], is_ethernet: bool) -> tuple[int, str]:
    """Return how many expressions the next words are about, and the words."""
    match waiting:
        case [Payload() as payload, Compare() as compare, *_]:
            return 2, _match(payload, None, compare, is_ethernet)
        case [Payload() as payload, Mask() as mask, Compare() as compare, *_]:
            return 3, _match(payload, mask, compare, is_ethernet)
        case [Count(), *_]:
            return 1, "counter"
        case [Verdict() as verdict, *_]:
            return 1, f"{verdict.act.name.lower()} {verdict.chain}".rstrip()
    return 1, f"[{waiting[0].kind}]"


def _match(payload: Payload, mask: Mask | None, compare: Compare, is_ethernet: bool) -> str:
    named = is_ethernet and payload.base == 0
    field = _FIELDS.get((payload.offset, payload.length), "") if named else ""
    if field == "vlan id":
        # NOTE: the rest of the tag is the priority, which nft has another name for.
        field, mask = (field, None) if mask == _VID else ("", mask)
    left = field or f"@{_BASES.get(payload.base, '?')},{payload.offset * 8},{payload.length * 8}"
    unlike = "!= " if compare.unlike else ""
    if mask is None:
        return f"{left} {unlike}{_value(field, compare.value)}"
    how = unlike or "== "
    return f"{left} & {_value(field, mask.bits)} {how}{_value(field, compare.value)}"


def _value(field: str, value: bytes) -> str:
    if field.startswith("ether") and len(value) == 6:
        return value.hex(":")
    if field == "vlan id":
        return str(int.from_bytes(value, "big"))
    return f"0x{value.hex()}"


def differences(wanted: Sequence[Chain], seen: Sequence[Chain]) -> tuple[str, ...]:
    """Return what is not as wanted: of each chain its first difference, as the end of a sentence.

    "chain t5 is not there", "rule 2 of chain t5 is `counter accept`, wanted `counter drop`".
    """
    found = {chain.name: chain for chain in seen}
    told = [_difference(chain, found.pop(chain.name, None)) for chain in wanted]
    told += [f"chain {quote(name)} is there" for name in found]
    return tuple(filter(None, told))


def _difference(wanted: Chain, seen: Chain | None) -> str:
    what = f"chain {quote(wanted.name)}"
    if seen is None:
        return f"{what} is not there"
    if wanted.base != seen.base:
        return f"{what} is {_told(base_words(seen.base))}, wanted {_told(base_words(wanted.base))}"
    for number, rules in enumerate(zip_longest(wanted.rules, seen.rules), 1):
        want, have = ("" if rule is None else rule_words(rule) for rule in rules)
        if rules[0] != rules[1]:
            return f"rule {number} of {what} is {_told(have)}, wanted {_told(want)}"
    return ""


def _told(words: str) -> str:
    return f"`{words}`" if words else "none"
