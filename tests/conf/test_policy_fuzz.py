"""Whatever the bytes: a policy or its errors, never a traceback, and each error inside its file."""

from __future__ import annotations

import re
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.checkout import ROOT
from pyqemu_ifconf import load
from pyqemu_ifconf.failure import PolicyInvalid
from pyqemu_ifconf.load import Source, parse_policy, render
from pyqemu_ifconf.policy import Caller, decide

pytestmark = pytest.mark.each_python

SAMPLES = [path.read_bytes() for path in (ROOT / "tests" / "samples").glob("*.yaml")]
LOADERS = {"c": getattr(yaml, "CSafeLoader", yaml.SafeLoader), "python": yaml.SafeLoader}
WORDS = [
    "version: 1\n", "networks:", "rules:", "lan", "bridge", "tap", "vlan", "trunk", "deny", "none",
    ": ", "\n", "\n  ", "\n- ", "- ", "? ", "[", "]", "{", "}", ", ", "&a ", "*a ", "!t ", "!!int ",
    "<<: ", "'", '"', "|\n", ">-\n", "#", " # ", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n",
    "\t", "\r", "\r\n", "\x00", "\x85", "\u2028", "\ufeff", "日", "\U0001f600", "\\", "\\ud800",
    "\\U110000",
    "1", "0", "010", "4095", "30-20", "@", "`", "*", "web*", "[a-z", "true", "~", "=", "9" * 30,
]  # fmt: skip


SECONDS = 20
"""Of processor time that a policy may take: what takes longer grows with the square of its size."""


@pytest.fixture(params=LOADERS, autouse=True, scope="module")
def loader(request: pytest.FixtureRequest) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "LOADER", LOADERS[request.param])
        yield


def check(data: bytes) -> None:
    try:
        policy = parse_policy([Source("policy.yaml", data)])
    except PolicyInvalid as failure:
        lines = re.split("\r\n|\n|\r", data.decode("utf-8", "replace").removeprefix("\ufeff"))
        for error in failure.errors:
            assert 1 <= error.line <= len(lines)
            assert error.source == lines[error.line - 1]
            assert 1 <= error.column <= len(error.source) + 1
            assert str(error).isprintable()
            assert len(render(error).split("\n")) == 3
    else:
        decide(policy, Caller("web0", vm="x", netdev="n", mac="52:54:00:00:00:01", user="root"))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes(data: bytes) -> None:
    check(data)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_text(text: str) -> None:
    check(text.encode("utf-8", "surrogatepass"))


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=40))
def test_words(words: list[str]) -> None:
    check("".join(words).encode())


@settings(deadline=None)
@given(st.data())
def test_changed_samples(data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(SAMPLES))
    start = data.draw(st.integers(0, len(sample)))
    end = data.draw(st.integers(start, min(len(sample), start + 10)))
    between = data.draw(st.sampled_from(WORDS)).encode()
    check(sample[:start] + between + sample[end:])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{a: " * 50_000,
        "- " * 100_000,
        "? " * 100_000,
        "version: 1\nx: &a [" + "*a, " * 50_000 + "]",
        "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 5000)),
        "version: 1\n" + "".join(f"k{i}: 1\n" for i in range(20_000)),
        "version: 1\nrules:\n" + "- {tap: a, network: b}\n" * 5000,
        "%YAML 1." + "9" * 9000 + "\n---\nversion: 1\n",
        "version: 1\n" + "a" * 200_000,
        '"' * 200_001,
    ],
    ids=["lists", "maps", "dashes", "keys", "aliases", "anchors", "unknown", "rules", "directive",
         "word", "quotes"],
)  # fmt: skip
def test_bomb(text: str) -> None:
    began = time.process_time()
    check(text.encode())
    assert time.process_time() - began < SECONDS
