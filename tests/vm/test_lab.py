"""What only the virtual machine has: a whole machine's kernel, 8021q beside chains at a link."""

from __future__ import annotations

import os
from pathlib import Path

from lab.inside import ROOT
from lab.needs import missing

HOST = Path("/proc/sys/kernel/hostname")


def test_it_has_what_no_other_kernel_here_has() -> None:
    assert HOST.read_text() == "vm\n"
    assert missing("root", "tun", "ip", "nft", "macvtap", "netdev-chains") is None
    modules = Path("/lib/modules", os.uname().release)
    names = {
        line.split(":")[0].split("/")[-1].split(".")[0]
        for line in (modules / "modules.dep").read_text().splitlines()
    }
    assert {"8021q", "igb", "openvswitch", "vfio-pci", "vhost_net"} <= names


def test_it_sees_this_machine_s_files_and_writes_to_none() -> None:
    assert (ROOT / "setup.cfg").read_text().startswith("[metadata]")
    left = ROOT / "tests" / "vm" / "written"
    left.write_text("inside\n")
    assert left.read_text() == "inside\n"
    assert "/ overlay " in Path("/proc/mounts").read_text()
