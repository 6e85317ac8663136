"""Macvtaps where the kernel has no chains at a link: without filters, or not at all."""

from __future__ import annotations

import pytest

from lab.macvtap import CASES, OWN, arriving, given
from lab.netns import Namespace
from pyqemu_ifconf.failure import Failure

POLICY = """
version: 1
networks:
  dmz: {{parent: v0{settings}}}
vms:
  web1: {{nics: [{{network: dmz, mac: "{mac}"}}]}}
"""


@pytest.fixture
def wired(inside: Namespace) -> Namespace:
    """The namespace, with this thread in it, and a wire between v0 and v1 that goes afterwards."""
    lines = ("link add v0 up type veth peer name v1", "link set v1 up")
    inside.run(["ip", "-batch", "-"], input="\n".join(lines))
    inside.kept.callback(inside.ip, "link", "del", "v0")
    return inside


def policy(settings: str) -> str:
    return POLICY.format(settings=settings, mac=OWN.hex(":"))


def test_without_filters_a_guest_sends_what_it_likes(wired: Namespace) -> None:
    with given(wired, policy(", vlan: any, macs: none"), "web1-0") as taps:
        assert taps["web1-0"].has_header()
        found = arriving(taps["web1-0"], wired.raw("v1"))
    assert found == {case.name for case in CASES if "kernel" not in case.stopped_by}
    assert sorted(wired.links()) == ["lo", "v0", "v1"]


@pytest.mark.parametrize("settings", ["", ", vlan: any", ", macs: none"])
def test_with_filters_there_is_none(settings: str, wired: Namespace) -> None:
    with pytest.raises(Failure) as refused, given(wired, policy(settings), "web1-0"):
        pass
    assert refused.value.status == 71
    assert "with vlan: any and macs: none there is nothing to filter" in str(refused.value)
    assert sorted(wired.links()) == ["lo", "v0", "v1"]
