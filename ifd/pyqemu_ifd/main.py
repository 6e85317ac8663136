"""pyqemu-ifd: the resident agent."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import socket
import syslog
from typing import NoReturn

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.shell import readable
from pyqemu_ifconf.version import say_version
from pyqemu_ifup.agent import ROOT_SOCKET, USERS_SOCKET
from pyqemu_ifup.hook import SAFE_PATH, explain_bug, log, open_log, open_standard_descriptors, say

PROGRAM = "pyqemu-ifd"
LISTEN_FD = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""
NICE = 5
"""How far the agent of the users stands back behind root's (setpriority(2))."""


def main() -> int:
    """Run the agent with the arguments of this process and return its exit status."""
    open_log(PROGRAM)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.environ["PATH"] = SAFE_PATH
    for name in [name for name in os.environ if name.startswith("OVS_")]:
        del os.environ[name]
    try:
        options = parser().parse_args()
        if options.version:
            print(say_version(PROGRAM), end="")
            return int(Status.DONE)
        policy = os.path.abspath(options.policy) if options.policy else None
        path = options.socket or (USERS_SOCKET if options.users else ROOT_SOCKET)
        path = os.path.abspath(path)
        os.chdir("/")
        os.umask(0o077)
        open_standard_descriptors()
        raise_limit()
        return serve(policy, path, for_users=options.users)
    except Failure as failure:
        text, status = str(failure), failure.status
    except Exception as error:  # NOTE: the outermost handler; all else catches by name.
        text, status = explain_bug(error), Status.BUG
    say(f"{PROGRAM}: {text}")
    open_log(PROGRAM)
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
        prog=PROGRAM,
        allow_abbrev=False,
        description="The resident agent of pyqemu-ifup; it stays in the foreground.",
    )
    found.add_argument("--policy", metavar="FILE", help="a file in place of the host's policy")
    found.add_argument(
        "--socket",
        metavar="PATH",
        help="where to listen, unless a supervisor hands over a socket "
        f"({ROOT_SOCKET}, with --users {USERS_SOCKET})",
    )
    found.add_argument(
        "--users", action="store_true", help="serve everybody but root, at a socket of their own"
    )
    found.add_argument("--version", action="store_true", help="print the version, and end")
    return found


def serve(policy: str | None, path: str, *, for_users: bool) -> int:
    """Serve until told to stop. Raises Failure: 71 or 77 where the socket cannot be had."""
    from pyqemu_ifd.cache import PolicyCache
    from pyqemu_ifd.server import Server, listen

    handed = handed_over()
    try:
        if handed is None:
            make_folder(os.path.dirname(path))
        elif not for_users:
            close_to_others(handed)
        listener = handed if handed is not None else listen(path, for_users=for_users)
        inode = os.stat(path).st_ino if handed is None else None
    except OSError as error:
        denied = isinstance(error, PermissionError)
        raise Failure(
            Status.DENIED if denied else Status.REFUSED,
            f"cannot listen at {readable(path)}",
            error.strerror or str(error),
            "run as root" if denied and os.geteuid() != 0 else "name another by --socket",
        ) from error
    try:
        if for_users:
            step_back()
        # NOTE: a container may have no syslog, and who looks at its output is to see what it does.
        open_log(PROGRAM, aloud=True)
        log(syslog.LOG_INFO, f"listening at {readable(path if handed is None else _name(handed))}")
        Server(listener, PolicyCache(policy), for_users=for_users).run(notify, watchdog())
    finally:
        # NOTE: in this order: once it is closed, another agent may have put its own there.
        if inode is not None:
            remove(path, inode)
        listener.close()
    return int(Status.DONE)


def _name(listener: socket.socket) -> str:
    """Return the path of a socket that was handed over."""
    path = listener.getsockname()
    return path if isinstance(path, str) else os.fsdecode(path)


def make_folder(path: str) -> None:
    """Make a folder that anyone may pass through, unless it is there. Raises OSError."""
    before = os.umask(0o022)
    try:
        os.makedirs(path, exist_ok=True)
    finally:
        os.umask(before)


def close_to_others(listener: socket.socket) -> None:
    """Let nobody but root connect to a socket that was handed over. Raises OSError.

    The unit of an earlier version, which is still in force, has made it for everybody.
    """
    path = listener.getsockname()
    if not isinstance(path, str) or not path.startswith("/"):
        return
    try:
        os.chmod(path, 0o600)
    except FileNotFoundError:
        return


def step_back() -> None:
    """Leave the processor to others first, where that may be chosen here."""
    if os.getpriority(os.PRIO_PROCESS, 0) >= NICE:
        return
    try:
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    except PermissionError as error:
        # A supervisor may forbid it, and has its own means.
        log(syslog.LOG_DEBUG, f"cannot be nice: {error.strerror}")


def remove(path: str, inode: int) -> None:
    """Remove the socket at `path` where it is still the one with this inode."""
    try:
        if os.lstat(path).st_ino == inode:
            os.unlink(path)
    except FileNotFoundError:
        return


def raise_limit() -> None:
    """Let this process open as many files as it may: each client is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except PermissionError as error:
        # A supervisor that has set the limit may forbid to change it.
        log(syslog.LOG_DEBUG, f"cannot raise the limit of open files: {error.strerror}")


def handed_over() -> socket.socket | None:
    """Return the listening socket that a supervisor hands over (sd_listen_fds(3)), if any.

    Raises Failure (71) where it hands over something else.
    """
    for_us = os.environ.pop("LISTEN_PID", None) == str(os.getpid())
    count = os.environ.pop("LISTEN_FDS", None)
    os.environ.pop("LISTEN_FDNAMES", None)
    if not for_us or count is None:
        return None
    try:
        os.set_inheritable(LISTEN_FD, False)
        handed = socket.socket(fileno=LISTEN_FD)
        listens = handed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise _not_handed(str(error.strerror)) from error
    kind = (handed.family, handed.type, bool(listens))
    if count != "1" or kind != (socket.AF_UNIX, socket.SOCK_SEQPACKET, True):
        raise _not_handed("it is to be one, of a unix socket that listens for packets")
    return handed


def _not_handed(why: str) -> Failure:
    return Failure(
        Status.REFUSED,
        "cannot serve on what the supervisor hands over",
        why,
        "see pyqemu-ifd.socket: ListenSequentialPacket=",
    )


def watchdog() -> float | None:
    """Return within how many seconds the supervisor wants a sign of life, None where it does not.

    As sd_watchdog_enabled(3) has it.
    """
    asked = os.environ.get("WATCHDOG_USEC", "")
    mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not (mine and asked.isdecimal()):
        return None
    return int(asked) / 1e6 or None


def notify(state: str) -> None:
    """Tell the supervisor the state, where there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            log(syslog.LOG_WARNING, f"cannot notify {readable(address)}: {error.strerror}")


if __name__ == "__main__":
    raise SystemExit(main())
