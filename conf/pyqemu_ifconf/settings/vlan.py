"""The VLANs of a port."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

VID_MIN, VID_MAX = 1, 4094


@dataclass(frozen=True, repr=False)
class Vids(Sequence[int]):
    """VIDs, ascending. Each is one bit, for the rules of a policy may have millions of them."""

    bits: int

    def __len__(self) -> int:
        return self.bits.bit_count()

    def __iter__(self) -> Iterator[int]:
        return (vid for vid, bit in enumerate(reversed(f"{self.bits:b}")) if bit == "1")

    def __contains__(self, vid: object) -> bool:
        return isinstance(vid, int) and vid >= 0 and bool(self.bits >> vid & 1)

    def __getitem__(self, at: Any) -> Any:
        return tuple(self)[at]

    def __repr__(self) -> str:
        return f"Vids{tuple(self)}"


@dataclass(frozen=True)
class Vlan:
    """The VIDs of one port: `native` untagged both ways, `trunk` tagged, ascending.

    An access port has `native` alone. A trunk without a native VLAN has native None. `trunk` may be
    given as any sequence of numbers, which becomes Vids.
    """

    native: int | None
    trunk: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.trunk, Vids):
            object.__setattr__(self, "trunk", Vids(sum(1 << vid for vid in set(self.trunk))))

    @property
    def takes_all(self) -> bool:
        """Whether all frames pass as they are, tagged or not: it is `any`."""
        return self == ANY


ANY = Vlan(None, Vids((1 << (VID_MAX + 1)) - 1))
"""`any`: all frames pass as they are, tagged or not. No other Vlan has VID 0, which is no VLAN."""
