"""What a test needs of the machine: told by name, skipped with the reason where it is missing."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable
from typing import NoReturn

import pytest

QEMU = "qemu-system-x86_64"

# linux/capability.h
CAPABILITIES = (("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21))

# linux/netlink.h, linux/genetlink.h
NETLINK_GENERIC = 16
NLM_F_REQUEST = 1
GENL_ID_CTRL = 16
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_NAME = 2
NLMSG_ERROR = 2


def root() -> str | None:
    """Return why the test cannot act as root; None where it can."""
    if os.geteuid() != 0:
        return "not root"
    with open("/proc/self/status") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    absent = [name for name, bit in CAPABILITIES if not effective >> bit & 1]
    return f"root without {' and '.join(absent)}" if absent else None


def tun() -> str | None:
    """Return why taps cannot be made; None where they can."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}"
    return None


def qemu() -> str | None:
    """Return why QEMU cannot be run; None where it can."""
    return _program(QEMU)


def ip() -> str | None:
    """Return why iproute2 cannot be run; None where it can."""
    return _program("ip") or _program("bridge")


def nft() -> str | None:
    """Return why nftables cannot be looked at; None where they can."""
    return _program("nft")


def dnsmasq() -> str | None:
    """Return why dnsmasq cannot be run; None where it can."""
    return _program("dnsmasq")


def graphviz() -> str | None:
    """Return why graphviz cannot be run; None where it can."""
    return _program("dot")


def ovs() -> str | None:
    """Return why an Open vSwitch of our own cannot be run; None where it can."""
    names = ("ovsdb-tool", "ovsdb-server", "ovs-vswitchd", "ovs-vsctl")
    return next(filter(None, map(_program, names)), None)


def ovs_kernel() -> str | None:
    """Return why Open vSwitch's kernel datapath cannot be used; None where it can.

    Asks generic netlink for its family, which loads the kernel's module where there is one.
    """
    name = b"ovs_datapath\0"
    attribute = struct.pack("=HH", 4 + len(name), CTRL_ATTR_FAMILY_NAME) + name
    body = struct.pack("=BBH", CTRL_CMD_GETFAMILY, 1, 0) + attribute.ljust(20, b"\0")
    header = struct.pack("=IHHII", 16 + len(body), GENL_ID_CTRL, NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as netlink:
        netlink.settimeout(10)
        netlink.send(header + body)
        answer = netlink.recv(65536)
    if struct.unpack_from("=H", answer, 4) != (NLMSG_ERROR,):
        return None
    (code,) = struct.unpack_from("=i", answer, 16)
    if -code != errno.ENOENT:
        raise OSError(-code, os.strerror(-code), "ovs_datapath")
    return "the kernel has no Open vSwitch datapath"


@functools.cache
def macvtap() -> str | None:
    """Return why macvtaps cannot be made; None where they can."""
    return _in_namespace(
        "ip link add v0 type veth peer name v1 && ip link add link v0 name m0 type macvtap"
    )


@functools.cache
def netdev_chains() -> str | None:
    """Return why nftables cannot filter at a link, both ways; None where they can."""
    return _in_namespace(
        "nft 'table netdev t { chain in { type filter hook ingress device lo priority 0; }; "
        "chain out { type filter hook egress device lo priority 0; }; }'"
    )


def _in_namespace(command: str) -> str | None:
    """Return why a shell's command fails in a new network namespace, None if it does not."""
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", command], capture_output=True, text=True, check=False
    )
    return (done.stderr.splitlines() or ["it fails"])[0] if done.returncode else None


PARTS: dict[str, Callable[[], str | None]] = {
    "root": root,
    "tun": tun,
    "qemu": qemu,
    "ip": ip,
    "nft": nft,
    "dnsmasq": dnsmasq,
    "graphviz": graphviz,
    "ovs": ovs,
    "ovs-kernel": ovs_kernel,
    "macvtap": macvtap,
    "netdev-chains": netdev_chains,
}
"""What can be required, by name."""


def missing(*parts: str) -> str | None:
    """Return why the first of the `parts` that is missing is; None where all are there."""
    return next(filter(None, (PARTS[part]() for part in parts)), None)


def require(*parts: str) -> None:
    """Skip the calling test with the reason where one of the `parts` is missing.

    With CI=true in the environment it fails instead: there, all must be there.
    """
    reason = missing(*parts)
    if reason is not None:
        lack(reason)


def lack(reason: str) -> NoReturn:
    """Skip the calling test since something is missing; with CI=true fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"needed where CI=true: {reason}", pytrace=False)
    pytest.skip(reason)


def _program(name: str) -> str | None:
    """Return why the program `name` cannot be run; None where it can."""
    return None if shutil.which(name) else f"no {name} in PATH"
