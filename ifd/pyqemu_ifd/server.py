"""The agent's event loop: connections, requests as work, and what happens on this host meanwhile.

One thread. A request is Work: it runs until it must wait, and again when a database has something
new, when its time is due, or when its client has hung up. Requests for one tap take turns.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import syslog
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import DEFAULT_OVSDB
from pyqemu_ifd import wire
from pyqemu_ifd.keeper import SETTLE, PolicyKeeper
from pyqemu_ifd.pool import Interest, Pool
from pyqemu_ifd.report import Report
from pyqemu_ifd.requests import Context, Gone, serve
from pyqemu_ifd.tidy import Tidier
from pyqemu_ifup.agent import REQUEST_MAX
from pyqemu_ifup.linux_bridge import LinkEvents
from pyqemu_ifup.manners import explain_bug, log
from pyqemu_ifup.stamp import find_here

CONNECTIONS_MAX = 1024
CONNECTIONS_OF_USER = 64
"""Connections at a time: of all, and of each user but root."""
SILENCE = 5.0
"""Seconds that a connection may take to send its request."""
CHORES = 5.0
"""Seconds between looks for a database that has come up since."""


@dataclass
class Connection:
    """One client: its socket, who it is, and what becomes of its request."""

    socket: socket.socket
    peer: wire.Peer
    since: float
    request: wire.Request | None = None
    stopped: str | None = None
    heard: bool = True
    """Whether the loop listens to it."""

    def send(self, packet: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """Send one packet; a client that has gone, or that does not read, stops its request."""
        try:
            if descriptors:
                socket.send_fds(self.socket, [packet], list(descriptors))
            else:
                self.socket.send(packet)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EAGAIN, errno.ENOTCONN,
                                   errno.EMSGSIZE):
                raise
            self.stopped = self.stopped or "the client has hung up"


@dataclass
class Job:
    """Work under way: for a connection, or the agent's own (connection None)."""

    tap: str
    work: Generator[float, None, None]
    connection: Connection | None = None
    due: float = 0.0
    started: float = field(default_factory=time.monotonic)


class Server:
    """The agent. `run` serves on a listening socket until it is told to stop."""

    def __init__(self, listener: socket.socket, keeper: PolicyKeeper) -> None:
        self.listener = listener
        self.keeper = keeper
        self.pool = Pool()
        self.events = LinkEvents()
        self.report = Report()
        self.here = find_here()
        self.tidier = Tidier(self.pool, keeper, self.here)
        self.connections: dict[int, Connection] = {}
        self.jobs: dict[str, deque[Job]] = {}
        """Work for each tap, the first of which is under way."""
        self.stopping = False
        self._poll = select.epoll()
        self._watched: dict[int, int] = {}
        """The descriptors of the databases, which come and go, and what they are waited for."""
        self._databases_due: float | None = None
        self._reload_due: float | None = None
        self._chores_due = 0.0

    def run(self, notify: Callable[[str], None], watchdog: float | None) -> None:
        """Serve until SIGTERM or SIGINT; finish what has begun, then return.

        `notify` tells the supervisor (sd_notify(3)), every `watchdog` / 2 seconds where it asks.
        """
        wakeup = self._catch_signals()
        self.listener.setblocking(False)
        for descriptor in (self.listener, self.keeper, self.events, wakeup):
            self._poll.register(descriptor, select.EPOLLIN)
        self._chores()
        self.tidier.everything()
        notify("READY=1")
        beat = 0.0
        while not (self.stopping and not self.jobs):
            now = time.monotonic()
            if watchdog is not None and now >= beat:
                notify("WATCHDOG=1")
                beat = now + watchdog / 2
            self._turn(beat if watchdog is not None else None)
        notify("STOPPING=1")
        self.close()

    def close(self) -> None:
        """Hang up on everybody."""
        for connection in list(self.connections.values()):
            self._drop(connection)
        self.events.close()
        self.pool.close()
        self.keeper.close()
        self._poll.close()

    def _catch_signals(self) -> int:
        def stop(_number: int, _frame: object) -> None:
            self.stopping = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        return read_end

    def _turn(self, beat: float | None) -> None:
        """Wait for the next thing to happen, and deal with it."""
        due = self._watch_databases(beat)
        timeout = max(0.0, due - time.monotonic()) if due is not None else -1
        ready = self._poll.poll(timeout)
        changed = self._databases_due is not None and time.monotonic() >= self._databases_due
        for descriptor, events in ready:
            if descriptor == self.listener.fileno():
                self._accept()
            elif descriptor == self.keeper.fileno():
                self.keeper.drain()
                self._reload_due = time.monotonic() + SETTLE
            elif descriptor == self.events.fileno():
                self.tidier.take(self.events.read())
            elif descriptor in self.connections:
                self._hear(self.connections[descriptor], events)
            else:
                changed = True
        now = time.monotonic()
        if self._reload_due is not None and now >= self._reload_due:
            self._reload_due = None
            self.keeper.load()
            self._chores_due = 0.0
        if now >= self._chores_due:
            self._chores()
        for connection in list(self.connections.values()):
            if connection.request is None and now - connection.since > SILENCE:
                self._drop(connection)
        # NOTE: only now, and then whoever waits looks: what is taken in otherwise wakes nobody.
        if changed:
            self.pool.refresh()
        self._tidy()
        self._work(changed)

    def _watch_databases(self, beat: float | None) -> float | None:
        """Watch what the databases wait for; return when something is due, None for nothing."""
        interest = Interest()
        for database in self.pool.databases.values():
            database.wait(interest)
        for descriptor in self._watched.keys() - interest.events.keys():
            if descriptor in self.connections:
                continue  # the library has closed it, and a client got the number
            try:
                self._poll.unregister(descriptor)
            except OSError as error:
                # ENOENT, EBADF: the library has closed it.
                if error.errno not in (errno.ENOENT, errno.EBADF):
                    raise
        for descriptor, events in interest.events.items():
            try:
                self._poll.modify(descriptor, events)
            except FileNotFoundError:
                self._poll.register(descriptor, events)
        self._watched = interest.events
        self._databases_due = interest.due
        times = [interest.due, beat, self._reload_due, self._chores_due, self.tidier.due]
        times += [jobs[0].due for jobs in self.jobs.values()]
        times += [c.since + SILENCE for c in self.connections.values() if c.request is None]
        return min((each for each in times if each is not None), default=None)

    def _chores(self) -> None:
        """Connect to the databases that this host has by now."""
        self._chores_due = time.monotonic() + CHORES
        policy = self.keeper.policy
        networks = policy.networks.values() if policy is not None else ()
        self.pool.open_new([DEFAULT_OVSDB, *(network.ovsdb for network in networks)])

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # EMFILE and its like: those who wait are served when others have gone.
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM,
                                       errno.ECONNABORTED):
                    raise
                self.report.fault(f"cannot accept: {error.strerror}")
                return
            peer = wire.peer_of(accepted)
            of_user = sum(c.peer.uid == peer.uid for c in self.connections.values())
            full = peer.uid != 0 and of_user >= CONNECTIONS_OF_USER
            if self.stopping or full or len(self.connections) >= CONNECTIONS_MAX:
                accepted.close()
                self.report.refused += 1
                continue
            accepted.setblocking(False)
            connection = Connection(accepted, peer, time.monotonic())
            self.connections[accepted.fileno()] = connection
            self._poll.register(accepted, select.EPOLLIN | select.EPOLLRDHUP)

    def _drop(self, connection: Connection) -> None:
        del self.connections[connection.socket.fileno()]
        self._ignore(connection)
        connection.socket.close()

    def _ignore(self, connection: Connection) -> None:
        # NOTE: epoll(7) always tells of a hang-up, also to those who asked for nothing.
        if connection.heard:
            self._poll.unregister(connection.socket)
            connection.heard = False

    def _hear(self, connection: Connection, events: int) -> None:
        """Take a client's request, or that it stops it."""
        if connection.request is not None:
            # Whatever comes after the request, its end among it, stops it.
            connection.stopped = connection.stopped or "the client has hung up"
            self._ignore(connection)
            return
        try:
            data, descriptors, flags, _ = socket.recv_fds(
                connection.socket, REQUEST_MAX + 1, 2
            )
        except BlockingIOError:
            return
        except ConnectionResetError:
            self._drop(connection)
            return
        try:
            if not data:
                self._drop(connection)
                return
            if flags & socket.MSG_CTRUNC:
                raise Failure(Status.USAGE, "not a request", "it has more than one descriptor",
                              "see docs/agent.md")
            self._begin(connection, wire.parse_request(data, len(descriptors)), descriptors)
        except wire.UnknownVersion:
            self._end(connection, b"?another version of the wire")
        except Failure as failure:
            connection.send(b"-" + os.fsencode(f"pyqemu-ifd: {failure}"))
            self._end(connection, b"=%d" % failure.status)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _begin(
        self, connection: Connection, request: wire.Request, descriptors: list[int]
    ) -> None:
        connection.request = request
        if request.verb == "agent":
            answer = self.report.as_object(self)
            connection.send(b"+" + json.dumps(answer).encode())
            self._end(connection, b"=0")
            return
        context = Context(self.pool, self.keeper, self.here, connection.peer, connection.send,
                          lambda: connection.stopped)
        try:
            place = wire.place_of(descriptors[0]) if descriptors else None
            tap, work = serve(request, place, context)
        except Gone as gone:
            self._end(connection, b"?" + os.fsencode(str(gone)))
            return
        self._queue(Job(tap, work, connection))

    def _queue(self, job: Job) -> None:
        self.jobs.setdefault(job.tap, deque()).append(job)

    def _tidy(self) -> None:
        for tap, work in self.tidier.work():
            self._queue(Job(tap, work))

    def _work(self, changed: bool) -> None:
        """Run every job that may have something to do."""
        now = time.monotonic()
        for tap in list(self.jobs):
            while tap in self.jobs:
                job = self.jobs[tap][0]
                stopped = job.connection is not None and job.connection.stopped is not None
                if not (changed or stopped or now >= job.due):
                    break
                if not self._advance(job):
                    break
                self.jobs[tap].popleft()
                if not self.jobs[tap]:
                    del self.jobs[tap]

    def _advance(self, job: Job) -> bool:
        """Run a job until it waits or ends; tell whether it has ended."""
        status = Status.DONE
        try:
            job.due = time.monotonic() + next(job.work)
            return False
        except StopIteration:
            pass
        except Failure as failure:
            status = failure.status
            self._tell_failure(job, str(failure))
        except Exception as error:  # NOTE: a bug in one request must not end the others.
            status = Status.BUG
            self._tell_failure(job, explain_bug(error))
        if job.connection is not None:
            request = job.connection.request
            assert request is not None
            self.report.count(request.verb, status, time.monotonic() - job.started)
            self._end(job.connection, b"=%d" % status)
        return True

    def _tell_failure(self, job: Job, text: str) -> None:
        self.report.fault(f"{job.tap}: {text}")
        program = "pyqemu-ifd"
        if job.connection is not None:
            request = job.connection.request
            assert request is not None
            program = {"up": "pyqemu-ifup", "down": "pyqemu-ifdown"}.get(
                request.verb, "pyqemu-bridge-helper"
            )
            job.connection.send(b"-" + os.fsencode(f"{program}: {job.tap}: {text}"))
        log(syslog.LOG_ERR, f"{job.tap}: {text}")

    def _end(self, connection: Connection, packet: bytes) -> None:
        connection.send(packet)
        self._drop(connection)


def listen(path: str) -> socket.socket:
    """Return a socket that listens at `path`, in place of one that nobody listens at any more.

    Raises Failure (75) where an agent does.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code in (0, errno.EAGAIN):
        raise Failure(Status.TRY_AGAIN, f"an agent listens at {path} already", "",
                      "stop it first")
    if code == errno.ECONNREFUSED:
        os.unlink(path)
    before = os.umask(0)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(4096)
    return listener

