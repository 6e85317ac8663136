"""What the README begins with: a policy and a QEMU that a newcomer copies."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lab.checkout import ROOT
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.qemu import Qemu

_POLICY = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_QEMU = re.compile(r"^    (qemu-system-x86_64 (?:.*\\\n)*.*)$", re.MULTILINE)


def first_steps(readme: str) -> tuple[str, list[str]]:
    """Return the first policy of a README, and the words of its first QEMU."""
    policy, qemu = _POLICY.search(readme), _QEMU.search(readme)
    assert policy is not None and qemu is not None
    return policy[1], shlex.split(qemu[1].replace("\\\n", ""))


def test_the_first_policy_and_the_first_qemu(netns: Namespace, tmp_path: Path) -> None:
    """They stand before all else, and plug the tap in."""
    require("qemu")
    hooks = Hooks(tmp_path / "hooks", netns.name)
    readme = (ROOT / "README.md").read_text()
    policy, words = first_steps(readme)
    assert len(policy.splitlines()) == 6 and readme.index(words[-1]) < readme.index("\n## ")
    hooks.write_policy(policy)
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    words = [word.replace("/usr/local/bin", str(hooks.folder)) for word in words[1:]]
    with Qemu(*words, netns=netns.name, env=hooks.environ(), machine="pc") as qemu:
        assert qemu.greeting, qemu.stderr
        assert netns.link("web0")["master"] == "br0"
        assert qemu.quit() == 0 and qemu.stderr == ""
    netns.ip("link", "del", "dev", "br0")
