"""Where root may little: a container with a read-only root and /proc/sys, and rootless.

Nobody logs there, no agent serves, and no systemd runs.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from lab.container import Container
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.qemu import Qemu


class Job:
    """The programs, as they run in a container with the policy's network `lan`."""

    def __init__(self, place: Any, hooks: Hooks, lan: dict[str, Any]) -> None:
        self.place, self.hooks = place, hooks
        hooks.write_policy(json.dumps({
            "version": 1, "networks": {"lan": lan}, "rules": [{"tap": "*", "network": "lan"}],
        }))  # fmt: skip
        place.env = {"PYQEMU_IFUP_POLICY": str(hooks.policy), "PYQEMU_IFUP_SOCKET": ""}

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one of the programs inside, to its end."""
        done: subprocess.CompletedProcess[str] = self.place.run(
            str(self.hooks.folder / program), *words
        )
        return done

    def ctl(self, *words: str, status: int = 0) -> str:
        """Return what pyqemu-ifctl prints inside, which ends so and says nothing else."""
        done = self.run("pyqemu-ifctl", *words)
        assert (done.returncode, done.stderr) == (status, ""), done
        return done.stdout

    def qemu(self, *words: str) -> Qemu:
        """Start QEMU inside, with the tap web0."""
        scripts = f"script={self.hooks.ifup},downscript={self.hooks.ifdown}"
        return Qemu(
            "-name", "web", "-netdev", f"tap,id=n,ifname=web0,{scripts}", *words,
            prefix=self.place.argv(), env=self.place.env,
        )


def addresses(netns: Namespace, link: str) -> list[str]:
    return [each["local"] for it in netns.ip("-6", "address", "show", "dev", link)
            for each in it.get("addr_info", ())]  # fmt: skip


def test_the_main_job_in_a_container(netns: Namespace, tmp_path: Path) -> None:
    require("qemu")
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    with Container(netns, "read-only") as place:
        job = Job(place, Hooks(tmp_path / "hooks"), {"bridge": "br0"})
        assert place.run("touch", "/x", "/proc/sys/net/ipv4/ip_forward").returncode != 0
        with job.qemu() as qemu:
            assert qemu.greeting
            link = netns.link("web0")
            assert (link["master"], "UP" in link["flags"]) == ("br0", True)
            assert (link["inet6_addr_gen_mode"], addresses(netns, "web0")) == ("none", [])
            (row,) = json.loads(job.ctl("status", "--json"))["taps"]
            assert (row["state"], row["vm"], row["differences"]) == ("ok", "web", []), row
            assert " addrgenmode none\n" not in job.ctl("explain", "web0")
            assert job.ctl("explain", "other0").count(" addrgenmode none\n") == 1
            assert "/proc/sys/net/ipv6/conf" not in job.ctl("explain", "other0")
            assert job.ctl("apply") == "1 tap as the policy says\n"
            assert "web" in job.ctl("info")
            assert job.ctl("gc") == "nothing to remove\n"
            assert json.loads(job.run("pyqemu-ifctl", "doctor", "--json").stdout)["version"] == 1
            assert (qemu.quit(), "network script" in qemu.stderr) == (0, False)
    netns.ip("link", "del", "br0")
