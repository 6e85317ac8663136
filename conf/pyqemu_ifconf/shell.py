"""Texts of others made safe to print: quoted for a shell, and without what a terminal obeys.

A reader may paste any part of a line of ours, as root. A tap's name is any 15 visible bytes, and a
guest's name and a path are any bytes at all. So each name in a command goes through `sh` or another
function of this module, and each name in a sentence through `quote` or `readable`.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    # NOTE: a test counts what QEMU's bridge helper imports.
    from collections.abc import Sequence

_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789@%+=:,./-_")
_UNSEEN = frozenset(
    chr(number)
    for first, last in (
        (0x034F, 0x034F),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x2800, 0x2800),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0F),
        (0xFFA0, 0xFFA0),
        (0xE0100, 0xE01EF),
    )
    for number in range(first, last + 1)
)
"""What isprintable() takes for printable, and nobody sees: the Default_Ignorable_Code_Point
(DerivedCoreProperties.txt of Unicode), and the empty braille pattern."""
_NEWLINE = "${IFS#??}"
"""A newline alone: the default IFS (blank, tab, newline) without the first two."""


class Command(str):
    """A line for bash, dash or another POSIX shell, in which every name is one word.

    Only this module makes one, as tests/house/test_house.py checks.
    """

    __slots__ = ()


def quote(word: str) -> str:
    """Return `word` as one word of a POSIX shell, in visible ASCII.

    Other bytes are written in octal, for printf(1): a terminal would obey some of them, and not
    every shell knows `$'...'` (POSIX.1-2017, 2.2).
    """
    if word and _PLAIN.issuperset(word) and word[0] != "=":
        return word
    if all(" " <= c <= "~" for c in word):
        return "'" + word.replace("'", "'\\''") + "'"
    # NOTE: a shell cuts all newlines off the end of what a command has printed.
    body = word.rstrip("\n")
    octal = "".join(
        chr(byte) if chr(byte) in _PLAIN and byte != 0x25 else f"\\{byte:03o}"
        for byte in body.encode("utf-8", "surrogateescape")
    )
    # A word that begins with `-` would be an option of printf's.
    octal = "\\055" + octal[1:] if octal[:1] == "-" else octal
    return f"\"$(printf '{octal}'){_NEWLINE * (len(word) - len(body))}\""


def printable(text: str) -> str:
    """Return `text` on one line, with what is not printable ASCII escaped as by ascii()."""
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text)


def shown(text: str) -> str:
    """Return `text` on one line, with what is not visible Unicode escaped as by ascii()."""
    return "".join(c if c.isprintable() and c not in _UNSEEN else ascii(c)[1:-1] for c in text)


def readable(name: str) -> str:
    """Return a name as one word of a sentence, to be read: what is not visible ASCII is escaped."""
    return quote(printable(name))


def sh(*words: str) -> Command:
    """Return the command of these words, each quoted but for a Command among them."""
    return Command(" ".join(each if isinstance(each, Command) else quote(each) for each in words))


def all_of(*commands: Command) -> Command:
    """Return the command that runs these in turn until one fails."""
    return Command(" && ".join(commands))


def piped(first: Command, second: Command) -> Command:
    """Return the command that has `second` read what `first` prints."""
    return Command(f"{first} | {second}")


def output(command: Command) -> Command:
    """Return the one word that is what `command` prints."""
    return Command(f'"$({command})"')


def joined(*parts: str) -> Command:
    """Return the one word that these make together, each quoted but for a Command among them."""
    return Command("".join(each if isinstance(each, Command) else quote(each) for each in parts))


def write(text: str, path: str) -> Command:
    """Return the command that writes one line to a file."""
    return into(sh("echo", text), path)


def into(command: Command, path: str) -> Command:
    """Return the command that writes what `command` prints to a file."""
    return Command(f"{command} > {quote(file(path))}")


def file(path: str) -> str:
    """Return a path that no program takes for an option."""
    return path if path[:1] not in ("-", "+") else f"./{path}"


def edit(path: str, line: int = 1) -> Command:
    """Return the command by which a person edits a file at a line."""
    return Command(f"${{EDITOR:-vi}} {sh(f'+{line}', file(path))}")


def program(name: str) -> str:
    """Return the word that starts a program of ours: its name if a shell finds it, else its path.

    The path of the interpreter tells where this installation is, as the Makefile sets it up.
    """
    prefix, home, _ = (sys.executable or "").rpartition("/lib/pyqemu-ifup/bin/")
    if not home or prefix in ("/usr", "/usr/local"):
        return name
    return f"{prefix}/{'sbin' if name == 'pyqemu-takeover' else 'bin'}/{name}"


def ifctl(verb: str, *names: str, options: Sequence[str] = ()) -> Command:
    """Return the command for a verb of pyqemu-ifctl, with names of taps or guests."""
    end = ["--"] if any(name[:1] == "-" for name in names) else []
    return sh(program("pyqemu-ifctl"), verb, *options, *end, *names)


def takeover(*options: str) -> Command:
    """Return the command that makes QEMU's own scripts, or its helper, ours."""
    return sh(program("pyqemu-takeover"), *options)


def vsctl(ovsdb: str, *commands: Sequence[str]) -> Command:
    """Return the ovs-vsctl(8) command for one database that does these in one transaction.

    `ovsdb` is empty for the default database. ovs-vsctl takes a word `--` for the end of a command
    wherever it stands, so what has that name cannot be said to it.
    """
    if any("--" in words for words in commands):
        return Command("# ovs-vsctl cannot be told of a name that is --")
    words = ["ovs-vsctl", *([f"--db={ovsdb}"] if ovsdb else [])]
    for number, command in enumerate(commands):
        words += [*(["--"] if number else []), *command]
    return sh(*words)


def ovs_value(value: str) -> str:
    """Return a text as a value, or a key, of a column (ovs-vsctl(8), Database Values)."""
    plain = value and all(c.isascii() and (c.isalnum() or c in "_-.") for c in value)
    return value if plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def nft_command(form: str, **names: str) -> Command:
    """Return the nft(8) command of this form, with the names of tables, chains and links in it.

    A name in quotes there is a link's. nft cannot name what has other characters than its own words
    have, and takes a `*` at the end of a link's name for any end.
    """
    for name in names.values():
        link = name[:1] == name[-1:] == '"' and len(name) > 2
        if not (_is_nft_link(name[1:-1]) if link else _is_nft_identifier(name)):
            return Command("# nft cannot be told of a name of these")
    return sh("nft", form.format_map(names))


def _is_nft_link(name: str) -> bool:
    return '"' not in name and "\\" not in name and name[-1] != "*"


def _is_nft_identifier(name: str) -> bool:
    return name[:1].isalpha() and all(c.isascii() and (c.isalnum() or c in "_-./") for c in name)
