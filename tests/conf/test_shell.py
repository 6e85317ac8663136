"""What is printed can be pasted: each name is one word of a shell, and no terminal obeys it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lab.paste import HOSTILE, HOSTILE_TEXTS, SHELLS, words_of
from pyqemu_ifconf.shell import (
    all_of,
    edit,
    ifctl,
    into,
    joined,
    nft_command,
    output,
    piped,
    printable,
    quote,
    readable,
    sh,
    shown,
    takeover,
    vsctl,
    write,
)

pytestmark = pytest.mark.each_python

each_shell = pytest.mark.parametrize("shell", SHELLS, ids=" ".join)


def as_bytes(words: list[str]) -> list[str]:
    """Return words as a shell hands them on: bytes, read as the stand-ins' are."""
    return [os.fsdecode(word.encode("utf-8", "surrogateescape")) for word in words]


@each_shell
def test_each_text_is_one_word(shell: tuple[str, ...], tmp_path: Path) -> None:
    line = sh("ip", *HOSTILE_TEXTS, "")
    assert line.isascii() and line.isprintable()
    assert words_of(line, tmp_path, shell) == [["ip", *as_bytes([*HOSTILE_TEXTS, ""])]]


@each_shell
def test_a_text_stands_alone_as_well(shell: tuple[str, ...], tmp_path: Path) -> None:
    lines = "\n".join(f"ip {quote(text)}" for text in HOSTILE_TEXTS)
    assert words_of(lines, tmp_path, shell) == [["ip", *as_bytes([text])] for text in HOSTILE_TEXTS]


@settings(max_examples=10, deadline=None)
@example(texts=["%", "-", "\n", "!", "'", "\\"])
@given(
    texts=st.lists(
        st.text(
            st.characters(exclude_characters="\0", exclude_categories=["Cs"])
            | st.sampled_from("'\"\\!$`\n\r-%;&|~#*\udc80\udcff"),
            max_size=12,
        ),
        max_size=40,
    )
)
def test_any_words_come_through(texts: list[str]) -> None:
    script = f"set -- {sh(*texts)}\nprintf '%s\\0' \"$@\"\n"
    for shell in ("/bin/bash", "/bin/dash"):
        done = subprocess.run([shell, "-c", script], capture_output=True, check=True, timeout=60)
        assert done.stdout.split(b"\0")[:-1] == [
            text.encode("utf-8", "surrogateescape") for text in texts or [""]
        ]


@pytest.mark.parametrize(
    "name", ["web0", "br-int", "vm.1", "unix:/run/openvswitch/db.sock", "-rf", "a@b", "a_b"]
)
def test_a_plain_name_is_printed_as_it_is(name: str) -> None:
    assert quote(name) == readable(name) == name


@pytest.mark.parametrize("shape", [printable, shown, quote, readable])
def test_what_a_terminal_obeys_is_escaped(shape: Callable[[str], str]) -> None:
    assert shape("a\x1b]0;x\x07\r\n\x9b\u202e\x7f\udc80").isprintable()


def test_letters_of_a_language_are_shown_and_quoted_in_ascii() -> None:
    assert shown("gr\xf6\xdfe") == "gr\xf6\xdfe"
    assert readable("gr\xf6\xdfe") == r"'gr\xf6\xdfe'"


@each_shell
def test_commands_that_hold_others_keep_their_words(shell: tuple[str, ...], tmp_path: Path) -> None:
    lines, wanted = list[str](), list[list[str]]()
    for name in HOSTILE:
        show, cut = sh("ip", "-o", "link", "show", "dev", name), sh("cut", "-d:", "-f1", name)
        lines += [all_of(show, cut), sh("ip", joined("a=", output(piped(show, cut))), name)]
        lines += [into(sh("echo", "a", name), f"/{name}/y"), write("1", f"/{name}/x")]
        wanted += 2 * [["ip", "-o", "link", "show", "dev", name], ["cut", "-d:", "-f1", name]]
        wanted += [
            ["ip", "a=", name],
            ["echo", "a", name, ">", f"/{name}/y"],
            ["echo", "1", ">", f"/{name}/x"],
        ]
    assert sorted(words_of("\n".join(lines), tmp_path, shell)) == sorted(wanted)


@each_shell
def test_no_program_takes_a_name_for_something_else(shell: tuple[str, ...], tmp_path: Path) -> None:
    lines, wanted = list[str](), list[list[str]]()
    for name in HOSTILE:
        lines += [edit(name, 7), ifctl("gc", name), vsctl("unix:/x y", ("del-port", name), ("x",))]
        wanted += [
            ["vi", "+7", f"./{name}" if name[0] in "-+" else name],
            ["pyqemu-ifctl", "gc", *(["--"] if name[0] == "-" else []), name],
        ]
        if name != "--":  # NOTE: a separator for ovs-vsctl wherever it stands.
            wanted.append(["ovs-vsctl", "--db=unix:/x y", "del-port", name, "--", "x"])
    assert words_of("\n".join(lines), tmp_path, shell) == wanted


@pytest.mark.parametrize(
    ("table", "link"),
    [
        ("t;flush ruleset", "br0"),
        ("t", 'a"b'),
        ("t", "a*"),
        ("-t", "br0"),
        ("t", "a\\"),
        ("", "br0"),
    ],
)
def test_nft_is_told_of_no_name_that_it_has_no_words_for(
    tmp_path: Path, table: str, link: str
) -> None:
    form = "insert rule {family} {table} {chain} iifname {link} accept"
    good = nft_command(form, family="ip", table="t", chain="c", link='"br;0"')
    assert words_of(good, tmp_path) == [["nft", 'insert rule ip t c iifname "br;0" accept']]
    bad = nft_command(form, family="ip", table=table, chain="c", link=f'"{link}"')
    assert words_of(bad, tmp_path) == []


@pytest.mark.parametrize(
    ("python", "found"),
    [
        ("/usr/lib/pyqemu-ifup/bin/python3", ("pyqemu-ifctl gc", "pyqemu-takeover")),
        ("/usr/local/lib/pyqemu-ifup/bin/python3", ("pyqemu-ifctl gc", "pyqemu-takeover")),
        ("/opt/a b/lib/pyqemu-ifup/bin/python3",
         ("'/opt/a b/bin/pyqemu-ifctl' gc", "'/opt/a b/sbin/pyqemu-takeover'")),
        ("/srv/.venv/bin/python3", ("pyqemu-ifctl gc", "pyqemu-takeover")),
        ("", ("pyqemu-ifctl gc", "pyqemu-takeover")),
    ],
)  # fmt: skip
def test_our_own_programs_are_named_by_their_path_if_no_shell_looks_there(
    monkeypatch: pytest.MonkeyPatch, python: str, found: tuple[str, str]
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    assert (ifctl("gc"), takeover()) == found
