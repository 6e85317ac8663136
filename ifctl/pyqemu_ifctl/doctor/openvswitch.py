"""Doctor's checks of Open vSwitch itself: its daemons, and the ports that are wrong in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Policy, is_left
from pyqemu_ifconf.shell import Command, ifctl, quote, readable, sh, vsctl
from pyqemu_ifctl.doctor.daemons import Daemon
from pyqemu_ifctl.doctor.finding import each_bridge
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifctl.doctor.wanted import wanted_kind
from pyqemu_ifup import kinds
from pyqemu_ifup.kinds.check import Finding
from pyqemu_ifup.look import OvsPort, OvsSwitch

OLDEST_OVS = (2, 10)
"""The first Open vSwitch that deletes ports marked as transient at its start."""


def find_ovs_down(scene: Scene) -> Iterator[Finding]:
    """A database of Open vSwitch that the policy needs, and that is mute or not there."""
    needed = (
        {}
        if isinstance(scene.policy, Failure)
        else {
            each.ovsdb: each
            for each in scene.policy.networks.values()
            if wanted_kind(each) != "linux"
        }
    )
    for failure in scene.failed.values():
        if failure.status != Status.DENIED:
            # NOTE: an up looks a tap's name up in each that is there, whatever its network.
            yield Finding(
                str(failure).partition(";")[0],
                "no tap is attached to it, and on a host with it none to a Linux bridge either",
                start_ovs(scene.ovs_service),
            )
    for address in sorted(scene.absent):
        yield Finding(
            f"Open vSwitch does not run: there is no {quote(address)}",
            f"each start of a QEMU with a tap on network {quote(needed[address].name)} fails "
            "(status 69)",
            start_ovs(scene.ovs_service),
        )


def find_vswitchd_down(scene: Scene) -> Iterator[Finding]:
    """An ovs-vswitchd that does not run, is stopped, or does not do what is configured."""
    for switch in scene.switches.values():
        daemon = scene.daemons.get(switch.ovsdb, ("running", 0))
        fault = vswitchd_fault(switch, daemon, scene.ovs_service)
        if fault is not None:
            yield fault


def vswitchd_fault(
    switch: OvsSwitch, daemon: tuple[Daemon, int], service: str | None
) -> Finding | None:
    """Return why an ovs-vswitchd would not see to a new port; `service` is its unit, if any."""
    why = "a tap that is to be attached waits until the deadline (status 75)"
    where = f"({quote(switch.ovsdb)})"
    state, pid = daemon
    if state == "gone":
        return Finding(f"ovs-vswitchd does not run {where}", why, start_ovs(service))
    if state == "stopped":
        mend = sh("kill", "-CONT", str(pid))
        return Finding(f"ovs-vswitchd is stopped, process {pid} {where}", why, mend)
    if switch.behind:
        return Finding(
            f"ovs-vswitchd has not taken in what is configured {where}",
            why,
            start_ovs(service, "restart"),
        )
    return None


OVS_CTL = "/usr/share/openvswitch/scripts/ovs-ctl"


def start_ovs(service: str | None, verb: Literal["start", "restart"] = "start") -> Command:
    """Return the command that starts Open vSwitch on this host: its service, or its own script."""
    if service is None:
        return sh(OVS_CTL, "--system-id=random", verb)
    return sh("systemctl", verb, service)


def find_old_ovs(scene: Scene) -> Iterator[Finding]:
    """An Open vSwitch that is older than what we need of it."""
    for address, switch in scene.switches.items():
        version = _version(switch)
        if version is not None and version < OLDEST_OVS:
            yield Finding(
                f"Open vSwitch is {readable(switch.version or '')} ({quote(address)})",
                "before 2.10 it keeps the ports of guests over a reboot of the host",
                scene.install_ovs,
            )


def _version(switch: OvsSwitch) -> tuple[int, ...] | None:
    found = re.match(r"([0-9]{1,6})\.([0-9]{1,6})", switch.version or "")
    return None if found is None else (int(found[1]), int(found[2]))


def find_ovs_errors(scene: Scene) -> Iterator[Finding]:
    """A port that ovs-vswitchd cannot use."""
    stale = {port.name for port in _stale(scene)}
    for port in scene.ports:
        if port.error is not None and port.name not in stale and _concerns(scene, port):
            yield Finding(
                f"Open vSwitch cannot use the port {quote(port.name)} of "
                f"{readable(port.bridge or '')}: "
                f"{readable(port.error)}",
                "it passes no frames",
                vsctl(port.ovsdb, ("del-port", *([port.bridge] if port.bridge else []), port.name)),
            )


def find_stale_ports(scene: Scene) -> Iterator[Finding]:
    """A port of ours whose tap is gone."""
    for port in _stale(scene):
        yield Finding(
            f"the port {quote(port.name)} of {readable(port.bridge or '')} is left of a guest "
            "that is gone",
            "a tap that gets this name is given the VLAN of the old one",
            ifctl("gc", port.name),
        )


def _stale(scene: Scene) -> list[OvsPort]:
    found = kinds.judge(scene.ports, scene.links, scene.here)
    return [each.port for each in found if each.remove is not None]


def _concerns(scene: Scene, port: OvsPort) -> bool:
    """Tell whether a port is ours, or on a bridge that the policy names."""
    bridges = {(each.bridge, each.ovsdb) for each in each_bridge(scene)}
    return port.ours or (port.bridge, port.ovsdb) in bridges


def find_trunks(scene: Scene) -> Iterator[Finding]:
    """A tap whose port carries every VLAN."""
    for port in scene.ports:
        link = scene.link(port.name)
        is_guest_s = link is not None and link.tap and not port.internal
        if isinstance(scene.policy, Policy) and not port.ours and is_left(scene.policy, port.name):
            continue
        is_open = port.vlan_mode in (None, "trunk") and port.tag is None and not port.trunks
        if is_guest_s and is_open and _concerns(scene, port):
            yield Finding(
                f"the tap {quote(port.name)} carries every VLAN of {readable(port.bridge or '')}",
                "its guest chooses the VLAN that it sends to: this is Open vSwitch's default",
                vsctl(port.ovsdb, ("set", "Port", port.name, "vlan_mode=access")),
            )
