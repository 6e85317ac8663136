"""One tap on a real host, and what its QEMU and the administrator do with it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any

import pytest

from kinds.table import HERE, INDEX, TAP, Row, Tell, World
from lab.plug import reapply
from lab.snapshot import SETTLE, Snapshot, diff, leftovers
from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Policy
from pyqemu_ifctl.in_force import Outcome
from pyqemu_ifup.drivers.rtnetlink import Netlink
from pyqemu_ifup.host import Host
from pyqemu_ifup.mark import KEY_IFINDEX
from pyqemu_ifup.ops import Op

OnOp = Callable[[int, Host], None]
"""What is called with the number of an op, from 1, and the host that it is run on."""
BROKEN = "broken by the test"
TOUCHED = ("master", "mtu", "txqueuelen", "mac", "addrgenmode", "ipv6_disabled")
"""What of a link an up changes, beside its state and its mark, by the names of Link."""
UNSTABLE = {"_uuid", "ports", "interfaces"}
"""The columns of a database that are others each time a row is made."""


def nothing(number: int, host: Host) -> None:
    """Do nothing."""


@contextmanager
def stepping(before: OnOp = nothing, after: OnOp = nothing) -> Iterator[list[Op]]:
    """Call `before` and `after` each op that the block runs; what they raise, the op raises.

    Gives the ops that were run.
    """
    real = Host.run
    done: list[Op] = []

    async def run(self: Host, op: Op) -> None:
        number = len(done) + 1
        before(number, self)
        await real(self, op)
        done.append(op)
        after(number, self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Host, "run", run)
        yield done


def mute(line: str) -> None:
    """Tell nobody."""


def breaking(last: int) -> OnOp:
    """Return what has the op of this number fail."""

    def after(number: int, host: Host) -> None:
        if number == last:
            raise Failure(Status.TRY_AGAIN, BROKEN)

    return after


class Scene:
    """A tap that a policy wants at a place of a row, with some of that row's settings."""

    def __init__(self, world: World, row: Row, settings: int = 0) -> None:
        self.world = world
        self.row = row
        self.settings = settings
        self.which = "home"
        """The place where the policy wants it."""
        self.unmarked: list[str] = []
        """What was to be seen of the tap while it had no mark, and should have had one."""
        row.open(world)
        self.pristine = self.snapshot()
        with world.netns.enter(), closing(Netlink()) as kernel:
            self.was = kernel.look_up(TAP)

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take away the tap, and all that is left of it."""
        self.row.close(self.world)
        self.world.ovs.del_port(TAP)

    def again(self) -> None:
        """Make the tap anew, as it was in the beginning."""
        self.close()
        self.row.open(self.world)
        assert self.left() == []

    # What is wanted

    def policy(
        self,
        row: Row | None = None,
        which: str | None = None,
        settings: int | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Policy:
        """Return a policy by which the tap is at this place of a row; else it is as wanted.

        Its settings are those that are given, or those of the row with this number.
        """
        row = row or self.row
        if given is None:
            given = row.settings[self.settings if settings is None else settings]
        which = which or self.which
        # NOTE: each policy knows of every place, so that the tap is looked up in every database.
        networks = {
            place: each.network(self.world, place)
            for each in HERE
            for place in (each.place("home"), each.place("other"))
        }
        networks["lan"] = {**row.network(self.world, row.place(which)), **given}
        text = json.dumps({"version": 1, "timeout": 60, "networks": networks, **row.rules("lan")})
        return parse_policy([Source("policy.yaml", text.encode())])

    # What is done

    def up(
        self,
        policy: Policy | None = None,
        *,
        row: Row | None = None,
        pid: int | None = None,
        tell: Tell = mute,
    ) -> None:
        """Attach the tap as the policy says, which is for a place of this row. Raises Failure."""
        pid = os.getpid() if pid is None else pid
        with self.world.netns.enter(), self._watched():
            (row or self.row).attach(policy or self.policy(), pid, tell)

    def down(self, *, pid: int | None = None, tell: Tell = mute) -> None:
        """Detach the tap. Raises Failure."""
        with pytest.MonkeyPatch.context() as patch:
            # NOTE: without a mark on the tap, a down asks this host's own database alone.
            patch.setattr("pyqemu_ifdown.detach.DEFAULT_OVSDB", self.world.ovs.db)
            with self.world.netns.enter(), self._watched():
                self.row.detach(os.getpid() if pid is None else pid, tell)

    def apply(self, *, dry_run: bool = False) -> Outcome:
        """Put the policy in force, or tell what that would change."""
        with self._watched():
            (outcome,) = reapply(self.world.netns, self.policy(), TAP, dry_run=dry_run)
        return outcome

    def change(self) -> None:
        """Put the policy in force. Raises Failure."""
        failure = self.apply().failure
        if failure is not None:
            raise failure

    def half_up(self, ops: int) -> None:
        """Have an up end after so many ops, with nothing taken back, as by SIGKILL."""

        def die(number: int, host: Host) -> None:
            if number > ops:
                raise Failure(Status.TRY_AGAIN, BROKEN)

        with stepping(die, breaking(ops)), pytest.raises(Failure, match=BROKEN):
            self.up()

    def run(self, commands: Sequence[str]) -> None:
        """Type commands into a shell; the first that fails ends it. Raises RuntimeError."""
        text = "".join(f"{command}\n" for command in commands)
        self.world.netns.run(["sh", "-e"], input=text, env=self.world.ovs.env)

    # What is

    def snapshot(self) -> Snapshot:
        """Look at the whole host."""
        return Snapshot.take(self.world.netns, self.world.ovs)

    def left(self, before: Snapshot | None = None) -> list[str]:
        """Return what is another than `before`, or than in the beginning, and stays so."""
        return leftovers(before or self.pristine, self.world.netns, self.world.ovs)

    def look(self) -> Snapshot:
        """Look at the whole host, but for what is another each time that the same is made."""
        found: dict[str, Any] = {}
        for name, value in self.snapshot().entries.items():
            if name.startswith("nft "):
                continue
            found[name] = value
            if name == f"link {TAP}":
                found[name] = {**value, "ifindex": INDEX}
            if name.startswith("row "):
                kept = {key: each for key, each in value.items() if key not in UNSTABLE}
                ports = value.get("ports", [])
                found[name] = {**kept, "has": len([ports] if isinstance(ports, str) else ports)}
        # NOTE: a link's chains are named by its ifindex, and a rule has a sum of all of them.
        rules = self.world.netns.run(["nft", "-s", "list", "ruleset"]).stdout
        found["rules"] = re.sub(r"\bt[0-9]+\b|(?<=sum=)[0-9a-f]+", "t", rules)
        return Snapshot(found)

    def differs(self, wanted: Snapshot) -> list[str]:
        """Return what is another than `look` has found once, and stays so."""
        end = time.monotonic() + SETTLE
        while True:
            lines = diff(wanted, self.look())
            if not lines or time.monotonic() > end:
                return lines
            time.sleep(0.02)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """See after each op that the tap carries a mark, or is as it was in the beginning."""
        with stepping(after=self._check_mark):
            yield

    def _check_mark(self, number: int, host: Host) -> None:
        link = host.kernel.look_up(TAP)
        if link is None or self.row.is_marked(link):
            return
        touched = [
            f"{key} is {getattr(link, key)}, not {getattr(self.was, key)}"
            for key in TOUCHED
            if self.was is None or getattr(link, key) != getattr(self.was, key)
        ]
        rows = [row.ids for row in host.ports(TAP) if row.ours]
        touched += [f"a row {ids}" for ids in rows if ids[KEY_IFINDEX] == str(link.index)]
        self.unmarked += [f"after op {number}: {each}" for each in touched]
