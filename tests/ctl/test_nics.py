"""From the NICs of a policy to QEMU's arguments: tables, and a real QEMU that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.netns import Namespace
from lab.versions import VERSIONS, qemu_of
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.names import is_plain_tap_name, tap_name_of
from pyqemu_ifconf.policy import Attach, Caller, Policy, Vlan, choose, decide
from pyqemu_ifctl.place import Hooks, find_hooks
from pyqemu_ifctl.qemu.arguments import (
    by_hooks,
    find_vm,
    legacy,
    legacy_on_netdevs,
    modern,
    on_hubs,
    tap_by_descriptors,
)
from pyqemu_ifctl.qemu.binary import check_arguments, find_qemu, models_of
from pyqemu_ifup.nic_macs import find_macs, macs_of, made_mac
from pyqemu_ifup.system import own_mac

HOOKS = Hooks("/opt/a,b/pyqemu-ifup", "/opt/a,b/pyqemu-ifdown")
MAC = "52:54:00:00:00:01"
TAP = "tap,id=net0,ifname=web1-0,script=/opt/a,,b/pyqemu-ifup,downscript=/opt/a,,b/pyqemu-ifdown"
CARD = f"virtio-net-pci,netdev=net0,id=nic-net0,mac={MAC}"


def policy_of(*nics: str, more: str = "") -> Policy:
    """Return a policy whose guest web1 has these NICs."""
    text = (
        "version: 1\nnetworks: {lan: {bridge: br0}, big: {bridge: br1, mtu: 9000, vlan: 5}}\n"
        f"vms: {{web1: {{nics: [{', '.join(nics)}]}}{more}}}\n"
        'rules: [{tap: "*", network: lan, vlan: 7}]\n'
    )
    return parse_policy([Source("p.yaml", text.encode())])


MODERN = [
    ("{network: lan}", TAP, CARD),
    ("{network: lan, tap: 'a,b', id: x.y}",
     TAP.replace("web1-0", "a,,b").replace("net0", "x.y"), CARD.replace("net0", "x.y")),
    ("{network: lan, queues: 4}", f"{TAP},queues=4", f"{CARD},mq=on,vectors=10"),
    ("{network: lan, queues: 4, vectors: 0}", f"{TAP},queues=4", f"{CARD},mq=on,vectors=0"),
    ("{network: lan, vectors: 3}", TAP, f"{CARD},vectors=3"),
    ("{network: lan, vectors: auto, addr: 0x8}", TAP, f"{CARD},addr=0x8"),
    ("{network: lan, bus: pcie.0, addr: 1f.7}", TAP, f"{CARD},bus=pcie.0,addr=1f.7"),
    ("{network: big}", TAP, f"{CARD},host_mtu=9000"),
    ("{network: big, mtu: none}", TAP, CARD),
    ("{network: big, mtu: 1500}", TAP, CARD),
    ("{network: big, mtu: bridge}", TAP, CARD),
    ("{network: big, model: e1000}", TAP, CARD.replace("virtio-net-pci", "e1000")),
    ("{network: lan, mtu: 1400, model: virtio-net-pci-transitional}", TAP,
     CARD.replace("net-pci", "net-pci-transitional") + ",host_mtu=1400"),
    ("{user: {}}", "user,id=net0", CARD),
    ("{user: {ipv4: 10.1.0.0/16, ipv6: fd00:2::/64, restrict: true, hostname: web, forward: "
     "[{from: 127.0.0.1:2222/tcp, to: ':22'}, {from: 53/udp, to: 10.1.0.15:5353}]}}",
     "user,id=net0,net=10.1.0.0/16,ipv6-net=fd00:2::/64,hostname=web,restrict=on,"
     "hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-10.1.0.15:5353", CARD),
    ("{user: {ipv6: false, dns: 10.0.2.9, search: [a.test, b]}}",
     "user,id=net0,ipv6=off,dns=10.0.2.9,dnssearch=a.test,dnssearch=b", CARD),
    ("{user: {ipv4: false}, model: e1000}", "user,id=net0,ipv4=off",
     CARD.replace("virtio-net-pci", "e1000")),
]  # fmt: skip


@pytest.mark.parametrize(("nic", "netdev", "device"), MODERN, ids=[row[0] for row in MODERN])
def test_modern(nic: str, netdev: str, device: str) -> None:
    policy = policy_of(nic)
    vm = policy.vms["web1"]
    macs = {("web1", vm.nics[0].id): MAC}
    assert modern(policy, vm, macs, by_hooks(HOOKS)) == ["-netdev", netdev, "-device", device]


@pytest.mark.parametrize("form", [modern, legacy, legacy_on_netdevs])
def test_a_guest_without_a_nic_gets_none_of_qemu_s_own(form: Callable[..., list[str]]) -> None:
    policy = policy_of()
    assert form(policy, policy.vms["web1"], {}, by_hooks(HOOKS)) == ["-nic", "none"]


LEGACY = [
    ("{network: lan}",
     ["-net", f"nic,model=virtio-net-pci,macaddr={MAC}", "-net", TAP]),
    ("{network: lan, model: e1000}",
     ["-net", f"nic,model=e1000,macaddr={MAC}", "-net", TAP]),
    ("{user: {hostname: web}, vectors: 4}",
     ["-net", f"nic,model=virtio-net-pci,macaddr={MAC},vectors=4",
      "-net", "user,id=net0,hostname=web"]),
    ("{network: lan}, {user: {}, model: e1000, id: out}",
     ["-netdev", TAP, "-net", f"nic,netdev=net0,model=virtio-net-pci,macaddr={MAC}",
      "-netdev", "user,id=out", "-net", f"nic,netdev=out,model=e1000,macaddr={MAC}"]),
    ("{network: lan, queues: 2}", "queues"),
    ("{network: big}", "host_mtu, and the network's MTU is 9000"),
    ("{network: lan, bus: pci.0}", "a PCI address that each QEMU heeds"),
    ("{network: lan, addr: 8}", "a PCI address that each QEMU heeds"),
    ("{network: lan}, {network: big}", "host_mtu, and the network's MTU is 9000"),
]  # fmt: skip


@pytest.mark.parametrize(("nics", "expected"), LEGACY, ids=[row[0] for row in LEGACY])
def test_legacy(nics: str, expected: list[str] | str) -> None:
    policy = policy_of(nics)
    vm = policy.vms["web1"]
    macs = {("web1", nic.id): MAC for nic in vm.nics}
    if isinstance(expected, list):
        assert legacy(policy, vm, macs, by_hooks(HOOKS)) == expected
        return
    with pytest.raises(Failure) as caught:
        legacy(policy, vm, macs, by_hooks(HOOKS))
    assert caught.value.status is Status.REFUSED
    assert str(caught.value).startswith(f"--legacy has no words for {expected}: net")


def test_descriptors() -> None:
    assert tap_by_descriptors("n", [5], []) == "tap,id=n,fd=5"
    assert tap_by_descriptors("n", [5, 6], [7, 8]) == ("tap,id=n,fds=5:6,vhost=on,vhostfds=7:8")


def test_a_mac_is_the_same_each_time_and_another_for_each_nic_guest_and_host() -> None:
    one = made_mac("host", "web1", "net0")
    assert one == made_mac("host", "web1", "net0") == "52:54:00:c5:3d:9e"
    others = [
        made_mac("host2", "web1", "net0"),
        made_mac("host", "web", "1net0"),
        made_mac("host", "web1", "net1"),
    ]
    assert len({one, *others}) == 4
    policy = policy_of("{network: lan}", f"{{network: lan, mac: '{MAC}'}}")
    assert macs_of(policy, "host") == {("web1", "net0"): one, ("web1", "net1"): MAC}


def test_two_macs_that_would_be_alike_are_refused() -> None:
    policy = policy_of("{network: lan}", f"{{user: {{}}, mac: {made_mac('h', 'web1', 'net0')}}}")
    with pytest.raises(Failure) as caught:
        macs_of(policy, "h")
    assert caught.value.status is Status.POLICY_INVALID
    assert str(caught.value) == (
        f"two NICs would have the MAC {made_mac('h', 'web1', 'net0')}: net1 of web1 (p.yaml:3) "
        "and net0 of web1 (p.yaml:3); give one of them another mac"
    )


def test_a_host_without_an_id_makes_no_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And needs none where each NIC of the guest has one, whatever other guests have."""
    paths = str(tmp_path / "machine-id"), str(tmp_path / "id")
    monkeypatch.setattr(own_mac, "MACHINE_IDS", paths)
    policy = policy_of(f"{{user: {{}}, mac: '{MAC}'}}", more=", db: {nics: [{user: {}}]}")
    assert find_macs(policy, policy.vms["web1"]) == {("web1", "net0"): MAC}
    (tmp_path / "machine-id").write_text("uninitialized\n")
    with pytest.raises(Failure) as caught:
        find_macs(policy, policy.vms["db"])
    assert (caught.value.status, str(caught.value)) == (
        Status.REFUSED,
        f"the host has no id to make MACs of: no {tmp_path}/machine-id; make one: "
        "systemd-machine-id-setup, or: dbus-uuidgen --ensure=/etc/machine-id; or give each NIC of "
        "the guest a mac of its own",
    )
    (tmp_path / "id").write_text("host\n")
    found = find_macs(policy, policy.vms["db"])
    assert found[("db", "net0")] == made_mac("host", "db", "net0")


def test_the_hooks_are_beside_the_program_or_what_it_is_a_link_to(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "pyqemu-ifctl"
    link = tmp_path / "sbin" / "pyqemu-ifctl"
    for path in (program, link):
        path.parent.mkdir()
    program.touch()
    link.symlink_to(program)
    with pytest.raises(Failure) as caught:
        find_hooks(str(link))
    assert (caught.value.status, str(caught.value)) == (
        Status.UNAVAILABLE,
        f"the hooks are not in {tmp_path}/bin: they are installed beside this; install them: make "
        "install",
    )
    for folder in ("bin", "sbin"):
        hooks = Hooks(f"{tmp_path}/{folder}/pyqemu-ifup", f"{tmp_path}/{folder}/pyqemu-ifdown")
        for hook in (hooks.ifup, hooks.ifdown):
            Path(hook).touch(mode=0o755)
        assert find_hooks(str(link)) == hooks


def test_a_guest_that_is_not_there() -> None:
    with pytest.raises(Failure) as caught:
        find_vm(policy_of(more=", db: {nics: []}"), "web")
    assert (caught.value.status, str(caught.value)) == (
        Status.UNAVAILABLE,
        "the policy has no guest web: its guests are web1, db; add it to vms:, or correct the name",
    )


@given(
    st.lists(st.tuples(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True),
                       st.integers(0, 99)), min_size=2, max_size=2, unique=True)
)  # fmt: skip
def test_the_names_of_taps_are_names_and_differ(nics: list[tuple[str, int]]) -> None:
    names = [tap_name_of(*nic) for nic in nics]
    assert all(map(is_plain_tap_name, names))
    # NOTE: a short guest's name may itself look like another's and a number: check refuses that.
    assert names[0] != names[1] or any(len(vm) <= 13 for vm, _ in nics)


@pytest.mark.parametrize(
    ("tap", "vlan", "line"),
    [("web1-0", 6, 3), ("web1-2", 5, 3), ("web1-1", 7, 4), ("web2-0", 7, 4)],
)
def test_a_nic_is_a_rule_for_its_tap_before_all_others(tap: str, vlan: int, line: int) -> None:
    policy = policy_of("{network: big, vlan: 6, mtu: none}", "{user: {}}", "{network: big}")
    decision = choose(policy, Caller(tap))
    assert isinstance(decision, Attach)
    assert (decision.port.settings.vlan, decision.port.position.line) == (Vlan(vlan), line)
    assert decide(policy, Caller(tap)).rule == decision.rule
    if tap == "web2-0":
        assert decide(policy, Caller(tap)).passed_over == (), "a NIC says nothing of other taps"


# A real QEMU

MODELS = ("virtio-net-pci", "e1000", "e1000e", "rtl8139")
VIRTIO = {"queues": st.integers(1, 64), "vectors": st.sampled_from(["auto", 0, 4, 130])}
ANY = {
    "addr": st.sampled_from(["0x10", "11", "12.0", "0x13.1"]),
    "id": st.sampled_from(["lan", "a.b-c_d", "net9"]),
    "mac": st.sampled_from(["52:54:00:aa:bb:cc", "FE:00:00:00:00:01"]),
}
ON_NETWORK = {"network": st.sampled_from(["lan", "big"]), "mtu": st.sampled_from(["none", 1400])}
USER = st.fixed_dictionaries({}, optional={
    "ipv4": st.sampled_from(["10.1.0.0/16", "192.168.76.0/27", "false"]),
    "ipv6": st.sampled_from(["fd00:2::/64"]),
    "restrict": st.sampled_from(["true", "false"]),
    "hostname": st.sampled_from(["web", "a-b.c"]),
    "search": st.sampled_from(["[lab.test]", "[a, b.c]"]),
}).flatmap(lambda user: st.just(user) if user.get("ipv4") == "false" else st.builds(
    lambda more: {**user, **more},
    st.fixed_dictionaries({}, optional={"forward": st.sampled_from([
        "[{from: 127.0.0.1:2222/tcp, to: ':22'}]",
        "[{from: 2222/tcp, to: ':22'}, {from: 53/udp, to: ':53'}, {from: 2222/udp, to: ':1'}]",
    ])}),
))  # fmt: skip


def nic_texts() -> st.SearchStrategy[str]:
    """Return NICs as a policy has them."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {text(it)}" for key, it in value.items()) + "}"
        plain = str(value)
        return (
            f'"{plain}"'
            if ":" in plain and not plain.startswith("[") and ("/" not in plain)
            else plain
        )

    def on_network(model: str) -> st.SearchStrategy[dict[str, Any]]:
        more = {**ANY, **(VIRTIO if model.startswith("virtio") else {}), "mtu": ON_NETWORK["mtu"],
                "tap": st.sampled_from(["'a,b'", "'x=y,,z'", "'#1~'"])}  # fmt: skip
        return st.fixed_dictionaries(
            {"network": ON_NETWORK["network"], "model": st.just(model)}, optional=more
        )

    user = st.fixed_dictionaries({"user": USER, "model": st.sampled_from(MODELS)}, optional=ANY)
    return st.one_of(st.sampled_from(MODELS).flatmap(on_network), user).map(text)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(nic=nic_texts(), others=st.lists(st.sampled_from(MODELS), max_size=3))
def test_a_real_qemu_takes_whatever_a_policy_can_say(
    inside: Namespace, version: str, nic: str, others: list[str]
) -> None:
    """The very words, in a namespace of its own, where their taps and ports are opened."""
    policy = policy_of(nic, *(f"{{network: lan, model: {model}}}" for model in others))
    vm = policy.vms["web1"]
    macs = macs_of(policy, "host")
    path = find_qemu(qemu_of(version))
    backend = by_hooks(Hooks("/bin/true", "/bin/true"))
    check_arguments(path, None, modern(policy, vm, macs, backend))
    try:
        old = legacy(policy, vm, macs, backend)
    except Failure as failure:
        assert failure.status is Status.REFUSED
    else:
        check_arguments(path, None, old)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_real_qemu_does_not_take_is_told_in_its_words(version: str) -> None:
    path = find_qemu(qemu_of(version))
    for form, nic, machine, because in (
        (modern, "{network: lan, model: foo}", None, "'foo' is not a valid device model name"),
        (modern, "{network: lan, model: usb-net}", None,
         "No 'usb-bus' bus found for device 'usb-net'"),
        (modern, "{network: lan, addr: 1f}", "q35", "slot 31 function 0 not available for"),
        (modern, "{network: lan, bus: pci.9}", None, "Bus 'pci.9' not found"),
        (modern, "{network: lan}", "nonesuch", "nsupported machine type"),
        (legacy_on_netdevs, "{network: lan, model: usb-net}", None, "usb-net"),
    ):  # fmt: skip
        policy = policy_of(nic)
        vm = policy.vms["web1"]
        with pytest.raises(Failure) as caught:
            check_arguments(path, machine, form(policy, vm, {("web1", "net0"): MAC}, on_hubs(vm)))
        assert caught.value.status is Status.REFUSED
        assert because in str(caught.value), caught.value


@pytest.mark.parametrize("version", VERSIONS)
def test_the_models_of_a_real_qemu(version: str) -> None:
    found = {model.name: model for model in models_of(find_qemu(qemu_of(version)))}
    assert set(MODELS) <= set(found)
    assert found["e1000"].bus == "PCI" and found["e1000"].alias == "e1000-82540em"
    assert found["e1000e"].description == "Intel 82574L GbE Controller"
    assert found["usb-net"].bus == "usb-bus"
    assert list(found) == sorted(found)
