"""Fixtures on the real thing, and the rule that every test leaves it as it found it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lab.agent import Agent
from lab.hooks import Hooks
from lab.inside import BOOTS, INSIDE, MACHINES, Boot
from lab.needs import require
from lab.netns import RUN_NETNS, Namespace, prefix
from lab.ovs import OpenVSwitch
from lab.snapshot import MARK, Snapshot, leftovers

TESTS = Path(__file__).parent
READY = pytest.StashKey[tuple[Namespace, OpenVSwitch | None, Snapshot]]()
HOST = pytest.StashKey[frozenset[str]]()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave tests/uml to test_in_uml.py, which boots one UML for all of it, and so tests/vm."""
    away = {each.tests for each in MACHINES if os.environ.get(INSIDE) != each.name}
    return True if collection_path in away else None


@pytest.fixture
def netns() -> Iterator[Namespace]:
    """An empty network namespace; what the test does in it is undone by the test itself."""
    require("root", "tun", "ip", "nft")
    with Namespace() as namespace:
        yield namespace


@pytest.fixture
def inside(netns: Namespace) -> Iterator[Namespace]:
    """The namespace of `netns`, with the test's own thread in it."""
    with netns.enter():
        yield netns


@pytest.fixture
def ovs_netdev(netns: Namespace) -> Iterator[OpenVSwitch]:
    """A private Open vSwitch in `netns` with the userspace datapath, without bridges."""
    require("ovs")
    with OpenVSwitch(netns, datapath="netdev", tcp=True) as switch:
        yield switch


@pytest.fixture
def ovs_system(netns: Namespace) -> Iterator[OpenVSwitch]:
    """A private Open vSwitch in `netns` with the kernel's datapath, without bridges."""
    require("ovs", "ovs-kernel")
    with OpenVSwitch(netns, datapath="system", tcp=True) as switch:
        yield switch


@pytest.fixture
def ovs(request: pytest.FixtureRequest) -> OpenVSwitch:
    """A private Open vSwitch: the kernel's datapath in a Linux of our own, userspace elsewhere."""
    switch: OpenVSwitch = request.getfixturevalue(
        "ovs_system" if INSIDE in os.environ else "ovs_netdev"
    )
    return switch


@pytest.fixture(params=["alone", "agent"])
def way(request: pytest.FixtureRequest) -> str:
    """How the hooks do their work: each test of theirs runs both ways.

    But one that is marked `alone`, with the reason.
    """
    found: str = request.param
    return found


@pytest.fixture
def served(way: str, netns: Namespace) -> Iterator[Callable[..., Hooks]]:
    """Gives hooks an agent in `netns`, with their policy, where that is the way.

    With `syslog`, the path of a socket, that is where the agent logs to; `before` is Python that
    it runs first.
    """
    with ExitStack() as stack:

        def serve(hooks: Hooks, syslog: str | None = None, before: str = "") -> Hooks:
            if way == "agent":
                if syslog is not None:
                    log = f"import pyqemu_ifup.hook; pyqemu_ifup.hook.LOG_SOCKET = {syslog!r}"
                    before = f"{before}\n{log}"
                agent = stack.enter_context(Agent(netns, hooks.policy, before=before))
                hooks.agent, hooks.agent_pid = agent.path, agent.pid
            return hooks

        yield serve


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests on the agent that are about a hook which does without."""
    without = [
        item
        for item in items
        if item.get_closest_marker("alone") is not None
        and isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("way") == "agent"
    ]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Boot the Linuxes of our own for those of their tests that are to run."""
    boots = session.stash.setdefault(BOOTS, {})
    for machine in MACHINES:
        wanted = [
            str(item.callspec.params["inner"])
            for item in session.items
            if isinstance(item, pytest.Function) and item.path == machine.results
        ]
        if wanted and not session.config.option.collectonly:
            boots[machine.name] = Boot(machine, wanted)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the Linuxes of our own."""
    for boot in session.stash.get(BOOTS, {}).values():
        boot.close()


def _find(item: pytest.Item) -> tuple[Namespace | None, OpenVSwitch | None]:
    """Find the namespace and the Open vSwitch among the test's ready fixtures."""
    values = list(getattr(item, "funcargs", {}).values())
    switches = [value for value in values if isinstance(value, OpenVSwitch)]
    namespaces = [value for value in values if isinstance(value, Namespace)]
    namespaces += [switch.namespace for switch in switches]
    return namespaces[0] if namespaces else None, switches[0] if switches else None


def _on_host() -> frozenset[str]:
    """Return what a test could leave behind outside its namespace."""
    links = {f"link {name}" for _index, name in socket.if_nameindex()}
    ours = prefix()
    names = os.listdir(RUN_NETNS) if RUN_NETNS.exists() else []
    return frozenset(links | {f"netns {name}" for name in names if name.startswith(ours)})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Mark what the test will start, and remember what the host looks like."""
    os.environ[MARK] = f"{os.getpid()}:{item.nodeid}"
    item.stash[HOST] = _on_host()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that leaves its namespace or Open vSwitch other than its fixtures made it."""
    namespace, switch = _find(item)
    if namespace is None:
        return (yield)
    before = Snapshot.take(namespace, switch)
    kept, namespace.kept = namespace.kept, type(namespace.kept)()
    try:
        result = yield
    except BaseException:
        namespace.close_kept()
        item.add_report_section("call", "left behind", "\n".join(_look(before, namespace, switch)))
        raise
    finally:
        namespace.close_kept()
        namespace.kept = kept
    lines = leftovers(before, namespace, switch)
    if lines:
        pytest.fail("the test leaves behind:\n" + "\n".join(lines), pytrace=False)
    return result


def _look(before: Snapshot, namespace: Namespace, switch: OpenVSwitch | None) -> list[str]:
    """Tell what a failed test has left, where that can still be told."""
    try:
        return leftovers(before, namespace, switch)
    except (OSError, RuntimeError) as error:
        return [f"cannot tell: {error}"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that leaves a link or a namespace on the host."""
    result = yield
    before = item.stash.get(HOST, None)
    if before is not None and (left := _on_host() - before):
        pytest.fail(f"the test leaves on the host: {', '.join(sorted(left))}", pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the skipped tests by name, each with its reason, and their number."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    terminalreporter.section(f"{len(skipped)} skipped")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.line(f"{report.nodeid}: {str(reason).removeprefix('Skipped: ')}")
