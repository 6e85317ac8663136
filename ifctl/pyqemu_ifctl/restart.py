"""A running QEMU's NICs by its command line, and the command that starts it with a change."""

from __future__ import annotations

import json
import os
import pwd
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pyqemu_ifctl.scene import Qemu
from pyqemu_ifup.caller import Option, canonical_mac, find_options
from pyqemu_ifup.look import Link

DEFAULT_MAC = "52:54:00:12:34:56"
"""The MAC of the first NIC without one; the next ones count on (qemu_macaddr_default_if_unset)."""


@dataclass(frozen=True)
class CommandNic:
    """One NIC of a command line: where its words stand in it, its MAC, and its other end.

    `type` is that of its backend, `tap` its tap's name; None where they are not known.
    """

    at: int
    option: Option
    mac: str | None
    type: str | None
    tap: str | None


def nics_of(qemu: Qemu) -> list[CommandNic]:
    """Return the NICs that have a backend, in the order in which QEMU gives them their MACs."""
    found = list(_options_of(qemu.argv))
    netdevs = {each.id: each for _, each in found if each.name == "netdev"}
    hub = [each for _, each in found if each.name == "net" and each.keys.get("type") != "nic"]
    # NOTE: those of -net and -nic are the machine's own, which is made before any -device.
    nics = [(at, each) for at, each in found if each.name == "nic"
            or (each.name == "net" and each.keys.get("type") == "nic")]
    nics += [(at, each) for at, each in found if each.name == "device" and "netdev" in each.keys]
    given = 0
    answer = []
    for at, option in nics:
        mac = canonical_mac(option.keys.get(_mac_key(option), ""))
        if mac is None:
            mac = DEFAULT_MAC[:-2] + f"{int(DEFAULT_MAC[-2:], 16) + given:02x}"
            given += 1
        if option.name == "nic":
            backend: Option | None = option
        elif option.name == "net" and "netdev" not in option.keys:
            backend = hub[0] if len(hub) == 1 else None
        else:
            backend = netdevs.get(option.keys["netdev"])
        kind = backend.keys.get("type") if backend is not None else None
        answer.append(CommandNic(at, option, mac, kind, _tap_of(qemu, backend)))
    return answer


def _options_of(argv: Sequence[str]) -> Iterator[tuple[int, Option]]:
    """Yield each network option with where its argument stands."""
    for at in range(2, len(argv)):
        name = argv[at - 1].lstrip("-")
        if argv[at - 1].startswith("-") and name in ("device", "netdev", "nic", "net"):
            for option in find_options([argv[0], *argv[at - 1 : at + 1]]):
                yield at, option


def _mac_key(option: Option) -> str:
    return "macaddr" if option.name == "net" else "mac"


def _tap_of(qemu: Qemu, backend: Option | None) -> str | None:
    """Return the name of a backend's tap: by its ifname=, its descriptor, or as the only one."""
    if backend is None or backend.keys.get("type") not in ("tap", "bridge"):
        return None
    descriptor = (backend.keys.get("fd") or backend.keys.get("fds", "")).partition(":")[0]
    if descriptor.isdecimal():
        return qemu.guest.taps.get(int(descriptor))
    if "ifname" in backend.keys:
        return backend.keys["ifname"]
    taps = set(qemu.guest.taps.values())
    return taps.pop() if len(taps) == 1 else None


def with_mac(qemu: Qemu, nic: CommandNic, mac: str) -> list[str]:
    """Return the command line of a QEMU with another MAC for one NIC."""
    return _changed(qemu.argv, nic.at, nic.option, {_mac_key(nic.option): mac})


def with_words(qemu: Qemu, option: Option, keys: Mapping[str, str]) -> list[str]:
    """Return the command line of a QEMU with other values for some keys of an option of its."""
    for at, each in _options_of(qemu.argv):
        if each == option:
            return _changed(qemu.argv, at, option, keys)
    return list(qemu.argv)


def _changed(
    argv: Sequence[str], at: int, option: Option, keys: Mapping[str, str]
) -> list[str]:
    words = list(argv)
    if option.json:
        words[at] = json.dumps({**json.loads(words[at]), **keys})
    else:
        # NOTE: of a key that is there twice, QEMU takes the last.
        words[at] += "".join(
            f",{key}={value.replace(',', ',,')}" for key, value in keys.items()
        )
    return words


def start_again(qemu: Qemu, words: Sequence[str], links: Iterable[Link]) -> str:
    """Return the command for a shell that starts a QEMU with these words.

    One whose taps were opened for it, by `pyqemu-ifctl run`, is started by that again; one of
    another user's as that user.
    """
    into = f"cd {shlex.quote(qemu.cwd)} && " if qemu.cwd is not None else ""
    networks = {link.name: link.stamp.network for link in links if link.stamp is not None}
    nics: list[str] = []
    rest = list(words)
    for at, option in reversed(list(_options_of(words))):
        given = option.keys.get("fd") or option.keys.get("fds")
        tap = _tap_of(qemu, option) if option.name == "netdev" else None
        if given and tap in networks and option.id is not None:
            queues = given.count(":") + 1
            nics[:0] = ["--nic", f"{networks[tap]},tap={tap},id={option.id},queues={queues}"]
            del rest[at - 1 : at + 1]
    before = ["pyqemu-ifctl", "run", *nics, "--"] if nics else []
    return into + as_its_user(qemu, shlex.join([*before, *rest]))


def as_its_user(qemu: Qemu, command: str) -> str:
    """Return a command as the user who runs the QEMU gives it.

    NOTE: what comes from a user's command line must not be run by root, who trusts what is
    printed here.
    """
    if qemu.uid is None or qemu.uid == os.geteuid():
        return command
    words = ["setpriv", "--reuid", str(qemu.uid)]
    try:
        words += ["--regid", str(pwd.getpwuid(qemu.uid).pw_gid), "--init-groups"]
    except KeyError:
        words += ["--regid", str(qemu.uid), "--clear-groups"]
    return f"{shlex.join(words)} {command}"
