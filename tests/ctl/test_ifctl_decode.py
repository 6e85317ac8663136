"""What pyqemu-ifctl decode says of a status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.hooks import Hooks
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifctl.verbs import decode

pytestmark = pytest.mark.each_python

INVALID = "the policy is invalid; pyqemu-ifctl check tells where"
MISSING = "the script is missing or not executable, its interpreter is missing, or it is not ours"
NONE = "not a status that a script can end with"

TEXTS = [
    ("16640", f"16640: exit 65: {INVALID}\n"),
    ("65", f"65: exit 65: {INVALID}\n"),
    ("0x4100", f"16640: exit 65: {INVALID}\n"),
    ("0", "0: exit 0: done\n"),
    ("9", "9: killed by SIGKILL\n"),
    ("-9", "-9: killed by SIGKILL\n"),
    ("15", "15: killed by SIGTERM\n"),
    ("139", "139: killed by SIGSEGV\n"),
    ("137", "137: killed by SIGKILL\n"),
    ("1", "1: killed by SIGHUP\n"),
    ("256", f"256: exit 1: {MISSING}\n"),
    ("768", "768: exit 3: not a status of these programs\n"),
    ("32512", "32512: exit 127: a shell did not find the program\n"),
    ("127", "127: exit 127: a shell did not find the program\n"),
    ("35072", "35072: exit 137: a shell says that the program was killed by SIGKILL\n"),
    ("65280", "65280: exit 255: not a status of these programs\n"),
    ("300", f"300: {NONE}\n"),
    ("65536", f"65536: {NONE}\n"),
    ("99999", f"99999: {NONE}\n"),
    ("-300", f"-300: {NONE}\n"),
    ("128", f"128: {NONE}\n"),
]


@pytest.mark.parametrize(("text", "answer"), TEXTS, ids=[row[0] for row in TEXTS])
def test_text(text: str, answer: str) -> None:
    assert decode.answer(text, as_json=False).out == answer


@pytest.mark.parametrize("status", list(Status))
def test_each_status_of_ours_is_known_in_both_spellings(status: Status) -> None:
    plain, raw = decode.decode(status), decode.decode(status * 256)
    assert plain == raw == decode.Decoded(int(status), None, decode.MEANING[status])


@pytest.mark.parametrize("text", ["", "x", "6 5", "1.5", "--9", "²", "0x", "0xzz", "9" * 19])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(Failure) as caught:
        decode.answer(text, as_json=False)
    assert caught.value.status is Status.USAGE
    assert str(caught.value).endswith("; give the one that QEMU prints, such as 16640")


JSON = [
    ("16640", '"status": 16640,\n  "exit": 65,\n  "signal": null', INVALID),
    ("9", '"status": 9,\n  "exit": null,\n  "signal": "SIGKILL"', "killed by SIGKILL"),
]


@pytest.mark.parametrize(("text", "inner", "meaning"), JSON, ids=[row[0] for row in JSON])
def test_json(text: str, inner: str, meaning: str) -> None:
    expected = f'{{\n  "version": 1,\n  {inner},\n  "meaning": "{meaning}"\n}}\n'
    assert decode.answer(text, as_json=True).out == expected


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("raise SystemExit(65)", INVALID),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("raise SystemExit(1)", MISSING),
    ],
)
def test_what_a_process_really_ends_with(end: str, words: str) -> None:
    child = subprocess.Popen([sys.executable, "-I", "-c", end])
    _, raw = os.waitpid(child.pid, 0)
    child.returncode = raw
    assert decode.decode(raw).meaning == words


@pytest.mark.parametrize("number", ["256", "32512"])
def test_a_hook_that_did_not_run_is_told_where_ours_are(tmp_path: Path, number: str) -> None:
    """Since a path that is copied from elsewhere is the most usual cause."""
    hooks = Hooks(tmp_path / "hooks")
    ours = f"; ours are {hooks.ifup} and {hooks.ifdown}\n"
    assert hooks.ctl("decode", number).stdout.endswith(ours)
