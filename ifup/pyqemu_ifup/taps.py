"""Makes taps for those who may make none: new ones only, which go with their descriptors."""

from __future__ import annotations

import errno
import os
import secrets

from pyqemu_ifconf.failure import Failure, OfCaller, Status
from pyqemu_ifconf.shell import readable, sh
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.drivers.tun import (
    IFF_MULTI_QUEUE,
    IFF_NO_PI,
    IFF_TAP,
    IFF_TUN_EXCL,
    IFF_VNET_HDR,
    TUN,
    attach_queue,
    no_tun,
    rename_tap,
    set_owner,
)

ATTEMPTS = 8
"""How often somebody else may have been as fast as we, before we give up."""


def open_taps(
    kernel: Netlink, name_pattern: str, queues: int, vnet_hdr: bool
) -> tuple[str, list[int]]:
    """Make a tap in this network namespace; return its name and a descriptor for each queue.

    A `%d` in the name is the first free number. It is root's, so that nobody else opens it again,
    and gone with the last descriptor. Raises Failure: 75 where somebody else has opened it each
    time, 77 where there is such a link already, or the kernel forbids it, else 71.
    """
    flags = IFF_TAP | IFF_NO_PI
    flags |= IFF_VNET_HDR if vnet_hdr else 0
    name = name_pattern
    descriptors: list[int] = []
    try:
        if queues == 1:
            descriptor, name = attach_queue(name, flags | IFF_TUN_EXCL)
            descriptors.append(descriptor)
            set_owner(descriptor, 0)
        else:
            flags |= IFF_MULTI_QUEUE
            descriptor = _open_alone(kernel, flags)
            descriptors.append(descriptor)
            name = rename_tap(descriptor, name)
            for _ in range(queues - 1):
                descriptors.append(attach_queue(name, flags)[0])
    except OSError as error:
        close_all(descriptors)
        raise _failure(name, error) from error
    return name, descriptors


def _open_alone(kernel: Netlink, flags: int) -> int:
    """Make a multi-queue tap that nobody else has, under a name that nobody knows beforehand.

    Until it has its owner, anybody may open another queue of it (tun_not_capable), and keep it
    from going (TUNSETPERSIST). Raises OSError, Failure (75).
    """
    for _ in range(ATTEMPTS):
        descriptor, name = attach_queue(f"new-{secrets.token_hex(5)}", flags | IFF_TUN_EXCL)
        link = None
        try:
            set_owner(descriptor, 0)
            link = kernel.look_up(name)
            if link is not None and (link.queues, link.owner, link.persistent) == (1, 0, False):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if link is not None:
            kernel.delete_link(link.index)
    raise Failure(
        Status.TRY_AGAIN,
        "in other hands",
        "somebody else has opened each new tap too",
        "see whose processes open /dev/net/tun, or let only some users open it (its mode)",
    )


def close_all(descriptors: list[int]) -> None:
    """Close the descriptors, each of them once."""
    while descriptors:
        os.close(descriptors.pop())


def taken(name: str) -> Failure:
    """Return what is said (77) of the name of another link."""
    return Failure(
        Status.DENIED,
        f"cannot make the tap {readable(name)}",
        "an interface of this name is there already",
        "take another name, or see who has it: " + sh("ip", "-d", "link", "show", "dev", name),
    )


def _failure(name: str, error: OSError) -> Failure:
    what, why = f"cannot make the tap {readable(name)}", os.strerror(error.errno or 0)
    if error.filename == TUN:
        found = no_tun(error)
        return Failure(found.status, what, f"{found.what}: {found.why}", found.remedy)
    if error.errno in (errno.EBUSY, errno.EEXIST):
        return taken(name)
    if error.errno == errno.ENFILE:
        return OfCaller(
            Status.REFUSED,
            what,
            f"no number for it is free, or too many files are open ({why})",
            "end a QEMU that has one",
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return Failure(
            Status.DENIED,
            what,
            f"the kernel refuses it ({why})",
            "run the agent as root, with CAP_NET_ADMIN",
        )
    if error.errno == errno.EINVAL:
        return OfCaller(
            Status.REFUSED, what, f"the kernel takes no such name ({why})", "take another name"
        )
    return Failure(Status.REFUSED, what, f"the kernel refuses it ({why})", "see dmesg(1)")
