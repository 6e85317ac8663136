"""Who is asking: the guest's name, the netdev, its MAC and the user, from QEMU's own process.

Only reads. Whatever cannot be told for certain is None.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from pyqemu_ifconf.names import bounded
from pyqemu_ifconf.policy import Caller
from pyqemu_ifup.qemu.command_line import (
    Option,
    canonical_mac,
    cut_name,
    is_on_hub_0,
    read_options,
    type_of,
)
from pyqemu_ifup.system.process import command_line, find_parent, read_line, real_uid
from pyqemu_ifup.system.users import login_of

DEFAULT_BRIDGE = "br0"
"""What QEMU asks its helper for without br= (DEFAULT_BRIDGE_INTERFACE of net/tap.h)."""
DEFAULT_HOOK = "/etc/qemu-ifup"
"""What QEMU calls without script=, where its sysconfdir is /etc."""

UNREADABLE = "the command line of its QEMU cannot be read"


def find_caller(tap: str, pid: int, *, want_user: bool, helped: bool = False) -> Caller:
    """Return what is known of process `pid`, which asks for `tap`.

    `want_user`: look up its real uid's login name too, which may ask a directory service; the
    number where there is none. `helped`: a bridge helper brings it the tap. A process that has
    ended or is hidden is unknown; raises OSError for every other fault of /proc.
    """
    caller = read_command_line(command_line(pid), tap, helped=helped, pid=pid)
    return replace(caller, user=_find_user(pid)) if want_user else caller


def find_hook(tap: str, pid: int) -> str | None:
    """Return the path of the script= that process `pid` calls for `tap`, None where unknown."""
    _, options, all_seen = read_options(command_line(pid), pid)
    backend = _pick_backend(*_find_backends(options, tap), all_seen)
    return backend.keys.get("script", DEFAULT_HOOK) if backend is not None else None


def find_hook_at_work(tap: str, pid: int) -> int | None:
    """Return the process in which the QEMU `pid` runs a script for `tap` just now; None: in none.

    It is a child whose last argument is the tap's name, but this process; QEMU waits for it.
    """
    others = (int(name) for name in os.listdir("/proc") if name.isdigit())
    for other in others:
        is_child = other != os.getpid() and find_parent(other) == pid
        if is_child and read_line(other).endswith(b"\0" + os.fsencode(tap) + b"\0"):
            return other
    return None


def find_helped(pid: int) -> int | None:
    """Return the process that called `pid` as its bridge helper; None where one has ended.

    It is the parent, or where QEMU calls its helper by `sh -c` (net_bridge_run_helper of
    net/tap.c) and the shell waits for the helper, the shell's parent.
    """
    parent = find_parent(pid)
    if parent is not None:
        words = command_line(parent)
        if len(words) == 3 and words[:2] == ["sh", "-c"] and "--fd=" in words[2]:
            return find_parent(parent)
    return parent


def read_command_line(
    argv: Sequence[str], tap: str, *, helped: bool = False, pid: int | None = None
) -> Caller:
    """Return what QEMU's command line `argv`, its own name included, tells about `tap`.

    The netdev is the one whose ifname= is `tap`, else the only one that lets the kernel choose a
    name like `tap`; its MAC is that of the only device on it. What another program's command line
    or one that is hard to read leaves open is None. `helped` is as in `find_caller`, `pid` as in
    `read_options`.
    """
    vm, options, all_seen = read_options(argv, pid)
    named, numbered = ([], []) if helped else _find_backends(options, tap)
    joined: tuple[str, ...] = ()
    if any(type_of(option) == "hubport" or is_on_hub_0(option) for option in options):
        # NOTE: few guests have a hub.
        from pyqemu_ifup.qemu.hubs import joined_with

        asking = filter(_calls_helper, options) if helped else named or numbered
        joined = joined_with(options, asking)
    backend = _pick_backend(named, numbered, all_seen)
    if backend is None:
        unclear = _why_unclear(argv, named, numbered, all_seen)
        return Caller(tap, vm=vm, joined=joined, unclear=unclear)
    mac = canonical_mac(bounded(_find_mac(options, backend, all_seen)) or "")
    unclear = "" if backend.id is not None else "its -net or -nic has no id="
    unclear = unclear if mac is not None else "not one device with a MAC is on it"
    netdev = bounded(backend.id)
    return Caller(tap, vm=vm, netdev=netdev, mac=mac, joined=joined, unclear=unclear)


def _find_backends(options: list[Option], tap: str) -> tuple[list[Option], list[Option]]:
    """Return the options whose tap is called `tap`, and those that let the kernel call it so."""
    backends = [option for option in options if _calls_script(option)]
    asked = cut_name(tap)
    named = [option for option in backends if cut_name(option.keys.get("ifname", "")) == asked]
    # NOTE: without ifname= QEMU asks for "tap%d", and the kernel puts a number for each %d.
    numbered = [
        option
        for option in backends
        if _is_numbered(cut_name(option.keys.get("ifname") or "tap%d"), asked)
    ]
    return named, numbered


def _pick_backend(named: list[Option], numbered: list[Option], all_seen: bool) -> Option | None:
    """Return the option that a tap is of; None where none or several may be."""
    if named:
        return named[0] if len(named) == 1 else None
    return numbered[0] if all_seen and len(numbered) == 1 else None


def _why_unclear(
    argv: Sequence[str], named: list[Option], numbered: list[Option], all_seen: bool
) -> str:
    """Return why none of a command line's options is the tap's, or which one is not clear."""
    if not argv:
        return UNREADABLE
    if named:
        return f"{len(named)} netdevs of its QEMU have that ifname="
    if len(numbered) > 1:
        return f"{len(numbered)} netdevs of its QEMU have no ifname=, so that the kernel names them"
    if not all_seen:
        return "its QEMU has a -readconfig or a -netdev that cannot be read"
    return "no netdev of its QEMU's command line is called so: it was plugged in later"


def _calls_script(option: Option) -> bool:
    """Tell whether the option opens a tap by name and calls a script for it (net_init_tap)."""
    return (
        option.name != "device"
        and option.keys.get("type") == "tap"
        and option.keys.get("script") not in ("", "no")
        and not option.keys.keys() & {"fd", "fds", "helper"}
    )


def _calls_helper(option: Option) -> bool:
    """Tell whether a bridge helper brings the option its tap (net_init_bridge, net_init_tap)."""
    kind = type_of(option)
    return kind == "bridge" or (kind == "tap" and "helper" in option.keys)


def find_helped_mac(pid: int, network: str) -> str | None:
    """Return the MAC of the only device on the only netdev by which process `pid` asks a helper.

    That is one with br=`network`. None if that is not clear.
    """
    _, options, all_seen = read_options(command_line(pid), pid)
    asking = [
        option
        for option in options
        if _calls_helper(option) and option.keys.get("br", DEFAULT_BRIDGE) == network
    ]
    if len(asking) != 1 or not all_seen:
        return None
    return canonical_mac(bounded(_find_mac(options, asking[0], all_seen)) or "")


def _is_numbered(template: bytes, name: bytes) -> bool:
    """Tell whether the kernel may make `name` of `template`, one %d in it (__dev_alloc_name)."""
    before, mark, after = template.partition(b"%d")
    number = name[len(before) : len(name) - len(after)]
    return (
        bool(mark)
        and number.isdigit()
        and str(int(number)).encode() == number
        and name == before + number + after
    )


def _find_mac(options: list[Option], backend: Option, all_seen: bool) -> str | None:
    """Return the MAC, as it is written, of the only device on `backend`."""
    nics = [option for option in options if option.name == "net" and type_of(option) == "nic"]
    if backend.name == "net":
        # A -net tap is on hub 0, and so is each -net nic without netdev=.
        macs = [nic.keys.get("macaddr") for nic in nics if "netdev" not in nic.keys]
        if not all_seen or any(type_of(option) == "hubport" for option in options):
            return None
    else:
        devices = [option for option in options if option.name == "device"]
        macs = [
            *(nic.keys.get("macaddr") for nic in nics if nic.keys.get("netdev") == backend.id),
            *(nic.keys.get("mac") for nic in devices if nic.keys.get("netdev") == backend.id),
        ]
        if backend.id is None:
            macs = []
        if backend.name == "nic":
            macs.append(backend.keys.get("mac"))
    return macs[0] if len(macs) == 1 else None


def _find_user(pid: int) -> str | None:
    """Return the login name of the real uid of process `pid`, or its number; None where gone."""
    uid = real_uid(pid)
    return login_of(uid) if uid is not None else None
