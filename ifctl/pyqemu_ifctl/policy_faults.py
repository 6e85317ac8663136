"""Doctor's checks of the policy: that it can be had, and that its rules can decide."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pyqemu_ifconf.failure import Failure, PolicyInvalid, Status
from pyqemu_ifconf.globs import covers, least_length
from pyqemu_ifconf.index import fold
from pyqemu_ifconf.names import NAME_MAX
from pyqemu_ifconf.policy import Rule
from pyqemu_ifconf.shell import all_of, edit, file, ifctl, output, quote, readable, sh
from pyqemu_ifctl.fault import Fault
from pyqemu_ifctl.scene import Scene, is_closed


def find_policy(scene: Scene) -> Iterator[Fault]:
    """The policy cannot be had: it is invalid, missing or not to be trusted."""
    failure = scene.policy
    if not isinstance(failure, Failure) or is_closed(failure):
        return
    why = "without a policy no tap is attached: each start of a QEMU with one fails"
    if isinstance(failure, PolicyInvalid):
        first = failure.errors[0]
        more = f", and {len(failure.errors) - 1} more" if len(failure.errors) > 1 else ""
        yield Fault(f"the policy is invalid: {first}{more}", why, edit(first.file, first.line))
        return
    command = edit(failure.what)
    if failure.status == Status.NO_POLICY:
        command = all_of(sh("mkdir", "-p", file(os.path.dirname(failure.what) or ".")), command)
    if failure.status == Status.UNSAFE:
        path = file(failure.what)
        if failure.remedy.startswith("run chmod"):
            command = sh("chmod", "go-w", path)
        elif failure.remedy.startswith("run chown"):
            command = sh("chown", "root", path)
        elif "symbolic link" in failure.why:
            command = sh("cp", "--remove-destination", output(sh("readlink", "-f", path)), path)
        elif "hard links" in failure.why:
            command = all_of(sh("cp", "-p", path, f"{path}.new"), sh("mv", f"{path}.new", path))
    yield Fault(f"the policy cannot be read: {readable(failure.what)}: {failure.why}", why, command)


def find_unreachable_rules(scene: Scene) -> Iterator[Fault]:
    """A rule that never decides, since an earlier one matches all that it could."""
    if isinstance(scene.policy, Failure):
        return
    rules = scene.policy.rules
    for number, later in enumerate(rules):
        earlier = next((rule for rule in rules[:number] if _is_wider(rule, later)), None)
        if earlier is not None:
            yield Fault(
                f"the rule at {later.place} is never reached: the one at {earlier.place} matches "
                "all that it could",
                "the first rule that matches decides, so what this one says is never done",
                edit(later.place.file, later.place.line),
            )


def _is_wider(wide: Rule, narrow: Rule) -> bool:
    """Tell whether `wide` matches each caller that `narrow` does.

    NOTE: what is unknown matches nothing, not even `*`; only a tap's name is always known.
    """
    for key, globs in wide.match.items():
        others = narrow.match.get(key, ("*",) if key == "tap" else None)
        if others is None:
            return False
        for other in others:
            if not any(covers(fold(key, glob), fold(key, other)) for glob in globs):
                return False
    return True


def find_long_globs(scene: Scene) -> Iterator[Fault]:
    """A tap glob that only names match which no interface can have."""
    if isinstance(scene.policy, Failure):
        return
    for rule in scene.policy.rules:
        for glob in rule.match.get("tap", ()):
            if least_length(glob) > NAME_MAX:
                yield Fault(
                    f"tap {quote(glob)} at {rule.place} matches no tap: it asks for at least "
                    f"{least_length(glob)} characters",
                    f"an interface's name has {NAME_MAX} bytes at most; QEMU cuts a longer ifname=",
                    edit(rule.place.file, rule.place.line),
                )


def find_otherwise(scene: Scene) -> Iterator[Fault]:
    """A process that says of itself what it did not when its tap came up."""
    for tap, words in scene.otherwise.items():
        yield Fault(
            f"{readable(tap)}: {words}",
            "QEMU does not change its command line: a guest that has taken it over can, to pass "
            "for another",
            ifctl("status", tap),
        )
