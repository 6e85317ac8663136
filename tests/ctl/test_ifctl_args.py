"""pyqemu-ifctl args, models and run VM, as a person starts them, and the real QEMUs that result."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyqemu_ifctl.verbs.run
from lab import boot
from lab.hooks import Hooks
from lab.needs import QEMU, lack, require
from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.public import NOBODY, as_user, public_folder, publish
from lab.qemu import Qemu
from lab.told import run_told
from lab.versions import VERSIONS, qemu_of
from pyqemu_ifconf.failure import Failure
from pyqemu_ifconf.policy import POLICY_VARIABLE
from pyqemu_ifctl.main import NO_ARGUMENTS
from pyqemu_ifctl.verbs.run import Nic, OwnTaps
from pyqemu_ifup.hook import STOP_SIGNALS

NETWORKS = {"lan": {"bridge": "br0"}, "big": {"bridge": "br0", "mtu": 1400}}
MODELS = ("virtio-net-pci", "e1000", "e1000e", "rtl8139")


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path, served: Callable[..., Hooks]) -> Iterator[Hooks]:
    """Hooks in a namespace with the bridge br0."""
    netns.add_bridge("br0", mac="02:00:00:00:00:01")
    netns.ip("link", "set", "br0", "mtu", "1499")
    netns.ip("link", "set", "br0", "mtu", "1500")
    yield served(Hooks(tmp_path / "hooks", netns.name))
    netns.ip("link", "del", "br0")


def write_vm(hooks: Hooks, *nics: dict[str, Any]) -> None:
    """Put a policy in force whose one guest web1 has these NICs."""
    policy = {"version": 1, "networks": NETWORKS, "vms": {"web1": {"nics": nics}}}
    hooks.write_policy(json.dumps(policy))


def arguments(hooks: Hooks, *words: str) -> list[str]:
    """Return what args prints, read as a shell reads it."""
    done = hooks.ctl("args", "web1", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    return shlex.split(done.stdout)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_real_qemu_has_the_nics_and_the_hooks_attach_them(
    hooks: Hooks, netns: Namespace, version: str
) -> None:
    program = qemu_of(version)
    nics = [{"network": "lan", "model": model} for model in MODELS]
    write_vm(hooks, *nics, {"network": "big", "tap": "a,b", "queues": 4, "addr": "0x9"},
             {"user": {"hostname": "web1"}, "model": "e1000"})  # fmt: skip
    words = arguments(hooks, "--qemu", program, "--machine", "q35")
    assert json.loads(hooks.ctl("args", "web1", "--qemu", program, "--json").stdout) == {
        "version": 1,
        "vm": "web1",
        "arguments": words,
    }
    with Qemu(
        *words, "-S", netns=netns.name, machine="q35", env=hooks.environ(), program=program
    ) as qemu:
        assert qemu.greeting
        links = netns.links()
        for tap in ("web1-0", "web1-1", "web1-2", "web1-3", "a,b"):
            assert links[tap]["master"] == "br0" and "UP" in links[tap]["flags"], tap
        assert links["a,b"]["mtu"] == 1400
        assert links["a,b"]["linkinfo"]["info_data"]["multi_queue"]
        told = qemu.hmp("info network")
        for number, model in enumerate((*MODELS, "virtio-net-pci", "e1000")):
            assert f"nic-net{number}: index=0,type=nic,model={model},macaddr=52:54:00:" in told
        assert told.count(" \\ net4: ") == 4, told
        assert qemu.quit() == 0
    assert set(netns.links()) == {"lo", "br0"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("model", MODELS)
def test_the_old_form_does_the_same(
    hooks: Hooks, netns: Namespace, version: str, model: str
) -> None:
    program = qemu_of(version)
    write_vm(hooks, {"network": "lan", "model": model, "mac": "52:54:00:00:00:07"})
    words = arguments(hooks, "--legacy", "--qemu", program)
    assert [word for word in words if word.startswith("-")] == ["-net", "-net"]
    with Qemu(
        *words, "-S", netns=netns.name, machine="pc", env=hooks.environ(), program=program
    ) as qemu:
        assert qemu.greeting
        assert netns.link("web1-0")["master"] == "br0"
        assert f"model={model},macaddr=52:54:00:00:00:07" in qemu.hmp("info network")
        assert qemu.quit() == 0
    assert set(netns.links()) == {"lo", "br0"}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_old_form_keeps_the_networks_of_several_nics_apart(
    hooks: Hooks, netns: Namespace, version: str
) -> None:
    program = qemu_of(version)
    write_vm(hooks, {"network": "lan"}, {"user": {}, "model": "e1000"})
    words = arguments(hooks, "--legacy", "--qemu", program)
    with Qemu(
        *words, "-S", netns=netns.name, machine="pc", env=hooks.environ(), program=program
    ) as qemu:
        assert qemu.greeting
        assert netns.link("web1-0")["master"] == "br0"
        told = qemu.hmp("info network")
        assert "hub" not in told
        types = [line.partition("type=")[2].split(",script")[0] for line in told.splitlines()]
        assert [each.partition(",macaddr")[0] for each in types if each] == [
            "nic,model=virtio-net-pci",
            "tap,ifname=web1-0",
            "nic,model=e1000",
            "user,net=10.0.2.0,restrict=off",
        ]
        assert qemu.quit() == 0
    assert set(netns.links()) == {"lo", "br0"}


FAILURES: dict[int, tuple[str, ...]] = {
    64: ("args",),
    65: ("args", "web1"),
    66: ("args", "web1"),
    69: ("args", "nobody"),
    70: ("args", "web1"),
    71: ("args", "web1"),
    75: ("args", "web1", "--qemu", "qemu-that-hangs"),
    78: ("args", "web1"),
}
"""Words by the status that they end with, once it is made so.

77 is none of them: nothing that args does is denied.
"""


def begin(hooks: Hooks, code: str) -> None:
    """Have pyqemu-ifctl run some Python first of all."""
    launcher = hooks.folder / "pyqemu-ifctl"
    text = launcher.read_text().replace("raise SystemExit", f"{code}\nraise SystemExit")
    launcher.write_text(text)


@pytest.mark.alone("no hook is called")
@pytest.mark.parametrize("status", FAILURES)
def test_what_fails_prints_a_word_that_no_qemu_takes(hooks: Hooks, status: int) -> None:
    write_vm(hooks, {"network": "lan", "model": "e1000" if status != 71 else "rtl8029"})
    if status == 65:
        hooks.write_policy("version: 2\n")
    elif status == 66:
        hooks.policy.unlink()
    elif status == 70:
        begin(hooks, "import pyqemu_ifctl.verbs.args\ndel pyqemu_ifctl.verbs.args.find_vm")
    elif status == 75:
        hanging = hooks.folder / "qemu-that-hangs"
        hanging.write_text("#!/bin/sh\nexec sleep 60\n")
        hanging.chmod(0o755)
        hooks.env["PATH"] = f"{hooks.folder}:{os.environ['PATH']}"
        begin(hooks, "import pyqemu_ifctl.qemu.binary\npyqemu_ifctl.qemu.binary.SECONDS = 1")
    elif status == 78:
        hooks.policy.chmod(0o666)
    words = FAILURES[status]
    done = hooks.ctl(*words)
    assert (done.returncode, done.stdout) == (status, f"{NO_ARGUMENTS}\n")
    assert done.stderr.startswith("pyqemu-ifctl: ")
    if status not in (64, 69):
        assert hooks.ctl(*words, "--json").stdout == ""


@pytest.mark.alone("no hook is called")
def test_what_fails_for_a_user_who_may_not_read_the_policy_prints_the_word_too(
    hooks: Hooks,
) -> None:
    write_vm(hooks, {"network": "lan"})
    with public_folder() as folder:
        public = publish(hooks, folder)
        public.policy.chmod(0o600)
        done = subprocess.run(
            [*as_user(NOBODY), str(public.folder / "pyqemu-ifctl"), "args", "web1"],
            env={**os.environ, "PYQEMU_IFUP_POLICY": str(public.policy)},
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (66, f"{NO_ARGUMENTS}\n")
    assert done.stderr == (f"pyqemu-ifctl: {public.policy}: it cannot be read: Permission denied\n")


@pytest.mark.alone("no hook is called")
def test_help_is_no_failure(hooks: Hooks) -> None:
    done = hooks.ctl("args", "--help")
    assert (done.returncode, NO_ARGUMENTS in done.stdout) == (0, False)


@pytest.mark.alone("no hook is called")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_is_stopped_prints_the_word_too(hooks: Hooks, number: signal.Signals) -> None:
    write_vm(hooks, {"network": "lan"})
    slow = hooks.folder / "slow-qemu"
    slow.write_text("#!/bin/sh\nkill -$STOP $PPID\ncat\n")
    slow.chmod(0o755)
    done = hooks.ctl("args", "web1", "--qemu", str(slow), STOP=str(int(number)))
    assert (done.returncode, done.stdout) == (-number, f"{NO_ARGUMENTS}\n")


AT_ONCE = """
import os
class Kill:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "argparse":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Kill)
from"""
"""What stops a launcher's process while it loads what the verbs need."""


@pytest.mark.alone("no hook is called")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_is_stopped_while_it_loads_prints_the_word_too(
    hooks: Hooks, number: signal.Signals
) -> None:
    write_vm(hooks, {"network": "lan"})
    launcher = hooks.folder / "pyqemu-ifctl"
    code = AT_ONCE.format(number=int(number))
    launcher.write_text(launcher.read_text().replace("\nfrom", code))
    done = hooks.ctl("args", "web1")
    assert (done.returncode, done.stdout, done.stderr) == (-number, f"{NO_ARGUMENTS}\n", "")


@pytest.mark.alone("no hook is called")
@pytest.mark.parametrize("descriptors", [3, 4, 5])
def test_what_has_too_few_descriptors_prints_the_word_too(hooks: Hooks, descriptors: int) -> None:
    """From when Python itself has started on."""
    write_vm(hooks, {"network": "lan"})
    launcher = hooks.folder / "pyqemu-ifctl"
    launcher.write_text(
        launcher.read_text().replace(
            "raise SystemExit",
            f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors},) * 2)\n"
            "raise SystemExit",
        )
    )
    done = hooks.ctl("args", "web1")
    assert done.returncode != 0 and done.stdout == f"{NO_ARGUMENTS}\n", done
    assert done.stderr.startswith("pyqemu-ifctl: ") and done.stderr.count("\n") == 1, done


@pytest.mark.alone("no hook is called")
@pytest.mark.parametrize(
    "line",
    [
        "arg web1",
        "agrs web1",
        "argss web1",
        "ARGS web1",
        "--json args web1",
        "--verbose args web1",
        "web1 args",
        "args web1 web2",
        "args --jsn web1",
        "statsu args",
    ],
)
def test_what_is_misspelt_prints_the_word_too(hooks: Hooks, line: str) -> None:
    write_vm(hooks, {"network": "lan"})
    done = hooks.ctl_warm(*line.split())
    # NOTE: standard error is in it too.
    assert (done.returncode, done.stdout.splitlines()[0]) == (64, NO_ARGUMENTS)


@pytest.mark.alone("no hook is called")
@pytest.mark.parametrize("line", ["statsu", "agnet", "run", "gcc", "--help", "args --json"])
def test_what_is_not_meant_for_qemu_prints_none(hooks: Hooks, line: str) -> None:
    assert NO_ARGUMENTS not in hooks.ctl_warm(*line.split()).stdout


@pytest.mark.alone("no hook is called")
@pytest.mark.parametrize("line", ["QEMU $(CTL args typo)", "QEMU $(CTL args typo) -m 128"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_shell_s_eval_starts_no_qemu(hooks: Hooks, version: str, line: str) -> None:
    """QEMU ends at once; without the word it would run, in user mode."""
    write_vm(hooks, {"network": "lan"})
    program = f"{qemu_of(version)} -M pc -accel tcg -display none -S"
    line = line.replace("QEMU", program).replace("CTL", f"{hooks.folder}/pyqemu-ifctl")
    words = ["timeout", "30", "sh", "-c", 'eval "$1"', "sh", f'eval "{line}"']
    done = subprocess.run(
        words,
        env={**hooks.environ(), "PYQEMU_IFUP_POLICY": str(hooks.policy)},
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1, done
    assert "pyqemu-ifctl: the policy has no guest typo" in done.stderr
    assert f"{NO_ARGUMENTS}: invalid option" in done.stderr


def start(hooks: Hooks, netns: Namespace, *words: str, qemu: str = QEMU) -> Qemu:
    """Start a QEMU by `run`, as root, which has no agent."""
    run = (str(hooks.folder / "pyqemu-ifctl"), "run", *words, "--")
    return Qemu(
        "-S", netns=netns.name, machine="q35", env=hooks.environ(), prefix=run, program=qemu
    )


@pytest.mark.alone("there is no agent")
def test_root_s_run_needs_no_agent(hooks: Hooks, netns: Namespace) -> None:
    require("qemu")
    write_vm(hooks, {"network": "big", "queues": 2}, {"network": "lan", "model": "e1000"})
    with start(hooks, netns, "web1", "--nic", "lan,id=more") as qemu:
        assert qemu.greeting
        told = qemu.hmp("info network")
        assert told.count("type=tap,fd=") + told.count("type=tap,ifname=") >= 3, told
        links = netns.links()
        assert {links[tap]["master"] for tap in ("web1-0", "web1-1", "tap0")} == {"br0"}
        assert links["web1-0"]["mtu"] == 1400
        assert f"network=big kind=linux bridge=br0 pid={qemu.pid} " in links["web1-0"]["ifalias"]
        assert {tap["state"] for tap in hooks.ctl_json("status")["taps"]} == {"ok"}
        assert qemu.quit() == 0
        assert "no agent" not in qemu.stderr
    assert set(netns.links()) == {"lo", "br0"}


@pytest.mark.alone("there is no agent")
@pytest.mark.parametrize("stop", STOP_SIGNALS, ids=lambda stop: stop.name)
def test_a_signal_between_two_taps_of_root_s_run_ends_it(
    hooks: Hooks, netns: Namespace, stop: signal.Signals
) -> None:
    write_vm(hooks)
    handlers = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    own = OwnTaps({POLICY_VARIABLE: str(hooks.policy)})
    opened: list[int] = []
    try:
        with netns.enter():
            opened += own.open(Nic("lan", "net0"))
            os.kill(os.getpid(), stop)
            for go_on in (lambda: own.open(Nic("lan", "net1")), own.hand_on):
                with pytest.raises(Failure, match=f"stopped: received {stop.name}"):
                    opened += go_on() or ()
            own.take_back()
    finally:
        for descriptor in opened:
            os.close(descriptor)
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert set(netns.links()) == {"lo", "br0"}


@pytest.mark.alone("there is no agent")
def test_what_is_ignored_stays_so_in_the_qemu_of_root_s_run(hooks: Hooks) -> None:
    """As nohup(1) has it of HUP; Python's own two are not."""
    write_vm(hooks)
    run = hooks.argv("pyqemu-ifctl", "run", "--nic", "lan", "--", "/bin/sh", "-c",
                     "grep SigIgn /proc/$$/status")  # fmt: skip
    done = subprocess.run(
        ["nohup", *run],
        env=hooks.environ(),
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done
    status = Path("/proc/self/status").read_text()
    (own,) = (int(line.split()[1], 16) for line in status.splitlines() if line[:6] == "SigIgn")
    for each in (signal.SIGPIPE, signal.SIGXFSZ):
        own &= ~(1 << each - 1)
    assert int(done.stdout.split()[1], 16) == own | 1 << signal.SIGHUP - 1


def write_switch(hooks: Hooks, ovs: OpenVSwitch) -> None:
    networks = {"sw": {"bridge": "br-int", "ovsdb": ovs.db, "vlan": 100}, **NETWORKS}
    policy = {"version": 1, "networks": networks, "vms": {"web1": {"nics": [{"network": "sw"}]}}}
    hooks.write_policy(json.dumps(policy))


@pytest.mark.alone("there is no agent")
def test_root_s_run_says_what_it_leaves_in_openvswitch(
    ovs: OpenVSwitch, hooks: Hooks, netns: Namespace
) -> None:
    require("qemu")
    ovs.add_bridge("br-int", hwaddr="02:00:00:00:00:09", mtu=1500)
    write_switch(hooks, ovs)
    with start(hooks, netns, "web1") as qemu:
        assert qemu.greeting
        assert ovs.row("Port", "web1-0")["tag"] == 100
        assert qemu.quit() == 0
        assert qemu.stderr == (
            "pyqemu-ifctl: no agent runs: when QEMU ends, the port web1-0 of Open vSwitch will "
            "stay until pyqemu-ifctl gc\n"
        )
        told = qemu.stderr
    assert ovs.find("Port", "web1-0") is not None
    run_told(hooks, told)
    assert ovs.find("Port", "web1-0") is None
    ovs.vsctl("del-br", "br-int")


@pytest.mark.alone("there is no agent")
def test_what_root_s_run_cannot_take_back_is_told(
    ovs: OpenVSwitch, hooks: Hooks, netns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ovs.add_bridge("br-int", hwaddr="02:00:00:00:00:09", mtu=1500)
    write_switch(hooks, ovs)
    handlers = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    lines: list[str] = []
    monkeypatch.setattr(pyqemu_ifctl.verbs.run, "log", lambda _, line: lines.append(line))
    own = OwnTaps({POLICY_VARIABLE: str(hooks.policy)})
    try:
        with netns.enter():
            opened = own.open(Nic("sw", "net0", tap="sw0"))
            ovs.server.stop()
            own.take_back()
    finally:
        ovs.server.cont()
        for each, handler in handlers.items():
            signal.signal(each, handler)
    for descriptor in opened:
        os.close(descriptor)
    (told,) = lines
    assert told.startswith("sw0: not taken back: ") and ovs.find("Port", "sw0") is not None
    run_told(hooks, told)
    assert ovs.find("Port", "sw0") is None
    ovs.vsctl("del-br", "br-int")


@pytest.mark.alone("there is no agent")
@pytest.mark.parametrize("how", ["a tap", "the program"])
def test_root_s_run_takes_back_what_it_did(
    ovs: OpenVSwitch, hooks: Hooks, netns: Namespace, how: str
) -> None:
    ovs.add_bridge("br-int", hwaddr="02:00:00:00:00:09", mtu=1500)
    write_switch(hooks, ovs)
    program = hooks.folder / "broken"
    program.write_text("#!/nowhere\n")
    program.chmod(0o755)
    more = ["--nic", "lan,tap=br0,id=more"] if how == "a tap" else []
    done = hooks.run("pyqemu-ifctl", "run", "web1", *more, "--", str(program))
    if how == "a tap":
        assert done.returncode == 77
        assert done.stderr.startswith("pyqemu-ifctl: br0: the name br0 is not for a tap: ")
    else:
        assert done.returncode == 69
        assert f"cannot run {program}: No such file or directory" in done.stderr
    assert ovs.find("Port", "web1-0") is None
    assert "web1-0" not in netns.links()
    ovs.vsctl("del-br", "br-int")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_network_with_nat_with_each_model(hooks: Hooks, netns: Namespace, version: str) -> None:
    require("dnsmasq")
    program = qemu_of(version)
    nics: list[dict[str, Any]] = [{"network": "lab", "model": model} for model in MODELS]
    nics.append({"network": "lab", "queues": 4})
    networks = {"lab": {"bridge": "labbr0", "nat": {"ipv4": "192.168.76.1/24"}}}
    policy = {"version": 1, "networks": networks, "vms": {"web1": {"nics": nics}}}
    hooks.write_policy(json.dumps(policy))
    words = arguments(hooks, "--qemu", program)
    with Qemu(
        *words, "-S", netns=netns.name, machine="pc", env=hooks.environ(), program=program
    ) as qemu:
        assert qemu.greeting
        links = netns.links()
        assert {links[f"web1-{number}"]["master"] for number in range(len(nics))} == {"labbr0"}
        told = qemu.hmp("info network")
        assert all(f"type=nic,model={nic['model']}," in told for nic in nics if "model" in nic)
        assert qemu.quit() == 0
    end = time.monotonic() + boot.PATIENCE
    while set(netns.links()) != {"lo", "br0"}:
        assert time.monotonic() < end, netns.links()
        time.sleep(0.05)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.alone("no hook is called")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("form", [(), ("--legacy",)], ids=["modern", "legacy"])
def test_user_mode_with_each_model(
    hooks: Hooks, netns: Namespace, version: str, form: tuple[str, ...], model: str
) -> None:
    program = qemu_of(version)
    forward = [{"from": "127.0.0.1:2222/tcp", "to": ":22"}, {"from": "53/udp", "to": "10.7.0.9:53"}]
    user = {"ipv4": "10.7.0.0/27", "ipv6": "false", "forward": forward, "dns": "10.7.0.5",
            "search": ["lab.test", "b"], "hostname": "web1"}  # fmt: skip
    write_vm(hooks, {"user": user, "model": model})
    hooks.write_policy(hooks.policy.read_text().replace('"false"', "false"))
    words = arguments(hooks, *form, "--qemu", program)
    with Qemu(*words, "-S", netns=netns.name, machine="pc", program=program) as qemu:
        assert qemu.greeting
        told = qemu.hmp("info network")
        assert f"model={model}," in told and "net=10.7.0.0,restrict=off" in told
        ports = qemu.hmp("info usernet")
        assert "2222" in ports and "10.7.0.9" in ports
        assert qemu.quit() == 0


@pytest.mark.alone("no hook is called")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_guest_without_a_nic_has_none(hooks: Hooks, netns: Namespace, version: str) -> None:
    """Not even the one in user mode that QEMU gives a guest of which it is told nothing."""
    program = qemu_of(version)
    write_vm(hooks)
    done = hooks.run("pyqemu-ifctl", "run", "web1", "--", "/bin/echo",
                     PYQEMU_IFUP_POLICY=str(hooks.policy))  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "-nic none\n", "")
    script = 'printf "info network\\nquit\\n" | "$@"'
    plain = [program, "-M", "pc", "-S", "-display", "none", "-monitor", "stdio", "-serial", "none"]
    for words, has in ((arguments(hooks, "--qemu", program), False), ([], True)):
        ran = netns.run(["sh", "-c", script, "sh", *plain, *words], check=False)
        assert ran.returncode == 0, ran.stderr
        assert ("type=nic" in ran.stdout) is has, ran.stdout


def answer(netns: Namespace, port: int) -> bytes:
    """Return what answers at the port, tried until something does."""
    end = time.monotonic() + boot.PATIENCE
    while True:
        with netns.enter(), socket.create_connection(("127.0.0.1", port), 30) as connection:
            connection.settimeout(30)
            said = connection.recv(100)
        if said or time.monotonic() > end:
            return said
        time.sleep(0.1)


@pytest.mark.alone("no hook is called")
@pytest.mark.timeout(200)
def test_a_forward_of_user_mode_carries_a_connection(hooks: Hooks, netns: Namespace) -> None:
    require("qemu")
    reason = boot.setup()
    if reason is not None:
        lack(reason)
    forward = [{"from": "127.0.0.1:2222/tcp", "to": ":22"}]
    write_vm(hooks, {"user": {"ipv4": "10.7.0.0/24", "forward": forward}})
    with boot.Console() as console:
        guest = boot.guest_arguments(console, ip="dhcp", serve=22, hold=True)
        with Qemu(*guest, *arguments(hooks), netns=netns.name, machine="pc") as qemu:
            assert console.wait("lease").startswith("lease 10.7.0.15 ")
            assert console.wait("ready")
            assert answer(netns, 2222) == b"GUEST serves 22\n"
            assert qemu.quit() == 0


@pytest.mark.alone("no hook is called")
@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["args", "web2"], 69, "the policy has no guest web2: its guests are web1; add it to vms:"),
        (["args"], 64, "the following arguments are required: VM; see pyqemu-ifctl args --help"),
        (["args", "web1", "--qemu", "/nowhere"], 69,
         "there is no QEMU called /nowhere: No such file or directory; name a QEMU that is there"),
        (["args", "web1", "--qemu", "/bin/false"], 71,
         "/bin/false does not take these NICs: it ended with 1; correct vms: in the policy, "),
        (["args", "web1", "--machine", "isapc"], 71, "/usr/bin/qemu-system-x86_64 does not take "),
        (["models", "/bin/true"], 71,
         "/bin/true tells of no network devices: -device help ended with 0; name another QEMU"),
        (["models", "/nowhere"], 69, "there is no QEMU called /nowhere: "),
    ],
)  # fmt: skip
def test_failures(hooks: Hooks, words: list[str], status: int, text: str) -> None:
    require("qemu")
    write_vm(hooks, {"network": "lan"})
    done = hooks.ctl(*words)
    out = f"{NO_ARGUMENTS}\n" if words[0] == "args" else ""
    assert (done.returncode, done.stdout) == (status, out)
    assert done.stderr.startswith(f"pyqemu-ifctl: {text}")


@pytest.mark.alone("no hook is called")
def test_no_qemu_is_asked_where_none_shall_be(hooks: Hooks) -> None:
    write_vm(hooks, {"network": "lan", "model": "of-another-host", "mac": "52:54:00:00:00:07"})
    words = arguments(hooks, "--no-check", "--qemu", "/nowhere")
    assert words == [
        "-netdev",
        f"tap,id=net0,ifname=web1-0,script={hooks.ifup},downscript={hooks.ifdown}",
        "-device",
        "of-another-host,netdev=net0,id=nic-net0,mac=52:54:00:00:00:07",
    ]


@pytest.mark.alone("no hook is called")
def test_models(hooks: Hooks) -> None:
    require("qemu")
    done = hooks.ctl("models")
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[0].split()) == (0, ["MODEL", "BUS", "ALIAS", "DESCRIPTION"])
    assert any(line.split()[:3] == ["e1000", "PCI", "e1000-82540em"] for line in lines)
    assert not any(line.endswith("~") for line in lines), "nothing is cut in a pipe"
    told = json.loads(hooks.ctl("models", "--json").stdout)
    assert (told["version"], told["qemu"]) == (1, "/usr/bin/qemu-system-x86_64")
    assert {"model": "rtl8139", "bus": "PCI", "alias": None, "description": None} in told["models"]


@pytest.mark.alone("no hook is called")
def test_check_and_explain_know_the_guests(hooks: Hooks) -> None:
    write_vm(hooks, {"network": "big", "tap": "web7"})
    assert hooks.ctl("check").stdout == "ok: 2 networks, 0 rules, 1 guest\n"
    assert hooks.ctl_json("check")["vms"] == 1
    told = hooks.ctl_json("explain", "web7")
    assert (told["decision"], told["rule"], told["port"]["mtu"]) == (
        "attach",
        f"{hooks.policy}:1",
        1400,
    )
