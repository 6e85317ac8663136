"""pyqemu-bridge-helper: what QEMU calls for a tap that it may not make itself.

QEMU runs it directly or by `sh -c`, with its arguments in either order (net_bridge_run_helper of
net/tap.c), and waits for one message with the tap's descriptor on the socket --fd.
"""

from __future__ import annotations

import _socket
import errno
import os
import select  # noqa: F401  say() needs it, also where no file can be opened any more
import sys

from pyqemu_ifconf.shell import printable
from pyqemu_ifd.thin import log, say
from pyqemu_ifup.tap_client import NoTap, ask_for_tap, find_socket

PROGRAM = "pyqemu-bridge-helper"
USAGE, BUG, REFUSED = 64, 70, 71
"""Exit statuses, as pyqemu_ifconf.failure.Status has them, which costs too much to import."""


def main() -> int:
    """Run the helper with the arguments of this process and return its exit status."""
    if sys.argv[1:] == ["--version"]:
        from pyqemu_ifconf.version import say_version

        print(say_version(PROGRAM), end="")
        return 0
    try:
        help_qemu(sys.argv[1:])
    except NoTap as failure:
        for line in failure.told:
            _say(line)
        if failure.text:
            _report(failure.text)
        return failure.status
    except OSError as error:
        _report(f"cannot go on: {os.strerror(error.errno or 0)}; see what limits QEMU's process")
        return REFUSED
    except Exception as error:  # NOTE: the outermost handler; all else catches by name.
        import traceback

        for line in traceback.format_exc().splitlines():
            log(PROGRAM, printable(line))
        _report(
            f"internal error: {type(error).__name__}: {error}; "
            "the traceback is in syslog, please report it"
        )
        return BUG
    return 0


def help_qemu(arguments: list[str]) -> None:
    """Get the tap that `arguments` ask for and hand it over. Raises NoTap."""
    network, number, vnet_hdr = parse(arguments)
    try:
        channel = _socket.socket(fileno=number)
    except OSError as error:
        raise NoTap(
            USAGE,
            f"--fd={number} is no socket: {os.strerror(error.errno or 0)}; "
            "QEMU calls this program, with helper=",
        ) from error
    _, descriptors = ask_for_tap(find_socket(), network, "", 1, vnet_hdr=vnet_hdr, for_parent=True)
    rights = descriptors[0].to_bytes(4, sys.byteorder)
    try:
        # NOTE: one byte, since a message of none is the end of a stream.
        channel.sendmsg(
            [b"\0"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)], _socket.MSG_NOSIGNAL
        )
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
            raise NoTap(
                REFUSED,
                f"cannot hand the tap over by --fd={number}: "
                f"{os.strerror(error.errno or 0)}; QEMU calls this program, with helper=",
            ) from error
        raise NoTap(75, "QEMU does not take the tap: it has ended") from error


def parse(arguments: list[str]) -> tuple[str, int, bool]:
    """Return the network or bridge, the number of the socket, and whether with a vnet header.

    Of an option given twice the last counts, as in QEMU's own helper. Raises NoTap (64).
    """
    network, number, vnet_hdr = "", -1, False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument == "--use-vnet":
            vnet_hdr = True
        elif name == "--br" and equals:
            network = value
        elif name == "--fd" and value.isascii() and value.isdigit() and len(value) < 10:
            number = int(value)
        else:
            raise _usage()
    if not network or number < 0:
        raise _usage()
    return network, number, vnet_hdr


def _usage() -> NoTap:
    return NoTap(USAGE, "", (f"usage: {PROGRAM} [--use-vnet] --br=NETWORK --fd=NUMBER",))


def _say(line: str) -> None:
    say(printable(line).encode("ascii"))


def _report(text: str) -> None:
    _say(f"{PROGRAM}: {text}")
    log(PROGRAM, printable(text))


if __name__ == "__main__":
    raise SystemExit(main())
