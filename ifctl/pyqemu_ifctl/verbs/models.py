"""pyqemu-ifctl models: the NIC models that a QEMU really has."""

from __future__ import annotations

import argparse

from pyqemu_ifctl.answer import Answer, add_json, lay_out, to_json
from pyqemu_ifctl.qemu.binary import DEFAULT_QEMU, Model, find_qemu, models_of

HEADS = ("MODEL", "BUS", "ALIAS", "DESCRIPTION")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options and arguments."""
    add_json(parser)
    parser.add_argument(
        "qemu", metavar="QEMU", nargs="?", default=DEFAULT_QEMU, help=f"({DEFAULT_QEMU})"
    )


def run(args: argparse.Namespace) -> Answer:
    """Print the NIC models of a QEMU. Raises Failure."""
    return models(args.qemu, as_json=args.json)


def models(qemu: str, *, as_json: bool) -> Answer:
    """Print the NIC models of the QEMU as a table, or as JSON. Raises Failure."""
    path = find_qemu(qemu)
    found = models_of(path)
    if as_json:
        return Answer(to_json({"qemu": path, "models": [_entry(model) for model in found]}))
    table = lay_out(HEADS, [_cells(model) for model in found], (3,))
    return Answer("".join(f"{line}\n" for line in table.lines))


def _entry(model: Model) -> dict[str, str | None]:
    return {
        "model": model.name,
        "bus": model.bus,
        "alias": model.alias,
        "description": model.description,
    }


def _cells(model: Model) -> tuple[str, ...]:
    return tuple(cell or "-" for cell in (model.name, model.bus, model.alias, model.description))
