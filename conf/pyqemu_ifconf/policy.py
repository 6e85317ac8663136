"""The policy as values, and the two questions it answers: which rule decides, and which Port.

Nothing here touches a file, the network or a library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.globs import matches
from pyqemu_ifconf.index import MatchKey as MatchKey
from pyqemu_ifconf.index import RuleIndex, fold
from pyqemu_ifconf.kinds import spec_at
from pyqemu_ifconf.kinds.base import KindName, Place
from pyqemu_ifconf.settings.port import PortSettings as PortSettings
from pyqemu_ifconf.settings.vlan import Vids as Vids
from pyqemu_ifconf.settings.vlan import Vlan as Vlan
from pyqemu_ifconf.shell import readable

Kind = KindName
MATCH_KEYS: tuple[MatchKey, ...] = ("tap", "vm", "netdev", "mac", "user")
SAID_KEYS: tuple[MatchKey, ...] = ("vm", "netdev", "mac")
"""The keys whose values a process says of itself, on its command line."""

POLICY_VARIABLE = "PYQEMU_IFUP_POLICY"
"""The environment variable that names a file in place of the host's policy."""
DEFAULT_TIMEOUT = 10
"""Seconds that an up may take if the policy says nothing."""


DEFAULT_MAX_TAPS = 16
"""Taps that one user may have on a network if the policy says nothing."""
DEFAULT_TAP_NAME = "tap%d"
DEFAULT_MTU = 1500
"""The MTU, in bytes, of a bridge that we make."""
DEFAULT_MODEL = "virtio-net-pci"


@dataclass(frozen=True)
class Position:
    """The place of something in a policy; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def name(self) -> str:
        """The position without the file's folder, as marks and syslog have it."""
        return f"{self.file.rpartition('/')[2]}:{self.line}"


@dataclass(frozen=True)
class Caller:
    """Who is asking: the tap's name and what is known of the QEMU that opened it.

    None is unknown. An unknown value matches nothing, not even `*`. `unprivileged`: the user who
    asks has no privilege, so what the user can make up changes no settings. `root_made`: root has
    made the tap for that user. `joined` are the other taps, in words, that the QEMU has on the same
    hub. `unclear` says why netdev or MAC is not known.
    """

    tap: str
    vm: str | None = None
    netdev: str | None = None
    mac: str | None = None
    user: str | None = None
    unprivileged: bool = False
    root_made: bool = False
    joined: tuple[str, ...] = ()
    unclear: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Forward:
    """A port of the host's that leads to a port of a guest's.

    An empty `address` is any of the host's; an empty `to_address` is the only guest's.
    `protocol` is `tcp` or `udp`.
    """

    protocol: str
    address: str
    port: int
    to_address: str
    to_port: int


@dataclass(frozen=True)
class Service:
    """Ports of the host's own that guests reach, `first` to `last`, of `tcp` or `udp`."""

    protocol: str
    first: int
    last: int


@dataclass(frozen=True)
class Dhcp:
    """Which addresses guests get: of `range`, None for all the subnet; and by MAC in `hosts`."""

    range: tuple[str, str] | None = None
    hosts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Nat:
    """A network that we make, with NAT.

    `ipv4` and `ipv6` are the host's own addresses, as ADDRESS/LENGTH. `dhcp` None: there is none.
    `dns` is the guests' domain: empty for none, None if no names are resolved. `host` are the ports
    of this host's that guests reach beside DHCP and DNS, None for all. `mtu` is the bridge's, in
    bytes.
    """

    ipv4: str | None = None
    ipv6: str | None = None
    dhcp: Dhcp | None = None
    dns: str | None = None
    forward: tuple[Forward, ...] = ()
    outbound: bool = True
    host: tuple[Service, ...] | None = None
    mtu: int = DEFAULT_MTU


Made = Nat
"""How a network is made for its first port; each way is a value of its own."""


@dataclass(frozen=True)
class Port:
    """The complete wanted state of one port.

    `place` is where it is, in the words of its network's kind, and `settings` what it is given
    there. `made` is how the network is made if it is not there, None if others make it.
    """

    tap: str
    network: str
    place: Place
    position: Position
    settings: PortSettings = field(default_factory=PortSettings)
    made: Made | None = None


@dataclass(frozen=True)
class Settings:
    """Port settings as one network, rule or NIC gives them: name -> value, absent if not given.

    The value None is the word `none`, which unsets what the network gave. `mtu: bridge` is the
    string "bridge". `external_ids` is a tuple of pairs, whose values may be None too.
    """

    given: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """What guests can be plugged in, and the default settings of its ports.

    `place` is where the ports are, in the words of the network's kind. `made` is how the network is
    made for its first port, None if others make it. `users` and `deny_users` are login names and
    `@group`, as in the policy. `max_taps` and `tap_name` are for the taps that those users get.
    """

    name: str
    position: Position
    place: Place
    settings: Settings = field(default_factory=Settings)
    users: tuple[str, ...] = ()
    deny_users: tuple[str, ...] = ()
    max_taps: int = DEFAULT_MAX_TAPS
    tap_name: str = DEFAULT_TAP_NAME
    made: Made | None = None

    @property
    def kind(self) -> Kind | None:
        """The kind that the policy says, None if it is looked up."""
        spec = spec_at(self.place)
        return spec.name if spec is not None else None


@dataclass(frozen=True)
class Rule:
    """Who goes where: `match` holds each key's globs.

    Exactly one of `network`, `deny` and `leave` is set. `leave`: the tap stays as it is. `of_nic`:
    the rule is made of a NIC of `vms`, for that NIC's tap.
    """

    position: Position
    match: Mapping[MatchKey, tuple[str, ...]]
    network: str | None = None
    deny: str | None = None
    settings: Settings = field(default_factory=Settings)
    of_nic: bool = False
    leave: bool = False


@dataclass(frozen=True)
class UserMode:
    """QEMU's user-mode network; None is QEMU's own choice.

    `ipv4` and `ipv6` are ADDRESS/LENGTH, or False for none.
    """

    ipv4: str | Literal[False] | None = None
    ipv6: str | Literal[False] | None = None
    restrict: bool = False
    hostname: str | None = None
    dns: str | None = None
    search: tuple[str, ...] = ()
    forward: tuple[Forward, ...] = ()


@dataclass(frozen=True)
class Nic:
    """A NIC of a guest's: on a `network`, by its `tap`, or on a user-mode network of its own.

    `mac` None: it is made of the host, the guest and the NIC. `vectors` None: as many as the queues
    need.
    """

    position: Position
    id: str
    network: str | None = None
    tap: str = ""
    user: UserMode | None = None
    model: str = DEFAULT_MODEL
    mac: str | None = None
    queues: int = 1
    vectors: int | None = None
    bus: str | None = None
    addr: str | None = None
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Vm:
    """A guest and its NICs, in order.

    `users` are those users of its networks who may have its taps, None for all of them.
    """

    name: str
    position: Position
    nics: tuple[Nic, ...]
    users: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Policy:
    """All of a host's policy; `files` in the order read, `rules` from the top.

    `bridge_conf`: QEMU's bridge.conf says too who may use which bridge. The first rules are made of
    the NICs of `vms` that have a tap.
    """

    files: tuple[str, ...]
    networks: Mapping[str, Network]
    rules: tuple[Rule, ...]
    timeout: int = DEFAULT_TIMEOUT
    bridge_conf: bool = False
    vms: Mapping[str, Vm] = field(default_factory=dict)

    @property
    def databases(self) -> tuple[str, ...]:
        """The databases of its networks; a tap's name is looked up in each."""
        addresses = (each for it in self.networks.values() for each in it.place.databases)
        return tuple(dict.fromkeys(addresses))

    @cached_property
    def index(self) -> RuleIndex:
        """An index of the rules, made when it is first asked for."""
        return RuleIndex([rule.match for rule in self.rules])


@dataclass(frozen=True)
class PassedOver:
    """A rule that did not decide, and why: "tap web* does not match db0", "vm is unknown".

    A rule that matches does not count if it changes an unprivileged user's settings.
    """

    rule: Rule
    because: str


@dataclass(frozen=True)
class Attach:
    """The tap is put on a network by `rule`, or by the program's own name (rule None)."""

    port: Port
    rule: Rule | None
    passed_over: tuple[PassedOver, ...] = ()


@dataclass(frozen=True)
class Deny:
    """The tap is refused by a `deny` rule, or for lack of a rule (None); `because` says why."""

    because: str
    rule: Rule | None
    passed_over: tuple[PassedOver, ...] = ()


@dataclass(frozen=True)
class Leave:
    """The tap stays as it is, by a `leave` rule."""

    rule: Rule
    passed_over: tuple[PassedOver, ...] = ()


Decision = Attach | Deny | Leave
NO_RULE = "no rule matches"
LEAVE_IS_ROOTS = "leave: is for taps of root's alone"


def decide(policy: Policy, caller: Caller) -> Decision:
    """Return what the first rule that matches `caller` says; without one, the tap is denied.

    The rule of a NIC is never among those passed over, for it is about one tap alone.
    """
    passed_over: list[PassedOver] = []
    for rule in policy.rules:
        because = why_not(rule, caller) or why_void(policy, rule, caller)
        if because is None:
            return replace(_outcome(policy, rule, caller), passed_over=tuple(passed_over))
        if not rule.of_nic:
            passed_over.append(PassedOver(rule, because))
    return Deny(NO_RULE, None, tuple(passed_over))


def choose(policy: Policy, caller: Caller) -> Decision:
    """Return what `decide` does, without the rules passed over: by the index, and so faster."""
    values: dict[MatchKey, str | None] = {key: getattr(caller, key) for key in MATCH_KEYS}
    for number in policy.index.candidates(values):
        rule = policy.rules[number]
        if _is_match(rule, values) and why_void(policy, rule, caller) is None:
            return _outcome(policy, rule, caller)
    return Deny(NO_RULE, None)


def _outcome(policy: Policy, rule: Rule, caller: Caller) -> Decision:
    """Return the decision of a rule that matches."""
    if rule.leave and caller.unprivileged:
        return Deny(LEAVE_IS_ROOTS, rule)
    if rule.leave:
        return Leave(rule)
    if rule.network is None:
        return Deny(rule.deny or "", rule)
    network = policy.networks[rule.network]
    settings = merge(network.settings, rule.settings)
    return Attach(_port(network, settings, caller.tap, rule.position), rule)


def is_left(policy: Policy, tap: str) -> bool:
    """Tell whether a `leave` rule decides for the tap when only its name is known."""
    return isinstance(choose(policy, Caller(tap)), Leave)


def port_on(policy: Policy, network_name: str, tap: str, *, made: bool = False) -> Port:
    """Return the Port of `tap` on the network that the program's own name says, whatever the rules.

    `made`: it is no tap that somebody has opened, but the link that the network's kind makes for a
    port. Raises Failure: 77 if the policy has no such network, 71 if none of its ports is a tap.
    """
    network = policy.networks.get(network_name)
    if network is None:
        known = ", ".join(policy.networks)
        raise Failure(
            Status.DENIED,
            f"network {readable(network_name)}",
            "the policy does not define it",
            f"the networks are {known}" if known else "the policy defines no network at all",
        )
    why = refuses_taps(network)
    if why and not made:
        raise Failure(Status.REFUSED, why, "", NAME_IN_NIC)
    return _port(network, merge(Settings(), network.settings), tap, network.position)


NAME_IN_NIC = "name it in a NIC of vms:"
"""How a guest gets on a network whose ports are no taps."""


def refuses_taps(network: Network) -> str:
    """Return why no tap can be plugged in this network, or "" if one can."""
    spec = spec_at(network.place)
    if spec is None or spec.endpoint == "tap":
        return ""
    where = f"network {network.name} ({network.position})"
    return f"{where} has {spec.key}:, and a tap cannot be plugged in"


def each_port(policy: Policy) -> Iterator[Port]:
    """Yield the Port of a tap without a name on each network, then by each rule with a network."""
    for network in policy.networks.values():
        yield _port(network, merge(Settings(), network.settings), "", network.position)
    for rule in policy.rules:
        if rule.network is not None:
            network = policy.networks[rule.network]
            yield _port(network, merge(network.settings, rule.settings), "", rule.position)


def find_nic(policy: Policy, network: str, tap: str) -> tuple[Vm, Nic] | None:
    """Return the guest and its NIC that have this tap on this network, or None."""
    for vm in policy.vms.values():
        for nic in vm.nics:
            if nic.tap == tap and nic.network == network:
                return vm, nic
    return None


def nic_rule(nic: Nic) -> Rule:
    """Return the rule that is made of a NIC on a network, for its tap."""
    return Rule(nic.position, {"tap": (nic.tap,)}, nic.network, settings=nic.settings, of_nic=True)


def nic_port(policy: Policy, nic: Nic) -> Port:
    """Return the Port of a NIC on a network."""
    assert nic.network is not None  # of a NIC in user mode there is none
    network = policy.networks[nic.network]
    return _port(network, merge(network.settings, nic.settings), nic.tap, nic.position)


def policy_asks(policy: Policy, key: MatchKey) -> bool:
    """Tell whether any rule looks at `key`; if none does, its value need not be looked up."""
    return key in policy.index.keys


def why_not(rule: Rule, caller: Caller) -> str | None:
    """Return why `rule` does not match `caller`, or None if all its keys match."""
    for key in MATCH_KEYS:
        globs = rule.match.get(key)
        if globs is None:
            continue
        value: str | None = getattr(caller, key)
        if value is None:
            return f"{key} is unknown"
        if not _any_matches(key, globs, value):
            if len(globs) == 1:
                return f"{key} {globs[0]} does not match {value}"
            return f"none of {key} {', '.join(globs)} matches {value}"
    return None


def why_void(policy: Policy, rule: Rule, caller: Caller) -> str | None:
    """Return why a rule that matches `caller` does not count, or None if it does.

    An unprivileged user chooses the tap's name and what the process says of itself. So a rule that
    matches by these changes no settings for such a user. A `deny` always counts. So does a NIC: the
    `users` of its guest say who may have it.
    """
    if not caller.unprivileged or rule.network is None or rule.of_nic or "user" in rule.match:
        return None
    said = [key for key in SAID_KEYS if key in rule.match]
    if caller.root_made and not said:
        return None
    changed = changed_settings(policy, rule)
    if not changed:
        return None
    by = " and ".join(said or ("tap",))
    return f"it changes {', '.join(changed)} by {by}, which counts for no unprivileged user" + (
        "" if said else " but on a tap that root has made"
    )


def changed_settings(policy: Policy, rule: Rule) -> list[str]:
    """Return the names of the settings that a rule gives otherwise than its network does."""
    assert rule.network is not None
    network = policy.networks[rule.network].settings
    before, after = merge(Settings(), network).given, merge(network, rule.settings).given
    return [name for name in rule.settings.given if before.get(name) != after.get(name)]


def _is_match(rule: Rule, values: Mapping[MatchKey, str | None]) -> bool:
    for key, globs in rule.match.items():
        value = values[key]
        if value is None or not _any_matches(key, globs, value):
            return False
    return True


def _any_matches(key: MatchKey, globs: tuple[str, ...], value: str) -> bool:
    value = fold(key, value)
    return any(matches(fold(key, glob), value) for glob in globs)


def merge(network: Settings, rule: Settings) -> Settings:
    """Return the settings of `network` overridden by those of `rule`, without those that are unset.

    Settings that hold pairs (`external_ids`) are merged key by key.
    """
    merged = dict(network.given)
    for name, value in rule.given.items():
        earlier = merged.get(name)
        if isinstance(value, tuple) and isinstance(earlier, tuple):
            value = tuple({**dict(earlier), **dict(value)}.items())
        merged[name] = value
    return Settings({name: _set_pairs(v) for name, v in merged.items() if v is not None})


def _set_pairs(value: object) -> object:
    """Return `value`; if it holds pairs, without those that are unset."""
    if isinstance(value, tuple):
        return tuple(pair for pair in value if pair[1] is not None)
    return value


def _port(network: Network, settings: Settings, tap: str, position: Position) -> Port:
    """Return the Port of `tap` on `network` with the merged `settings`."""
    # NOTE: a setting and its field in PortSettings have one name, so nothing is added here for a
    # new setting.
    given: dict[str, Any] = dict(settings.given)
    if given.get("mtu") == "bridge":
        given["mtu"] = None
    return Port(tap, network.name, network.place, position, PortSettings(**given), network.made)
