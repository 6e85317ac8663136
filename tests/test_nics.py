"""From the NICs of a policy to QEMU's arguments: tables, and a real QEMU that reads them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.versions import VERSIONS, qemu_of
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.names import is_plain_tap_name, tap_name_of
from pyqemu_ifconf.policy import Attach, Caller, Policy, Vlan, choose, decide
from pyqemu_ifctl.args import dry
from pyqemu_ifctl.nics import (
    Hooks,
    find_vm,
    legacy,
    macs_of,
    made_mac,
    modern,
    tap_by_descriptors,
    tap_by_hooks,
    user_mode,
)
from pyqemu_ifctl.qemu import check_arguments, find_qemu, models_of

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
]  # fmt: skip


@pytest.mark.parametrize(("nic", "netdev", "device"), MODERN, ids=[row[0] for row in MODERN])
def test_modern(nic: str, netdev: str, device: str) -> None:
    policy = policy_of(nic)
    (it,) = policy.vms["web1"].nics
    backend = user_mode(it.id, it.user) if it.user is not None else tap_by_hooks(it, HOOKS)
    assert modern(policy, it, MAC, backend) == ["-netdev", netdev, "-device", device]


LEGACY = [
    ("{network: lan}",
     ["-net", f"nic,model=virtio-net-pci,macaddr={MAC}", "-net", TAP.replace("id=net0,", "")]),
    ("{network: lan, model: e1000, addr: 8}",
     ["-net", f"nic,model=e1000,macaddr={MAC},addr=8", "-net", TAP.replace("id=net0,", "")]),
    ("{user: {hostname: web}, vectors: 4}",
     ["-net", f"nic,model=virtio-net-pci,macaddr={MAC},vectors=4", "-net", "user,hostname=web"]),
    ("{network: lan, queues: 2}", "queues"),
    ("{network: big}", "host_mtu, and the network's MTU is 9000"),
    ("{network: lan, bus: pci.0}", "a bus, or a function of a slot"),
    ("{network: lan, addr: 8.1}", "a bus, or a function of a slot"),
    ("{network: lan}, {network: big}", "a second NIC: -net joins the networks of all of them"),
]  # fmt: skip


@pytest.mark.parametrize(("nics", "expected"), LEGACY, ids=[row[0] for row in LEGACY])
def test_legacy(nics: str, expected: list[str] | str) -> None:
    policy = policy_of(nics)
    vm = policy.vms["web1"]
    macs = {("web1", nic.id): MAC for nic in vm.nics}
    if isinstance(expected, list):
        assert legacy(policy, vm, macs, HOOKS) == expected
        return
    with pytest.raises(Failure) as caught:
        legacy(policy, vm, macs, HOOKS)
    assert caught.value.status is Status.REFUSED
    assert str(caught.value).startswith(f"--legacy has no words for {expected}: net")


def test_descriptors() -> None:
    assert tap_by_descriptors("n", [5], []) == "tap,id=n,fd=5"
    assert tap_by_descriptors("n", [5, 6], [7, 8]) == (
        "tap,id=n,fds=5:6,vhost=on,vhostfds=7:8"
    )


def test_a_mac_is_the_same_each_time_and_another_for_each_nic_guest_and_host() -> None:
    one = made_mac("host", "web1", "net0")
    assert one == made_mac("host", "web1", "net0") == "52:54:00:c5:3d:9e"
    others = [made_mac("host2", "web1", "net0"), made_mac("host", "web", "1net0"),
              made_mac("host", "web1", "net1")]
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
        "and net0 of web1 (p.yaml:3); give one of them another by mac:"
    )


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


def test_a_nic_is_a_rule_for_its_tap_before_all_others() -> None:
    policy = policy_of("{network: big, vlan: 6, mtu: none}", "{user: {}}", "{network: big}")
    for tap, vlan, line in (("web1-0", 6, 3), ("web1-2", 5, 3), ("web1-1", 7, 4), ("web2-0", 7, 4)):
        decision = choose(policy, Caller(tap))
        assert isinstance(decision, Attach)
        assert decision.port.vlan == Vlan(vlan) and decision.port.place.line == line, tap
        assert decide(policy, Caller(tap)).rule == decision.rule


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
    "ipv4": st.sampled_from(["10.1.0.0/16", "192.168.76.0/24"]),
    "ipv6": st.sampled_from(["fd00:2::/64"]),
    "restrict": st.sampled_from(["true", "false"]),
    "hostname": st.sampled_from(["web", "a-b.c"]),
})  # fmt: skip


def nic_texts() -> st.SearchStrategy[str]:
    """Return NICs as a policy has them."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {text(it)}" for key, it in value.items()) + "}"
        return f'"{value}"' if ":" in str(value) and "/" not in str(value) else str(value)

    def on_network(model: str) -> st.SearchStrategy[dict[str, Any]]:
        more = {**ANY, **(VIRTIO if model.startswith("virtio") else {}), "mtu": ON_NETWORK["mtu"]}
        return st.fixed_dictionaries(
            {"network": ON_NETWORK["network"], "model": st.just(model)}, optional=more
        )

    user = st.fixed_dictionaries({"user": USER, "model": st.sampled_from(MODELS)}, optional=ANY)
    return st.one_of(st.sampled_from(MODELS).flatmap(on_network), user).map(text)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(nic=nic_texts(), others=st.lists(st.sampled_from(MODELS), max_size=3))
def test_a_real_qemu_takes_whatever_a_policy_can_say(
    version: str, nic: str, others: list[str]
) -> None:
    policy = policy_of(nic, *(f"{{network: lan, model: {model}}}" for model in others))
    vm = policy.vms["web1"]
    arguments = dry(policy, vm, macs_of(policy, "host"))
    check_arguments(find_qemu(qemu_of(version)), None, arguments)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_real_qemu_does_not_take_is_told_in_its_words(version: str) -> None:
    path = find_qemu(qemu_of(version))
    for nic, machine, because in (
        ("{network: lan, model: foo}", None, "'foo' is not a valid device model name"),
        ("{network: lan, model: usb-net}", None, "No 'usb-bus' bus found for device 'usb-net'"),
        ("{network: lan, addr: 1f}", "q35", "slot 31 function 0 not available for"),
        ("{network: lan, bus: pci.9}", None, "Bus 'pci.9' not found"),
        ("{network: lan}", "nonesuch", "nsupported machine type"),
    ):
        policy = policy_of(nic)
        with pytest.raises(Failure) as caught:
            check_arguments(path, machine, dry(policy, policy.vms["web1"], {("web1", "net0"): MAC}))
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
