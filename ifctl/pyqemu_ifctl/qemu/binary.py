"""Asks a QEMU binary what it can do, by starting it without a guest."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import readable, shown
from pyqemu_ifup.drivers.programs import Run, run_as_is

DEFAULT_QEMU = "qemu-system-x86_64"
SECONDS = 20.0
"""That a QEMU may take to say what it can do."""
QUIT = '{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'
_NOT_MADE = " was not created"
_SPEAKER = re.compile(r"^\S*qemu\S*: ")
_MODEL = re.compile(r'(name|bus|alias|desc) ("(?:[^"]*)"|[^,\s]+)')


@dataclass(frozen=True)
class Model:
    """A NIC model of a QEMU's: what -device takes, its bus, and the rest for people."""

    name: str
    bus: str | None
    alias: str | None
    description: str | None


def find_qemu(program: str) -> str:
    """Return the path of a QEMU. Raises Failure (69) where there is none of this name."""
    path = shutil.which(program)
    if path is None:
        raise Failure(
            Status.UNAVAILABLE,
            f"there is no QEMU called {readable(program)}",
            os.strerror(2),
            "name a QEMU that is there, such as qemu-system-x86_64",
        )
    return path


def check_arguments(path: str, machine: str | None, arguments: Sequence[str]) -> None:
    """Have QEMU read arguments that open nothing of the host's, and quit before a guest runs.

    Raises Failure: 71 in QEMU's own words where it takes them not, 75 where it does not end.
    """
    words = [path, *(["-machine", machine] if machine else [])]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio"]
    done = _run([*words, *arguments], QUIT)
    said = done.err.strip().splitlines()
    # NOTE: since version 9, QEMU starts without a -net nic whose model it does not have.
    wrong = [line for line in said if (": warning: " not in line) or _NOT_MADE in line]
    if done.status == 0 and not any(_NOT_MADE in line for line in wrong):
        return
    because = "; ".join(_SPEAKER.sub("", line) for line in wrong)
    raise Failure(
        Status.REFUSED,
        f"{readable(path)} does not take these NICs",
        shown(because) or f"it ended with {done.status}",
        "correct vms: in the policy, name its machine by --machine, or, where they need what other "
        "options make, write --no-check",
    )


def models_of(path: str) -> list[Model]:
    """Return the NIC models of the QEMU, by name.

    Raises Failure: 71 where it tells of none, 75 where it does not end.
    """
    done = _run([path, "-device", "help"], "")
    _, heading, rest = done.out.partition("Network devices:\n")
    lines = rest.partition("\n\n")[0].splitlines()
    if done.status != 0 or not heading:
        raise Failure(
            Status.REFUSED,
            f"{readable(path)} tells of no network devices",
            f"-device help ended with {done.status}",
            "name another QEMU",
        )
    found = []
    for line in lines:
        given = {key: value.strip('"') for key, value in _MODEL.findall(line)}
        if "name" in given:
            found.append(
                Model(given["name"], given.get("bus"), given.get("alias"), given.get("desc"))
            )
    return sorted(found, key=lambda model: model.name)


def _run(words: list[str], given: str) -> Run:
    try:
        return run_as_is(words, SECONDS, given)
    except TimeoutError as error:
        raise Failure(
            Status.TRY_AGAIN,
            f"{readable(words[0])} does not end",
            f"waited {SECONDS:g} s",
            "try it by hand: " + shown(" ".join(words)),
        ) from error
    except OSError as error:
        raise Failure(
            Status.UNAVAILABLE,
            f"cannot run {readable(words[0])}",
            error.strerror or str(error),
            "name a QEMU that is there, such as qemu-system-x86_64",
        ) from error
