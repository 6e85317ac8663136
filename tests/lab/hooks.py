"""The programs of this checkout as executables, as QEMU and a person start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.netns import RUN_NETNS, entered
from lab.warm import Warm

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = tuple(str(CHECKOUT / name) for name in ("conf", "ifup", "ifdown", "ifctl", "ifd"))
LIBRARIES = tuple(path for path in sys.path if path.endswith("-packages"))
"""Where the libraries are: a hook's interpreter does not look for them (-S)."""
HOOK = """\
#!{python} -IS
import posix
from _frozen_importlib_external import SourceFileLoader

name = "pyqemu_ifd.thin"
thin = {{"__name__": name}}
exec(SourceFileLoader(name, {ifd!r} + "/pyqemu_ifd/thin.py").get_code(name), thin)
posix._exit(thin["run"]({program!r}, {path!r}))
"""
PROGRAM = """\
#!{python} -I
import sys
sys.path[:0] = {path!r}
from {module} import main
raise SystemExit(main())
"""
PROGRAMS = {
    "pyqemu-ifctl": "pyqemu_ifctl.main",
    "pyqemu-ifd": "pyqemu_ifd.main",
    "pyqemu-bridge-helper": "pyqemu_ifd.bridge_helper",
}
TIMEOUT = 60
"""Seconds after which a program that hangs fails its test; User Mode Linux is slow."""


@dataclass
class Hooks:
    """Launchers in a folder of their own, and a policy file that they read.

    `policy` is where `write_policy` writes; pyqemu-ifctl gets it by PYQEMU_IFUP_POLICY, and so do
    the hooks without an agent. `agent` is the socket of the agent that they ask, "" for none; it
    is to have the same policy, and is told of a change where `agent_pid` is its process. `netns`
    is the network namespace that they run in, None the present one. `python`, `roots` and
    `libraries` are what they run on, wherever that has been copied to.
    """

    folder: Path
    netns: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    agent: str = ""
    agent_pid: int = 0
    python: str = sys.executable
    roots: tuple[str, ...] = SOURCE_ROOTS
    libraries: tuple[str, ...] = LIBRARIES

    def __post_init__(self) -> None:
        """Write the launchers, which do as those of `make install`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = [*self.roots, *self.libraries]
        for name in ("pyqemu-ifup", "pyqemu-ifdown"):
            ifd = next(root for root in self.roots if root.endswith("/ifd"))
            self._write(name, HOOK.format(python=self.python, ifd=ifd, program=name, path=path))
        for name, module in PROGRAMS.items():
            self._write(name, PROGRAM.format(python=self.python, path=path, module=module))

    def _write(self, name: str, text: str) -> None:
        launcher = self.folder / name
        launcher.write_text(text)
        launcher.chmod(0o755)

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
        if self.agent_pid:
            # NOTE: it reads the policy before it looks at any request that comes from now on.
            os.kill(self.agent_pid, signal.SIGHUP)

    def environ(self) -> dict[str, str]:
        """Return the environment in which the hooks, or a QEMU that calls them, run."""
        policy = {} if self.agent else {"PYQEMU_IFUP_POLICY": str(self.policy)}
        return {**os.environ, "PYQEMU_IFUP_SOCKET": self.agent, **policy, **self.env}

    def argv(self, program: str, *arguments: str) -> list[str]:
        """Return the command that runs one of the programs in the namespace."""
        inside = ["ip", "netns", "exec", self.netns] if self.netns is not None else []
        return [*inside, str(self.folder / program), *arguments]

    def run(self, program: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run one of the programs to its end; `env` is added to its environment."""
        return subprocess.run(
            self.argv(program, *arguments),
            env={**self.environ(), **env},
            text=True,
            errors="surrogateescape",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )

    def up(self, tap: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run pyqemu-ifup on `tap`."""
        return self.run("pyqemu-ifup", tap, **env)

    def down(self, tap: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run pyqemu-ifdown on `tap`."""
        return self.run("pyqemu-ifdown", tap, **env)

    def ctl(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run pyqemu-ifctl; what it prints with --json is as its schema says."""
        policy = {"PYQEMU_IFUP_POLICY": str(self.policy)}
        done = self.run("pyqemu-ifctl", *arguments, **{**policy, **self.env, **env})
        if "--json" in arguments and done.stdout:
            from lab.answers import read_answer

            read_answer(arguments[0], done.stdout)
        return done

    def ctl_warm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run pyqemu-ifctl as `ctl` does, without the start of an interpreter (lab.warm).

        `stdout` has all that it printed. /sys is not that of the namespace.
        """
        code = f"import os, sys; os.dup2(2, 1); sys.path[:0] = {list(self.roots)!r}\n"
        code += f"from {PROGRAMS['pyqemu-ifctl']} import main; raise SystemExit(main())"
        with ExitStack() as stack:
            if self.netns is not None:
                stack.enter_context(entered(RUN_NETNS / self.netns))
            env = {**self.environ(), "PYQEMU_IFUP_POLICY": str(self.policy)}
            process = Warm(code, arguments, env)
        said = process.communicate(TIMEOUT)[1]
        assert process.returncode is not None
        return subprocess.CompletedProcess(arguments, process.returncode, said, "")

    def ctl_json(self, *arguments: str) -> Any:
        """Run pyqemu-ifctl with --json and return what it prints."""
        return json.loads(self.ctl(*arguments, "--json").stdout)
