"""An nft(8) table of a network: what is in it, whose it is, and the text that loads it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from pyqemu_ifconf.shell import Command, piped, sh
from pyqemu_ifup.mark import ALIAS_MARK

TABLE = "pyqemu-ifup-"
"""How the name of each table of ours begins; the network's name follows."""


def table_name(network: str) -> str:
    """Return the name of the network's nft table."""
    return f"{TABLE}{network}"


@dataclass(frozen=True)
class Chain:
    """A chain of an nft table, its rules in nft(8)'s words; no packet comes to one without a hook.

    The elements of a set, `{ ... }`, are sorted.
    """

    name: str
    type: str = ""
    hook: str = ""
    priority: int = 0
    rules: tuple[str, ...] = ()
    policy: str = "accept"


@dataclass(frozen=True)
class Table:
    """An nft table: the comment in it, its chains, and the names of what else is in it."""

    comment: str
    chains: tuple[Chain, ...]
    others: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether it carries our mark, or has been ours until all its rules were flushed."""
        flushed = self.chains and not any(chain.rules for chain in self.chains)
        return bool(flushed) or self.comment.startswith(f"{ALIAS_MARK} ")

    @property
    def whole(self) -> bool:
        """Whether it is as it was loaded, by whatever policy: its rules add up to its sum."""
        return not self.others and self.comment.endswith(f" sum={_sum(self.chains)}")

    def lines(self, chain: Chain) -> list[str]:
        """Return the rules of one of its chains as they are loaded, our mark among them."""
        mark = "" if chain.hook else f' comment "{self.comment}"'
        return [f"{rule}{mark}" for rule in chain.rules]

    @staticmethod
    def fault(table: Table | None) -> str:
        """Return in words what has become of a table, "" if it is as it was loaded."""
        if table is None:
            return "gone"
        return "" if table.whole else "changed by somebody else"


def _sum(chains: Iterable[Chain]) -> str:
    return sha256(repr(tuple(chains)).encode()).hexdigest()[:16]


def marked(network: str, chains: Iterable[Chain]) -> Table:
    """Return the network's table with these chains, and our mark in it.

    The mark is a rule's comment, in a chain that no packet comes to: not every nft(8) tells a
    table's own comment.
    """
    own = (Chain("ours", rules=("counter",)), *chains)
    return Table(f"{ALIAS_MARK} network={network} sum={_sum(own)}", own)


def text_of(network: str, table: Table) -> str:
    """Return the text for nft(8) that puts a table in the place of the network's, in one go."""
    name = f"inet {table_name(network)}"
    lines = [f"table {name}", f"delete table {name}", f"table {name} {{"]
    for chain in table.chains:
        lines.append(f"\tchain {chain.name} {{")
        lines += [f"\t\t{_hooked(chain)}"] if chain.hook else []
        lines += [f"\t\t{rule}" for rule in table.lines(chain)]
        lines.append("\t}")
    return "\n".join([*lines, "}", ""])


def commands_of(network: str, table: Table) -> tuple[Command, ...]:
    """Return the commands that make a table which is not there, one for each chain and rule."""
    words = [_adding(network)]
    for chain in table.chains:
        words += _chain_words(network, table, chain)
    return tuple(sh("nft", *each) for each in words)


def replacing_command(network: str, table: Table) -> Command:
    """Return the command that puts a table in the place of the one that guests are behind.

    It is one transaction, so that no frame passes between two of its rules.
    """
    words = [_adding(network), ("delete", "table", "inet", table_name(network)), _adding(network)]
    for chain in table.chains:
        words += _chain_words(network, table, chain)
    return piped(sh("printf", r"%s\n", *map(" ".join, words)), sh("nft", "-f", "-"))


def _adding(network: str) -> tuple[str, ...]:
    return ("add", "table", "inet", table_name(network))


def _chain_words(network: str, table: Table, chain: Chain) -> list[tuple[str, ...]]:
    """Return the words of nft(8) that add a chain, and then each of its rules."""
    name = ("inet", table_name(network))
    hook = [f"{{ {_hooked(chain)} }}"] if chain.hook else []
    return [
        ("add", "chain", *name, chain.name, *hook),
        *(("add", "rule", *name, chain.name, rule) for rule in table.lines(chain)),
    ]


def _hooked(chain: Chain) -> str:
    """Return where packets come to the chain, in nft(8)'s words."""
    return f"type {chain.type} hook {chain.hook} priority {chain.priority}; policy {chain.policy};"
