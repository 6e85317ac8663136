"""Who has a claim to a tap: what is refused because it is another's, and what is ours."""

from __future__ import annotations

from pyqemu_ifconf.failure import Failure, OfCaller, Status
from pyqemu_ifconf.shell import quote, readable, sh
from pyqemu_ifup import kinds
from pyqemu_ifup.look import Link, Seen
from pyqemu_ifup.mark import Here, Mark, is_anothers
from pyqemu_ifup.ops import set_link


def refuse_strangers(tap: str, seen: Seen, parent: int) -> Link:
    """Return the tap's link where nobody else has a claim to it.

    Raises Failure: 71 where there is no such link, 77 where it is no tap, or somebody else's: its
    master, its alias, or a living QEMU other than `parent` that it was attached for. One that is
    on the wanted Linux bridge already is taken over.
    """
    link = seen.tap
    if link is None:
        raise no_such_tap()
    if not kinds.is_ports(link):
        what = f"a {link.kind} interface" if link.kind else "a network card"
        raise Failure(Status.DENIED, f"not a tap but {what}", "", "give the name of a tap")
    mark = link.mark
    if link.alias and mark is None:
        raise Failure(
            Status.DENIED,
            "somebody else's tap",
            f"its alias is {readable(link.alias)}",
            f"if it is not, remove it: {sh('ip', 'link', 'set', 'dev', tap, 'alias', '')}",
        )
    if mark is not None:
        refuse_anothers(mark, parent)
    if seen.master is not None and not is_ours_to_leave(seen, seen.master):
        told = [kind.releasing(seen, seen.master) for kind in kinds.tap_kinds()]
        other = quote(seen.master.name), set_link(tap, "nomaster")
        holder, remedy = next(filter(None, told), other)
        raise Failure(
            Status.DENIED,
            "somebody else's tap",
            f"{holder} holds it",
            f"if it shall go, take it out: {remedy}",
        )
    return link


def no_such_tap() -> Failure:
    """Return what is said (71) of a name that no link has."""
    return OfCaller(
        Status.REFUSED,
        "there is no such tap in this network namespace",
        "",
        "the caller must open it first, as QEMU does",
    )


def refuse_anothers(mark: Mark, parent: int) -> None:
    """Raise Failure (77) where the tap serves a living process that is not `parent`."""
    if is_anothers(mark, parent):
        raise Failure(
            Status.DENIED,
            "in use",
            f"attached to {readable(mark.bridge)} for process {mark.pid}"
            + (f", vm {readable(mark.guest)}" if mark.guest else ""),
            "end that process first",
        )


def is_open_to_all(link: Link) -> bool:
    """Tell whether anybody may open the tap, now or when its QEMU has let it go."""
    return link.owner is None and link.group is None and (link.multi_queue or link.persistent)


def refuse_shared(link: Link, uid: int) -> None:
    """Check that nobody but root and the user `uid` may open the tap while that one has it.

    Each queue of a tap gets frames of its guest (tun_flow_update and tun_select_queue of
    drivers/net/tun.c), and may send in its name. Raises Failure (77).
    """
    if not link.multi_queue or (link.owner in (None, 0, uid) and link.group is None):
        return
    who = f"group {link.group}" if link.owner in (None, 0, uid) else f"user {link.owner}"
    raise Failure(
        Status.DENIED,
        "shared with others",
        f"{who} may open a queue of this multi-queue tap too",
        "make it anew without an owner: "
        + sh("ip", "tuntap", "del", "dev", link.name, "mode", "tap", "multi_queue"),
    )


def is_ours_to_touch(tap: str, seen: Seen, parent: int) -> bool:
    """Tell whether the tap is there and nobody else has a claim to it."""
    try:
        refuse_strangers(tap, seen, parent)
    except Failure:
        return False
    return True


def is_our_master(seen: Seen, master: Link) -> bool:
    """Tell whether the tap's master is where its mark says that we put it."""
    return any(kind.holds(seen, master) for kind in kinds.tap_kinds())


def is_taken_over(seen: Seen) -> bool:
    """Tell whether the tap is on the wanted bridge without a mark: a script has put it there.

    What is wanted is what that did, or more. A row of a database is another matter: it outlives the
    tap, and may be whoever's.
    """
    tap, master, bridge = seen.tap, seen.master, seen.bridge
    return (
        tap is not None
        and not tap.alias
        and master is not None
        and bridge is not None
        and any(kind.takes_over and master.kind == kind.master_kind for kind in kinds.tap_kinds())
        and master.index == bridge.index
    )


def is_ours_to_leave(seen: Seen, master: Link) -> bool:
    """Tell whether we may take the tap from its master: we, or a script, had put it there."""
    return is_our_master(seen, master) or is_taken_over(seen)


def refuse_foreign_ports(seen: Seen, here: Here) -> None:
    """Raise Failure (77) where a port of the tap's name is not ours to replace."""
    for kind in kinds.tap_kinds():
        kind.refuse_foreign(seen, here)
