"""Policies that are as large as they may be, each of another shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count

from pyqemu_ifconf.load import SIZE_MAX

NETWORKS = "version: 1\nnetworks:\n"
LAN = f"{NETWORKS}  lan: {{bridge: br0}}\n"


def fill(head: str, parts: Iterable[str], tail: str = "") -> str:
    """Return the head, as many of the parts as have room, and the tail."""
    words = [head]
    left = SIZE_MAX - len((head + tail).encode())
    for part in parts:
        left -= len(part.encode())
        if left < 0:
            break
        words.append(part)
    return "".join(words) + tail


def each(form: Callable[[int], str]) -> Iterator[str]:
    """Yield what `form` makes of 0, 1 and so on."""
    return map(form, count())


def _ip(number: int) -> str:
    return f"10.{number >> 14 & 255}.{number >> 6 & 255}.{(number & 63) * 4 + 1}"


SHAPES: dict[str, Callable[[], str]] = {
    "networks with nat": lambda: fill(
        NETWORKS, each(lambda n: f" n{n}: {{bridge: b{n}, nat: {{ipv4: {_ip(n)}/30}}}}\n")),
    "networks with the same nat": lambda: fill(
        NETWORKS, each(lambda n: f" n{n}: {{bridge: b{n}, nat: {{ipv4: 10.0.0.1/24}}}}\n")),
    "networks with nat on one bridge": lambda: fill(
        NETWORKS, each(lambda n: f" n{n}: {{bridge: b, nat: {{ipv6: 'fd00:{n:x}::1/64'}}}}\n")),
    "rules with a full trunk": lambda: fill(
        f"{LAN}rules:\n",
        each(lambda n: f" - {{tap: t{n}, network: lan, vlan: {{trunk: [1-4094]}}}}\n")),
    "rules with trunks of their own": lambda: fill(
        f"{LAN}rules:\n", each(lambda n: f" - {{tap: t{n}, network: lan, vlan: {{trunk: "
                               f"[{n % 2000 + 1}-{4094 - n // 2000}]}}}}\n")),
    "a trunk of ranges": lambda: fill(
        f"{LAN}rules:\n - tap: t\n   network: lan\n   vlan: {{trunk: [", each(lambda n: "1-4094, "),
        "]}\n"),
    "a trunk of ranges that are short": lambda: fill(
        f"{LAN}rules:\n - tap: t\n   network: lan\n   vlan: {{trunk: [",
        each(lambda n: f"{n % 4090 + 1}-{n % 4090 + 3},"), "]}\n"),
    "forwards": lambda: fill(
        f"{NETWORKS} n:\n  bridge: b\n  nat:\n   ipv4: 10.0.0.1/8\n   forward:\n",
        each(lambda n: f"   - {{from: {n + 1}/tcp, to: 10.0.0.2:1}}\n")),
    "hosts": lambda: fill(
        f"{NETWORKS} n:\n  bridge: b\n  nat:\n   ipv4: 10.0.0.1/8\n   dhcp:\n    hosts:\n",
        each(lambda n: f"     '02:00:00:{n >> 16 & 255:02x}:{n >> 8 & 255:02x}:{n & 255:02x}': "
             f"10.1.{n >> 8 & 255}.{n & 255}\n")),
    "unknown keys": lambda: fill(f"{LAN}rules:\n", each(lambda n: f" - {{netwrk{n}: lan}}\n")),
    "unknown networks": lambda: fill(
        f"{NETWORKS}" + "".join(f" net{n}: {{bridge: b}}\n" for n in range(4000)) + "rules:\n",
        each(lambda n: f" - {{tap: a, network: nt{n}}}\n")),
    "rules": lambda: fill(f"{LAN}rules:\n", each(lambda n: f" - {{vm: '*{n}*', network: lan}}\n")),
    "rules that are hard to compare": lambda: fill(
        f"{LAN}rules:\n",
        each(lambda n: f" - {{vm: '*a*[ab]*a?*b*a*[bc]*{n}*', network: lan}}\n")),
    "the shortest rules": lambda: fill(f"{LAN}rules:\n", each(lambda n: " - {vm: a, deny: b}\n")),
    "globs": lambda: fill(f"{LAN}rules:\n - network: lan\n   vm: [", each(lambda n: "a,"), "]\n"),
    "sets of globs": lambda: fill(
        f"{LAN}rules:\n - network: lan\n   vm: [", each(lambda n: '"[a-c]*[!d]",'), "]\n"),
    "a glob": lambda: fill(
        f"{LAN}rules:\n - network: lan\n   vm: '", each(lambda n: "[a-z]?*"), "'\n"),
    "users": lambda: fill(
        f"{NETWORKS} n:\n  bridge: b\n  users: [", each(lambda n: f"u{n},"), "]\n"),
    "guests": lambda: fill(
        f"{LAN}vms:\n", each(lambda n: f" v{n}: {{nics: [{{network: lan}}]}}\n")),
    "NICs of one guest": lambda: fill(
        f"{LAN}vms:\n v:\n  nics:\n", each(lambda n: "   - {network: lan}\n")),
    "external ids": lambda: fill(
        f"{NETWORKS} n:\n  bridge: b\n  external_ids:\n", each(lambda n: f"   k{n}: v\n")),
    "a key many times": lambda: fill(f"{NETWORKS}", each(lambda n: " a: b\n")),
    "an open list": lambda: fill("a: ", each(lambda n: "[")),
    "lists in lists": lambda: fill("a: [", each(lambda n: "[" * 12 + "]" * 12 + ","), "]"),
    "empty lists": lambda: fill("version: 1\nrules: [", each(lambda n: "{},"), "]\n"),
    "a long text": lambda: fill(
        f"{LAN}rules:\n - tap: a\n   deny: '", each(lambda n: "no "), "'\n"),
    "a text of many lines": lambda: fill(f"{LAN}rules:\n - deny: >\n", each(lambda n: "    a\n")),
    "comments": lambda: fill(LAN, each(lambda n: "#\t\n")),
    "no YAML": lambda: fill("a: ", each(lambda n: "b: ")),
    "aliases": lambda: fill("a: [", each(lambda n: "*a,"), "]"),
    "anchors": lambda: fill("a: [", each(lambda n: "&a b,"), "]"),
}  # fmt: skip
