"""The policy as values, and the two questions it answers: which rule decides, and which Port.

Nothing here touches a file, the network or a library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Union

Kind = Literal["linux", "openvswitch"]
MatchKey = Literal["tap", "vm", "netdev", "mac", "user"]
MATCH_KEYS: tuple[MatchKey, ...] = ("tap", "vm", "netdev", "mac", "user")

DEFAULT_OVSDB = "unix:/run/openvswitch/db.sock"
DEFAULT_TIMEOUT = 10
"""Seconds that an up may take where the policy says nothing."""


@dataclass(frozen=True)
class Place:
    """Where something stands in a policy; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Caller:
    """Who is asking: the tap's name and what is known of the QEMU that opened it.

    None is unknown, and what is unknown matches nothing, not even `*`.
    """

    tap: str
    vm: str | None = None
    netdev: str | None = None
    mac: str | None = None
    user: str | None = None


@dataclass(frozen=True)
class Vlan:
    """The VIDs of one port: `native` untagged both ways, `trunk` tagged, ascending.

    An access port is `native` alone; a trunk without a native VLAN has native None.
    """

    native: int | None
    trunk: tuple[int, ...] = ()


@dataclass(frozen=True)
class Port:
    """The complete wanted state of one tap.

    `kind` None: looked up. `mtu` None: the bridge's own. `vlan` None: the bridge's untagged
    network. `txqueuelen` None: left alone.
    """

    tap: str
    network: str
    bridge: str
    place: Place
    kind: Kind | None = None
    ovsdb: str = DEFAULT_OVSDB
    mtu: int | None = None
    vlan: Vlan | None = None
    isolated: bool = False
    external_ids: tuple[tuple[str, str], ...] = ()
    txqueuelen: int | None = None


@dataclass(frozen=True)
class Settings:
    """Port settings as one network or rule gives them: name -> value, absent where not given.

    The value None is the word `none`: it unsets what the network gave. `mtu: bridge` is the
    string "bridge", `external_ids` a tuple of pairs.
    """

    given: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """A place that taps can be plugged in, and its ports' default settings."""

    name: str
    place: Place
    bridge: str
    kind: Kind | None = None
    ovsdb: str = DEFAULT_OVSDB
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Rule:
    """Who goes where: `match` holds each key's globs; exactly one of `network`, `deny` is set."""

    place: Place
    match: Mapping[MatchKey, tuple[str, ...]]
    network: str | None = None
    deny: str | None = None
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Policy:
    """All of a host's policy; `files` in the order read, `rules` from the top."""

    files: tuple[str, ...]
    networks: Mapping[str, Network]
    rules: tuple[Rule, ...]
    timeout: int = DEFAULT_TIMEOUT


@dataclass(frozen=True)
class PassedOver:
    """A rule that did not match, and why: "tap web* does not match db0", "vm is unknown"."""

    rule: Rule
    because: str


@dataclass(frozen=True)
class Attach:
    """A rule (or the program's own name, rule None) puts the tap on a network."""

    port: Port
    rule: Rule | None
    passed_over: tuple[PassedOver, ...] = ()


@dataclass(frozen=True)
class Deny:
    """A `deny` rule, or no rule at all (rule None), refuses the tap; `because` is the text."""

    because: str
    rule: Rule | None
    passed_over: tuple[PassedOver, ...] = ()


Decision = Union[Attach, Deny]
