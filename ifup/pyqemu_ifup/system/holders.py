"""Which process holds which tap, from the descriptors of all processes (proc(5))."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import signal
import socket
import stat
import struct
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

from pyqemu_ifup.hook import waiting_for
from pyqemu_ifup.system.forked import fork_with
from pyqemu_ifup.system.process import descriptors_of, read_fdinfo, read_status
from pyqemu_ifup.task import finish, pause

BATCH = 64
"""Descriptors, or processes, that are looked at in one go."""
OTHERS = 2.0
"""Seconds that all processes of others than root may take to be looked at."""
TUNGETDEVNETNS = 0x54E3
"""_IO('T', 227) of linux/if_tun.h."""
PIDFD_GETFD = 438
"""The system call pidfd_getfd(2), on every architecture."""
PR_SET_NAME = 15
"""linux/prctl.h."""
PATIENCE = 1.0
"""Seconds that it may take to be told which taps are elsewhere; of the others it is not certain."""
LONGEST = OTHERS + 2 * PATIENCE
"""Seconds that it takes at the most, where others use up all that is theirs."""
PAUSE = 0.002
"""Seconds after which an answer is looked for again."""
LOOKER = "pyqemu-looker"
"""The name of the processes that take descriptors of others'."""
LOOKERS_MAX = 8
"""How many of them may be kept from their end at a time, beyond which there are no others."""
ELSEWHERE, LET_GO = 1, 2
"""The bytes that stand for a tap that is elsewhere, and for one that is held no longer."""
_children: list[int] = []
"""Those of this process."""
_NODE = re.compile(r".*/tap([1-9][0-9]{0,9})( \(deleted\))?")
"""A link's own device, /dev/tapN, which devtmpfs has for root alone; N is the link's ifindex
(drivers/net/tap.c). It is /tapN where whoever opened it had mounts of his own, which are gone."""
AT_FDCWD, AT_STATX_DONT_SYNC, STATX_TYPE = -100, 0x4000, 0x1
"""linux/fcntl.h and linux/stat.h."""
_STATX = struct.Struct("=28xH98xII120x")
"""Of struct statx in linux/stat.h: the mode, and the number of a device."""
_HIDDEN = (errno.EACCES, errno.EPERM)
_GONE = (errno.ENOENT, errno.ESRCH)


@dataclass(frozen=True)
class Held:
    """One descriptor of a tap's: its process, its number there, and the tap's name.

    `by_node`: it is of a link's own device, /dev/tapN, whose link is the one with the ifindex N.
    """

    pid: int
    descriptor: int
    tap: str
    by_node: bool = False


@dataclass(frozen=True)
class Holders:
    """The descriptors of taps, and the processes that hold we cannot tell which.

    `hidden` may not be looked into; `unread` have so many descriptors that the time was over.
    """

    held: tuple[Held, ...]
    hidden: tuple[int, ...]
    unread: tuple[int, ...] = ()

    def of(self, tap: str) -> tuple[int, ...]:
        """Return the processes that hold this tap, each once, the lowest first."""
        return tuple(sorted(self._of_taps.get(tap, ())))

    @cached_property
    def _of_taps(self) -> dict[str, set[int]]:
        # NOTE: asked for each of many taps, of which somebody may have many descriptors.
        found: dict[str, set[int]] = {}
        for held in self.held:
            found.setdefault(held.tap, set()).add(held.pid)
        return found

    def of_process(self, pid: int) -> dict[int, str]:
        """Return the taps of one process, by its descriptors."""
        return {held.descriptor: held.tap for held in self.held if held.pid == pid}


def all_holders(others: float = OTHERS) -> Holders:
    """Do as `find_holders`, to its end: for who has nothing else to do meanwhile."""
    return finish(find_holders(others), time.sleep)


async def find_holders(others: float = OTHERS) -> Holders:
    """Look at the descriptors of every process, a little at a time.

    A tap is left out that is certainly in another network namespace than this process: one there
    may have the name of one here.
    Those of other users than root have `others` seconds together, and who has few comes first, so
    that nobody hides another's tap behind descriptors of his own.
    """
    held: list[Held] = []
    hidden: list[int] = []
    unread: list[int] = []
    until: float | None = None
    processes = []
    lookers = 0
    for number, (name, process) in enumerate(_processes()):
        processes.append(process)
        lookers += name == LOOKER and not process[0]
        if number % BATCH == BATCH - 1:
            await pause(0.0)
    for is_others, _, pid in sorted(processes):
        if is_others and until is None:
            until = time.monotonic() + others
        try:
            if not (await _look_into(pid, until, held)):
                unread.append(pid)
        except OSError as error:
            if error.errno in _HIDDEN:
                hidden.append(pid)
            elif error.errno not in _GONE:
                raise
    elsewhere, gone = await _find_elsewhere(held, lookers)
    left = await _sift(held, elsewhere | gone)
    again = await _look_again(gone, until)
    if fresh := (await _sift(again, left)):
        # NOTE: what has gone once more in the meantime counts as held: it may be playing with us.
        elsewhere, _ = await _find_elsewhere(fresh, lookers)
        left |= await _sift(fresh, elsewhere)
    return Holders(tuple(left), tuple(sorted(hidden)), tuple(sorted(unread)))


async def _look_again(gone: Iterable[Held], until: float | None) -> list[Held]:
    """Return what the processes hold by now that have let one of `gone` go meanwhile."""
    gone_of: dict[int, list[Held]] = {}
    for each in gone:
        gone_of.setdefault(each.pid, []).append(each)
    found: list[Held] = []
    for pid in sorted(gone_of):
        try:
            seen = await _look_into(pid, until, found)
        except OSError as error:
            if error.errno not in (*_GONE, *_HIDDEN):
                raise
            seen = error.errno in _GONE
        if not seen:
            # NOTE: it may have given the tap another number, where we do not look.
            found += gone_of[pid]
    return found


async def _sift(held: Iterable[Held], without: Container[Held]) -> dict[Held, None]:
    """Return what of `held` is not among `without`, each once, in its order, a little at a time."""
    found: dict[Held, None] = {}
    for number, each in enumerate(held):
        if each not in without:
            found[each] = None
        if number % BATCH == BATCH - 1:
            await pause(0.0)
    return found


async def find_held_by(pid: int) -> tuple[Held, ...]:
    """Return the taps' descriptors of one process; none where it has ended or is hidden."""
    held: list[Held] = []
    try:
        await _look_into(pid, None, held)
    except OSError as error:
        if error.errno not in (*_GONE, *_HIDDEN):
            raise
    return tuple(held)


def _processes() -> Iterator[tuple[str, tuple[bool, int, int]]]:
    """Yield each process's name; whether it is another's than root's, its descriptors, its pid."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                # NOTE: the number of descriptors since Linux 6.2, 0 before (proc_readfd_count).
                with waiting_for(f"process {name} does not let itself be looked at"):
                    number = os.stat(descriptors_of(int(name))).st_size
            except OSError as error:
                if error.errno not in (*_GONE, *_HIDDEN):
                    raise
                number = 0
            # NOTE: not the folder's owner, which is root where the process says so (prctl(2)).
            found = read_status(int(name), ("Name", "Uid"))
            is_others = found.get("Uid", "").split()[:1] != ["0"]
            yield found.get("Name", ""), (is_others, number, int(name))


async def _look_into(pid: int, until: float | None, held: list[Held]) -> bool:
    """Add what a process holds; tell whether all was seen before the time was over."""
    with os.scandir(descriptors_of(pid)) as entries:
        for number, entry in enumerate(entries):
            if until is not None and time.monotonic() > until:
                return False
            if number % BATCH == BATCH - 1:
                await pause(0.0)
            # NOTE: the name of the link alone asks no file, and all but a few are none of a tap's.
            try:
                path = os.readlink(entry.path)
                by_node = _NODE.fullmatch(path)
                if by_node is None and not path.endswith("/net/tun"):
                    continue
                if by_node is None:
                    tap = _tap_of(pid, entry.name)
                else:
                    tap = _link_of(pid, entry.name, int(by_node[1]))
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                continue
            if tap:
                held.append(Held(pid, int(entry.name), tap, by_node is not None))
    return True


def _link_of(pid: int, number: str, index: int) -> str:
    """Return the name of the link with this ifindex, empty for none.

    Nor is it one where the descriptor, which has the name of its device, is certainly of another
    file: anybody may call one so. Raises OSError, as where the process has let it go.
    """
    try:
        name = socket.if_indextoname(index)
    except (OSError, OverflowError):
        return ""
    # NOTE: of a device that nobody may open, whoever serves a file system may show any number.
    if any(int(flags, 8) & os.O_PATH for flags in read_fdinfo(pid, number, "flags")):
        return ""
    device, wanted = _device_of(f"{descriptors_of(pid)}/{number}"), _numbers_of(name, index)
    return name if device is None or wanted is None or device in wanted else ""


def _device_of(path: str) -> int | None:
    """Return the number of a character device, 0 for another file, None if that cannot be told.

    No server of a file is asked, as stat(2) would: its answer may be long in coming (statx(2)).
    Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "statx"):
        return None
    found = ctypes.create_string_buffer(_STATX.size)
    if libc.statx(AT_FDCWD, os.fsencode(path), AT_STATX_DONT_SYNC, STATX_TYPE, found) != 0:
        code = ctypes.get_errno()
        if code == errno.ENOSYS:
            return None
        raise OSError(code, os.strerror(code))
    mode, major, minor = _STATX.unpack(found.raw)
    return os.makedev(major, minor) if stat.S_ISCHR(mode) else 0


def _numbers_of(name: str, index: int) -> set[int] | None:
    """Return the number of a link's own device, none if it has none, None if that is not told.

    NOTE: /sys may show another network namespace, whose link of this name is another.
    """
    folder = f"/sys/class/net/{name}"
    found = set()
    try:
        with open(f"{folder}/ifindex", encoding="ascii") as file:
            if int(file.read()) != index:
                return None
        for entry in os.listdir(folder):
            try:
                with open(f"{folder}/{entry}/tap{index}/dev", encoding="ascii") as file:
                    major, minor = file.read().split(":")
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise
                continue
            found.add(os.makedev(int(major), int(minor)))
    except (OSError, ValueError):
        return None
    return found


def _tap_of(pid: int | str, number: str) -> str:
    """Return the name after `iff:` (tun_chr_show_fdinfo of drivers/net/tun.c), empty for none."""
    return next(iter(read_fdinfo(pid, number, "iff")), "")


async def _find_elsewhere(held: Iterable[Held], lookers: int) -> tuple[set[Held], set[Held]]:
    """Return those whose tap is certainly in another network namespace than we are, and those gone.

    It takes the right to trace the process (pidfd_getfd(2)), Linux 5.6 and, of a tap that is not
    ours to change, CAP_NET_ADMIN there; without, it is not certain of one that has the name of a
    link here. `lookers` of our processes have not come to their end.
    """
    links = {name for _, name in socket.if_nameindex()}
    found: set[Held] = set()
    asked: list[Held] = []
    for number, each in enumerate(held):
        if each.tap not in links:
            found.add(each)
        elif not each.by_node:
            asked.append(each)
        if number % BATCH == BATCH - 1:
            await pause(0.0)
    _wait_for_children()
    answers = await _ask_apart(asked) if asked and lookers < LOOKERS_MAX else b""
    gone: set[Held] = set()
    for number, (each, answer) in enumerate(zip(asked, answers, strict=False)):
        if answer == ELSEWHERE:
            found.add(each)
        elif answer == LET_GO:
            gone.add(each)
        if number % BATCH == BATCH - 1:
            await pause(0.0)
    return found, gone


async def _ask_apart(asked: Sequence[Held]) -> bytes:
    """Return the answer of `_ask` to each, from a process of its own; fewer where it ends before.

    No more is waited than PATIENCE, and nothing where there is no room for another process.
    """
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        os.set_blocking(ours, False)
        try:
            pid = fork_with((theirs,))
            if pid == 0:
                _be_looker(theirs, asked)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM):
                raise
            return b""
        finally:
            os.close(theirs)
        _children.append(pid)
        answers = b""
        until = time.monotonic() + PATIENCE
        while len(answers) < len(asked) and time.monotonic() < until:
            try:
                data = os.read(ours, len(asked))
            except BlockingIOError:
                await pause(PAUSE)
                continue
            if not data:
                break
            answers += data
        while pid in _wait_for_children() and time.monotonic() < until:
            await pause(PAUSE)
        return answers
    finally:
        os.close(ours)


def _wait_for_children() -> list[int]:
    """Wait for those of our processes that have ended; return the others."""
    _children[:] = [pid for pid in _children if os.waitpid(pid, os.WNOHANG)[0] == 0]
    return _children


def _be_looker(pipe: int, asked: Iterable[Held]) -> NoReturn:
    """Tell of each descriptor where its tap is, as the process that has just been made for it.

    By the time we take it, it may be of another file: whose close may wait for as long as its maker
    likes (a FUSE server), whatever signal comes, and so may the end of who has taken it.
    """
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(PR_SET_NAME, LOOKER.encode())
        for each in asked:
            os.write(pipe, bytes([_ask(each)]))
    finally:
        os._exit(0)


def take_descriptor(held: Held) -> int:
    """Return a descriptor of our own for another process's, of whatever it is by now.

    Raises OSError as pidfd_open(2) and pidfd_getfd(2).
    """
    process = os.pidfd_open(held.pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        taken: int = libc.syscall(PIDFD_GETFD, process, held.descriptor, 0)
        if taken < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return taken
    finally:
        os.close(process)


def _ask(held: Held) -> int:
    """Return ELSEWHERE, LET_GO where the process has let it go since, or 0: here, or not known."""
    try:
        taken = take_descriptor(held)
        if _tap_of("self", str(taken)) != held.tap:
            return LET_GO
        namespace = fcntl.ioctl(taken, TUNGETDEVNETNS)
        found = os.fstat(namespace)
        # NOTE: these two wait for nobody; another file stays open until our end.
        os.close(namespace)
        os.close(taken)
        here = os.path.samestat(found, os.stat("/proc/thread-self/ns/net"))
        return 0 if here else ELSEWHERE
    except OSError as error:
        return LET_GO if error.errno in (errno.ESRCH, errno.EBADF) else 0
