"""What users without privilege can run, wherever the checkout and its interpreter are."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lab.hooks import SOURCE_ROOTS, Hooks
from lab.needs import lack

NOBODY = 65534
PACKAGES = ("yaml", "pyroute2", "ovs", "sortedcontainers", "qemu")


def as_user(uid: int) -> list[str]:
    """Return the command that executes the one after it as a user without any privilege."""
    # NOTE: by a shell: setpriv(1) keeps its capabilities until the first program is executed, so
    # that it finds one where the user could not.
    number = str(uid)
    return [
        "setpriv",
        "--reuid",
        number,
        "--regid",
        number,
        "--clear-groups",
        "sh",
        "-c",
        'exec "$0" "$@"',
    ]


@functools.cache
def python() -> str:
    """Return an interpreter that every user can run; the test is skipped without one."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        words = [*as_user(NOBODY), path, "-I", "-c", ""]
        if subprocess.run(words, capture_output=True).returncode == 0:
            return path
    lack("no Python that an unprivileged user can run")
    return None


@contextmanager
def public_folder() -> Iterator[Path]:
    """Yield a folder that every user can read, unlike tmp_path."""
    with tempfile.TemporaryDirectory(prefix="pyqemu-ifup-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def publish(hooks: Hooks, folder: Path) -> Hooks:
    """Return hooks in `folder`, a public one, that every user can run: a copy of all they need.

    The policy that is in force is copied too.
    """
    roots = []
    for root in SOURCE_ROOTS:
        roots.append(str(folder / Path(root).name))
        shutil.copytree(root, roots[-1])
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        shutil.copytree(spec.submodule_search_locations[0], folder / "libraries" / package)
    public = replace(
        hooks,
        folder=folder / "hooks",
        python=python(),
        roots=tuple(roots),
        libraries=(str(folder / "libraries"),),
    )
    if hooks.policy.exists():
        public.write_policy(hooks.policy.read_text())
    return public


def mute_directory(which: str) -> str:
    """Return Python after which the directory of users tells nothing of each `uid` that is so."""
    return f"""
import pwd, time
real = pwd.getpwuid
def getpwuid(uid):
    if {which}:
        time.sleep(300)
    return real(uid)
pwd.getpwuid = getpwuid
"""
