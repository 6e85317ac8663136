"""Rules and chains of nftables' family netdev as values, to and from the kernel's bytes.

What the numbers mean is in linux/netfilter/nf_tables.h. What is read back equals what was sent:
what a counter has counted has no part in it, nor an attribute that only a newer kernel tells.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from hashlib import sha256
from typing import ClassVar
from urllib.parse import quote as percent

from pyqemu_ifup.drivers.netlink import RTATTR, attribute, attributes, reads_message

NFNL_SUBSYS_NFTABLES = 10
TABLE = "pyqemu-ifup"
"""The table of the family netdev that holds all chains of ours."""
MARK = "pyqemu-ifup/1"
"""What our comments begin with."""
PRIORITY = -500
"""Before all that is usual at a hook."""

U32, U64 = struct.Struct("!I"), struct.Struct("!Q")
NFTA_TABLE_NAME = 1
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK = 1, 3, 4
NFTA_CHAIN_POLICY, NFTA_CHAIN_TYPE = 5, 7
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY, NFTA_HOOK_DEV, NFTA_HOOK_DEVS = 1, 2, 3, 4
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_USERDATA = 1, 2, 4, 7
NFTA_LIST_ELEM, NFTA_EXPR_NAME, NFTA_EXPR_DATA = 1, 1, 2
NFTA_META_DREG, NFTA_META_KEY = 1, 2
NFTA_PAYLOAD_DREG, NFTA_PAYLOAD_BASE, NFTA_PAYLOAD_OFFSET, NFTA_PAYLOAD_LEN = 1, 2, 3, 4
NFTA_BITWISE_SREG, NFTA_BITWISE_DREG, NFTA_BITWISE_LEN = 1, 2, 3
NFTA_BITWISE_MASK, NFTA_BITWISE_XOR, NFTA_BITWISE_OP = 4, 5, 6
NFTA_CMP_SREG, NFTA_CMP_OP, NFTA_CMP_DATA = 1, 2, 3
NFTA_COUNTER_BYTES, NFTA_COUNTER_PACKETS = 1, 2
NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA = 1, 2
NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN = 1, 2, 1, 2
NFTNL_UDATA_RULE_COMMENT = 0
"""The type of a comment in a rule's data, as nft(8) writes it (libnftnl/udata.h)."""
NFT_REG_VERDICT, NFT_REG_1 = 0, 1
NFT_CMP_EQ, NFT_CMP_NEQ = 0, 1
NF_DROP, NF_ACCEPT = 0, 1
NFT_META_IIFTYPE = 8


# Expressions


@dataclass(frozen=True)
class Meta:
    """Takes what the kernel knows of a frame beside its bytes, by its number (NFT_META_*)."""

    key: int
    kind: ClassVar[str] = "meta"

    def data(self) -> bytes:
        """Return its attributes, as a message has them."""
        return _u32(NFTA_META_KEY, self.key) + _u32(NFTA_META_DREG, NFT_REG_1)


@dataclass(frozen=True)
class Payload:
    """Takes bytes of a frame: `offset` counts from where the header `base` begins, Ethernet's is 0.

    A VLAN tag is where it was on the wire, wherever the kernel keeps it. If the frame has no such
    bytes, the rule does not match, whatever they are compared with.
    """

    offset: int
    length: int
    base: int = 0
    kind: ClassVar[str] = "payload"

    def data(self) -> bytes:
        """Return its attributes, as a message has them."""
        numbers = (
            (NFTA_PAYLOAD_DREG, NFT_REG_1),
            (NFTA_PAYLOAD_BASE, self.base),
            (NFTA_PAYLOAD_OFFSET, self.offset),
            (NFTA_PAYLOAD_LEN, self.length),
        )
        return b"".join(_u32(*each) for each in numbers)


@dataclass(frozen=True)
class Mask:
    """Keeps these bits of what was taken."""

    bits: bytes
    kind: ClassVar[str] = "bitwise"

    def data(self) -> bytes:
        """Return its attributes, as a message has them."""
        numbers = (
            (NFTA_BITWISE_SREG, NFT_REG_1),
            (NFTA_BITWISE_DREG, NFT_REG_1),
            (NFTA_BITWISE_LEN, len(self.bits)),
            (NFTA_BITWISE_OP, 0),
        )
        values = ((NFTA_BITWISE_MASK, self.bits), (NFTA_BITWISE_XOR, bytes(len(self.bits))))
        return b"".join(
            (
                *(_u32(*each) for each in numbers),
                *(attribute(kind, attribute(NFTA_DATA_VALUE, value)) for kind, value in values),
            )
        )


@dataclass(frozen=True)
class Compare:
    """Goes on with the rule if what was taken is this value; `unlike`: if it is another."""

    value: bytes
    unlike: bool = False
    kind: ClassVar[str] = "cmp"

    def data(self) -> bytes:
        """Return its attributes, as a message has them."""
        how = NFT_CMP_NEQ if self.unlike else NFT_CMP_EQ
        value = attribute(NFTA_CMP_DATA, attribute(NFTA_DATA_VALUE, self.value))
        return _u32(NFTA_CMP_SREG, NFT_REG_1) + _u32(NFTA_CMP_OP, how) + value


@dataclass(frozen=True)
class Count:
    """Counts the frames that come here, and their bytes; two are equal whatever they counted."""

    frames: int = field(default=0, compare=False)
    octets: int = field(default=0, compare=False)
    kind: ClassVar[str] = "counter"

    def data(self) -> bytes:
        """Return its attributes, as a message has them."""
        octets = attribute(NFTA_COUNTER_BYTES, U64.pack(self.octets))
        return octets + attribute(NFTA_COUNTER_PACKETS, U64.pack(self.frames))


class Act(IntEnum):
    """What becomes of a frame: NF_DROP and the like of linux/netfilter.h, NFT_JUMP and the like."""

    DROP = NF_DROP
    ACCEPT = NF_ACCEPT
    JUMP = -3
    GOTO = -4
    RETURN = -5


@dataclass(frozen=True)
class Verdict:
    """Says what becomes of the frame; `chain` is where a jump or a goto leads."""

    act: Act
    chain: str = ""
    kind: ClassVar[str] = "immediate"

    def data(self) -> bytes:
        """Return its attributes, as a message has them."""
        code = _u32(NFTA_VERDICT_CODE, self.act)
        chain = _text(NFTA_VERDICT_CHAIN, self.chain) if self.chain else b""
        verdict = attribute(NFTA_IMMEDIATE_DATA, attribute(NFTA_DATA_VERDICT, code + chain))
        return _u32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT) + verdict


@dataclass(frozen=True)
class Other:
    """An expression that is none of the above, as it was read; a name, and its attributes."""

    kind: str
    read: bytes

    def data(self) -> bytes:
        """Return its attributes, as a message has them."""
        return self.read


Expression = Meta | Payload | Mask | Compare | Count | Verdict | Other
ETHERNET: tuple[Expression, ...] = (Meta(NFT_META_IIFTYPE), Compare(struct.pack("=H", 1)))
"""What a rule that looks into an Ethernet header begins with: the link is of that kind."""


# Rules and chains


@dataclass(frozen=True)
class Rule:
    """Expressions in their order; `comment` is what nft(8) shows as such, of at most 128 bytes."""

    expressions: tuple[Expression, ...]
    comment: str = ""


class Hook(IntEnum):
    """Where at a link a chain sees the frames (NF_NETDEV_INGRESS and NF_NETDEV_EGRESS)."""

    INGRESS = 0
    EGRESS = 1


@dataclass(frozen=True)
class Base:
    """What makes a chain see frames by itself: its hook at these links, and with which priority.

    `accepts`: what no rule decides goes on.
    """

    hook: Hook
    devices: tuple[str, ...]
    priority: int = PRIORITY
    accepts: bool = True


@dataclass(frozen=True)
class Chain:
    """A chain of our table; one without a base sees what a rule has jump there."""

    name: str
    rules: tuple[Rule, ...]
    base: Base | None = None


def chain_name(index: int, part: str = "") -> str:
    """Return the name of a chain of the link with this ifindex: `t5`, or `t5-PART`."""
    return f"t{index}-{part}" if part else f"t{index}"


def is_of_link(name: str, index: int) -> bool:
    """Tell whether a chain of this name is one of the link with this ifindex."""
    return name == f"t{index}" or name.startswith(f"t{index}-")


def link_of(name: str) -> int | None:
    """Return the ifindex of the link that a chain of this name is of; None of another name."""
    found = re.fullmatch(r"t([1-9]\d*)(-.+)?", name, re.ASCII)
    return int(found[1]) if found else None


def mark(chains: Sequence[Chain], tap: str) -> tuple[Chain, ...]:
    """Return the chains with our mark in each one's first rule: whose it is, and a sum of it all.

    Each has a rule at least.
    """
    told = b"".join(
        part
        for chain in chains
        for part in (encode_chain(chain), *(encode_rule(chain.name, rule) for rule in chain.rules))
    )
    comment = f"{MARK} tap={percent(tap, safe='._-')} sum={sha256(told).hexdigest()[:16]}"
    return tuple(
        replace(chain, rules=(replace(chain.rules[0], comment=comment), *chain.rules[1:]))
        for chain in chains
    )


def is_ours(chain: Chain) -> bool:
    """Tell whether a chain has our mark, or our name and no rule: one that has been flushed."""
    if not chain.rules:
        return link_of(chain.name) is not None
    # NOTE: in any of them, since somebody may have put a rule before ours.
    return any(rule.comment.split(" ")[0] == MARK for rule in chain.rules)


# To the kernel


def encode_chain(chain: Chain) -> bytes:
    """Return the attributes that make the chain, of a NFT_MSG_NEWCHAIN, without its rules."""
    body = name_chain(chain.name)
    if chain.base is None:
        return body
    base = chain.base
    hook = _u32(NFTA_HOOK_HOOKNUM, base.hook) + _u32(NFTA_HOOK_PRIORITY, base.priority)
    (device,) = base.devices
    hook += attribute(NFTA_HOOK_DEV, os.fsencode(device) + b"\0")
    policy = _u32(NFTA_CHAIN_POLICY, NF_ACCEPT if base.accepts else NF_DROP)
    return body + attribute(NFTA_CHAIN_HOOK, hook) + policy + _text(NFTA_CHAIN_TYPE, "filter")


def name_table() -> bytes:
    """Return the attribute that names our table."""
    return _text(NFTA_TABLE_NAME, TABLE)


def name_chain(name: str) -> bytes:
    """Return the attributes that name a chain of our table."""
    return _text(NFTA_CHAIN_TABLE, TABLE) + _text(NFTA_CHAIN_NAME, name)


def name_rules(chain: str | None = None) -> bytes:
    """Return the attributes that name all the rules of a chain; None stands for all the table's."""
    of_chain = b"" if chain is None else _text(NFTA_RULE_CHAIN, chain)
    return _text(NFTA_RULE_TABLE, TABLE) + of_chain


def encode_rule(chain: str, rule: Rule) -> bytes:
    """Return the attributes of a NFT_MSG_NEWRULE for a chain of our table."""
    body = name_rules(chain) + attribute(
        NFTA_RULE_EXPRESSIONS,
        b"".join(
            attribute(
                NFTA_LIST_ELEM,
                _text(NFTA_EXPR_NAME, each.kind) + attribute(NFTA_EXPR_DATA, each.data()),
            )
            for each in rule.expressions
        ),
    )
    if rule.comment:
        told = rule.comment.encode() + b"\0"
        body += attribute(NFTA_RULE_USERDATA, bytes((NFTNL_UDATA_RULE_COMMENT, len(told))) + told)
    return body


def _u32(kind: int, number: int) -> bytes:
    return attribute(kind, U32.pack(number & 0xFFFFFFFF))


def _text(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")


# From the kernel


@reads_message
def read_chain(body: bytes) -> tuple[str, Chain]:
    """Return the chain that the attributes of a message tell of, without rules, and its table."""
    found = attributes(body)
    base = None
    if NFTA_CHAIN_HOOK in found:
        hook = attributes(found[NFTA_CHAIN_HOOK])
        one = [hook[NFTA_HOOK_DEV]] if NFTA_HOOK_DEV in hook else []
        devices = list(_listed(hook.get(NFTA_HOOK_DEVS, b""))) or one
        base = Base(
            Hook(int.from_bytes(hook[NFTA_HOOK_HOOKNUM], "big")),
            tuple(os.fsdecode(each.rstrip(b"\0")) for each in devices),
            int.from_bytes(hook[NFTA_HOOK_PRIORITY], "big", signed=True),
            int.from_bytes(found[NFTA_CHAIN_POLICY], "big") == NF_ACCEPT,
        )
    return _string(found[NFTA_CHAIN_TABLE]), Chain(_string(found[NFTA_CHAIN_NAME]), (), base)


@reads_message
def read_rule(body: bytes) -> tuple[str, Rule]:
    """Return the rule that the attributes of a message tell of, and the name of its chain."""
    found = attributes(body)
    expressions = []
    for element in _listed(found.get(NFTA_RULE_EXPRESSIONS, b"")):
        told = attributes(element)
        name = _string(told[NFTA_EXPR_NAME])
        expressions.append(_expression(name, told.get(NFTA_EXPR_DATA, b"")))
    comment = _comment(found.get(NFTA_RULE_USERDATA, b""))
    return _string(found[NFTA_RULE_CHAIN]), Rule(tuple(expressions), comment)


def _expression(name: str, data: bytes) -> Expression:
    found = attributes(data)
    numbers = {kind: int.from_bytes(value, "big") for kind, value in found.items()}
    made: Expression | None = None
    if name == Meta.kind and NFTA_META_KEY in numbers:
        made = Meta(numbers[NFTA_META_KEY])
    elif name == Payload.kind and NFTA_PAYLOAD_DREG in numbers:
        made = Payload(
            numbers[NFTA_PAYLOAD_OFFSET], numbers[NFTA_PAYLOAD_LEN], numbers[NFTA_PAYLOAD_BASE]
        )
    elif name == Mask.kind and NFTA_BITWISE_MASK in found:
        made = Mask(attributes(found[NFTA_BITWISE_MASK])[NFTA_DATA_VALUE])
    elif name == Compare.kind:
        value = attributes(found[NFTA_CMP_DATA])[NFTA_DATA_VALUE]
        made = Compare(value, numbers[NFTA_CMP_OP] == NFT_CMP_NEQ)
    elif name == Count.kind:
        made = Count(numbers[NFTA_COUNTER_PACKETS], numbers[NFTA_COUNTER_BYTES])
    elif name == Verdict.kind:
        told = attributes(attributes(found[NFTA_IMMEDIATE_DATA]).get(NFTA_DATA_VERDICT, b""))
        code = int.from_bytes(told.get(NFTA_VERDICT_CODE, b"\x7f"), "big", signed=True)
        if code in set(Act):
            made = Verdict(Act(code), _string(told.get(NFTA_VERDICT_CHAIN, b"")))
    # NOTE: the same value in another register, or by another operation, is none of these.
    if made is None or not attributes(made.data()).items() <= found.items():
        return Other(name, data)
    return made


def _comment(data: bytes) -> str:
    """Return the comment among a rule's data, each part of which is its type, length and value."""
    at = 0
    while at + 2 <= len(data):
        kind, length = data[at : at + 2]
        if kind == NFTNL_UDATA_RULE_COMMENT:
            return _string(data[at + 2 : at + 2 + length])
        at += 2 + length
    return ""


def _string(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _listed(data: bytes) -> Iterator[bytes]:
    """Yield the values of attributes, of which several have one type."""
    at = 0
    while at + RTATTR.size <= len(data):
        length, _ = RTATTR.unpack_from(data, at)
        if length < RTATTR.size:
            break
        yield data[at + RTATTR.size : at + length]
        at += (length + 3) & ~3
