"""pyqemu-ifctl info: what a running guest and this host say of its NICs, side by side."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pyqemu_ifconf.shell import readable, shown
from pyqemu_ifctl.answer import TIMEOUT, Answer, add_json, count, json_vlan, to_json, wrap
from pyqemu_ifctl.program import PROGRAM
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.hook import narrator, within_deadline
from pyqemu_ifup.look import show_vlan

if TYPE_CHECKING:
    from pyqemu_ifctl.qemu.cards import Card, View
    from pyqemu_ifctl.qemu.qmp import Backend


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options and arguments."""
    add_json(parser)
    parser.add_argument("vm", metavar="VM", nargs="?", help="of this one only")
    parser.add_argument("--qmp", metavar="PATH", help="its QMP socket")


def run(args: argparse.Namespace) -> Answer:
    """Show the NICs of running guests. Raises Failure."""
    with within_deadline(TIMEOUT, hook=False) as deadline:
        answer = info(
            args.vm, args.qmp, os.environ, deadline, narrator(PROGRAM, None), as_json=args.json
        )
    return answer.by_name()


def info(
    vm: str | None,
    qmp: str | None,
    environ: Mapping[str, str],
    deadline: Deadline,
    tell: Callable[[str], None],
    *,
    as_json: bool,
) -> Answer:
    """Show the NICs of every running guest, or of the guest `vm`; `qmp` names its QMP socket.

    Raises Failure as `find_views`.
    """
    from pyqemu_ifctl.qemu.cards import find_views

    seen = find_views(vm, qmp, environ, deadline, tell)
    out = as_object(seen.views) if as_json else as_text(seen.views)
    return Answer(out, seen.status, seen.remarks)


def as_text(views: list[View]) -> str:
    """Return the guests for a person, in lines that fit the terminal."""
    from pyqemu_ifctl.qemu.cards import name_of
    from pyqemu_ifctl.qemu.qmp import show

    if not views:
        return "no QEMU runs here\n"
    lines: list[str] = []
    for view in views:
        lines += [""] if lines else []
        where = f", QMP {readable(show(view.monitor))}" if view.monitor is not None else ""
        lines.append(f"{name_of(view.guest)}, pid {view.guest.pid}{where}")
        lines += [f"  not known of its NICs: {view.missing}"] if view.missing else []
        if not view.cards and not view.missing:
            lines.append("  no NIC")
        for card in view.cards:
            lines += _card_lines(card)
    return "".join(f"{each}\n" for line in lines for each in wrap(shown(line), "      "))


def _card_lines(card: Card) -> list[str]:
    nic = card.nic
    lines = []
    if nic is not None:
        bus = f"{readable(nic.bus)} " if nic.bus is not None else ""
        place = f" at {bus}{nic.addr}" if nic.addr is not None else ""
        lines.append(f"  {readable(nic.name)}: {readable(nic.model)} {readable(nic.mac)}{place}")
        lines += [f"    hub {nic.hub}"] if nic.hub is not None else []
        lines += [f"    {_backend_words(each)}" for each in nic.backends]
        if card.tap is None and nic.hub is None and any(e.type == "tap" for e in nic.backends):
            lines.append("    which tap it is on is not known")
    elif card.joint is not None:
        lines.append(f"  hub {card.joint.hub}, without a NIC")
        lines += [f"    {_backend_words(each)}" for each in card.joint.backends]
    elif card.tap is not None:
        lines.append(f"  tap {readable(card.tap)}")
    if card.side is not None:
        row = card.side.row
        words = [f"on {readable(row.bridge)}" if row.bridge is not None else "on no bridge"]
        words += [f"vlan {show_vlan(row.vlan)}"] if row.vlan is not None else []
        words += [f"mtu {row.mtu}"]
        words += [f"network {readable(row.network)}"] if row.network is not None else []
        lines.append(f"    {readable(row.tap)} {', '.join(words)}")
    if card.side is not None and card.side.counters is not None:
        # NOTE: what the tap receives is what the guest has sent.
        it = card.side.counters
        lines.append(
            f"    the guest received {_amount(it.tx_packets, it.tx_bytes, it.tx_dropped)}, "
            f"sent {_amount(it.rx_packets, it.rx_bytes, it.rx_dropped)}"
        )
    return lines + [f"    ! {fault}" for fault in card.faults]


def _backend_words(backend: Backend) -> str:
    queues = f", {count(backend.queues, 'queue')}" if backend.queues > 1 else ""
    words = f" ({readable(backend.words)})" if backend.type != "tap" and backend.words else ""
    return f"netdev {readable(backend.id)}, {readable(backend.type)}{words}{queues}"


def _amount(packets: int, size: int, dropped: int) -> str:
    lost = f" ({dropped} dropped)" if dropped else ""
    return f"{count(packets, 'packet')}, {size} bytes{lost}"


def as_object(views: list[View]) -> str:
    """Return the guests as JSON."""
    from pyqemu_ifctl.qemu.qmp import show

    return to_json(
        {
            "guests": [
                {
                    "vm": view.guest.vm,
                    "pid": view.guest.pid,
                    "qmp": show(view.monitor) if view.monitor is not None else None,
                    "missing": view.missing or None,
                    "nics": [_entry(card) for card in view.cards],
                }
                for view in views
            ]
        }
    )


def _entry(card: Card) -> dict[str, object]:
    nic, side = card.nic, card.side
    hub = nic or card.joint
    host: dict[str, object] | None = None
    if side is not None:
        row, it = side.row, side.counters
        host = {
            "tap": row.tap,
            "ifindex": row.ifindex,
            "kind": row.kind,
            "bridge": row.bridge,
            "network": row.network,
            "vlan": json_vlan(row.vlan),
            "mtu": row.mtu,
            "state": row.state,
            "received": _counted(it.tx_packets, it.tx_bytes, it.tx_dropped) if it else None,
            "sent": _counted(it.rx_packets, it.rx_bytes, it.rx_dropped) if it else None,
        }
    return {
        "nic": nic.name if nic else None,
        "model": nic.model if nic else None,
        "mac": nic.mac if nic else None,
        "bus": nic.bus if nic else None,
        "addr": nic.addr if nic else None,
        "host_mtu": nic.host_mtu if nic else None,
        "hub": hub.hub if hub else None,
        "backends": [
            {"id": each.id, "type": each.type, "queues": each.queues}
            for each in (hub.backends if hub else ())
        ],
        "tap": card.tap,
        "host": host,
        "faults": list(card.faults),
    }


def _counted(packets: int, size: int, dropped: int) -> dict[str, int]:
    return {"packets": packets, "bytes": size, "dropped": dropped}
