"""The dnsmasq of a network with `nat:`: a unit where systemd runs, else a process with limits.

Which process it is only root can say: systemd, or a record in the network's folder, written before
the process becomes dnsmasq. Its settings are written while none runs, so what runs has them.
"""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from pyqemu_ifconf.failure import Failure, Forbidden, Lacking, Status
from pyqemu_ifconf.ids import is_alone, is_mapped
from pyqemu_ifconf.shell import Command, into, joined, output, quote, sh
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.programs import SHORT, Child, run_program, scratch, start_program
from pyqemu_ifup.hook import SAFE_PATH, waiting_for
from pyqemu_ifup.system.process import owner_of, read_stat, read_status
from pyqemu_ifup.task import pause

SETTINGS, RECORD, READY = "dnsmasq.conf", "dnsmasq.process", "dnsmasq.pid"
FILES = ("leases", SETTINGS, RECORD, READY)
"""What a network's folder has of its dnsmasq. dnsmasq writes READY, whose words nobody reads."""
TEMPLATE = "pyqemu-ifup-dnsmasq@.service"
BY_ITSELF = "see syslog, and how it was built: dnsmasq --version"
"""What to do about a dnsmasq that does not run, or not with these settings."""
TERM_TIME = 1.0
"""Seconds that dnsmasq has to end by itself."""
PROGRAM = "dnsmasq"
USERS = ("dnsmasq", "nobody")
CAPABILITIES = {"SETGID": 6, "SETUID": 7, "NET_BIND_SERVICE": 10, "NET_ADMIN": 12, "NET_RAW": 13}
"""What dnsmasq needs, by its number (linux/capability.h): some to begin with, some all along."""
CHILD = """\
ulimit -c 0; ulimit -n 1024; ulimit -v 262144
read -r _ && exec "$@" </dev/null
"""
"""It waits until it is recorded. A dnsmasq has at most 20 processes beside it, for TCP."""

_children: dict[int, Child] = {}
"""The dnsmasqs that this process has started."""


@dataclass(frozen=True)
class Found:
    """What is there of a network's dnsmasq.

    `unit` is its unit, which may be stopped, None where it cannot be one; `active` whether that
    runs or is about to; `pid` the process that is none of a unit's, and `recorded` whether there
    was one, which may have ended by itself. `settings` are those of one that serves, None where
    none does.
    """

    unit: str | None
    active: bool
    pid: int | None
    settings: tuple[str, ...] | None
    recorded: bool = False


class Account(NamedTuple):
    """Whom dnsmasq runs as: the name that it is told, and the user that it is."""

    name: str
    uid: int


def account() -> Account:
    """Return whom dnsmasq runs as. Raises Failure (69) where it could only be root.

    It may be an ordinary user's own root, who can become nobody else.
    """
    if is_alone():
        own = os.geteuid()
        try:
            with waiting_for(f"the directory of users does not say who {own} is"):
                return Account(pwd.getpwuid(own).pw_name, own)
        except KeyError:
            # NOTE: it takes no number; told to be root, it stays who it is.
            return Account("root", own)
    for name in USERS:
        try:
            with waiting_for(f"the directory of users does not say who {name} is"):
                found = pwd.getpwnam(name)
        except KeyError:
            continue
        if is_mapped(found.pw_uid):
            return Account(name, found.pw_uid)
    raise Failure(
        Status.UNAVAILABLE,
        "there is no user for dnsmasq to run as",
        f"neither {' nor '.join(USERS)} is known",
        sh("useradd", "--system", "dnsmasq"),
    )


def require_capabilities() -> None:
    """Check that dnsmasq would have the capabilities that it needs. Raises Failure (77).

    A container's root may lack some; as a unit it has them of systemd.
    """
    if os.geteuid() != 0 or _under_systemd():
        return
    effective = int(read_status(os.getpid(), ("CapEff",))["CapEff"], 16)
    lacking = [word for word, number in CAPABILITIES.items() if not effective >> number & 1]
    if lacking:
        raise Lacking(
            Status.DENIED,
            "dnsmasq cannot run here",
            f"this process lacks {', '.join(f'CAP_{word}' for word in lacking)}",
            *(f"--cap-add={word}" for word in lacking),
        )


async def look(folder: str, deadline: Deadline) -> Found:
    """Look for the dnsmasq of the network with this folder. Raises Failure where it cannot be told.

    Without the network's lock it may be another one by the time that it is told of.
    """
    unit, state = _unit_of(folder), None
    if _under_systemd():
        state = await _unit_state(unit, deadline)
    pid = _recorded(folder)
    active = state not in (None, "inactive", "failed")
    if pid is None:
        serves = state == "active"
    else:
        serves = not active and os.path.exists(f"{folder}/{READY}")
    settings = tuple(_read(f"{folder}/{SETTINGS}").splitlines()) if serves else None
    recorded = os.path.exists(f"{folder}/{RECORD}")
    return Found(unit if state is not None else None, active, pid, settings, recorded)


def serving_commands(folder: str, settings: Sequence[str], unit: str | None) -> tuple[Command, ...]:
    """Return the commands that do as `serve`, so that `look` finds the dnsmasq.

    `unit` is as of Found: None if it is to be a process.
    """
    file, ready = f"{folder}/{SETTINGS}", f"{folder}/{READY}"
    written = (sh("mkdir", "-p", folder), into(sh("printf", r"%s\n", *settings), file))
    if unit is not None:
        return (*written, sh("systemctl", "start", unit))
    process = output(sh("cat", ready))
    start = output(sh("awk", "{print $22}", joined("/proc/", process, "/stat")))
    namespace = output(sh("stat", "-Lc", "%i", "/proc/self/ns/pid"))
    return (
        *written,
        sh("dnsmasq", f"--conf-file={file}", f"--pid-file={ready}"),
        into(sh("echo", process, start, namespace), f"{folder}/{RECORD}"),
    )


def ending_commands(folder: str, unit: str | None, pid: int | None) -> tuple[Command, ...]:
    """Return the commands that end its `unit` or the process `pid`; none for neither."""
    if pid is not None:
        return (
            sh("kill", str(pid)),
            # NOTE: its port is free only when it has ended.
            sh("tail", "-s", "0.1", f"--pid={pid}", "-f", "/dev/null"),
            sh("rm", f"{folder}/{READY}", f"{folder}/{RECORD}"),
        )
    if unit is not None:
        return (sh("systemctl", "stop", unit),)
    return ()


def read_last(folder: str) -> tuple[str | None, int | None]:
    """Return the unit or the process that the network's dnsmasq was by its record, if it was any.

    Unlike `look` it asks nobody, so that it is no more than a guess.
    """
    first = _read(f"{folder}/{RECORD}").partition(" ")[0]
    if first.isascii() and first.isdigit():
        return None, int(first)
    return (_unit_of(folder) if _under_systemd() else None), None


async def try_settings(settings: Sequence[str], deadline: Deadline) -> None:
    """See whether there is a dnsmasq that runs, and takes these settings. Raises Failure (71)."""
    program = shutil.which(PROGRAM, path=SAFE_PATH) or PROGRAM
    words = [program, "--test", "--conf-file=/dev/null", *(f"--{each}" for each in settings)]
    done = await run_program(words, deadline)
    if done.status != 0:
        raise _no_start(done.err, BY_ITSELF)


def _no_start(said: str, remedy: str) -> Failure:
    return Failure(Status.REFUSED, "dnsmasq does not start", _first_line(said), remedy)


async def serve(folder: str, settings: Sequence[str], deadline: Deadline) -> None:
    """Have a dnsmasq run that has these settings, as in its file, and no other.

    Raises Failure.
    """
    found = await look(folder, deadline)
    if found.settings == tuple(settings):
        return
    await _end(folder, found, deadline)
    with open(f"{folder}/{SETTINGS}", "w", opener=_private) as file:
        file.write("".join(f"{line}\n" for line in settings))
    if found.unit is not None:
        await _have_systemd("start", found.unit, deadline)
    else:
        await _start(folder, deadline)


async def end(folder: str, deadline: Deadline) -> None:
    """End the network's dnsmasq if one runs, wait until it has, and remove its settings.

    Raises Failure.
    """
    await _end(folder, await look(folder, deadline), deadline)
    _remove(f"{folder}/{SETTINGS}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "it does not say why")


# As a unit


def _under_systemd() -> bool:
    """Tell whether systemd runs (sd_booted(3)), and in this network namespace."""
    if not os.path.isdir("/run/systemd/system") or not shutil.which("systemctl", path=SAFE_PATH):
        return False
    try:
        # NOTE: each network namespace has files of its own there, and who may not ask for the
        # namespace of process 1 can look at them, too.
        return os.path.samestat(os.stat("/proc/1/net/dev"), os.stat("/proc/thread-self/net/dev"))
    except FileNotFoundError:
        # NOTE: /proc with hidepid=; the first namespace has what no other one has.
        return os.path.exists("/proc/sys/net/core/netdev_max_backlog")


def _unit_of(folder: str) -> str:
    return TEMPLATE.replace("@", f"@{os.path.basename(folder)}")


async def _unit_state(unit: str, deadline: Deadline) -> str | None:
    """Return a unit's ActiveState, None where systemd has no such unit. Raises Failure.

    One that has a job, as after a start that was given up, is "activating" before it is so.
    """
    words = ["systemctl", "show", "--property=LoadState,ActiveState,Job", unit]
    done = await run_program(words, deadline)
    found = dict(line.partition("=")[::2] for line in done.out.splitlines())
    if done.status != 0 or "ActiveState" not in found:
        raise Failure(
            Status.REFUSED,
            f"systemd does not tell of {quote(unit)}",
            _first_line(done.err),
            "see whether systemd answers: systemctl status",
        )
    if found.get("LoadState") == "not-found" and found["ActiveState"] == "inactive":
        return None
    if found["ActiveState"] in ("inactive", "failed") and found.get("Job", "0") not in ("", "0"):
        return "activating"
    return found["ActiveState"]


# As a process


def _recorded(folder: str) -> int | None:
    """Return the network's dnsmasq, by the record in its folder; None where it has ended.

    Raises Failure (71) where that cannot be told.
    """
    path = f"{folder}/{RECORD}"
    text = _read(path)
    if not text:
        return None
    try:
        pid, start, namespace = map(int, text.split())
    except ValueError:
        problem = "it does not say a process, its start and its PID namespace"
    else:
        problem = f"process {pid} is one of another PID namespace"
        if namespace == os.stat("/proc/self/ns/pid").st_ino:
            try:
                return pid if _start_of(pid) == start else None
            except PermissionError as error:
                problem = str(error)
    raise Failure(
        Status.REFUSED,
        f"cannot tell whether the dnsmasq of {quote(path)} runs",
        problem,
        f"end it, if it does, and {sh('rm', path)}",
    )


def _start_of(pid: int) -> int | None:
    """Return the start of a process, as process_start() does; None where it has ended.

    One that nobody has waited for yet has ended, too. Raises PermissionError where /proc hides it.
    """
    if pid in _children and _children[pid].poll() is not None:
        del _children[pid]
    found = read_stat(pid)
    if found is not None:
        return found.start if not found.has_ended else None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    raise PermissionError(errno.EACCES, "is hidden", f"process {pid}")


async def _start(folder: str, deadline: Deadline) -> None:
    program = shutil.which(PROGRAM, path=SAFE_PATH) or PROGRAM
    words = [
        program,
        "--keep-in-foreground",
        f"--conf-file={folder}/{SETTINGS}",
        f"--pid-file={folder}/{READY}",
    ]
    _remove(f"{folder}/{READY}")
    with scratch() as said:
        child = start_program(["sh", "-c", CHILD, "sh", *words], None, None, said)
        try:
            _record(folder, child.pid)
            _let_go(child)
            while not os.path.exists(f"{folder}/{READY}"):
                if child.poll() is not None:
                    said.seek(0)
                    # NOTE: beside systemd it is started here for want of its unit alone.
                    remedy = f"let systemd find {TEMPLATE}" if _under_systemd() else BY_ITSELF
                    raise _no_start(said.read().decode("utf-8", "replace"), remedy)
                deadline.check("dnsmasq does not start")
                await pause(SHORT)
        except BaseException:
            child.kill()
            child.wait()
            raise
    _children[child.pid] = child


def _record(folder: str, pid: int) -> None:
    """Write down which process is to be the network's dnsmasq; one that has ended is none."""
    start = _start_of(pid)
    if start is None:
        return
    text = f"{pid} {start} {os.stat('/proc/self/ns/pid').st_ino}\n"
    with open(f"{folder}/{RECORD}", "w", opener=_private) as file:
        file.write(text)


def _let_go(child: Child) -> None:
    """Let it become dnsmasq."""
    assert child.stdin is not None
    with suppress(BrokenPipeError), child.stdin as go:
        go.write(b"\n")


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


async def _have_systemd(verb: str, unit: str, deadline: Deadline) -> None:
    """Have systemd `start` or `stop` a unit. Raises Failure: 71, and 75 by the deadline."""
    done = await run_program(["systemctl", verb, unit], deadline)
    if done.status != 0:
        raise Failure(
            Status.REFUSED,
            f"{unit} does not {verb}",
            _first_line(done.err),
            f"see journalctl --unit={unit}",
        )


async def _end(folder: str, found: Found, deadline: Deadline) -> None:
    if found.unit is not None and found.active:
        await _have_systemd("stop", found.unit, deadline)
    try:
        if found.pid is not None:
            await _end_process(folder, found.pid, deadline)
        if text := _read(f"{folder}/{RECORD}"):
            await _end_rest(int(text.split()[0]), deadline)
    except PermissionError as error:
        raise Forbidden("cannot end dnsmasq", error.strerror or str(error)) from error
    _remove(f"{folder}/{RECORD}")


async def _end_process(folder: str, pid: int, deadline: Deadline) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # NOTE: only what the open descriptor is of cannot be another process by now.
        if _recorded(folder) != pid:
            return
        # NOTE: from here on it serves no more, though it may take its time: see `look`.
        _remove(f"{folder}/{READY}")
        signal.pidfd_send_signal(process, signal.SIGTERM)
        # NOTE: in a way back there is more to do than this.
        limit = deadline.child(min(TERM_TIME, deadline.remaining() / 4))
        while _recorded(folder) == pid:
            if not limit.remaining():
                signal.pidfd_send_signal(process, signal.SIGKILL)
            deadline.check("dnsmasq does not end")
            await pause(SHORT)
    except ProcessLookupError:
        return
    finally:
        os.close(process)


async def _end_rest(session: int, deadline: Deadline) -> None:
    """End what a dnsmasq that has died has left: its processes for TCP, which hold its port.

    They are in the session that it led: no other process can have its number meanwhile.
    """
    while left := _session(session):
        for pid in left:
            with suppress(ProcessLookupError):
                process = os.pidfd_open(pid)
                try:
                    if pid in _session(session):
                        signal.pidfd_send_signal(process, signal.SIGKILL)
                finally:
                    os.close(process)
        deadline.check("dnsmasq does not end")
        await pause(SHORT)


def _session(session: int) -> list[int]:
    """Return the processes of dnsmasq's user that are in a session."""
    user, found = account().uid, []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        stat = read_stat(pid)
        is_in_it = stat is not None and stat.session == session and not stat.has_ended
        if is_in_it and owner_of(pid) == user:
            found.append(pid)
    return found
