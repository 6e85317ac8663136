"""bench/run: measures one up and one down, side by side with what people use instead."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lab import needs
from side_by_side import imports, report
from side_by_side.hosts import (
    BenchError,
    Host,
    Run,
    filters_vlans,
    ovs_host,
    plain_host,
    run_in_session,
)
from side_by_side.report import Result, Samples
from side_by_side.rows import TAP, HostName, Row, environment, make_rows

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 40
IMPORT_RUNS = 7
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Samplings = dict[tuple[str, str], Samples]


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; exits 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="bench/run",
        description="Measure one up and one down as QEMU sees them, beside what people use.",
        epilog="Needs root and /dev/net/tun; works in network namespaces of its own.",
    )
    parser.add_argument(
        "--rounds", type=_rounds, default=ROUNDS, metavar="N",
        help=f"how often each row is measured; {ROUNDS}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument(
        "--prefix", type=Path, metavar="DIR",
        help="measure the installation in DIR, in place of one made for this run",
    )
    parser.add_argument(
        "--imports", action="store_true",
        help="show the costliest imports of an up, and measure nothing else",
    )
    return parser.parse_args(words)


def _rounds(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def progress(text: str) -> None:
    """Tell on stderr what is being done."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


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


def attempt(host: Host, row: Row, words: Sequence[str]) -> Run:
    """Run one command of a row. Raises BenchError where it fails."""
    run = host.spawner.run(words, environment(row))
    if run.status != 0:
        raise BenchError(f"`{' '.join(words)}` ended {run.status}: {run.stderr.strip()}")
    return run


def measure(host: Host, row: Row, samples: Samplings, *, check: bool) -> None:
    """Bring a new tap up and down once as `row` says and add what it took to `samples`.

    `check`: see also that the tap then is on the row's bridge, and then no longer. Raises
    BenchError where it is not.
    """
    host.spawner.open(TAP)
    try:
        for direction, words in (("up", row.up), ("down", row.down)):
            if words is None:
                continue
            run = attempt(host, row, words)
            taken = samples.setdefault((row.key, direction), Samples())
            taken.wall.append(run.wall)
            taken.cpu.append(run.cpu)
            wanted = row.bridge if direction == "up" or not row.detaches else None
            if check and (found := host.master(TAP)) != wanted:
                raise BenchError(
                    f"`{' '.join(words)}` ended 0, but {TAP} is on {found or 'no bridge'}, "
                    f"not on {wanted or 'no bridge'}"
                )
    finally:
        host.spawner.close()


def measure_all(hosts: Mapping[HostName, Host], rows: Sequence[Row], rounds: int) -> Samplings:
    """Measure the rows in turn, `rounds` times, after one round that only warms up and checks."""
    progress("one round to warm up")
    for row in rows:
        measure(hosts[row.host], row, {}, check=True)
    samples: Samplings = {}
    for number in range(1, rounds + 1):
        if number % 10 == 1:
            progress(f"round {number} of {rounds}")
        for row in rows:
            measure(hosts[row.host], row, samples, check=False)
    return samples


def trace_imports(host: Host, row: Row) -> list[imports.Import]:
    """Return what an up by `row` imports, with the medians of several runs."""
    launcher = Path(row.up[0])
    python = launcher.read_text().splitlines()[0].removeprefix("#!").split()
    words = [python[0], "-X", "importtime", *python[1:], *row.up]
    runs = []
    for _ in range(IMPORT_RUNS):
        host.spawner.open(TAP)
        try:
            runs.append(imports.parse(attempt(host, row, words).stderr))
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
    vlan_filtering = filters_vlans()
    no_ovs = needs.missing("ovs")
    rows, left_out = make_rows(prefix, folder, vlan_filtering=vlan_filtering, no_ovs=no_ovs)
    hosts: dict[HostName, Host] = {"plain": stack.enter_context(plain_host(vlan_filtering))}
    if arguments.imports:
        (row,) = (row for row in rows if row.key == "linux")
        traced = trace_imports(hosts["plain"], row)
        print(imports.table(traced, IMPORT_RUNS), end="")
        return
    if no_ovs is None:
        hosts["ovs"] = stack.enter_context(ovs_host(vlan_filtering))
    notes = []
    if not vlan_filtering:
        notes.append(
            "this kernel's bridges do not filter VLANs: no row on a Linux bridge sets one"
        )
    samples = measure_all(hosts, rows, arguments.rounds)
    result = Result(
        tuple(rows), samples, tuple(left_out), tuple(notes), arguments.rounds,
        describe_machine(prefix),
    )
    print(report.table(result), end="", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.as_json(result), indent=1) + "\n")


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
