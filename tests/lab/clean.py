"""A clean system, as chroot/chroot-setup makes it, that a test may change as it likes.

Each one is an overlay on that system, in a mount and a process namespace of its own and in the
network namespace of a test; nothing of it is left at its end.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lab.boot import cache
from lab.netns import Namespace

SETUP = Path(__file__).parent / "chroot" / "chroot-setup"
PATIENCE = 120
"""Seconds that a command may take."""
MOUNTS = """
mount --make-rprivate /
mount -t tmpfs -o mode=755 clean "$2"
mkdir "$2/upper" "$2/work" "$2/root"
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work,redirect_dir=off" clean "$2/root"
root=$2/root
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 run "$root/run"
mkdir -p "$root/dev/net" "$root/mnt"
for device in null zero full random urandom tty net/tun; do
    [ -e "$root/dev/$device" ] || : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount --rbind "$3" "$root/mnt"
exec chroot "$root" sh -euc 'echo ready; exec sleep infinity'
"""
NOT_LOOKED_AT = (
    "dev/",
    "proc/",
    "run/",
    "sys/",
    "tmp/",
    "mnt/",
    "var/lib/dpkg/",
    "var/log/dpkg.log/",
)


def setup() -> str | None:
    """Make the system ready; return why it cannot be, None where it is."""
    done = subprocess.run([SETUP, cache()], capture_output=True, text=True)
    return None if done.returncode == 0 else f"no clean system: {done.stderr.strip()}"


class Clean:
    """A clean system in `namespace`, with `files` at its /mnt; a context manager.

    `folder` is the test's own.
    """

    def __init__(self, namespace: Namespace, folder: Path, files: Path) -> None:
        self.namespace = namespace
        self.folder = folder
        self.files = files
        self.pid = 0
        """Its first process, as the host counts."""
        self._unshare: subprocess.Popen[Any] | None = None

    def __enter__(self) -> Clean:
        self.folder.mkdir()
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", MOUNTS]
        paths = [cache() / "chroot" / "root", self.folder, self.files]
        self._unshare = self.namespace.popen([*words, "sh", *map(str, paths)])
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != "ready\n":
            raise RuntimeError(f"clean system: {self._unshare.communicate()[1]}")
        children = f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children"
        self.pid = int(Path(children).read_text())
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._unshare is not None
        os.kill(self.pid, signal.SIGKILL)
        self._unshare.communicate()

    def prefix(self) -> list[str]:
        """Return what runs the words after it in there."""
        return [
            "nsenter",
            f"--target={self.pid}",
            "--mount",
            "--pid",
            "--net",
            "chroot",
            str(self.folder / "root"),
        ]

    def run(
        self, *words: str, status: int = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; raise RuntimeError where it does not end with `status`."""
        found = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        found |= {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **(env or {})}
        done = subprocess.run(
            [*self.prefix(), *words],
            env=found,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        if done.returncode != status:
            raise RuntimeError(
                f"`{' '.join(words)}` ended {done.returncode}, not {status}: "
                f"{done.stdout}{done.stderr}"
            )
        return done

    def path(self, name: str) -> Path:
        """Return the absolute path `name` of that system as this process reaches it."""
        return self._layers() / f"root{name}"

    def _layers(self) -> Path:
        """Return the folder of the overlay, which only the namespace sees."""
        assert self._unshare is not None
        return Path(f"/proc/{self._unshare.pid}/root{self.folder}")

    def write(self, name: str, text: str) -> None:
        """Write a file that anyone may read."""
        self.path(name).write_text(text)
        self.path(name).chmod(0o644)

    def changes(self) -> dict[str, str]:
        """Return what is not as in the clean system: each file or folder with what it is now.

        But what only lives while the system runs, and dpkg's own books.
        """
        layers = self._layers()
        lower, merged = cache() / "chroot" / "root", layers / "root"
        found = {}
        for name in self._touched(layers / "upper", lower, ""):
            now = describe(merged / name)
            if now != describe(lower / name):
                found[name] = now
        return found

    def _touched(self, upper: Path, lower: Path, folder: str) -> Iterator[str]:
        """Yield what the overlay's upper layer has something to say of: folders before their own.

        A folder that was made anew hides all that is below it in the lower layer.
        """
        names = set(os.listdir(upper / folder))
        if is_opaque(upper / folder) and (lower / folder).is_dir():
            names |= set(os.listdir(lower / folder))
        for name in sorted(names):
            path = f"{folder}{name}"
            if f"{path}/".startswith(NOT_LOOKED_AT):
                continue
            yield path
            if (upper / path).is_dir() and not (upper / path).is_symlink():
                yield from self._touched(upper, lower, f"{path}/")


def is_opaque(folder: Path) -> bool:
    """Tell whether a folder of the upper layer hides the one below it."""
    try:
        return os.getxattr(folder, "trusted.overlay.opaque") == b"y"
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return False


def describe(path: Path) -> str:
    """Return what a file is, in words that differ wherever it does: "" where there is none."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    what = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"
    if stat.S_ISLNK(status.st_mode):
        return f"{what} {os.readlink(path)}"
    if stat.S_ISREG(status.st_mode):
        return f"{what} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return what
