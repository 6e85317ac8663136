"""Networks with `nat:` that have a tap, changed by a plan that is broken at each of its steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab.hooks import Hooks
from lab.made_look import CHANGES, FORWARDING, NAT, a_tap, looked_at
from lab.needs import require
from lab.netns import Namespace
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers import dnsmasq
from pyqemu_ifup.host import Host, Runnable
from pyqemu_ifup.made.base import WantedNetwork
from pyqemu_ifup.made.nat.server import EndServer, Serve
from pyqemu_ifup.made.network import ensure, plan_to_make


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path) -> Hooks:
    require("dnsmasq")
    for name in FORWARDING:
        netns.run(["sh", "-c", f"echo 1 >/proc/sys/net/{name}"])
    return Hooks(tmp_path / "hooks", netns.name)


def write_policy(hooks: Hooks, nat: dict[str, Any], mtu: int) -> WantedNetwork:
    """Put a policy in force, and return its network."""
    networks = {"lab": {"bridge": "labbr0", "mtu": mtu, "nat": nat}}
    rules = [{"tap": "*", "network": "lab"}]
    text = json.dumps({"version": 1, "networks": networks, "rules": rules})
    hooks.write_policy(text)
    made = parse_policy([Source("p", text.encode())]).networks["lab"].made
    assert made is not None
    return WantedNetwork("lab", "labbr0", made)


class Breaking(Host):
    """A Host that fails right after its op of this number, counted from 0; its undo goes on."""

    def __init__(self, number: int | None) -> None:
        super().__init__(None, Deadline(60), lambda line: None)
        self.number = number
        self.count = 0

    async def run(self, op: Runnable) -> None:
        number, self.count = self.count, self.count + 1
        await super().run(op)
        if number == self.number:
            raise Failure(Status.REFUSED, "broken", "by the test")


async def have(host: Host, wanted: WantedNetwork) -> None:
    async with ensure(host, wanted, "web0"):
        return


@pytest.mark.parametrize(("old", "new"), CHANGES, ids=[new for _, new in CHANGES])
def test_what_a_broken_change_has_done_is_taken_back(
    netns: Namespace, hooks: Hooks, old: str, new: str
) -> None:
    write_policy(hooks, NAT[old], 1400)
    tap = a_tap(netns)
    assert hooks.up("web0").returncode == 0
    before = looked_at(netns)
    wanted = write_policy(hooks, NAT[new], 1300)
    with netns.enter(), Breaking(None) as host:
        steps = len(host.finish(plan_to_make(host, wanted)))
    assert steps > 1
    for number in range(steps):
        with netns.enter(), Breaking(number) as host, pytest.raises(Failure, match="broken"):
            host.finish(have(host, wanted))
        found = looked_at(netns)
        for key, value in before.items():
            assert found[key] == value, (number, key)
    with netns.enter():
        whole = Breaking(None)
        with whole as host:
            host.finish(have(host, wanted))
            assert whole.count == steps
    with netns.enter(), Breaking(None) as host:
        assert host.finish(plan_to_make(host, wanted)) == ()
    assert hooks.down("web0").returncode == 0
    tap.close()
    for child in dnsmasq._children.values():
        child.wait()
    assert "labbr0" not in netns.links()


UNIT = "pyqemu-ifup-dnsmasq@lab.service"
FOLDER = "/run/pyqemu-ifup/lab"
ENDS = EndServer("lab", "labbr0", FOLDER, UNIT, None)
WRITES = (f"mkdir -p {FOLDER}", f"printf '%s\\n' port=0 no-hosts > {FOLDER}/{dnsmasq.SETTINGS}")


@pytest.mark.parametrize(
    ("ends", "lines"),
    [(None, ()), (ENDS, (f"systemctl stop {UNIT}",))],
    ids=["none runs", "another runs"],
)
def test_under_systemd_the_server_is_a_unit(ends: EndServer | None, lines: tuple[str, ...]) -> None:
    serve = Serve("lab", "labbr0", FOLDER, ("port=0", "no-hosts"), UNIT, ends)
    assert serve.commands() == (*lines, *WRITES, f"systemctl start {UNIT}")
