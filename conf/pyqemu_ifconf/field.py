"""What one field of the policy language is; the table of them all is in fields.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyqemu_ifconf.values import Type

Where = Literal["top", "network", "rule", "nat", "vm", "nic", "user", "port"]
"""Where a field may stand; a "port" setting stands on a network, on a rule and on a NIC."""


@dataclass(frozen=True)
class Field:
    """One field of the policy language: its name, where it may stand, how it is read, and why."""

    name: str
    where: Where
    type: Type
    about: str
    required: bool = False
