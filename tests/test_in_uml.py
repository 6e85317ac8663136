"""The tests of tests/uml: the result of each in the one boot of a User Mode Linux."""

from __future__ import annotations

import re
import xml.etree.ElementTree as xml

import pytest

from lab import needs
from lab.in_uml import BOOT, SECONDS, collect

pytestmark = [
    pytest.mark.host("its Linux is started with the first half"),
    pytest.mark.last("its results are only waited for: the Linux runs beside all other tests"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test here of each test in there."""
    inner = collect()
    ids = [
        "collect" if test.startswith("cannot collect") else test.removeprefix("tests/uml/")
        for test in inner
    ]
    metafunc.parametrize("inner", inner, ids=ids)


@pytest.mark.timeout(SECONDS + 60)
def test_in_uml(inner: str, request: pytest.FixtureRequest) -> None:
    if inner.startswith("cannot collect"):
        pytest.fail(inner, pytrace=False)
    boot = request.session.stash[BOOT]
    if boot.lacking is not None:
        needs.lack(boot.lacking)
    results = boot.results()
    case = results.get(inner)
    if not isinstance(case, xml.Element):
        pytest.fail(f"no result; the Linux printed:\n{results['']}", pytrace=False)
    for verdict in case:
        text = f"{verdict.get('message', '')}\n{verdict.text or ''}"
        if verdict.tag in ("failure", "error"):
            pytest.fail(re.sub(r"\x1b\[[0-9;]*m", "", text), pytrace=False)
        if verdict.tag == "skipped":
            pytest.skip(verdict.get("message", ""))
