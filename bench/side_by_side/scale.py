"""Measures the agent with many taps at once, many taps there already, and many rules."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from side_by_side.hosts import (
    BRIDGE,
    OVS_BRIDGE,
    VID,
    BenchError,
    Host,
    Plan,
    Spawner,
    ovs_host,
    plain_host,
)
from side_by_side.measure import attempt, measure_all, progress
from side_by_side.port_monitor import PortMonitor
from side_by_side.report import Result
from side_by_side.rows import (
    TAP,
    LeftOut,
    Row,
    Target,
    bare_row,
    environment,
    hook_row,
    ovs_script_row,
    script_row,
    write_policy,
)

AT_ONCE = (1, 10, 100, 256, 500)
TIMES = 3
"""How often the taps come up at once."""
FEW, TAPS, TAPS_MAX = 10, 1000, 1022
"""How many taps there are already; a Linux bridge has 1023 ports, and one is for the next tap."""
RULES = (10, 1000, 5000)
KILLS = 20
PATIENCE = 60.0
"""Seconds after which what is left is not waited for any longer."""
SAID_MAX = 400
"""Characters of what failing hooks say that are told."""
ANY = '"*"'
"""The glob of every tap, as the policy has it."""
HOSTS = {"linux": plain_host, "ovs": ovs_host}
LABELS = {"linux": "Linux bridge", "ovs": "OVS bridge", "rules": "Linux bridge"}


@dataclass
class AtOnce:
    """So many taps at once, by one kind of command: the seconds of each, and of all, each time."""

    key: str
    label: str
    count: int
    walls: list[float] = field(default_factory=list)
    all: list[float] = field(default_factory=list)
    failed: int = 0
    said: str = ""


@dataclass(frozen=True)
class Memory:
    """What an agent has of the memory in MB, without a tap and with `taps` of them."""

    label: str
    taps: int
    before: float
    after: float


@dataclass(frozen=True)
class Kills:
    """The seconds from SIGKILL for a tap's holder until its port had gone."""

    label: str
    taps: int
    seconds: list[float]


@dataclass(frozen=True)
class Grown:
    """All figures of this part; `latency` are ups and downs, one at a time."""

    at_once: list[AtOnce]
    latency: Result
    taps: int
    memory: list[Memory]
    kills: list[Kills]
    left_out: tuple[LeftOut, ...]


def measure(plan: Plan, no_ovs: str | None, rounds: int, counts: Sequence[int], taps: int) -> Grown:
    """Measure all of it, with `counts` taps at once, and `taps` there already."""
    linux = Target(BRIDGE, plan.vid)
    plans = {"linux": _with_policy(plan, "scale-linux", linux)}
    if no_ovs is None:
        plans["ovs"] = _with_policy(plan, "scale-ovs", Target(OVS_BRIDGE, VID))
    at_once = _measure_at_once(plans, counts)
    memory: list[Memory] = []
    kills: list[Kills] = []
    with ExitStack() as stack:
        hosts: dict[str, Host] = {}
        for kind, each in plans.items():
            for count in (FEW, taps):
                host = stack.enter_context(HOSTS[kind](each))
                hosts[f"{kind}-{count}"] = host
                memory.append(_fill(stack, LABELS[kind], host, count))
        for number in RULES:
            each = _with_policy(plan, f"scale-rules-{number}", linux, number - 1)
            hosts[f"rules-{number}"] = stack.enter_context(plain_host(each))
        rows = _rows(plan, hosts, taps)
        samples = measure_all(hosts, rows, rounds)
        for count in (FEW, taps) if no_ovs is None else ():
            row = next(row for row in rows if row.key == f"ovs-{count}")
            kills.append(_measure_kills(hosts[row.host], row, count, min(KILLS, rounds)))
    latency = Result(tuple(rows), samples, (), (), rounds)
    left_out = () if no_ovs is None else (LeftOut("all with Open vSwitch", no_ovs),)
    return Grown(at_once, latency, taps, memory, kills, left_out)


def _with_policy(plan: Plan, name: str, target: Target, before: int = 0) -> Plan:
    """Return the plan of a host whose agent has a policy with `before` rules more."""
    rules = [line for number in range(before) for line in _rule(number, target)]
    return replace(plan, policy=write_policy(plan.folder / f"{name}.yaml", {ANY: target}, rules))


def _rule(number: int, target: Target) -> list[str]:
    """Return a rule that does not match: for a tap, for a group of taps, for a guest, in turn."""
    who = (f"tap: vnet{number}", f"tap: web{number}-*", f"vm: guest-{number}")[number % 3]
    return [f"  - {who}", f"    network: {target.network}"]


def _rows(plan: Plan, hosts: Mapping[str, Host], taps: int) -> list[Row]:
    """Return the rows with few taps, with many, with rules, and what they are compared with."""
    first = f"linux-{FEW}"
    rows = [bare_row(plan.prefix, first), script_row(plan.folder, first)]
    rows.append(script_row(plan.folder, f"linux-{taps}", "ip-script-many", f", {taps} taps"))
    rows += [_asking(plan, hosts, "linux", count, f"{count} taps") for count in (FEW, taps)]
    for count in (FEW, taps) if f"ovs-{FEW}" in hosts else ():
        key = f"ovs-{count}"
        rows.append(ovs_script_row(plan.folder, key, f"ovs-script-{count}", f", {count} taps"))
    if f"ovs-{FEW}" in hosts:
        rows += [_asking(plan, hosts, "ovs", count, f"{count} taps") for count in (FEW, taps)]
    return rows + [_asking(plan, hosts, "rules", number, f"{number} rules") for number in RULES]


def _asking(plan: Plan, hosts: Mapping[str, Host], kind: str, count: int, text: str) -> Row:
    key = f"{kind}-{count}"
    bridge = OVS_BRIDGE if kind == "ovs" else BRIDGE
    label = f"agent, {LABELS[kind]}, {text}"
    return hook_row(key, label, key, bridge, plan.prefix, _asked(hosts[key]))


def _asked(host: Host) -> dict[str, str]:
    return {"PYQEMU_IFUP_SOCKET": host.agent.path}


def _measure_at_once(plans: Mapping[str, Plan], counts: Sequence[int]) -> list[AtOnce]:
    """Bring taps up at once, each number of them in turn, and by the bare interpreter first."""
    found: list[AtOnce] = []
    with ExitStack() as stack:
        hosts = {kind: stack.enter_context(HOSTS[kind](each)) for kind, each in plans.items()}
        prefix = plans["linux"].prefix
        bare = bare_row(prefix, "linux")
        rows = [bare]
        for kind, host in hosts.items():
            bridge = OVS_BRIDGE if kind == "ovs" else BRIDGE
            label = f"by the agent, {LABELS[kind]}"
            rows.append(hook_row(kind, label, kind, bridge, prefix, _asked(host)))
        for count in counts:
            progress(f"{count} taps at once")
            figures = [AtOnce(row.key, row.label, count) for row in rows]
            for _ in range(TIMES):
                for row, each in zip(rows, figures, strict=True):
                    _bring_up(hosts[row.host], row, each)
            found += figures
    return found


def _bring_up(host: Host, row: Row, figures: AtOnce) -> None:
    """Bring a new crowd up at once as `row` says, count those that are not, and let it go."""
    names = [f"crowd{number}" for number in range(figures.count)]
    host.spawner.hold(names)
    words = row.up if row.bridge is None else row.up[:-1]
    crowd = host.spawner.at_once(words, environment(row))
    figures.walls += crowd.walls
    figures.all.append(crowd.all)
    failed = sum(1 for status in crowd.statuses if status != 0)
    if row.bridge is not None:
        failed = max(failed, figures.count - _count_attached(host, row.bridge))
    figures.failed += failed
    figures.said = figures.said or crowd.stderr[:SAID_MAX]
    if host.ovs is None:
        host.spawner.close()
        return
    with PortMonitor(f"{host.ovs.dir}/db.sock") as monitor:
        host.spawner.close()
        monitor.wait_gone(names, PATIENCE)


def _count_attached(host: Host, bridge: str) -> int:
    """Return how many of the crowd are on the bridge and up."""
    links = host.netns.links()
    up = {name for name, link in links.items() if "UP" in link["flags"]}
    if bridge == OVS_BRIDGE and host.ovs is not None:
        on = set(host.ovs.vsctl("list-ports", bridge).stdout.split())
    else:
        on = {name for name, link in links.items() if link.get("master") == bridge}
    return sum(1 for name in up & on if name.startswith("crowd"))


def _fill(stack: ExitStack, label: str, host: Host, count: int) -> Memory:
    """Have the agent attach `count` taps, which stay; `stack` gets what holds them."""
    progress(f"{count} taps on a host: {label}")
    # NOTE: the spawner holds none of them: a process of many descriptors is slower to spawn.
    holder = stack.enter_context(Spawner(host.place))
    before = host.agent.memory
    holder.hold([f"crowd{number}" for number in range(count)])
    holder.attach(host.agent.path)
    return Memory(label, count, before, host.agent.memory)


def _measure_kills(host: Host, row: Row, taps: int, times: int) -> Kills:
    """Kill holders of taps by SIGKILL, as often; measure how long each tap's port remains."""
    progress(f"{times} killed, {taps} taps")
    assert host.ovs is not None, row
    seconds = []
    for _ in range(times):
        with Spawner(host.place) as victim:
            victim.open(TAP)
            attempt(victim, row, row.up)
            with PortMonitor(f"{host.ovs.dir}/db.sock") as monitor:
                if TAP not in monitor.names.values():
                    raise BenchError(f"`{' '.join(row.up)}` ended 0, but {TAP} has no port")
                start = time.perf_counter()
                victim.process.kill()
                monitor.wait_gone([TAP], PATIENCE)
                seconds.append(time.perf_counter() - start)
    return Kills(row.label, taps, seconds)
