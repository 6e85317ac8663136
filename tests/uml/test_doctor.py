"""What doctor finds of VLANs on a Linux bridge, which only a kernel with VLAN filtering has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.clinic import ALL, Clinic, Faulty, Row, treat
from lab.hooks import Hooks
from lab.netns import Namespace
from lab.taps import carries
from pyqemu_ifconf.policy import POLICY_VARIABLE
from pyqemu_ifctl.verbs.doctor import doctor
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.kinds import vswitchd

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


def taken_away(clinic: Clinic) -> Faulty:
    """A VLAN device that a script has left on a guest's tap."""
    clinic.policy("networks: {lan: {bridge: br0, vlan: {trunk: [100]}}}\n" + ALL)
    clinic.ip("link", "set", "br0", "type", "bridge", "vlan_filtering", "1")
    for name in ("web0", "web1"):
        clinic.ip("tuntap", "add", "dev", name, "mode", "tap")
    one, two = guests = [clinic.netns.tap(name) for name in ("web0", "web1")]
    for guest in guests:
        assert clinic.hooks.up(guest.name).returncode == 0
    assert carries(one, two, b"before all".ljust(20), (100,), timeout=10.0)
    yield
    clinic.ip("link", "add", "link", "web0", "name", "web0.100", "up", "type", "vlan", "id", "100")
    assert carries(one, two, b"taken away".ljust(20), (100,), timeout=1.0) is None
    (row,) = [row for row in clinic.hooks.ctl_json("status")["taps"] if row["tap"] == "web0"]
    (told,) = row["differences"]
    assert (told["setting"], told["wanted"], told["is"]) == ("device", "none", "web0.100")
    yield
    assert carries(one, two, b"back again".ljust(20), (100,), timeout=10.0)
    for guest in guests:
        assert clinic.hooks.down(guest.name).returncode == 0
        guest.close()
        clinic.ip("link", "del", guest.name)


def taken_from_the_uplink(clinic: Clinic) -> Faulty:
    clinic.ip("link", "set", "br0", "type", "bridge", "vlan_filtering", "1")
    clinic.ip("link", "add", "eth0", "up", "type", "veth", "peer", "name", "far")
    clinic.ip("link", "set", "eth0", "master", "br0")
    clinic.ip("link", "add", "link", "eth0", "name", "eth0.20", "up", "type", "vlan", "id", "20")
    yield
    clinic.policy(VLANS)
    yield
    clinic.ip("link", "del", "eth0")


ROWS = (
    Row(
        "port-device",
        taken_away,
        "web0.100, a vlan device, takes the frames of VLAN 100 from web0 before br0 sees them",
    ),
    Row(
        "port-device",
        taken_from_the_uplink,
        "eth0.20, a vlan device, takes the frames of VLAN 20 from eth0 before br0 sees them",
    ),
    Row("bridge-missing", lost, "there is no bridge br0, which network lan is on"),
    Row("vlan-filtering", unfiltered, "br0 does not filter VLANs, and network lan wants VLAN 10,"),
    Row("uplink-vlan", uncarried, "no uplink of br0 carries VLAN 10, 20, 31"),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_vlans(row: Row, netns: Namespace, tmp_path: Path) -> None:
    treat(row, Clinic(netns, Hooks(tmp_path / "hooks", netns=netns.name), tmp_path))


def test_vlans_that_there_was_no_time_for_are_not_taken_for_absent(
    netns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clinic = Clinic(netns, Hooks(tmp_path / "hooks", netns=netns.name), tmp_path)
    with clinic.healthy():
        clinic.ip("link", "set", "br0", "type", "bridge", "vlan_filtering", "1")
        clinic.ip("link", "add", "eth0", "up", "type", "veth", "peer", "name", "far")
        clinic.ip("link", "set", "eth0", "master", "br0")
        for vid in (10, 20, 30, 31):
            clinic.netns.run(["bridge", "vlan", "add", "dev", "eth0", "vid", str(vid)])
        clinic.policy(VLANS)
        assert clinic.find("uplink-vlan") == []

        def use_up_the_time(*_: object) -> dict[str, object]:
            monkeypatch.setattr(Deadline, "remaining", lambda _: 0.0)
            return {}

        monkeypatch.setattr(vswitchd, "settled", use_up_the_time)
        with netns.enter():
            answer = doctor(
                {POLICY_VARIABLE: str(clinic.hooks.policy)}, Deadline(60.0), print, as_json=True
            )
        told = json.loads(answer.out)
        assert "the VLANs of ports: the time was up before" in told["unseen"]
        assert [each for each in told["findings"] if each["check"] == "uplink-vlan"] == []
        clinic.ip("link", "del", "eth0")
