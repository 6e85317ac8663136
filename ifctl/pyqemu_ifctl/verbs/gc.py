"""pyqemu-ifctl gc: remove what is ours and whose tap, or guest, is gone."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.names import check_tap_name
from pyqemu_ifconf.policy import Policy
from pyqemu_ifconf.shell import readable
from pyqemu_ifctl.answer import TIMEOUT, Answer, add_json, to_json
from pyqemu_ifctl.program import PROGRAM
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.hook import narrator, within_deadline

if TYPE_CHECKING:
    from pyqemu_ifdown.gc import Ended
    from pyqemu_ifup.host import Host
    from pyqemu_ifup.kinds.base import Leftover, Stray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options and arguments."""
    add_json(parser)
    parser.add_argument("tap", metavar="TAP", nargs="?", help="only what is left of this one")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be removed")


def run(args: argparse.Namespace) -> Answer:
    """Remove what is left. Raises Failure."""
    tap = check_tap_name(args.tap) if args.tap is not None else None
    with within_deadline(TIMEOUT, hook=False) as deadline:
        answer = gc(
            tap,
            os.environ,
            deadline,
            narrator(PROGRAM, tap),
            dry_run=args.dry_run,
            as_json=args.json,
        )
    return answer.by_name()


def gc(
    tap: str | None,
    environ: Mapping[str, str],
    deadline: Deadline,
    tell: Callable[[str], None],
    *,
    dry_run: bool,
    as_json: bool,
) -> Answer:
    """Remove the ports of ours whose tap is gone, of `tap` alone where given; tell what was done.

    A tap of ours that nobody has any more leaves its bridge, and a network that no tap is on goes.
    A database that fails does not keep the others from being looked at.
    """
    from pyqemu_ifctl.databases import addresses, open_each, read_policy, worst
    from pyqemu_ifdown.gc import Ended, collect, find_why_held
    from pyqemu_ifup.host import Host

    found: list[Leftover] = []
    ended: list[Ended] = []
    held: list[Ended] = []
    strays: list[Stray] = []
    networks: list[tuple[str, str]] = []
    tables: list[tuple[str, str]] = []
    failures: list[Failure] = []
    policy = read_policy(environ)
    with Host(tap, deadline, tell) as host:
        try:
            failures += open_each(host, addresses(policy)).values()
            ended = _end(host, tap, failures, dry_run=dry_run)
            names = {each.link.name for each in ended}
            for leftover, let_go in collect(host, tap=tap, dry_run=dry_run):
                if leftover.remove is not None or leftover.port.name not in names:
                    found.append(leftover)
                if not let_go:
                    failures.append(_mute(leftover))
            if tap is not None and not found:
                held = [
                    Ended(link, host.finish(find_why_held(link)))
                    for link in host.kernel.links()
                    if link.name == tap and link.mark is not None and tap not in names
                ]
            networks = host.finish(_networks(host, dry_run=dry_run))
            if tap is None:
                strays = _strays(host, failures, dry_run=dry_run)
                tables += _tables(host, policy, failures, dry_run=dry_run)
        except Failure as failure:
            failures.append(failure)
    remarks = [str(failure) for failure in failures]
    if isinstance(policy, Failure):
        remarks.insert(0, f"only the default database is looked at: {policy}")
    if as_json:
        out = as_object(ended, found, networks, tables, held, strays)
    else:
        out = as_text(
            ended, found, networks, tables, held, strays, dry_run=dry_run, all_seen=not failures
        )
    return Answer(out, worst(failures), tuple(remarks))


def _end(host: Host, tap: str | None, failures: list[Failure], *, dry_run: bool) -> list[Ended]:
    """Take away the taps that have a process no more; return those, and add what failed."""
    from pyqemu_ifdown.gc import end, find_ended, find_let_go

    links = [link for link in host.kernel.links() if tap in (None, link.name)]
    done = []
    left = host.finish(find_ended(links, roots=True))
    left += host.finish(find_let_go(links, named=tap is not None))
    for each in left:
        try:
            if dry_run or host.finish(end(host, each)):
                done.append(each)
        except Failure as failure:
            failures.append(Failure(failure.status, f"{readable(each.link.name)}: {failure}"))
    return done


def _strays(host: Host, failures: list[Failure], *, dry_run: bool) -> list[Stray]:
    """Take away what a crash has left that no port tells of; return that, and add what failed."""
    from pyqemu_ifup import kinds
    from pyqemu_ifup.steps import take_steps

    done = []
    for each in [it for kind in kinds.makers() for it in host.finish(kind.find_strays(host))]:
        try:
            if not dry_run:
                host.finish(take_steps(host, each.plan))
            done.append(each)
        except Failure as failure:
            failures.append(Failure(failure.status, f"{readable(each.name)}: {failure}"))
    return done


async def _networks(host: Host, *, dry_run: bool) -> list[tuple[str, str]]:
    """Take away the networks that were made for taps and have none; return what was there."""
    from pyqemu_ifup.made.network import find_left, leave

    found = await find_left(host)
    gone = []
    for network, bridge in found:
        if dry_run or await leave(host, network):
            gone.append((network, bridge))
    return gone


def _tables(
    host: Host, policy: Policy | Failure, failures: list[Failure], *, dry_run: bool
) -> Iterator[tuple[str, str]]:
    """Load the tables that are not as they were loaded; yield their networks, and what was wrong.

    One that fails, or that the policy does not have, keeps no other from being looked at.
    """
    from pyqemu_ifup.made.guard import find_guarded, forget_flows, guard

    in_force = policy if isinstance(policy, Policy) else None
    for network, each in find_guarded(in_force, host.kernel.links()).items():
        try:
            fault = host.finish(guard(host, network, each.bridge, each.made, dry_run=dry_run))
            if fault and each.made is None:
                raise Failure(
                    Status.REFUSED,
                    f"the nft table of network {network} is {fault}",
                    "the policy does not have what to load",
                    each.remedy,
                )
            if fault and each.made is not None and not dry_run:
                host.finish(forget_flows(host, network, each.made))
        except Failure as failure:
            failures.append(failure)
            continue
        if fault:
            yield network, f"it was {fault}"


def _mute(leftover: Leftover) -> Failure:
    return Failure(
        Status.TRY_AGAIN,
        f"{readable(leftover.port.name)} is out of the database at {readable(leftover.port.ovsdb)}",
        "but ovs-vswitchd does not answer",
        "it lets the port go when it runs again",
    )


def as_object(
    ended: list[Ended],
    found: list[Leftover],
    networks: list[tuple[str, str]],
    tables: list[tuple[str, str]],
    held: list[Ended],
    strays: list[Stray],
) -> str:
    """Return what was found as JSON."""

    def entry(leftover: Leftover) -> dict[str, object]:
        port = leftover.port
        return {"tap": port.name, "bridge": port.bridge, "because": leftover.because}

    return to_json(
        {
            "removed": [
                *(
                    {"tap": each.link.name, "bridge": bridge_of(each), "because": each.because}
                    for each in ended
                ),
                *(entry(leftover) for leftover in found if leftover.remove is not None),
                *({"tap": each.name, "bridge": None, "because": each.because} for each in strays),
            ],
            "kept": [
                *(entry(leftover) for leftover in found if leftover.remove is None),
                *(
                    {"tap": each.link.name, "bridge": bridge_of(each), "because": each.because}
                    for each in held
                ),
            ],
            "networks": [{"network": name, "bridge": bridge or None} for name, bridge in networks],
            "tables": [{"network": name, "because": because} for name, because in tables],
        }
    )


def bridge_of(ended: Ended) -> str | None:
    """Return the bridge that the tap's mark names."""
    return ended.link.mark.bridge if ended.link.mark is not None else None


def as_text(
    ended: list[Ended],
    found: list[Leftover],
    networks: list[tuple[str, str]],
    tables: list[tuple[str, str]],
    held: list[Ended],
    strays: list[Stray],
    *,
    dry_run: bool,
    all_seen: bool,
) -> str:
    """Return what was found, a line for each, what was removed first.

    That there is nothing to remove is said only where `all_seen`.
    """
    did = "would remove" if dry_run else "removed"
    lines = [
        f"{did} {readable(each.link.name)} from {readable(bridge_of(each) or '')}: {each.because}"
        for each in ended
    ]
    lines += [f"{did} {readable(each.name)}: {each.because}" for each in strays]
    for leftover in sorted(found, key=lambda each: each.remove is None):
        if leftover.remove is None:
            did, where = "kept", "on"
        else:
            did, where = ("would remove" if dry_run else "removed"), "from"
        bridge = f" {where} {readable(leftover.port.bridge)}" if leftover.port.bridge else ""
        lines.append(f"{did} {readable(leftover.port.name)}{bridge}: {leftover.because}")
    for network, bridge in networks:
        did = "would take away" if dry_run else "took away"
        where = f" and its bridge {readable(bridge)}" if bridge else ""
        lines.append(f"{did} network {readable(network)}{where}: no tap is on it")
    for network, because in tables:
        did = "would load" if dry_run else "loaded"
        lines.append(f"{did} the nft table of network {network} again: {because}")
    if all_seen and len(lines) == len(found) and all(each.remove is None for each in found):
        lines += [
            f"kept {readable(each.link.name)} on {readable(bridge_of(each) or '')}: {each.because}"
            for each in held
        ]
        lines.append("nothing to remove")
    return "".join(f"{line}\n" for line in lines)
