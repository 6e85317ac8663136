"""The programs of this checkout as executables, as QEMU and a person start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = tuple(str(CHECKOUT / name) for name in ("conf", "ifup", "ifdown", "ifctl"))
MODULES = {
    "pyqemu-ifup": "pyqemu_ifup.main",
    "pyqemu-ifdown": "pyqemu_ifdown.main",
    "pyqemu-ifctl": "pyqemu_ifctl.main",
}
TIMEOUT = 60
"""Seconds after which a program that hangs fails its test; User Mode Linux is slow."""


@dataclass
class Hooks:
    """Launchers in a folder of their own, and a policy file that they read.

    `policy` is where `write_policy` writes; each program gets it by PYQEMU_IFUP_POLICY. `netns`
    is the network namespace that they run in, None the present one.
    """

    folder: Path
    netns: str | None = None
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Write the launchers: an interpreter with -I, the checkout's source roots, main()."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, module in MODULES.items():
            path = self.folder / name
            path.write_text(
                f"#!{sys.executable} -I\n"
                f"import sys\n"
                f"sys.path[:0] = {SOURCE_ROOTS!r}\n"
                f"from {module} import main\n"
                f"raise SystemExit(main())\n"
            )
            path.chmod(0o755)

    @property
    def policy(self) -> Path:
        """The policy file."""
        return self.folder / "policy.yaml"

    @property
    def ifup(self) -> str:
        """The path for QEMU's script=."""
        return str(self.folder / "pyqemu-ifup")

    @property
    def ifdown(self) -> str:
        """The path for QEMU's downscript=."""
        return str(self.folder / "pyqemu-ifdown")

    def on_network(self, network: str) -> str:
        """Return the path of a symlink that attaches to `network` whatever the rules say."""
        path = self.folder / f"pyqemu-ifup@{network}"
        if not path.is_symlink():
            path.symlink_to("pyqemu-ifup")
        return str(path)

    def write_policy(self, text: str) -> None:
        """Put a policy in force, its mode trusted whatever the umask."""
        self.policy.write_text(text)
        self.policy.chmod(0o644)

    def environ(self) -> dict[str, str]:
        """Return the environment in which the programs, or a QEMU that calls them, run."""
        return {**os.environ, "PYQEMU_IFUP_POLICY": str(self.policy), **self.env}

    def argv(self, program: str, *arguments: str) -> list[str]:
        """Return the command that runs one of the programs in the namespace."""
        inside = ["ip", "netns", "exec", self.netns] if self.netns is not None else []
        return [*inside, str(self.folder / program), *arguments]

    def run(
        self, program: str, *arguments: str, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the programs to its end; `env` is added to its environment."""
        return subprocess.run(
            self.argv(program, *arguments), env={**self.environ(), **env}, text=True,
            errors="surrogateescape", stdin=subprocess.DEVNULL, capture_output=True,
            timeout=TIMEOUT, check=False,
        )

    def up(self, tap: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run pyqemu-ifup on `tap`."""
        return self.run("pyqemu-ifup", tap, **env)

    def down(self, tap: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run pyqemu-ifdown on `tap`."""
        return self.run("pyqemu-ifdown", tap, **env)

    def ctl(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run pyqemu-ifctl."""
        return self.run("pyqemu-ifctl", *arguments, **env)

    def ctl_json(self, *arguments: str) -> Any:
        """Run pyqemu-ifctl with --json and return what it prints."""
        return json.loads(self.ctl(*arguments, "--json").stdout)
