"""From what is wanted and what is to the steps between: pure, as tuples of ops.

Each plan is made of what the tap itself is given, and what its kind of bridge gives it. One plan
serves up, dry-run, explain and undo.
"""

from __future__ import annotations

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import Port
from pyqemu_ifconf.shell import quote
from pyqemu_ifup import kinds, settings
from pyqemu_ifup.claims import is_our_master, is_ours_to_leave
from pyqemu_ifup.kinds.base import Difference, PortKind, all_steps, differing
from pyqemu_ifup.look import Seen
from pyqemu_ifup.mark import Here, Mark, format_alias
from pyqemu_ifup.ops import DelTap, Op, Plan, SetAlias, SetDown, SetUp


def plan_up(port: Port, kind: PortKind, seen: Seen, mark: Mark, here: Here) -> Plan:
    """Return the steps that attach the tap of `seen` as `port` wants it.

    Isolation comes before connectivity: it joins while it is down, and comes up last. Raises
    Failure: 69, 71 where the bridge cannot do what is wanted.
    """
    tap = seen.tap
    assert tap is not None  # refuse_strangers came before
    kind.claim(port, seen)
    set_mark = SetAlias(tap.name, tap.index, format_alias(mark))
    is_made = kinds.maker_of(tap) is not None
    # NOTE: what has just been made is nowhere yet, but a port that had its name may be left.
    leave = plan_rows(seen, here) if is_made else plan_leave(seen, here)
    # NOTE: wherever this ends, the tap carries a mark that tells where it is now: an older one of
    # ours stays until it has left that place.
    begin = (set_mark, *leave) if tap.mark is None else (*leave, set_mark)
    if is_made and tap.mark == mark:
        begin = leave
    join = (*settings.join(port, kind, seen), *kind.join(port, seen, mark, here))
    return (*begin, *join, SetUp(tap.name, tap.index))


def plan_change(port: Port, kind: PortKind, seen: Seen, mark: Mark, here: Here) -> Plan:
    """Return the steps that make a running guest's tap what `port` wants; none where it is so.

    A tap that is elsewhere is attached anew, as by plan_up. On its own bridge it changes where it
    is: its link goes down for another VLAN, so that no frame is in a wrong one, and for nothing
    else. Raises Failure (71) where the bridge cannot do what is wanted.
    """
    if not kind.is_in_place(port, seen, here):
        return plan_up(port, kind, seen, mark, here)
    tap = seen.tap
    assert tap is not None  # it is in place
    kind.claim(port, seen)
    marks = (SetAlias(tap.name, tap.index, format_alias(mark)),) if tap.mark != mark else ()
    steps, moves = kind.change(port, seen, mark, here)
    plan: Plan = (*marks, *settings.join(port, kind, seen, anew=False), *steps)
    if moves and tap.up:
        plan = (SetDown(tap.name, tap.index), *plan)
    if moves or not tap.up:
        plan = (*plan, SetUp(tap.name, tap.index))
    return plan


def plan_leave(seen: Seen, here: Here) -> Plan:
    """Return the steps that take down a tap and take it from where we had put it.

    A tap that somebody else has moved to another bridge since stays there, as it is.
    """
    tap, master = seen.tap, seen.master
    taken = master is not None and not is_ours_to_leave(seen, master)
    down: Plan = ()
    if tap is not None and tap.up and not taken:
        down = (SetDown(tap.name, tap.index),)
    # NOTE: what has rows of its own goes first: the tap's master may be of its making.
    order = reversed(kinds.tap_kinds())
    return all_steps(down, *(kind.leave(seen, here, taken=taken) for kind in order))


def plan_given_back(now: Seen) -> Plan:
    """Return the steps that give a tap of ours, which has left its bridge, back as it was.

    Its mark goes, and its link comes up last: one with our mark that is up has lost its bridge.
    """
    tap, master = now.tap, now.master
    assert tap is not None
    set_mark = SetAlias(tap.name, tap.index, "")
    was = tap.mark.was if tap.mark is not None else None
    taken = master is not None and not is_our_master(now, master)
    up = [SetUp(tap.name, tap.index)] if was is not None and was.up and not taken else []
    return (*settings.give_back(now), set_mark, *up)


def plan_leaving(seen: Seen, here: Here) -> Plan:
    """Return the steps that take away what of a tap carries our mark, and touch nothing else.

    Where it is still attached it is taken from there and is what it was before.
    """
    tap, master = seen.tap, seen.master
    if tap is None or tap.mark is None:
        return plan_rows(seen, here)
    if kinds.maker_of(tap) is not None:
        return plan_unmade(seen)
    has_rows = any(kind.has_rows(seen, here) for kind in kinds.tap_kinds())
    if not has_rows and (master is None or not is_our_master(seen, master)):
        return (SetAlias(tap.name, tap.index, ""),)
    return (*plan_leave(seen, here), *plan_given_back(seen))


def plan_unmade(seen: Seen) -> Plan:
    """Return the steps that take away a link that its kind has made, and what was made for it."""
    tap, kind = seen.tap, kinds.maker_of(seen.tap)
    assert tap is not None and kind is not None
    return (*([SetDown(tap.name, tap.index)] if tap.up else ()), *kind.unmake(seen))


def plan_rows(seen: Seen, here: Here) -> Plan:
    """Return the steps that remove what is ours of a port whose tap is not, or is not there."""
    return all_steps(*(kind.leave(seen, here, taken=True) for kind in kinds.tap_kinds()))


def plan_down(seen: Seen, here: Here, *, by_user: bool = False) -> Plan:
    """Return the steps that take away what of the tap carries our mark, the mark itself last.

    A persistent tap is given back as its mark says that it was, its link too.
    With it goes a tap that we have made for a user, to whom it would belong without it. A mark of
    root's stays where a user asks (`by_user`): a guest that has taken its QEMU over would be free
    of it. With the tap's last process it goes.
    """
    tap = seen.tap
    if tap is None or tap.mark is None:
        return plan_rows(seen, here)
    if kinds.maker_of(tap) is not None:
        return plan_unmade(seen)
    steps = plan_leave(seen, here)
    if tap.mark.made and tap.mark.uid is not None:
        return (*steps, DelTap(tap.name, tap.index))
    if by_user and tap.mark.uid is None:
        return (*steps, *settings.give_back(seen))
    return (*steps, *plan_given_back(seen))


def plan_undo(before: Seen, now: Seen, here: Here, *, again: bool = False) -> Plan:
    """Return the steps from `now` back to a tap that is down, attached nowhere, and as it was.

    One that had a mark of ours is what it was before that, but where it is to be attached `again`:
    its guest runs. One of our making keeps the mark, which tells whose it is.
    """
    tap, old = now.tap, before.tap
    assert old is not None
    if tap is None or tap.index != old.index:
        return all_steps(*(kind.leftovers(before, now, here) for kind in kinds.tap_kinds()))
    if kinds.maker_of(tap) is not None:
        return plan_unmade(now)
    was = before if again else settings.as_it_was(before)
    plan: Plan = (*plan_leave(now, here), *settings.restore(was, now))
    alias = old.alias if old.mark is not None and old.mark.made else ""
    if tap.alias != alias:
        plan = (*plan, SetAlias(tap.name, tap.index, alias))
    return plan


def plan_back(port: Port, before: Seen, now: Seen, here: Here) -> Plan:
    """Return the steps from `now` back to a tap that is attached as it was `before`.

    `port` is what a change wanted that has failed half-way.
    """
    tap, old = now.tap, before.tap
    assert old is not None
    if tap is None or tap.index != old.index:
        return plan_undo(before, now, here)
    name, index = tap.name, tap.index
    each = kinds.tap_kinds()
    moved = any(kind.moved(before, now, here) for kind in each)
    plan: list[Op] = []
    if moved:
        plan += plan_leave(now, here)
    elif tap.up and any(kind.changed_vlan(before, now, here) for kind in each):
        plan.append(SetDown(name, index))
    # NOTE: a tap that had no mark keeps ours until it is where it was.
    if old.alias and tap.alias != old.alias:
        plan.append(SetAlias(name, index, old.alias))
    plan += settings.restore(before, now)
    plan += all_steps(*(kind.restore(port, before, now, here, moved=moved) for kind in each))
    if (maker := kinds.maker_of(old)) is not None:
        plan += maker.restore(before, now)
    if not old.alias and tap.alias:
        plan.append(SetAlias(name, index, ""))
    is_up = tap.up and SetDown(name, index) not in plan
    if old.up and not is_up:
        plan.append(SetUp(name, index))
    elif is_up and not old.up:
        plan.append(SetDown(name, index))
    return tuple(plan)


def differences(port: Port, kind: PortKind, seen: Seen, *, up: bool) -> tuple[Difference, ...]:
    """Return what of the tap is not as `port` wants it; `up`: its link's state counts too.

    What differs because the policy cannot be had on this bridge is a difference as well.
    """
    tap = seen.tap
    if tap is None:
        return (Difference("tap", "there", "gone"),)
    found = (*kind.differences(port, seen, up=up), *settings.differences(port, kind, seen))
    return (*found, *differing("link", "up", "up" if tap.up else "down")) if up else found


def check_bridge_mtu(port: Port, kind: PortKind, before: Seen, now: Seen) -> None:
    """Raise Failure (71) where the tap has lowered the bridge's own MTU."""
    if before.bridge is None or now.bridge is None or now.bridge.mtu >= before.bridge.mtu:
        return
    was, is_now = before.bridge.mtu, now.bridge.mtu
    raise Failure(
        Status.REFUSED,
        f"the tap's MTU would lower that of {quote(port.place.name)} from {was} to {is_now}",
        "its other ports would lose longer frames",
        f"pin it: {kind.pinning(port, was)}",
    )
