"""A systemd of our own, as the first process of namespaces of its own, that starts our real units.

It shares nothing with the host's but the kernel: its unit folder, /run, /etc and cgroup are its
own, /proc/sys but net is read-only, and no generator is run.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.hooks import CHECKOUT, Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import python

SYSTEMD = Path("/lib/systemd/systemd")
UNITS = CHECKOUT / "conf" / "systemd"
READY = 30.0
"""Seconds that it may take to start."""
LAB = "/run/lab"
"""Where it sees our files: ProtectHome= and PrivateTmp= would hide them where they are."""

MOUNTS = """
mount --make-rprivate /
mount -t tmpfs -o mode=755 run /run
cd /run
mkdir -m 755 lab lab/checkout lab/venv lab/bin lab/units lab/upper lab/work lab/cgroup openvswitch
mount --rbind "$1" lab/checkout
mount --rbind "$2" lab/venv
mount --bind "$3/bin" lab/bin
mount --bind "$3/units" lab/units
[ -z "$4" ] || mount --bind "$4" openvswitch
cp -R "$3/etc/." lab/upper
mount -t overlay -o lowerdir=/etc,upperdir=lab/upper,workdir=lab/work etc /etc
mount --bind /dev/null /dev/console
mount -t cgroup2 cgroup2 lab/cgroup
mkdir "lab/cgroup/$5"
echo $$ >"lab/cgroup/$5/cgroup.procs"
exec unshare --cgroup --pid --fork --kill-child --ipc --uts sh -euc "$6" sh "$3/notify"
"""
INIT = f"""
umount {LAB}/cgroup
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount --bind /proc/sys/net /proc/sys/net
mount -o remount,bind,ro /proc/sys
cd /
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=lab NOTIFY_SOCKET="$1" \
    SYSTEMD_UNIT_PATH={LAB}/units SYSTEMD_GENERATOR_PATH= SYSTEMD_ENVIRONMENT_GENERATOR_PATH= \
    {SYSTEMD} --system --unit=lab.target --log-target=null --show-status=no
"""
REMOVE = """
mount -t cgroup2 cgroup2 /sys/fs/cgroup
find "/sys/fs/cgroup/$1" -depth -type d -exec rmdir {} +
"""
TARGETS = ("lab", "sysinit", "basic", "sockets", "shutdown", "multi-user")
AGENT = """\
#!{python} -I
import sys
sys.path[:0] = {path!r}
from pyqemu_ifd.main import main
raise SystemExit(main())
"""


class Systemd:
    """A systemd in the namespace, with the units of the agent; a context manager.

    `folder` is the test's own; `policy` is the host's there, `ovs` its Open vSwitch. `settings`
    is a drop-in for both services.
    """

    def __init__(
        self,
        namespace: Namespace,
        folder: Path,
        policy: str,
        *,
        ovs: OpenVSwitch | None = None,
        settings: str = "",
    ) -> None:
        self.namespace = namespace
        self.folder = folder
        self.ovs = ovs
        self.name = f"pyqemu-ifup-{namespace.inode}"
        self.pid = 0
        """The first process, as the host counts."""
        self._unshare: subprocess.Popen[Any] | None = None
        # NOTE: other users than root are to read them, whatever the umask.
        drop_ins = ("units/pyqemu-ifd.service.d", "units/pyqemu-ifd-users.service.d")
        for name in ("bin", "units", *drop_ins, "etc", "etc/pyqemu-ifup"):
            (folder / name).mkdir(parents=True)
            (folder / name).chmod(0o755)
        self._write("etc/pyqemu-ifup/policy.yaml", policy)
        for name in TARGETS:
            self._write(f"units/{name}.target", "[Unit]\nDefaultDependencies=no\n")
        for unit in UNITS.iterdir():
            self._write(f"units/{unit.name}", unit.read_text().replace("@bin@", f"{LAB}/bin"))
        for drop_in in drop_ins:
            self._write(
                f"{drop_in}/lab.conf",
                f"[Service]\nStandardError=append:{LAB}/units/stderr\n{settings}\n",
            )
        in_venv = sys.prefix != sys.base_prefix
        self.python = python()
        libraries = [path for path in sys.path if path.endswith("-packages")]
        if in_venv:
            libraries = [path.replace(sys.prefix, f"{LAB}/venv", 1) for path in libraries]
        roots = [f"{LAB}/checkout/{name}" for name in ("conf", "ifup", "ifdown", "ifctl", "ifd")]
        self.path = [*roots, *libraries]
        Hooks(folder / "bin", python=self.python, roots=tuple(roots), libraries=tuple(libraries))
        agent = AGENT.format(python=self.python, path=self.path)
        self._write("bin/pyqemu-ifd", agent, 0o755)

    def _write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)

    def __enter__(self) -> Systemd:
        notify = self.folder / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(notify))
            ready.settimeout(READY)
            dir = str(self.ovs.dir) if self.ovs is not None else ""
            self._unshare = self.namespace.popen(
                [
                    "unshare",
                    "--mount",
                    "sh",
                    "-euc",
                    MOUNTS,
                    "sh",
                    str(CHECKOUT),
                    sys.prefix,
                    str(self.folder),
                    dir,
                    self.name,
                    INIT,
                ],
                stdout=subprocess.DEVNULL,
            )
            try:
                while not ready.recv(4096).startswith(b"READY=1"):
                    continue
            except TimeoutError:
                self._unshare.kill()
                raise RuntimeError(f"systemd: {self._unshare.communicate()[1]}") from None
            finally:
                notify.unlink()
        children = f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children"
        self.pid = int(Path(children).read_text())
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._unshare is not None
        if said := self.stderr():
            print(said)
        os.kill(self.pid, signal.SIGKILL)
        self._unshare.communicate()
        subprocess.run(["unshare", "--mount", "sh", "-euc", REMOVE, "sh", self.name], check=True)

    def stderr(self) -> str:
        """Return what the agent has written to standard error."""
        path = self.folder / "units" / "stderr"
        return path.read_text() if path.exists() else ""

    def argv(self, *words: str) -> list[str]:
        """Return the command that runs `words` beside its services."""
        return [
            "nsenter",
            f"--target={self.pid}",
            "--mount",
            "--pid",
            "--net",
            "--ipc",
            "--uts",
            "--cgroup",
            *words,
        ]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside its services, to its end."""
        return subprocess.run(
            self.argv(*words),
            env={"PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def hook(
        self, program: str, *words: str, qemu: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run one of our programs to its end, as a child of what has the arguments of a QEMU."""
        script = f"{LAB}/bin/{program} {' '.join(words)}; exit $?"
        return self.run("sh", "-c", script, *qemu)

    def ctl(self, *words: str) -> str:
        """Run systemctl and return what it prints; raise RuntimeError."""
        done = self.run("systemctl", *words)
        if done.returncode != 0:
            raise RuntimeError(f"systemctl {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def property(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.ctl("show", "--value", f"--property={name}", unit).strip()
