"""The version of what is installed."""

from __future__ import annotations


def find_version() -> str | None:
    """Return the version of this installation; None of a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pyqemu-ifup")
    except PackageNotFoundError:
        return None


def say_version(program: str) -> str:
    """Return the line that `--version` prints."""
    return f"{program} {find_version() or 'of a checkout'}\n"
