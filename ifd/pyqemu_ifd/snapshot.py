"""What the policy's files are like at a moment, by lstat(2) of each: whether they have changed.

What counts is each file of the policy, the folder of its drop-ins, and each folder and symbolic
link on the way to them, as pyqemu_ifconf.trust goes it.
"""

from __future__ import annotations

import os
import queue
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from pyqemu_ifconf.load import DROP_INS, MAIN_FILE, is_drop_in
from pyqemu_ifconf.trust import LINKS_MAX, steps

LOCAL = frozenset(
    """
    bcachefs btrfs erofs ext2 ext3 ext4 f2fs overlay ramfs rootfs squashfs tmpfs vfat xfs zfs
    """.split()
)
"""File systems that have no server: none of them keeps an lstat(2) for long."""
PATIENCE = 0.25
"""Seconds that are waited for lstat(2): of a file server that is dead it may never return."""

_ESCAPED = re.compile(r"\\([0-7]{3})")

Mark = tuple[int, ...] | int
"""What is compared of one path: fields of stat(2), or the errno where it cannot be looked at."""


@dataclass(frozen=True)
class Snapshot:
    """What each path that counts is like. Two that are equal are of one state of the policy."""

    marks: dict[str, Mark]
    whole: frozenset[str]
    """The paths that count with their content and times: files, links, the drop-ins' folder."""
    changed: int
    """When any of them was changed last, in nanoseconds since 1970, by its file system's clock."""
    size: int
    """Bytes of the policy's files."""
    is_local: bool
    """Whether all of them are on file systems that answer at once, as no server's do."""

    def is_current(self) -> bool:
        """Tell whether everything is as it was then."""
        return all(
            _mark(_look(path), path in self.whole) == mark for path, mark in self.marks.items()
        )


def take_snapshot(file: str | None, etc: str) -> Snapshot:
    """Return what the policy in `file`, or else in the folder `etc`, is like now."""
    marks: dict[str, Mark] = {}
    whole: set[str] = set()
    changed = size = 0
    for path in _paths(file, etc):
        for step, found, is_whole in _way(path):
            if is_whole or step not in whole:
                marks[step] = _mark(found, is_whole)
            if is_whole:
                whole.add(step)
            if not isinstance(found, int):
                changed = max(changed, found.st_mtime_ns, found.st_ctime_ns)
                size += found.st_size if is_whole and stat.S_ISREG(found.st_mode) else 0
    return Snapshot(marks, frozenset(whole), changed, size, _are_local(marks))


def _paths(file: str | None, etc: str) -> Iterator[str]:
    """Yield the path of each file that the policy is made of, and of the drop-ins' folder."""
    if file is not None:
        yield file
        return
    folder = os.path.join(etc, DROP_INS)
    # NOTE: before its names are listed: one that comes in between changes the folder's times.
    yield folder
    names: list[str] = []
    with suppress(OSError):
        names = [name for name in os.listdir(folder) if is_drop_in(name)]
    yield from (os.path.join(folder, name) for name in names)
    yield os.path.join(etc, MAIN_FILE)


def _way(path: str) -> Iterator[tuple[str, os.stat_result | int, bool]]:
    """Yield each folder and link on the way to `path`, what it is like, and whether it is whole.

    The last one is what the path leads to, or the first one that is not there.
    """
    here, links = "/", 0
    names = steps(os.path.abspath(path))
    while names and links <= LINKS_MAX:
        name = names.pop(0)
        at = os.path.normpath(os.path.join(here, name))
        found = _look(at)
        is_link = not isinstance(found, int) and stat.S_ISLNK(found.st_mode)
        yield at, found, is_link or not names
        if isinstance(found, int):
            return
        if not is_link:
            here = at
            continue
        links += 1
        try:
            names[:0] = steps(os.readlink(at))
        except OSError:
            # It is no link any more, which the next look tells.
            return


def _look(path: str) -> os.stat_result | int:
    """Return what lstat(2) tells of `path`, or the errno that it ends with."""
    try:
        return os.lstat(path)
    except OSError as error:
        return error.errno or 0


def _mark(found: os.stat_result | int, is_whole: bool) -> Mark:
    """Return what counts of a path.

    Of a folder on the way that is not its times, which each of its other names changes.
    """
    if isinstance(found, int):
        return found
    mark = found.st_dev, found.st_ino, found.st_mode, found.st_uid, found.st_gid
    return (*mark, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if is_whole else mark


def _are_local(paths: Iterable[str]) -> bool:
    """Tell whether all `paths`, which lead over no links, are on file systems of LOCAL."""
    kinds = {"/": ""}
    mounts = "/proc/self/mountinfo"
    with open(mounts, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            # NOTE: any number of optional fields come before the dash (proc_pid_mountinfo(5)).
            head, _, tail = line.partition(" - ")
            place = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), head.split(" ")[4])
            kinds[place] = tail.partition(" ")[0]

    def kind(path: str) -> str:
        while path not in kinds:
            path = os.path.dirname(path)
        return kinds[path]

    return all(kind(path) in LOCAL for path in paths)


class Observer:
    """Takes snapshots of one policy in a thread of its own, which alone a dead file server keeps.

    `file` and `etc` are as for `take_snapshot`.
    """

    def __init__(self, file: str | None, etc: str) -> None:
        self._file = file
        self._etc = etc
        self._asked: queue.SimpleQueue[Callable[[], Snapshot] | None] = queue.SimpleQueue()
        """What the thread is to do; None ends it."""
        self._answers: queue.SimpleQueue[Snapshot | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_busy = False
        """Whether an answer is still to come."""

    def close(self) -> None:
        """End the thread, as soon as it has nothing to wait for."""
        self._asked.put(None)

    def look(self, known: Snapshot | None) -> Snapshot | None:
        """Return what the policy is like now: `known` itself where it is as it was then.

        None where that cannot be told within PATIENCE, for lstat(2) does not return. Until the one
        before has been answered no look waits at all.
        """
        if known is not None and known.is_local and known.is_current():
            # NOTE: a thread would take several times as long.
            return known
        if not self._start():
            return self._look(known)
        if self._is_busy:
            try:
                self._answers.get_nowait()
            except queue.Empty:
                return None
            # NOTE: that was of a time before; what is so now is asked for anew.
        self._asked.put(partial(self._look, known))
        self._is_busy = True
        try:
            answer = self._answers.get(timeout=PATIENCE)
        except queue.Empty:
            return None
        self._is_busy = False
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _look(self, known: Snapshot | None) -> Snapshot:
        if known is not None and known.is_current():
            return known
        return take_snapshot(self._file, self._etc)

    def _start(self) -> bool:
        """Start the thread where there is none yet; tell whether there is one."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        while (work := self._asked.get()) is not None:
            try:
                self._answers.put(work())
            except BaseException as error:
                self._answers.put(error)
