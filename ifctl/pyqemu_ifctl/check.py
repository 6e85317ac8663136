"""pyqemu-ifctl check: is the policy right?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyqemu_ifconf.failure import Failure, PolicyInvalid
from pyqemu_ifconf.load import check_policy, load_host_policy, render
from pyqemu_ifconf.policy import Policy
from pyqemu_ifctl.answer import Answer, count, to_json


def check(files: Sequence[str], environ: Mapping[str, str], *, as_json: bool) -> Answer:
    """Check `files` as one policy, without them this host's own and the trust of its folders.

    As JSON, a policy that cannot be read is an error as well, one without a place.
    """
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
    if as_json:
        return Answer(_valid_json(policy))
    words = [count(len(policy.networks), "network"), count(_written(policy), "rule")]
    if policy.vms:
        words.append(count(len(policy.vms), "guest"))
    return Answer(f"ok: {', '.join(words)}\n")


def _written(policy: Policy) -> int:
    """Return how many rules are under rules:, those that NICs are not counted."""
    of_nics = sum(nic.network is not None for vm in policy.vms.values() for nic in vm.nics)
    return len(policy.rules) - of_nics


def _valid_json(policy: Policy) -> str:
    return to_json({
        "ok": True,
        "files": list(policy.files),
        "networks": len(policy.networks),
        "rules": _written(policy),
        "vms": len(policy.vms),
        "errors": [],
    })


def _invalid_json(invalid: PolicyInvalid) -> str:
    errors = [
        {"file": e.file, "line": e.line, "column": e.column, "message": e.message}
        for e in invalid.errors
    ]
    return to_json({
        "ok": False, "files": list(invalid.files), "networks": None, "rules": None, "vms": None,
        "errors": errors,
    })


def _unread_json(failure: Failure, files: Sequence[str]) -> str:
    error = {"file": None, "line": None, "column": None, "message": str(failure)}
    return to_json({
        "ok": False, "files": list(files) or None, "networks": None, "rules": None, "vms": None,
        "errors": [error],
    })
