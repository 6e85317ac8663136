"""The tests of tests/vm: the result of each in the one boot of a virtual machine."""

from __future__ import annotations

import pytest

from lab.inside import VM, check, parametrize

pytestmark = [
    pytest.mark.host("it is started with the first half"),
    pytest.mark.last("its results are only waited for: it runs beside all other tests"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test here of each test in there."""
    parametrize(metafunc, VM)


@pytest.mark.timeout(VM.seconds + 60)
def test_in_vm(inner: str, request: pytest.FixtureRequest) -> None:
    check(VM, inner, request.session)
