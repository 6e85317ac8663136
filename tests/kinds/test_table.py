"""The table of kinds: no kind, no setting and no state is forgotten."""

from __future__ import annotations

import pytest

from kinds.states import STATES, states_of
from kinds.table import ROWS, Row
from lab.inside import KINDS, MACHINES
from pyqemu_ifconf.kinds import SPECS
from pyqemu_ifconf.kinds.base import KindSpec


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_each_kind_has_a_row(spec: KindSpec) -> None:
    assert [row for row in ROWS if row.kind == spec.name]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_each_setting_is_given(spec: KindSpec) -> None:
    """By a row of that kind, on some lab."""
    rows = [row for row in ROWS if row.kind == spec.name]
    assert {name for row in rows for given in row.settings for name in given} == spec.settings


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_each_row_has_states_that_there_are(row: Row) -> None:
    """Those that it is never in have their reason."""
    assert set(row.never) <= set(STATES) and all(row.never.values())
    assert list(states_of(row)) == list(row.only or states_of(row))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_each_row_is_run(row: Row) -> None:
    """Here, or in the Linux that is its lab."""
    assert row.lab in {"", *(each.name for each in MACHINES if KINDS in each.more)}
