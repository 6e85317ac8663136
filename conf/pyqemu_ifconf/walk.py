"""The walk over the documents of a policy: nodes in, a Policy out, and every error on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyqemu_ifconf import kinds
from pyqemu_ifconf.failure import PolicyError
from pyqemu_ifconf.field import Where
from pyqemu_ifconf.fields import PORT_SETTINGS, fields_of, lacking, owners_of, unknown_field
from pyqemu_ifconf.kinds.base import KindSpec, Nowhere, Place, SettingName, place_of
from pyqemu_ifconf.made import nat as made_nat
from pyqemu_ifconf.made.nat import check_nat, overlaps
from pyqemu_ifconf.names import is_network_name, tap_name_of
from pyqemu_ifconf.nodes import Errors, List, Map, Node, Scalar, entries, quote, show
from pyqemu_ifconf.policy import (
    DEFAULT_MAX_TAPS,
    DEFAULT_MODEL,
    DEFAULT_MTU,
    DEFAULT_TAP_NAME,
    DEFAULT_TIMEOUT,
    MATCH_KEYS,
    NAME_IN_NIC,
    Dhcp,
    MatchKey,
    Nat,
    Network,
    Nic,
    Policy,
    Position,
    Rule,
    Settings,
    UserMode,
    Vm,
    merge,
    nic_rule,
    refuses_taps,
)
from pyqemu_ifconf.values import BAD, listed, must_be, nearest
from pyqemu_ifconf.vms import DEFAULT_USER_IPV4, is_host_of, is_virtio

ONCE = ("timeout", "bridge_conf")
"""The keys that may stand in one file of a policy, and hold for all of them."""

OUTCOMES = ("network", "deny", "leave")
"""The keys of which a rule has one: what becomes of the taps that it matches."""


@dataclass(frozen=True)
class Document:
    """One file of the policy: its root, None if it has none, and its errors so far."""

    root: Node | None
    errors: Errors


@dataclass(frozen=True)
class _Given:
    """The known keys of one mapping, their nodes, and the values of those that are right."""

    keys: Mapping[str, Scalar]
    nodes: Mapping[str, Node]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class _Said:
    """What the keys of a network say of its kind: the kinds that it can be, and that in words.

    `lacks` are the keys, port settings too, that such a network cannot have. `made`: it has `nat:`.
    """

    specs: tuple[KindSpec, ...]
    words: str
    lacks: frozenset[str]
    made: bool = False


@dataclass
class _Draft:
    """As much of the policy as is read."""

    networks: dict[str, Network] = field(default_factory=dict)
    said: dict[str, _Said] = field(default_factory=dict)
    """What each network says of its kind."""
    named: dict[str, Position] = field(default_factory=dict)
    rules: list[tuple[Rule, _Given, Errors]] = field(default_factory=list)
    once: dict[str, Any] = field(default_factory=dict)
    """The values of the keys of ONCE."""
    once_positions: dict[str, Position] = field(default_factory=dict)
    nats: dict[str, tuple[Scalar, Errors]] = field(default_factory=dict)
    """The key of each network's nat:, and the errors of its file."""
    vms: dict[str, Vm] = field(default_factory=dict)
    nics: list[tuple[Nic, _Given, Errors]] = field(default_factory=list)


def read_policy(documents: Sequence[Document]) -> tuple[Policy, tuple[PolicyError, ...]]:
    """Return the policy that `documents` are together, and all errors; with any, it is not used.

    The errors are in the order of the documents and of their lines.
    """
    draft = _Draft()
    for document in documents:
        if document.root is not None:
            _read_document(document.root, document.errors, draft)
    for rule, given, errors in draft.rules:
        _check_network(rule.network, rule.settings, given, errors, draft)
        network = draft.networks.get(rule.network or "")
        why = refuses_taps(network) if network is not None else ""
        if why:
            errors.add(given.nodes["network"], f"{why}; {NAME_IN_NIC}")
    for nic, given, errors in draft.nics:
        _check_network(nic.network, nic.settings, given, errors, draft)
    _check_nics(draft)
    _check_nats(draft)
    # NOTE: the NICs come first, for each is about one tap alone.
    of_nics = [nic_rule(nic) for nic, _, _ in draft.nics if nic.network is not None]
    policy = Policy(
        tuple(document.errors.file for document in documents),
        draft.networks,
        (*of_nics, *(rule for rule, _, _ in draft.rules)),
        draft.once.get("timeout", DEFAULT_TIMEOUT),
        draft.once.get("bridge_conf", False),
        draft.vms,
    )
    found: list[PolicyError] = []
    for document in documents:
        found += sorted(document.errors.found, key=lambda error: (error.line, error.column))
    return policy, tuple(found)


def _read_document(root: Node, errors: Errors, draft: _Draft) -> None:
    if not isinstance(root, Map):
        must_be("a policy", "a mapping with version, networks and rules", root, errors)
        return
    # NOTE: a later version may have other keys, and what is said of those would be wrong.
    later = next((value for key, value in root.pairs if _is_later(key, value)), None)
    if later is not None:
        errors.add(later, f"version {show(later)} is not known here; this program reads 1")
        return
    given = _read_fields(root, "top", "the policy", errors)
    if "version" not in given.keys:
        errors.add(root, "version is missing; write version: 1")
    _read_once(given, errors, draft)
    networks = given.values.get("networks")
    if isinstance(networks, Map):
        for key, value in entries(networks, errors, "network"):
            _read_network(key, value, errors, draft)
    rules = given.values.get("rules")
    if isinstance(rules, List):
        for item in rules.items:
            _read_rule(item, errors, draft)
    vms = given.values.get("vms")
    if isinstance(vms, Map):
        for key, value in entries(vms, errors, "guest"):
            _read_vm(key, value, errors, draft)


def _read_once(given: _Given, errors: Errors, draft: _Draft) -> None:
    """Read what the policy may say once, in one of its files."""
    for name in ONCE:
        if name in given.values:
            key = given.keys[name]
            if name in draft.once:
                errors.add(key, f"{name} is given twice; first at {draft.once_positions[name]}")
            draft.once[name] = given.values[name]
            draft.once_positions[name] = _position(key, errors)


def _is_later(key: Node, node: Node) -> bool:
    """Tell whether a key and its value say that the policy is of a later version."""
    return (
        isinstance(key, Scalar)
        and key.text == "version"
        and isinstance(node, Scalar)
        and node.plain
        and node.text.isascii()
        and node.text.isdigit()
        and not node.text.startswith("0")
        and node.text != "1"
    )


def _read_fields(node: Map, where: Where, owner: str, errors: Errors) -> _Given:
    """Read the fields of one mapping; report unknown keys and wrong values."""
    known = fields_of(where)
    keys: dict[str, Scalar] = {}
    nodes: dict[str, Node] = {}
    values: dict[str, Any] = {}
    for key, value in entries(node, errors, "key"):
        row = known.get(key.text)
        if row is None:
            unknown_field(key, where, owner, errors)
            continue
        keys[key.text], nodes[key.text] = key, value
        if row.where == "port" and isinstance(value, Scalar) and value.text == "none":
            values[key.text] = None
        elif isinstance(value, Scalar) and value.plain and not value.text:
            errors.add(value, f"{key.text} is empty; it must be {row.type.words}")
        else:
            read = row.type.read(key.text, value, errors)
            if read is not BAD:
                values[key.text] = read
    return _Given(keys, nodes, values)


def _read_network(key: Scalar, node: Node, errors: Errors, draft: _Draft) -> None:
    name = key.text
    position = _position(key, errors)
    if not is_network_name(name):
        errors.add(
            key,
            f"a network cannot be named {quote(name)}; a name is 1 to 63 ASCII letters, digits, "
            "dots, hyphens and underscores, a letter or digit first",
        )
    first = draft.named.setdefault(name, position)
    if first is not position:
        errors.add(key, f"network {quote(name)} is given twice; first at {first}")
        return
    if not isinstance(node, Map):
        words = f"a mapping with {listed(kinds.naming_keys())}"
        must_be(f"network {quote(name)}", words, node, errors)
        return
    given = _read_fields(node, "network", f"network {quote(name)}", errors)
    said = _read_kind(key, given, errors)
    settings = _settings(given)
    if len(said.specs) == 1:
        settings = Settings({**said.specs[0].defaults, **settings.given})
    network = Network(
        name,
        position,
        _place(said, given),
        settings,
        given.values.get("users", ()),
        given.values.get("deny_users", ()),
        given.values.get("max_taps", DEFAULT_MAX_TAPS),
        given.values.get("tap_name", DEFAULT_TAP_NAME),
        _read_nat(given, errors),
    )
    draft.networks[name], draft.said[name] = network, said
    if said.made:
        draft.nats[name] = (given.keys["nat"], errors)
    for setting, why in _faults(said, merge(Settings(), network.settings)):
        if setting in given.keys:
            errors.add(given.keys[setting], f"network {name} has {said.words}, and {why}")


def _read_kind(key: Scalar, given: _Given, errors: Errors) -> _Said:
    """Return what the keys of the network `key` say of its kind; report those that do not fit."""
    naming = _find_naming(key, given, errors)
    can_be = tuple(spec for spec in kinds.SPECS if not naming or spec.key in naming)
    named = tuple(spec for spec in can_be if spec.name == given.values.get("kind"))
    words = listed([f"{each}:" for each in naming or kinds.naming_keys()], "and")
    said = _Said(can_be, words, lacking(can_be))
    if "nat" in given.keys and made_nat.KIND in can_be:
        specs = (made_nat.KIND,)
        said = _Said(specs, "nat:", lacking(specs, made_nat.WITHOUT), made=True)
    elif named:
        said = _Said(named, f"kind: {named[0].name}", lacking(named))
    foreign = lacking(can_be)
    for each, at in given.keys.items():
        if len(naming) > 1 and each in naming:
            continue
        if each in PORT_SETTINGS and given.values.get(each) is None:
            continue
        if each in said.lacks or each in foreign:
            is_other_s = each in foreign and each not in PORT_SETTINGS
            errors.add(at, _of_other(each) if is_other_s else _unfit(each, key.text, said))
    return said


def _find_naming(key: Scalar, given: _Given, errors: Errors) -> list[str]:
    """Return the keys that name the kind of the network `key`, in order; report all but one."""
    name, naming = key.text, kinds.naming_keys()
    there = sorted(
        (each for each in naming if each in given.keys),
        key=lambda each: (given.keys[each].line, given.keys[each].column),
    )
    if not there and len(naming) == 1:
        errors.add(key, f"network {quote(name)} has no {naming[0]}; write {naming[0]}: NAME")
    elif not there:
        names = listed(naming, "and")
        errors.add(key, f"network {quote(name)} has none of {names}; give one of them")
    elif len(there) > 1:
        both = "both " if len(there) == 2 else ""
        names = f"{both}{listed(there, 'and')}"
        errors.add(given.keys[there[-1]], f"network {quote(name)} has {names}; keep one of them")
    return there


def _place(said: _Said, given: _Given) -> Place:
    """Return where the ports of a network are, or Nowhere if it has errors."""
    spec = said.specs[0]
    kind = spec.place if len(said.specs) == 1 else spec.found
    found = place_of(kind, given.values) if kind is not None else None
    return found or Nowhere()


def _of_other(name: str) -> str:
    """Return the error of a key of networks that another key names."""
    keys = dict.fromkeys(f"{spec.key}:" for spec in owners_of(name))
    return f"{name} is for {listed(tuple(keys), 'and')}; remove one"


def _unfit(name: str, network: str, said: _Said) -> str:
    """Return the error of a key of a network that cannot have it."""
    if said.made:
        return f"a network with nat: is {made_nat.KIND.title} of its own; remove {name}"
    return _not_for(name, network, said)


def _not_for(name: str, network: str, said: _Said) -> str:
    """Return the error of a key or a port setting that a `network` of this kind cannot have."""
    if not said.words.startswith("kind:"):
        return f"network {network} has {said.words}, and so no {name}; remove it"
    others = owners_of(name) or [each for each in kinds.SPECS if name in each.settings]
    labels = listed([other.label for other in others], "and")
    verb = "are" if name.endswith("s") else "is"
    return f"{name} {verb} for {labels}, but network {network} has {said.words}; remove one"


def _faults(said: _Said, settings: Settings) -> Iterable[tuple[SettingName, str]]:
    """Return the settings of one port that no kind the network can be of can give, and why."""
    first, *others = (tuple(spec.faults(settings.given)) for spec in said.specs)
    return [fault for fault in first if all(fault in each for each in others)]


def _read_nat(given: _Given, errors: Errors) -> Nat | None:
    """Return what the `nat:` of a network says, None without one."""
    node = given.values.get("nat")
    if not isinstance(node, Map):
        return None
    inner = _read_fields(node, "nat", "nat:", errors)
    check_nat(inner.values, inner.nodes, given.keys["nat"], errors)
    values = dict(inner.values)
    values.setdefault("dhcp", Dhcp() if "ipv4" in inner.nodes else None)
    values.setdefault("dns", "")
    mtu = given.values.get("mtu")
    return Nat(**values, mtu=mtu if isinstance(mtu, int) else DEFAULT_MTU)


def _check_nats(draft: _Draft) -> None:
    """Check that each network with nat: has its bridge and its subnets to itself."""
    on_it: dict[str, list[Network]] = {}
    for each in draft.networks.values():
        on_it.setdefault(each.place.name, []).append(each)
    for name, (key, errors) in draft.nats.items():
        bridge = draft.networks[name].place.name
        if bridge and not is_network_name(bridge):
            # NOTE: others are patterns, or the end of a name, to nft(8) and dnsmasq(8).
            errors.add(
                key,
                f"the bridge {quote(bridge)} of a network with nat: has other characters than "
                "letters, digits, ., _ and -, a letter or digit first",
            )
        # NOTE: one other network is enough to tell of; each has an error of its own.
        other = next((it for it in on_it[bridge] if it.name != name), None)
        if bridge and other is not None:
            errors.add(
                key,
                f"the bridge {bridge} of a network with nat: is its own, and network "
                f"{other.name} ({other.position}) has it too",
            )
    for network, other, why in overlaps(draft.networks.values()) if draft.nats else ():
        key, errors = draft.nats[network.name]
        errors.add(key, f"{why} of network {other.name} ({other.position})")


def _read_rule(node: Node, errors: Errors, draft: _Draft) -> None:
    if not isinstance(node, Map):
        must_be("a rule", "a mapping such as {tap: web*, network: lan}", node, errors)
        return
    given = _read_fields(node, "rule", "a rule", errors)
    said = [key for key in OUTCOMES if key in given.keys]
    if len(said) > 1:
        later = max((given.keys[key] for key in said), key=lambda k: (k.line, k.column))
        both = "both " if len(said) == 2 else ""
        errors.add(later, f"the rule has {both}{listed(said, 'and')}; keep one of them")
    if not said:
        errors.add(node, f"the rule has none of {listed(OUTCOMES, 'and')}; give one of them")
    if not any(key in given.keys for key in MATCH_KEYS):
        errors.add(node, f"the rule has no match key; give at least one of {listed(MATCH_KEYS)}")
    if said and "network" not in said:
        for name, at in given.keys.items():
            if name in PORT_SETTINGS:
                errors.add(at, f"a {said[0]} rule takes no port settings; remove {name}")
    match: dict[MatchKey, tuple[str, ...]] = {
        key: given.values[key] for key in MATCH_KEYS if key in given.values
    }
    rule = Rule(
        _position(node, errors),
        match,
        given.values.get("network"),
        given.values.get("deny"),
        _settings(given),
        leave=given.values.get("leave", False),
    )
    draft.rules.append((rule, given, errors))


def _read_vm(key: Scalar, node: Node, errors: Errors, draft: _Draft) -> None:
    name = key.text
    position = _position(key, errors)
    if not is_network_name(name):
        errors.add(
            key,
            f"a guest cannot be named {quote(name)}; a name is 1 to 63 ASCII letters, digits, "
            "dots, hyphens and underscores, a letter or digit first",
        )
    if name in draft.vms:
        errors.add(key, f"guest {quote(name)} is given twice; first at {draft.vms[name].position}")
        return
    draft.vms[name] = Vm(name, position, ())
    if not isinstance(node, Map):
        must_be(f"guest {quote(name)}", "a mapping with nics", node, errors)
        return
    given = _read_fields(node, "vm", f"guest {quote(name)}", errors)
    if "nics" not in given.keys:
        errors.add(key, f"guest {quote(name)} has no nics; write nics: [{{network: NAME}}]")
    listed_nics, first = given.values.get("nics"), len(draft.nics)
    for number, item in enumerate(listed_nics.items if isinstance(listed_nics, List) else ()):
        _read_nic(name, number, item, errors, draft)
    own = draft.nics[first:]
    _check_ids(own)
    nics = tuple(nic for nic, _, _ in own)
    draft.vms[name] = Vm(name, position, nics, given.values.get("users"))


def _check_ids(nics: Iterable[tuple[Nic, _Given, Errors]]) -> None:
    """Check that the NICs of one guest have different ids."""
    ids: dict[str, Nic] = {}
    for nic, given, errors in nics:
        same = ids.setdefault(nic.id, nic)
        if same is not nic:
            errors.add_at(
                *_at(given.keys.get("id"), nic.position),
                f"the guest has another NIC with the id {nic.id}, at {same.position}; give each "
                "its own",
            )


def _read_nic(vm: str, number: int, node: Node, errors: Errors, draft: _Draft) -> None:
    if not isinstance(node, Map):
        must_be("a NIC", "a mapping such as {network: lan} or {user: {}}", node, errors)
        return
    given = _read_fields(node, "nic", "a NIC", errors)
    if "network" in given.keys and "user" in given.keys:
        later = max(given.keys["network"], given.keys["user"], key=lambda k: (k.line, k.column))
        errors.add(later, "the NIC has both network and user; keep one of them")
    if "network" not in given.keys and "user" not in given.keys:
        errors.add(node, "the NIC has neither network nor user; give one of them")
    user = None
    if "user" in given.keys and "network" not in given.keys:
        user = _read_user_mode(given, errors)
    vectors = given.values.get("vectors")
    model = given.values.get("model", DEFAULT_MODEL)
    if not is_virtio(model):
        _check_model(model, given, errors)
    mac = given.values.get("mac")
    network = given.values.get("network")
    nic = Nic(
        _position(node, errors),
        given.values.get("id", f"net{number}"),
        network,
        given.values.get("tap", tap_name_of(vm, number)) if network is not None else "",
        user,
        model,
        mac.lower() if mac is not None else None,
        given.values.get("queues", 1),
        vectors if isinstance(vectors, int) else None,
        given.values.get("bus"),
        given.values.get("addr"),
        _settings(given),
    )
    draft.nics.append((nic, given, errors))


def _read_user_mode(given: _Given, errors: Errors) -> UserMode | None:
    """Read a NIC in user mode: the network of its own, None if that is wrong."""
    for name, at in given.keys.items():
        if name == "tap" or name in PORT_SETTINGS:
            errors.add(at, f"a NIC in user mode has no tap; remove {name}")
    if given.values.get("queues", 1) != 1:
        errors.add(given.keys["queues"], "a NIC in user mode has one pair of queues")
    inner = given.values.get("user")
    return _read_user(inner, errors) if isinstance(inner, Map) else None


def _check_model(model: str, given: _Given, errors: Errors) -> None:
    """Report what a NIC says that only one of a virtio model can have."""
    for name, value in (
        ("queues", given.values.get("queues", 1) != 1),
        ("vectors", isinstance(given.values.get("vectors"), int)),
    ):
        if value:
            errors.add(
                given.keys[name],
                f"a NIC of model {model} has no {name} to choose; remove "
                f"{name}, or take model: {DEFAULT_MODEL}",
            )


def _read_user(node: Map, errors: Errors) -> UserMode:
    """Read what a user-mode network is, and check that its addresses are on it."""
    given = _read_fields(node, "user", "user:", errors)
    user = UserMode(**given.values)
    if user.ipv4 is False and user.ipv6 is False:
        errors.add(given.keys["ipv6"], "user: has neither IPv4 nor IPv6; leave one of them out")
    if "ipv4" in given.keys and "ipv4" not in given.values:
        return user
    subnet = DEFAULT_USER_IPV4 if user.ipv4 is None else user.ipv4
    named = {
        "forward": [each.to_address for each in user.forward if each.to_address],
        "dns": [user.dns] if user.dns is not None else [],
    }
    for name, addresses in named.items():
        if subnet is False:
            if name in given.keys:
                errors.add(given.keys[name], f"without IPv4 there is no {name}; remove it")
            continue
        for address in addresses:
            if not is_host_of(address, subnet):
                errors.add(
                    given.nodes[name],
                    f"{name} leads to {address}, which is no host of the guest's subnet {subnet}; "
                    "take one of it, or leave the address out",
                )
    return user


def _check_nics(draft: _Draft) -> None:
    """Check that each NIC's tap and MAC are its own, and that no tap has the name of a place."""
    taps: dict[str, Nic] = {}
    macs: dict[str, Nic] = {}
    places = {network.place.name: network for network in draft.networks.values()}
    for nic, given, errors in draft.nics:
        there = places.get(nic.tap) if nic.tap else None
        if there is not None:
            errors.add_at(
                *_at(given.nodes.get("tap"), nic.position),
                f"tap {nic.tap} is the {there.place.noun} of network {there.name} "
                f"({there.position}); give the NIC another tap",
            )
        for name, value, seen in (("tap", nic.tap, taps), ("mac", nic.mac, macs)):
            if not value:
                continue
            first = seen.setdefault(value, nic)
            if first is not nic:
                where = given.nodes.get(name)
                message = f"another NIC has the {name} {value} too, at {first.position}"
                hint = "" if where is not None else f"; give it another {name}"
                errors.add_at(*_at(where, nic.position), message + hint)


def _at(node: Node | None, position: Position) -> tuple[int, int]:
    """Return the line and the column of `node`, or of `position` if there is no node."""
    return (node.line, node.column) if node is not None else (position.line, position.column)


def _check_network(
    name: str | None, settings: Settings, given: _Given, errors: Errors, draft: _Draft
) -> None:
    """Check what a rule or a NIC says of its network, when the networks of all files are known."""
    if name is None:
        return
    if name not in draft.named:
        hint = _hint(name, tuple(draft.named), errors)
        errors.add(given.nodes["network"], f"there is no network {quote(name)}; {hint}")
        return
    network = draft.networks.get(name)
    if network is None:
        return
    said, called = draft.said[name], f"{name} ({network.position})"
    for setting, value in settings.given.items():
        if value is not None and setting in said.lacks:
            errors.add(given.keys[setting], _not_for(setting, called, said))
    for setting, why in _faults(said, merge(network.settings, settings)):
        if setting in given.keys:
            errors.add(given.keys[setting], f"network {called} has {said.words}, and {why}")
        elif setting not in network.settings.given:
            errors.add(given.nodes["network"], f"network {called} has {said.words}, and {why}")


def _hint(name: str, known: tuple[str, ...], errors: Errors) -> str:
    """Return which network may have been meant by a `name` that none has."""
    near = nearest(name, known, errors)
    if errors.full:
        return ""
    if near is not None:
        return f"did you mean {near}?"
    return f"the networks are {listed(known, 'and')}" if known else "the policy defines no network"


def _settings(given: _Given) -> Settings:
    return Settings({name: value for name, value in given.values.items() if name in PORT_SETTINGS})


def _position(node: Node, errors: Errors) -> Position:
    return Position(errors.file, node.line, node.column)
