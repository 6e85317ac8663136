"""Network namespaces for tests: made, entered and removed, on the host or inside the UML."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from lab.taps import Raw, Tap

CLONE_NEWNET = 0x40000000
RUN_NETNS = Path("/run/netns")
RUN = Path("/run/pyqemu-ifup")
_numbers = itertools.count(1)


def prefix() -> str:
    """Return what the names of all namespaces begin with that this process makes for one test."""
    return f"ifup-{os.getpid()}-"


def setns(fd: int) -> None:
    """Move the calling thread into the network namespace behind `fd`; raise OSError."""
    # NOTE: os.setns() came with Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "setns")


@contextmanager
def entered(path: Path | str) -> Iterator[None]:
    """Put the calling thread into the namespace at `path` while the block runs, then back.

    Sockets, taps, processes and threads made meanwhile belong to that namespace. /proc/sys/net
    follows; /sys does not, it keeps showing the namespace that it was mounted in.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(target)
        finally:
            os.close(target)
        try:
            yield
        finally:
            setns(before)
    finally:
        os.close(before)


class Namespace:
    """A network namespace with `lo` up; a context manager that takes it away again.

    What `keep` was given, taps made by `tap` among it, is closed by `close_kept` or at the end.
    Processes that still run in the namespace at its end are killed. One that is `lasting` serves
    several tests.
    """

    def __init__(self, *, lasting: bool = False) -> None:
        self.name = f"{'lasting-' if lasting else ''}{prefix()}{next(_numbers)}"
        self.path = RUN_NETNS / self.name
        self.inode = 0
        self.kept = ExitStack()

    def __enter__(self) -> Namespace:
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        try:
            self.inode = self.path.stat().st_ino
            self._remove_folders()
            self.ip("link", "set", "lo", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close_kept()
        finally:
            self._remove()

    def _remove(self) -> None:
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True
        )
        for pid in map(int, listed.stdout.split()):
            if pid != os.getpid():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self._remove_folders()
        subprocess.run(["ip", "netns", "del", self.name], check=True)

    def _remove_folders(self) -> None:
        """Remove the folders of networks of this namespace, or of one that had its number before.

        Nothing of a program is in them; a test that failed leaves them.
        """
        for folder in RUN.glob(f"*@{self.inode}"):
            shutil.rmtree(folder)

    @contextmanager
    def enter(self) -> Iterator[Namespace]:
        """Put the calling thread into this namespace while the block runs, then back."""
        with entered(self.path):
            yield self

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.PIPE,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        text: bool = True,
    ) -> subprocess.Popen[Any]:
        """Start `argv` inside and return its Popen; the caller waits for it."""
        with self.enter():
            return subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=env,
                pass_fds=pass_fds,
                text=text,
            )

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        check: bool = True,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` inside to its end and return it with its output as text.

        Raises RuntimeError with the command's stderr when it fails and `check` is set.
        """
        with self.enter():
            done = subprocess.run(
                argv,
                input=input,
                stdin=subprocess.DEVNULL if input is None else None,
                capture_output=True,
                text=True,
                env=env,
                timeout=timeout,
            )
        if check and done.returncode != 0:
            words = " ".join(map(str, argv))
            raise RuntimeError(f"`{words}` ended {done.returncode}: {done.stderr.strip()}")
        return done

    def ip(self, *argv: str) -> Any:
        """Run `ip -d -j ARGV` inside; return its JSON output parsed, [] where it printed none."""
        return json.loads(self.run(["ip", "-d", "-j", *argv]).stdout or "[]")

    def link(self, name: str) -> dict[str, Any]:
        """Return the link `name` as `ip -d -j link show` tells it; raise RuntimeError."""
        link: dict[str, Any] = self.ip("link", "show", "dev", name)[0]
        return link

    def links(self) -> dict[str, dict[str, Any]]:
        """Return all links inside, by name."""
        # NOTE: iproute2 prints an empty object for a link that it does not show.
        return {link["ifname"]: link for link in self.ip("link", "show") if link}

    def add_bridge(
        self, name: str, *, mac: str | None = None, vlan_filtering: bool = False
    ) -> None:
        """Make a Linux bridge and bring it up; `mac` pins its address."""
        pinned = [] if mac is None else ["address", mac]
        filtering = ["vlan_filtering", "1"] if vlan_filtering else []
        self.ip("link", "add", name, "up", *pinned, "type", "bridge", *filtering)

    def tap(
        self,
        name: str,
        *,
        persist: bool = False,
        vnet_hdr: bool = False,
        multi_queue: bool = False,
        up: bool = False,
        master: str | None = None,
    ) -> Tap:
        """Open a tap inside, held until `close_kept`; `up` and `master` as `ip link set` does."""
        with self.enter():
            known = name in {each for _, each in socket.if_nameindex()}
            tap = Tap(name, persist=persist, vnet_hdr=vnet_hdr, multi_queue=multi_queue)
            if not known:
                tap.avoid_fe()
        self.kept.callback(tap.close)
        if master is not None:
            self.ip("link", "set", "dev", tap.name, "master", master)
        if up:
            self.ip("link", "set", "dev", tap.name, "up")
        return tap

    def raw(self, name: str) -> Raw:
        """Open a packet socket on the link `name`, held until `close_kept`."""
        with self.enter():
            raw = Raw(name)
        self.kept.callback(raw.close)
        return raw

    def close_kept(self) -> None:
        """Close what `tap` and `raw` opened, the last first."""
        self.kept.close()
