"""The files of this checkout, and the tools that look at them."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = re.compile(
    r"^\.(?:git|venv|cache|hypothesis)$|^build$|\.egg-info$|_cache$|^__pycache__$"
)
"""Folders that tools make in a checkout."""


def files(pattern: str) -> list[Path]:
    """Return the files of this checkout that `pattern` names, but what tools left in it."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not NOT_OURS.search(name)]
        found += [path for name in names if (path := Path(folder, name)).match(pattern)]
    return sorted(found)


def find_test(name: str) -> Path:
    """Return the file of tests that is called `name`, which may begin with its room.

    Without one it is none of those that run inside another kernel.
    """
    found = [
        path
        for path in ROOT.glob(f"tests/**/{name}")
        if "/" in name or path.parent.name not in ("uml", "vm")
    ]
    (path,) = found
    return path
