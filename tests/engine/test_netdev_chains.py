"""Filters at a link, on the kernel: what passes a macvtap, what is read back, whose chains go."""

from __future__ import annotations

import re
import sys
import threading
from contextlib import ExitStack

import pytest

from lab.macvtap import ARRIVAL, CASES, FOREIGN, OWN, Case, Macvtap, arriving
from lab.needs import require
from lab.netns import Namespace
from lab.taps import BROADCAST
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.drivers import nft
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
    Meta,
    Payload,
    Rule,
    Verdict,
    chain_name,
    encode_rule,
    is_of_link,
    mark,
    read_rule,
)
from pyqemu_ifup.drivers.nft_words import commands, rule_words
from pyqemu_ifup.guards.nft import link_chains

VARIANTS = {
    "both": (OWN, True),
    "macs": (OWN, False),
    "tags": (None, True),
    "neither": (None, False),
}
"""What is filtered: the MAC that is the guest's, and whether tags are."""
T = "netdev pyqemu-ifup"
DROP = (Count(), Verdict(Act.DROP))


def add_wire(namespace: Namespace) -> None:
    """Make a wire between v0 and v1."""
    lines = ("link add v0 up type veth peer name v1", "link set v1 up")
    namespace.run(["ip", "-batch", "-"], input="\n".join(lines))


def add_macvtap(namespace: Namespace, name: str = "mv0", address: bytes = OWN) -> int:
    """Make a macvtap on v0 and bring it up, to go at the end; return its ifindex."""
    lines = (
        f"link add link v0 name {name} address {address.hex(':')} type macvtap mode bridge",
        f"link set {name} up allmulticast on",
    )
    namespace.run(["ip", "-batch", "-"], input="\n".join(lines))
    namespace.kept.callback(namespace.run, ["ip", "link", "del", name], check=False)
    index: int = namespace.link(name)["ifindex"]
    return index


@pytest.fixture
def wired(inside: Namespace) -> Namespace:
    """The namespace, with this thread in it, and a wire between v0 and v1 that goes afterwards."""
    require("macvtap", "netdev-chains")
    add_wire(inside)
    inside.kept.callback(inside.ip, "link", "del", "v0")
    return inside


def both(index: int, name: str = "mv0") -> tuple[Chain, ...]:
    """Return the chains of a macvtap that filters all that it can."""
    return link_chains(name, index, mac=OWN, tags=True)


def ruleset(namespace: Namespace) -> str:
    """Return what nft(8) shows, without what was counted."""
    listed = namespace.run(["nft", "list", "ruleset"]).stdout
    return re.sub(r"packets \d+ bytes \d+ ", "", listed)


# What passes


@pytest.fixture(scope="module")
def passing() -> dict[str, set[str]]:
    """The names of the cases whose frames arrive, by what is filtered."""
    require("root", "ip", "nft", "macvtap", "netdev-chains")
    found = {}
    for variant, (mac, tags) in VARIANTS.items():
        with Namespace() as namespace:
            add_wire(namespace)
            index = add_macvtap(namespace)
            with namespace.enter(), Macvtap(namespace, "mv0") as macvtap:
                chains = link_chains("mv0", index, mac=mac, tags=tags)
                nft.load("mv0", index, chains)
                nft.prove("mv0", index, chains)
                found[variant] = arriving(macvtap, namespace.raw("v1"))
    return found


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frame_passes_a_macvtap(case: Case, variant: str, passing: dict[str, set[str]]) -> None:
    mac, tags = VARIANTS[variant]
    filters = {"kernel"} | ({"macs"} if mac else set()) | ({"tags"} if tags else set())
    assert (case.name in passing[variant]) == (not case.stopped_by & filters)


def test_no_frame_passes_while_chains_are_replaced(wired: Namespace) -> None:
    index = add_macvtap(wired)
    nft.load("mv0", index, both(index))
    wire = wired.raw("v1")
    bad, good = Case(True, OWN, BROADCAST, "[20]"), Case(True, OWN, BROADCAST, "untagged")
    sent = 0
    done = threading.Event()
    with Macvtap(wired, "mv0") as macvtap:

        def flood() -> None:
            nonlocal sent
            while not done.is_set():
                macvtap.send(bad.frame)
                sent += 1

        flooding = threading.Thread(target=flood)
        flooding.start()
        for _ in range(30):
            nft.load("mv0", index, both(index))
        done.set()
        flooding.join()
        # The last ones, by which the last of the chains has something to count.
        macvtap.send(bad.frame)
        macvtap.send(good.frame)
        tokens = (bad.token, good.token)
        seen = wire.recv(ARRIVAL, lambda data: any(each in data for each in tokens))
    assert seen == good.frame and sent > 100
    last = nft.read("mv0", index)[0].rules[-1].expressions[0]
    assert isinstance(last, Count) and 0 < last.frames <= sent
    nft.remove("mv0", index)


# What is read back


def test_what_is_loaded_is_read_back_and_shown(wired: Namespace) -> None:
    index = add_macvtap(wired)
    wanted = both(index)
    nft.load("mv0", index, wanted)
    assert sorted(nft.read("mv0", index), key=lambda chain: chain.name) == sorted(
        wanted, key=lambda chain: chain.name
    )
    assert {*nft.read_all()} == {*wanted}
    nft.prove("mv0", index, wanted)
    shown = ruleset(wired)
    # Words of its own for each rule, none of them about mere bytes.
    assert "@" not in shown
    assert 'hook egress device "mv0" priority -500; policy accept;' in shown
    assert "ether saddr 52:54:00:00:00:06 accept" in shown
    assert "ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 accept" in shown
    assert shown.count("vlan id 0 vlan type != 8021q vlan type != 8021ad") == 2
    assert shown.count('comment "pyqemu-ifup/1 tap=mv0 sum=') == len(wanted) == 4
    nft.remove("mv0", index)
    assert ruleset(wired) == ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_printed_loads_the_same(variant: str, wired: Namespace) -> None:
    mac, tags = VARIANTS[variant]
    index = add_macvtap(wired)
    wanted = link_chains("mv0", index, mac=mac, tags=tags)
    nft.load("mv0", index, wanted)
    shown = ruleset(wired)
    nft.remove("mv0", index)
    wired.run(["sh", "-e"], input="\n".join(commands(wanted)))
    nft.prove("mv0", index, wanted)
    assert ruleset(wired) == (shown or f"table {T} {{\n}}\n")
    nft.remove("mv0", index)
    assert ruleset(wired) == ""


GROWN: dict[str, tuple[Expression, ...]] = {
    "a word of a header behind Ethernet's": (Payload(12, 4, 1), Compare(bytes((10, 0, 0, 1)))),
    "some bits of it": (Payload(0, 1, 1), Mask(b"\xf0"), Compare(b"\x40", unlike=True)),
    "what is no such field": (*ETHERNET, Payload(3, 3), Compare(b"abc")),
    "another bit of the tag than its VID": (Payload(14, 2), Mask(b"\x10\x00"), Compare(bytes(2))),
}


@pytest.mark.parametrize("name", GROWN)
def test_others_than_ours_are_loaded_and_printed(name: str, wired: Namespace) -> None:
    index = add_macvtap(wired)
    parts = [chain_name(index, each) for each in ("part", "end")]
    wanted = mark(
        (
            Chain(parts[1], (Rule(DROP),)),
            Chain(parts[0], (Rule((*GROWN[name], Verdict(Act.RETURN))), Rule(DROP))),
            Chain(
                chain_name(index),
                (Rule((Verdict(Act.JUMP, parts[0]),)), Rule((Verdict(Act.GOTO, parts[1]),))),
                Base(Hook.INGRESS, ("mv0",), -10, accepts=False),
            ),
        ),
        "mv0",
    )
    nft.load("mv0", index, wanted)
    nft.prove("mv0", index, wanted)
    nft.load("mv0", index, wanted)
    nft.remove("mv0", index)
    wired.run(["sh", "-e"], input="\n".join(commands(wanted)))
    nft.prove("mv0", index, wanted)
    nft.remove("mv0", index)


@pytest.mark.parametrize(
    "expression",
    [
        Meta(1),
        Payload(14, 2),
        Payload(0, 4, 2),
        Mask(b"\x0f\xff"),
        Compare(b"\x08\x00"),
        Compare(b"abcdef", unlike=True),
        Count(5, 320),
        *map(Verdict, (Act.DROP, Act.ACCEPT, Act.RETURN)),
        Verdict(Act.JUMP, "t5-tags"),
        Verdict(Act.GOTO, "t5-tags"),
    ],
    ids=repr,
)
def test_an_expression_is_read_as_it_was_written(expression: Expression) -> None:
    rule = Rule((expression, *DROP), "a comment")
    chain, found = read_rule(encode_rule("t5", rule))
    assert (chain, found) == ("t5", rule) and repr(found) == repr(rule)


def test_whose_a_chain_is() -> None:
    assert [is_of_link(name, 5) for name in ("t5", "t5-tags", "t51", "t51-tags", "t", "x5")] == [
        *(True, True),
        *(False,) * 4,
    ]


EDITS = {
    "delete chain {t} {c}": "chain {c} is not there",
    "flush chain {t} {c}": 'rule 1 of chain {c} is none, wanted `jump {c}-tags comment "{m}"`',
    "flush table {t}": "rule 1 of chain {c}-egress-tags is none, wanted `{untagged}`",
    "add rule {t} {c} accept": "rule 5 of chain {c} is `accept`, wanted none",
    "insert rule {t} {c} limit rate 1/second": (
        'rule 1 of chain {c} is `[limit]`, wanted `jump {c}-tags comment "{m}"`'
    ),
    "insert rule {t} {c} meta mark 1 accept": (
        'rule 1 of chain {c} is `[meta] [cmp] accept`, wanted `jump {c}-tags comment "{m}"`'
    ),
    "add rule {t} {c}-tags ether type vmap {{ arp : accept }}": (
        "rule 4 of chain {c}-tags is `meta iiftype ether [payload] [lookup]`, wanted none"
    ),
    "add chain {t} {c}-more": "chain {c}-more is there",
    "add chain {t} {c} {{ policy drop; }}": (
        'chain {c} is `type filter hook ingress device "mv0" priority -500; policy drop;`, '
        'wanted `type filter hook ingress device "mv0" priority -500; policy accept;`'
    ),
    "add table {t} {{ flags dormant; }}": "table netdev pyqemu-ifup is dormant",
    "delete table {t}": "chain {c}-egress-tags is not there",
}
"""What somebody does with nft(8), and what is told of it."""


def test_a_dormant_table_has_no_chain_in_force(wired: Namespace) -> None:
    index = add_macvtap(wired)
    wanted = both(index)
    nft.load("mv0", index, wanted)
    wired.run(["nft", f"add table {T} {{ flags dormant; }}"])
    assert nft.read("mv0", index) == ()
    nft.load("mv0", index, wanted)
    assert {chain.name for chain in nft.read("mv0", index)} == {chain.name for chain in wanted}
    nft.remove("mv0", index)


@pytest.mark.parametrize("edit", EDITS)
def test_what_somebody_changes_is_told_and_mended(edit: str, wired: Namespace) -> None:
    index = add_macvtap(wired)
    wanted = both(index)
    nft.load("mv0", index, wanted)
    names = {
        "t": T,
        "c": chain_name(index),
        "m": wanted[0].rules[0].comment,
        "untagged": rule_words(wanted[0].rules[0]),
    }
    wired.run(["nft", edit.format_map(names)])
    with pytest.raises(Failure) as failed:
        nft.prove("mv0", index, wanted)
    why = EDITS[edit].format_map(names)
    assert str(failed.value) == f"the guest's frames are not filtered as wanted: {why}"
    assert failed.value.status == Status.REFUSED
    nft.load("mv0", index, wanted)
    nft.prove("mv0", index, wanted)
    nft.remove("mv0", index)
    assert ruleset(wired) == ""


# Whose chains go


def test_chains_of_an_older_link_go_with_the_load(wired: Namespace) -> None:
    """Linux 6.16 and later bind the chain of a link that is gone to the next one of its name."""
    old = add_macvtap(wired)
    nft.load("mv0", old, both(old))
    wired.ip("link", "del", "mv0")
    new = add_macvtap(wired)
    assert new != old
    nft.load("mv0", new, link_chains("mv0", new, mac=FOREIGN, tags=False))
    kept = {chain.name for chain in nft.read_all()}
    # Older ones let the base chains go with their link; what they jump to is found by its number.
    assert {name for name in kept if is_of_link(name, new)} == {
        chain_name(new),
        chain_name(new, "egress"),
    }
    assert not kept & {chain_name(old), chain_name(old, "egress")}
    nft.remove("mv0", old)
    nft.remove("mv0", new)
    assert ruleset(wired) == ""


def test_chains_of_the_link_s_number_go_with_the_load_and_no_others(wired: Namespace) -> None:
    index = add_macvtap(wired)
    left_over = link_chains("v1", index, mac=FOREIGN, tags=True)
    another_s = link_chains("v0", index * 10, mac=FOREIGN, tags=True)
    wired.run(["sh", "-e"], input="\n".join((*commands(left_over), *commands(another_s))))
    nft.load("mv0", index, both(index))
    nft.prove("mv0", index, both(index))
    assert {*nft.read_all()} == {*both(index), *another_s}
    # Neither does it stay when nothing is to be filtered any more.
    nft.load("mv0", index, ())
    assert {*nft.read_all()} == {*another_s}
    nft.remove("v0", index * 10)
    assert ruleset(wired) == ""


@pytest.mark.parametrize("kind", ["a set", "a chain"])
def test_the_table_stays_with_what_is_not_ours(kind: str, wired: Namespace) -> None:
    index = add_macvtap(wired)
    nft.load("mv0", index, both(index))
    words = {"a set": "set {t} x {{ type mark; }}", "a chain": "chain {t} x"}[kind].format(t=T)
    wired.run(["nft", f"add {words}"])
    nft.remove("mv0", index)
    assert nft.read_all() == () and "pyqemu-ifup" in ruleset(wired)
    wired.run(["nft", f"delete table {T}"])


FOREIGN_TABLE = (
    "the guest's frames cannot be filtered: table netdev pyqemu-ifup is somebody else's: no chain "
    "there has our mark; see what it is for, then nft 'delete table netdev pyqemu-ifup'"
)
FOREIGN_CHAIN = (
    "the guest's frames cannot be filtered: chain {c} of table netdev pyqemu-ifup is somebody "
    "else's; see what it is for, then nft 'delete chain netdev pyqemu-ifup {c}'"
)


@pytest.mark.parametrize(
    ("chains", "told"),
    [
        (("mine",), FOREIGN_TABLE),
        (("t7", "mine"), FOREIGN_TABLE),
        (("{c}",), FOREIGN_TABLE),
        (("ours", "{c}"), FOREIGN_CHAIN),
        (("ours", "{c}-tags"), FOREIGN_CHAIN.replace("{c}", "{c}-tags")),
    ],
    ids=("a table", "with a name like ours", "with that name", "a chain", "a part of it"),
)
def test_what_is_somebody_else_s_is_left_alone(
    chains: tuple[str, ...], told: str, wired: Namespace
) -> None:
    index, other = add_macvtap(wired), add_macvtap(wired, "mv1", FOREIGN)
    name = chain_name(index)
    wired.run(["nft", f"add table {T}"])
    for each in chains:
        if each == "ours":
            nft.load("mv1", other, both(other, "mv1"))
        else:
            chain = each.format(c=name)
            wired.run(["nft", f"add chain {T} {chain}; add rule {T} {chain} counter comment tap"])
    before = ruleset(wired)
    with pytest.raises(Failure) as failed:
        nft.load("mv0", index, both(index))
    assert (str(failed.value), failed.value.status) == (told.format(c=name), Status.DENIED)
    nft.remove("mv0", index)
    assert nft.read("mv0", index) == () and ruleset(wired) == before
    wired.run(["sh", "-ec", str(failed.value).partition("; see what it is for, then ")[2]])
    nft.load("mv0", index, both(index))
    nft.remove("mv0", index)
    nft.remove("mv1", other)
    assert ruleset(wired) == ""


def test_a_link_that_is_not_there_has_no_chains(wired: Namespace) -> None:
    index = add_macvtap(wired)
    wired.ip("link", "set", "mv0", "down")
    wired.ip("link", "set", "mv0", "name", "mv1")
    for attempt in (nft.load, nft.prove):
        with pytest.raises(Failure) as failed:
            attempt("mv0", index, both(index))
        assert str(failed.value) == f"there is no link mv0: link {index} is mv1 now"
        assert failed.value.status == Status.UNAVAILABLE
    wired.ip("link", "del", "mv1")
    with pytest.raises(Failure, match=f"^there is no link mv0: link {index} is gone$"):
        nft.load("mv0", index, both(index))
    nft.remove("mv0", index)
    assert ruleset(wired) == ""


def test_without_privilege_nothing_is_told(netns: Namespace) -> None:
    require("netdev-chains")
    code = """if True:
        import os
        from pyqemu_ifconf.failure import Failure
        from pyqemu_ifup.drivers import nft
        os.setresuid(65534, 65534, 65534)
        for attempt in (nft.read, nft.remove):
            try:
                attempt("lo", 1)
            except Failure as failure:
                print(failure.status.value, failure)
    """
    told = (
        "77 the guest's frames cannot be filtered: Operation not permitted; run as root, or with "
        "CAP_NET_ADMIN in the tap's network namespace\n"
    )
    assert netns.run([sys.executable, "-c", code]).stdout == told * 2


def test_many_links_at_once(wired: Namespace) -> None:
    """Each takes the table away with its last chain, while others are about to add theirs."""
    names = [f"mv{number}" for number in range(4)]
    index = {
        name: add_macvtap(wired, name, bytes((2, 0, 0, 0, 1, number)))
        for number, name in enumerate(names)
    }
    wrong: list[str] = []

    def come_and_go(name: str) -> None:
        wanted = both(index[name], name)
        with wired.enter():
            try:
                for _ in range(25):
                    nft.load(name, index[name], wanted)
                    nft.prove(name, index[name], wanted)
                    nft.remove(name, index[name])
            except Failure as failure:
                wrong.append(f"{name}: {failure}")

    with ExitStack() as threads:
        for name in names:
            thread = threading.Thread(target=come_and_go, args=(name,))
            thread.start()
            threads.callback(thread.join)
    assert wrong == []
    assert ruleset(wired) == ""


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a*"])
def test_a_link_that_nft_has_no_words_for(wired: Namespace, name: str) -> None:
    index = add_macvtap(wired, name)
    wanted = both(index, name)
    nft.load(name, index, wanted)
    nft.prove(name, index, wanted)
    assert commands(wanted) == ("# nft cannot be told of a name of these",)
    nft.remove(name, index)
