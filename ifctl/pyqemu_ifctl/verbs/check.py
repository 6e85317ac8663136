"""pyqemu-ifctl check: is the policy right?"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence

from pyqemu_ifconf.failure import Failure, PolicyInvalid
from pyqemu_ifconf.globs import literal_start, matches
from pyqemu_ifconf.policy import (
    SAID_KEYS,
    Caller,
    Network,
    Policy,
    Position,
    changed_settings,
    nic_rule,
    why_void,
)
from pyqemu_ifconf.shell import readable
from pyqemu_ifctl.answer import Answer, add_json, count, to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options and arguments."""
    add_json(parser)
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help="check these files as one policy, not this host's own",
    )


def run(args: argparse.Namespace) -> Answer:
    """Check the policy. Raises Failure."""
    return check(args.files, os.environ, as_json=args.json)


def check(files: Sequence[str], environ: Mapping[str, str], *, as_json: bool) -> Answer:
    """Check `files` as one policy, without them this host's own and the trust of its folders.

    As JSON, a policy that cannot be read is an error as well, one without a place.
    """
    from pyqemu_ifconf.load import check_policy, load_host_policy, render

    try:
        policy = check_policy(files) if files else load_host_policy(environ)
    except PolicyInvalid as invalid:
        if as_json:
            return Answer(_invalid_json(invalid), invalid.status)
        rendered = tuple(line for error in invalid.errors for line in render(error).split("\n"))
        return Answer("", invalid.status, rendered)
    except Failure as failure:
        if not as_json:
            raise
        return Answer(_unread_json(failure, files), failure.status)
    warnings = find_warnings(policy)
    if as_json:
        return Answer(_valid_json(policy, warnings))
    words = [count(len(policy.networks), "network"), count(_written(policy), "rule")]
    if policy.vms:
        words.append(count(len(policy.vms), "guest"))
    remarks = (f"{it}:{it.column}: warning: {text}" for it, text in warnings)
    return Answer(f"ok: {', '.join(words)}\n", remarks=tuple(remarks))


def find_warnings(policy: Policy) -> list[tuple[Position, str]]:
    """Return rules that do not count for users, and NICs that any user may have, and why."""
    return [*_warn_of_rules(policy), *_warn_of_nics(policy)]


def _warn_of_rules(policy: Policy) -> Iterator[tuple[Position, str]]:
    """Yield the rules that do not count for the users of their network.

    One that matches by the tap's name alone is among them if we give a user a tap of such a name.
    """
    user = Caller("", unprivileged=True)
    names = [each.tap_name.partition("%d")[0] for each in policy.networks.values() if each.users]
    begins = set(names)
    starts = {name[:length] for name in names for length in range(len(name) + 1)}

    def is_ours(glob: str, tap_name: str) -> bool:
        start = literal_start(glob)
        if not start:
            return any(matches(glob, tap_name.replace("%d", number)) for number in ("0", "10"))
        return start in starts or any(
            start[:at] in begins and start[at].isdigit() for at in range(len(start))
        )

    for rule in policy.rules:
        network = _open_to_users(policy, rule.network)
        because = why_void(policy, rule, user) if network is not None else None
        if network is None or because is None:
            continue
        taps = rule.match.get("tap", ())
        if any(key in rule.match for key in SAID_KEYS) or any(
            is_ours(glob, network.tap_name) for glob in taps
        ):
            text = f"network {network.name} is open to users: {because}; name them by a user key"
            yield rule.position, text


def _warn_of_nics(policy: Policy) -> Iterator[tuple[Position, str]]:
    """Yield the NICs whose settings each user of their network has, as their guest names none."""
    for vm in policy.vms.values():
        for nic in vm.nics if vm.users is None else ():
            network = _open_to_users(policy, nic.network)
            changed = changed_settings(policy, nic_rule(nic)) if network is not None else []
            if network is not None and changed:
                text = (
                    f"network {network.name} is open to users: each of them may have this tap of "
                    f"guest {readable(vm.name)}, and with it another {', '.join(changed)}; name "
                    "those who may by the guest's users"
                )
                yield nic.position, text


def _open_to_users(policy: Policy, name: str | None) -> Network | None:
    """Return the network of this name if users may be plugged in there, or None."""
    network = policy.networks[name] if name is not None else None
    return network if network is not None and (network.users or policy.bridge_conf) else None


def _written(policy: Policy) -> int:
    """Return how many rules are under rules:, those that NICs are not counted."""
    of_nics = sum(nic.network is not None for vm in policy.vms.values() for nic in vm.nics)
    return len(policy.rules) - of_nics


def _valid_json(policy: Policy, warnings: Sequence[tuple[Position, str]]) -> str:
    return to_json(
        {
            "ok": True,
            "files": list(policy.files),
            "networks": len(policy.networks),
            "rules": _written(policy),
            "vms": len(policy.vms),
            "errors": [],
            "warnings": [
                {"file": it.file, "line": it.line, "column": it.column, "message": text}
                for it, text in warnings
            ],
        }
    )


def _invalid_json(invalid: PolicyInvalid) -> str:
    errors = [
        {"file": e.file, "line": e.line, "column": e.column, "message": e.message}
        for e in invalid.errors
    ]
    return to_json(
        {
            "ok": False,
            "files": list(invalid.files),
            "networks": None,
            "rules": None,
            "vms": None,
            "errors": errors,
            "warnings": [],
        }
    )


def _unread_json(failure: Failure, files: Sequence[str]) -> str:
    error = {"file": None, "line": None, "column": None, "message": str(failure)}
    return to_json(
        {
            "ok": False,
            "files": list(files) or None,
            "networks": None,
            "rules": None,
            "vms": None,
            "errors": [error],
            "warnings": [],
        }
    )
