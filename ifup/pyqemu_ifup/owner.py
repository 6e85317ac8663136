"""Makes a tap root's: the kernel lets anybody open one that has neither owner nor group.

That is so of a multi-queue one, and of a persistent one while nobody has it (tun_not_capable and
tun_attach of drivers/net/tun.c). Whoever has a queue is on the tap's network, and can set its
owner.
"""

from __future__ import annotations

import errno
import os

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.drivers.tun import (
    IFF_MULTI_QUEUE,
    IFF_NO_PI,
    IFF_TAP,
    attach_queue,
    making_anew,
    set_owner,
)
from pyqemu_ifup.hook import read_tap_name
from pyqemu_ifup.look import Link
from pyqemu_ifup.system.holders import OTHERS, Held, find_held_by, find_holders, take_descriptor
from pyqemu_ifup.system.process import real_uid


async def give_to_root(
    kernel: Netlink, link: Link, parent: int, handed: int, descriptor: int | None
) -> None:
    """Give a tap without an owner to this process's user, and see that nobody else has it already.

    Of its queues, that many were handed over to us, with a `descriptor` that is of one; the others
    may be those of the process `parent`, or of another of the same user's. Raises Failure: 71 where
    it has gone, 77.
    """
    if link.owner is None:
        if descriptor is not None:
            set_owner(descriptor, os.getuid())
        else:
            await _give(link, parent)
        # NOTE: only now, when no more can come.
        now = kernel.look_at(link.index)
        if now is None or now.owner is None:
            raise Failure(
                Status.REFUSED,
                "the tap has gone meanwhile",
                "its QEMU has ended or closed it",
                "see whether the calling process still runs",
            )
        link = now
    queues = link.queues if link.multi_queue else int(link.carrier)
    if queues > handed and queues > len(await _find_ours(link.name, parent, queues)):
        raise _in_other_hands()


def _in_other_hands() -> Failure:
    return Failure(
        Status.DENIED,
        "in other hands",
        "a process that is neither the caller nor another of the same user's has it open",
        "end that process, and let QEMU call this program itself",
    )


async def _give(link: Link, parent: int) -> None:
    """Set the owner by a queue of our own, or by the only one there can be, its holder's."""
    descriptor = -1
    try:
        try:
            flags = IFF_TAP | IFF_NO_PI | (IFF_MULTI_QUEUE if link.multi_queue else 0)
            descriptor, _ = attach_queue(link.name, flags)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            ours = await _find_ours(link.name, parent, 1)
            if not ours:
                raise _in_other_hands() from error
            descriptor = take_descriptor(ours[0])
            if read_tap_name(descriptor) != link.name:
                raise _in_other_hands() from error
        set_owner(descriptor, os.getuid())
    except OSError as error:
        raise Failure(
            Status.DENIED,
            "it has no owner, and cannot be given one",
            os.strerror(error.errno or 0),
            f"make it anew with one: {making_anew(link.name, 'root', queues=link.multi_queue)}",
        ) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


async def _find_ours(tap: str, parent: int, queues: int) -> list[Held]:
    """Return the tap's descriptors of the process of ours that has the most, `parent` first.

    All queues are one process's, and what others have may be copies of them.
    """
    uid = os.getuid()
    if real_uid(parent) == uid:
        held = await find_held_by(parent)
        found = [each for each in held if each.tap == tap]
        if len(found) >= queues:
            return found
    holders = await find_holders(OTHERS)
    each: dict[int, list[Held]] = {pid: [] for pid in holders.of(tap) if real_uid(pid) == uid}
    for one in holders.held:
        if one.tap == tap and one.pid in each:
            each[one.pid].append(one)
    return max(each.values(), key=len, default=[])
