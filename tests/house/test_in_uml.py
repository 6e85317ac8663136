"""The tests of tests/uml: the result of each in the one boot of a User Mode Linux."""

from __future__ import annotations

import pytest

from lab.inside import UML, check, parametrize

pytestmark = [
    pytest.mark.host("its Linux is started with the first half"),
    pytest.mark.last("its results are only waited for: the Linux runs beside all other tests"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test here of each test in there."""
    parametrize(metafunc, UML)


@pytest.mark.timeout(UML.seconds + 60)
def test_in_uml(inner: str, request: pytest.FixtureRequest) -> None:
    check(UML, inner, request.session)
