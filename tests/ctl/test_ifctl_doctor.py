"""pyqemu-ifctl doctor: each finding made for real, seen, mended by the very command, and gone."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lab.agent import Agent
from lab.calls import Calls
from lab.clinic import ALL, LAN, LAN_ADDRESS, SW, Clinic, Faulty, Row, treat, until
from lab.devices import without_tun
from lab.hooks import CHECKOUT, Hooks
from lab.nat_site import Listener
from lab.needs import require
from lab.netns import Namespace
from lab.ovs import DAEMONS, OpenVSwitch
from lab.public import NOBODY, as_user, public_folder, publish
from lab.qemu import Qemu, end_daemon, tell
from lab.taps import Tap, frame, mac, who_has
from pyqemu_ifconf.globs import covers, glob_fault, least_length, matches
from pyqemu_ifctl.doctor.chains import read_forward
from pyqemu_ifctl.doctor.checks import CHECKS
from pyqemu_ifctl.qemu.command_nics import nics_of
from pyqemu_ifctl.qemu.running import guest_of
from pyqemu_ifup.system.own_mac import NO_MAC, mac_for, this_host


@pytest.fixture
def clinic(netns: Namespace, tmp_path: Path) -> Clinic:
    """A host with a Linux bridge."""
    return Clinic(netns, Hooks(tmp_path / "hooks", netns=netns.name), tmp_path)


# The policy.


def invalid(clinic: Clinic) -> Faulty:
    yield
    clinic.policy("networks: {lan: {bridg: br0}}\n" + ALL, LAN + ALL)
    yield


def missing(clinic: Clinic) -> Faulty:
    yield
    clinic.hooks.policy.unlink()
    yield


def anybody_s(clinic: Clinic) -> Faulty:
    yield
    clinic.hooks.policy.chmod(0o666)
    yield


def another_s(clinic: Clinic) -> Faulty:
    yield
    os.chown(clinic.hooks.policy, NOBODY, 0)
    yield


def linked(clinic: Clinic) -> Faulty:
    clinic.hooks.policy.rename(clinic.folder / "real.yaml")
    clinic.hooks.policy.symlink_to(clinic.folder / "real.yaml")
    yield
    os.chown(clinic.hooks.policy, NOBODY, 0, follow_symlinks=False)
    yield


def linked_to_nothing(clinic: Clinic) -> Faulty:
    yield
    clinic.hooks.policy.unlink()
    clinic.hooks.policy.symlink_to("nowhere/real.yaml")
    yield


def shadowed(clinic: Clinic) -> Faulty:
    rules = "rules: [{tap: 'web*', network: lan}, {%stap: [web1, 'web-??'], deny: no}]\n"
    clinic.policy(LAN + rules.replace("[{tap: 'web*'", "[{tap: 'web?', vm: 'x*'") % "vm: x, ")
    yield
    clinic.policy(LAN + rules % "vm: x, ", LAN + ALL)
    yield


def long_glob(clinic: Clinic) -> Faulty:
    yield
    clinic.policy(LAN + "rules: [{tap: 'a-very-long-[ab]*-name', network: lan}]\n", LAN + ALL)
    yield


# Linux bridges.


def gone(clinic: Clinic) -> Faulty:
    yield
    clinic.ip("link", "del", "br0")
    yield


def said_to_be_openvswitch(clinic: Clinic) -> Faulty:
    yield
    clinic.policy("networks: {lan: {bridge: br0, kind: openvswitch}}\n" + ALL, LAN + ALL)
    yield


def a_card(clinic: Clinic) -> Faulty:
    clinic.ip("link", "add", "eth0", "type", "veth", "peer", "name", "far")
    yield
    clinic.policy("networks: {lan: {bridge: eth0}}\n" + ALL, LAN + ALL)
    yield
    clinic.ip("link", "del", "eth0")


def set_down(clinic: Clinic) -> Faulty:
    yield
    clinic.ip("link", "set", "br0", "down")
    yield


def addressed(clinic: Clinic) -> Faulty:
    guest = clinic.netns.tap("web0")
    assert clinic.hooks.up("web0").returncode == 0
    yield
    clinic.ip("link", "set", "web0", "addrgenmode", "eui64")
    clinic.netns.run(["sysctl", "-qw", "net.ipv6.conf.web0.disable_ipv6=0"])
    (row,) = clinic.hooks.ctl_json("status", "web0")["taps"]
    assert [each["setting"] for each in row["differences"]] == ["disable_ipv6"]
    yield
    assert clinic.hooks.ctl_json("status", "web0")["taps"][0]["state"] == "ok"
    assert clinic.hooks.down("web0").returncode == 0
    guest.close()


def taken_off(clinic: Clinic) -> Faulty:
    """Taken down first, and so no loss to the agent either; then, while it is up, without one."""
    guest = clinic.netns.tap("web0")
    assert clinic.hooks.up("web0").returncode == 0
    yield
    clinic.ip("link", "set", "web0", "up", "nomaster")
    (found,) = clinic.find("tap-off")
    assert found["what"].startswith("the tap web0 is not on br0, and the policy")
    clinic.ip("link", "set", "web0", "down")
    (row,) = clinic.hooks.ctl_json("status", "web0")["taps"]
    assert row["state"] == "differs"
    yield
    assert clinic.netns.link("web0")["master"] == "br0"
    # What the policy denies is down for good reason.
    clinic.policy(LAN + "rules: [{tap: '*', deny: cut}]\n")
    clinic.ip("link", "set", "web0", "down")
    assert clinic.find("tap-off") == []
    assert clinic.hooks.down("web0").returncode == 0
    guest.close()


def by_another_name(clinic: Clinic) -> Faulty:
    clinic.ip("link", "property", "add", "dev", "br0", "altname", "bridge0", "altname", "bridge1")
    yield
    clinic.policy("networks: {lan: {bridge: bridge1}}\n" + ALL, LAN + ALL)
    yield


def add_uplink(clinic: Clinic, name: str, far: str) -> None:
    clinic.ip("link", "add", name, "up", "type", "veth", "peer", "name", far)
    clinic.ip("link", "set", name, "master", "br0")


def slow(clinic: Clinic) -> Faulty:
    yield
    clinic.ip("link", "set", "br0", "type", "bridge", "stp_state", "1")
    yield


def slow_with_a_loop(clinic: Clinic) -> Faulty:
    add_uplink(clinic, "eth0", "far0")
    add_uplink(clinic, "eth1", "far1")
    yield
    clinic.ip("link", "set", "br0", "type", "bridge", "stp_state", "1")
    yield
    assert clinic.netns.link("br0")["linkinfo"]["info_data"]["stp_state"] == 1
    clinic.ip("link", "del", "eth0")
    clinic.ip("link", "del", "eth1")


def loose_mac(clinic: Clinic) -> Faulty:
    # NOTE: /sys is of the namespace that it was mounted in, which `ip netns exec` sees to.
    clinic.through = ["ip", "netns", "exec", clinic.netns.name]
    yield
    clinic.ip("link", "del", "br0")
    clinic.netns.add_bridge("br0")
    yield


def let_the_last_guest_go(clinic: Clinic) -> None:
    clinic.ip("link", "del", "br0")
    clinic.netns.add_bridge("br0")
    clinic.netns.tap("web0", up=True, master="br0")
    clinic.netns.close_kept()
    assert clinic.netns.link("br0")["address"] == NO_MAC


def emptied(clinic: Clinic) -> Faulty:
    clinic.through = ["ip", "netns", "exec", clinic.netns.name]
    yield
    let_the_last_guest_go(clinic)
    yield
    answers_guests(clinic)


def without_mac(clinic: Clinic) -> Faulty:
    yield
    let_the_last_guest_go(clinic)
    # NOTE: Linux looks at no MAC that a link has already (netif_set_mac_address).
    clinic.ip("link", "set", "br0", "address", NO_MAC)
    clinic.netns.tap("web0", up=True, master="br0")
    assert clinic.netns.link("br0")["address"] == NO_MAC
    yield
    answers_guests(clinic)


def answers_guests(clinic: Clinic) -> None:
    """Check that the host answers a guest that asks for its address, with a MAC of its own."""
    clinic.netns.close_kept()
    clinic.ip("address", "add", "192.0.2.1/24", "dev", "br0")
    guest = clinic.netns.tap("web1", up=True, master="br0")
    assert who_has(guest, "192.0.2.1") == mac_for("br0", this_host())
    clinic.netns.close_kept()


def small_bridge(clinic: Clinic) -> Faulty:
    yield
    clinic.policy("networks: {lan: {bridge: br0, mtu: 8950}}\n" + ALL)
    yield


def small_uplink(clinic: Clinic) -> Faulty:
    add_uplink(clinic, "eth0", "far")
    yield
    clinic.policy(LAN + "rules: [{tap: '*', network: lan, mtu: 8950}]\n")
    yield
    assert clinic.netns.link("eth0")["mtu"] == 8950
    clinic.ip("link", "del", "eth0")


def with_an_address(clinic: Clinic) -> Faulty:
    """The host's card is a port of the bridge, and has the host's address still."""
    add_uplink(clinic, "eth0", "far")
    # NOTE: the far end is another host's, who is a router.
    with Namespace() as far:
        clinic.ip("link", "set", "far", "netns", far.name)
        far.ip("link", "set", "far", "up")
        far.ip("address", "add", "192.0.2.1/24", "dev", "far")
        far.ip("address", "add", "203.0.113.1/32", "dev", "lo")
        yield
        clinic.ip("address", "add", "192.0.2.9/24", "dev", "eth0")
        clinic.ip("route", "add", "default", "via", "192.0.2.1")
        with Listener(far, "203.0.113.1", 7) as listener:
            say(clinic, "203.0.113.1", "cut off")
            yield
            say(clinic, "203.0.113.1", "back")
            assert listener.wait() == b"back"
        clinic.ip("address", "flush", "dev", "br0")
        clinic.ip("link", "del", "eth0")


def say(clinic: Clinic, address: str, text: str) -> None:
    with clinic.netns.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaker:
        speaker.sendto(text.encode(), (address, 7))


def hears(clinic: Clinic, guest: Tap, text: str) -> bool:
    """Tell whether a guest at 192.0.2.99, which answers who asks for it, hears the host."""
    say(clinic, "192.0.2.99", text)
    asked = guest.recv(5.0, lambda frame: frame[12:14] == b"\x08\x06")
    assert asked is not None
    body = asked[14:20] + b"\0\2" + mac(1) + asked[38:42] + asked[22:32]
    guest.send(frame(mac(1), asked[6:12], body, ethertype=0x0806))
    # NOTE: what the host asks again comes behind what it had to say.
    heard = guest.recv(5.0, lambda data: text.encode() in data or data[12:14] == b"\x08\x06")
    return heard is not None and text.encode() in heard


def a_tap_with_an_address(clinic: Clinic) -> Faulty:
    """As a script has left it that knew no bridge; up warns, status and explain tell."""
    clinic.ip("tuntap", "add", "dev", "web0", "mode", "tap")
    yield
    clinic.ip("address", "add", "192.0.2.1/24", "dev", "web0")
    what = "web0, a port of br0, has the address 192.0.2.1/24"
    assert what in clinic.hooks.ctl("explain", "web0").stdout
    with clinic.netns.enter():
        calls = Calls(clinic.hooks)
        guest = Tap("web0")
        ended = calls.up("web0")
        calls.close()
    assert ended.status == 0
    (told,) = [line for line in ended.log if what in line]
    assert told.endswith(
        "; mend it: ip address add 192.0.2.1/24 dev br0 && ip address del 192.0.2.1/24 dev web0"
    )
    (row,) = clinic.hooks.ctl_json("status", "web0")["taps"]
    (difference,) = row["differences"]
    assert (row["state"], difference["setting"]) == ("differs", "address")
    assert (difference["wanted"], difference["is"]) == ("none", "192.0.2.1/24")
    assert told.endswith(difference["because"])
    assert not hears(clinic, guest, "cut off")
    yield
    assert hears(clinic, guest, "back")
    assert clinic.hooks.down("web0").returncode == 0
    guest.close()
    clinic.ip("link", "del", "web0")
    clinic.ip("address", "flush", "dev", "br0")


def uplink_down(clinic: Clinic) -> Faulty:
    add_uplink(clinic, "eth0", "far")
    yield
    clinic.ip("link", "set", "eth0", "down")
    yield
    clinic.ip("link", "del", "eth0")


def nft(clinic: Clinic, *words: str) -> None:
    clinic.netns.run(["nft", *words])


def by_policy(clinic: Clinic) -> Faulty:
    nft(clinic, "add table bridge t")
    nft(clinic, "add chain bridge t f { type filter hook forward priority 0; }")
    yield
    nft(clinic, "add chain bridge t f { policy drop; }")
    yield
    nft(clinic, "delete table bridge t")


def by_a_rule(clinic: Clinic) -> Faulty:
    nft(clinic, "add table bridge t")
    nft(clinic, "add chain bridge t f { type filter hook forward priority 0; }")
    nft(clinic, "add rule bridge t f ether type arp drop")
    yield
    nft(clinic, "add rule bridge t f counter drop")
    yield
    assert "arp drop" in clinic.netns.run(["nft", "list", "ruleset"]).stdout
    nft(clinic, "delete table bridge t")


def call_iptables(clinic: Clinic, word: str) -> None:
    for kind in ("iptables", "ip6tables"):
        clinic.netns.run(["sysctl", "-qw", f"net.bridge.bridge-nf-call-{kind}={word}"])


def docker_like(clinic: Clinic, family: str) -> None:
    nft(clinic, f"add table {family} filter")
    nft(
        clinic,
        f"add chain {family} filter FORWARD "
        "{ type filter hook forward priority 0; policy drop; }",
    )


def forward_drop(clinic: Clinic) -> Faulty:
    call_iptables(clinic, "0")
    docker_like(clinic, "ip")
    yield
    call_iptables(clinic, "1")
    yield
    nft(clinic, "delete table ip filter")


def forward_drop_6(clinic: Clinic) -> Faulty:
    call_iptables(clinic, "1")
    yield
    docker_like(clinic, "ip6")
    yield
    nft(clinic, "delete table ip6 filter")


def of_one_bridge(clinic: Clinic) -> Faulty:
    call_iptables(clinic, "0")
    docker_like(clinic, "ip")
    yield
    clinic.ip("link", "set", "br0", "type", "bridge", "nf_call_iptables", "1")
    yield
    nft(clinic, "delete table ip filter")
    call_iptables(clinic, "1")


NAT = "networks: {lan: {bridge: lanbr0, nat: {ipv4: 192.168.76.1/24}}}\n"


def of_a_nat_network(clinic: Clinic) -> Faulty:
    clinic.policy(NAT + ALL)
    docker_like(clinic, "ip6")
    # NOTE: a bridge that its first tap makes need not be there.
    assert clinic.find("bridge-missing") == []
    yield
    docker_like(clinic, "ip")
    nft(clinic, "add rule ip filter FORWARD oifname lanbr0 counter accept")
    yield
    nft(clinic, "delete table ip filter")
    nft(clinic, "delete table ip6 filter")


def flushed(clinic: Clinic) -> Faulty:
    clinic.policy(NAT + ALL)
    clinic.netns.tap("web0")
    assert clinic.hooks.up("web0").returncode == 0
    yield
    nft(clinic, "flush ruleset")
    yield
    assert clinic.hooks.down("web0").returncode == 0


# The host's device, in a mount namespace of its own.


def own_mounts(clinic: Clinic, script: str) -> subprocess.Popen[str]:
    """Have doctor look into mounts of its own, where `script` was run; return who holds them."""
    with clinic.netns.enter():
        holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-euc", f"{script}\necho ready; exec sleep infinity"],
            stdout=subprocess.PIPE,
            text=True,
        )
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
    clinic.through = ["nsenter", "-m", "-t", str(holder.pid)]
    return holder


def let_go(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate()


PRIVATE_TUN = "mount -t tmpfs none /dev/net; mknod -m 0666 /dev/net/tun c 10 200"


def no_tun(clinic: Clinic) -> Faulty:
    holder = own_mounts(clinic, PRIVATE_TUN)
    try:
        yield
        clinic.mend("rm /dev/net/tun")
        yield
    finally:
        let_go(holder)


def no_driver(clinic: Clinic) -> Faulty:
    """NOTE: a device that this kernel has no driver for stands for tun's own."""
    holder = own_mounts(clinic, PRIVATE_TUN)
    try:
        yield
        clinic.mend("rm /dev/net/tun && mknod -m 0666 /dev/net/tun c 10 250")
        yield
    finally:
        let_go(holder)


def forbidden_tun(clinic: Clinic) -> Faulty:
    holder = own_mounts(clinic, PRIVATE_TUN)
    try:
        yield
        with without_tun() as prefix:
            clinic.through = prefix + clinic.through
            yield
    finally:
        let_go(holder)


def another_tun(clinic: Clinic) -> Faulty:
    holder = own_mounts(clinic, PRIVATE_TUN)
    try:
        yield
        clinic.mend("rm /dev/net/tun && touch /dev/net/tun && chmod 0666 /dev/net/tun")
        yield
    finally:
        let_go(holder)


def closed_tun(clinic: Clinic) -> Faulty:
    holder = own_mounts(clinic, PRIVATE_TUN)
    try:
        yield
        clinic.mend("chmod 0660 /dev/net/tun")
        yield
    finally:
        let_go(holder)


# QEMUs.


def tap(clinic: Clinic, name: str, script: str | None, down: str | None) -> list[str]:
    words = f"tap,id=n0,ifname={name}"
    words += f",script={script}" if script is not None else ""
    words += f",downscript={down}" if down is not None else ""
    return ["-netdev", words]


ETC = """
upper=$(mktemp -d)
mount -t tmpfs none $upper
for folder in /etc /var/lib/dpkg; do
    mkdir -p $upper$folder/up $upper$folder/work
    mount -t overlay -o lowerdir=$folder,upperdir=$upper$folder/up,workdir=$upper$folder/work \\
        none $folder
done
umount -l $upper; rmdir $upper
rm -f /etc/qemu-ifup /etc/qemu-ifdown
printf '#!/bin/sh\\n' >/etc/qemu-ifup
chmod 755 /etc/qemu-ifup
"""
"""An /etc that can be written to, with a stock script of the kind that does nothing."""


def takeover(clinic: Clinic) -> None:
    """Put pyqemu-takeover there as `make install` makes it."""
    text = (CHECKOUT / "conf" / "takeover.in").read_text()
    clinic.program("pyqemu-takeover", text.replace("@bin@", str(clinic.hooks.folder)))


def stock_script(clinic: Clinic) -> Faulty:
    holder = own_mounts(clinic, ETC)
    takeover(clinic)
    try:
        clinic.qemu("one", *tap(clinic, "web0", clinic.hooks.ifup, clinic.hooks.ifdown))
        yield
        clinic.qemu("two", *tap(clinic, "web1", None, "no"))
        yield
    finally:
        clinic.end("one")
        clinic.end("two")
        let_go(holder)


def no_downscript(clinic: Clinic) -> Faulty:
    clinic.qemu("one", *tap(clinic, "web0", clinic.hooks.ifup, "no"))
    try:
        yield
        clinic.qemu("two", *tap(clinic, "web1", clinic.hooks.ifup, str(clinic.folder / "gone")))
        yield
    finally:
        clinic.end("one")
        clinic.end("two")


def default_downscript(clinic: Clinic) -> Faulty:
    holder = own_mounts(clinic, ETC)
    takeover(clinic)
    try:
        yield
        clinic.qemu("one", *tap(clinic, "web0", clinic.hooks.ifup, None))
        yield
    finally:
        clinic.end("one")
        let_go(holder)


def another_downscript(clinic: Clinic) -> Faulty:
    try:
        yield
        clinic.qemu("one", *tap(clinic, "web0", clinic.hooks.ifup, "/bin/true"))
        yield
    finally:
        clinic.end("one")


def twins(clinic: Clinic) -> Faulty:
    words = ["-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01"]
    yield from _twins(clinic, words)


def twins_by_default(clinic: Clinic) -> Faulty:
    yield from _twins(clinic, ["-device", "e1000,netdev=n0"])


def _twins(clinic: Clinic, words: list[str]) -> Faulty:
    user = ["-netdev", "user,id=n0"]
    first = tap(clinic, "web0", clinic.hooks.ifup, clinic.hooks.ifdown)
    second = tap(clinic, "web1", clinic.hooks.ifup, clinic.hooks.ifdown)
    clinic.qemu("one", *first, *words)
    # NOTE: nobody else sees the MAC of a guest in user mode.
    clinic.qemu("alone", *user, *words)
    try:
        yield
        clinic.qemu("two", *second, *words)
        yield
    finally:
        for name in ("one", "two", "alone"):
            clinic.end(name)


def _on_hub(clinic: Clinic, name: str, *ends: str) -> None:
    words = [word for end in ends for word in ("-net", "nic,model=e1000", "-net", end)]
    clinic.qemu(name, *words)
    for number in range(len(ends)):
        if clinic.netns.links().get(f"web{number}"):
            clinic.ip("link", "set", "dev", f"web{number}", "up", "master", "br0")


def joined_taps(clinic: Clinic) -> Faulty:
    try:
        _on_hub(clinic, "one", "tap,ifname=web0,script=no,downscript=no")
        yield
        clinic.end("one")
        _on_hub(
            clinic,
            "one",
            "tap,ifname=web0,script=no,downscript=no",
            "tap,ifname=web1,script=no,downscript=no",
        )
        yield
    finally:
        clinic.end("one")


def joined_while_it_runs(clinic: Clinic) -> Faulty:
    path = clinic.folder / "qmp"
    words = [
        word
        for number in range(2)
        for word in ("-netdev", f"tap,id=n{number},ifname=web{number},script=no,downscript=no")
    ]
    try:
        clinic.qemu("one", *words, "-qmp", f"unix:{path},server=on,wait=off")
        for number in range(2):
            clinic.ip("link", "set", "dev", f"web{number}", "up", "master", "br0")
        yield
        tell(
            path,
            *(
                ("netdev_add", {"type": "hubport", "id": f"h{n}", "hubid": 0, "netdev": f"n{n}"})
                for n in range(2)
            ),
        )
        yield
    finally:
        clinic.end("one")


def joined_with_user_mode(clinic: Clinic) -> Faulty:
    try:
        _on_hub(clinic, "one", "tap,ifname=web0,script=no,downscript=no")
        yield
        clinic.end("one")
        _on_hub(clinic, "one", "tap,ifname=web0,script=no,downscript=no", "user")
        yield
    finally:
        clinic.end("one")


def unconfined(clinic: Clinic) -> Faulty:
    words = tap(clinic, "web0", clinic.hooks.ifup, clinic.hooks.ifdown)
    clinic.qemu("one", *words, "-sandbox", "on")
    try:
        yield
        clinic.end("one")
        clinic.qemu("one", *words)
        yield
    finally:
        clinic.end("one")


ROWS = (
    Row("policy", invalid, "the policy is invalid: "),
    Row("policy", missing, "it does not exist"),
    Row("policy", anybody_s, "everybody can write it (mode 0666)"),
    Row("policy", another_s, f"user {NOBODY} owns it"),
    Row("policy", linked, f"user {NOBODY} owns it"),
    Row("policy", linked_to_nothing, "nowhere, which does not exist"),
    Row("unreachable-rule", shadowed, "is never reached: the one at "),
    Row("long-tap-glob", long_glob, "'a-very-long-[ab]*-name' at "),
    Row("bridge-missing", gone, "there is no bridge br0, which network lan is on ("),
    Row("bridge-missing", by_another_name, "there is no bridge bridge1: that is another name of"),
    Row(
        "bridge-kind",
        said_to_be_openvswitch,
        "br0 is a Linux bridge, and network lan wants an Open vSwitch bridge (",
    ),
    Row("bridge-kind", a_card, "eth0 is no bridge, and network lan is on it ("),
    Row("bridge-down", set_down, "the bridge br0 is down"),
    Row("tap-off", taken_off, "the tap web0 is down, and the policy has it attached"),
    Row("tap-ipv6", addressed, "the tap web0: the host's end may get an IPv6 address"),
    Row("bridge-stp", slow, "br0 runs STP with a forward delay of 15 s"),
    Row("bridge-stp", slow_with_a_loop, "br0 runs STP with a forward delay of 15 s"),
    Row("bridge-mac", loose_mac, "the MAC of br0 is not set, and it has no uplink"),
    Row("bridge-mac", emptied, "the MAC of br0 is not set, and it has no uplink"),
    Row("bridge-no-mac", without_mac, "the MAC of br0 is 00:00:00:00:00:00"),
    Row("bridge-mtu", small_bridge, "br0 has an MTU of 1500, and network lan ("),
    Row("uplink-mtu", small_uplink, "eth0, an uplink of br0, has an MTU of 1500, and network lan"),
    Row("uplink-down", uplink_down, "eth0, an uplink of br0, is down"),
    Row("port-address", with_an_address, "eth0, a port of br0, has the address 192.0.2.9/24"),
    Row("port-address", a_tap_with_an_address, "web0, a port of br0, has the address 192.0.2.1/24"),
    Row("bridge-filter", by_policy, "bridge t f (forward) drops frames by its policy"),
    Row("bridge-filter", by_a_rule, "bridge t f (forward) drops frames by a rule without"),
    Row("br-netfilter", forward_drop, "through iptables, where ip filter FORWARD drops"),
    Row("br-netfilter", forward_drop_6, "through ip6tables, where ip6 filter FORWARD drops"),
    Row("br-netfilter", of_one_bridge, "br0 sends its frames through iptables"),
    Row("nat-filter", of_a_nat_network, "ip filter FORWARD drops what is forwarded for network"),
    Row("nat-table", flushed, "pyqemu-ifup-lan of network lan is gone"),
    Row("tun-missing", no_tun, "there is no /dev/net/tun"),
    Row("tun-missing", another_tun, "/dev/net/tun is something else"),
    Row("tun-closed", closed_tun, "(mode 0660)"),
)

QEMU_ROWS = (
    Row("qemu-script", stock_script, "has a tap without script=, and /etc/qemu-ifup is not ours"),
    Row("qemu-downscript", default_downscript, "the downscript /etc/qemu-ifdown of one (QEMU "),
    Row("qemu-hub", joined_taps, "web0 and web1 of one (QEMU "),
    Row("qemu-hub", joined_while_it_runs, "web0 and web1 of one (QEMU "),
)


def test_a_hub_that_was_taken_apart_over_qmp_is_none(clinic: Clinic) -> None:
    """Though its command line has it for as long as it runs; nor is one of its taps down for it."""
    path = clinic.folder / "qmp"
    words = ["-qmp", f"unix:{path},server=on,wait=off", "-netdev", "user,id=u"]
    words += ["-netdev", "hubport,id=h3,hubid=1,netdev=u"]
    for n, hub in enumerate((0, 0, 1)):
        words += ["-netdev", f"tap,id=n{n},ifname=web{n},script=no,downscript=no"]
        words += ["-netdev", f"hubport,id=h{n},hubid={hub},netdev=n{n}"]
    checks = ("qemu-hub", "qemu-hub-mixed", "tap-off")
    with clinic.healthy():
        clinic.policy(LAN + ALL)
        try:
            clinic.qemu("one", *words)
            for n in range(3):
                assert clinic.hooks.up(f"web{n}").returncode == 0
            told = {each["check"] for each in clinic.look()["findings"]}
            assert told.issuperset(checks[:2])
            clinic.ip("link", "set", "dev", "web1", "down")
            assert clinic.find("tap-off") == []
            tell(path, *(("netdev_del", {"id": each}) for each in ("h1", "h3")))
            told = {each["check"] for each in clinic.look()["findings"]}
            assert told.intersection(checks) == {"tap-off"}
        finally:
            clinic.end("one")


NEXT_TIME = (
    (Row("qemu-downscript", no_downscript, "the downscript "), "web1", (), "add: downscript="),
    (
        Row("qemu-downscript", another_downscript, "the downscript /bin/true of one (QEMU "),
        "web0",
        (),
        "add: downscript=",
    ),
    (
        Row("qemu-mac", twins, "has the MAC 52:54:00:00:00:01, and so has one (QEMU "),
        "web1",
        ("-device", "virtio-net-pci,netdev=n0,{}"),
        "mac=52:54:00:",
    ),
    (
        Row("qemu-mac", twins_by_default, "has the MAC 52:54:00:12:34:56, and so has one (QEMU "),
        "web1",
        ("-device", "e1000,netdev=n0,{}"),
        "mac=52:54:00:",
    ),
    (
        Row("qemu-hub-mixed", joined_with_user_mode, "web0 of one (QEMU "),
        "web0",
        (),
        "give each tap a -netdev and a -device of its own",
    ),
    (Row("qemu-sandbox", unconfined, "one (QEMU "), "web0", ("-sandbox", "on"), "add: -sandbox on"),
)
"""What only another start of a guest mends: its tap, words that it gets, and what is said."""


def titles(row: Row) -> str:
    return row.title


@pytest.mark.parametrize("row", ROWS, ids=titles)
def test_on_a_linux_bridge(row: Row, clinic: Clinic) -> None:
    treat(row, clinic)


def loaded(clinic: Clinic) -> None:
    clinic.mend("rm /dev/net/tun && mknod -m 0666 /dev/net/tun c 10 200")


def allowed(clinic: Clinic) -> None:
    clinic.through = clinic.through[4:]


@pytest.mark.parametrize(("row", "mend", "says"), [
    (Row("tun-missing", no_driver, "/dev/net/tun cannot be opened: No such device: the kernel"),
     loaded, "modprobe tun"),
    (Row("tun-missing", forbidden_tun, "/dev/net/tun cannot be opened: Operation not permitted"),
     allowed, "--device=/dev/net/tun"),
], ids=["no-driver", "forbidden"])  # fmt: skip
def test_tun_is_opened(row: Row, mend: Callable[[Clinic], None], says: str, clinic: Clinic) -> None:
    """What is told is for the host of a container, or for the kernel's own modules."""
    with clinic.fault(row) as found:
        assert says in (found["command"] or found["do"])
        program = str(clinic.hooks.folder / "pyqemu-ifctl")
        said = clinic.run([program, "explain", "web9"]).stdout
        assert f"note: QEMU could not make the tap now: {found['what']}; " in said
        mend(clinic)


def test_a_root_that_may_change_no_link(clinic: Clinic) -> None:
    tap = clinic.netns.tap("web0")
    with clinic.healthy():
        assert clinic.find("net-admin") == []
        clinic.through = ["setpriv", "--bounding-set=-net_admin", "sh", "-c", 'exec "$0" "$@"']
        done = clinic.run([clinic.hooks.ifup, "web0"])
        (found,) = clinic.find("net-admin")
        assert "CAP_NET_ADMIN" in found["do"] and found["do"] in done.stderr
        assert done.returncode == 77
        clinic.policy(
            "networks: {lab: {bridge: labbr0, nat: {ipv4: 192.168.79.1/24}}}\n"
            "rules: [{tap: '*', network: lab}]\n"
        )
        done = clinic.run([str(clinic.hooks.folder / "pyqemu-ifctl"), "explain", "web0"])
        assert "give it CAP_NET_ADMIN" in done.stdout and "run as root" not in done.stdout, done
        clinic.policy(LAN + ALL)
    tap.close()


@pytest.mark.parametrize("row", QEMU_ROWS, ids=titles)
def test_of_a_qemu(row: Row, clinic: Clinic) -> None:
    require("qemu")
    treat(row, clinic)


@pytest.mark.parametrize(
    ("row", "name", "words", "says"), NEXT_TIME, ids=[row[0].title for row in NEXT_TIME]
)
def test_what_another_start_mends(
    row: Row, name: str, words: tuple[str, ...], says: str, clinic: Clinic
) -> None:
    """The guest ends, and is started as doctor says."""
    require("qemu")
    with clinic.fault(row) as found:
        named = re.match(r".*?(\w+) \(QEMU (\d+)\)", found["what"])
        assert named is not None and found["command"] is None and says in found["do"]
        assert f"process {named[2]} of user root" in found["do"]
        last = found["do"].rpartition(" ")[2]
        clinic.end(named[1])
        if last.startswith("downscript="):
            assert last == f"downscript={clinic.hooks.ifdown}"
        clinic.qemu(
            named[1],
            *tap(clinic, name, clinic.hooks.ifup, clinic.hooks.ifdown),
            *(word.format(last) for word in words),
        )


HELPER = (
    ETC.replace("/var/lib/dpkg;", "/var/lib/dpkg /usr/lib/qemu;")
    + """
mkdir -p /etc/qemu
echo allow br0 >/etc/qemu/bridge.conf
"""
)
"""A host whose QEMU finds its own bridge helper, which lets everybody onto br0."""


def test_guest_that_came_by_qemu_s_own_helper(clinic: Clinic) -> None:
    """It stays past the policy until it starts anew, by ours then."""
    require("qemu")
    holder = own_mounts(clinic, HELPER)
    takeover(clinic)
    words = ("-netdev", "bridge,id=n0,br=br0", "-device", "virtio-net-pci,netdev=n0")
    with clinic.healthy(), Agent(clinic.netns, clinic.hooks.policy) as agent:
        clinic.hooks.agent = agent.path
        try:
            clinic.qemu("one", *words)
            (found,) = clinic.find("qemu-helper")
            assert re.fullmatch(
                r"one \(QEMU \d+\) has tap0 on br0 by a bridge helper that is not ours",
                found["what"],
            )
            clinic.mend(found["command"])
            (found,) = clinic.find("qemu-helper")
            assert found["command"] is None and "start it anew" in found["do"]
            clinic.end("one")
            clinic.qemu("one", *words)
            assert clinic.find("qemu-helper") == []
            assert "network=lan" in clinic.netns.link("tap0")["ifalias"]
        finally:
            clinic.end("one")
            clinic.hooks.agent = ""
            let_go(holder)
            clinic.through = []


def migrant(clinic: Clinic, name: str, ifname: str, *more: str) -> Qemu:
    """Start a QEMU with a MAC that another has too, and a QMP socket."""
    words = tap(clinic, ifname, clinic.hooks.ifup, clinic.hooks.ifdown)
    words += ["-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01,romfile="]
    words += ["-qmp", f"unix:{clinic.folder}/{name}.sock,server=on,wait=off"]
    qemu = Qemu(
        *words,
        *more,
        "-m",
        "32",
        "-S",
        "-name",
        name,
        netns=clinic.netns.name,
        machine="pc",
        env=clinic.hooks.environ(),
    )
    assert qemu.greeting
    return qemu


def twins_told(clinic: Clinic) -> list[str]:
    """Return what doctor and info say of a MAC that two have."""
    told = [each["what"] for each in clinic.find("qemu-mac")]
    done = clinic.run([str(clinic.hooks.folder / "pyqemu-ifctl"), "info", "--json"])
    nics = [nic for guest in json.loads(done.stdout)["guests"] for nic in guest["nics"]]
    return told + [each for nic in nics for each in nic["faults"] if "the same MAC" in each]


def test_a_guest_that_migrates_is_no_twin_of_itself(clinic: Clinic) -> None:
    """Neither before, nor after, when its old QEMU is still there; a third with its MAC is one."""
    require("qemu")
    way = f"unix:{clinic.folder}/way"
    with clinic.healthy(), migrant(clinic, "web1", "web0") as source:
        with migrant(clinic, "web1-new", "web1", "-incoming", way) as target:
            assert target.execute("query-status")["status"] == "inmigrate"
            assert twins_told(clinic) == []
            source.execute("migrate", {"uri": way})
            until(lambda: source.execute("query-migrate").get("status") == "completed", "it leaves")
            until(lambda: target.execute("query-status")["status"] != "inmigrate", "it arrives")
            assert source.execute("query-status")["status"] == "postmigrate"
            assert twins_told(clinic) == []
            with migrant(clinic, "other", "web2") as other:
                assert len(twins_told(clinic)) == 3
                assert other.quit() == 0
            assert target.quit() == 0
        assert source.quit() == 0


def test_who_may_wait_for_a_migration_and_does_not_tell_is_no_error(clinic: Clinic) -> None:
    require("qemu")
    words = ["-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01"]
    with clinic.healthy():
        try:
            for name, more in (("one", []), ("two", ["-incoming", f"unix:{clinic.folder}/way"])):
                ifname = "web0" if name == "one" else "web1"
                own = tap(clinic, ifname, clinic.hooks.ifup, clinic.hooks.ifdown)
                clinic.qemu(name, *own, *words, *more)
            told = clinic.look()
            assert [each for each in told["findings"] if each["check"] == "qemu-mac"] == []
            (unseen,) = [each for each in told["unseen"] if "waits for a migration" in each]
            assert unseen.endswith(
                "it has no QMP socket: give it -qmp unix:PATH,server=on,wait=off"
            )
        finally:
            clinic.end("one")
            clinic.end("two")


# Open vSwitch.


def set_policy(clinic: Clinic, settings: str, edited: str = "") -> None:
    text = f"networks: {{sw: {{bridge: br-int, ovsdb: '{clinic.switch.db}', %s}}}}\n{SW}"
    clinic.policy(text % settings, text % edited)


def no_such_bridge(clinic: Clinic) -> Faulty:
    yield
    clinic.switch.vsctl("del-br", "br-int")
    yield


def of_both_kinds(clinic: Clinic) -> Faulty:
    clinic.switch.vsctl(
        "add-br", "br0", "--", "set", "Bridge", "br0", "datapath_type=netdev", check=False
    )
    text = f"networks: {{sw: {{bridge: br0, ovsdb: '{clinic.switch.db}'%s}}}}\n{SW}"
    clinic.policy(text % ", kind: linux")
    yield
    clinic.policy(text % "", text % ", kind: linux")
    yield
    clinic.switch.vsctl("del-br", "br0")


def ovs_taken_off(clinic: Clinic) -> Faulty:
    guest = clinic.netns.tap("web0")
    assert clinic.hooks.up("web0").returncode == 0
    yield
    clinic.switch.del_port("web0")
    yield
    assert clinic.switch.find("Port", "web0") is not None
    assert clinic.hooks.down("web0").returncode == 0
    guest.close()


def ovs_loose_mac(clinic: Clinic) -> Faulty:
    yield
    clinic.switch.vsctl("clear", "Bridge", "br-int", "other_config")
    yield


def ovs_small_bridge(clinic: Clinic) -> Faulty:
    yield
    set_policy(clinic, "mtu: 8950")
    yield
    assert clinic.netns.link("br-int")["mtu"] == 8950


def ovs_slow(clinic: Clinic) -> Faulty:
    yield
    clinic.switch.vsctl("set", "Bridge", "br-int", "stp_enable=true")
    yield


def add_ovs_uplink(clinic: Clinic, *settings: str) -> None:
    clinic.ip("link", "add", "eth0", "up", "type", "veth", "peer", "name", "far")
    clinic.switch.add_port("br-int", "eth0", *settings)


def of_a_trunk(clinic: Clinic) -> Faulty:
    set_policy(clinic, "vlan: {native: 10, trunk: [20, 30-32]}")
    add_ovs_uplink(clinic)
    yield
    clinic.switch.vsctl("set", "Port", "eth0", "trunks=10,30")
    yield
    assert clinic.switch.row("Port", "eth0")["trunks"] == [10, 20, 30, 31, 32]
    clinic.switch.del_port("eth0")
    clinic.ip("link", "del", "eth0")


def ovs_uplink_down(clinic: Clinic) -> Faulty:
    add_ovs_uplink(clinic)
    yield
    clinic.ip("link", "set", "eth0", "down")
    yield
    clinic.switch.del_port("eth0")
    clinic.ip("link", "del", "eth0")


def of_an_access_port(clinic: Clinic) -> Faulty:
    set_policy(clinic, "vlan: 10")
    add_ovs_uplink(clinic, "tag=10")
    yield
    set_policy(clinic, "vlan: {trunk: [10, 20]}")
    yield
    row = clinic.switch.row("Port", "eth0")
    assert (row["tag"], row["vlan_mode"]) == (10, "native-untagged")
    clinic.switch.del_port("eth0")
    clinic.ip("link", "del", "eth0")


@contextmanager
def ovs_ctl(clinic: Clinic) -> Iterator[None]:
    """Have Open vSwitch's own script work with the daemons of the tests, and these run again."""
    ovs = clinic.switch
    # NOTE: it loads a module, which the userspace datapath does without and this kernel may lack.
    clinic.program("modprobe", "exit 0")
    for daemon, name in ((ovs.server, "server"), (ovs.vswitchd, "vswitchd")):
        (ovs.dir / f"{DAEMONS[name]}.{daemon.pid}.ctl").symlink_to(f"{name}.ctl")
    ours = (ovs.server, ovs.vswitchd)
    try:
        yield
    finally:
        for daemon, name in zip(ours, DAEMONS.values(), strict=True):
            file = ovs.dir / f"{name}.pid"
            pid = int(file.read_text()) if file.exists() else 0
            if pid and (daemon.process is None or pid != daemon.pid):
                end_daemon(pid, signal.SIGTERM)
                _gone(pid)
                daemon.end()
        if ovs.server.process is None:
            ovs.start_server()
        if ovs.vswitchd.process is None:
            ovs.start_vswitchd()


def _gone(pid: int) -> None:
    until(lambda: not os.path.exists(f"/proc/{pid}"), f"process {pid} ends")


def no_server(clinic: Clinic) -> Faulty:
    with ovs_ctl(clinic):
        yield
        clinic.switch.server.kill()
        yield


def no_vswitchd(clinic: Clinic) -> Faulty:
    with ovs_ctl(clinic):
        yield
        clinic.switch.vswitchd.kill()
        yield


def without_its_lock(clinic: Clinic) -> Faulty:
    """One that hangs: somebody has taken its lock of the database away."""
    with ovs_ctl(clinic):
        yield
        thief = clinic.netns.popen(["ovsdb-client", "steal", clinic.switch.db, "ovs_vswitchd"])
        assert thief.stdout is not None and thief.stdout.readline()
        clinic.switch.vsctl("--no-wait", "set", "Open_vSwitch", ".", "next_cfg=99")
        # NOTE: they are children of this process, and there until it has waited for them.
        for daemon in (clinic.switch.server, clinic.switch.vswitchd):
            assert daemon.process is not None
            threading.Thread(target=daemon.process.wait).start()
        try:
            yield
        finally:
            thief.kill()
            thief.communicate()


def stopped_vswitchd(clinic: Clinic) -> Faulty:
    yield
    clinic.switch.vswitchd.stop()
    try:
        yield
    finally:
        clinic.switch.vswitchd.cont()


def old_version(clinic: Clinic) -> Faulty:
    """NOTE: the stand-in for the package's installation notes its version, as ovs-ctl does."""
    words = f"ovs-vsctl --db={clinic.switch.db} --no-wait set Open_vSwitch . ovs_version="
    clinic.program("apt-get", f"{words}$(ovs-vswitchd --version | sed -n '1s/.* //p')")
    clinic.switch.vsctl("--no-wait", "set", "Open_vSwitch", ".", "ovs_version=3.1.0")
    yield
    clinic.switch.vsctl("--no-wait", "set", "Open_vSwitch", ".", "ovs_version=2.9.8")
    yield


def unusable(clinic: Clinic) -> Faulty:
    yield
    clinic.switch.vsctl("add-port", "br-int", "nosuch0", check=False)
    yield


def stale(clinic: Clinic) -> Faulty:
    tap = clinic.netns.tap("web0")
    assert clinic.hooks.up("web0").returncode == 0
    yield
    tap.close()
    yield


def every_vlan(clinic: Clinic) -> Faulty:
    clinic.netns.tap("web0", up=True)
    clinic.switch.add_port("br-int", "web0", "vlan_mode=access")
    yield
    clinic.switch.vsctl("clear", "Port", "web0", "vlan_mode")
    yield
    clinic.switch.del_port("web0")


def without_its_socket(clinic: Clinic) -> Faulty:
    text = f"networks: {{sw: {{bridge: br-int, kind: openvswitch, ovsdb: '{clinic.switch.db}'}}}}"
    clinic.policy(f"{text}\n{SW}")
    with ovs_ctl(clinic):
        yield
        clinic.switch.server.kill()
        (clinic.switch.dir / "db.sock").unlink()
        yield


OVS_ROWS = (
    Row("bridge-missing", no_such_bridge, "there is no bridge br-int, which network sw is on ("),
    Row("uplink-down", ovs_uplink_down, "eth0, an uplink of br-int, is down"),
    Row("bridge-kind", of_both_kinds, "br0 is both a Linux bridge and an Open vSwitch bridge"),
    Row("tap-off", ovs_taken_off, "the tap web0 is not on br-int, and the policy has it attached"),
    Row("bridge-mac", ovs_loose_mac, "the MAC of br-int is not set, and it has no uplink"),
    Row("bridge-mtu", ovs_small_bridge, "br-int has an MTU of 1500, and network sw ("),
    Row("bridge-stp", ovs_slow, "br-int runs STP"),
    Row("uplink-vlan", of_a_trunk, "no uplink of br-int carries VLAN 20, 31-32"),
    Row("uplink-vlan", of_an_access_port, "no uplink of br-int carries VLAN 20"),
    Row("ovs-down", no_server, "Open vSwitch is not there: nothing answers at unix:"),
    Row("ovs-down", without_its_socket, "Open vSwitch does not run: there is no unix:"),
    Row("ovs-vswitchd", no_vswitchd, "ovs-vswitchd does not run (unix:"),
    Row("ovs-vswitchd", stopped_vswitchd, "ovs-vswitchd is stopped, process "),
    Row("ovs-vswitchd", without_its_lock, "ovs-vswitchd has not taken in what is configured"),
    Row("ovs-version", old_version, "Open vSwitch is 2.9.8 (unix:"),
    Row("ovs-error", unusable, "Open vSwitch cannot use the port nosuch0 of br-int: 'could not"),
    Row("ovs-stale", stale, "the port web0 of br-int is left of a guest that is gone"),
    Row("ovs-trunk", every_vlan, "the tap web0 carries every VLAN of br-int"),
)


@pytest.mark.parametrize("row", OVS_ROWS, ids=titles)
def test_with_open_vswitch(row: Row, clinic: Clinic, ovs: OpenVSwitch) -> None:
    clinic.ovs = ovs
    treat(row, clinic)


def test_a_port_is_not_gone_whose_database_does_not_tell(clinic: Clinic, ovs: OpenVSwitch) -> None:
    """Its socket has gone with its server; or the policy names it no more, and the mark does."""
    clinic.ovs = ovs
    with clinic.healthy():
        guest = clinic.netns.tap("web0")
        assert clinic.hooks.up("web0").returncode == 0
        text = f"networks: {{sw: {{bridge: br-int, kind: openvswitch, ovsdb: '{ovs.db}'}}}}\n{SW}"
        clinic.policy(text.replace(ovs.db, f"unix:{clinic.folder}/no.sock"))
        assert clinic.find("tap-off") == []
        clinic.policy(text)
        assert clinic.find("tap-off") == []
        ovs.server.kill()
        (ovs.dir / "db.sock").unlink()
        try:
            told = clinic.look()["findings"]
        finally:
            ovs.start_server()
        assert [each["check"] for each in told if each["severity"] == "error"] == ["ovs-down"]
        assert clinic.hooks.down("web0").returncode == 0
        guest.close()


def test_a_port_of_open_vswitch_s_own_is_no_guest_s(clinic: Clinic, ovs: OpenVSwitch) -> None:
    """On the userspace datapath it is a tap, which ovs-vswitchd holds."""
    clinic.ovs = ovs
    with clinic.healthy():
        before = clinic.look()["findings"]
        clinic.switch.vsctl(
            "add-port", "br-int", "ip0", "--", "set", "interface", "ip0", "type=internal"
        )
        clinic.ip("address", "add", "192.0.2.1/24", "dev", "ip0")
        assert clinic.netns.link("ip0")["linkinfo"]["info_kind"] == "tun"
        assert clinic.look()["findings"] == before
        assert clinic.hooks.ctl_json("status")["taps"] == []
        # NOTE: the guests have the host beside them, by that port.
        tap = clinic.netns.tap("web0")
        assert clinic.hooks.up("web0").returncode == 0
        assert clinic.find("bridge-alone") == []
        clinic.switch.vsctl("del-port", "ip0")
        assert len(clinic.find("bridge-alone")) == 1
        tap.close()
        assert clinic.hooks.down("web0").returncode == 0


def test_guest_on_open_vswitch_without_a_downscript(clinic: Clinic, ovs: OpenVSwitch) -> None:
    """On a Linux bridge the port goes with the tap: see no_downscript."""
    require("qemu")
    clinic.ovs = ovs
    with clinic.healthy():
        try:
            clinic.qemu("one", *tap(clinic, "web0", clinic.hooks.ifup, "no"))
            (found,) = clinic.find("qemu-downscript")
            assert re.fullmatch(r"one \(QEMU \d+\) has no downscript=", found["what"])
            word = found["do"].rpartition(" ")[2]
            assert word == f"downscript={clinic.hooks.ifdown}"
            clinic.end("one")
            assert ovs.find("Port", "web0") is not None, "it stays, as doctor says"
            words = tap(clinic, "web0", clinic.hooks.ifup, word.partition("=")[2])
            clinic.qemu("one", *words)
            assert clinic.find("qemu-downscript") == []
        finally:
            clinic.end("one")
        assert ovs.find("Port", "web0") is None


def test_guest_on_a_bridge_that_leads_nowhere(clinic: Clinic) -> None:
    """It has neither DHCP nor a way out there: a hint at nat:, where anybody is on it."""
    with clinic.healthy():
        clinic.ip("address", "del", LAN_ADDRESS, "dev", "br0")
        assert clinic.find("bridge-alone") == []
        clinic.netns.tap("web0")
        assert clinic.hooks.up("web0").returncode == 0
        (found,) = clinic.find("bridge-alone")
        assert found["what"].startswith("br0 of network lan has guests, and neither an uplink nor")
        assert found["severity"] == "advice" and "give the network nat:" in found["do"]
        for way in (
            ("link", "add", "up0", "master", "br0", "type", "veth", "peer", "up1"),
            ("address", "add", LAN_ADDRESS, "dev", "br0"),
        ):
            clinic.ip(*way)
            assert clinic.find("bridge-alone") == []
            clinic.netns.run(["ip", "link", "del", "up0"], check=False)
        assert clinic.hooks.down("web0").returncode == 0


IN_UML = ("vlan-filtering", "uplink-vlan", "port-device")
"""What tests/uml/test_doctor.py has: this kernel may have no VLAN-aware bridge."""
IN_FORETOLD = ("nat-needs", "bridge-refuses")
"""What tests/ctl/test_foretold.py has."""
IN_SECURITY = ("qemu-otherwise",)
"""What tests/security/test_escaped_guest.py has: only a QEMU that is taken over has the fault."""


def test_a_socket_that_is_a_link_to_another_run_folder(clinic: Clinic, ovs: OpenVSwitch) -> None:
    """Its ovs-vswitchd calls the database by the path that the link leads to, and by no other."""
    clinic.ovs = ovs
    link = clinic.folder / "db.sock"
    link.symlink_to(ovs.db.removeprefix("unix:"))
    with clinic.healthy():
        clinic.policy(f"networks: {{sw: {{bridge: br-int, ovsdb: 'unix:{link}'}}}}\n{SW}")
        assert clinic.find("ovs-vswitchd") == []
        folder = clinic.folder / "run"
        folder.symlink_to(ovs.dir)
        clinic.policy(f"networks: {{sw: {{bridge: br-int, ovsdb: 'unix:{folder}/db.sock'}}}}\n{SW}")
        assert clinic.find("ovs-vswitchd") == []
        ovs.vswitchd.kill()
        assert "does not run" in clinic.find("ovs-vswitchd")[0]["what"]
        ovs.start_vswitchd()


def test_each_check_is_in_a_table() -> None:
    rows = {row.check for row in (*ROWS, *QEMU_ROWS, *(row[0] for row in NEXT_TIME), *OVS_ROWS)}
    # NOTE: tests/security/test_user.py has what users do to their taps.
    elsewhere = {
        *IN_UML,
        *IN_SECURITY,
        *IN_FORETOLD,
        # NOTE: tests/engine/test_macvtap.py has a parent.
        "parent",
        "tap-right",
        "net-admin",
        "qemu-helper",
        "bridge-alone",
    }
    assert rows | elsewhere == {check.name for check in CHECKS}
    for check in CHECKS:
        assert check.find.__doc__, f"{check.name}: what is it?"


# What it prints.


def test_what_a_person_reads(clinic: Clinic) -> None:
    clinic.through = ["ip", "netns", "exec", clinic.netns.name]
    program = str(clinic.hooks.folder / "pyqemu-ifctl")
    with clinic.healthy():
        call_iptables(clinic, "0")
        clinic.policy("networks: {lan: {bridge: nosuch}}\n" + ALL)
        done = clinic.run([program, "doctor"])
        assert (done.returncode, done.stderr) == (1, "")
        quiet = clinic.run([program, "doctor", "--quiet"])
        assert quiet.returncode == 1 and quiet.stdout.endswith("\n1 finding, 1 error\n")
        assert quiet.stdout.startswith("error: there is no bridge nosuch")
        only = clinic.run([program, "doctor", "bridge-stp", "bridge-missing"])
        assert (only.returncode, only.stdout) == (1, quiet.stdout)
        other = clinic.run([program, "doctor", "bridge-stp", "--json"])
        assert other.returncode == 0 and json.loads(other.stdout)["findings"] == []
        text = " ".join(done.stdout.split())
        assert "error: there is no bridge nosuch, which network lan is on (" in text
        lines = done.stdout.splitlines()
        assert all(len(line) <= 80 or line.startswith("  mend: ") for line in lines)
        (mend,) = [line for line in lines if line.startswith("  mend: ip link add")]
        assert mend.endswith(" up type bridge") and "02:" in mend
        clinic.policy(LAN + "rules: [{tap: '*', network: lan}, {tap: x, network: lan}]\n")
        done = clinic.run([program, "doctor"])
        # NOTE: a warning, and advice if this host's device is closed: no error.
        assert done.returncode == 0
        assert done.stdout.startswith("warning: the rule at")
        assert done.stdout.splitlines()[-1].endswith(", 0 errors")
        quiet = clinic.run([program, "doctor", "--quiet"])
        assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
        call_iptables(clinic, "1")


def test_a_check_that_there_is_none_of(clinic: Clinic) -> None:
    done = clinic.hooks.ctl("doctor", "bridge-makc")
    assert (done.returncode, done.stdout) == (64, "")
    told = "pyqemu-ifctl: doctor has no check bridge-makc; did you mean bridge-mac?\n"
    assert done.stderr == told
    assert "its checks are policy, unreach" in clinic.hooks.ctl("doctor", "%").stderr


def test_nothing_is_wrong(clinic: Clinic) -> None:
    holder = own_mounts(clinic, f"{PRIVATE_TUN}; mount -t sysfs sysfs /sys")
    try:
        with clinic.healthy():
            done = clinic.run([str(clinic.hooks.folder / "pyqemu-ifctl"), "doctor"])
            assert (done.returncode, done.stdout, done.stderr) == (0, "nothing is wrong\n", "")
            assert clinic.look() == {"version": 1, "ok": True, "findings": [], "unseen": []}
    finally:
        let_go(holder)


def test_without_privilege_it_says_what_it_could_not_see(clinic: Clinic) -> None:
    with public_folder() as folder, clinic.healthy():
        clinic.hooks = publish(clinic.hooks, folder)
        words = [*as_user(NOBODY), str(clinic.hooks.folder / "pyqemu-ifctl"), "doctor"]
        done = clinic.run(words)
        assert done.returncode == 0, done
        seen = [line.removeprefix("pyqemu-ifctl: ") for line in done.stderr.splitlines()]
        assert any(line.startswith("not seen: the nftables rules: ") for line in seen)
        assert any(line.startswith("not seen: the taps that ") for line in seen)
        assert "nothing is wrong\n" not in done.stdout


MACS: list[tuple[list[str], list[tuple[str, str | None]]]] = [
    (["-netdev", "tap,id=a", "-device", "e1000,netdev=a,mac=52:54:0:0:0:1"],
     [("52:54:00:00:00:01", "tap")]),
    (["-device", "e1000,netdev=a", "-netdev", "user,id=a"], [("52:54:00:12:34:56", "user")]),
    (["-device", "e1000,netdev=a", "-netdev", "tap,id=a", "-nic", "user"],
     [("52:54:00:12:34:56", "user"), ("52:54:00:12:34:57", "tap")]),
    (["-net", "nic,macaddr=52:54:00:00:00:02", "-net", "tap"], [("52:54:00:00:00:02", "tap")]),
    (["-net", "nic", "-net", "tap", "-net", "user"], [("52:54:00:12:34:56", None)]),
    (["-device", '{"driver": "e1000", "netdev": "a", "mac": "52:54:00:00:00:03"}',
      "-netdev", '{"type": "tap", "id": "a"}'], [("52:54:00:00:00:03", "tap")]),
    (["-device", "virtio-blk,drive=d"], []),
]  # fmt: skip


@pytest.mark.parametrize(("words", "found"), MACS, ids=[" ".join(row[0]) for row in MACS])
def test_macs_of_a_command_line(words: list[str], found: list[tuple[str, str | None]]) -> None:
    guest = guest_of(1, ["qemu", *words], {})
    assert [(nic.mac, nic.type) for nic in nics_of(guest, 8)] == found


def test_iptables_of_the_legacy_kind() -> None:
    drops = "-P FORWARD DROP\n-A FORWARD -i br0 -j ACCEPT\n-A FORWARD -o br1 -p tcp -j ACCEPT\n"
    (chain,) = read_forward("ip", drops)
    assert chain.legacy and chain.accepts == frozenset({("iifname", "br0")})
    assert read_forward("ip", "-P FORWARD ACCEPT\n") == []


# Which glob is within which.


GLOBS = st.text("ab*?[]!-", max_size=4).filter(lambda glob: glob_fault(glob) is None)
TEXTS = ["".join(letters) for size in range(7) for letters in itertools.product("ab-", repeat=size)]


@given(GLOBS, GLOBS)
@example("*", "")
@example("a*", "ab*")
@example("[a-c]?", "[!d]b")
@example("*a*", "*b*")
@settings(max_examples=150, deadline=None)
def test_covers(wide: str, narrow: str) -> None:
    """What it says is true of each text, and where it says no there is one that tells why."""
    others = [text for text in TEXTS if matches(narrow, text) and not matches(wide, text)]
    if covers(wide, narrow):
        assert not others
    elif not others:
        # NOTE: the text that tells may have another letter, or be longer than those here.
        letters = sorted({*wide, *narrow, "z", "\0"})
        sizes = range(len(narrow) + 2)
        texts = itertools.chain(*(itertools.product(letters, repeat=size) for size in sizes))
        assert any(
            matches(narrow, text) and not matches(wide, text) for text in map("".join, texts)
        )


@given(GLOBS)
@settings(max_examples=100, deadline=None)
def test_least_length(glob: str) -> None:
    least = least_length(glob)
    assert not any(matches(glob, text) for text in TEXTS if len(text) < least)


def test_covers_gives_up_in_time() -> None:
    start = time.monotonic()
    assert not covers("*a" + "?" * 40 + "a*", "*[ab]" * 20)
    assert time.monotonic() - start < 10
