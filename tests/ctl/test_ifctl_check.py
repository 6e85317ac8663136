"""pyqemu-ifctl check, as it is started: whole outputs and exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.hooks import Hooks

pytestmark = pytest.mark.each_python

GOOD = """\
version: 1
networks:
  lan: {bridge: br0}
  san: {bridge: br1}
rules:
  - {tap: "*", network: lan}
"""
BAD = """\
version: 1
networks:
  lan: {bridge: br0, mtu: 99999}
rules:
  - {tap: "*", netwrok: lan}
"""


@pytest.fixture
def hooks(tmp_path: Path) -> Hooks:
    return Hooks(tmp_path / "hooks")


def put(hooks: Hooks, name: str, text: str, mode: int = 0o644) -> str:
    path = hooks.folder / name
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_good_policy(hooks: Hooks) -> None:
    hooks.write_policy(GOOD)
    done = hooks.ctl("check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok: 2 networks, 1 rule\n", "")


def test_a_good_policy_as_json(hooks: Hooks) -> None:
    hooks.write_policy(GOOD)
    done = hooks.ctl("check", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "version": 1,
        "ok": True,
        "files": [str(hooks.policy)],
        "networks": 2,
        "rules": 1,
        "vms": 0,
        "errors": [],
        "warnings": [],
    }


def test_several_files_are_one_policy(hooks: Hooks) -> None:
    first = put(hooks, "a.yaml", "version: 1\nrules: [{tap: db*, network: lan}]\n")
    second = put(hooks, "b.yaml", GOOD)
    done = hooks.ctl("check", first, second)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok: 2 networks, 2 rules\n", "")


WARNED = """\
version: 1
networks:
  lan: {bridge: br0, users: [alice], isolated: true, tap_name: ten%d}
  san: {bridge: br1}
rules:
  - {vm: mgmt*, network: lan, isolated: false}
  - {tap: [db*, ten1], network: lan, mtu: 1400, vlan: 5}
  - {tap: "*", netdev: n, mac: "*", network: lan, vlan: 6}
  - {tap: "*0", network: lan, vlan: 7}
  - {vm: mgmt*, network: lan}
  - {vm: mgmt*, network: lan, isolated: true}
  - {vm: mgmt*, user: alice, network: lan, isolated: false}
  - {vm: mgmt*, network: san, vlan: 5}
  - {tap: [db*, tenx, web], network: lan, vlan: 5}
  - {tap: "[st]db?", network: lan, vlan: 5}
  - {vm: mgmt*, deny: never}
vms:
  web: {nics: [{network: lan, vlan: 7}]}
  db: {users: [alice], nics: [{network: lan, vlan: 8}]}
  plain: {nics: [{network: lan, isolated: true}, {network: san, vlan: 9}]}
"""


def test_rules_that_count_for_no_user_of_their_network(hooks: Hooks) -> None:
    path = put(hooks, "a.yaml", WARNED)
    made = " but on a tap that root has made"
    expected = [
        (6, "isolated by vm", ""),
        (7, "mtu, vlan by tap", made),
        (8, "vlan by netdev and mac", ""),
        (9, "vlan by tap", made),
    ]
    texts = [
        (
            line,
            5,
            f"network lan is open to users: it changes {what}, which counts for no "
            f"unprivileged user{more}; name them by a user key",
        )
        for line, what, more in expected
    ]
    texts.append(
        (
            18,
            16,
            "network lan is open to users: each of them may have this tap of guest "
            "web, and with it another vlan; name those who may by the guest's users",
        )
    )
    done = hooks.ctl("check", path)
    assert (done.returncode, done.stdout) == (0, "ok: 2 networks, 11 rules, 3 guests\n")
    said = "".join(f"{path}:{line}:{at}: warning: {text}\n" for line, at, text in texts)
    assert done.stderr == said
    done = hooks.ctl("check", "--json", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["warnings"] == [
        {"file": path, "line": line, "column": at, "message": text} for line, at, text in texts
    ]


def errors_of_bad(path: object) -> list[tuple[int, int, str, str]]:
    return [
        (
            3,
            27,
            "mtu must be a whole number from 68 to 65521 or bridge, not 99999",
            "  lan: {bridge: br0, mtu: 99999}",
        ),
        (
            5,
            5,
            "the rule has none of network, deny and leave; give one of them",
            '  - {tap: "*", netwrok: lan}',
        ),
        (5, 16, "a rule has no key netwrok; did you mean network?", '  - {tap: "*", netwrok: lan}'),
    ]


def test_each_error_with_its_line_and_a_caret(hooks: Hooks) -> None:
    path = put(hooks, "bad.yaml", BAD)
    done = hooks.ctl("check", path)
    expected = "".join(
        f"{path}:{line}:{column}: {message}\n  {source}\n  {' ' * (column - 1)}^\n"
        for line, column, message, source in errors_of_bad(path)
    )
    assert (done.returncode, done.stdout, done.stderr) == (65, "", expected)


def test_each_error_as_json(hooks: Hooks) -> None:
    path = put(hooks, "bad.yaml", BAD)
    done = hooks.ctl("check", "--json", path)
    assert (done.returncode, done.stderr) == (65, "")
    assert json.loads(done.stdout) == {
        "version": 1,
        "ok": False,
        "files": [path],
        "networks": None,
        "rules": None,
        "vms": None,
        "errors": [
            {"file": path, "line": line, "column": column, "message": message}
            for line, column, message, _ in errors_of_bad(path)
        ],
        "warnings": [],
    }


def test_a_missing_file(hooks: Hooks) -> None:
    path = str(hooks.folder / "none.yaml")
    done = hooks.ctl("check", path)
    expected = f"pyqemu-ifctl: {path}: it does not exist\n"
    assert (done.returncode, done.stdout, done.stderr) == (66, "", expected)
    done = hooks.ctl("check", "--json", path)
    assert (done.returncode, done.stderr) == (66, "")
    assert json.loads(done.stdout) == {
        "version": 1,
        "ok": False,
        "files": [path],
        "networks": None,
        "rules": None,
        "vms": None,
        "errors": [
            {"file": None, "line": None, "column": None, "message": f"{path}: it does not exist"}
        ],
        "warnings": [],
    }


def test_an_unsafe_file(hooks: Hooks) -> None:
    path = put(hooks, "open.yaml", GOOD, 0o666)
    done = hooks.ctl("check", path)
    expected = f"pyqemu-ifctl: {path}: everybody can write it (mode 0666); run chmod go-w {path}\n"
    assert (done.returncode, done.stdout, done.stderr) == (78, "", expected)


def test_the_folder_counts_for_the_host_s_own_policy_only(hooks: Hooks) -> None:
    hooks.write_policy(GOOD)
    hooks.folder.chmod(0o777)
    try:
        own, given = hooks.ctl("check"), hooks.ctl("check", str(hooks.policy))
    finally:
        hooks.folder.chmod(0o755)
    expected = (
        f"pyqemu-ifctl: {hooks.folder}: everybody can write it (mode 0777); "
        f"run chmod go-w {hooks.folder}\n"
    )
    assert (own.returncode, own.stdout, own.stderr) == (78, "", expected)
    assert (given.returncode, given.stdout) == (0, "ok: 2 networks, 1 rule\n")


def test_a_relative_file(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hooks, "here.yaml", GOOD)
    monkeypatch.chdir(hooks.folder)
    assert hooks.ctl("check", "here.yaml").stdout == "ok: 2 networks, 1 rule\n"


def test_a_line_that_the_terminal_cannot_show(hooks: Hooks) -> None:
    path = put(hooks, "bad.yaml", "version: 1\nbüro: 1\n")
    done = hooks.ctl("check", path, LC_ALL="en_US.ISO-8859-1", PYTHONUTF8="0")
    assert done.returncode == 65
    assert done.stderr.startswith(f"{path}:2:1: ")
    assert len(done.stderr.splitlines()) == 3
