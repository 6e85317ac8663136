"""pyqemu-ifctl run: open the taps of a QEMU that may open none, and become that QEMU.

The agent opens them; where there is none, root does it here.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
import signal
import syslog
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, NoReturn

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import ifctl, quote, readable
from pyqemu_ifctl.answer import Answer
from pyqemu_ifctl.program import PROGRAM
from pyqemu_ifctl.qemu.arguments import NO_NIC, device, find_vm, tap_by_descriptors, user_mode
from pyqemu_ifup.deadline import GRACE, Deadline
from pyqemu_ifup.hook import STOP_SIGNALS, log, narrator, say, within_deadline
from pyqemu_ifup.nic_macs import find_macs
from pyqemu_ifup.tap_client import NoAgent, NoTap, ask_for_tap, find_socket
from pyqemu_ifup.wire import QUEUES_MAX

if TYPE_CHECKING:
    from pyqemu_ifconf.policy import Policy
    from pyqemu_ifup.host import Host
    from pyqemu_ifup.tap_request import NewTap

VHOST = "/dev/vhost-net"
KEYS = ("tap", "id", "queues", "mac")
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
"""What QEMU takes for an id (id_wellformed of util/id.c)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options and arguments."""
    parser.usage = (
        f"{PROGRAM} run [VM] [--nic NETWORK[,tap=NAME][,id=ID][,queues=N][,mac=MAC] ...] "
        "-- QEMU ..."
    )
    parser.add_argument("vm", metavar="VM", nargs="?", help="a guest of the policy's, for its NICs")
    parser.add_argument(
        "--nic",
        metavar="NETWORK[,...]",
        action="append",
        default=[],
        help="a tap on this network, for -device ...,netdev=ID; net0, net1 ... without id=",
    )


def run(args: argparse.Namespace) -> Answer:
    """Open the taps and become the command after `--`; return only where that fails.

    Raises Failure.
    """
    return start_qemu(args.vm, args.nic, args.command, os.environ).by_name()


@dataclass(frozen=True)
class Nic:
    """A tap on `network`, which QEMU is to know as the netdev `id`, or a `backend` without one.

    `mac` is that of its device, empty where only the command line has it. `device` are the words
    that give the guest a device on it; none where the caller writes them.
    """

    network: str
    id: str
    tap: str = ""
    queues: int = 1
    backend: str = ""
    device: tuple[str, ...] = ()
    mac: str = ""


class OwnTaps:
    """The taps that root opens without an agent, as the agent would, for this process."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.names: list[str] = []
        self.leftovers: list[str] = []
        self._handlers = {stop: signal.getsignal(stop) for stop in STOP_SIGNALS}
        self._deadline: Deadline | None = None

    def check(self) -> None:
        """Raise Failure (75) where a signal that came after a tap was opened is to end us."""
        reason = self._deadline.interrupted() if self._deadline is not None else None
        if reason is not None:
            raise Failure(Status.TRY_AGAIN, "stopped", reason, "nothing is left of it")

    def hand_on(self) -> None:
        """Have signals do again what they did before: from here on QEMU has them. Raises Failure.

        NOTE: a handler ends with this program, and so would what nohup(1) has ignored.
        """
        for stop, handler in self._handlers.items():
            signal.signal(stop, handler)
        self.check()

    def open(self, nic: Nic) -> list[int]:
        """Return the descriptors of a new tap, which is attached. Raises Failure."""
        from pyqemu_ifconf.load import load_host_policy
        from pyqemu_ifup.access import ROOT, find_user
        from pyqemu_ifup.drivers.rtnetlink import Netlink
        from pyqemu_ifup.host import Host
        from pyqemu_ifup.tap_request import Wish, attach_tap, make_tap

        self.check()
        policy = load_host_policy(self.environ)
        wish = Wish(nic.network, nic.tap, nic.queues, vnet_hdr=True, for_parent=False, mac=nic.mac)
        try:
            with within_deadline(policy.timeout, hook=False) as deadline, Netlink() as kernel:
                # NOTE: what came while the policy was read was noted for the tap before.
                self.check()
                self._deadline = deadline
                new = make_tap(kernel, policy, find_user(ROOT), os.getpid(), wish)
                with Host(
                    new.name, deadline, narrator(PROGRAM, new.name), kernel, ovsdbs=policy.databases
                ) as host:
                    host.finish(attach_tap(host, policy, new))
                    self.names.append(new.name)
                    self._note(host, policy, new)
        except Failure as failure:
            raise Failure(
                failure.status,
                f"{quote(nic.tap or nic.network)}: {failure.what}",
                failure.why,
                failure.remedy,
            ) from failure
        return new.descriptors

    def _note(self, host: Host, policy: Policy, new: NewTap) -> None:
        """Note what of the tap is left when its QEMU ends."""
        from pyqemu_ifup import kinds

        if policy.networks[new.network].made is not None:
            self.leftovers.append(f"network {quote(new.network)}")
        if kinds.maker_of(host.kernel.look_up(new.name)) is not None:
            self.leftovers.append(f"the link {quote(new.name)}")
        if any(database.ports(new.name) for database in host.databases.values()):
            self.leftovers.append(f"the port {quote(new.name)} of {kinds.outliving()}")

    def tell_what_stays(self) -> None:
        """Say what is left when QEMU ends, where nobody takes it away."""
        if self.leftovers:
            what = ", ".join(dict.fromkeys(self.leftovers))
            say(f"{PROGRAM}: no agent runs: when QEMU ends, {what} will stay until {ifctl('gc')}")

    def take_back(self) -> None:
        """Detach them all again; what cannot be done is left to gc, and told in syslog."""
        if not self.names:
            return
        from pyqemu_ifdown.detach import detach
        from pyqemu_ifup.host import Host

        for name in self.names:
            with within_deadline(GRACE, hook=False) as deadline:
                try:
                    with Host(name, deadline, narrator(PROGRAM, name)) as host:
                        host.finish(detach(host, name, os.getpid()))
                except Failure as failure:
                    log(
                        syslog.LOG_ERR,
                        f"{quote(name)}: not taken back: {failure}; {ifctl('gc', name)} will",
                    )


def start_qemu(
    vm: str | None, texts: Sequence[str], command: Sequence[str], environ: Mapping[str, str]
) -> Answer:
    """Open the taps of the guest `vm` and those that `texts` ask for, and become `command`.

    Returns only where that fails. Raises Failure: 64 for usage, 69 where there is no such program
    or guest, and as the policy does.
    """
    if vm is None and not texts:
        raise Failure(
            Status.USAGE,
            "run needs a guest of the policy's, or a --nic",
            "",
            "write run VM, or run --nic NETWORK",
        )
    if not command:
        raise Failure(Status.USAGE, "run needs a command", "", "write -- and QEMU's command line")
    program = shutil.which(command[0])
    if program is None:
        raise _cannot_run(command[0], os.strerror(errno.ENOENT))
    nics = _of_vm(vm, environ) if vm is not None else []
    nics += parse_nics(texts, [nic.id for nic in nics])
    _refuse_twice([nic.id for nic in nics])
    words, inherited, at = list(command), list[int](), ""
    own = OwnTaps(environ)
    try:
        for nic in nics:
            at = f"{nic.network}: "
            backend = nic.backend
            if not backend:
                taps = _open(nic, own)
                vhosts = open_vhosts(nic.queues)
                inherited += [*taps, *vhosts]
                backend = tap_by_descriptors(nic.id, taps, vhosts)
            words += ["-netdev", backend, *nic.device]
        words += () if nics else NO_NIC
        own.tell_what_stays()
        own.hand_on()
        _become(program, words, inherited)
    except NoTap as failure:
        own.take_back()
        status = next((each for each in Status if each == failure.status), Status.REFUSED)
        return Answer("", status, tuple(_remarks(failure, at)))
    except BaseException:
        own.take_back()
        raise


def _open(nic: Nic, own: OwnTaps) -> list[int]:
    """Return the descriptors of a new tap. Raises NoTap, and Failure where there is no agent."""
    try:
        return ask_for_tap(
            find_socket(),
            nic.network,
            nic.tap,
            nic.queues,
            vnet_hdr=True,
            for_parent=False,
            mac=nic.mac,
        )[1]
    except NoAgent:
        if os.geteuid() != 0:
            raise
        return own.open(nic)


def _remarks(failure: NoTap, at: str) -> Iterator[str]:
    """Yield what is to be said of a failure; the agent's lines without the helper's name."""
    for line in failure.told:
        program, _, text = line.partition(": ")
        yield text if program.startswith("pyqemu-") else line
    if failure.text:
        yield at + failure.text


def _become(program: str, words: list[str], inherited: list[int]) -> NoReturn:
    # NOTE: Python ignores these two, and what is ignored stays so in QEMU's children.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    for descriptor in inherited:
        os.set_inheritable(descriptor, True)
    try:
        os.execv(program, words)
    except OSError as error:
        raise _cannot_run(program, os.strerror(error.errno or 0)) from error


def _cannot_run(program: str, why: str) -> Failure:
    return Failure(
        Status.UNAVAILABLE,
        f"cannot run {readable(program)}",
        why,
        "give QEMU's program after --, such as qemu-system-x86_64",
    )


def parse_nics(texts: Sequence[str], taken: Collection[str] = ()) -> list[Nic]:
    """Return what each --nic asks for; the ids are net0, net1 ... where none is given.

    Those `taken` are the guest's own. Raises Failure (64).
    """
    ids = (id for number in count() if (id := f"net{number}") not in taken)
    return [parse_nic(text, next(ids)) for text in texts]


def _refuse_twice(ids: Sequence[str]) -> None:
    twice = [id for number, id in enumerate(ids) if id in ids[:number]]
    if twice:
        raise Failure(
            Status.USAGE,
            f"two NICs have the id {twice[0]}",
            "",
            "give each --nic its own, with id=",
        )


def _of_vm(name: str, environ: Mapping[str, str]) -> list[Nic]:
    """Return the NICs of a guest of the policy's. Raises Failure."""
    from pyqemu_ifconf.load import load_host_policy

    policy = load_host_policy(environ)
    vm = find_vm(policy, name)
    macs = find_macs(policy, vm)
    found = []
    for nic in vm.nics:
        words = ("-device", device(policy, nic, macs[vm.name, nic.id]))
        if nic.user is not None:
            found.append(Nic("", nic.id, backend=user_mode(nic.id, nic.user), device=words))
        else:
            found.append(Nic(nic.network or "", nic.id, nic.tap, nic.queues, device=words))
    return found


def parse_nic(text: str, default_id: str) -> Nic:
    """Return what `NETWORK[,tap=NAME][,id=ID][,queues=N][,mac=MAC]` asks for.

    Raises Failure (64).

    NOTE: a doubled comma, which QEMU takes for one in a value, is refused: no value has one.
    """
    network, *rest = text.split(",")
    if not network or "=" in network:
        raise _bad(text, "it does not begin with the name of a network")
    given: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if key not in KEYS or not equals:
            word = readable(part) if part else "an empty word"
            raise _bad(text, f"{word} is none of tap=, id=, queues= and mac=")
        if key in given:
            raise _bad(text, f"{key}= is given twice")
        if not value:
            raise _bad(text, f"{key}= is empty")
        given[key] = value
    id = given.get("id", default_id)
    if _ID.fullmatch(id) is None:
        raise _bad(text, f"{readable(id)} is no id: a letter, then letters, digits, - . and _")
    queues = given.get("queues", "1")
    if not re.fullmatch("[1-9][0-9]?", queues) or int(queues) > QUEUES_MAX:
        raise _bad(text, f"queues= is a number from 1 to {QUEUES_MAX}, not {readable(queues)}")
    mac = given.get("mac", "")
    if mac:
        from pyqemu_ifconf.vms import is_mac  # rare

        if not is_mac(mac):
            raise _bad(text, f"mac= is the MAC of the guest's device, not {readable(mac)}")
    return Nic(network, id, given.get("tap", ""), int(queues), mac=mac.lower())


def _bad(text: str, why: str) -> Failure:
    return Failure(
        Status.USAGE,
        f"--nic {readable(text)}",
        why,
        "write NETWORK[,tap=NAME][,id=ID][,queues=N][,mac=MAC]",
    )


def open_vhosts(count: int) -> list[int]:
    """Return a descriptor of the kernel's vhost-net for each queue; none where it cannot be used.

    Raises OSError for every other fault.
    """
    found: list[int] = []
    try:
        for _ in range(count):
            found.append(os.open(VHOST, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        for descriptor in found:
            os.close(descriptor)
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENODEV, errno.ENXIO):
            raise
        return []
    return found
