"""Which names a tap can have, and which the kernel makes of a pattern."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqemu_ifconf.names import is_made_of, is_tap_pattern, is_valid_name

pytestmark = pytest.mark.each_python


@pytest.mark.parametrize(
    ("name", "pattern", "made"),
    [
        ("tap0", "tap%d", True),
        ("tap12", "tap%d", True),
        ("tap", "tap%d", False),
        ("tap01", "tap%d", False),
        ("tap-1", "tap%d", False),
        ("tap1x", "tap%d", False),
        ("tap\u0661", "tap%d", False),
        ("a7b", "a%db", True),
        ("ab", "a%db", False),
        ("a", "a%da", False),
        ("web0", "web0", True),
        ("web1", "web0", False),
        ("tap%d", "tap%d", False),
    ],
)
def test_is_made_of(name: str, pattern: str, made: bool) -> None:
    assert is_made_of(name, pattern) is made


@given(st.text(st.sampled_from("ab0.%d/: -"), max_size=16), st.integers(0, 9999))
def test_what_a_pattern_makes_is_a_name(pattern: str, number: int) -> None:
    if is_tap_pattern(pattern):
        name = pattern.replace("%d", str(number))
        assert is_valid_name(name)
        assert is_made_of(name, pattern)
