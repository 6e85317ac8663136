"""What a line becomes that is pasted into a shell: its words, and no program of the host is run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

SHELLS = (("bash", "--norc"), ("bash", "--norc", "--posix"), ("dash",))

HOSTILE = (
    ";touch${IFS}x;",
    "$(id)",
    "`id`",
    "a'b",
    'a"b',
    "-x",
    "--help",
    "--",
    "-",
    "!id",
    "a'!!b",
    "~root",
    "*",
    "{a,b}",
    "#x",
    "&id",
    "|id",
    "<a",
    ">a",
    "a\\",
    "\\",
    "=id",
    "(id)",
    "[a]",
    "a=b",
    "up",
    "+x",
    "@a",
    "%d",
    "%s",
)
"""Names that a tap and a bridge can have, and that a shell or a program could take otherwise."""
HOSTILE_TEXTS = (
    *HOSTILE,
    "a b",
    "a\nb",
    "a\n\n",
    "\n",
    "\x1b]0;x\x07",
    "a\rb",
    "gr\xf6\xdfe",
    "\udc80\udcff",
    "a\tb",
    "\x7f",
    "-\xe9%s\\n",
    "\u202ea",
    "'\n'!\"",
    "/x;id/$(id)/a b",
)
"""Texts that a guest's name and a path can be, beside them."""

PROGRAMS = (
    "adduser",
    "apt-get",
    "awk",
    "bridge",
    "chmod",
    "chown",
    "cp",
    "cut",
    "dnsmasq",
    "id",
    "ip",
    "ip6tables",
    "ip6tables-legacy",
    "iptables",
    "iptables-legacy",
    "kill",
    "mkdir",
    "mknod",
    "modprobe",
    "mv",
    "nft",
    "ovs-vsctl",
    "pyqemu-ifctl",
    "readlink",
    "sed",
    "sysctl",
    "systemctl",
    "touch",
    "vi",
)
_STUB = """\
#!/bin/sh
printf '%s\\0' "$#" "${0##*/}" "$@" >>"$SEEN"
"""


def words_of(line: str, folder: Path, shell: Sequence[str] = SHELLS[0]) -> list[list[str]]:
    """Return the commands that a shell makes of a line that is typed, each as its words.

    The shell expands its history where it does that for a person. No program is found but
    stand-ins that note their words; what is written to a file is noted as by `echo TEXT > FILE`.
    Raises AssertionError where the shell finds a program or a syntax that is not there.
    """
    programs, seen = folder / "bin", folder / "seen"
    programs.mkdir(exist_ok=True)
    for name in PROGRAMS:
        if not (programs / name).exists():
            (programs / name).write_text(_STUB)
            (programs / name).chmod(0o755)
    seen.write_bytes(b"")
    begin = "set -o history -o histexpand\n: id\n" if shell[0] == "bash" else ""
    begin += 'echo() { printf \'%s\\0\' "$#" echo "$@" >>"$SEEN"; }\n'
    # NOTE: no fork for each; only bash has functions whose names are no identifiers.
    begin += "".join(
        f'{name}() {{ printf \'%s\\0\' "$#" {name} "$@" >>"$SEEN"; }}\n'
        for name in PROGRAMS
        if name.isidentifier() or shell == SHELLS[0]
    )
    typed = line.replace(" > ", " '>' ")
    done = subprocess.run(
        [
            "/usr/bin/env",
            "-i",
            f"PATH={programs}",
            f"SEEN={seen}",
            "HISTFILE=",
            f"/bin/{shell[0]}",
            *shell[1:],
        ],
        input=f"{begin}{typed}\n".encode(),
        cwd=folder,
        capture_output=True,
        timeout=60,
        check=False,
    )
    for fault in (b"not found", b"rror", b"ermission", b"nterminated", b"unexpected"):
        assert fault not in done.stderr, (line, done.stderr)
    commands = []
    words = [os.fsdecode(word) for word in seen.read_bytes().split(b"\0")[:-1]]
    while words:
        length = 2 + int(words[0])
        commands.append(words[1:length])
        del words[:length]
    return commands
