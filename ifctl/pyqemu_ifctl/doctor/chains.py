"""The packet filters of this host, as doctor looks at them."""

from __future__ import annotations

import os
import shutil
import time
from functools import partial

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifctl.bounded import Parts
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers import nft_program as nft
from pyqemu_ifup.drivers.nft_program import DroppingChain
from pyqemu_ifup.drivers.programs import run_program
from pyqemu_ifup.hook import SAFE_PATH
from pyqemu_ifup.task import finish

FILTER_SECONDS = 2.0
"""Seconds that nft may take, and each program of iptables: less than a part, which kills none."""
KILLING = 0.2
"""Seconds that are left to kill a program when the time is up."""


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read().strip()


def look_at_filters(
    parts: Parts, deadline: Deadline
) -> tuple[tuple[DroppingChain, ...], list[str]]:
    """Return the chains that drop, and what may not be seen; a mute program hides no other's."""
    chains: list[DroppingChain] = []
    unseen: list[str] = []
    looks = {"the nftables rules": _nft_chains}
    for kind, family in (("iptables", "ip"), ("ip6tables", "ip6")):
        looks[f"the rules of {kind}"] = partial(_legacy_chains, kind, family)
    for what, chains_of in looks.items():
        limit = deadline.child(max(0.0, min(FILTER_SECONDS, deadline.remaining() - KILLING)))
        if not limit.remaining():
            parts.missed.append(f"{what}: the time was up before")
            continue
        try:
            chains += parts.take_apart(what, partial(chains_of, limit)) or ()
        except Failure as failure:
            if failure.status == Status.TRY_AGAIN:
                raise
            unseen.append(": ".join(filter(None, (what, failure.what, failure.why))))
    return tuple(chains), unseen


def _nft_chains(limit: Deadline) -> list[DroppingChain]:
    """Return the chains of nftables that drop. Raises Failure."""
    if not nft.is_there():
        raise Failure(Status.UNAVAILABLE, "there is no nft(8) on this host")
    return finish(nft.find_dropping_chains(limit), time.sleep)


def _legacy_chains(kind: str, family: str, limit: Deadline) -> list[DroppingChain]:
    """Return the chains of iptables in its legacy form that drop. Raises Failure."""
    try:
        if "filter" not in _read(f"/proc/net/{family}_tables_names").split():
            return []
    except FileNotFoundError:
        return []
    except PermissionError as error:
        root = "run as root" if os.geteuid() != 0 else "this root may not read them"
        raise Failure(Status.DENIED, "they may not be read", root) from error
    form = "in its legacy form"
    program = shutil.which(f"{kind}-legacy", path=SAFE_PATH)
    if program is None:
        raise Failure(Status.UNAVAILABLE, form, "no program")
    done = finish(run_program([program, "-S", "FORWARD"], limit), time.sleep)
    if done.status != 0:
        lines = done.err.split("\n")
        why = lines[0].strip() or f"{program} has ended {done.status}"
        raise Failure(Status.UNAVAILABLE, form, why)
    return read_forward(family, done.out)


def read_forward(family: str, printed: str) -> list[DroppingChain]:
    """Return the chain FORWARD, if it drops, from what `iptables-legacy -S FORWARD` prints."""
    lines = [line.split() for line in printed.split("\n")]
    if ["-P", "FORWARD", "DROP"] not in lines:
        return []
    ways = {"-i": "iifname", "-o": "oifname"}
    accepts = {
        (ways[words[2]], words[3])
        for words in lines
        if len(words) == 6 and words[2] in ways and words[4:] == ["-j", "ACCEPT"]
    }
    return [DroppingChain(family, "filter", "FORWARD", "forward", None, frozenset(accepts), True)]


def called_tables() -> frozenset[str]:
    """Return the kinds of tables that bridged frames go through."""
    called = set()
    for kind in ("iptables", "ip6tables"):
        try:
            if _read(f"/proc/sys/net/bridge/bridge-nf-call-{kind}") == "1":
                called.add(kind)
        except FileNotFoundError:
            # br_netfilter is not loaded.
            continue
    return frozenset(called)
