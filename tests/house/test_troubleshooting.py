"""The messages that head docs/troubleshooting.md are those that QEMU and our programs say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from test_house import modules

from lab.checkout import ROOT
from lab.devices import without_tun
from lab.hooks import Hooks
from lab.needs import QEMU, require
from lab.netns import Namespace
from lab.qemu import Qemu
from pyqemu_ifctl.verbs.decode import MEANING

PAGE = ROOT / "docs" / "troubleshooting.md"
LEAST = 8
"""Letters that a text with values in it must have of its own, to be no pattern for anything."""
HERE = "/usr/local/bin"


def headings(part: str) -> list[str]:
    """Return the messages that head the sections of a part of the page."""
    text = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    (found,) = (each for each in text if each.startswith(f"{part}\n"))
    return re.findall(r"^### `(.+)`$", found, re.MULTILINE)


def said(tree: ast.Module) -> Iterator[str]:
    """Yield each text that a module has as a pattern, with anything where a value is put in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.escape(node.value)
        elif isinstance(node, ast.JoinedStr):
            texts = [str(part.value) for part in node.values if isinstance(part, ast.Constant)]
            if sum(map(str.isalpha, "".join(texts))) >= LEAST:
                yield "".join(
                    re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+"
                    for part in node.values
                )


@pytest.fixture(scope="module")
def texts() -> list[re.Pattern[str]]:
    """All the texts of our programs."""
    return [re.compile(text) for path in modules() for text in said(ast.parse(path.read_text()))]


DENY_OF_README = "ask the network team for a rule"
"""A `deny:` is the policy's own text."""


def is_said(message: str, texts: list[re.Pattern[str]]) -> bool:
    """Tell whether a message, which is WHAT: WHY; REMEDY, is one text of the source or more."""
    if message == DENY_OF_README or any(text.fullmatch(message) for text in texts):
        return True
    return any(
        is_said(message[: found.start()], texts) and is_said(message[found.end() :], texts)
        for found in re.finditer(": |; ", message)
    )


@pytest.mark.parametrize("heading", headings("What our programs say"))
def test_ours_are_in_the_source(heading: str, texts: list[re.Pattern[str]]) -> None:
    assert is_said(heading, texts)


def test_each_message_is_explained_once() -> None:
    found = re.findall(r"^### .+$", PAGE.read_text(), re.MULTILINE)
    assert [each for each in found if found.count(each) > 1] == []


def test_a_message_that_no_program_says_is_seen(texts: list[re.Pattern[str]]) -> None:
    assert not is_said("there is no brigde br0", texts)
    assert not is_said("denied: no rule of policy.yaml matched", texts)
    assert DENY_OF_README in (ROOT / "README.md").read_text()


QEMU_SAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "network script /usr/local/bin/pyqemu-ifup failed with status 16640": (
        ("tap,id=n0,ifname=web0,script={here}/pyqemu-ifup,downscript=",),
        "",
    ),
    "network script /usr/local/bin/pyqemu-ifup failed with status 256": (
        ("tap,id=n0,ifname=web0,script={here}/gone/pyqemu-ifup",),
        "",
    ),
    "network script /usr/local/bin/pyqemu-ifdown failed with status 256": (
        ("tap,id=n0,ifname=web0,script=,downscript={here}/gone/pyqemu-ifdown",),
        "",
    ),
    "could not open /dev/net/tun: Permission denied": (
        ("tap,id=n0,ifname=web0,script=",),
        "closed",
    ),
    "could not open /dev/net/tun: No such device": (
        ("tap,id=n0,ifname=web0,script=",),
        "no driver",
    ),
    "could not open /dev/net/tun: No such file or directory": (
        ("tap,id=n0,ifname=web0,script=",),
        "gone",
    ),
    "could not open /dev/net/tun: Operation not permitted": (
        ("tap,id=n0,ifname=web0,script=",),
        "forbidden",
    ),
    "could not configure /dev/net/tun (web0): Operation not permitted": (
        ("tap,id=n0,ifname=web0,script=",),
        "open",
    ),
    "could not configure /dev/net/tun (web0): Device or resource busy": (
        ("tap,id=n0,ifname=web0,script=", "tap,id=n1,ifname=web0,script="),
        "",
    ),
    "could not configure /dev/net/tun (br0): Invalid argument": (
        ("tap,id=n0,ifname=br0,script=",),
        "",
    ),
    "bridge helper failed": (("tap,id=n0,br=br0,helper=/bin/false",), ""),
    "ifname=, script=, downscript=, vnet_hdr=, queues=, and vhostfds= are invalid with helper=": (
        ("tap,id=n0,ifname=web0,helper=/bin/false",),
        "",
    ),
    "warning: netdev n0 has no peer": (("tap,id=n0,ifname=web0,script=,downscript=",), ""),
}
"""Heading -> the netdevs that make QEMU say it, and with which of DEVICES."""
OF_THE_PACKAGE = {"W: /etc/qemu-ifup: no bridge for guest interface found"}
"""What test_packages.py sees the stock script say."""

TUN = """
mount -t tmpfs -o mode=755 lab /dev/net
%s
exec "$@"
"""
DROP = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all",
        "--bounding-set=-all")  # fmt: skip
DEVICES: dict[str, tuple[str, tuple[str, ...]]] = {
    "closed": ("mknod -m 0600 /dev/net/tun c 10 200", DROP),
    "open": ("mknod -m 0666 /dev/net/tun c 10 200", DROP),
    # NOTE: a number that this kernel has no driver for stands for that of tun's own.
    "no driver": ("mknod -m 0666 /dev/net/tun c 10 250", ()),
    "gone": ("", ()),
    "forbidden": ("mknod -m 0666 /dev/net/tun c 10 200", ()),
}
"""What /dev/net/tun is, and what QEMU is executed by."""


def test_each_of_qemu_s_is_tried() -> None:
    assert set(headings("What QEMU says")) == QEMU_SAYS.keys() | OF_THE_PACKAGE


@pytest.mark.parametrize("heading", QEMU_SAYS)
def test_qemu_says_it(heading: str, netns: Namespace, tmp_path: Path) -> None:
    require("qemu")
    hooks = Hooks(tmp_path / "bin", netns=netns.name)
    hooks.write_policy("version: 2\n")
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    netdevs, how = QEMU_SAYS[heading]
    words = [word.format(here=hooks.folder) for word in netdevs]
    prefix: list[str] = []
    options = [option for word in words for option in ("-netdev", word)]
    with ExitStack() as stack:
        if how:
            script, drop = DEVICES[how]
            prefix = ["unshare", "--mount", "sh", "-euc", TUN % script, "sh", *drop]
        if how == "forbidden":
            prefix += stack.enter_context(without_tun())
        qemu = stack.enter_context(
            Qemu(*options, netns=netns.name, env=hooks.environ(), prefix=prefix)
        )
        try:
            qemu.quit()
        except EOFError:
            assert qemu.wait() == 1
        told = qemu.stderr.replace(f"{hooks.folder}/gone", HERE).replace(str(hooks.folder), HERE)
    netns.ip("link", "del", "dev", "br0")
    # NOTE: QEMU itself names the option first.
    ends = re.compile(rf"{QEMU}: (-netdev \S+: )?{re.escape(heading)}")
    assert any(ends.fullmatch(line) for line in told.splitlines()), told


def test_the_page_explains_no_status_that_is_none() -> None:
    for number in re.findall(r"(?:status|decode) (\d{3,})", PAGE.read_text()):
        assert int(number) // 256 in {1, *map(int, MEANING)}, number


def test_the_page_names_only_verbs_that_there_are() -> None:
    verbs = re.findall(r"^\.SS (\w+)$", (ROOT / "ifctl/pyqemu-ifctl.8").read_text(), re.MULTILINE)
    named = set(re.findall(r"pyqemu-ifctl ([a-z]+)", PAGE.read_text()))
    assert named <= set(verbs)
