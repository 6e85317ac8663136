"""The hubs of a QEMU, by its command line: which of its backends it joins to one another.

Each -net is on hub 0 but a NIC that names a netdev (net_client_init1 of net/net.c); -netdev hubport
puts another netdev on a hub, or a port of another hub, which joins the two (net/hub.c).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyqemu_ifconf.failure import OfCaller, Status
from pyqemu_ifconf.names import bounded
from pyqemu_ifconf.policy import Caller
from pyqemu_ifconf.shell import readable
from pyqemu_ifup.qemu.command_line import Option, cut_name, is_on_hub_0

NAMED_MAX = 4
"""Taps of one hub that are told of."""
TAPS = ("tap", "bridge")
"""The types of backends that are taps."""
WHY = (
    "QEMU's hub passes each frame of one tap to the other: on one bridge the first broadcast goes "
    "round for ever, and two networks become one"
)
WHY_MIXED = (
    "QEMU's hub passes each frame of one to the other, so that the networks behind them become one"
)
REMEDY = (
    "give each tap a -netdev and a -device of its own, in place of -net nic with -net, or of "
    "-netdev hubport"
)
_C_NUMBER = re.compile(r"[ \t]*([+-]?)(?:0[xX]([0-9a-fA-F]{1,8})|(0[0-7]{0,11})|([1-9][0-9]{0,9}))")


@dataclass(frozen=True)
class Hub:
    """A hub, which passes what comes in at one end to all the others; `ends` are its backends.

    Of hubs that are joined it is the one with the least `number`.
    """

    number: int
    ends: tuple[Option, ...]

    @property
    def taps(self) -> list[Option]:
        """The ends that are taps, whoever opens them."""
        return [end for end in self.ends if end.keys.get("type") in TAPS]

    @property
    def others(self) -> list[Option]:
        """The ends that are no taps."""
        return [end for end in self.ends if end.keys.get("type") not in TAPS]


class _Joined:
    """Which hubs are one by now, each known by the least number of them."""

    def __init__(self) -> None:
        self._above: dict[int, int] = {}

    def top(self, number: int) -> int:
        """Return the number by which a hub is known."""
        while (above := self._above.get(number, number)) != number:
            self._above[number] = self._above.get(above, above)
            number = above
        return number

    def join(self, one: int, other: int) -> None:
        """Make two hubs one."""
        low, high = sorted((self.top(one), self.top(other)))
        self._above[high] = low


def find_hubs(options: Sequence[Option]) -> list[Hub]:
    """Return the hubs that have a backend, by their numbers."""
    netdevs: dict[str | None, Option] = {}
    for option in options:
        if option.name == "netdev" and option.keys.get("type") != "hubport":
            netdevs.setdefault(option.id, option)
    numbered = [(option, number) for option in options if (number := _hub_of(option)) is not None]
    ports: dict[str | None, int] = {}
    for option, number in numbered:
        ports.setdefault(option.id, number)
    joined = _Joined()
    ends = [(0, option) for option in options if is_on_hub_0(option)]
    for option, number in numbered:
        other = option.keys.get("netdev")
        if other is not None and other in ports:
            joined.join(number, ports[other])
        elif other is not None and other in netdevs:
            ends.append((number, netdevs[other]))
    found: dict[int, list[Option]] = {}
    for number, end in ends:
        found.setdefault(joined.top(number), []).append(end)
    return [Hub(number, tuple(found[number])) for number in sorted(found)]


def _hub_of(option: Option) -> int | None:
    """Return the hub that an option is a port of, None where it is none."""
    if option.name not in ("netdev", "nic") or option.keys.get("type") != "hubport":
        return None
    # NOTE: QEMU reads it by strtoll() with base 0.
    match = _C_NUMBER.fullmatch(option.keys.get("hubid", ""))
    if match is None:
        return None
    sign, hexadecimal, octal, decimal = match.groups()
    number = int(hexadecimal or octal or decimal, 16 if hexadecimal else 8 if octal else 10)
    return -number if sign == "-" else number


def joined_with(options: Sequence[Option], asking: Iterable[Option]) -> tuple[str, ...]:
    """Return the taps, in words, that share a hub with one of those that may be `asking`."""
    ours = {id(option) for option in asking}
    for hub in find_hubs(options):
        own = next((tap for tap in hub.taps if id(tap) in ours), None)
        others = [tap for tap in hub.taps if tap is not own]
        if own is not None and others:
            return tuple(map(call_it, others[:NAMED_MAX]))
    return ()


def tap_name(option: Option) -> str | None:
    """Return the name that a command line gives a tap, None where the kernel chooses it."""
    name = cut_name(option.keys.get("ifname", ""))
    return name.decode("utf-8", "surrogateescape") if name and b"%" not in name else None


def call_it(option: Option) -> str:
    """Return what a tap of a command line is called, in a sentence."""
    name = tap_name(option)
    if name is not None:
        return readable(name)
    id = bounded(option.id)
    return f"netdev {readable(id)}" if id is not None else f"a -net {option.keys['type']}"


def refuse_joined(caller: Caller) -> None:
    """Raise Failure (71) where the QEMU has another tap on the hub that this one is on."""
    if caller.joined:
        raise OfCaller(
            Status.REFUSED, f"on one hub with {' and '.join(caller.joined)}", WHY, REMEDY
        )
