"""Our mark: how we know, from the live system alone, what is ours and whose it is.

On a tap it is the `ifalias`, on an Open vSwitch port the Interface row's `external_ids`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Caller, Kind, Port
from pyqemu_ifup.caller import process_start

VERSION = "1"
ALIAS_MARK = f"pyqemu-ifup/{VERSION}"
BRIDGE_MARK = f"{ALIAS_MARK} bridge network="
"""Our mark in the ifalias of a bridge that we have made, the network's name behind it."""
ALIAS_MAX = 255
"""Bytes of an ifalias (IFALIASZ - 1, linux/if.h)."""

KEY_VERSION = "pyqemu-ifup"
KEY_NETWORK = "pyqemu-network"
KEY_IFINDEX = "pyqemu-ifindex"
KEY_BOOT_ID = "pyqemu-boot-id"
KEY_NETNS = "pyqemu-netns"
KEY_VM_NAME = "vm-name"
KEY_VM_PID = "vm-pid"
OUR_KEYS = (
    KEY_VERSION, KEY_NETWORK, KEY_IFINDEX, KEY_BOOT_ID, KEY_NETNS, KEY_VM_NAME, KEY_VM_PID
)


@dataclass(frozen=True)
class Stamp:
    """What a tap's ifalias says: where it was attached, and for which process.

    `pid` and `start` (field 22 of /proc/PID/stat, clock ticks) name the QEMU; `ovsdb` is the
    database's address where `kind` is openvswitch. `uid` is the user's whom the agent served, None
    for root and where the hook did the work itself. `by_name`: the network was asked for by its
    name, whatever the rules say.
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


def make_stamp(
    port: Port,
    kind: Kind,
    caller: Caller,
    pid: int,
    uid: int | None = None,
    by_name: bool = False,
) -> Stamp:
    """Return the stamp of `port` for the process `pid`, attached to a bridge of this kind.

    `uid` is the user's whom the agent serves, None for root; `by_name` is as in Stamp.
    """
    return Stamp(
        network=port.network,
        kind=kind,
        bridge=port.bridge,
        vm=caller.vm or "",
        pid=pid,
        start=process_start(pid) or 0,
        ovsdb=port.ovsdb if kind == "openvswitch" else None,
        uid=uid,
        by_name=by_name,
    )


def _encode(text: str) -> str:
    return quote(text.encode("utf-8", "surrogateescape"), safe="/:._-+@,[]~")


def format_alias(stamp: Stamp) -> str:
    """Return the ifalias for `stamp`; a guest's name that is too long is cut.

    Raises Failure (71) where the rest alone has more than 255 bytes.
    """
    parts = [
        ALIAS_MARK,
        f"network={_encode(stamp.network)}",
        f"kind={stamp.kind}",
        f"bridge={_encode(stamp.bridge)}",
        f"vm={_encode(stamp.vm)}",
        f"pid={stamp.pid}",
        f"start={stamp.start}",
    ]
    if stamp.ovsdb is not None:
        parts.append(f"ovsdb={_encode(stamp.ovsdb)}")
    if stamp.uid is not None:
        parts.append(f"uid={stamp.uid}")
    if stamp.by_name:
        parts.append("by=name")
    alias = " ".join(parts)
    if len(alias) <= ALIAS_MAX:
        return alias
    if stamp.vm:
        return format_alias(replace(stamp, vm=stamp.vm[:-1]))
    raise Failure(
        Status.REFUSED,
        "the tap's ifalias would be too long",
        f"{len(alias)} bytes of at most {ALIAS_MAX}",
        "give the network a shorter name, or the OVSDB socket a shorter path",
    )


def parse_alias(alias: str) -> Stamp | None:
    """Return the stamp that `alias` holds, or None where it is not of our making."""
    mark, _, rest = alias.partition(" ")
    if mark != ALIAS_MARK:
        return None
    given = dict(part.partition("=")[::2] for part in rest.split(" "))
    kinds: dict[str | None, Kind] = {"linux": "linux", "openvswitch": "openvswitch"}
    kind = kinds.get(given.get("kind"))
    if kind is None:
        return None
    try:
        return Stamp(
            network=unquote(given["network"]),
            kind=kind,
            bridge=unquote(given["bridge"]),
            vm=unquote(given["vm"], errors="surrogateescape"),
            pid=int(given["pid"]),
            start=int(given["start"]),
            ovsdb=unquote(given["ovsdb"]) if "ovsdb" in given else None,
            uid=int(given["uid"]) if "uid" in given else None,
            by_name=given.get("by") == "name",
        )
    except (KeyError, ValueError):
        return None


def is_alive(stamp: Stamp) -> bool:
    """Tell whether the process that the tap was attached for still runs."""
    return stamp.start != 0 and process_start(stamp.pid) == stamp.start


def is_anothers(stamp: Stamp, parent: int) -> bool:
    """Tell whether the tap serves a living process that is not `parent`, the caller."""
    return is_alive(stamp) and stamp.pid != parent


def row_ids(stamp: Stamp, ifindex: int, here: Here) -> dict[str, str]:
    """Return the external_ids by which an Interface row is known as ours."""
    ids = {
        KEY_VERSION: VERSION,
        KEY_NETWORK: stamp.network,
        KEY_IFINDEX: str(ifindex),
        KEY_BOOT_ID: here.boot_id,
        KEY_NETNS: here.netns,
        KEY_VM_PID: str(stamp.pid),
    }
    if stamp.vm:
        # NOTE: OVSDB strings are UTF-8 (RFC 7047, 3.1); a command line may hold any bytes.
        ids[KEY_VM_NAME] = stamp.vm.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return ids
