"""Two taps on one hub of QEMU's: which command lines say so, and that the hook refuses them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.clinic import until
from lab.hooks import Hooks
from lab.needs import require
from lab.netns import Namespace
from lab.qemu import Qemu
from pyqemu_ifup.qemu.caller import read_command_line
from pyqemu_ifup.qemu.hubs import WHY
from pyqemu_ifup.qemu.read_config import CONFIG_MAX, LINE_MAX, Section, parse, read_config
from pyqemu_ifup.system.process import real_uid

REFUSED = 71
HOOKS = "script=IFUP,downscript=IFDOWN"


def port(id: str, hub: object, *netdev: str) -> tuple[str, str]:
    """Return the -netdev of a hub's port."""
    return "-netdev", ",".join([f"hubport,id={id},hubid={hub}", *(f"netdev={n}" for n in netdev)])


def net(ifname: str) -> tuple[str, ...]:
    """Return the -net of a NIC and of a tap that the hooks attach."""
    return "-net", "nic,model=e1000", "-net", f"tap,ifname={ifname},{HOOKS}"


def netdev(id: str, ifname: str) -> tuple[str, str]:
    """Return the -netdev of a tap that the hooks attach."""
    return "-netdev", f"tap,id={id},ifname={ifname},{HOOKS}"


def json_tap(id: str, ifname: str) -> tuple[str, str]:
    """Return the -netdev of a tap that the hooks attach, in JSON, which QEMU reads first."""
    tap = {"type": "tap", "id": id, "ifname": ifname, "script": "IFUP", "downscript": "IFDOWN"}
    return "-netdev", json.dumps(tap)


def json_port(id: str, hub: int, netdev: str) -> tuple[str, str]:
    """Return the -netdev of a hub's port, in JSON."""
    return "-netdev", json.dumps({"type": "hubport", "id": id, "hubid": hub, "netdev": netdev})


@dataclass(frozen=True)
class Line:
    """A command line that QEMU takes, and what the taps t0 and t1 are told to share a hub with."""

    title: str
    argv: tuple[str, ...]
    t0: tuple[str, ...] = ()
    t1: tuple[str, ...] = ()


BOTH = {"t0": ("t1",), "t1": ("t0",)}
SILENT = "script=no,downscript=no"
LINES = (
    Line("two -net tap", (*net("t0"), *net("t1")), **BOTH),
    Line(
        "-net tap and a netdev on hub 0",
        (*net("t0"), *netdev("n1", "t1"), *port("h", 0, "n1")),
        **BOTH,
    ),
    Line(
        "two netdevs on hub 1",
        (*netdev("n0", "t0"), *netdev("n1", "t1"), *port("a", 1, "n0"), *port("b", "0x1", "n1")),
        **BOTH,
    ),
    Line(
        "by JSON",
        (
            *json_tap("n0", "t0"),
            *json_tap("n1", "t1"),
            *json_port("a", 7, "n0"),
            *json_port("b", 7, "n1"),
        ),
        **BOTH,
    ),
    Line(
        "on two hubs that a port joins",
        (
            *netdev("n0", "t0"),
            *netdev("n1", "t1"),
            *port("a", 3, "n0"),
            *port("b", "010", "n1"),
            *port("c", 3),
            *port("d", 8, "c"),
        ),
        **BOTH,
    ),
    Line(
        "by -set",
        (
            *netdev("n0", "t0"),
            *netdev("n1", "t1"),
            *port("a", 1, "n0"),
            *port("b", 2, "n1"),
            "-set",
            "netdev.b.hubid=1",
        ),
        **BOTH,
    ),
    Line(
        "with a tap that calls no script",
        (*net("t0"), "-net", f"tap,ifname=t1,{SILENT}"),
        t0=("t1",),
    ),
    Line(
        "with a tap that the kernel names",
        (*net("t0"), "-netdev", f"tap,id=n1,{SILENT}", *port("h", 0, "n1")),
        t0=("netdev n1",),
    ),
    Line(
        "with a -net tap that the kernel names",
        (*net("t0"), "-net", f"tap,{SILENT}"),
        t0=("a -net tap",),
    ),
    # Nothing is joined.
    Line("each on its own netdev", (*netdev("n0", "t0"), *netdev("n1", "t1"))),
    Line("one on hub 0, one on a netdev", (*net("t0"), *netdev("n1", "t1"))),
    Line(
        "on two hubs",
        (*netdev("n0", "t0"), *netdev("n1", "t1"), *port("a", 1, "n0"), *port("b", 2, "n1")),
    ),
    Line("two NICs and one tap", (*net("t0"), "-net", "nic,model=e1000", *netdev("n1", "t1"))),
    Line("with user mode", (*net("t0"), "-net", "user", *netdev("n1", "t1"))),
)


@pytest.mark.parametrize("line", LINES, ids=[line.title for line in LINES])
def test_a_command_line_tells_what_is_joined(line: Line) -> None:
    argv = ["qemu-system-x86_64", *line.argv]
    assert read_command_line(argv, "t0").joined == line.t0
    assert read_command_line(argv, "t1").joined == line.t1


def test_what_is_no_tap_of_a_command_line_is_not_joined() -> None:
    argv = ["qemu-system-x86_64", *net("t0"), *net("t1"), "-net", "tap,fd=7"]
    assert read_command_line(argv, "hotplugged0").joined == ()
    assert read_command_line(argv, "any0", helped=True).joined == ()


def test_an_unnamed_tap_is_joined_and_one_by_descriptor_or_helper_counts() -> None:
    argv = ["qemu-system-x86_64", "-net", "tap", "-net", "tap,fd=7", "-net", "bridge"]
    assert read_command_line(argv, "tap3").joined == ("a -net tap", "a -net bridge")
    assert read_command_line(argv, "tap3", helped=True).joined == ("a -net tap", "a -net tap")


def test_many_on_one_hub_are_told_briefly() -> None:
    argv = ["q", *(word for number in range(4000) for word in net(f"t{number}"))]
    assert read_command_line(argv, "t3999").joined == ("t0", "t1", "t2", "t3")


@pytest.mark.parametrize(
    "number", ["", "x", "08", "9" * 4000, "1-2", "\ud800"], ids=lambda number: ascii(number)[:9]
)
def test_numbers_that_no_hub_has_join_nothing(number: str) -> None:
    argv = ["q", *netdev("n0", "t0"), *port("h", number, "n0"), *net("t1")]
    assert read_command_line(argv, "t0").joined == ()


@pytest.fixture
def hooks(netns: Namespace, tmp_path: Path) -> Iterator[Hooks]:
    """Hooks, and two networks that t0 and t1 are on."""
    require("qemu")
    for number in range(2):
        netns.add_bridge(f"br{number}", mac=f"02:00:00:00:00:0{number}")
    found = Hooks(tmp_path / "hooks", netns.name)
    found.write_policy(
        "version: 1\nnetworks: {a: {bridge: br0}, b: {bridge: br1}}\n"
        "rules: [{tap: t0, network: a}, {tap: t1, network: b}]\n"
    )
    yield found
    for number in range(2):
        netns.ip("link", "del", f"br{number}")


def called(hooks: Hooks, *argv: str) -> list[str]:
    """Return the words with the hooks' paths in them."""
    return [word.replace("IFUP", hooks.ifup).replace("IFDOWN", hooks.ifdown) for word in argv]


REAL = [
    line
    for line in LINES
    if line.title
    in (
        "two -net tap",
        "by JSON",
        "on two hubs that a port joins",
        "with a tap that calls no script",
        "two NICs and one tap",
    )
]


@pytest.mark.parametrize("line", REAL, ids=[line.title for line in REAL])
def test_a_real_qemu_is_refused(line: Line, hooks: Hooks, netns: Namespace) -> None:
    """It does not start, and no port is left on either bridge; what joins nothing starts."""
    argv = called(hooks, *line.argv)
    with Qemu("-S", *argv, netns=netns.name, machine="pc", env=hooks.environ()) as qemu:
        if not line.t0:
            assert qemu.greeting
            assert netns.link("t0")["master"] == "br0"
            assert qemu.quit() == 0
            return
        assert qemu.wait() == 1
        assert f"pyqemu-ifup: t0: on one hub with t1: {WHY}; give each tap a -netdev" in qemu.stderr
        assert f"failed with status {REFUSED * 256}" in qemu.stderr
    assert not {"t0", "t1"} & set(netns.links())


def test_a_deny_is_told_first(hooks: Hooks, netns: Namespace) -> None:
    hooks.write_policy("version: 1\nnetworks: {}\nrules: [{tap: '*', deny: not here}]\n")
    argv = called(hooks, *net("t0"), *net("t1"))
    with Qemu("-S", *argv, netns=netns.name, machine="pc", env=hooks.environ()) as qemu:
        assert qemu.wait() == 1
        assert "t0: denied: not here" in qemu.stderr


def config(*sections: tuple[str, str]) -> str:
    """Return a file for -readconfig: the head of each section, and its keys as key=value,..."""
    lines = ["# by hand"]
    for head, keys in sections:
        lines.append(f"[{head}]")
        for pair in keys.split(","):
            key, _, value = pair.partition("=")
            lines.append(f'  {key} = "{value}"')
    return "\n".join(lines) + "\n"


CONFIGS = {
    "two -net tap": config(
        ("net", f"type=tap,ifname=t0,{HOOKS}"),
        ("net", f"type=tap,ifname=t1,{HOOKS}"),
        ("net", "type=nic,model=e1000"),
    ),
    "two netdevs": config(
        ('netdev "a"', f"type=tap,ifname=t0,{HOOKS}"),
        ('netdev "b"', f"type=tap,ifname=t1,{HOOKS}"),
        ('netdev "h1"', "type=hubport,hubid=0,netdev=a"),
        ('netdev "h2"', "type=hubport,hubid=0,netdev=b"),
    ),
}


@pytest.fixture
def vm_cfg(tmp_path: Path) -> Path:
    """The path of a file for -readconfig, which a symbolic link leads to."""
    (tmp_path / "vms").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "vms")
    return tmp_path / "here" / "vm.cfg"


@pytest.mark.parametrize("title", CONFIGS)
def test_a_hub_by_readconfig_is_refused(
    title: str, hooks: Hooks, netns: Namespace, vm_cfg: Path
) -> None:
    vm_cfg.write_text(*called(hooks, CONFIGS[title]))
    with Qemu(
        "-S",
        "-readconfig",
        "here/vm.cfg",
        netns=netns.name,
        machine="pc",
        env=hooks.environ(),
        cwd=vm_cfg.parents[1],
    ) as qemu:
        assert qemu.wait() == 1
        assert "pyqemu-ifup: t0: on one hub with t1: " in qemu.stderr
    assert not {"t0", "t1"} & set(netns.links())


def test_doctor_sees_a_hub_by_readconfig(hooks: Hooks, netns: Namespace, vm_cfg: Path) -> None:
    vm_cfg.write_text(CONFIGS["two netdevs"].replace("IFUP", "no").replace("IFDOWN", "no"))
    with Qemu("-S", "-readconfig", str(vm_cfg), netns=netns.name, env=hooks.environ()) as qemu:
        assert qemu.greeting
        for tap in ("t0", "t1"):
            netns.ip("link", "set", tap, "up", "master", "br0")
        done = hooks.ctl("doctor", "qemu-hub")
        assert (done.returncode, "t0 and t1 of QEMU" in done.stdout) == (1, True), done
        assert qemu.quit() == 0


def test_a_rule_matches_what_readconfig_says(hooks: Hooks, netns: Namespace, vm_cfg: Path) -> None:
    mac = "52:54:00:00:00:07"
    hooks.write_policy(
        "version: 1\nnetworks: {a: {bridge: br0}}\n"
        f"rules: [{{vm: web1, netdev: n0, mac: '{mac}', network: a}}]\n"
    )
    vm_cfg.write_text(
        *called(
            hooks,
            config(
                ("name", "guest=web1"),
                ('netdev "n0"', f"type=tap,{HOOKS}"),
                ('device "x"', f"driver=e1000,netdev=n0,mac={mac}"),
            ),
        )
    )
    with Qemu(
        "-S",
        "-readconfig",
        str(vm_cfg),
        "-set",
        "netdev.n0.ifname=t0",
        netns=netns.name,
        machine="pc",
        env=hooks.environ(),
    ) as qemu:
        assert qemu.greeting, qemu.stderr
        assert netns.link("t0")["master"] == "br0"
        assert qemu.quit() == 0


def test_a_file_is_read_of_the_same_user_and_without_waiting(tmp_path: Path) -> None:
    file = tmp_path / "vm.cfg"
    file.write_text(CONFIGS["two -net tap"])
    child = subprocess.Popen(
        ["setpriv", "--reuid=65533", "--clear-groups", "cat"], stdin=subprocess.PIPE, cwd=tmp_path
    )
    try:
        until(lambda: real_uid(child.pid) == 65533, "another user's process")
        assert read_config(child.pid, str(file)) is None
    finally:
        child.communicate()
    own = os.getpid()
    assert read_config(own, str(file)) == parse(file.read_bytes())
    assert parse(file.read_bytes())
    file.write_bytes(b"#\n" * CONFIG_MAX)
    assert read_config(own, str(file)) is None


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("{folder}/fifo", id="a FIFO"),
        pytest.param("{folder}/link", id="a link to stdin"),
        pytest.param("/dev/stdin", id="stdin"),
        pytest.param("/proc/self/status", id="of the reader's own"),
        pytest.param("{folder}", id="a folder"),
        pytest.param("nowhere", id="nowhere"),
        pytest.param("/dev/zero", id="a device"),
        pytest.param("", id="empty"),
        pytest.param("\ud800", id="a surrogate"),
        pytest.param("x" * 5000, id="too long"),
        pytest.param("{folder}/vm.cfg/x", id="below a file"),
    ],
)
def test_what_is_no_file_is_not_read(tmp_path: Path, path: str) -> None:
    (tmp_path / "vm.cfg").write_text(CONFIGS["two -net tap"])
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/proc/self/fd/0")
    assert read_config(os.getpid(), path.format(folder=tmp_path)) is None


@pytest.mark.parametrize("path", ["{folder}/link/vm.cfg", "there/../link/vm.cfg"])
def test_a_file_is_looked_up_as_its_process_sees_it(tmp_path: Path, path: str) -> None:
    """In a mount namespace of its own, where a symbolic link leads elsewhere too."""
    text = CONFIGS["two netdevs"]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "vm.cfg").write_text(CONFIGS["two -net tap"])
    (tmp_path / "link").symlink_to(tmp_path / "there")
    script = 'mount -t tmpfs vms there && printf %s "$1" >there/vm.cfg && echo && exec cat'
    child = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script, "sh", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == b"\n"
        found = read_config(child.pid, path.format(folder=tmp_path))
        assert found == parse(text.encode())
    finally:
        child.communicate()


@pytest.mark.parametrize("text", [
    b'k = "v"\n', b"[]\n", b"[net]\n   \n", b"[net]\n" + b"x" * LINE_MAX + b"\n", b"[net]\n\0\n",
])  # fmt: skip
def test_what_qemu_does_not_take_is_not_read(text: bytes) -> None:
    assert parse(text) is None


def test_keys_as_qemu_reads_them() -> None:
    found = parse(b'[netdev "a b"]\n\tx = "1"\n y  ="2" # z\nid="3"\n w = b\n x = "4"\n\n#\n[net')
    assert found == [
        Section("netdev", "a b", {"x": "4", "y": "2", 'id="3"': "", "w": ""}),
        Section("net", None, {}),
    ]
