"""Who is asking, from command lines alone and from /proc."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lab.checkout import ROOT
from lab.needs import require
from lab.spellings import HOOK, MAC, OTHER, SPELLINGS, Spelling
from pyqemu_ifconf.policy import Caller
from pyqemu_ifup.qemu.caller import find_caller, read_command_line
from pyqemu_ifup.system.process import SIZE_MAX, process_start

SOURCES = [str(ROOT / "conf"), str(ROOT / "ifup")]
TAP = "tap,id=n0"
NOBODY = 54321
"""A uid without a login name."""


def read(*argv: str, tap: str = "tap0") -> Caller:
    """Read a command line given without QEMU's own name."""
    return read_command_line(["qemu-system-x86_64", *argv], tap)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.title)
def test_spelling(spelling: Spelling) -> None:
    argv = [word.replace(HOOK, "/etc/qemu-ifup") for word in spelling.argv]
    assert read(*argv, tap=spelling.tap) == Caller(
        spelling.tap, vm=spelling.vm, netdev=spelling.netdev, mac=spelling.mac
    )


# What QEMU refuses or does not come to, what it takes from elsewhere, and what calls no script.
UNKNOWN: tuple[tuple[str, Sequence[str], str], ...] = (
    ("nothing", (), "tap0"),
    ("another program", ("-c", "pyqemu-ifup tap0"), "tap0"),
    ("fd=", ("-netdev", f"{TAP},fd=3"), "tap0"),
    ("fds=", ("-netdev", f"{TAP},fds=3:4"), "tap0"),
    ("helper=", ("-netdev", f"{TAP},helper=/usr/lib/qemu/qemu-bridge-helper"), "tap0"),
    ("script=no", ("-netdev", f"{TAP},script=no,ifname=tap0"), "tap0"),
    ("script empty", ("-netdev", f"{TAP},ifname=tap0,script="), "tap0"),
    ("JSON script=no", ("-netdev", '{"type":"tap","id":"n0","script":"no"}'), "tap0"),
    ("not a tap", ("-netdev", "user,id=n0,ifname=tap0"), "tap0"),
    ("type given again", ("-netdev", f"{TAP},type=user"), "tap0"),
    ("another ifname", ("-netdev", f"{TAP},ifname=tap1"), "tap0"),
    ("not as the kernel would name it", ("-netdev", TAP), "web0"),
    ("not as the kernel would write a number", ("-netdev", TAP), "tap00"),
    ("no number", ("-netdev", TAP), "tap"),
    ("not of the template", ("-netdev", f"{TAP},ifname=vm%d"), "tap0"),
    ("two templates", ("-netdev", f"{TAP},ifname=vm%d", "-netdev", "tap,ifname=vm%d"), "vm0"),
    ("a template and no ifname", ("-netdev", TAP, "-netdev", "tap,id=n1,ifname=tap%d"), "tap0"),
    ("not a template", ("-netdev", f"{TAP},ifname=tap%s"), "tap0"),
    ("the same ifname twice",
     ("-netdev", f"{TAP},ifname=web0", "-netdev", "tap,id=n1,ifname=web0"), "web0"),
    ("the same ifname once cut",
     ("-netdev", f"{TAP},ifname=abcdefghijklmnop", "-nic", "tap,ifname=abcdefghijklmnoq"),
     "abcdefghijklmno"),
    ("readconfig", ("-netdev", TAP, "-readconfig", "vm.cfg"), "tap0"),
    ("broken JSON", ("-netdev", '{"type":"tap","id":"n0"'), "tap0"),
    ("broken JSON beside", ("-netdev", TAP, "-netdev", '{"type":}'), "tap0"),
    ("deep JSON beside", ("-netdev", TAP, "-netdev", '{"a":' + "[" * 100000), "tap0"),
    ("JSON of other types", ("-netdev", '{"type":["tap"],"id":7}'), "tap0"),
    ("JSON ifname that is no text", ("-netdev", '{"type":"tap","ifname":"\\ud800"}'), "tap0"),
    ("an option of a later QEMU", ("-netdev", TAP, "-later", "-netdev", "tap,id=n1"), "tap0"),
    ("words without a dash", ("netdev", TAP, "", "x"), "tap0"),
    ("three dashes", ("---netdev", TAP), "tap0"),
    ("glued", (f"-netdev={TAP}",), "tap0"),
    ("no argument left", ("-netdev",), "tap0"),
    ("an append", ("-append", "-netdev", TAP), "tap0"),
    ("-set before it", ("-set", "netdev.n0.ifname=web0", "-netdev", TAP), "web0"),
    ("-set of JSON",
     ("-netdev", '{"type":"tap","id":"n0"}', "-set", "netdev.n0.ifname=web0"), "web0"),
    ("-set without a value", ("-netdev", TAP, "-set", "netdev.n0.ifname"), "ifname"),
    ("not the bridge's helper", ("-netdev", "bridge,id=n0,br=br0"), "tap0"),
)  # fmt: skip


@pytest.mark.parametrize(("argv", "tap"), [row[1:] for row in UNKNOWN], ids=[r[0] for r in UNKNOWN])
def test_unknown_netdev(argv: Sequence[str], tap: str) -> None:
    assert read(*argv, tap=tap) == Caller(tap)


def test_ifname_counts_beside_what_cannot_be_seen() -> None:
    argv = ("-name", "a", "-readconfig", "x", "-netdev", f"{TAP},ifname=web0", "-netdev", "{'")
    assert read(*argv, tap="web0") == Caller("web0", vm="a", netdev="n0")


def test_script_by_default_counts() -> None:
    assert read("-netdev", TAP) == Caller("tap0", netdev="n0")


def test_argument_that_is_no_option_hides_nothing() -> None:
    assert read("-append", "netdev", "-netdev", TAP) == Caller("tap0", netdev="n0")


def test_hub_may_hold_what_cannot_be_seen() -> None:
    argv = ("-net", "tap,ifname=web0", "-net", f"nic,macaddr={MAC}", "-readconfig", "x")
    assert read(*argv, tap="web0") == Caller("web0")


def test_two_devices_on_one_netdev() -> None:
    two = ("-device", f"e1000,netdev=n0,mac={MAC}", "-device", f"e1000,netdev=n0,mac={OTHER}")
    assert read("-netdev", TAP, *two).mac is None
    assert read("-nic", f"{TAP},mac={MAC}", *two[:2]).mac is None
    assert read("-netdev", TAP, "-net", f"nic,netdev=n0,macaddr={MAC}", *two[:2]).mac is None


def test_device_without_a_netdev_is_not_on_one_without_id() -> None:
    assert read("-net", "tap", "-device", f"e1000,mac={MAC}") == Caller("tap0")
    assert read("-nic", "tap", "-device", f"e1000,mac={MAC}") == Caller("tap0")
    assert read("-nic", f"tap,mac={MAC}", "-device", f"e1000,mac={OTHER}").mac == MAC


MACS = (
    ("52:54:00:12:34:56", "52:54:00:12:34:56"),
    ("52-54-00-AB-CD-EF", "52:54:00:ab:cd:ef"),
    ("52:54-00:AB-CD:EF", "52:54:00:ab:cd:ef"),
    ("2:4:0:B:0:9", "02:04:00:0b:00:09"),
    ("52:54:00:12:34", None),
    ("52:54:00:12:34:56:78", None),
    ("52:54:00:12:34:156", None),
    ("52:54::12:34:56", None),
    ("52:54:00:12:34:5g", None),
    ("52:54:00:12:34:+5", None),
    ("52:54:00:12:34: 5", None),
    ("52:54:00:12:34:٥", None),
    ("525400123456", None),
    ("0x123456", None),
    ("00:00:00:00:00:00", None),
    ("", None),
)


@pytest.mark.parametrize(("written", "mac"), MACS)
def test_mac(written: str, mac: str | None) -> None:
    assert read("-nic", f"tap,mac={written}").mac == mac


NAMES = (
    ((), None),
    (("-name", ""), None),
    (("-name", "guest="), None),
    (("-name", "web"), "web"),
    (("-name", "web", "-name", "guest="), None),
    (("-name", "web", "-name", "process=x"), "web"),
    (("-name", "a=b"), None),
    (("-name", "a,,b=c"), "a,b=c"),
    (("-name", "guest=a=b"), "a=b"),
    (("-name", "guest=web,guest=db"), "db"),
    (("-name", "web,guest"), "on"),
    (("-name", "web,noguest"), "off"),
    (("-name", "\udcff"), "\udcff"),
    (("-hda", "-name", "web"), None),
    (("-snapshot", "-name", "web"), "web"),
)


@pytest.mark.parametrize(("argv", "vm"), NAMES)
def test_name(argv: Sequence[str], vm: str | None) -> None:
    assert read(*argv) == Caller("tap0", vm=vm)


WORDS = st.one_of(
    st.sampled_from(["-netdev", "--nic", "-net", "-device", "-name", "-set", "-S", "-readconfig"]),
    st.sampled_from(
        ["tap,id=n0", "nic,macaddr=1:2:3:4:5:6", "e1000,netdev=n0,mac=1:2", "netdev.n0."]
    ),
    st.text(st.sampled_from("tapid=,no{}[]\"'\\u0:%-\udcff ٥")),
    st.text(),
    st.recursive(st.text() | st.none() | st.integers(), lambda inner: st.lists(inner)).map(
        lambda value: f'{{"type": "tap", "id": {value!r}}}'
    ),
)


@given(st.lists(WORDS), st.text(min_size=1, max_size=15))
@example(["qemu", "-netdev", '{"type":"tap","queues":' + "1" * 5000 + "}"], "tap0")
def test_garbage_is_unknown_and_no_fault(argv: list[str], tap: str) -> None:
    caller = read_command_line(argv, tap)
    assert caller.tap == tap and caller.user is None
    if caller.mac is not None:
        assert [len(group) for group in caller.mac.split(":")] == [2] * 6
        assert set(caller.mac) <= set("0123456789abcdef:")
    if caller.mac is not None or caller.netdev is not None:
        assert any("tap" in word for word in argv)


@given(st.text(st.sampled_from("a,=- no"), min_size=1), st.booleans())
def test_doubled_commas_carry_every_name(name: str, flag_first: bool) -> None:
    escaped = "guest=" + name.replace(",", ",,")
    argument = f"debug-threads,{escaped}" if flag_first else f"{escaped},process=x"
    assert read("-name", argument).vm == name


def child(*argv: str, user: int | None = None) -> subprocess.Popen[bytes]:
    """Start a program that runs until its stdin is closed."""
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=user)


def test_find_caller_of_a_process() -> None:
    argv = ("-netdev", "tap,id=n0", "-name", os.fsdecode(b"a\xff"))
    code = "import sys; print(flush=True); sys.stdin.read()"
    with child(sys.executable, "-c", code, *argv) as process:
        assert process.stdout is not None and process.stdout.readline()
        found = find_caller("tap0", process.pid, want_user=False)
    # Python's own -c takes the place of an option with an argument, as in QEMU's eyes.
    assert found == Caller("tap0", vm=os.fsdecode(b"a\xff"), netdev="n0")


@pytest.mark.parametrize("beyond", [0, 1])
def test_command_line_that_is_too_long_is_unknown(beyond: int) -> None:
    code = "import sys; print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, "-netdev", "tap,id=n0", "-name", "web"]
    room = SIZE_MAX + beyond - sum(len(word) + 1 for word in argv)
    words = ["x" * 65535] * (room // 65536)
    argv += [*words, "x" * (room % 65536 - 1)]
    assert sum(len(word) + 1 for word in argv) == SIZE_MAX + beyond
    with child(*argv) as process:
        assert process.stdout is not None and process.stdout.readline()
        found = find_caller("tap0", process.pid, want_user=False)
    assert found == (Caller("tap0") if beyond else Caller("tap0", vm="web", netdev="n0"))


def test_set_changes_the_first_of_its_id() -> None:
    # QEMU starts with no id twice; what it would not run is read all the same, once.
    argv = ("-netdev", f"{TAP},ifname=a0", "-netdev", f"{TAP},ifname=b0", "-set",
            "netdev.n0.ifname=web0")  # fmt: skip
    assert read(*argv, tap="web0").netdev == "n0"
    assert read(*argv, tap="b0").netdev == "n0"
    assert read(*argv, tap="a0") == Caller("a0")


def test_user_is_the_login_name() -> None:
    whoami = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout
    assert find_caller("tap0", os.getpid(), want_user=True).user == whoami.strip()
    assert find_caller("tap0", os.getpid(), want_user=False).user is None


def test_user_without_a_login_name_is_the_number() -> None:
    require("root")
    with child("cat", user=NOBODY) as process:
        assert find_caller("tap0", process.pid, want_user=True) == Caller("tap0", user=str(NOBODY))


def test_user_is_the_real_one() -> None:
    require("root")
    code = f"import os; os.setresuid({NOBODY}, 0, 0); print(flush=True); input()"
    with child(sys.executable, "-c", code) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline()
        assert find_caller("tap0", process.pid, want_user=True).user == str(NOBODY)
        process.stdin.write(b"\n")


def test_ended_process_is_unknown() -> None:
    with child("cat") as process:
        assert process_start(process.pid) is not None
    assert find_caller("tap0", process.pid, want_user=True) == Caller("tap0")
    assert process_start(process.pid) is None


def test_zombie_has_no_command_line() -> None:
    process = child("cat", "-netdev", "tap,id=n0")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert find_caller("tap0", process.pid, want_user=False) == Caller("tap0")
    assert process.wait() == 1
    process.stdout.close()


@pytest.mark.parametrize("hidepid", ["0", "1", "2"])
def test_hidden_process_is_unknown(hidepid: str) -> None:
    require("root")
    code = (
        f"import os, sys; sys.path[:0] = {SOURCES!r}\n"
        "from pyqemu_ifup.qemu.caller import find_caller\n"
        "from pyqemu_ifup.system.process import process_start\n"
        "os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)\n"
        "print(find_caller('tap0', 1, want_user=True), process_start(1) is not None)"
    )
    parent = f'mount -t proc -o hidepid={hidepid} proc /proc && shift && "$@"; exit $?'
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount", "sh", "-c", parent, "-name", "web"]
        + [sys.executable, "-I", "-c", code],
        capture_output=True,
        text=True,
    )
    found = Caller("tap0", vm="web", user="root") if hidepid == "0" else Caller("tap0")
    assert (done.stdout, done.stderr) == (f"{found} {hidepid == '0'}\n", "")


def test_other_faults_of_proc_are_raised() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            find_caller("tap0", os.getpid(), want_user=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert raised.value.errno == errno.EMFILE


def test_process_start_of_an_odd_name() -> None:
    code = "open('/proc/self/comm', 'w').write('a) R 1 (b'); print(flush=True); input()"
    ticks = os.sysconf("SC_CLK_TCK")

    def now() -> float:
        return float(Path("/proc/uptime").read_text().split()[0]) * ticks

    before = now()
    with child(sys.executable, "-c", code) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline()
        start = process_start(process.pid)
        after = now()
        process.stdin.write(b"\n")
    assert start is not None and before - 2 <= start <= after + 2


@pytest.mark.parametrize(("netdev", "loads"), [(TAP, ""), ('{"type":"tap"}', "json")])
def test_imports_little(netdev: str, loads: str) -> None:
    code = (
        f"import os, sys; sys.path[:0] = {SOURCES!r}\n"
        "from pyqemu_ifup.qemu.caller import find_caller\n"
        "find_caller('tap0', os.getpid(), want_user=True)\n"
        "print(*sorted({'argparse', 'json', 'shlex', 'subprocess'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, "-netdev", netdev],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{loads}\n"
