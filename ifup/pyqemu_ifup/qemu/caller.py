"""Who is asking: the guest's name, the netdev, its MAC and the user, from QEMU's own process.

Only reads: the parent's command line, as QEMU itself would read it, with what its -readconfig names
where that may be read, and two files of /proc.
Whatever cannot be told for certain is None. The rules of the command line are those of QEMU's
lookup_opt (system/vl.c), opts_do_parse (util/qemu-option.c) and net/net.c, 5.2 to 11.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from pyqemu_ifconf.names import NAME_MAX
from pyqemu_ifconf.policy import Caller
from pyqemu_ifup.manners import waiting_for

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

DEFAULT_HOOK = "/etc/qemu-ifup"
"""What QEMU calls without script=, where its sysconfdir is /etc."""

SIZE_MAX = 1 << 18
"""Bytes of a command line that is read; a longer one, which no QEMU has, is unknown."""

TEXT_MAX = 255
"""Bytes of a name that QEMU or a user gives; a longer one is unknown."""

PATH_MAX = 4096
"""Bytes of a path, linux/limits.h."""

UNREADABLE = "the command line of its QEMU cannot be read"
PID_MAX = 1 << 22
"""PID_MAX_LIMIT of linux/threads.h."""
_GONE = (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM)
"""How /proc answers for a process that has ended, or that is hidden from us."""


@dataclass(frozen=True)
class Option:
    """One -netdev, -nic, -net or -device: its id= and all its keys; -set cannot change JSON."""

    name: str
    id: str | None
    keys: dict[str, str]
    json: bool = False


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
        if is_child and _read_line(other).endswith(b"\0" + os.fsencode(tap) + b"\0"):
            return other
    return None


def process_start(pid: int) -> int | None:
    """Return when process `pid` started, in clock ticks since boot; None where it has ended.

    Field 22 of /proc/PID/stat (proc(5)). A pid is used again, the pair of both is not. One that
    its parent has not waited for has ended.
    """
    # NOTE: the second field, the process's name, may hold spaces and parentheses.
    fields = _read_proc(pid, "stat").rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] != b"Z" else None


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


def find_parent(pid: int) -> int | None:
    """Return the parent of process `pid`, field 4 of /proc/PID/stat; None where it has ended."""
    fields = _read_proc(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


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
    if any(_type(option) == "hubport" or is_on_hub_0(option) for option in options):
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


def bounded(text: str | None) -> str | None:
    """Return a text of another's; None where it is empty, too long, or half a character."""
    # NOTE: a letter has a byte at least.
    if not text or len(text) > TEXT_MAX:
        return None
    try:
        return text if len(os.fsencode(text)) <= TEXT_MAX else None
    except UnicodeEncodeError:
        # From an escape in JSON.
        return None


def read_options(
    argv: Sequence[str], pid: int | None = None
) -> tuple[str | None, list[Option], bool]:
    """Return the guest's name, the network options in order, and whether they are all of them.

    What -readconfig names is read as far as process `pid` is the user's own; without it, not.
    """
    vm: str | None = None
    options: list[Option] = []
    by_id: dict[tuple[str, str], Option] = {}
    files = 0
    all_seen = True

    def add(option: Option) -> None:
        options.append(option)
        if option.id is not None:
            by_id.setdefault((option.name, option.id), option)

    for name, argument in walk_options(argv):
        if name == "name":
            # NOTE: QEMU merges several -name into one: the last guest= of all wins.
            vm = dict(split_option(argument, "guest")).get("guest", vm)
        elif name == "set":
            _set(by_id, argument)
        elif name == "readconfig":
            # NOTE: few guests have one.
            from pyqemu_ifup.qemu.read_config import FILES_MAX, read_config

            files += 1
            given = pid if files <= FILES_MAX else None
            sections = read_config(given, argument) if given is not None else None
            all_seen = all_seen and sections is not None
            for each in sections or ():
                if each.group == "name":
                    vm = each.keys.get("guest", vm)
                elif each.group in _IMPLIED:
                    add(Option(each.group, each.id or each.keys.get("id"), each.keys))
        elif name in _IMPLIED:
            option = _parse_json(name, argument) if argument[:1] == "{" else _parse(name, argument)
            if option is not None:
                add(option)
            elif name == "netdev":
                all_seen = False
        elif argument.startswith("-") and argument.lstrip("-") in _IMPLIED:
            # An option unknown to us that may take no argument: then a netdev just went by.
            all_seen = False
    return bounded(vm), options, all_seen


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
    kind = _type(option)
    return kind == "bridge" or (kind == "tap" and "helper" in option.keys)


def is_on_hub_0(option: Option) -> bool:
    """Tell whether the option is a backend of -net's, which all are on one hub (net/net.c)."""
    return option.name == "net" and _type(option) not in ("nic", "none", "hubport")


def cut_name(name: str) -> bytes:
    """Return an interface name as the kernel gets it from QEMU: its first 15 bytes."""
    try:
        return os.fsencode(name)[:NAME_MAX]
    except UnicodeEncodeError:
        # Half a character, from an escape in JSON: no tap is called so.
        return b""


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
    nics = [option for option in options if option.name == "net" and _type(option) == "nic"]
    if backend.name == "net":
        # A -net tap is on hub 0, and so is each -net nic without netdev=.
        macs = [nic.keys.get("macaddr") for nic in nics if "netdev" not in nic.keys]
        if not all_seen or any(_type(option) == "hubport" for option in options):
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


def _type(option: Option) -> str | None:
    """Return the type of a -netdev, -nic or -net; None for a -device."""
    return None if option.name == "device" else option.keys.get("type")


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


def real_uid(pid: int) -> int | None:
    """Return the real uid of process `pid`; None where it has ended or is hidden."""
    found = read_status(pid, ("Uid",))
    return int(found["Uid"].split()[0]) if found else None


def read_status(pid: int, names: Collection[str]) -> dict[str, str]:
    """Return those of the fields `names` that /proc/PID/status has; none where it has ended."""
    # NOTE: of what ends a line, the kernel escapes \n alone in a process's name (proc_task_name).
    lines = _read_proc(pid, "status").decode("ascii", "replace").split("\n")
    pairs = (line.partition(":") for line in lines)
    return {name: value.strip() for name, _, value in pairs if name in names}


def _find_user(pid: int) -> str | None:
    """Return the login name of the real uid of process `pid`, or its number; None where gone."""
    uid = real_uid(pid)
    return login_of(uid) if uid is not None else None


def login_of(uid: int) -> str | None:
    """Return the login name of a user, or its number where there is none; None: a name too long."""
    import pwd

    try:
        with waiting_for(f"the directory of users does not say who user {uid} is"):
            return bounded(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


def command_line(pid: int) -> list[str]:
    """Return the words of process `pid`; none where it has ended, is hidden, or has too many."""
    return [os.fsdecode(word) for word in _read_line(pid).split(b"\0")[:-1]]


def read_program(pid: int) -> str:
    """Return the first word of process `pid`, as far as it is no longer than a path may be.

    That takes the same time whatever other words there are. It is empty where the process has ended
    or is hidden.
    """
    return os.fsdecode(_read_proc(pid, "cmdline", PATH_MAX).partition(b"\0")[0])


def find_word(pid: int, part: str) -> str:
    """Return the first word of process `pid` that has `part` in it, empty for none."""
    line = _read_line(pid)
    at = line.find(os.fsencode(part))
    return os.fsdecode(line[line.rfind(b"\0", 0, at) + 1 :].partition(b"\0")[0]) if at >= 0 else ""


def command_size(pid: int) -> int:
    """Return the bytes of the words of process `pid`, 0 where `command_line` returns none."""
    return len(_read_line(pid))


def _read_line(pid: int) -> bytes:
    """Return the command line of process `pid`, a NUL after each word, as `command_line` does."""
    line = _read_proc(pid, "cmdline", SIZE_MAX + 1)
    return line if len(line) <= SIZE_MAX else b""


def read_number(text: str, most: int) -> int | None:
    """Return the decimal number that a text of another's is, None where it is none up to `most`."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most))):
        return None
    number = int(text)
    return number if number <= most else None


def _read_proc(pid: int, name: str, size: int = -1) -> bytes:
    """Return the file `name` of process `pid` in /proc; empty where it has ended or is hidden.

    Of a file that is longer, the first `size` bytes.
    """
    try:
        with (
            waiting_for(f"process {pid} does not let its {name} be read"),
            open(f"/proc/{pid}/{name}", "rb") as file,
        ):
            return file.read(size)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return b""
