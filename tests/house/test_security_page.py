"""SECURITY.md, and what it names: attacks by each kind of attacker, and the pages that say so."""

from __future__ import annotations

import pytest

from lab.checkout import ROOT

ACTORS = ("anybody", "user", "guest", "escaped_guest", "careless_root")
PAGES = (
    "ifup/pyqemu-ifup.8",
    "ifd/pyqemu-ifd.8",
    "ifctl/pyqemu-ifctl.8",
    "conf/pyqemu-ifup-policy.5",
)


@pytest.mark.parametrize("actor", ACTORS)
def test_each_kind_of_attacker_has_attacks(actor: str) -> None:
    found = [
        path
        for path in (ROOT / "tests" / "security").glob(f"test_{actor}*.py")
        if "\ndef test_" in path.read_text()
    ]
    assert found


@pytest.mark.parametrize("page", PAGES)
def test_each_page_leads_to_the_promises(page: str) -> None:
    _, heading, rest = (ROOT / page).read_text().partition("\n.SH SECURITY\n")
    assert heading and "SECURITY.md" in rest.partition("\n.SH ")[0]
    assert "SECURITY.md" in (ROOT / "README.md").read_text()
