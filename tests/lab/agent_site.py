"""A namespace with a Linux bridge, an Open vSwitch where it is wanted, and an agent for both."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.agent import Agent, Answer, Client
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.taps import Tap

LAN_MAC, INT_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
VID = 100

HELD = """
import os, time
from pyqemu_ifd.main import notify
from pyqemu_ifup.host import Host
from pyqemu_ifup.task import pause

folder = os.path.dirname(sys.argv[sys.argv.index("--socket") + 1])
real = Host.run
stood = set()

async def stand(self, step, moment):
    path = f"{folder}/{moment}-{self.tap}-{type(step).__name__}"
    if os.path.exists(path + "-bug"):
        raise LookupError("injected by the test")
    if os.path.exists(path + "-flood"):
        for _ in range(5000):
            self.tell("more than a socket holds")
    token = ""
    if os.path.exists(path):
        with open(path) as file:
            token = file.read()
    # NOTE: once: a way back, which may have the same step, has to end in time.
    if token and token not in stood:
        stood.add(token)
        notify(f"X_HELD={token}")
        while os.path.exists(path):
            self.deadline.check()
            await pause(0.005)

async def run(self, step):
    await stand(self, step, "before")
    await real(self, step)
    await stand(self, step, "after")

Host.run = run
"""
"""An agent that stands still at a step of the test's choice until it is let go."""

_tokens = itertools.count(1)


@dataclass
class Site:
    """Where an agent works: `lan` on the Linux bridge br0, `tenants` on br-int, VLAN 100.

    Taps whose names begin with `lan` and `ten` go there by rule; others are denied.
    """

    netns: Namespace
    policy: Path
    ovs: OpenVSwitch | None = None
    before: str = ""
    agents: list[Agent] = field(default_factory=list)

    def build(self) -> None:
        """Make the bridges and the policy."""
        self.netns.add_bridge("br0", mac=LAN_MAC)
        if self.ovs is not None:
            self.ovs.add_bridge("br-int", hwaddr=INT_MAC)
        self.write_policy()

    def write_policy(self, **more: Any) -> None:
        """Write the policy, with `more` at its top."""
        networks: dict[str, Any] = {"lan": {"bridge": "br0"}}
        rules = [{"tap": "lan*", "network": "lan"}]
        if self.ovs is not None:
            networks["tenants"] = {
                "bridge": "br-int",
                "kind": "openvswitch",
                "ovsdb": self.ovs.db,
                "vlan": VID,
            }
            rules.append({"tap": "ten*", "network": "tenants"})
        policy = {"version": 1, "networks": networks, "rules": rules, **more}
        self.policy.write_text(json.dumps(policy))
        self.policy.chmod(0o644)

    def start(self, **more: Any) -> Agent:
        """Return an agent that runs, for a `with`; `more` as Agent takes it."""
        agent = Agent(self.netns, self.policy, **{"before": self.before, **more})
        self.agents.append(agent)
        return agent

    def tap(self, name: str) -> Tap:
        """Open a tap."""
        return self.netns.tap(name)

    def row(self, tap: str) -> dict[str, Any] | None:
        """Return the tap's Port row."""
        return self.ovs.find("Port", tap) if self.ovs is not None else None

    def is_attached(self, tap: str) -> bool:
        """Tell whether the tap is up and where the policy says, with our mark."""
        link = self.netns.links().get(tap)
        if link is None or "UP" not in link["flags"] or not link.get("ifalias"):
            return False
        if tap.startswith("lan"):
            return link.get("master") == "br0" and self.row(tap) is None
        row = self.row(tap)
        return row is not None and row["tag"] == VID and row["vlan_mode"] == "access"

    def is_clean(self, tap: str) -> bool:
        """Tell whether nothing of ours is left of the tap, be it there or not."""
        link = self.netns.links().get(tap)
        if link is not None and (link.get("ifalias") or "UP" in link["flags"]):
            return False
        return (link is None or "master" not in link) and self.row(tap) is None


@contextmanager
def held(agent: Agent, tap: str, step: str, moment: str = "before") -> Iterator[Callable[[], None]]:
    """Have the agent stand still at a step on the tap while the block runs.

    Yields what waits until it does.
    """
    token = f"{next(_tokens)}"
    path = agent.folder / f"{moment}-{tap}-{step}"
    path.write_text(token)
    try:
        yield lambda: agent.wait_told(f"X_HELD={token}")
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def asking(agent: Agent, *fields: str) -> Iterator[Client]:
    """A client that has asked for something on a tap of the agent's namespace."""
    with agent.connect() as client:
        client.ask(*fields, namespace=agent.namespace)
        yield client


def told(answer: Answer) -> str:
    """Return what the agent has said in all."""
    return "\n".join(answer.lines)
