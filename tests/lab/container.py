"""Containers of our own: namespaces in which root may little, or an ordinary user is root."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lab.netns import Namespace
from lab.public import as_user

Run = Literal["tmpfs", "read-only"]
LITTLE = ("net_admin",)
"""All that the hooks need."""
USUAL = (
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "net_bind_service",
    "net_raw",
    "sys_chroot",
    "mknod",
    "audit_write",
    "setfcap",
    "net_admin",
)
"""What Docker gives by itself, and --cap-add=NET_ADMIN."""

INIT = """
mount --make-rprivate /
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t sysfs -o ro sys /sys
mount -t tmpfs -o mode=755 dev /dev
mkdir /dev/net
mknod -m 666 /dev/null c 1 3
mknod -m 666 /dev/zero c 1 5
mknod -m 666 /dev/urandom c 1 9
mknod -m 666 /dev/net/tun c 10 200
mount -t tmpfs -o mode=755 run /run
[ "$0" = tmpfs ] || mount -o remount,bind,ro /run
mount -o remount,bind,ro /
echo ready
exec sleep infinity
"""
USER_INIT = """
[ "$0" != tmpfs ] || mount -t tmpfs -o mode=755 run /run
ip link set lo up
echo ready
exec sleep infinity
"""
HOST = """
mount --bind "$0/tun" /dev/net/tun
mount -t tmpfs -o mode=755 run /run
mkdir -m 755 /run/openvswitch
ln -s "$0/db.sock" /run/openvswitch/db.sock
exec "$@"
"""


class _Namespaces:
    """Namespaces that a process of ours holds; a context manager."""

    def __init__(self, words: Sequence[str], namespace: Namespace | None) -> None:
        self.words = list(words)
        self.namespace = namespace
        self.env: dict[str, str] = {}
        self._unshare: subprocess.Popen[Any] | None = None
        self.pid = 0

    def __enter__(self) -> Any:
        popen = subprocess.Popen if self.namespace is None else self.namespace.popen
        self._unshare = popen(self.words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)  # fmt: skip
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != "ready\n":
            raise RuntimeError(f"container: {self._unshare.communicate()[1]}")
        self.pid = self._find_pid(self._unshare.pid)
        return self

    def _find_pid(self, outer: int) -> int:
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text())

    def __exit__(self, *_: object) -> None:
        assert self._unshare is not None
        self._unshare.kill()
        self._unshare.communicate()

    def argv(self, *words: str) -> list[str]:
        """Return the command that runs `words` inside."""
        raise NotImplementedError

    def run(
        self, *words: str, env: Mapping[str, str] | None = None, check: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, to its end."""
        return subprocess.run(
            self.argv(*words),
            env={**os.environ, **self.env, **(env or {})},
            timeout=60,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=check,
        )


class Container(_Namespaces):
    """A container of root's in a network namespace: /proc/sys, the root and /sys are read-only.

    Nobody logs or serves there, and the processes have these `capabilities` alone.
    """

    def __init__(
        self, namespace: Namespace, run: Run = "tmpfs", capabilities: Sequence[str] = LITTLE
    ) -> None:
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", INIT, run]
        super().__init__(words, namespace)
        self.capabilities = ",".join(["-all", *(f"+{each}" for each in capabilities)])

    def argv(self, *words: str) -> list[str]:
        """Return the command that runs `words` inside."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--wd=/"]
        limits = ["setpriv", f"--bounding-set={self.capabilities}", "--inh-caps=-all"]
        return [*enter, *limits, "sh", "-c", 'exec "$0" "$@"', *words]


class Rootless(_Namespaces):
    """A user and a network namespace that an ordinary user has made, who is root there.

    `folder`, which everybody can read, is for a host with a /dev/net/tun that everybody may open,
    and with an Open vSwitch that is root's. With `run` there is a /run of the user's own.
    """

    def __init__(self, uid: int, folder: Path, run: Literal["tmpfs", ""] = "") -> None:
        self.uid = uid
        if not (folder / "tun").exists():
            os.mknod(folder / "tun", stat.S_IFCHR, os.makedev(10, 200))
            (folder / "tun").chmod(0o666)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(folder / "db.sock"))
            (folder / "db.sock").chmod(0o700)
        made = ["unshare", "-Urnm" if run else "-Urn", "sh", "-euc", USER_INIT, run]
        words = ["unshare", "-m", "sh", "-euc", HOST, str(folder), *as_user(uid), *made]
        super().__init__(words, None)

    def _find_pid(self, outer: int) -> int:
        return outer

    def argv(self, *words: str) -> list[str]:
        """Return the command that runs `words` inside."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--wd=/"]
        inside = ["nsenter", f"--target={self.pid}", "--user", "--net", "--preserve-credentials"]
        return [*enter, *as_user(self.uid), *inside, *words]
