"""bench/run: measures one up and one down, side by side with what people use instead."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lab import needs
from side_by_side import imports, report, scale, scale_report
from side_by_side.hosts import (
    BRIDGE,
    OVS_BRIDGE,
    VID,
    BenchError,
    Host,
    Plan,
    filters_vlans,
    ovs_host,
    plain_host,
    run_in_session,
)
from side_by_side.measure import attempt, measure_all, progress
from side_by_side.report import Result
from side_by_side.rows import OVS_TAP, TAP, Row, Target, make_rows, write_policy

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 40
IMPORT_RUNS = 7
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; exits 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="bench/run",
        allow_abbrev=False,
        description="Measure one up and one down as QEMU sees them, beside what people use.",
        epilog="Needs root and /dev/net/tun; works in network namespaces of its own.",
    )
    parser.add_argument(
        "--rounds",
        type=_rounds,
        default=ROUNDS,
        metavar="N",
        help=f"how often each row is measured; {ROUNDS}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument(
        "--prefix",
        type=Path,
        metavar="DIR",
        help="measure the installation in DIR, in place of one made for this run",
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--imports",
        action="store_true",
        help="show the costliest imports of an up, and measure nothing else",
    )
    parts.add_argument(
        "--scale",
        action="store_true",
        help="measure the agent with many taps and many rules instead",
    )
    parts.add_argument("--all", action="store_true", help="measure both, one after the other")
    parser.add_argument(
        "--at-once",
        type=_numbers,
        default=scale.AT_ONCE,
        metavar="N,N...",
        help=f"how many taps come up at once; {','.join(map(str, scale.AT_ONCE))}",
    )
    parser.add_argument(
        "--taps",
        type=_taps,
        default=scale.TAPS,
        metavar="N",
        help=f"how many taps there are already, at the most {scale.TAPS_MAX}; {scale.TAPS}",
    )
    return parser.parse_args(words)


def _rounds(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _taps(text: str) -> int:
    number = int(text)
    if not 1 <= number <= scale.TAPS_MAX:
        raise argparse.ArgumentTypeError(f"1 to {scale.TAPS_MAX}")
    return number


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_taps(number) for number in text.split(","))


def install(folder: Path) -> Path:
    """Install this checkout below `folder`, by `make install`; return the PREFIX.

    Packed elsewhere and moved, so that no /etc is touched. Raises BenchError.
    """
    progress("installing into a temporary PREFIX")
    prefix, packed = folder / "prefix", folder / "packed"
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    }
    where = (f"PREFIX={prefix}", f"DESTDIR={packed}", f"PYTHON={sys.executable}")
    run_in_session(["make", "-C", str(ROOT), "install", *where], env)
    Path(f"{packed}{prefix}").rename(prefix)
    return prefix


def trace_imports(host: Host, row: Row) -> list[imports.Import]:
    """Return what an up by `row` imports, with the medians of several runs."""
    launcher = Path(row.up[0])
    python = launcher.read_text().splitlines()[0].removeprefix("#!").split()
    words = [python[0], "-X", "importtime", *python[1:], *row.up]
    runs = []
    for _ in range(IMPORT_RUNS):
        host.spawner.open(TAP)
        try:
            runs.append(imports.parse(attempt(host.spawner, row, words).stderr))
        finally:
            host.spawner.close()
    return imports.medians(runs)


def describe_machine(prefix: Path) -> dict[str, object]:
    """Return what the figures depend on."""
    python = prefix / "lib" / "pyqemu-ifup" / "bin" / "python3"
    script = (
        "import importlib.metadata as m, json, platform as p\n"
        "versions = {n: m.version(n) for n in ('pyroute2', 'ovs', 'PyYAML')}\n"
        "print(json.dumps({'python': p.python_version(), **versions}))"
    )
    versions: dict[str, object] = json.loads(
        run_in_session([str(python), "-I", "-c", script], os.environ)
    )
    return {"kernel": platform.release(), "processors": os.cpu_count(), **versions}


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """End because of a signal; what was begun is cleaned up on the way out."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    progress(f"stopped by {signal.Signals(number).name}; cleaning up")
    raise SystemExit(128 + number)


def run(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
    """Do what the options ask for; `stack` gets what must be taken away at the end."""
    prefix = install(folder) if arguments.prefix is None else arguments.prefix.absolute()
    plan = Plan(prefix, folder / "agent.yaml", filters_vlans(), folder)
    write_policy(plan.policy, {TAP: Target(BRIDGE, plan.vid), OVS_TAP: Target(OVS_BRIDGE, VID)})
    no_ovs = needs.missing("ovs")
    if arguments.imports:
        host = stack.enter_context(plain_host(plan))
        rows, _ = make_rows(plan, {"plain": host.agent.path}, no_ovs="not asked for")
        (row,) = (row for row in rows if row.key == "linux")
        print(imports.table(trace_imports(host, row), IMPORT_RUNS), end="")
        return
    told: dict[str, object] = {"version": 1, "machine": describe_machine(prefix)}
    if not arguments.scale:
        result = side_by_side(plan, no_ovs, arguments.rounds)
        print(report.table(result), end="", flush=True)
        told |= report.as_json(result)
    if arguments.scale or arguments.all:
        grown = scale.measure(plan, no_ovs, arguments.rounds, arguments.at_once, arguments.taps)
        print(scale_report.table(grown), end="", flush=True)
        told["scale"] = scale_report.as_json(grown)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")


def side_by_side(plan: Plan, no_ovs: str | None, rounds: int) -> Result:
    """Measure one up and one down of each row, on hosts made for it."""
    with ExitStack() as stack:
        hosts = {"plain": stack.enter_context(plain_host(plan))}
        if no_ovs is None:
            hosts["ovs"] = stack.enter_context(ovs_host(plan))
        agents = {name: host.agent.path for name, host in hosts.items()}
        rows, left_out = make_rows(plan, agents, no_ovs=no_ovs)
        samples = measure_all(hosts, rows, rounds)
    notes = []
    if not plan.vlan_filtering:
        notes.append("this kernel's bridges do not filter VLANs: no row on a Linux bridge sets one")
    return Result(tuple(rows), samples, tuple(left_out), tuple(notes), rounds)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and return the exit status: 0, 1 where it cannot be done here or a row fails."""
    arguments = parse_arguments(words)
    reason = needs.missing("root", "tun", "ip")
    if reason is not None:
        progress(f"cannot measure here: {reason}")
        return 1
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="pyqemu-bench-")
        folder = Path(stack.enter_context(made))
        try:
            run(arguments, folder, stack)
        except (BenchError, RuntimeError) as error:
            progress(f"failed: {error}")
            return 1
    return 0
