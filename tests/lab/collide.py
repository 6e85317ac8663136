"""What root or the agent does with a tap, stopped before each of its system calls, beside a hook.

`python -m lab.collide [STEP]`, as root in a network namespace of its own, does so at every STEPth
system call of each of them, and prints where the end is not the right one.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lab.netns import Namespace
from lab.ovs import OpenVSwitch
from lab.plug import ALLOWED, detach_now, port_of, reapply
from lab.race import Guest, fork, wait
from lab.steps import Steps, be_traced
from pyqemu_ifconf.load import Source, parse_policy
from pyqemu_ifconf.policy import Policy, Port, Vlan
from pyqemu_ifctl.verbs.gc import gc
from pyqemu_ifd.cache import PolicyCache
from pyqemu_ifd.keyed_lock import KeyedLock
from pyqemu_ifd.pool import Pool
from pyqemu_ifd.reconcile import Reconciler
from pyqemu_ifd.users import Users
from pyqemu_ifup.deadline import Deadline
from pyqemu_ifup.mark import find_here
from pyqemu_ifup.task import finish

SHORT = 0.1
"""Seconds in which a hook that waits for nobody has ended, but on a busy machine."""
ROUNDS = 40
"""Looks of an agent, a tenth of a second apart, after which it has done what it had to do."""
TAP = "web0"
DOERS = ("apply", "agent", "gc")
HOOKS = ("up", "down")
SWITCHES = ("linux", "openvswitch")


@dataclass
class Place:
    """Where it happens: the bridges br0 and br1, or br-int of an Open vSwitch."""

    netns: Namespace
    ovs: OpenVSwitch
    switch: str

    def port(self, bridge: str, vid: int) -> Port:
        """Return what the tap is to have, on a bridge or in a VLAN of the only one."""
        if self.switch == "linux":
            return port_of(TAP, bridge)
        vlan = Vlan(vid)
        return port_of(TAP, "br-int", vlan=vlan, kind="openvswitch", ovsdb=self.ovs.db)

    @property
    def old(self) -> Port:
        """What it has had so far."""
        return self.port("br0", 10)

    @property
    def new(self) -> Port:
        """What it is to have by the policy."""
        return self.port("br1", 20)

    @property
    def text(self) -> str:
        """The policy."""
        network = "bridge: br1"
        if self.switch == "openvswitch":
            network = f"bridge: br-int, kind: openvswitch, ovsdb: '{self.ovs.db}', vlan: 20"
        rule = "{tap: '*', network: lan}"
        head = f"version: 1\ntimeout: {ALLOWED:.0f}\n"
        return f"{head}networks: {{lan: {{{network}}}}}\nrules: [{rule}]\n"

    @property
    def policy(self) -> Policy:
        """The policy, read."""
        return parse_policy([Source("policy.yaml", self.text.encode())])

    def state(self) -> list[str]:
        """Return what there is of the tap's attachment."""
        link = self.netns.links().get(TAP, {"flags": []})
        found = ["up"] if "UP" in link["flags"] else []
        found += ["mark"] if link.get("ifalias") else []
        master = link.get("master")
        row = self.ovs.find("Port", TAP) if self.switch == "openvswitch" else None
        if self.switch == "linux":
            found += [master] if master else []
        elif row is not None:
            found += [f"row {row['tag']}"]
        return found

    def attached(self) -> list[str]:
        """Return what `state` is of a tap that is as the policy says."""
        return ["up", "mark", "br1" if self.switch == "linux" else "row 20"]

    def clear(self) -> None:
        """Take all of it away."""
        if self.switch == "openvswitch":
            self.ovs.del_port(TAP)
        if TAP in self.netns.links():
            self.netns.ip("link", "del", TAP)


@dataclass
class Scene:
    """A tap, what is done with it, the hook that comes meanwhile, and what is right then.

    `apart` has whoever does it have nothing of the guest's; `after` is due once the hook has ended.
    """

    apart: Callable[[], object]
    doing: Callable[[], object]
    hook: Callable[[], int]
    right: list[str]
    after: Callable[[], object] = lambda: None
    close: Callable[[], object] = lambda: None


def scene(place: Place, who: str, hook: str) -> Scene:
    """Set it up: what `who` does with the tap, and a `hook` of its guest's."""
    netns = place.netns
    if who == "gc":
        return _gc(place, hook)
    if who == "apply":
        guest = Guest(netns, place.old, persist=True, plugged=hook == "down")
    else:
        guest = Guest(netns, place.new, persist=True)
        _lose(place)

    def apart() -> None:
        os.close(guest.life)

    def doing() -> None:
        if who == "apply":
            reapply(netns, place.policy, TAP)
        else:
            _bring_back(place)

    if hook == "down":
        # NOTE: a QEMU closes its tap when its script has ended.
        return Scene(apart, doing, guest.end, [], guest.wait)
    return Scene(apart, doing, lambda: guest.begin(place.new), place.attached(), close=guest.kill)


def _lose(place: Place) -> None:
    """Have the tap lose its bridge."""
    if place.switch == "linux":
        place.netns.ip("link", "set", TAP, "nomaster")
    else:
        place.ovs.del_port(TAP)


def _gc(place: Place, hook: str) -> Scene:
    """A guest was killed; its down comes late, or the next guest, on the same tap."""
    linux = place.switch == "linux"
    guest = Guest(place.netns, place.new, persist=linux)
    guest.kill()
    descriptor, policy = tempfile.mkstemp(".yaml", "collide-", "/tmp")
    with open(descriptor, "w") as file:
        file.write(place.text)

    def doing() -> None:
        environ = {"PYQEMU_IFUP_POLICY": policy}
        with place.netns.enter():
            answer = gc(
                None, environ, Deadline(ALLOWED), lambda _: None, dry_run=False, as_json=False
            )
        assert answer.status == 0, answer

    def down() -> int:
        def run() -> None:
            with place.netns.enter():
                detach_now(TAP, guest.pid, Deadline(ALLOWED), lambda _: None)

        return fork(run)

    if hook == "down":
        return Scene(lambda: None, doing, down, [], close=lambda: os.unlink(policy))
    following: list[Guest] = []

    def up() -> int:
        following.append(Guest(place.netns, place.new, persist=linux, plugged=False))
        return following[0].begin(place.new)

    def close() -> None:
        os.unlink(policy)
        for each in following:
            each.kill()

    return Scene(lambda: None, doing, up, place.attached(), close=close)


def _bring_back(place: Place) -> None:
    """Do what an agent does that looks at everything, until there is nothing left to do."""
    with place.netns.enter():
        pool, cache = Pool(), PolicyCache(None)
        cache.policy = place.policy
        reconciler = Reconciler(pool, cache, KeyedLock(), Users(), find_here())
        if place.switch == "openvswitch":
            finish(pool.connected(place.ovs.db, Deadline(ALLOWED)), _pause(pool))
        reconciler.everything(0.0)
        for _ in range(ROUNDS):
            works = list(reconciler.work())
            for _, work in works:
                finish(work(), _pause(pool))
            # NOTE: the ends of processes are looked at again and again.
            if not works and (reconciler.due is None or reconciler.due > time.monotonic() + 2):
                return
            _pause(pool)(0.1)


def _pause(pool: Pool) -> Callable[[float], None]:
    def wait(seconds: float) -> None:
        time.sleep(min(seconds, 0.01))
        pool.refresh()

    return wait


def collide(place: Place, who: str, hook: str, number: int) -> tuple[int, str]:
    """Stop `who` before its system call of this number, run the hook, and let it go on.

    Returns how many system calls it has come to, and in words what is wrong in the end, or "".
    """
    at = scene(place, who, hook)

    def run() -> None:
        at.apart()
        be_traced()
        at.doing()

    steps = Steps(fork(run))
    came = steps.to(number)
    if not came:
        alone = [] if who == "gc" else place.attached()
        assert place.state() == alone, f"{who} does not do what it shall: {place.state()}"
    script = at.hook()
    ended = wait(script, SHORT) if came else None
    if ended is not None:
        at.after()
    if came:
        steps.go_on()
    statuses = [wait(steps.pid), ended if ended is not None else wait(script)]
    at.after()
    state = place.state()
    at.close()
    place.clear()
    wrong = statuses != [0, 0] or state != at.right
    return steps.calls, f"statuses {statuses}, {state}" if wrong else ""


def points(
    place: Place, who: str, hook: str, step: int, *, first: int = 0
) -> Iterator[tuple[int, str]]:
    """Collide at every `step`th system call from the `first`, until there is none any more.

    Yields each with what is wrong there, or "".
    """
    number = first
    while True:
        calls, wrong = collide(place, who, hook, number)
        yield number, wrong
        if calls <= number:
            return
        number += step


def main() -> int:
    """Do as this file says, and return 0 where all is right."""
    step = int(sys.argv[1]) if sys.argv[1:] else 1
    wanted = sys.argv[2:]
    failed = False
    with Namespace() as netns, OpenVSwitch(netns, datapath="netdev", tcp=False) as ovs:
        ovs.add_bridge("br-int", mtu=1500)
        for name in ("br0", "br1"):
            netns.add_bridge(name)
        for switch in SWITCHES:
            for who in DOERS:
                for hook in HOOKS:
                    if wanted and not {switch, who, hook} >= set(wanted):
                        continue
                    began, number = time.monotonic(), 0
                    wrong = 0
                    for number, what in points(Place(netns, ovs, switch), who, hook, step):
                        if what:
                            wrong += 1
                            print(f"{switch}, {who}, {hook}: at {number}: {what}", flush=True)
                    failed |= wrong > 0
                    seconds = time.monotonic() - began
                    print(
                        f"{switch}, {who}, {hook}: {number} system calls, every {step}th, wrong "
                        f"at {wrong}, {seconds:.0f} s",
                        flush=True,
                    )
        ovs.vsctl("del-br", "br-int")
        for name in ("br0", "br1"):
            netns.ip("link", "del", name)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
