"""The agent's event loop: connections, requests as work, and what happens on this host meanwhile.

One thread. A request is Work: it runs until it must wait, and again when a database has something
new, when its time is due, when its client has hung up, or when other work on the same tap has
ended.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import select
import signal
import socket
import stat
import syslog
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.policy import DEFAULT_OVSDB
from pyqemu_ifconf.shell import printable, readable
from pyqemu_ifd import wire
from pyqemu_ifd.closer import Closer
from pyqemu_ifd.keeper import SETTLE, PolicyKeeper
from pyqemu_ifd.pool import Interest, Pool
from pyqemu_ifd.report import Report
from pyqemu_ifd.requests import Context, serve
from pyqemu_ifd.tidy import Tidier
from pyqemu_ifd.turns import Turns
from pyqemu_ifd.users import Users
from pyqemu_ifup.agent import REQUEST_MAX
from pyqemu_ifup.links import LinkEvents
from pyqemu_ifup.manners import explain_bug, log
from pyqemu_ifup.nft_events import open_events
from pyqemu_ifup.stamp import find_here

CONNECTIONS_MAX = 1024
CONNECTIONS_OF_USER = 64
"""Connections at a time: of all, and of each user but root."""
BACKLOG = 4096
"""Connections that may wait for the loop."""
SILENCE = 5.0
"""Seconds that a connection may take to send its request."""
CHORES = 5.0
"""Seconds between looks for a database that has come up since."""
RESPITE = 0.1
"""Seconds without a look at new connections, once there was no descriptor or memory for one."""
PROGRAMS = {"up": "pyqemu-ifup", "down": "pyqemu-ifdown", "tap": "pyqemu-bridge-helper"}
"""The programs in whose name a client is told of a failure."""

LINE_MAX = 2000
"""Bytes of one line that a client is told."""

_GONE = (
    errno.EPIPE, errno.ECONNRESET, errno.EAGAIN, errno.ENOTCONN, errno.ENOBUFS, errno.ENOMEM,
    errno.EMSGSIZE,
)
"""How a packet fails that a client does not get: it has gone, does not read, or has no room."""
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(eq=False)
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
            if error.errno not in _GONE:
                raise
            self.stopped = self.stopped or "the client has hung up"

    def why_stopped(self) -> str | None:
        """Return why its request must stop, None where it need not, as it is this very moment."""
        # NOTE: the loop may not have heard yet: whoever waits in vain does the work himself, and
        # what is done then must not be done to it once more.
        try:
            if self.stopped is None:
                self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                self.stopped = "the client has hung up"
        except BlockingIOError:
            return None
        except ConnectionResetError:
            self.stopped = "the client has hung up"
        return self.stopped

    def say(self, line: str) -> None:
        """Send one line for standard error."""
        self.send(b"-" + printable(line).encode("ascii")[:LINE_MAX])


@dataclass(eq=False)
class Job:
    """Work under way: for a connection, or the agent's own (connection None)."""

    tap: str
    work: Generator[float, None, None]
    connection: Connection | None = None
    due: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def stopped(self) -> bool:
        """Whether its client wants no more."""
        return self.connection is not None and self.connection.stopped is not None


class Server:
    """The agent. `run` serves on a listening socket until it is told to stop."""

    def __init__(self, listener: socket.socket, keeper: PolicyKeeper) -> None:
        self.listener = listener
        self.keeper = keeper
        self.pool = Pool()
        self.events = LinkEvents()
        self.rules = open_events()
        self.report = Report()
        self.turns = Turns()
        self.closer = Closer()
        self.here = find_here()
        self.users = Users()
        self.tidier = Tidier(self.pool, keeper, self.turns, self.users, self.here)
        self.connections: dict[int, Connection] = {}
        self.jobs: dict[Job, None] = {}
        """Work under way, in the order in which it came."""
        self.stopping = False
        self._silent: dict[Connection, None] = {}
        """Those that have not sent their request yet, the earliest first."""
        self._of_user: Counter[int] = Counter()
        self._poll = select.epoll()
        self._watched: dict[int, int] = {}
        """The descriptors of the databases, which come and go, and what they are waited for."""
        self._listen_due: float | None = None
        self._databases_due: float | None = None
        self._reload_due: float | None = None
        self._reload_asked = False
        """Whether a signal asks for it: no matter what is about to be set meanwhile."""
        self._chores_due = 0.0

    def run(self, notify: Callable[[str], None], watchdog: float | None) -> None:
        """Serve until SIGTERM or SIGINT; finish what has begun, then return.

        SIGHUP has the policy read again. `notify` tells the supervisor (sd_notify(3)), every
        `watchdog` / 2 seconds where it asks.
        """
        wakeup, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._catch_signals(write_end)
        self.listener.setblocking(False)
        for descriptor in (self.listener, self.keeper, self.events, wakeup):
            self._poll.register(descriptor, select.EPOLLIN)
        if self.rules is not None:
            self._poll.register(self.rules, select.EPOLLIN)
        self._chores()
        self.tidier.everything()
        # NOTE: all that is imported stays; each pass over it would be in a hook's way.
        gc.collect()
        gc.freeze()
        notify("READY=1")
        beat: float | None = 0.0 if watchdog is not None else None
        while not self.stopping:
            beat = self._beat(notify, watchdog, beat)
            self._turn(wakeup, beat)
        notify("STOPPING=1")
        # NOTE: who connects from now on is the next agent's, or finds none.
        if self._listen_due is None:
            self._poll.unregister(self.listener)
        self._listen_due = None
        while self.jobs:
            beat = self._beat(notify, watchdog, beat)
            self._turn(wakeup, beat)
        signal.set_wakeup_fd(-1)
        os.close(wakeup)
        os.close(write_end)
        self._close()

    def _close(self) -> None:
        """Hang up on everybody."""
        for connection in list(self.connections.values()):
            self._drop(connection)
        self.events.close()
        if self.rules is not None:
            self.rules.close()
        self.pool.close()
        self.keeper.close()
        self._poll.close()

    @staticmethod
    def _beat(
        notify: Callable[[str], None], watchdog: float | None, due: float | None
    ) -> float | None:
        """Give the supervisor its sign of life where it is due; return when the next one is."""
        now = time.monotonic()
        if watchdog is None or due is None or now < due:
            return due
        notify("WATCHDOG=1")
        return now + watchdog / 2

    def _catch_signals(self, wakeup: int) -> None:
        def stop(_number: int, _frame: object) -> None:
            self.stopping = True

        def reload(_number: int, _frame: object) -> None:
            self._reload_asked = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        signal.signal(signal.SIGHUP, reload)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def _turn(self, wakeup: int, beat: float | None) -> None:
        """Wait for the next thing to happen, and deal with it."""
        due = self._watch_databases(beat)
        timeout = max(0.0, due - time.monotonic()) if due is not None else -1
        changed = False
        for descriptor, _events in self._poll.poll(timeout):
            if descriptor == self.listener.fileno():
                self._accept()
            elif descriptor == wakeup:
                os.read(wakeup, 4096)
            elif descriptor == self.keeper.fileno():
                if self.keeper.drain() and self._reload_due is None:
                    self._reload_due = time.monotonic() + SETTLE
            elif descriptor == self.events.fileno():
                self.tidier.take(self.events.read())
            elif self.rules is not None and descriptor == self.rules.fileno():
                self.tidier.guard.take(self.rules.read())
            elif descriptor in self.connections:
                # NOTE: a request looks at the databases as they are when it comes.
                changed = self._hear(self.connections[descriptor]) or changed
            else:
                changed = True
        now = time.monotonic()
        if self._listen_due is not None and now >= self._listen_due:
            self._listen_due = None
            self._poll.register(self.listener, select.EPOLLIN)
        if self._reload_asked or (self._reload_due is not None and now >= self._reload_due):
            self._reload_asked, self._reload_due = False, None
            self.keeper.load()
            # NOTE: who was left lost, for it was denied, may be allowed by now.
            self.tidier.everything()
            self._chores_due = 0.0
        if now >= self._chores_due:
            self._chores()
        for connection in list(self._silent):
            if now - connection.since < SILENCE:
                break
            self._drop(connection)
        # NOTE: only now, and then whoever waits looks: what is taken in otherwise wakes nobody.
        if changed or (self._databases_due is not None and now >= self._databases_due):
            self.pool.refresh()
            changed = True
        if not self.stopping:
            self._tidy()
        self._work(changed)

    def _tidy(self) -> None:
        """Take on what is to be done unasked; where that cannot be told, look again later."""
        try:
            for tap, work in self.tidier.work():
                self.jobs[Job(tap, work)] = None
        except Failure as failure:
            line = f"cannot look at what has changed: {failure}"
            self.report.fault(line)
            log(syslog.LOG_ERR, line)
            self.tidier.later()

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
        times = [
            interest.due, beat, self._listen_due, self._reload_due, self._chores_due,
            None if self.stopping else self.tidier.due,
        ]
        times += [job.due for job in self.jobs]
        times += [connection.since + SILENCE for connection in [*self._silent][:1]]
        return min((each for each in times if each is not None), default=None)

    def _chores(self) -> None:
        """Connect to the databases that this host has by now."""
        self._chores_due = time.monotonic() + CHORES
        policy = self.keeper.policy
        networks = policy.networks.values() if policy is not None else ()
        try:
            self.pool.open_new([DEFAULT_OVSDB, *(network.ovsdb for network in networks)])
        except Failure as failure:
            self.report.fault(str(failure))

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                if error.errno not in _SHORT:
                    raise
                self.report.fault(f"cannot take a connection: {error.strerror}")
                self._poll.unregister(self.listener)
                self._listen_due = time.monotonic() + RESPITE
                return
            peer = wire.peer_of(accepted)
            full = peer.uid != 0 and self._of_user[peer.uid] >= CONNECTIONS_OF_USER
            if full or len(self.connections) >= CONNECTIONS_MAX:
                self.closer.close(peer.uid, [accepted.detach()])
                self.report.refused += 1
                continue
            accepted.setblocking(False)
            connection = Connection(accepted, peer, time.monotonic())
            self.connections[accepted.fileno()] = connection
            self._silent[connection] = None
            self._of_user[peer.uid] += 1
            self._poll.register(accepted, select.EPOLLIN | select.EPOLLRDHUP)

    def _drop(self, connection: Connection) -> None:
        del self.connections[connection.socket.fileno()]
        self._silent.pop(connection, None)
        self._of_user[connection.peer.uid] -= 1
        if not self._of_user[connection.peer.uid]:
            del self._of_user[connection.peer.uid]
        self._ignore(connection)
        self.closer.close(connection.peer.uid, [connection.socket.detach()])

    def _ignore(self, connection: Connection) -> None:
        # NOTE: epoll(7) always tells of a hang-up, also to those who asked for nothing.
        if connection.heard:
            self._poll.unregister(connection.socket)
            connection.heard = False

    def _hear(self, connection: Connection) -> bool:
        """Take a client's request, or that it stops it; tell whether there is work now."""
        try:
            return self._take(connection)
        except Exception as error:  # NOTE: no client's packet or descriptor ends the agent.
            text = explain_bug(error)
            self.report.fault(text)
            connection.say(f"pyqemu-ifd: {text}")
            if connection.socket.fileno() in self.connections:
                self._end(connection, b"=%d" % Status.BUG)
            return False

    def _take(self, connection: Connection) -> bool:
        if connection.request is not None:
            # Whatever comes after the request, its end among it, stops it.
            connection.stopped = connection.stopped or "the client has hung up"
            self._ignore(connection)
            return False
        descriptors: list[int] = []
        try:
            # NOTE: room for all that may come: the kernel closes the rest itself, in our time.
            data, descriptors, flags, _ = socket.recv_fds(
                connection.socket, REQUEST_MAX + 1, wire.DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                self._drop(connection)
                return False
            # NOTE: where some were cut off, we had no number left for them.
            count = len(descriptors) + bool(flags & socket.MSG_CTRUNC)
            connection.request = wire.parse_request(data, count)
            del self._silent[connection]
            place = wire.place_of(descriptors[0], connection.peer) if descriptors else None
            return self._begin(connection, connection.request, place)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            self._drop(connection)
        except wire.Elsewhere as reason:
            self._end(connection, b"?" + str(reason).encode("ascii"))
        except Failure as failure:
            connection.say(f"pyqemu-ifd: {failure}")
            self._end(connection, b"=%d" % failure.status)
        finally:
            self.closer.close(connection.peer.uid, descriptors)
        return False

    def _begin(
        self, connection: Connection, request: wire.Request, place: wire.Place | None
    ) -> bool:
        """Begin what a client asks for; tell whether it is work. Raises Elsewhere."""
        if request.verb == "agent":
            answer = self.report.as_object(self, whole=connection.peer.uid == 0)
            connection.send(b"+" + json.dumps(answer).encode("ascii"))
            self._end(connection, b"=0")
            return False
        if self.stopping:
            raise wire.Elsewhere("the agent ends")
        if place is not None and place.netns != self.here.netns:
            raise wire.Elsewhere("another network namespace")

        def name(tap: str) -> None:
            job.tap = tap

        context = Context(
            self.pool, self.keeper, self.turns, self.users, self.here, connection, name
        )
        job = Job(request.fields[0], serve(request, place, context), connection)
        self.jobs[job] = None
        return True

    def _work(self, changed: bool) -> None:
        """Run every job that may have something to do."""
        now = time.monotonic()
        ready = deque(job for job in self.jobs if changed or job.stopped or now >= job.due)
        while ready:
            job = ready.popleft()
            if job in self.jobs and self._advance(job):
                del self.jobs[job]
                ready += [other for other in self.jobs if other.tap == job.tap]

    def _advance(self, job: Job) -> bool:
        """Run a job until it waits or ends; tell whether it has ended."""
        status = Status.DONE
        try:
            pause = next(job.work, None)
            if pause is not None:
                job.due = time.monotonic() + pause
                return False
        except Failure as failure:
            status = failure.status
            self._tell(job, str(failure))
        except Exception as error:  # NOTE: a bug in one request must not end the others.
            status = Status.BUG
            self._tell(job, explain_bug(error))
        connection = job.connection
        if connection is not None and connection.request is not None:
            self.report.count(connection.request.verb, status, time.monotonic() - job.started)
            self._end(connection, b"=%d" % status)
        return True

    def _tell(self, job: Job, text: str) -> None:
        """Tell of a failure: its client, syslog, and whoever asks for the last error."""
        line = f"{readable(job.tap)}: {text}"
        self.report.fault(line)
        log(syslog.LOG_ERR, line)
        connection = job.connection
        if connection is not None and connection.request is not None:
            connection.say(f"{PROGRAMS[connection.request.verb]}: {line}")

    def _end(self, connection: Connection, packet: bytes) -> None:
        connection.send(packet)
        self._drop(connection)


def listen(path: str) -> socket.socket:
    """Return a socket that listens at `path`, in place of one that nobody listens at any more.

    Raises Failure (75) where an agent does, and OSError.
    """
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0)
    try:
        # NOTE: two that start at once must not both find a socket of nobody's.
        fcntl.flock(folder, fcntl.LOCK_EX)
        _remove_stale(path)
        listener.bind(path)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
        os.close(folder)
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at. Raises Failure (75) where somebody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code in (0, errno.EAGAIN):
        raise Failure(
            Status.TRY_AGAIN, f"an agent listens at {readable(path)} already", "", "stop it first"
        )
    # NOTE: connect(2) refuses what is no socket with the same error.
    if code == errno.ECONNREFUSED and stat.S_ISSOCK(os.lstat(path).st_mode):
        os.unlink(path)
