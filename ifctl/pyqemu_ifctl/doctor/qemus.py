"""Doctor's checks of the QEMUs that run: their scripts, helpers, MACs and confinement."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from pyqemu_ifconf.policy import Policy, is_left
from pyqemu_ifconf.shell import quote, readable, takeover
from pyqemu_ifctl.doctor.running import DEFAULT_SCRIPTS, HELPERS, Qemu, helpers_of, script_of
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifup import kinds
from pyqemu_ifup.kinds.check import Finding
from pyqemu_ifup.qemu.command_line import Option
from pyqemu_ifup.qemu.hubs import tap_name


def is_ours(path: str | None, program: str) -> bool:
    """Tell whether what a script= leads to is this program of ours."""
    return os.path.basename(path or "").partition("@")[0] == program


def find_stock_scripts(scene: Scene) -> Iterator[Finding]:
    """A QEMU whose tap had no script=, so that QEMU's own script was called."""
    for qemu in scene.qemus:
        for option in qemu.guest.options:
            script = script_of(option, "script")
            if script is None or "script" in option.keys:
                continue
            if _is_left(scene, qemu, tap_name(option)):
                continue
            if not is_ours(qemu.scripts.get(script), "pyqemu-ifup"):
                yield Finding(
                    f"{qemu.name} has a tap without script=, and {readable(script)} is not ours",
                    "the distribution's script knows no policy: it guesses a bridge, or none",
                    takeover(),
                )
                break


def find_foreign_helpers(scene: Scene) -> Iterator[Finding]:
    """A QEMU whose tap came by a bridge helper that is not ours, past the policy."""
    for qemu in scene.qemus:
        paths = {path for option in qemu.guest.options for path in helpers_of(option)}
        named = {tap_name(option) for option in qemu.guest.options}
        links = filter(None, map(scene.link, sorted(set(qemu.guest.taps.values()) - named)))
        past = [
            link for link in links if link.mark is None and not _is_left(scene, qemu, link.name)
        ]
        if not paths or not past:
            continue
        master = next((each for each in scene.links if each.index == past[0].master), None)
        place = f" on {quote(master.name)}" if master is not None else ""
        what = f"{qemu.name} has {quote(past[0].name)}{place} by a bridge helper that is not ours"
        why = "that knows no policy: bridge.conf alone let it in, with no rule, VLAN or isolation"
        foreign = {
            path
            for path in paths
            if (target := qemu.scripts.get(path)) is not None
            and not is_ours(target, "pyqemu-bridge-helper")
        }
        if foreign & set(HELPERS):
            yield Finding(what, why, takeover("--helper"))
        elif foreign:
            yield Finding(
                what,
                why,
                None,
                f"when {qemu.process} starts the next time, let its helper= be "
                "pyqemu-bridge-helper, by its whole path",
            )
        else:
            yield Finding(
                what, why, None, f"end {qemu.process} and start it anew: its helper is ours by now"
            )


def _is_left(scene: Scene, qemu: Qemu, tap: str | None) -> bool:
    """Tell whether a `leave` rule of the policy has the tap; None: all that QEMU does not name."""
    if tap is None:
        named = {tap_name(option) for option in qemu.guest.options}
        taps = set(qemu.guest.taps.values()) - named
        return bool(taps) and taps <= qemu.left
    return tap in qemu.left or (isinstance(scene.policy, Policy) and is_left(scene.policy, tap))


def find_no_downscripts(scene: Scene) -> Iterator[Finding]:
    """A QEMU whose tap our script attached, and whose downscript= is missing or not ours."""
    for qemu in scene.qemus:
        for option in qemu.guest.options:
            script = script_of(option, "script")
            ours = qemu.scripts.get(script) if script is not None else None
            if script is None or ours is None or not is_ours(ours, "pyqemu-ifup"):
                continue
            down = script_of(option, "downscript")
            if is_ours(qemu.scripts.get(down or ""), "pyqemu-ifdown"):
                continue
            if _is_left(scene, qemu, tap_name(option)):
                continue
            if down is None and not _stays(scene, qemu, option):
                # NOTE: a tap that goes with its QEMU is gone from a Linux bridge too.
                continue
            what = f"{qemu.name} has no downscript="
            if down is not None:
                is_missing = qemu.scripts.get(down) is None
                what = f"the downscript{_path(qemu, down)} of {qemu.name} is "
                what += "missing" if is_missing else "not ours"
            why = (
                f"when it ends, nobody takes its tap away: a port of {kinds.outliving()}, and a "
                "persistent tap on its bridge, stays until gc"
            )
            if down == DEFAULT_SCRIPTS["downscript"]:
                yield Finding(what, why, takeover())
            else:
                add = "give its tap the path of pyqemu-ifdown as downscript="
                if scene.hooks is not None:
                    add = f"add: downscript={quote(scene.hooks.ifdown)}"
                yield Finding(what, why, None, f"when {qemu.process} starts the next time, {add}")
            break


def _stays(scene: Scene, qemu: Qemu, option: Option) -> bool:
    """Tell whether something of a tap is left when its QEMU ends without a downscript=."""
    name = tap_name(option)
    links = filter(None, map(scene.link, [name] if name else qemu.guest.taps.values()))
    return any(
        link.persistent or kinds.load_view(link.mark.kind).outlives
        for link in links
        if link.mark is not None
    )


def _path(qemu: Qemu, script: str) -> str:
    """Return a script's path for a sentence, empty if another user has chosen it.

    NOTE: what comes from another user's command line is nothing that root should have in hand.
    """
    own = qemu.guest.uid == os.geteuid() or script in DEFAULT_SCRIPTS.values()
    return f" {readable(script)}" if own else ""


def find_unconfined(scene: Scene) -> Iterator[Finding]:
    """A QEMU whose system calls are not filtered."""
    for qemu in scene.qemus:
        if qemu.confined is False:
            yield Finding(
                f"{qemu.name} runs without -sandbox" + (", as root" if qemu.guest.uid == 0 else ""),
                "a guest that breaks out of it may use all of the kernel, and gain privilege",
                None,
                f"when {qemu.process} starts the next time, add: -sandbox on",
            )


def find_twins(scene: Scene) -> Iterator[Finding]:
    """Two running QEMUs with the same MAC on one bridge, or on bridges that are not known."""
    places = _find_places(scene)
    taken = {nic.mac for qemu in scene.qemus for nic in qemu.nics}
    seen: dict[str, dict[str | None, Qemu]] = {}
    for qemu in scene.qemus:
        if qemu.guest.pid in scene.away:
            continue
        own: dict[str, set[str | None]] = {}
        for nic in qemu.nics:
            if nic.mac is not None and nic.type != "user":
                own.setdefault(nic.mac, set()).add(places.get(nic.tap or ""))
        for mac, where in own.items():
            others = seen.setdefault(mac, {})
            twin = next(
                (
                    other
                    for place, other in others.items()
                    if place is None or None in where or place in where
                ),
                None,
            )
            if twin is not None:
                fresh = _fresh(taken, f"{mac} {qemu.name}")
                yield Finding(
                    f"{qemu.name} has the MAC {mac}, and so has {twin.name}",
                    "the switch sends the frames of both to whichever has sent last",
                    None,
                    f"end {qemu.process}, and start it with another MAC: mac={fresh}",
                )
            for place in where:
                others.setdefault(place, qemu)


def _find_places(scene: Scene) -> dict[str, str]:
    """Return the bridge that each link is on, but of those that are on none."""
    ports = {each.name: f"{each.ovsdb} {each.bridge}" for each in scene.ports if each.bridge}
    names = {link.index: link.name for link in scene.links}
    places = {link.name: names[link.master] for link in scene.links if link.master in names}
    return places | {link.name: ports[link.name] for link in scene.links if link.name in ports}


def _fresh(taken: set[str | None], seed: str) -> str:
    """Return a MAC for one of two guests, always the same, and add it to those that are taken."""
    digest = seed.encode()
    while True:
        digest = hashlib.sha256(digest).digest()
        found = "52:54:00:" + digest[:3].hex(":")
        if found not in taken:
            taken.add(found)
            return found
