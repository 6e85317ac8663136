"""The tiny guest that guest/guest-setup makes: QEMU's arguments for it, and what it says.

with Console() as console, Qemu(*guest_arguments(console, ip="10.9.0.2/24", ping="10.9.0.1"),
                                "-netdev", "tap,id=n0,...", machine="pc") as qemu:
    console.wait("ping 10.9.0.1 answered")
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

SETUP = Path(__file__).parent / "guest" / "guest-setup"
PATIENCE = 90.0
"""Seconds that the guest may take for one step: quiet machines need 5 to boot it."""


def cache() -> Path:
    """Return the folder of what the lab has downloaded and made."""
    return Path(os.environ.get("PYQEMU_LAB") or Path.home() / ".cache" / "pyqemu-ifup-lab")


def setup() -> str | None:
    """Make the guest ready; return why it cannot be, None where it is."""
    done = subprocess.run([SETUP, cache()], capture_output=True, text=True)
    return None if done.returncode == 0 else f"no guest: {done.stderr.strip()}"


class Console:
    """The guest's serial port, on a socket that QEMU connects to; a context manager."""

    def __init__(self) -> None:
        # NOTE: not in TMPDIR: the path of a Unix socket has at most 107 bytes.
        self.folder = tempfile.mkdtemp(prefix="guest-", dir="/tmp")
        self.path = f"{self.folder}/serial"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.connection: socket.socket | None = None
        self.text = b""

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.connection is not None:
            self.connection.close()
        self.listener.close()
        shutil.rmtree(self.folder)

    def lines(self) -> list[str]:
        """Return the guest's own complete lines up to now, each without its `GUEST: `."""
        whole = self.text.rpartition(b"\n")[0].decode(errors="replace").splitlines()
        return [line.partition("GUEST: ")[2] for line in whole if "GUEST: " in line]

    def wait(self, words: str, timeout: float = PATIENCE) -> str:
        """Return the guest's first line that begins with `words`, waited for.

        Raises TimeoutError or EOFError (QEMU has ended) with all that the console said.
        """
        end = time.monotonic() + timeout
        while True:
            found = [line for line in self.lines() if line.startswith(words)]
            if found:
                return found[0]
            self._read(end)

    def _read(self, end: float) -> None:
        said = self.text.decode(errors="replace")
        left = end - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            if self.connection is None:
                self.listener.settimeout(left)
                self.connection, _address = self.listener.accept()
            self.connection.settimeout(left)
            chunk = self.connection.recv(65536)
        except TimeoutError:
            raise TimeoutError(f"the guest says no more; it said: {said}") from None
        if not chunk:
            raise EOFError(f"the guest has ended; it said: {said}")
        self.text += chunk


def guest_arguments(
    console: Console,
    *,
    ip: str | None = None,
    ping: str | None = None,
    vlan: int | None = None,
    count: int | None = None,
    size: int | None = None,
    name: str | None = None,
    look: str | None = None,
    fetch: str | None = None,
    serve: int | None = None,
    hold: bool = False,
) -> list[str]:
    """Return QEMU's arguments that boot the guest; what each word means is told in guest/init.

    The machine is `pc` or `q35`, the card, a virtio-net-pci, is the caller's to add.
    """
    words = {"ip": ip, "ping": ping, "vlan": vlan, "count": count, "size": size}
    words.update(name=name, look=look, fetch=fetch, serve=serve)
    given = [f"guest.{name}={value}" for name, value in words.items() if value is not None]
    given += ["guest.hold=1"] if hold else []
    # NOTE: on a busy machine the emulated timer can be late, for which the kernel would panic.
    line = [
        "console=ttyS0",
        "quiet",
        "panic=-1",
        "mitigations=off",
        "no_timer_check",
        "net.ifnames=0",
        *given,
    ]
    folder = cache() / "guest"
    return [
        *("-m", "256", "-no-reboot"),
        *("-kernel", str(folder / "vmlinux"), "-initrd", str(folder / "initrd")),
        *("-append", " ".join(line), "-serial", f"unix:{console.path}"),
    ]
