"""pyqemu-ifctl status --graph: guests, taps, VLANs, bridges and uplinks as a picture.

In the language of graphviz (dot(1)), whose own program makes an SVG of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds import SPECS
from pyqemu_ifconf.policy import Vlan
from pyqemu_ifconf.shell import shown
from pyqemu_ifctl.answer import width
from pyqemu_ifctl.taps import Row, State
from pyqemu_ifup import kinds
from pyqemu_ifup.drivers.programs import run_as_is
from pyqemu_ifup.kinds.snapshot import Snapshot
from pyqemu_ifup.kinds.view import UNTAGGED, Uplink
from pyqemu_ifup.look import show_vlan

NAME_MAX = 40
"""Columns of a guest's name that are drawn."""
COLOURS: dict[State | None, str] = {
    "ok": "#2e7d32",
    "differs": "#e65100",
    "foreign": "#616161",
    "loose": "#616161",
    "left": "#616161",
    "stale": "#c62828",
    "elsewhere": "#616161",
    None: "#c62828",
}
"""The line of a tap in each state."""
HEAD = """\
graph taps {
  graph [rankdir=LR, ranksep=1.1, nodesep=0.08, fontname="sans-serif", fontsize=12];
  node [shape=box, style=filled, fillcolor=white, fontname="sans-serif", fontsize=10,
        height=0.25, margin="0.08,0.03"];
  edge [color="#757575", tailport=e, headport=w];
  left [style=invis]; middle [style=invis]; left -- middle [style=invis];
"""


@dataclass(frozen=True)
class Bridge:
    """A bridge and what is on it."""

    name: str
    kind: str
    uplinks: tuple[Uplink, ...]


def as_dot(rows: Iterable[Row], snapshot: Snapshot) -> str:
    """Return the picture in graphviz's language: what a guest named itself is text and no more."""
    rows = list(rows)
    lines = [HEAD]
    guests: dict[tuple[int | None, str | None], str] = {}
    vlans: dict[tuple[str, str, Vlan | None], str] = {}
    for number, row in enumerate(rows):
        who = (row.pid, row.vm)
        if row.pid is not None and who not in guests:
            guests[who] = f"guest{len(guests)}"
            name = _cut(row.vm) if row.vm else "no name"
            lines.append(
                f"  {guests[who]} [label={_quoted(name, f'pid {row.pid}')}, "
                'fillcolor="#e3f2fd", style="filled,rounded"];'
            )
        colour, dashed = COLOURS[row.state], "" if row.bridge else ",dashed"
        state = [] if row.state == "ok" else [row.state or "not known"]
        lines.append(
            f"  tap{number} [label={_quoted(row.tap, *state)}, color={_quoted(colour)}, "
            f'style="filled{dashed}"];'
        )
        if who in guests:
            lines.append(f"  {guests[who]} -- tap{number};")
        else:
            # What is unseen keeps it in its column.
            lines.append(f"  left -- tap{number} [style=invis];")
        if row.bridge:
            place = (row.kind or "", row.bridge, row.vlan)
            vlans.setdefault(place, f"vlan{len(vlans)}")
            isolated = ' [style=dashed, tooltip="isolated"]' if row.isolated else ""
            lines.append(f"  tap{number} -- {vlans[place]}{isolated};")
    places = {(kind, name) for kind, name, _ in vlans}
    for number, bridge in enumerate(find_bridges(places, snapshot)):
        own = {
            vlan: node
            for (kind, name, vlan), node in vlans.items()
            if (kind, name) == (bridge.kind, bridge.name)
        }
        lines += _bridge_lines(number, bridge, own)
    return "\n".join([*lines, "}"]) + "\n"


def _bridge_lines(number: int, bridge: Bridge, vlans: dict[Vlan | None, str]) -> list[str]:
    words = next((spec.label for spec in SPECS if spec.name == bridge.kind), "")
    title = _quoted(f"{bridge.name} ({words})" if words else bridge.name)
    lines = [
        f"  subgraph cluster{number} {{",
        f'    label={title}; style="rounded,filled"; fillcolor="#f5f5f5"; color="#9e9e9e";',
    ]
    for vlan, node in sorted(vlans.items(), key=lambda each: sorted(_vids(each[0]))):
        text = f"VLAN {show_vlan(vlan)}" if vlan is not None else "no VLAN"
        lines.append(f'    {node} [label={_quoted(_cut(text))}, fillcolor="#fff8e1"];')
    if not vlans:
        lines.append(f'    bridge{number} [label="no taps", style=dashed];')
    lines.append("  }")
    if not vlans:
        lines.append(f"  middle -- bridge{number} [style=invis];")
    for at, uplink in enumerate(bridge.uplinks):
        node = f"uplink{number}_{at}"
        lines.append(f'  {node} [label={_quoted(uplink.name)}, shape=cds, fillcolor="#e8f5e9"];')
        ends = [
            end for vlan, end in vlans.items() if uplink.vids is None or _vids(vlan) & uplink.vids
        ]
        lines += [f"  {end} -- {node};" for end in (ends if vlans else [f"bridge{number}"])]
    return lines


def find_bridges(places: Iterable[tuple[str, str]], snapshot: Snapshot) -> list[Bridge]:
    """Return the bridges that taps are on and those that the policy names, with their uplinks."""
    wanted = set(places)
    for view in kinds.views():
        named = snapshot.networks_on(view.kind)
        wanted.update((view.kind.name, network.place.name) for network in named)
    uplinks = {view.kind.name: view.uplinks for view in kinds.views()}
    return [
        Bridge(
            name,
            kind,
            tuple(
                sorted(uplinks[kind](snapshot, name, ()), key=lambda each: each.name)
                if kind in uplinks
                else ()
            ),
        )
        for kind, name in sorted(wanted)
    ]


def _vids(vlan: Vlan | None) -> frozenset[int]:
    """Return the VIDs of a port, UNTAGGED if it has no VLAN."""
    if vlan is None:
        return frozenset({UNTAGGED})
    native = {vlan.native} if vlan.native is not None else set()
    return frozenset({*native, *vlan.trunk})


def _cut(text: str) -> str:
    text = shown(text)
    if width(text) <= NAME_MAX:
        return text
    while width(text) >= NAME_MAX:
        text = text[:-1]
    return f"{text}~"


def _quoted(*lines: str) -> str:
    """Return the lines as one string of graphviz's, in which it finds no escape and no entity."""
    plain = (
        shown(line).replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")
        for line in lines
    )
    return '"' + "\\n".join(plain) + '"'


def as_svg(dot: str, seconds: float) -> str:
    """Return the picture as SVG, drawn by graphviz.

    Raises Failure: 69 if that is not installed, 71 if it fails, 75 after so long.
    """
    program = shutil.which("dot")
    if program is None:
        raise Failure(
            Status.UNAVAILABLE,
            "cannot draw",
            "graphviz is not installed: there is no program dot",
            "install the package graphviz, or take --graph dot",
        )
    try:
        done = run_as_is([program, "-Tsvg"], seconds, dot)
    except TimeoutError as error:
        raise Failure(
            Status.TRY_AGAIN,
            f"graphviz has not drawn it in {seconds:.0f} s",
            "",
            "take --graph dot, and draw it elsewhere",
        ) from error
    if done.status != 0:
        raise Failure(
            Status.REFUSED,
            "graphviz cannot draw it",
            done.err.strip().partition("\n")[0],
            "take --graph dot, and see what is wrong with it",
        )
    return done.out
