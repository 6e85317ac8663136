"""What a test needs is skipped with its reason, and fails where all must be there."""

from __future__ import annotations

import os

import pytest

from lab import needs

pytestmark = pytest.mark.each_python


def test_missing_part_skips_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(needs.PARTS, "moon", lambda: "no moon tonight")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"^no moon tonight$"):
        needs.require("moon")


def test_missing_part_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(needs.PARTS, "moon", lambda: "no moon tonight")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"^needed where CI=true: no moon tonight$"):
        needs.require("moon")


def test_unknown_part_is_a_fault() -> None:
    with pytest.raises(KeyError, match="qmeu"):
        needs.require("qmeu")


def test_programs_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert needs.missing("qemu") == "no qemu-system-x86_64 in PATH"
    assert needs.missing("ip") == "no ip in PATH"
    assert needs.missing("nft") == "no nft in PATH"
    assert needs.missing("ovs") == "no ovsdb-tool in PATH"


def test_user_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert needs.missing("root") == "not root"
