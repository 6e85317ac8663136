"""The agent's loop while the descriptors of its databases come and go, and their numbers return."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Event, Thread

import pytest

from lab.agent import Agent
from lab.agent_site import Site
from lab.clinic import until
from lab.netns import Namespace
from lab.ovs import OpenVSwitch

KEPT = """
import os, ovs.stream
real = ovs.stream.Stream.close

def close(self):
    if self.socket is not None and self.socket.fileno() >= 0:
        os.dup(self.socket.fileno())
    real(self)

ovs.stream.Stream.close = close
"""
"""Whatever socket the library closes stays open elsewhere, as in a child that is just forked."""
RESTARTS = 6
NAT = {"ipv4": "192.168.79.1/24", "dhcp": False, "dns": False, "outbound": False}


@pytest.fixture
def both(netns: Namespace, ovs: OpenVSwitch, tmp_path: Path) -> Site:
    """A site with a Linux bridge and Open vSwitch."""
    site = Site(netns, tmp_path / "policy.yaml", ovs)
    site.build()
    return site


def wait_connected(agent: Agent, wanted: bool = True) -> None:
    """Wait until the agent is connected to its database, or is not."""
    until(
        lambda: all(each["connected"] is wanted for each in agent.report()["databases"]),
        f"connected: {wanted}",
    )


def test_a_database_s_socket_that_is_open_elsewhere_disturbs_no_client(both: Site) -> None:
    """Its number is a client's next; what happens to the socket does not happen to the client."""
    assert both.ovs is not None
    both.tap("lan0")
    with both.start(before=KEPT) as agent:
        wait_connected(agent)
        both.ovs.server.end()
        wait_connected(agent, False)
        spent = _spent(agent.pid)
        for _ in range(3):
            assert agent.up("lan0").status == 0
            assert agent.down("lan0").status == 0
        both.ovs.start_server()
        wait_connected(agent)
        assert _spent(agent.pid) - spent < 2, "the loop turns for ever"
        assert agent.stop() == 0


def _spent(pid: int) -> float:
    """Return the seconds that a process has had a processor for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_restarts_of_the_server_while_a_network_with_nat_comes_and_goes(both: Site) -> None:
    """What nft is run with, and the network's lock, get the numbers that the library lets go."""
    assert both.ovs is not None
    ovs = both.ovs
    policy = json.loads(both.policy.read_text())
    policy["networks"]["lab"] = {"bridge": "labbr0", "nat": NAT}
    policy["rules"].append({"tap": "nat*", "network": "lab"})
    policy["timeout"] = 60
    both.policy.write_text(json.dumps(policy))
    both.tap("nat0")
    with both.start() as agent:
        wait_connected(agent)

        statuses: list[int | None] = []

        def come_and_go() -> None:
            while not over.is_set():
                statuses.extend((agent.up("nat0").status, agent.down("nat0").status))

        over = Event()
        network = Thread(target=come_and_go)
        network.start()
        # NOTE: it dies with the thread that started it.
        for _ in range(RESTARTS):
            ovs.server.kill()
            ovs.start_server()
            wait_connected(agent)
        over.set()
        network.join()
        assert set(statuses) <= {0, 69}, "69: an up, or a down, that comes while the server is down"
        assert agent.up("nat0").status == 0
        assert "labbr0" in both.netns.links()
        assert agent.down("nat0").status == 0
        assert agent.stop() == 0
