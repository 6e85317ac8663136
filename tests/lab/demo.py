"""The demonstration: one policy, one bridge, one real guest, and nothing left at the end.

Runs as root, in a network namespace of its own, which goes with this process whatever happens.
Ends 0 only when each step was seen to work.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import boot, needs
from lab.qemu import Qemu
from lab.taps import Raw, Want

# linux/sched.h, linux/prctl.h
CLONE_NEWNET = 0x40000000
PR_SET_CHILD_SUBREAPER = 36

PROGRAMS = Path(sys.executable).parent
LIMIT = 110
"""Seconds that all of it may take."""

BRIDGE, HOST, GUEST = "br0", "10.9.0.1", "10.9.0.2"
TAP, MAC = "demo0", "52:54:00:aa:00:01"
STEPS = 9
DENIED = 77 * 256
"""The wait status that QEMU prints for a hook that ended 77."""

POLICY = f"""\
version: 1
networks:
  lan:
    bridge: {BRIDGE}
rules:
  - vm: demo
    network: lan
    isolated: true
  - tap: "*"
    deny: only the guest called demo may use this host's network
"""

# IPv4 and ICMP (RFC 791, RFC 792), after 14 bytes of Ethernet
IPV4, ICMP, ECHO_REPLY, ECHO_REQUEST = 0x0800, 1, 0, 8


class DemoError(Exception):
    """A step did not do what it should; the text says which and what was seen instead."""


class Progress:
    """Prints one line for each step, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.number = 0

    def step(self, text: str) -> None:
        """Tell which step begins."""
        self.number += 1
        seconds = time.monotonic() - self.start
        print(f"[{self.number}/{STEPS}, {seconds:4.1f} s] {text}", flush=True)


def run(words: Sequence[str], *, status: int = 0, show: bool = True) -> str:
    """Run a command, show it with what it prints, and return its stdout.

    Raises DemoError where it does not end with `status`.
    """
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if show:
        shown = [os.path.basename(words[0]), *words[1:]]
        print(f"    # {shlex.join(shown)}")
        for line in (done.stdout + done.stderr).splitlines():
            print(f"    {line}")
        sys.stdout.flush()
    if done.returncode != status:
        text = f"`{shlex.join(words)}` ended {done.returncode}, not {status}"
        raise DemoError(f"{text}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def ifctl(*words: str, status: int = 0, show: bool = True) -> str:
    """Run `pyqemu-ifctl` as `run` does."""
    return run([str(PROGRAMS / "pyqemu-ifctl"), *words], status=status, show=show)


def links() -> dict[str, tuple[object, ...]]:
    """Return the links of this namespace, each with what an attachment would change of it."""
    listed: list[dict[str, Any]] = json.loads(run(["ip", "-j", "link", "show"], show=False))
    keys = ("mtu", "address", "master", "ifalias")
    return {link["ifname"]: tuple(link.get(key) for key in keys) for link in listed if link}


def processes_left() -> bool:
    """Tell whether a process that was started here, or that one of these started, still runs."""
    while True:
        try:
            pid, _status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True


def echo(kind: int, end: int) -> Want:
    """Want an ICMP echo of `kind` whose Ethernet address at offset `end` is the guest's."""
    guest = bytes.fromhex(MAC.replace(":", ""))

    def want(frame: bytes) -> bool:
        if frame[end : end + 6] != guest or int.from_bytes(frame[12:14], "big") != IPV4:
            return False
        header = 4 * (frame[14] & 0x0F)
        return frame[23] == ICMP and frame[14 + header] == kind

    return want


def hooks(netdev: str, tap: str) -> list[str]:
    """Return the QEMU arguments of a tap netdev with both of our hooks."""
    # NOTE: QEMU wants a comma within a value doubled.
    folder = str(PROGRAMS).replace(",", ",,")
    scripts = f"script={folder}/pyqemu-ifup,downscript={folder}/pyqemu-ifdown"
    return ["-netdev", f"tap,id={netdev},ifname={tap},{scripts}"]


def refuse_intruder() -> None:
    """Start a QEMU that no rule lets in, and see it fail without a trace."""
    with Qemu("-name", "intruder", *hooks("n0", "evil0")) as qemu:
        status = qemu.wait()
        print("".join(f"    {line}\n" for line in qemu.stderr.splitlines()), end="")
        if status == 0 or f"failed with status {DENIED}" not in qemu.stderr:
            raise DemoError(f"QEMU ended {status} and was not refused")
    ifctl("decode", str(DENIED))
    if "evil0" in links():
        raise DemoError("the refused tap is still there")


def start_guest(console: boot.Console) -> Qemu:
    """Start the guest called demo, its processor stopped, on our tap."""
    guest = boot.guest_arguments(console, ip=f"{GUEST}/24", ping=HOST, hold=True)
    card = f"virtio-net-pci,netdev=n0,mac={MAC}"
    return Qemu("-name", "demo", "-S", *guest, *hooks("n0", TAP), "-device", card, machine="pc")


def see_packets(qemu: Qemu, console: boot.Console) -> None:
    """Let the guest boot, and see its echo request and this host's reply on the tap."""
    with Raw(TAP) as wire:
        qemu.execute("cont")
        request = wire.recv(LIMIT, echo(ECHO_REQUEST, 6))
        if request is None:
            raise DemoError(f"no echo request came out of the guest: {qemu.stderr}")
        print(f"    from the guest: ICMP echo request, {len(request)} bytes")
        reply = wire.recv(10, echo(ECHO_REPLY, 0), outgoing=True)
        if reply is None:
            raise DemoError("no echo reply went to the guest")
        print(f"    to the guest:   ICMP echo reply, {len(reply)} bytes")
        print(f"    on its console: {console.wait('ping')}", flush=True)


def show(progress: Progress, folder: Path) -> None:
    """Take all the steps; raise DemoError at the first that fails."""
    progress.step("a network namespace of its own, with a Linux bridge")
    run(["ip", "link", "set", "lo", "up"])
    run(["ip", "link", "add", BRIDGE, "address", "02:00:00:00:00:01", "type", "bridge"])
    run(["ip", "address", "add", f"{HOST}/24", "dev", BRIDGE])
    run(["ip", "link", "set", BRIDGE, "up"])
    before = links()

    progress.step("a policy: who is plugged into what")
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    policy.chmod(0o644)
    os.environ["PYQEMU_IFUP_POLICY"] = str(policy)
    print("".join(f"    {line}\n" for line in POLICY.splitlines()), end="")
    ifctl("check")

    progress.step("what that policy means for one tap, told beforehand")
    ifctl("explain", TAP, "--vm", "demo")

    progress.step("a guest that no rule lets in is refused")
    refuse_intruder()

    progress.step("QEMU starts the guest called demo, and calls the hook")
    with boot.Console() as console, start_guest(console) as qemu:
        print(f"    # {shlex.join(qemu.argv)}")
        if not qemu.greeting:
            raise DemoError("QEMU has no greeting")

        progress.step("the tap is where the policy says")
        run(["ip", "-brief", "link", "show", "master", BRIDGE])
        ifctl("status")
        (tap,) = json.loads(ifctl("status", TAP, "--json", show=False))["taps"]
        if (tap["state"], tap["bridge"], tap["isolated"]) != ("ok", BRIDGE, True):
            raise DemoError(f"status says {tap}")

        progress.step(f"the guest boots and pings {HOST}: its packets, as they are on the tap")
        see_packets(qemu, console)

        progress.step("QEMU quits, and calls the other hook")
        status = qemu.quit()
        if status != 0 or qemu.stderr:
            raise DemoError(f"QEMU ended {status} and said: {qemu.stderr}")

    progress.step("nothing is left")
    ifctl("status")
    run(["ip", "-brief", "link"])
    if links() != before:
        raise DemoError(f"the links were {before} and are {links()}")
    if processes_left():
        raise DemoError("a process is left")


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """End because of a signal; what was begun is cleaned up on the way out."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGALRM:
        raise DemoError(f"it took longer than {LIMIT} s")
    print(f"demo: stopped by {signal.Signals(number).name}; cleaning up", file=sys.stderr)
    raise SystemExit(128 + number)


def main() -> int:
    """Run the demonstration and return its exit status: 0 where each step worked, else 1."""
    reason = needs.missing("root", "tun", "ip", "qemu") or boot.setup()
    if reason is not None:
        print(f"demo: cannot be shown here: {reason}", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, stop)
    signal.alarm(LIMIT)
    libc = ctypes.CDLL(None, use_errno=True)
    # NOTE: as their reaper, this process is the parent of all that outlives its own.
    if libc.unshare(CLONE_NEWNET) != 0 or libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        print(f"demo: no network namespace: {os.strerror(error)}", file=sys.stderr)
        return 1
    progress = Progress()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyqemu-demo-")))
        try:
            show(progress, folder)
        except (DemoError, EOFError, TimeoutError) as error:
            print(f"demo: step {progress.number} of {STEPS} failed: {error}", file=sys.stderr)
            return 1
    print(f"demo: done in {time.monotonic() - progress.start:.1f} s; all of it was seen to work")
    return 0


if __name__ == "__main__":
    sys.exit(main())
