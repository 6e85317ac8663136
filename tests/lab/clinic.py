"""A host that doctor looks at: its faults are made for real, and mended by what doctor prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from lab.hooks import Hooks
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.qemu import Qemu, end_daemon
from pyqemu_ifconf.policy import POLICY_VARIABLE
from pyqemu_ifctl.verbs.doctor import doctor
from pyqemu_ifup.deadline import Deadline

PATIENCE = 60.0
LAN = "networks: {lan: {bridge: br0}}\n"
LAN_ADDRESS = "198.51.100.1/24"
"""This host's on br0: without one, and without an uplink, guests would reach each other alone."""
ALL = 'rules: [{tap: "*", network: lan}]\n'
SW = 'rules: [{tap: "*", network: sw}]\n'
Faulty = Generator[None, None, None]
"""What makes a fault: at the first `yield` all is well, at the second it is there.

What comes then is done after it has been mended.
"""


@dataclass
class Clinic:
    """A namespace, the programs with their policy, and maybe an Open vSwitch and a private mount.

    `through` is a command that executes the one after it where the host is, in another mount
    namespace say; empty, doctor runs in this process.
    """

    netns: Namespace
    hooks: Hooks
    folder: Path
    ovs: OpenVSwitch | None = None
    through: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Put an editor there that writes what a person would, and a folder for more programs."""
        self.programs = self.folder / "programs"
        self.programs.mkdir()
        self.edited = self.folder / "edited.yaml"
        self.program("an-editor", f'cat {self.edited} >"$2"')
        self.env |= {
            "EDITOR": "an-editor",
            "PATH": f"{self.programs}:{self.hooks.folder}:{os.environ['PATH']}",
        }

    def program(self, name: str, text: str) -> None:
        """Put a shell script in the way of what a command calls by its name."""
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def policy(self, text: str, edited: str = "") -> None:
        """Put a policy in force, and what an editor will make of it."""
        self.hooks.write_policy(f"version: 1\n{text}")
        self.edited.write_text(f"version: 1\n{edited}")

    def ip(self, *words: str) -> None:
        """Run `ip` inside."""
        self.netns.ip(*words)

    @property
    def switch(self) -> OpenVSwitch:
        """The Open vSwitch."""
        assert self.ovs is not None
        return self.ovs

    def look(self) -> dict[str, Any]:
        """Return what doctor tells as JSON; its exit status must be of it."""
        if self.through:
            words = [str(self.hooks.folder / "pyqemu-ifctl"), "doctor", "--json"]
            done = self.run(words)
            out, status, lines = done.stdout, done.returncode, done.stderr
        else:
            program = [str(self.hooks.folder / "pyqemu-ifctl")]
            with self.netns.enter(), mock.patch.object(sys, "argv", program):
                answer = doctor(
                    {POLICY_VARIABLE: str(self.hooks.policy)},
                    Deadline(PATIENCE),
                    print,
                    as_json=True,
                )
            out, status, lines = answer.out, int(answer.status), "\n".join(answer.remarks)
        told: dict[str, Any] = json.loads(out)
        errors = [each for each in told["findings"] if each["severity"] == "error"]
        assert (status, told["version"], told["ok"]) == (int(bool(errors)), 1, not errors), lines
        return told

    def find(self, check: str) -> list[dict[str, str]]:
        """Return the findings of one check."""
        return [each for each in self.look()["findings"] if each["check"] == check]

    def run(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a program there, with the environment of the programs."""
        env = {**self.hooks.environ(), **self.env, POLICY_VARIABLE: str(self.hooks.policy)}
        with self.netns.enter():
            return subprocess.run(
                [*self.through, *words],
                env=env,
                text=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PATIENCE,
                check=False,
            )

    def mend(self, command: str) -> None:
        """Run what doctor printed, as a person would who copies it; it must succeed."""
        done = self.run(["sh", "-c", command])
        assert done.returncode == 0, (command, done.stdout, done.stderr)

    @contextmanager
    def healthy(self) -> Iterator[None]:
        """Have the bridge br0 there, and with an Open vSwitch br-int, that the policy names."""
        self.netns.add_bridge("br0", mac="02:00:00:00:00:0b")
        self.netns.ip("address", "add", LAN_ADDRESS, "dev", "br0")
        self.policy(LAN + ALL, LAN + ALL)
        if self.ovs is not None:
            self.ovs.add_bridge("br-int", hwaddr="02:00:00:00:00:0c", mtu=1500)
            self.env |= {key: word for key, word in self.ovs.env.items() if key[:4] == "OVS_"}
            self.policy(f"networks: {{sw: {{bridge: br-int, ovsdb: '{self.ovs.db}'}}}}\n{SW}")
        try:
            yield
        finally:
            self.netns.run(["ip", "link", "del", "br0"], check=False)
            if self.ovs is not None:
                self.ovs.vsctl("--if-exists", "del-br", "br-int")

    @contextmanager
    def fault(self, row: Row) -> Iterator[dict[str, str]]:
        """Make the fault of a row on a healthy host; yield the finding, which was not there before.

        What is left is undone where the block ends well.
        """
        with self.healthy():
            fault = row.fault(self)
            try:
                next(fault)
                assert self.find(row.check) == [], "there is no fault yet"
                next(fault)
                found = self.find(row.check)
                assert len(found) == 1, found
                assert row.says in found[0]["what"], found[0]["what"]
                assert found[0]["why"]
                yield found[0]
                assert self.find(row.check) == [], found[0]["command"]
                next(fault, None)
            finally:
                fault.close()

    def qemu(self, name: str, *words: str) -> None:
        """Start a QEMU that goes to the background, and whose guest does not run."""
        file = self.folder / f"{name}.pid"
        words = ("-S", "-name", name, "-daemonize", "-pidfile", str(file), *words)
        env = {**self.hooks.environ(), **self.env}
        with Qemu(
            *words, netns=self.netns.name, machine="q35", qmp=None, env=env, prefix=self.through
        ) as qemu:
            assert qemu.wait() == 0, qemu.stderr

    def end(self, name: str) -> None:
        """End that QEMU as its guest would; one that has ended already is fine."""
        file = self.folder / f"{name}.pid"
        if file.exists():
            end_daemon(int(file.read_text()), signal.SIGTERM)
            # NOTE: a daemon is nobody's child here, and removes the file itself as it ends.
            until(lambda: not file.exists(), f"QEMU {name} ends")


def until(done: Callable[[], bool], what: str) -> None:
    """Wait until `done` says so; raise TimeoutError."""
    end = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {PATIENCE:g} s")
        time.sleep(0.02)


@dataclass(frozen=True)
class Row:
    """One finding: the check's name, what makes the fault, and a part of what is said of it."""

    check: str
    fault: Callable[[Clinic], Faulty]
    says: str

    @property
    def title(self) -> str:
        """The row's name."""
        return f"{self.check}-{self.fault.__name__}"


def treat(row: Row, clinic: Clinic) -> None:
    """Make the row's fault, see it found, mend it by the command, see it gone."""
    with clinic.fault(row) as found:
        clinic.mend(found["command"])
