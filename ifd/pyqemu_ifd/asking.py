"""Which process asks, for good: a pid that another process has by now is never taken for it."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifd.wire import Peer, peer_pidfd
from pyqemu_ifup.access import ROOT
from pyqemu_ifup.system.process import process_start, read_status, real_uid


@dataclass(frozen=True)
class Process:
    """A process: its pid, and its start in clock ticks since boot, 0 where that is not seen.

    That is so of one in another PID namespace, which only root can have.
    """

    pid: int
    start: int

    def has_ended(self) -> bool:
        """Tell whether it has ended, or nobody can say so."""
        return self.start != 0 and process_start(self.pid) != self.start

    def why_ended(self) -> str | None:
        """Return in words that it has ended, None where it has not.

        As its pid was its own until then, all that was read of it, the mark's start too, is so.
        """
        return f"the calling process {self.pid} has ended" if self.has_ended() else None


def find_asking(
    connection: socket.socket, peer: Peer, find: Callable[[int], int | None]
) -> Process:
    """Return the process for which the client asks: what `find` returns of the client's pid.

    That is the client itself, or one above it, and a user's is the user's own. Raises Failure: 75
    where it or the client has ended, 77.
    """
    pidfd = peer_pidfd(connection)
    try:
        pid = find(peer.pid)
        if pid is None:
            raise _ended()
        start, whose = process_start(pid), real_uid(pid) if peer.uid != ROOT else ROOT
        # NOTE: whoever is still above the client was there all the time: who loses its parent gets
        # one that is older than both.
        if find(peer.pid) != pid or not _is_client(peer, pidfd):
            raise _ended()
    finally:
        if pidfd is not None:
            os.close(pidfd)
    check_holder(pid, whose, peer.uid)
    return Process(pid, start or 0)


def _ended() -> Failure:
    return Failure(Status.TRY_AGAIN, "stopped", "the client has ended")


def _is_client(peer: Peer, pidfd: int | None) -> bool:
    """Tell whether the client's pid is still that of the process that has connected.

    Without a pidfd of it, that is one of the same user that was there before we knew of it.
    """
    if pidfd is None:
        start = process_start(peer.pid)
        uids = read_status(peer.pid, ("Uid",)).get("Uid", "").split()
        ticks = peer.since * os.sysconf("SC_CLK_TCK")
        return start is not None and start <= ticks and uids[1:2] == [str(peer.uid)]
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except OSError as error:
        # Else it is there, and not ours to signal: EPERM, or EINVAL in another PID namespace.
        return error.errno != errno.ESRCH
    return True


def check_holder(pid: int, whose: int | None, uid: int) -> None:
    """Check that the process that is to have the tap of the user `uid` is that user's own.

    `whose` is its real uid, None where it has ended; root's tap may be for any. A mark that named
    another process would outlive the user's. Raises Failure: 75 where it has ended, 77.
    """
    if uid == ROOT:
        return
    if whose is None and pid > 1:
        raise Failure(Status.TRY_AGAIN, "stopped", f"the calling process {pid} has ended")
    if pid <= 1 or whose != uid:
        raise Failure(
            Status.DENIED,
            f"the calling process {pid} is not user {uid}'s",
            "it has ended, and init is the parent now"
            if pid == 1
            else "it is in another PID namespace"
            if pid == 0
            else f"it is user {whose}'s",
            "let the user's own QEMU call this program",
        )
