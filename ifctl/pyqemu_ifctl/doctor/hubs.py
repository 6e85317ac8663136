"""Doctor's checks of hubs: a QEMU that joins a tap with another backend bypasses its switch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pyqemu_ifconf.names import bounded
from pyqemu_ifconf.shell import quote, readable, sh
from pyqemu_ifctl.doctor.running import Qemu
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifctl.qemu.running import tap_of
from pyqemu_ifup.kinds.check import Finding
from pyqemu_ifup.qemu.command_line import Option
from pyqemu_ifup.qemu.hubs import (
    NAMED_MAX,
    REMEDY,
    WHY,
    WHY_MIXED,
    Hub,
    call_it,
    find_hubs,
    tap_name,
)


def find_joined_taps(scene: Scene) -> Iterator[Finding]:
    """A QEMU that joins two taps, whose links are up, on a hub of its own."""
    up = {link.name for link in scene.links if link.up}
    for qemu in scene.qemus:
        told = False
        for hub in find_hubs(qemu.guest.options):
            taps = _held_ends(hub, _held(scene, qemu) & up)
            if len(taps) < 2 or not _is_still_joined(qemu, taps):
                continue
            told = True
            running = [name for tap in taps if (name := tap_name(tap)) is not None]
            yield Finding(
                f"{' and '.join(map(call_it, taps[:NAMED_MAX]))} of {qemu.name} are on one hub",
                WHY,
                sh("ip", "link", "set", "dev", running[-1], "down") if len(running) > 1 else None,
                f"when {qemu.process} starts the next time, {REMEDY}",
            )
        for hub_now, names in () if told else _joined_now(qemu):
            running = sorted(name for name in names if name in up)
            if len(running) > 1:
                yield Finding(
                    f"{' and '.join(map(quote, running[:NAMED_MAX]))} of {qemu.name} are on one "
                    "hub, which was made while it ran",
                    WHY,
                    sh("ip", "link", "set", "dev", running[-1], "down"),
                    f"take hub {hub_now} of {qemu.process} apart: over QMP, netdev_del of each "
                    "hubport on it",
                )


def find_mixed_hubs(scene: Scene) -> Iterator[Finding]:
    """A QEMU that joins a tap and a backend that is none on a hub of its own."""
    for qemu in scene.qemus:
        for hub in find_hubs(qemu.guest.options):
            taps = _held_ends(hub, _held(scene, qemu))
            types = {bounded(end.keys.get("type")) for end in hub.others}
            if taps and types and _is_still_joined(qemu, taps, to_others=True):
                others = sorted(readable(each) if each else "something else" for each in types)
                what = " and ".join(others[:NAMED_MAX])
                yield Finding(
                    f"{call_it(taps[0])} of {qemu.name} is on one hub with {what}",
                    WHY_MIXED,
                    None,
                    f"when {qemu.process} starts the next time, {REMEDY}",
                )


def _held(scene: Scene, qemu: Qemu) -> frozenset[str]:
    """Return the taps that a QEMU holds, or if that cannot be seen those whose mark names it.

    NOTE: anybody can write any name on a command line; which taps are held, the kernel tells.
    """
    if not qemu.hidden:
        return frozenset(qemu.guest.taps.values())
    return frozenset(
        link.name
        for link in scene.links
        if link.mark is not None and link.mark.pid == qemu.guest.pid
    )


def _held_ends(hub: Hub, held: frozenset[str]) -> list[Option]:
    """Return the taps of a hub that are among those `held`; one without a name may be any other."""
    named = {tap_name(tap) for tap in hub.taps}
    left = len(held - named)
    found: dict[object, Option] = {}
    for tap in hub.taps:
        name = tap_name(tap)
        left -= name is None
        if name in held or (name is None and left >= 0):
            found.setdefault(name or id(tap), tap)
    return list(found.values())


def _is_still_joined(qemu: Qemu, taps: Sequence[Option], *, to_others: bool = False) -> bool:
    """Tell whether what a command line has on one hub is so by what the QEMU tells, if it does.

    That are `taps`, with each other, or `to_others` with what is no tap.
    """
    if qemu.joints is None:
        return True
    names = {tap_name(tap) for tap in taps}
    for joint in qemu.joints:
        there = [tap_of(each, qemu.guest) for each in joint.backends if each.type == "tap"]
        # NOTE: of one that a helper has brought, neither side knows the name.
        found = sum(name is None or None in names or name in names for name in there)
        if (found and len(there) < len(joint.backends)) if to_others else found > 1:
            return True
    return False


def _joined_now(qemu: Qemu) -> Iterator[tuple[int, list[str]]]:
    """Yield each hub that a QEMU tells of, and which of the taps that it holds are on it.

    NOTE: it may say anything of itself; which taps are held, the kernel tells.
    """
    held = set(qemu.guest.taps.values())
    for joint in qemu.joints or ():
        names = dict.fromkeys(tap_of(each, qemu.guest) for each in joint.backends)
        yield joint.hub, [name for name in names if name is not None and name in held]


def joined_taps(scene: Scene) -> set[str | None]:
    """Return the taps that a hub of a running QEMU's joins with another tap."""
    joined: set[str | None] = set()
    for qemu in scene.qemus:
        for hub in find_hubs(qemu.guest.options):
            taps = _held_ends(hub, _held(scene, qemu))
            if len(taps) > 1 and _is_still_joined(qemu, taps):
                joined.update(map(tap_name, taps))
        for _, names in _joined_now(qemu):
            joined.update(name for name in names if len(names) > 1)
    return joined
