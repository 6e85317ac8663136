"""Doctor's checks of the policy: that it can be had, and that its rules can decide."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from pyqemu_ifconf.failure import Failure, PolicyInvalid, Status
from pyqemu_ifconf.globs import covers, is_glob, least_length, literal_start, matches
from pyqemu_ifconf.index import fold
from pyqemu_ifconf.names import NAME_MAX
from pyqemu_ifconf.policy import POLICY_VARIABLE, MatchKey, Rule
from pyqemu_ifconf.shell import all_of, edit, file, ifctl, quote, readable, sh
from pyqemu_ifctl.doctor.scene import Scene, is_closed
from pyqemu_ifup.kinds.check import Finding

Words = Mapping[MatchKey, set[str]]
WORK_MAX = 400_000
"""What comparing the rules may cost, in looks at one; some tenths of a second."""
COVER_WORK = 4
"""How many such looks it costs to compare a character of a glob with one of another."""


def find_policy(scene: Scene) -> Iterator[Finding]:
    """The policy cannot be had: it is invalid, missing or not to be trusted."""
    failure = scene.policy
    if not isinstance(failure, Failure) or is_closed(failure):
        return
    why = "without a policy no tap is attached: each start of a QEMU with one fails"
    if isinstance(failure, PolicyInvalid):
        first = failure.errors[0]
        more = f", and {len(failure.errors) - 1} more" if len(failure.errors) > 1 else ""
        yield Finding(f"the policy is invalid: {first}{more}", why, edit(first.file, first.line))
        return
    command = edit(failure.what)
    if failure.status == Status.NO_POLICY:
        # NOTE: of a symbolic link to nothing, what it leads to.
        path = os.path.realpath(failure.what)
        command = all_of(sh("mkdir", "-p", file(os.path.dirname(path))), edit(path))
    if failure.status == Status.UNSAFE:
        path = file(failure.what)
        if failure.remedy.startswith("run chmod"):
            command = sh("chmod", "go-w", path)
        elif failure.remedy.startswith("run chown"):
            # NOTE: -h, of a symbolic link's own owner.
            command = sh("chown", "-h", "root", path)
        elif "hard links" in failure.why:
            command = all_of(sh("cp", "-p", path, f"{path}.new"), sh("mv", f"{path}.new", path))
    what = f"the policy cannot be read: {readable(failure.what)}: {failure.why}"
    if failure.status == Status.UNSAFE and POLICY_VARIABLE in failure.remedy:
        yield Finding(what, why, None, failure.remedy)
        return
    yield Finding(what, why, command)


def find_unreachable_rules(scene: Scene) -> Iterator[Finding]:
    """A rule that never decides, since an earlier one matches all that it could."""
    if isinstance(scene.policy, Failure):
        return
    comparison = Comparison()
    for later in scene.policy.rules:
        try:
            earlier = comparison.find_wider(later)
        except OverflowError:
            yield Finding(
                f"whether the rule at {later.position}, or one after it, is ever reached was not "
                "looked at: the policy has too many patterns",
                "a rule is never reached if an earlier one matches all that it could",
                None,
                "ask pyqemu-ifctl explain for a tap that such a rule is for",
            )
            return
        if earlier is not None:
            yield Finding(
                f"the rule at {later.position} is never reached: the one at {earlier.position} "
                "matches all that it could",
                "the first rule that matches decides, so what this one says is never done",
                edit(later.position.file, later.position.line),
            )


class Comparison:
    """Finds the rules that an earlier one keeps from being reached, with bounded work in all."""

    def __init__(self) -> None:
        self.left = WORK_MAX
        self.plain: dict[tuple[str, str], list[Rule]] = {}
        """The rules that ask for one of a few plain words by a key, under each of the words."""
        self.others: list[Rule] = []

    def find_wider(self, later: Rule) -> Rule | None:
        """Return a rule of those given before that matches each caller that this one does.

        Raises OverflowError if that is too much work by now.
        """
        words = {key: {fold(key, glob) for glob in globs} for key, globs in later.match.items()}
        found = next(
            (rule for rule in self._candidates(words) if self._is_wider(rule, words)), None
        )
        key = next((key for key in words if not any(map(is_glob, words[key]))), None)
        if key is None:
            self.others.append(later)
        else:
            for word in words[key]:
                self.plain.setdefault((key, word), []).append(later)
        return found

    def _candidates(self, narrow: Words) -> Iterator[Rule]:
        for key, words in narrow.items():
            yield from self.plain.get((key, next(iter(words), "")), ())
        yield from self.others

    def _is_wider(self, wide: Rule, narrow: Words) -> bool:
        """Tell whether `wide` matches each caller that a rule with these globs does.

        NOTE: what is unknown matches nothing, not even `*`; only a tap's name is always known.
        """
        self._work(1)
        for key, globs in wide.match.items():
            others = narrow.get(key, {"*"} if key == "tap" else set())
            if not others:
                return False
            self._work(len(globs))
            own = {fold(key, glob) for glob in globs}
            for other in others - own:
                if not any(self._covers(glob, other) for glob in own):
                    return False
        return True

    def _covers(self, wide: str, narrow: str) -> bool:
        self._work(1)
        if not is_glob(wide) or not literal_start(narrow).startswith(literal_start(wide)):
            return False
        self._work(COVER_WORK * len(wide) * len(narrow))
        return covers(wide, narrow) if is_glob(narrow) else matches(wide, narrow)

    def _work(self, much: int) -> None:
        self.left -= much
        if self.left < 0:
            raise OverflowError


def find_long_globs(scene: Scene) -> Iterator[Finding]:
    """A tap glob that only names match which no interface can have."""
    if isinstance(scene.policy, Failure):
        return
    for rule in scene.policy.rules:
        for glob in rule.match.get("tap", ()):
            if least_length(glob) > NAME_MAX:
                yield Finding(
                    f"tap {quote(glob)} at {rule.position} matches no tap: it asks for at least "
                    f"{least_length(glob)} characters",
                    f"an interface's name has {NAME_MAX} bytes at most; QEMU cuts a longer ifname=",
                    edit(rule.position.file, rule.position.line),
                )


def find_otherwise(scene: Scene) -> Iterator[Finding]:
    """A process that says of itself what it did not when its tap came up."""
    for tap, words in scene.otherwise.items():
        yield Finding(
            f"{readable(tap)}: {words}",
            "QEMU does not change its command line: a guest that has taken it over can, to pass "
            "for another",
            ifctl("status", tap),
        )
