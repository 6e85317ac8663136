"""Our mark: how we know, from the live system alone, what is ours and whose it is.

On a tap it is the `ifalias`, on an Open vSwitch port the Interface row's `external_ids`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import quote, unquote

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds import SPECS
from pyqemu_ifconf.policy import Kind
from pyqemu_ifup.system.process import process_start

VERSION = "1"
ALIAS_MARK = f"pyqemu-ifup/{VERSION}"
BRIDGE_MARK = f"{ALIAS_MARK} bridge network="
"""Our mark in the ifalias of a bridge that we have made, the network's name behind it."""
ALIAS_MAX = 254
"""Bytes of an ifalias: IFALIASZ of linux/if.h is 256, and what reads it may add a NUL."""
_MODE_MAX = 255
_LETTER_MAX = 12
"""Bytes of an encoded letter: UTF-8 has four at the most."""
UNSAID = "~"
"""What a value ends in that had no room, or is not known; in a value itself it is `%7E`."""
_UNSURE = frozenset({"vm", "netdev", "mac", "user", "by"})
"""The values that may be unsaid."""

KEY_VERSION = "pyqemu-ifup"
KEY_NETWORK = "pyqemu-network"
KEY_IFINDEX = "pyqemu-ifindex"
KEY_BOOT_ID = "pyqemu-boot-id"
KEY_NETNS = "pyqemu-netns"
KEY_VM_NAME = "vm-name"
KEY_VM_PID = "vm-pid"
OUR_KEYS = (KEY_VERSION, KEY_NETWORK, KEY_IFINDEX, KEY_BOOT_ID, KEY_NETNS, KEY_VM_NAME, KEY_VM_PID)


@dataclass(frozen=True)
class Was:
    """What a persistent tap was before: `mac` is the first byte of its MAC, as two digits.

    `mtu` in bytes, `txqueuelen` in packets; `ipv6` tells whether its host's end had IPv6, and
    `addrgenmode` is that of Link, None also in an older mark, with which it was left alone. `up`:
    its link was up, of which an older mark says nothing.
    """

    mtu: int
    txqueuelen: int
    mac: str
    ipv6: bool
    addrgenmode: int | None = None
    up: bool = False


@dataclass(frozen=True)
class Mark:
    """What a tap's ifalias says: where it was attached, for which process, and who that was.

    `vm`, `netdev` and `mac` are what the process's command line said then, empty or None where it
    said nothing; `pid` and `start` (field 22 of /proc/PID/stat, clock ticks) name it. `ovsdb` is
    the database's address where the port is in one. `uid` is the user's whom the agent served,
    None for root and where the hook did the work itself: then `user` is the process's real uid,
    None for root's. `by_name`: the network was asked for by its name, whatever the rules say.
    `made`: the tap is of our making, and goes when its right ends.
    `rule` is the place in the policy that decided. `unsaid` names what was not told or had no
    room, of the match keys and `by`; of a `vm` among them, the beginning is there.
    """

    network: str
    kind: Kind
    bridge: str
    vm: str
    pid: int
    start: int
    ovsdb: str | None = None
    uid: int | None = None
    by_name: bool = False
    rule: str = ""
    mac: str | None = None
    netdev: str | None = None
    user: int | None = None
    was: Was | None = None
    unsaid: frozenset[str] = frozenset()
    made: bool = False

    @property
    def guest(self) -> str:
        """The guest's name as a person is shown it; one that was cut ends in `~`."""
        return f"{self.vm}~" if "vm" in self.unsaid and self.vm else self.vm


@dataclass(frozen=True)
class Here:
    """This boot and this network namespace ("DEVICE:INODE")."""

    boot_id: str
    netns: str


def find_here() -> Here:
    """Return where this process runs."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    namespace = os.stat("/proc/self/ns/net")
    return Here(boot_id, f"{namespace.st_dev}:{namespace.st_ino}")


def _encode(text: str) -> str:
    # NOTE: quote() leaves ~ as it is, whatever is safe.
    return quote(text.encode("utf-8", "surrogateescape"), safe="/:._-+@,[]").replace("~", "%7E")


def format_alias(mark: Mark) -> str:
    """Return the ifalias for `mark`: where room is short `vm` is cut, then others are left out.

    Raises Failure (71) where what names the place and the process has more than 254 bytes.
    """
    place = {
        "network": _encode(mark.network),
        "kind": mark.kind,
        "bridge": _encode(mark.bridge),
        "pid": str(mark.pid),
        "start": str(mark.start),
    }
    if mark.uid is not None:
        place["uid"] = str(mark.uid)
    if mark.user is not None:
        place["user"] = str(mark.user)
    if mark.by_name:
        place["by"] = "name"
    if mark.made:
        place["made"] = "1"
    behind: dict[str, str] = {}
    if mark.ovsdb is not None:
        behind["ovsdb"] = _encode(mark.ovsdb)
    if mark.was is not None:
        was = mark.was
        behind["was"] = f"{was.mtu},{was.txqueuelen},{was.mac},{int(was.ipv6)}"
        mode = "" if was.addrgenmode is None else str(was.addrgenmode)
        behind["was"] += f",{mode}" if mode or was.up else ""
        behind["was"] += ",up" if was.up else ""
    told = {"rule": _encode(mark.rule)}
    told |= {
        key: _encode(value)
        for key, value in (("mac", mark.mac), ("netdev", mark.netdev))
        if value is not None
    }
    told |= dict.fromkeys(sorted(mark.unsaid - {"vm"}), UNSAID)
    short = {**told, "netdev": UNSAID} if mark.netdev is not None else told
    is_cut = "vm" in mark.unsaid
    vm = _encode(mark.vm) + UNSAID * is_cut
    # NOTE: without a rule it reads as an older one, which says nothing of the rest.
    for middle in (told, short, {}):
        words = [f"{key}={value}" for key, value in {**place, **middle, **behind}.items()]
        alias = " ".join([ALIAS_MARK, *words])
        if not vm and len(alias) <= ALIAS_MAX:
            return alias
        room = ALIAS_MAX - len(alias) - len(" vm=")
        if vm and room > 0:
            return f"{alias} vm={vm if len(vm) <= room else _cut(mark.vm, room)}"
    raise Failure(
        Status.REFUSED,
        "the tap's ifalias would be too long",
        f"{len(alias)} bytes of at most {ALIAS_MAX}",
        "give the network a shorter name, or the OVSDB socket a shorter path",
    )


def _cut(text: str, room: int) -> str:
    """Return as many letters of the text, encoded, as have room, and that there were more."""
    found = ""
    for letter in text:
        code = _encode(letter)
        if len(found) + len(code) + len(UNSAID) > room:
            break
        found += code
    return found + UNSAID


def parse_alias(alias: str) -> Mark | None:
    """Return the mark that `alias` holds, or None where it is not of our making.

    An older one, without a rule, says nothing of some of the match keys; its name may be cut.
    """
    mark, _, rest = alias.partition(" ")
    if mark != ALIAS_MARK:
        return None
    given = dict(part.partition("=")[::2] for part in rest.split(" "))
    kinds: dict[str | None, Kind] = {spec.name: spec.name for spec in SPECS}
    kind = kinds.get(given.get("kind"))
    if kind is None:
        return None
    unsaid = {key for key, value in given.items() if value.endswith(UNSAID) and key in _UNSURE}
    told = {
        key: unquote(value, errors="surrogateescape")
        for key, value in given.items()
        if key not in unsaid
    }
    vm = given.get("vm", "").removesuffix(UNSAID)
    if "rule" not in given:
        unsaid |= {"mac", "netdev"} | ({"user"} if "uid" not in given else set())
        if len(alias) > ALIAS_MAX - _LETTER_MAX:
            unsaid.add("vm")
    try:
        return Mark(
            network=told["network"],
            kind=kind,
            bridge=told["bridge"],
            vm=unquote(vm, errors="surrogateescape"),
            pid=int(given["pid"]),
            start=int(given["start"]),
            ovsdb=told.get("ovsdb"),
            uid=int(given["uid"]) if "uid" in given else None,
            by_name=told.get("by") == "name",
            rule=told.get("rule", ""),
            mac=told.get("mac"),
            netdev=told.get("netdev"),
            user=int(told["user"]) if "user" in told else None,
            was=_parse_was(given["was"]) if "was" in given else None,
            unsaid=frozenset(unsaid),
            made=given.get("made") == "1",
        )
    except (KeyError, ValueError):
        return None


def _parse_was(text: str) -> Was:
    """Return what a tap was before. Raises ValueError."""
    mtu, txqueuelen, mac, ipv6, *rest = text.split(",")
    mode, up = rest[:1], rest[1:]
    number = int(mode[0]) if mode and (mode[0] or not up) else None
    if (number is not None and not 0 <= number <= _MODE_MAX) or up not in ([], ["up"]):
        raise ValueError(text)
    return Was(int(mtu), int(txqueuelen), f"{int(mac, 16):02x}", ipv6 == "1", number, bool(up))


def is_alive(mark: Mark) -> bool:
    """Tell whether the process that the tap was attached for still runs."""
    return mark.start != 0 and process_start(mark.pid) == mark.start


def is_anothers(mark: Mark, parent: int) -> bool:
    """Tell whether the tap serves a living process that is not `parent`, the caller."""
    return is_alive(mark) and mark.pid != parent


def row_ids(mark: Mark, ifindex: int, here: Here) -> dict[str, str]:
    """Return the external_ids by which an Interface row is known as ours."""
    ids = {
        KEY_VERSION: VERSION,
        KEY_NETWORK: mark.network,
        KEY_IFINDEX: str(ifindex),
        KEY_BOOT_ID: here.boot_id,
        KEY_NETNS: here.netns,
        KEY_VM_PID: str(mark.pid),
    }
    if mark.vm and "vm" not in mark.unsaid:
        # NOTE: OVSDB strings are UTF-8 (RFC 7047, 3.1); a command line may hold any bytes.
        ids[KEY_VM_NAME] = mark.vm.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return ids
