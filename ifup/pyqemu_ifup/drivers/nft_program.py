"""Loads, reads and deletes the tables of networks by nft(8), and looks at who else drops.

What it reads is what is in force, rule by rule, in the words that the rules are written in
(libnftables-json(5)); what those words do not have comes as it was read, and equals nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pyqemu_ifconf.failure import Failure, Forbidden, Status
from pyqemu_ifconf.names import is_network_name
from pyqemu_ifconf.shell import Command, all_of, nft_command, sh
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.nft_table import TABLE, Chain, Table, table_name
from pyqemu_ifup.drivers.programs import Run, run_program
from pyqemu_ifup.hook import SAFE_PATH

PROGRAM = "nft"
_LINKS = ("iifname", "oifname")
"""The keys of `meta` whose values are names of links."""


@dataclass(frozen=True)
class DroppingChain:
    """A base chain of the packet filters that drops what no rule of its accepts.

    It does so by its policy, or by a rule without a condition, whose handle `rule` is. `accepts`
    are the links whose frames it accepts, as ("iifname" or "oifname", name). `legacy`: it is one of
    iptables' own, which nft(8) does not show.
    """

    family: str
    table: str
    name: str
    hook: str
    rule: int | None = None
    accepts: frozenset[tuple[str, str]] = frozenset()
    legacy: bool = False

    def ways_of(self, bridge: str, *, ipv6: bool) -> list[str]:
        """Return the ways ("iifname", "oifname") on which it drops what is forwarded for a bridge.

        `ipv6`: IPv6 is forwarded for it, too.
        """
        families = ("ip", "ip6", "inet") if ipv6 else ("ip", "inet")
        if self.hook != "forward" or self.family not in families:
            return []
        return [way for way in _LINKS if (way, bridge) not in self.accepts]

    def accepting(self, bridge: str, ways: Iterable[str]) -> Command:
        """Return the command that has it accept what comes from a bridge, or goes to it."""
        if self.legacy:
            tool = "iptables-legacy" if self.family == "ip" else "ip6tables-legacy"
            return all_of(
                *(
                    sh(
                        tool,
                        "-I",
                        self.name,
                        "-i" if way == "iifname" else "-o",
                        bridge,
                        "-j",
                        "ACCEPT",
                    )
                    for way in ways
                )
            )
        # NOTE: iptables' own chains are nft's too, and need not have iptables on this host.
        return all_of(
            *(
                nft_command(
                    "insert rule {family} {table} {chain} {way} {link} accept",
                    family=self.family,
                    table=self.table,
                    chain=self.name,
                    way=way,
                    link=f'"{bridge}"',
                )
                for way in ways
            )
        )


def is_there() -> bool:
    """Tell whether this host has nft(8)."""
    return shutil.which(PROGRAM, path=SAFE_PATH) is not None


async def read_table(network: str, deadline: Deadline) -> Table | None:
    """Return the network's table as it is in force, None where there is none.

    Raises Failure: 75 by the deadline, 77 without privilege, 71.
    """
    words = [PROGRAM, "-j", "list", "table", "inet", table_name(network)]
    done = await run_program(words, deadline)
    if done.status != 0:
        if _is_gone(done):
            return None
        raise _failure(done)
    return parse_table(json.loads(done.out)["nftables"])


def parse_table(items: list[dict[str, Any]]) -> Table:
    """Return the table that these objects make, as `nft -j list table` gives them."""
    chains: dict[str, tuple[dict[str, Any], list[str]]] = {}
    comments: list[str] = []
    others: list[str] = []
    for item in items:
        ((kind, value),) = item.items()
        if kind == "chain":
            chains[value["name"]] = (value, [])
        elif kind == "rule":
            chains[value["chain"]][1].append(" ".join(map(_statement, value["expr"])))
            comments += [str(value["comment"])] if "comment" in value else []
        elif kind == "table" and "flags" in value:
            # NOTE: one that is dormant has all its rules, and none is in force.
            others.append("flags")
        elif kind not in ("metainfo", "table"):
            others.append(f"{kind} {value.get('name', '')}")
    return Table(
        comments[0] if comments else "",
        tuple(
            Chain(
                name,
                head.get("type", ""),
                head.get("hook", ""),
                head.get("prio", 0),
                tuple(rules),
                head.get("policy", "accept"),
            )
            for name, (head, rules) in chains.items()
        ),
        tuple(others),
    )


def _statement(each: dict[str, Any]) -> str:
    ((kind, value),) = each.items()
    if kind == "match":
        negated = "!= " if value["op"] == "!=" else ""
        left = _left(value["left"])
        right = _right(value["right"], '"' if left in _LINKS else "")
        return f"{left} {negated}{right}"
    if kind == "dnat" and value.keys() == {"family", "addr", "port"}:
        return f"dnat {value['family']} to {value['addr']}:{value['port']}"
    if kind == "mangle":
        return f"{_left(value['key'])} set {_right(value['value'], '')}"
    if kind == "counter" or value is None:
        return str(kind)
    return json.dumps(each, sort_keys=True)


def _left(value: Any) -> str:
    ((kind, words),) = value.items()
    if kind == "payload" and words.keys() == {"protocol", "field"}:
        return f"{words['protocol']} {words['field']}"
    if kind == "meta":
        return words["key"] if words["key"] in _LINKS else f"meta {words['key']}"
    if kind == "ct" and words.keys() == {"key"}:
        return f"ct {words['key']}"
    if kind == "fib":
        flags = words["flags"]
        return f"fib {flags if isinstance(flags, str) else ' . '.join(flags)} {words['result']}"
    return json.dumps(value, sort_keys=True)


def _right(value: Any, quote: str) -> str:
    if isinstance(value, list):
        return ",".join(sorted(_right(each, quote) for each in value))
    if not isinstance(value, dict):
        return f"{quote}{value}{quote}"
    ((kind, words),) = value.items()
    if kind == "prefix":
        return f"{words['addr']}/{words['len']}"
    if kind == "range":
        return "-".join(map(str, words))
    if kind == "set" and isinstance(words, list):
        return f"{{ {', '.join(sorted(_right(each, quote) for each in words))} }}"
    return json.dumps(value, sort_keys=True)


async def load(text: str, deadline: Deadline, *, try_only: bool = False) -> None:
    """Load commands of nft(8), all or none of them. Raises Failure as `read_table`.

    `try_only`: see whether the kernel takes them, and change nothing.
    """
    check = ["-c"] if try_only else []
    done = await run_program([PROGRAM, *check, "-f", "-"], deadline, text)
    if done.status != 0:
        raise _failure(done)


async def delete_table(network: str, deadline: Deadline) -> None:
    """Delete the network's table; gone already is success. Raises Failure as `read_table`."""
    done = await run_program([PROGRAM, "delete", "table", "inet", table_name(network)], deadline)
    if done.status != 0 and not _is_gone(done):
        raise _failure(done)


async def find_table_networks(deadline: Deadline) -> list[str]:
    """Return the networks that have a table of such a name; none where that may not be seen."""
    if not is_there():
        return []
    done = await run_program([PROGRAM, "-j", "list", "tables", "inet"], deadline)
    items = json.loads(done.out)["nftables"] if done.status == 0 else []
    names = [str(each.get("table", {}).get("name", "")) for each in items]
    networks = [name.removeprefix(TABLE) for name in names if name.startswith(TABLE)]
    return [network for network in networks if is_network_name(network)]


async def list_ruleset(deadline: Deadline) -> list[dict[str, Any]]:
    """Return all objects of the ruleset (libnftables-json(5)). Raises Failure as `read_table`."""
    done = await run_program([PROGRAM, "-j", "list", "ruleset"], deadline)
    if done.status != 0:
        raise _failure(done)
    found: list[dict[str, Any]] = json.loads(done.out)["nftables"]
    return found


async def find_dropping_chains(deadline: Deadline) -> list[DroppingChain]:
    """Return the base chains that drop, but our own. Raises Failure as `read_table`."""
    return read_dropping(await list_ruleset(deadline))


def read_dropping(items: Iterable[dict[str, Any]]) -> list[DroppingChain]:
    """Do as `find_dropping_chains`, of the objects of a ruleset."""
    bases: dict[tuple[str, str, str], str] = {}
    accepts: dict[tuple[str, str, str], set[tuple[str, str]]] = {}
    found: list[DroppingChain] = []
    for each in items:
        chain, rule = each.get("chain"), each.get("rule")
        if chain and "hook" in chain and not chain["table"].startswith(TABLE):
            key = (chain["family"], chain["table"], chain["name"])
            bases[key] = chain["hook"]
            if chain.get("policy") == "drop":
                found.append(DroppingChain(*key, chain["hook"]))
        elif rule:
            key = (rule["family"], rule["table"], rule["chain"])
            does = [part for part in rule.get("expr", ()) if "counter" not in part]
            if key in bases and does == [{"drop": None}]:
                found.append(DroppingChain(*key, bases[key], rule["handle"]))
            else:
                accepts.setdefault(key, set()).update(accepted_links(rule))
    return [
        replace(each, accepts=frozenset(accepts.get((each.family, each.table, each.name), ())))
        for each in found
    ]


def accepted_links(rule: dict[str, Any]) -> set[tuple[str, str]]:
    """Return the links that are a rule's only condition to accept a packet, each with its way."""
    does = [part for part in rule.get("expr", ()) if "counter" not in part]
    if len(does) != 2 or does[1] != {"accept": None}:
        return set()
    match = does[0].get("match", {})
    left, right = match.get("left"), match.get("right")
    way = left.get("meta", {}).get("key") if isinstance(left, dict) else None
    if way not in _LINKS or match.get("op") != "==":
        return set()
    names = right.get("set", ()) if isinstance(right, dict) else (right,)
    return {(way, name) for name in names if isinstance(name, str)}


def _is_gone(done: Run) -> bool:
    return "No such file or directory" in done.err


def _failure(done: Run) -> Failure:
    said = done.err.strip().splitlines()
    why = said[0] if said else f"it ended with {done.status}"
    if "Operation not permitted" in done.err:
        return Forbidden("nft does not do it", why, net_admin=True)
    return Failure(
        Status.REFUSED, "nft does not do it", why, "see whether this kernel has nf_tables and NAT"
    )
