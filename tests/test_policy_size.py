"""Policies as large as they may be are read, or refused, in a bounded time, whatever is in them."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest

from lab.big_policies import SHAPES
from pyqemu_ifconf.failure import PolicyInvalid
from pyqemu_ifconf.load import SIZE_MAX, Source, parse_policy
from pyqemu_ifconf.nodes import ERRORS_MAX
from pyqemu_ifconf.policy import Caller, Policy, choose

TIMES = 150
"""As often the processor time of an interpreter that does nothing."""


def read(shape: str) -> Policy | None:
    """Return the policy of this shape, None where it is refused."""
    data = SHAPES[shape]().encode()
    assert SIZE_MAX - 200 < len(data) <= SIZE_MAX
    try:
        return parse_policy([Source("p.yaml", data)])
    except PolicyInvalid as invalid:
        assert len(invalid.errors) <= ERRORS_MAX + 1
        return None


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


@pytest.mark.parametrize("shape", SHAPES)
def test_a_policy_is_read_in_time(shape: str, nothing: float) -> None:
    before = time.process_time()
    read(shape)
    assert time.process_time() - before < TIMES * nothing


@pytest.mark.parametrize("shape", ["rules", "globs", "sets of globs", "a glob", "guests"])
def test_a_rule_is_found_in_time(shape: str, nothing: float) -> None:
    """Once its index is made, each time that a tap comes."""
    policy = read(shape)
    assert policy is not None
    before = time.process_time()
    choose(policy, Caller("tap0", vm="b" * 255))
    assert time.process_time() - before < TIMES * nothing


def test_of_very_many_errors_the_first_ones_are_told() -> None:
    data = SHAPES["unknown keys"]().encode()
    with pytest.raises(PolicyInvalid) as caught:
        parse_policy([Source("p.yaml", data)])
    errors = caught.value.errors
    assert len(errors) == ERRORS_MAX + 1
    assert sum("and there are more errors" in each.message for each in errors) == 1
