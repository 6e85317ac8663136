"""The command line of a QEMU, as QEMU itself would read it: the guest's name, the network options.

The rules are those of QEMU's lookup_opt (system/vl.c), opts_do_parse (util/qemu-option.c) and
net/net.c, 5.2 to 11. What its -readconfig names is read where that may be read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyqemu_ifconf.names import NAME_MAX, bounded

# NOTE: qemu-options.hx of every version from 5.2 on, all targets; an option that is not here has
# an argument. An option never changes sides, so the names of old versions stay.
FLAGS = frozenset(
    """
    h help version mem-prealloc audio-help snapshot usb nographic sdl curses no-frame alt-grab
    ctrl-grab no-quit portrait full-screen win2k-hack no-fd-bootchk no-acpi no-hpet singlestep
    preconfig S s enable-kvm enable-hax no-kvm xen-attach xen-create xen-domid-restrict no-reboot
    no-shutdown daemonize only-migratable nodefaults no-user-config enable-sync-profile
    show-cursor enable-fips semihosting old-param perfmap jitdump async-teardown
    """.split()
)
"""The QEMU options that take no argument, without their dash."""

_IMPLIED = {"name": "guest", "netdev": "type", "nic": "type", "net": "type", "device": "driver"}
"""The options that are read, and the key that their first word stands for."""


@dataclass(frozen=True)
class Option:
    """One -netdev, -nic, -net or -device: its id= and all its keys; -set cannot change JSON."""

    name: str
    id: str | None
    keys: dict[str, str]
    json: bool = False


def read_options(
    argv: Sequence[str], pid: int | None = None
) -> tuple[str | None, list[Option], bool]:
    """Return the guest's name, the network options in order, and whether they are all of them.

    What -readconfig names is read as far as process `pid` is the user's own; without it, not.
    """
    reader = _Reader(pid)
    for name, argument in walk_options(argv):
        reader.take(name, argument)
    return bounded(reader.vm), reader.options, reader.all_seen


class _Reader:
    """Takes a command line option by option, as QEMU does; the rest is as for `read_options`."""

    def __init__(self, pid: int | None) -> None:
        self.vm: str | None = None
        self.options: list[Option] = []
        self.all_seen = True
        self._pid = pid
        self._by_id: dict[tuple[str, str], Option] = {}
        self._files = 0

    def take(self, name: str, argument: str) -> None:
        """Take one option with its argument."""
        if name == "name":
            # NOTE: QEMU merges several -name into one: the last guest= of all wins.
            self.vm = dict(split_option(argument, "guest")).get("guest", self.vm)
        elif name == "set":
            _set(self._by_id, argument)
        elif name == "readconfig":
            self._take_file(argument)
        elif name in _IMPLIED:
            option = _parse_json(name, argument) if argument[:1] == "{" else _parse(name, argument)
            if option is not None:
                self._add(option)
            elif name == "netdev":
                self.all_seen = False
        elif argument.startswith("-") and argument.lstrip("-") in _IMPLIED:
            # An option unknown to us that may take no argument: then a netdev just went by.
            self.all_seen = False

    def _take_file(self, path: str) -> None:
        # NOTE: few guests have one.
        from pyqemu_ifup.qemu.read_config import FILES_MAX, read_config

        self._files += 1
        pid = self._pid if self._files <= FILES_MAX else None
        sections = read_config(pid, path) if pid is not None else None
        self.all_seen = self.all_seen and sections is not None
        for each in sections or ():
            if each.group == "name":
                self.vm = each.keys.get("guest", self.vm)
            elif each.group in _IMPLIED:
                self._add(Option(each.group, each.id or each.keys.get("id"), each.keys))

    def _add(self, option: Option) -> None:
        self.options.append(option)
        if option.id is not None:
            self._by_id.setdefault((option.name, option.id), option)


def walk_options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each option of QEMU's that has an argument with it, as its lookup_opt finds them."""
    words = iter(argv[1:])
    for word in words:
        # A word without a dash is a disk image. Of two dashes, QEMU drops one.
        name = word[2:] if word.startswith("--") else word[1:]
        if word.startswith("-") and name not in FLAGS:
            argument = next(words, None)
            if argument is not None:
                yield name, argument


def _parse(name: str, argument: str) -> Option:
    """Return the option -`name` with its argument in the form key=value,..."""
    pairs = split_option(argument, _IMPLIED[name])
    # NOTE: QEMU looks for id= before all else and takes the first; of the other keys, the last.
    id = next((value for key, value in pairs if key == "id"), None)
    return Option(name, id, dict(pairs))


def split_option(text: str, implied: str) -> list[tuple[str, str]]:
    """Return the keys and values of `text` as opts_do_parse reads them.

    A first word without `=` is the value of `implied`; a later one is a flag, `on`, or with the
    prefix `no` `off`; a doubled comma in a value is a comma.
    """
    pairs: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        comma = text.find(",", at)
        end = comma if comma >= 0 else len(text)
        equals = text.find("=", at, end)
        if equals >= 0:
            value, end = _read_value(text, equals + 1)
            pairs.append((text[at:equals], value))
        elif at == 0:
            value, end = _read_value(text, at)
            pairs.append((implied, value))
        elif text.startswith("no", at, end):
            pairs.append((text[at + 2 : end], "off"))
        else:
            pairs.append((text[at:end], "on"))
        at = end + 1
    return pairs


def _read_value(text: str, at: int) -> tuple[str, int]:
    """Return the value that starts at `at`, and where the comma after it stands (or the end)."""
    parts: list[str] = []
    while True:
        comma = text.find(",", at)
        if comma < 0:
            return "".join(parts) + text[at:], len(text)
        if not text.startswith(",", comma + 1):
            return "".join(parts) + text[at:comma], comma
        parts.append(text[at : comma + 1])
        at = comma + 2


def _parse_json(name: str, argument: str) -> Option | None:
    """Return the option -`name` with its argument in JSON; None where it cannot be read."""
    import json

    try:
        values = json.loads(_double_quoted(argument))
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    keys = {
        key: str(value)
        for key, value in values.items()
        if isinstance(value, str | int) and not isinstance(value, bool)
    }
    id = keys.get("id") if isinstance(values.get("id"), str) else None
    return Option(name, id, keys, json=True)


def _double_quoted(text: str) -> str:
    """Return JSON with the 'strings' that QEMU's parser takes as well turned into "strings"."""
    result: list[str] = []
    quote = ""
    letters = iter(text)
    for letter in letters:
        if quote and letter == "\\":
            escaped = next(letters, "")
            result.append("'" if escaped == "'" else letter + escaped)
        elif letter == quote:
            result.append('"')
            quote = ""
        elif quote:
            result.append('\\"' if letter == '"' else letter)
        elif letter in "\"'":
            result.append('"')
            quote = letter
        else:
            result.append(letter)
    return "".join(result)


def _set(by_id: dict[tuple[str, str], Option], argument: str) -> None:
    """Do -set GROUP.ID.KEY=VALUE to the option of that name and id that stands before it."""
    path, equals, value = argument.partition("=")
    group, _, rest = path.partition(".")
    id, _, key = rest.partition(".")
    option = by_id.get((group, id))
    if equals and option is not None and not option.json:
        option.keys[key] = value


def is_on_hub_0(option: Option) -> bool:
    """Tell whether the option is a backend of -net's, which all are on one hub (net/net.c)."""
    return option.name == "net" and type_of(option) not in ("nic", "none", "hubport")


def cut_name(name: str) -> bytes:
    """Return an interface name as the kernel gets it from QEMU: its first 15 bytes."""
    try:
        return os.fsencode(name)[:NAME_MAX]
    except UnicodeEncodeError:
        # Half a character, from an escape in JSON: no tap is called so.
        return b""


def canonical_mac(text: str) -> str | None:
    """Return a MAC in lower case with colons, from what QEMU's net_parse_macaddr takes.

    That is six groups of one or two hexadecimal digits, with `:` or `-` between them. None for
    all else, and for zero, which QEMU takes as none given.
    """
    groups = text.replace("-", ":").split(":")
    digits = set("0123456789abcdefABCDEF")
    if len(groups) != 6 or not all(1 <= len(g) <= 2 and digits.issuperset(g) for g in groups):
        return None
    mac = ":".join(group.zfill(2) for group in groups).lower()
    return mac if mac != "00:00:00:00:00:00" else None


def type_of(option: Option) -> str | None:
    """Return the type of a -netdev, -nic or -net; None for a -device."""
    return None if option.name == "device" else option.keys.get("type")
