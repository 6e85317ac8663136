"""What explain prints of a network that is made for its first tap, run as a person pastes it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.dns import servers
from lab.hooks import Hooks
from lab.made_look import CHANGES, FORWARDING, NAT, a_tap, looked_at
from lab.needs import require
from lab.netns import Namespace
from lab.public import NOBODY, as_user, public_folder, publish
from lab.taps import Tap


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path) -> Hooks:
    require("dnsmasq")
    return Hooks(tmp_path / "hooks", netns.name)


def pasted(text: str) -> str:
    """Return the lines of a block of commands, as whoever marks them with the mouse has them."""
    lines = text.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("commands, "))
    end = next((n for n in range(begin, len(lines)) if not lines[n]), len(lines))
    return "\n".join(lines[begin + 1 : end]) + "\n"


def write_policy(hooks: Hooks, nat: dict[str, Any], **rule: Any) -> None:
    networks = {"lab": {"bridge": "labbr0", "mtu": 1400, "nat": nat}}
    rules = [{"tap": "*", "network": "lab", **rule}]
    hooks.write_policy(json.dumps({"version": 1, "networks": networks, "rules": rules}))


@pytest.fixture
def forwarding(netns: Namespace) -> Callable[[], None]:
    """Give back what an up turns on and leaves on."""
    before = [netns.run(["cat", f"/proc/sys/net/{name}"]).stdout.strip() for name in FORWARDING]

    def give_back() -> None:
        for name, value in zip(FORWARDING, before, strict=True):
            netns.run(["sh", "-c", f"echo {value} >/proc/sys/net/{name}"])

    return give_back


def wanted_look(netns: Namespace, hooks: Hooks, forwarding: Callable[[], None]) -> dict[str, Any]:
    """Return the look after an up, which is undone."""
    tap = a_tap(netns)
    assert hooks.up("web0").returncode == 0
    found = looked_at(netns)
    assert hooks.down("web0").returncode == 0
    tap.close()
    forwarding()
    return found


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        assert found[key] == value


def go(netns: Namespace, hooks: Hooks, *taps: Tap) -> None:
    """Take the taps down: what was pasted is ours to take away, and nothing of it is left."""
    for tap in taps:
        assert hooks.down(tap.name).returncode == 0
        tap.close()
    assert "labbr0" not in netns.links() and not servers(netns)
    assert not netns.run(["nft", "list", "ruleset"]).stdout


SHELLS = ("dash", "bash")


@pytest.mark.parametrize("isolated", [False, True], ids=["", "isolated"])
@pytest.mark.parametrize(
    ("nat", "shell"), [(nat, SHELLS[number % 2]) for number, nat in enumerate(NAT)]
)
def test_the_look_afterwards_is_that_after_an_up(
    netns: Namespace,
    hooks: Hooks,
    forwarding: Callable[[], None],
    nat: str,
    shell: str,
    isolated: bool,
) -> None:
    write_policy(hooks, NAT[nat], isolated=isolated)
    wanted = wanted_look(netns, hooks, forwarding)
    # Told before the tap is there, in text and as JSON.
    told = pasted(hooks.ctl("explain", "web0").stdout)
    lines = json.loads(hooks.ctl_warm("explain", "web0", "--json").stdout)["commands"]
    assert [line.strip() for line in told.splitlines()] == lines
    assert not [line for line in lines if "\\t" in line or "<<" in line]
    tap = a_tap(netns)
    netns.run([shell, "-e"], input=told)
    same(looked_at(netns), wanted)
    (row,) = json.loads(hooks.ctl_warm("status", "--json").stdout)["taps"]
    assert (row["state"], row["differences"]) == ("ok", [])
    assert pasted(hooks.ctl("explain", "web0").stdout).count("nft") == 0
    go(netns, hooks, tap)
    forwarding()


def test_the_switches_are_told_that_are_written(
    netns: Namespace, hooks: Hooks, forwarding: Callable[[], None]
) -> None:
    """All of them, with what a new link has by itself: another program may have set it since."""
    write_policy(hooks, NAT["both families, and all there is"])
    forwarding()
    lines = json.loads(hooks.ctl_warm("explain", "web0", "--json").stdout)["commands"]
    folder = "/proc/sys/net"
    assert [line for line in lines if folder in line and "web0" not in line] == [
        f"echo 1 > {folder}/ipv4/conf/labbr0/route_localnet",
        f"echo 0 > {folder}/ipv4/conf/labbr0/accept_source_route",
        *(f"echo 0 > {folder}/ipv6/conf/labbr0/{name}"
          for name in ("accept_dad", "accept_ra", "autoconf", "disable_ipv6")),
        f"echo 1 > {folder}/ipv4/ip_forward",
        f"echo 1 > {folder}/ipv6/conf/all/forwarding",
    ]  # fmt: skip


@pytest.mark.parametrize("verb", ["explain", "apply"])
@pytest.mark.parametrize(("old", "new"), CHANGES, ids=[new for _, new in CHANGES])
def test_the_look_after_a_change_is_that_after_an_apply(
    netns: Namespace, hooks: Hooks, forwarding: Callable[[], None], old: str, new: str, verb: str
) -> None:
    """A network that has a tap, after an edit of the policy: what differs is told, and no more."""

    def begin() -> Tap:
        write_policy(hooks, NAT[old])
        tap = a_tap(netns)
        assert hooks.up("web0").returncode == 0
        forwarding()
        write_policy(hooks, NAT[new])
        return tap

    tap = begin()
    assert hooks.ctl("apply", "web0").returncode == 0
    wanted = looked_at(netns)
    go(netns, hooks, tap)
    tap = begin()
    if verb == "explain":
        lines = json.loads(hooks.ctl_warm("explain", "web0", "--json").stdout)["commands"]
    else:
        (row,) = hooks.ctl_json("apply", "--dry-run")["taps"]
        lines = row["commands"]
    assert not [line for line in lines if line.startswith("ip link add ")]
    assert sum(line.startswith("nft ") for line in lines) == 0
    assert lines and sum(line.endswith("| nft -f -") for line in lines) < 2
    netns.run(["dash", "-e"], input="\n".join(lines) + "\n")
    same(looked_at(netns), wanted)
    (row,) = hooks.ctl_json("apply", "--dry-run")["taps"]
    assert row["result"] == "unchanged", row
    go(netns, hooks, tap)
    forwarding()


def test_a_user_is_told_the_same_as_root(netns: Namespace, hooks: Hooks) -> None:
    """A user may not look at the packet filter; a network that is not there has no table."""
    write_policy(hooks, NAT["both families, and all there is"])
    with public_folder() as folder:
        hooks = publish(hooks, folder)
        told = pasted(hooks.ctl("explain", "web0").stdout)
        words = hooks.argv("pyqemu-ifctl", "explain", "web0")
        done = subprocess.run(
            [*words[:4], *as_user(NOBODY), *words[4:]],
            env=hooks.environ(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    # NOTE: of the tap's own, what a user may not write is left out.
    lines = [line for line in told.splitlines() if not line.endswith("/web0/disable_ipv6")]
    assert pasted(done.stdout).splitlines() == lines and "  nft add table inet" in told
