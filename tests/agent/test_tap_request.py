"""The wire's `tap` on real taps and a real Linux bridge, without the agent's server."""

from __future__ import annotations

import fcntl
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.needs import require
from lab.netns import Namespace
from lab.taps import TUNSETOWNER, Tap
from pyqemu_ifconf.bridge_conf import BridgeConf
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Attach, Caller, Policy, choose, port_on
from pyqemu_ifd.asking import check_holder
from pyqemu_ifup import access, tap_request
from pyqemu_ifup.access import find_user
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.host import Host
from pyqemu_ifup.qemu.caller import find_helped
from pyqemu_ifup.tap_request import NewTap, attach_tap, make_tap, may_attach, parse_wish
from pyqemu_ifup.taps import close_all, open_taps
from pyqemu_ifup.wire import QUEUES_MAX

UID, OTHER = 65534, 65533
"""The user nobody, and one without a name."""
TUNGETIFF = 0x800454D2
LAN = "lan: {bridge: br0, users: [nobody, 65533], max_taps: 2}"


def policy_of(*networks: str) -> Policy:
    text = "version: 1\nnetworks:\n" + "".join(f"  {network}\n" for network in networks)
    return parse_policy([Source("p.yaml", text.encode())])


@contextmanager
def host_of() -> Iterator[Host]:
    with Host(None, Deadline(20), lambda command: None) as host:
        yield host


def serve(host: Host, policy: Policy, *fields: str, uid: int = UID) -> tuple[str, list[int]]:
    network, name, queues, vnet_hdr, parent = (*fields, *("", "", "1", "", "")[len(fields) :])
    words = (network, name, queues, vnet_hdr, parent)
    tap = make_tap(host.kernel, policy, find_user(uid), os.getpid(), parse_wish(words))
    host.finish(attach_tap(host, policy, tap))
    return tap.name, tap.descriptors


def refused(host: Host, policy: Policy, *fields: str, uid: int = UID) -> Failure:
    before = {link.name for link in host.kernel.links()}
    with pytest.raises(Failure) as caught:
        serve(host, policy, *fields, uid=uid)
    assert {link.name for link in host.kernel.links()} == before
    return caught.value


def flags_of(descriptor: int) -> int:
    request = fcntl.ioctl(descriptor, TUNGETIFF, bytes(40))
    return int(struct.unpack_from("H", request, 16)[0])


@pytest.fixture
def lan(inside: Namespace) -> Namespace:
    """The test's namespace, with the thread in it and a bridge br0."""
    inside.add_bridge("br0", mac="02:00:00:00:00:01")
    return inside


def test_open_taps_makes_what_is_asked_for(inside: Namespace) -> None:
    with Netlink() as kernel:
        name, taps = open_taps(kernel, "vm%d", 3, True)
    try:
        link = inside.link(name)
        assert (name, len(taps)) == ("vm0", 3)
        info = link["linkinfo"]["info_data"]
        assert (info["type"], info["user"], info["persist"]) == ("tap", "root", False)
        assert (info["pi"], info["vnet_hdr"], info["numqueues"]) == (False, True, 3)
        assert not any(os.get_inheritable(tap) for tap in taps)
    finally:
        close_all(taps)
    assert name not in inside.links()


def test_one_queue_without_a_header_is_a_plain_tap(inside: Namespace) -> None:
    with Netlink() as kernel:
        name, taps = open_taps(kernel, "web0", 1, False)
    try:
        info = inside.link(name)["linkinfo"]["info_data"]
        assert (info["vnet_hdr"], info["multi_queue"]) == (False, False)
    finally:
        close_all(taps)


def test_nothing_stays_open_of_a_tap_that_is_short_of_descriptors(inside: Namespace) -> None:
    """Nor does the tap, which would be there until this process ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Netlink() as kernel:
        before = os.listdir("/proc/self/fd")
        free = [number for number in range(len(before) + 10) if str(number) not in before]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[9], hard))
        try:
            with pytest.raises(Failure, match="Too many open files"):
                open_taps(kernel, "web0", QUEUES_MAX, False)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(os.listdir("/proc/self/fd")) == len(before)
    assert "web0" not in inside.links()


@pytest.mark.parametrize("persist", [True, False])
@pytest.mark.parametrize("multi_queue", [True, False])
def test_a_tap_that_is_there_is_never_taken(
    inside: Namespace, persist: bool, multi_queue: bool
) -> None:
    with Tap("web0", persist=persist, multi_queue=multi_queue) as tap:
        if persist:
            tap.close()
        with Netlink() as kernel, pytest.raises(Failure) as caught:
            open_taps(kernel, "web0", 2 if multi_queue else 1, False)
        assert caught.value.status is Status.DENIED
        assert "an interface of this name is there already" in str(caught.value)
    if persist:
        inside.ip("link", "del", "web0")


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("name", "status"), [("lo", Status.DENIED), ("all", Status.REFUSED), ("..", Status.REFUSED)]
)
def test_a_name_that_cannot_be(name: str, status: Status) -> None:
    with Netlink() as kernel:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Failure) as caught:
            open_taps(kernel, name, 2, False)
        assert caught.value.status is status
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (("lan", "", "1", ""), "tap takes 5 or 6 fields, not 4"),
        (("", "", "1", "", ""), "it names no network"),
        (("lan", "", "", "", ""), "queues is '', not a number"),
        (("lan", "", "1e1", "", ""), "queues is '1e1', not a number"),
        (("lan", "", "\u0661", "", ""), "queues is '\\u0661', not a number"),
        (("lan", "", "0", "", ""), f"queues is 0, not 1 to {QUEUES_MAX}"),
        (("lan", "", str(QUEUES_MAX + 1), "", ""), f"not 1 to {QUEUES_MAX}"),
        (("lan", "", "9" * 999, "", ""), "not a number"),
        (("lan", "", "1", "1", ""), "'1' stands for vnet_hdr"),
        (("lan", "", "1", "", "self"), "'self' stands for parent"),
    ],
)
def test_what_is_no_wish(fields: tuple[str, ...], why: str) -> None:
    with pytest.raises(Failure) as caught:
        parse_wish(fields)
    assert caught.value.status is Status.USAGE
    assert why in str(caught.value)


def test_a_user_gets_a_tap_that_is_attached_and_goes_with_its_descriptors(lan: Namespace) -> None:
    with host_of() as host:
        name, taps = serve(host, policy_of(LAN), "br0", "", "2", "vnet_hdr")
        try:
            link = lan.link(name)
            assert (name, link["master"], len(taps)) == ("tap0", "br0", 2)
            assert "UP" in link["flags"]
            assert link["linkinfo"]["info_data"]["user"] == "root"
            assert f"network=lan kind=linux bridge=br0 pid={os.getpid()} " in link["ifalias"]
            assert f" uid={UID} by=name made=1 rule=" in link["ifalias"]
            assert flags_of(taps[1]) & 0x4000
        finally:
            close_all(taps)
        assert host.kernel.look_up(name) is None


def test_root_may_and_has_no_limit(lan: Namespace) -> None:
    policy = policy_of("lan: {bridge: br0, max_taps: 1, deny_users: [root]}")
    held: list[int] = []
    with host_of() as host:
        try:
            for number in range(3):
                name, taps = serve(host, policy, "lan", f"db{number}", uid=0)
                held += taps
                assert name == f"db{number}"
            assert "uid=" not in lan.link("db0")["ifalias"]
        finally:
            close_all(held)


def test_max_taps_counts_each_user_and_each_network(lan: Namespace) -> None:
    lan.add_bridge("br1", mac="02:00:00:00:00:02")
    policy = policy_of(LAN, "other: {bridge: br1, users: [nobody]}")
    held: list[int] = []
    with host_of() as host:
        try:
            held += serve(host, policy, "lan")[1]
            held += serve(host, policy, "lan")[1]
            failure = refused(host, policy, "lan")
            assert failure.status is Status.DENIED
            assert str(failure) == (
                "user nobody has 2 taps on network lan already: max_taps is 2 (p.yaml:3); "
                "end a QEMU that has one"
            )
            held += serve(host, policy, "lan", uid=OTHER)[1]
            held += serve(host, policy, "other")[1]
            # NOTE: whoever holds a tap can give it another owner.
            fcntl.ioctl(held[0], TUNSETOWNER, OTHER)
            refused(host, policy, "lan")
            held += serve(host, policy, "lan", uid=OTHER)[1]
            os.close(held.pop(0))
            held += serve(host, policy, "lan")[1]
        finally:
            close_all(held)
    lan.ip("link", "del", "br1")


@pytest.mark.usefixtures("lan")
def test_a_tap_that_is_made_just_now_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("lan: {bridge: br0, users: [nobody], max_taps: 1}")
    fields = ("lan", "", "1", "", "")
    with host_of() as host:
        first = make_tap(host.kernel, policy, find_user(UID), os.getpid(), parse_wish(fields))
        with pytest.raises(Failure, match="max_taps"):
            make_tap(host.kernel, policy, find_user(UID), os.getpid(), parse_wish(fields))
        host.finish(attach_tap(host, policy, first))
        with pytest.raises(Failure, match="max_taps"):
            make_tap(host.kernel, policy, find_user(UID), os.getpid(), parse_wish(fields))
        close_all(first.descriptors)
        second = make_tap(host.kernel, policy, find_user(UID), os.getpid(), parse_wish(fields))
        with host.until(Deadline(0)), pytest.raises(Failure, match="deadline"):
            host.finish(attach_tap(host, policy, second))
        assert second.descriptors == []
        assert host.kernel.look_up(second.name) is None
        close_all(serve(host, policy, *fields)[1])


@pytest.mark.parametrize(
    ("fields", "uid", "status", "text"),
    [
        (("web",), UID, Status.DENIED, "user nobody may not use network web: neither"),
        (("lan",), 65532, Status.DENIED, "user 65532 may not use network lan: neither"),
        (("lan", "db0"), UID, Status.DENIED, "the name db0 is not for network lan: its tap_name"),
        (("lan", "lo"), UID, Status.DENIED, "the name lo is not for network lan: its tap_name"),
        (("lan", "lo"), 0, Status.DENIED, "cannot make the tap lo: an interface"),
        (("lan", "$(id)"), UID, Status.DENIED, "'$(id)' is no name for a user's tap: "),
        (
            ("lan", "br9"),
            UID,
            Status.DENIED,
            "the name br9 is not for a tap: it is that of the bridge of network gone",
        ),
        (("many",), UID, Status.DENIED, "the name sw0 is not for a tap: it is that of the bridge"),
        (("gone",), UID, Status.UNAVAILABLE, "there is no bridge br9"),
        (("tagged",), UID, Status.REFUSED, "br0 does not filter VLANs"),
        (("br0",), UID, Status.DENIED, "bridge br0 is not enough: the networks lan and tagged"),
        (("nope",), UID, Status.DENIED, "no network and no bridge nope"),
    ],
)
@pytest.mark.usefixtures("lan")
def test_nothing_is_left_of_a_tap_that_is_refused(
    fields: tuple[str, ...], uid: int, status: Status, text: str
) -> None:
    policy = policy_of(
        LAN, "web: {bridge: br0, users: [alice]}", "gone: {bridge: br9, users: [nobody]}",
        "tagged: {bridge: br0, vlan: 5, users: [nobody]}",
        "many: {bridge: sw0, tap_name: sw%d, users: [nobody]}",
    )  # fmt: skip
    before = len(os.listdir("/proc/self/fd"))
    with host_of() as host:
        failure = refused(host, policy, *fields, uid=uid)
    assert (failure.status, str(failure)[: len(text)]) == (status, text)
    assert len(os.listdir("/proc/self/fd")) == before


def test_bridge_conf_is_read_where_the_policy_says_so(
    lan: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow = BridgeConf(frozenset({"br0"}), frozenset())
    monkeypatch.setattr(access, "read_bridge_conf", lambda: allow)
    closed = policy_of("lan: {bridge: br0}")
    opened = Policy(closed.files, closed.networks, (), bridge_conf=True)
    with host_of() as host:
        refused(host, closed, "br0")
        name, taps = serve(host, opened, "br0")
        assert lan.link(name)["master"] == "br0"
        close_all(taps)


GUESTS = """version: 1
networks:
  lan: {bridge: br0, users: [nobody, 65533]}
  web: {bridge: br0, users: [nobody]}
vms:
  web1: {users: [nobody], nics: [{network: lan, tap: web1, txqueuelen: 77}]}
  all: {nics: [{network: lan, txqueuelen: 78}]}
"""


@pytest.mark.parametrize(
    ("network", "tap", "uid", "vm", "length", "by_name"),
    [
        ("lan", "web1", UID, "web1", 77, False),
        ("lan", "web1", 0, "web1", 77, False),
        ("lan", "all-0", OTHER, "all", 78, False),
        ("lan", "tap7", OTHER, "", 1000, True),
        ("web", "web1", 0, "", 1000, True),
    ],
)
def test_a_tap_of_a_guest_of_the_policy_s(
    lan: Namespace, network: str, tap: str, uid: int, vm: str, length: int, by_name: bool
) -> None:
    """It has that guest's name where QEMU's command line gives none."""
    policy = parse_policy([Source("p.yaml", GUESTS.encode())])
    with host_of() as host:
        name, taps = serve(host, policy, network, tap, uid=uid)
        try:
            link = host.kernel.look_up(name)
            mark = link.mark if link is not None else None
            assert (name, lan.link(tap)["txqlen"]) == (tap, length)
            assert mark is not None
            assert (mark.vm, mark.network, mark.by_name) == (vm, network, by_name)
        finally:
            close_all(taps)


def test_a_guest_s_taps_are_not_for_every_user_of_its_network(lan: Namespace) -> None:
    policy = parse_policy([Source("p.yaml", GUESTS.encode())])
    lan.ip("tuntap", "add", "dev", "web1", "mode", "tap", "user", str(OTHER))
    with host_of() as host:
        said = (
            f"user {OTHER} may not have the taps of guest web1: neither the user nor one of the "
            "user's groups is among the guest's users (p.yaml:6); whoever keeps the policy can "
            f"add {OTHER} to its users"
        )
        failure = refused(host, policy, "lan", "web1", uid=OTHER)
        assert (failure.status, str(failure)) == (Status.DENIED, said)
        links = host.kernel.links()
        (link,) = [each for each in links if each.name == "web1"]
        decision = choose(policy, Caller("web1"))
        assert isinstance(decision, Attach)
        with pytest.raises(Failure) as caught:
            may_attach(policy, decision.port, find_user(OTHER), link, links)
        assert str(caught.value) == said
        may_attach(policy, port_on(policy, "lan", "web1"), find_user(OTHER), link, links)
    lan.ip("link", "del", "web1")
    with host_of() as host:
        failure = refused(host, policy, "web", "web1")
    assert str(failure).startswith("the name web1 is not for network web: its tap_name is")


def test_may_attach_a_persistent_tap_of_ones_own(lan: Namespace) -> None:
    policy = policy_of("lan: {bridge: br0, users: [nobody], max_taps: 1}", "db: {bridge: br0}")
    with host_of() as host, Tap("own0", owner=UID) as own, Tap("their0") as theirs:
        del own, theirs
        links = host.kernel.links()
        own_link, their_link = (next(k for k in links if k.name == n) for n in ("own0", "their0"))
        assert (own_link.owner, their_link.owner) == (UID, None)
        may_attach(policy, port_on(policy, "lan", "own0"), find_user(UID), own_link, links)
        may_attach(policy, port_on(policy, "db", "their0"), find_user(0), their_link, links)
        _, taps = serve(host, policy, "lan")
        with pytest.raises(Failure, match="max_taps is 1"):
            port = port_on(policy, "lan", "own0")
            may_attach(policy, port, find_user(UID), own_link, host.kernel.links())
        close_all(taps)


@pytest.mark.usefixtures("lan")
@pytest.mark.parametrize(
    ("network", "uid", "name", "text"),
    [
        ("lan", UID, "their0", "somebody else's tap: nobody owns it, not user 65534"),
        ("db", UID, "own0", "user nobody may not use network db"),
        ("lan", OTHER, "own0", "somebody else's tap: user 65534 owns it, not user 65533"),
    ],
    ids=["a tap of nobody's", "a network of others", "a tap of another user's"],
)
def test_may_not_attach_a_persistent_tap_of_others_nor_to_their_network(
    network: str, uid: int, name: str, text: str
) -> None:
    policy = policy_of("lan: {bridge: br0, users: [nobody], max_taps: 1}", "db: {bridge: br0}")
    with host_of() as host, Tap("own0", owner=UID) as own, Tap("their0") as theirs:
        del own, theirs
        links = host.kernel.links()
        link = next(each for each in links if each.name == name)
        with pytest.raises(Failure) as caught:
            may_attach(policy, port_on(policy, network, name), find_user(uid), link, links)
        assert caught.value.status is Status.DENIED
        assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("pid", "whose", "uid", "status", "text"),
    [
        (77, UID, UID, None, ""),
        (77, OTHER, 0, None, ""),
        (1, 0, 0, None, ""),
        (0, None, 0, None, ""),
        (77, 0, UID, Status.DENIED, "it is user 0's; let the user's own QEMU call this program"),
        (77, OTHER, UID, Status.DENIED, f"it is user {OTHER}'s; "),
        (1, 0, UID, Status.DENIED, "it has ended, and init is the parent now"),
        (1, UID, UID, Status.DENIED, "it has ended, and init is the parent now"),
        (0, None, UID, Status.DENIED, "it is in another PID namespace"),
        (77, None, UID, Status.TRY_AGAIN, "stopped: the calling process 77 has ended"),
    ],
)
def test_a_tap_is_for_no_process_of_others(
    pid: int, whose: int | None, uid: int, status: Status | None, text: str
) -> None:
    if status is None:
        check_holder(pid, whose, uid)
        return
    with pytest.raises(Failure) as caught:
        check_holder(pid, whose, uid)
    assert caught.value.status is status
    assert text in str(caught.value)


DMZ = "dmz: {parent: v0, users: [nobody], max_taps: 3, tap_name: dmz%d}"
MACS = [f"52:54:00:00:00:0{number}" for number in range(4)]


@pytest.fixture
def wired(inside: Namespace) -> Iterator[Namespace]:
    """The test's namespace, with the thread in it, and a wire between v0 and v1."""
    require("macvtap", "netdev-chains")
    inside.run(["ip", "link", "add", "v0", "up", "type", "veth", "peer", "name", "v1"])
    yield inside
    inside.run(["ip", "link", "del", "v0"])


@pytest.mark.usefixtures("wired")
def test_two_that_ask_for_one_name_at_a_time() -> None:
    policy, user = policy_of(DMZ), find_user(UID)
    with host_of() as host:

        def ask(mac: str, name: str = "dmz0") -> NewTap:
            words = ("dmz", name, "1", "", "", mac)
            return make_tap(host.kernel, policy, user, os.getpid(), parse_wish(words))

        first = ask(MACS[0])
        with pytest.raises(Failure, match="cannot make the tap dmz0: an interface of this name"):
            ask(MACS[1])
        # NOTE: that it was refused makes room for nobody.
        other, third = ask(MACS[2], ""), ask(MACS[3], "")
        assert (first.name, other.name, third.name) == ("dmz0", "dmz1", "dmz2")
        with pytest.raises(Failure, match="max_taps"):
            ask(MACS[1], "dmz3")
        for tap in (first, other, third):
            # NOTE: this thread's /sys shows another namespace, so that none can be opened.
            with pytest.raises(Failure, match="cannot be told"):
                host.finish(attach_tap(host, policy, tap))
        assert tap_request._under_way == {}


HELPER = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"


@pytest.mark.parametrize("way", ["direct", "exec by sh", "below sh"])
def test_the_process_that_called_its_bridge_helper(way: str, tmp_path: Path) -> None:
    script = tmp_path / "helper"
    script.write_text(f"#!{sys.executable} -I\n{HELPER}\n")
    script.chmod(0o755)
    words = [str(script), "--use-vnet", "--fd=3"]
    if way == "exec by sh":
        words = ["sh", "-c", "exec " + " ".join(words)]
    elif way == "below sh":
        words = ["sh", "-c", " ".join(words) + "; exit $?"]
    executable = "/bin/sh" if words[0] == "sh" else None
    with subprocess.Popen(
        words, executable=executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert (pid != process.pid) is (way == "below sh")
        assert find_helped(pid) == os.getpid()
        process.communicate()
    assert find_helped(pid) is None


@pytest.mark.parametrize(
    ("mac", "passes"),
    [("52:54:0:0:0:1", "52:54:00:00:00:01"), ("33:33:0:0:0:1", None), ("ff:ff:ff:ff:ff:ff", None)],
)
def test_a_multicast_mac_is_that_of_no_device(mac: str, passes: str | None) -> None:
    """Though QEMU takes it: its filters would pass whatever has it as source."""
    policy = policy_of(DMZ)
    words = ["-netdev", "bridge,id=n0,br=dmz", "-device", f"virtio-net-pci,netdev=n0,mac={mac}"]
    with subprocess.Popen(
        [sys.executable, "-c", HELPER, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        wish = parse_wish(("dmz", "", "1", "", "parent"))
        try:
            found = tap_request._mac_of(policy, policy.networks["dmz"], None, wish, process.pid)
        except Failure as failure:
            assert passes is None and "the MAC of the guest's device is not known" in str(failure)
        else:
            assert found == passes
        process.communicate()
