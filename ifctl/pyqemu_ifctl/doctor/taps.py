"""Doctor's checks of taps: that a QEMU can open one, and how those of ours are."""

from __future__ import annotations

from collections.abc import Iterator

from pyqemu_ifconf.shell import all_of, ifctl, quote, sh
from pyqemu_ifctl.doctor.hubs import joined_taps
from pyqemu_ifctl.doctor.scene import Scene
from pyqemu_ifup.drivers.sysctl import is_writable
from pyqemu_ifup.drivers.tun import TUN
from pyqemu_ifup.kinds.check import Finding, finding_of
from pyqemu_ifup.ops import SetIpv6
from pyqemu_ifup.settings import ADDRESS_MAY_COME, OF_CONTAINER, UNWRITABLE, gets_address


def find_no_right(scene: Scene) -> Iterator[Finding]:
    """A root that may change no link, as in a container without CAP_NET_ADMIN."""
    if scene.right is not None:
        yield finding_of(scene.right, "each start of a QEMU with a tap fails (status 77)")


def find_no_tun(scene: Scene) -> Iterator[Finding]:
    """A /dev/net/tun that is not there, or cannot be opened."""
    if scene.tun is not None:
        yield finding_of(scene.tun, "no QEMU can open a tap")


def find_closed_tun(scene: Scene) -> Iterator[Finding]:
    """A /dev/net/tun that only some may open."""
    if scene.tun_mode is not None and scene.tun_mode & 0o006 != 0o006:
        yield Finding(
            f"{TUN} may not be opened by everybody (mode {scene.tun_mode:04o})",
            "a QEMU of another user's cannot open a tap that was made for that user; opening it "
            "gives nobody any right",
            sh("chmod", "0666", TUN),
        )


def find_taps_off(scene: Scene) -> Iterator[Finding]:
    """A tap of a running guest's, of the policy's, that is down or was taken from its bridge."""
    # NOTE: one of two that a hub joins is down for good reason.
    joined = joined_taps(scene)
    for link in scene.off:
        if link.mark is not None and link.name not in joined:
            state = "down" if not link.up else f"not on {quote(link.mark.bridge)}"
            yield Finding(
                f"the tap {quote(link.name)} is {state}, and the policy has it attached",
                "its guest has no network; one that is down is not brought back by itself",
                ifctl("apply", link.name),
            )


def find_addressed_taps(scene: Scene) -> Iterator[Finding]:
    """A tap of ours whose host's end may get an IPv6 address, as its guest advertises one."""
    for link in scene.links:
        if link.mark is not None and link.up and gets_address(link):
            what = f"the tap {quote(link.name)}: {ADDRESS_MAY_COME}"
            keeping = SetIpv6(link.name, link.index, disabled=True, addrgenmode=None)
            if is_writable("ipv6/conf/default/disable_ipv6"):
                why = "its disable_ipv6 is 0: somebody else has set that, or up could not"
                yield Finding(what, why, all_of(*keeping.commands()))
            else:
                yield Finding(what, UNWRITABLE, None, OF_CONTAINER)


def find_lost_rights(scene: Scene) -> Iterator[Finding]:
    """A tap of ours that is nobody's by now, that was given away, or that the policy denies."""
    for lost in scene.lost:
        place = lost.link.mark.bridge if lost.link.mark is not None else ""
        if lost.link.up:
            yield Finding(
                f"the tap {quote(lost.link.name)} has no right to {quote(place)} any more: "
                f"{lost.why}",
                "whoever holds it reaches all that its network reaches",
                lost.command,
            )
