"""What a guest of a network with nat:, or a neighbour of the host, has of a dnsmasq of ours."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lab.dns import ANSWERED, REFUSED, ask, discover, family, flood, guest, servers
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace

NETWORKS = {
    "lab": {"bridge": "labbr0", "nat": {
        "ipv4": "192.168.76.1/24", "ipv6": "fd00:76::1/64", "dns": {"domain": "lab.test"}}},
    "shut": {"bridge": "shutbr0", "nat": {
        "ipv4": "192.168.77.1/24", "ipv6": "fd00:77::1/64", "dns": {"domain": "shut.test"},
        "outbound": False}},
}  # fmt: skip
ADDRESSES = {"lab": ("192.168.76.1", "fd00:76::1"), "shut": ("192.168.77.1", "fd00:77::1")}


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path, served: Callable[..., Hooks]) -> Hooks:
    require("dnsmasq")
    found = served(Hooks(tmp_path / "hooks", netns.name))
    rules = [{"tap": f"{name}*", "network": name} for name in NETWORKS]
    found.write_policy(json.dumps({"version": 1, "networks": NETWORKS, "rules": rules}))
    return found


@contextmanager
def guests(hooks: Hooks, netns: Namespace) -> Iterator[dict[str, Namespace]]:
    """Yield a guest on each of the networks, a neighbour of the host's, and the host."""
    with ExitStack() as stack:
        found = {"host": netns}
        for name, bridge, last in (("lab", "labbr0", 76), ("shut", "shutbr0", 77)):
            netns.tap(f"{name}0")
            done = hooks.up(f"{name}0")
            assert (done.returncode, done.stderr) == (0, "")
            stack.callback(hooks.down, f"{name}0")
            found[name] = stack.enter_context(
                guest(netns, bridge, f"192.168.{last}.5/24", f"fd00:{last}::5/64")
            )
        found["neighbour"] = stack.enter_context(
            guest(netns, "", "203.0.113.5/24", "2001:db8::5/64")
        )
        yield found


def answers(places: dict[str, Namespace]) -> set[tuple[str, str]]:
    """Return who is answered by whose dnsmasq, in at least one of the ways to ask."""
    ways = [
        (asker, network, address, tcp) for asker in places
        for network, addresses in ADDRESSES.items() for address in addresses
        for tcp in (False, True)
    ]  # fmt: skip

    def said(way: tuple[str, str, str, bool]) -> int | None:
        asker, network, address, tcp = way
        return ask(places[asker], address, f"nobody.{network}.test", tcp=tcp, wait=1)

    with ThreadPoolExecutor(len(ways)) as pool:
        rcodes = pool.map(said, ways)
        return {way[:2] for way, rcode in zip(ways, rcodes, strict=True) if rcode is not None}


SHALL = {("host", "lab"), ("host", "shut"), ("lab", "lab"), ("shut", "shut")}


@pytest.mark.alone("an agent loads the tables again")
def test_a_dnsmasq_answers_its_own_bridge_and_this_host_alone(
    hooks: Hooks, netns: Namespace
) -> None:
    """By the packet filter, and without it, too."""
    with guests(hooks, netns) as places:
        assert answers(places) == SHALL
        with places["neighbour"].enter(), pytest.raises(TimeoutError):
            socket.create_connection(("192.168.76.1", 53), 0.5)
        netns.run(["nft", "flush", "ruleset"])
        assert answers(places) == SHALL


@pytest.mark.alone("the agent has a mount namespace of its own")
def test_no_name_that_a_guest_without_outbound_asks_for_leaves_the_host(
    hooks: Hooks, netns: Namespace, tmp_path: Path
) -> None:
    """Where this host's own name server answers the guests of another network."""
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 203.0.113.5\n")
    script = Path(hooks.ifup)
    real = tmp_path / "pyqemu-ifup"
    script.rename(real)
    script.write_text(
        "#!/bin/sh\nexec unshare --mount sh -c "
        f'\'mount --bind {resolv} /etc/resolv.conf && exec "$@"\' sh {real} "$@"\n'
    )
    script.chmod(0o755)
    with guests(hooks, netns) as places:
        server = places["neighbour"].popen([
            "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
            "--pid-file=", "--listen-address=203.0.113.5", "--bind-interfaces",
            "--address=/far.example/198.51.100.7",
        ])  # fmt: skip
        try:
            end = time.monotonic() + 20
            while ask(netns, "203.0.113.5", "x.far.example", tcp=False) != ANSWERED:
                assert time.monotonic() < end
            for tcp in (False, True):
                for number, address in enumerate(ADDRESSES["lab"]):
                    name = f"open{number}.far.example"
                    assert ask(places["lab"], address, name, tcp=tcp) == ANSWERED, address
                for number, address in enumerate(ADDRESSES["shut"]):
                    name = f"shut{number}.far.example"
                    assert ask(places["shut"], address, name, tcp=tcp) == REFUSED, address
        finally:
            server.terminate()
            server.communicate()


def test_a_flood_of_tcp_stops_neither_dhcp_nor_other_networks_nor_an_up(
    hooks: Hooks, netns: Namespace
) -> None:
    with guests(hooks, netns) as places, flood(places["lab"], "192.168.76.1", 150):
        end = time.monotonic() + 20
        while max(len(family(pid)) for pid in servers(netns)) < 20:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert sorted(len(family(pid)) for pid in servers(netns)) == [1, 21], "it has its limit"
        assert ask(places["lab"], "192.168.76.1", "x.lab.test", tcp=False) is not None
        assert discover(places["lab"]) and discover(places["shut"])
        for tcp in (False, True):
            assert ask(places["shut"], "192.168.77.1", "x.shut.test", tcp=tcp) is not None
        for tap in ("lab1", "shut1"):
            netns.tap(tap)
            done = hooks.up(tap)
            assert (done.returncode, done.stderr) == (0, "")
            assert hooks.down(tap).returncode == 0


def test_a_dnsmasq_that_dies_of_a_flood_is_had_again_with_the_next_up(
    hooks: Hooks, netns: Namespace
) -> None:
    """Its processes for TCP live on, and hold the port."""
    with guests(hooks, netns) as places, flood(places["lab"], "192.168.76.1", 30):
        end = time.monotonic() + 20
        while not (found := [pid for pid in servers(netns) if len(family(pid)) == 21]):
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(found[0], signal.SIGKILL)
        netns.tap("lab1")
        done = hooks.up("lab1")
        assert (done.returncode, done.stderr) == (0, "")
        assert len(servers(netns)) == 2
        assert ask(places["lab"], "192.168.76.1", "x.lab.test", tcp=True) is not None
        assert hooks.down("lab1").returncode == 0
