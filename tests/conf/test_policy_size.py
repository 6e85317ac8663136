"""Policies as large as they may be are read, or refused, in a bounded time, whatever is in them."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
import time

import pytest

from lab.big_policies import SHAPES
from pyqemu_ifconf.failure import PolicyError, PolicyInvalid
from pyqemu_ifconf.load import SIZE_MAX, Source, parse_policy
from pyqemu_ifconf.nodes import ERRORS_MAX
from pyqemu_ifconf.policy import Caller, Policy, choose
from pyqemu_ifctl.doctor.checks import find_all
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifctl.verbs.check import find_warnings
from pyqemu_ifd import cache
from pyqemu_ifup.mark import Here

FOUND = ("rules", "globs", "sets of globs", "a glob", "guests")
"""The shapes in which a rule is looked for."""
TIMES = 150
"""As often the processor time of an interpreter that does nothing."""
TOLD_MAX = 20 * SIZE_MAX
"""Bytes of a policy that is read, as the agent's reader tells it."""


@pytest.fixture(scope="module")
def nothing() -> float:
    """The processor time of an interpreter that does nothing, the least of a few."""

    def spent() -> float:
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    times = []
    for _ in range(5):
        before = spent()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        times.append(spent() - before)
    return min(times)


def judge(policy: Policy, shape: str, most: float) -> None:
    """Have check and doctor judge the policy, each in this processor time at the most."""
    before = time.process_time()
    find_warnings(policy)
    assert time.process_time() - before < most
    scene = Scene(policy=policy, here=Here("boot", "4:42"), tun_mode=0o666)
    before = time.process_time()
    found, failed = find_all(scene)
    assert time.process_time() - before < most
    assert failed == []
    untold = [each for _, each in found if "was not looked at" in each.what]
    assert bool(untold) == (shape in ("rules", "rules that are hard to compare"))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_policy_is_read_in_time(shape: str, nothing: float) -> None:
    """And a rule is found in time, each time that a tap comes, once the index of rules is made.

    It is taken in from the agent's reader in much less, since hooks wait, and with little room.
    """
    data = SHAPES[shape]().encode()
    assert SIZE_MAX - 200 < len(data) <= SIZE_MAX
    before = time.process_time()
    found: Policy | tuple[PolicyError, ...]
    try:
        found = parse_policy([Source("p.yaml", data)])
    except PolicyInvalid as invalid:
        found = invalid.errors
    assert time.process_time() - before < TIMES * nothing
    if isinstance(found, Policy):
        assert found.index is not None
        told = pickle.dumps(found)
        assert len(told) < TOLD_MAX
        before = time.process_time()
        assert cache.load_told(told) == found
        assert time.process_time() - before < TIMES * nothing / 5
        judge(found, shape, TIMES * nothing)
    if shape in FOUND:
        assert isinstance(found, Policy)
        before = time.process_time()
        choose(found, Caller("tap0", vm="b" * 255))
        assert time.process_time() - before < TIMES * nothing
    elif isinstance(found, tuple):
        # NOTE: of very many, the first ones are told.
        assert len(found) <= ERRORS_MAX + 1
        more = sum("and there are more errors" in each.message for each in found)
        assert more == (len(found) == ERRORS_MAX + 1)
        assert more or shape != "unknown keys"
