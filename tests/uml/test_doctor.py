"""What doctor finds of VLANs on a Linux bridge, which only a kernel with VLAN filtering has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.clinic import Clinic, Faulty, Row, treat
from lab.hooks import Hooks
from lab.netns import Namespace

VLANS = (
    "networks: {lan: {bridge: br0}}\n"
    "rules: [{tap: 'fw*', network: lan, vlan: {native: 10, trunk: [20, 30-31]}}]\n"
)


def unfiltered(clinic: Clinic) -> Faulty:
    yield
    clinic.policy(VLANS)
    yield
    info = clinic.netns.link("br0")["linkinfo"]["info_data"]
    assert info["vlan_filtering"] == 1


def lost(clinic: Clinic) -> Faulty:
    yield
    clinic.policy(VLANS)
    clinic.ip("link", "del", "br0")
    yield
    assert clinic.find("vlan-filtering") == [], "what it is made for is made at once"


def uncarried(clinic: Clinic) -> Faulty:
    clinic.ip("link", "set", "br0", "type", "bridge", "vlan_filtering", "1")
    clinic.ip("link", "add", "eth0", "up", "type", "veth", "peer", "name", "far")
    clinic.ip("link", "set", "eth0", "master", "br0")
    clinic.netns.run(["bridge", "vlan", "add", "dev", "eth0", "vid", "30"])
    yield
    clinic.policy(VLANS)
    yield
    told = json.loads(clinic.netns.run(["bridge", "-j", "vlan", "show", "dev", "eth0"]).stdout)
    assert [each["vlan"] for each in told[0]["vlans"]] == [1, 10, 20, 30, 31]
    clinic.ip("link", "del", "eth0")


ROWS = (
    Row("bridge-missing", lost, "there is no bridge br0, which network lan is on"),
    Row("vlan-filtering", unfiltered, "br0 does not filter VLANs, and network lan wants VLAN 10,"),
    Row("uplink-vlan", uncarried, "no uplink of br0 carries VLAN 10, 20, 31"),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_vlans(row: Row, netns: Namespace, tmp_path: Path) -> None:
    treat(row, Clinic(netns, Hooks(tmp_path / "hooks", netns=netns.name), tmp_path))
