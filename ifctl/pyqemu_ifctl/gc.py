"""pyqemu-ifctl gc: remove what is ours and whose tap is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifctl.answer import Answer, shown, to_json
from pyqemu_ifctl.databases import addresses, open_each, read_policy, worst
from pyqemu_ifdown.gc import Leftover, collect
from pyqemu_ifup.host import Host
from pyqemu_ifup.manners import Watch


def gc(
    tap: str | None,
    environ: Mapping[str, str],
    watch: Watch,
    tell: Callable[[str], None],
    *,
    dry_run: bool,
    as_json: bool,
) -> Answer:
    """Remove the ports of ours whose tap is gone, of `tap` alone where given; tell what was done.

    A database that fails does not keep the others from being looked at.
    """
    found: list[Leftover] = []
    failures: list[Failure] = []
    policy = read_policy(environ)
    with Host(tap, watch, tell) as host:
        failures += open_each(host, addresses(policy)).values()
        try:
            for leftover, let_go in collect(host, watch, tap=tap, dry_run=dry_run):
                found.append(leftover)
                if not let_go:
                    failures.append(_mute(leftover))
        except Failure as failure:
            failures.append(failure)
    remarks = [str(failure) for failure in failures]
    if isinstance(policy, Failure):
        remarks.insert(0, f"only the default database is looked at: {policy}")
    if as_json:
        out = as_object(found)
    else:
        out = as_text(found, dry_run=dry_run, all_seen=not failures)
    return Answer(out, worst(failures), tuple(remarks))


def _mute(leftover: Leftover) -> Failure:
    return Failure(
        Status.TRY_AGAIN,
        f"{leftover.port.name} is out of the database at {leftover.port.ovsdb}",
        "but ovs-vswitchd does not answer",
        "it lets the port go when it runs again",
    )


def as_object(found: list[Leftover]) -> str:
    """Return what was found as JSON."""
    def entry(leftover: Leftover) -> dict[str, object]:
        port = leftover.port
        return {"tap": port.name, "bridge": port.bridge, "because": leftover.because}

    return to_json({
        "removed": [entry(leftover) for leftover in found if leftover.remove is not None],
        "kept": [entry(leftover) for leftover in found if leftover.remove is None],
    })


def as_text(found: list[Leftover], *, dry_run: bool, all_seen: bool) -> str:
    """Return what was found, a line for each, what was removed first.

    That there is nothing to remove is said only where `all_seen`.
    """
    lines = []
    for leftover in sorted(found, key=lambda each: each.remove is None):
        if leftover.remove is None:
            did, where = "kept", "on"
        else:
            did, where = ("would remove" if dry_run else "removed"), "from"
        bridge = f" {where} {shown(leftover.port.bridge)}" if leftover.port.bridge else ""
        lines.append(f"{did} {shown(leftover.port.name)}{bridge}: {leftover.because}")
    if all_seen and all(leftover.remove is None for leftover in found):
        lines.append("nothing to remove")
    return "".join(f"{line}\n" for line in lines)
