"""pyqemu-ifd: the resident agent."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import syslog
from typing import NoReturn

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifup.agent import DEFAULT_SOCKET
from pyqemu_ifup.manners import SAFE_PATH, explain_bug, log, printable

PROGRAM = "pyqemu-ifd"
LISTEN_FD = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""


def main() -> int:
    """Run the agent with the arguments of this process and return its exit status."""
    syslog.openlog(PROGRAM, syslog.LOG_PID, syslog.LOG_DAEMON)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.environ["PATH"] = SAFE_PATH
    try:
        options = parser().parse_args()
        policy = os.path.abspath(options.policy) if options.policy else None
        path = os.path.abspath(options.socket)
        os.chdir("/")
        os.umask(0o077)
        return serve(policy, path)
    except Failure as failure:
        text, status = str(failure), failure.status
    except Exception as error:  # NOTE: the outermost handler; all else catches by name.
        text, status = explain_bug(error), Status.BUG
    print(f"{PROGRAM}: {printable(text)}", file=sys.stderr)
    log(syslog.LOG_ERR, text)
    return int(status)


class Parser(argparse.ArgumentParser):
    """A parser that raises Failure (64) instead of exiting with 2."""

    def error(self, message: str) -> NoReturn:
        """Raise Failure (64)."""
        raise Failure(Status.USAGE, message, "", f"see {self.prog} --help")


def parser() -> Parser:
    """Return the parser of the arguments."""
    found = Parser(
        prog=PROGRAM, allow_abbrev=False,
        description="The resident agent of pyqemu-ifup; it stays in the foreground.",
    )
    found.add_argument("--policy", metavar="FILE", help="a file in place of the host's policy")
    found.add_argument(
        "--socket", metavar="PATH", default=DEFAULT_SOCKET,
        help=f"where to listen, unless a supervisor hands over a socket ({DEFAULT_SOCKET})",
    )
    return found


def serve(policy: str | None, path: str) -> int:
    """Serve until told to stop. Raises Failure: 71 or 77 where the socket cannot be had."""
    from pyqemu_ifd.keeper import PolicyKeeper
    from pyqemu_ifd.server import Server, listen

    handed = handed_over()
    try:
        if handed is None:
            make_folder(os.path.dirname(path))
        listener = handed if handed is not None else listen(path)
    except OSError as error:
        denied = isinstance(error, PermissionError)
        raise Failure(
            Status.DENIED if denied else Status.REFUSED, f"cannot listen at {path}",
            error.strerror or str(error), "run as root" if denied else "name another by --socket",
        ) from error
    try:
        Server(listener, PolicyKeeper(policy)).run(notify, watchdog())
    finally:
        listener.close()
        if handed is None:
            os.unlink(path)
    return int(Status.DONE)


def make_folder(path: str) -> None:
    """Make a folder that anyone may pass through, unless it is there. Raises OSError."""
    before = os.umask(0o022)
    try:
        os.makedirs(path, exist_ok=True)
    finally:
        os.umask(before)


def handed_over() -> socket.socket | None:
    """Return the listening socket that a supervisor hands over (sd_listen_fds(3)), if any."""
    if os.environ.pop("LISTEN_PID", None) != str(os.getpid()):
        return None
    if os.environ.pop("LISTEN_FDS", None) != "1":
        return None
    os.set_inheritable(LISTEN_FD, False)
    return socket.socket(fileno=LISTEN_FD)


def watchdog() -> float | None:
    """Return within how many seconds the supervisor wants a sign of life, None where it does not.

    As sd_watchdog_enabled(3) has it.
    """
    asked = os.environ.get("WATCHDOG_USEC", "")
    mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not (mine and asked.isdecimal()):
        return None
    return int(asked) / 1e6


def notify(state: str) -> None:
    """Tell the supervisor the state, where there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            log(syslog.LOG_WARNING, f"cannot notify {address}: {error.strerror}")


if __name__ == "__main__":
    raise SystemExit(main())
