"""An agent's event loop: connections, requests as tasks, and what happens on this host meanwhile.

One thread. A request is a task: it runs until it must wait, and again when a database has something
new, when its time is due, when its client has hung up, or when other work on the same tap has
ended. A turn of the loop is short, whatever there is to do: what is left over is the next one's.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from pyqemu_ifconf.failure import Failure, Status
from pyqemu_ifconf.kinds.bridge import DEFAULT_OVSDB
from pyqemu_ifconf.shell import readable
from pyqemu_ifd import wire
from pyqemu_ifd.cache import PolicyCache
from pyqemu_ifd.closer import PROD, Closer
from pyqemu_ifd.connection import Connection
from pyqemu_ifd.ends import Ends
from pyqemu_ifd.keyed_lock import KeyedLock
from pyqemu_ifd.pool import Interest, Pool
from pyqemu_ifd.reconcile import Chore, Reconciler
from pyqemu_ifd.report import Report
from pyqemu_ifd.requests import Context, serve
from pyqemu_ifd.users import Users
from pyqemu_ifup import kinds
from pyqemu_ifup.access import ROOT
from pyqemu_ifup.drivers.links import LinkEvents
from pyqemu_ifup.drivers.nft_events import NftEvents, open_events
from pyqemu_ifup.hook import explain_bug, log
from pyqemu_ifup.mark import find_here
from pyqemu_ifup.system.lock import open_lock
from pyqemu_ifup.task import Task, step

CONNECTIONS_MAX = 1024
CONNECTIONS_OF_USER = 64
"""Connections at a time: of all, and of each user but root until they are really closed."""
CLOSING_MAX = 1024
"""Connections that are not really closed yet, beyond which no other is taken."""
KNOWN_MAX = 4096
"""Users that have been given what they asked for, as far as we remember."""
BACKLOG = 4096
"""Connections that may wait for root's agent."""
BACKLOG_OF_USERS = 256
"""Connections that may wait for the agent of everybody else; who comes then waits in connect(2)."""
ACCEPTS = 64
"""Connections that are taken in one turn."""
TURN = 0.02
"""Seconds of one turn's work, beyond which the rest of it is left to the next one."""
CHORES_MAX = 64
"""Taps that something is done for unasked at a time; the others wait."""
SILENCE = 5.0
"""Seconds that a connection may take to send its request."""
LOOK = 5.0
"""Seconds between looks for a database that has come up since."""
AGAIN = 1.0
"""Seconds after which whoever waits for its turn is told once more that it is not forgotten."""
RESPITE = 0.1
"""Seconds without a look at new connections, once there was no descriptor or memory for one."""
PROGRAMS = {"up": "pyqemu-ifup", "down": "pyqemu-ifdown", "tap": "pyqemu-bridge-helper"}
"""The programs in whose name a client is told of a failure."""

_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(eq=False)
class Job:
    """A task under way: for a connection, or the agent's own (connection None)."""

    tap: str
    task: Task[None]
    connection: Connection | None = None
    due: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def stopped(self) -> bool:
        """Whether its client wants no more."""
        return self.connection is not None and self.connection.stopped is not None


class Server:
    """An agent: root's, or `for_users`. `run` serves on a listening socket until told to stop.

    Root's alone does what nobody asks for.
    """

    def __init__(
        self, listener: socket.socket, cache: PolicyCache, *, for_users: bool = False
    ) -> None:
        self.listener = listener
        self.cache = cache
        self.for_users = for_users
        # NOTE: imported now: later there may be no descriptor left to read a module by.
        kinds.tap_kinds()
        kinds.makers()
        self.pool = Pool()
        self.events = None if for_users else LinkEvents()
        self.rules = None if for_users else open_events()
        self.report = Report()
        self.tap_lock = KeyedLock()
        self.closer = Closer()
        self.here = find_here()
        self.users = Users()
        self.reconciler: Reconciler | None = None
        if not for_users:
            self.reconciler = Reconciler(self.pool, cache, self.tap_lock, self.users, self.here)
        self.connections: dict[int, Connection] = {}
        self.jobs: dict[Job, None] = {}
        """What is under way, in the order in which it came."""
        self.stopping = False
        self._chores: dict[str, Chore] = {}
        """What is to be done unasked, for each tap, when there is room for it."""
        self._silent: dict[Connection, None] = {}
        """Those that have not sent their request yet, the earliest first."""
        self._of_user: Counter[int] = Counter()
        """Connections of each user that are not really closed yet."""
        self._known: set[int] = set()
        """Users that have been given what they asked for."""
        self._closing = 0
        """Those of all users that are being closed."""
        self._poll = select.epoll()
        self._listen_due: float | None = None
        self._databases_due: float | None = None
        self._reload_asked = False
        """Whether a signal asks for it."""
        self._look_asked = False
        """Whether to look at every tap when the policy has been read, though it is the same."""
        self._policy = cache.policy
        self._reads = cache.reads
        """What the policy was when it was heeded last, and how often it had been read."""
        self._has_looked = False
        """Whether the policy's files have been looked at in this turn."""
        self._look_due = 0.0

    def run(self, notify: Callable[[str], None], watchdog: float | None) -> None:
        """Serve until SIGTERM or SIGINT; finish what has begun, then return.

        SIGHUP has the policy read again. `notify` tells the supervisor (sd_notify(3)), every
        `watchdog` / 2 seconds where it asks.
        """
        wakeup, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._catch_signals(write_end)
        self.closer.wakeup = write_end
        self.listener.setblocking(False)
        for descriptor in (self.listener, self.cache, wakeup):
            self._poll.register(descriptor, select.EPOLLIN)
        self._look_for_databases()
        for events in self._sources():
            self._poll.register(events, select.EPOLLIN)
        self._look_at_everything()
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

    def _sources(self) -> list[LinkEvents | NftEvents | Ends]:
        """Return what tells of what happens on this host."""
        ends = self.reconciler.ends if self.reconciler is not None else None
        return [each for each in (self.events, self.rules, ends) if each is not None]

    def _close(self) -> None:
        """Hang up on everybody."""
        for connection in list(self.connections.values()):
            self._drop(connection)
        for events in self._sources():
            events.close()
        self.pool.close()
        self.cache.close()
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
        signal.signal(PROD, lambda _number, _frame: None)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def _turn(self, wakeup: int, beat: float | None) -> None:
        """Wait for the next thing to happen, and deal with it."""
        changed = self._wait(beat)
        self._has_looked = False
        changed = self._take_in(wakeup) or changed
        self.closer.prod()
        now = time.monotonic()
        changed = self._do_what_is_due(now) or changed
        # NOTE: only now, and then whoever waits looks: what is taken in otherwise wakes nobody.
        if changed or (self._databases_due is not None and now >= self._databases_due):
            self.pool.refresh()
            changed = True
        if self.reconciler is not None and not self.stopping:
            self._reconcile(self.reconciler)
        self._work(changed)

    def _take_in(self, wakeup: int) -> bool:
        """Take what has come at each descriptor; tell whether a request has."""
        comes = changed = False
        for descriptor, events in self._poll.poll(0):
            if descriptor == self.listener.fileno():
                comes = True
            elif descriptor == wakeup:
                os.read(wakeup, 4096)
            elif descriptor == self.cache.fileno():
                self.cache.take()
            elif self.events is not None and descriptor == self.events.fileno():
                assert self.reconciler is not None
                self.reconciler.take(self.events.read())
            elif self.reconciler is not None and descriptor == self.reconciler.ends.fileno():
                self.reconciler.take_ends()
            elif self.rules is not None and descriptor == self.rules.fileno():
                assert self.reconciler is not None
                self.reconciler.take_rules(self.rules.read())
            elif descriptor in self.connections:
                # NOTE: a request looks at the databases as they are when it comes.
                changed = self._hear(self.connections[descriptor], events) or changed
        if comes:
            # NOTE: last, so that no number of a connection that has gone is another's by now.
            self._accept()
        return changed

    def _do_what_is_due(self, now: float) -> bool:
        """Do what this time brings; tell whether another policy is in force."""
        if self._listen_due is not None and now >= self._listen_due:
            self._listen_due = None
            self._poll.register(self.listener, select.EPOLLIN)
        if self._reload_asked:
            self._reload_asked, self._look_asked = False, True
            self.cache.reload()
        elif self.cache.due is not None and now >= self.cache.due:
            self._look_at_policy()
        changed = self._heed_policy()
        if now >= self._look_due:
            self._look_for_databases()
        while (first := next(iter(self._silent), None)) and now - first.since >= SILENCE:
            self._drop(first)
        return changed

    def _look_at_policy(self) -> None:
        """Look whether the policy has changed, once in a turn."""
        if not self._has_looked:
            self._has_looked = True
            self.cache.look()

    def _heed_policy(self) -> bool:
        """Do what a policy that has been read calls for; tell whether one has."""
        if self.cache.reads == self._reads:
            return False
        before, self._policy, self._reads = self._policy, self.cache.policy, self.cache.reads
        if self._look_asked or self._policy is not before:
            self._look_asked = False
            # NOTE: who was left lost, for it was denied, may be allowed by now. A file beside the
            # policy's may have had it read again, and that is no news.
            self._look_at_everything()
            self._look_due = 0.0
        return True

    def _look_at_everything(self) -> None:
        if self.reconciler is not None:
            self.reconciler.everything()

    def _reconcile(self, reconciler: Reconciler) -> None:
        """Take on what is to be done unasked; where that cannot be told, look again later."""
        try:
            for tap, chore in reconciler.work():
                self._chores.setdefault(tap, chore)
        except Exception as error:  # NOTE: nothing that is found on this host ends the agent.
            why = str(error) if isinstance(error, Failure) else explain_bug(error)
            line = f"cannot look at what has changed: {why}"
            self.report.fault(line)
            log(syslog.LOG_ERR, line)
            reconciler.later()
        if self._chores:
            self._look_at_policy()
        room = CHORES_MAX - sum(job.connection is None for job in self.jobs)
        for tap in [*self._chores][: max(0, room)]:
            self.jobs[Job(tap, self._chores.pop(tap)())] = None

    def _wait(self, beat: float | None) -> bool:
        """Wait until something happens or is due; tell whether a database has something new."""
        interest = Interest()
        for database in self.pool.databases.values():
            database.wait(interest)
        self._databases_due = interest.due
        times = [
            interest.due,
            beat,
            self._listen_due,
            self.cache.due if self.cache.reads == self._reads else 0.0,
            self._look_due,
            None if self.stopping or self.reconciler is None else self.reconciler.due,
            self.closer.due,
        ]
        times += [job.due for job in self.jobs]
        times += [connection.since + SILENCE for connection in [*self._silent][:1]]
        due = min((each for each in times if each is not None), default=None)
        # NOTE: the library closes its sockets when it likes, and tells nobody: their numbers are
        # good for this one wait, and what lasts has nothing but what we close ourselves.
        poll = select.poll()
        poll.register(self._poll, select.POLLIN)
        for descriptor, events in interest.events.items():
            poll.register(descriptor, events)
        timeout = max(0.0, due - time.monotonic()) * 1000 if due is not None else None
        ready = {descriptor for descriptor, _ in poll.poll(timeout)}
        return not ready.isdisjoint(interest.events)

    def _look_for_databases(self) -> None:
        """Connect to the databases that this host has by now."""
        self._look_due = time.monotonic() + LOOK
        policy = self.cache.policy
        named = policy.databases if policy is not None else ()
        try:
            self.pool.open_new([DEFAULT_OVSDB, *named])
        except Failure as failure:
            self.report.fault(str(failure))

    def _accept(self) -> None:
        """Take some of the connections that wait."""
        for _ in range(ACCEPTS):
            self._count_closed()
            if self._closing >= CLOSING_MAX:
                self._listen_later()
                return
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
                self._listen_later()
                return
            self._take_on(accepted)

    def _listen_later(self) -> None:
        self._poll.unregister(self.listener)
        self._listen_due = time.monotonic() + RESPITE

    def _take_on(self, accepted: socket.socket) -> None:
        """Listen to a client, where there is room for it."""
        peer = wire.peer_of(accepted)
        self._of_user[peer.uid] += 1
        full = peer.uid != ROOT and (
            not self.for_users or self._of_user[peer.uid] > CONNECTIONS_OF_USER
        )
        if not full and len(self.connections) >= CONNECTIONS_MAX:
            # NOTE: a client that is in earnest asks at once.
            first = next(iter(self._silent), None)
            if first is not None:
                self.report.refused += 1
                self._drop(first)
            full = first is None
        if full:
            self.report.refused += 1
            self._hang_up(peer.uid, accepted)
            return
        accepted.setblocking(False)
        connection = Connection(accepted, peer, time.monotonic())
        self.connections[accepted.fileno()] = connection
        self._silent[connection] = None
        self._poll.register(accepted, select.EPOLLIN | select.EPOLLRDHUP)

    def _drop(self, connection: Connection) -> None:
        del self.connections[connection.socket.fileno()]
        self._silent.pop(connection, None)
        self._ignore(connection)
        self._hang_up(connection.peer.uid, connection.socket)

    def _hang_up(self, uid: int, connection: socket.socket) -> None:
        self._closing += 1
        self.closer.hang_up(uid, connection.detach())

    def _count_closed(self) -> None:
        """Let go of the connections that are really closed by now."""
        while self.closer.closed:
            uid = self.closer.closed.popleft()
            self._closing -= 1
            self._of_user[uid] -= 1
            if not self._of_user[uid]:
                del self._of_user[uid]

    def _ignore(self, connection: Connection) -> None:
        # NOTE: epoll(7) always tells of a hang-up, also to those who asked for nothing.
        if connection.heard:
            self._poll.unregister(connection.socket)
            connection.heard = False

    def _hear(self, connection: Connection, events: int) -> bool:
        """Take a client's request, or that it stops it; tell whether there is work now."""
        try:
            if events & select.EPOLLRDHUP:
                connection.stopped = connection.stopped or "the client has hung up"
            if connection.request is not None:
                self._ignore(connection)
                return False
            if events & select.EPOLLHUP:
                # NOTE: it does the work itself by now.
                self._drop(connection)
                return False
            return self._take(connection)
        except Exception as error:  # NOTE: no client's packet or descriptor ends the agent.
            text = explain_bug(error)
            self.report.fault(text)
            connection.say(f"pyqemu-ifd: {text}")
            if connection.socket.fileno() in self.connections:
                self._end(connection, b"=%d" % Status.BUG)
            return False

    def _take(self, connection: Connection) -> bool:
        uid = connection.peer.uid
        taken: list[int] = []
        try:
            # NOTE: the first look is at the bytes alone, and whether a descriptor comes with them.
            if uid == ROOT or not wire.look_at_request(connection.socket, 0)[2]:
                request, place = self._look(connection, taken)
            elif self.closer.has_room(uid, known=uid in self._known):
                request, place = self.closer.apart(
                    uid, connection.socket.fileno(), partial(self._look, connection)
                )
            else:
                raise Failure(
                    Status.TRY_AGAIN,
                    "cannot take a descriptor",
                    "too many wait to be closed",
                    "try again",
                )
            connection.request = request
            del self._silent[connection]
            # NOTE: its close waits for nobody, and it goes with its QEMU.
            connection.socket.recv(1)
            while taken:
                os.close(taken.pop())
            return self._begin(connection, request, place)
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
            while taken:
                os.close(taken.pop())
        return False

    def _look(
        self, connection: Connection, taken: list[int]
    ) -> tuple[wire.Request, wire.Place | None]:
        """Return a client's request, and what its descriptor proves, which is added to `taken`.

        Raises OSError as recvmsg(2), Failure, Elsewhere.
        """
        data, descriptors, cut = wire.look_at_request(connection.socket, wire.DESCRIPTORS_MAX)
        taken += descriptors
        if not data:
            raise ConnectionResetError
        if cut and len(descriptors) < wire.DESCRIPTORS_MAX:
            raise Failure(
                Status.TRY_AGAIN, "cannot take a descriptor", "too many are open", "try again"
            )
        request = wire.parse_request(data, len(descriptors) + cut)
        keep = request.verb == "up" and connection.peer.uid == ROOT
        if not descriptors:
            return request, None
        return request, wire.place_of(descriptors[0], connection.peer, keep=keep)

    def _begin(
        self, connection: Connection, request: wire.Request, place: wire.Place | None
    ) -> bool:
        """Begin what a client asks for; tell whether it is work. Raises Elsewhere."""
        self._look_at_policy()
        if request.verb == "agent":
            answer = self.report.as_object(
                self.cache, self.pool, len(self.connections), whole=connection.peer.uid == 0
            )
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
            self.pool, self.cache, self.tap_lock, self.users, self.here, connection, name
        )
        job = Job(request.fields[0], serve(request, place, context), connection)
        # NOTE: at once: a client that hears nothing for long does the work itself.
        if self._advance(job):
            return False
        self.jobs[job] = None
        return True

    def _work(self, changed: bool) -> None:
        """Run the jobs that may have something to do, those that somebody waits for first."""
        began = time.monotonic()
        for job in self.jobs:
            waiting = job.connection
            if waiting is not None and waiting.in_line and began > waiting.told + AGAIN:
                # NOTE: a deadline that a hook counts meanwhile would pass before its turn comes.
                waiting.allow(waiting.in_line)
        ready = [job for job in self.jobs if changed or job.stopped or began >= job.due]
        line = deque(sorted(ready, key=lambda job: job.connection is None))
        while line:
            job = line.popleft()
            if time.monotonic() > began + TURN:
                job.due = 0.0
            elif job in self.jobs and self._advance(job):
                del self.jobs[job]
                line += [other for other in self.jobs if other.tap == job.tap]

    def _advance(self, job: Job) -> bool:
        """Run a job until it waits or ends; tell whether it has ended."""
        status = Status.DONE
        try:
            seconds = step(job.task)
            if seconds is not None:
                job.due = time.monotonic() + seconds
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
            # NOTE: a down ends well for everybody.
            given = status is Status.DONE and connection.request.verb != "down"
            if given and len(self._known) < KNOWN_MAX:
                self._known.add(connection.peer.uid)
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


def listen(path: str, *, for_users: bool = False) -> socket.socket:
    """Return a socket that listens at `path`, in place of one that nobody listens at any more.

    Root alone may connect, and with `for_users` everybody. Raises OSError, and Failure (75) where
    an agent listens there already.
    """
    # NOTE: nobody but root may hold this lock for long.
    lock = open_lock(f"{path}.lock")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o111 if for_users else 0o177)
    try:
        # NOTE: two that start at once must not both find a socket of nobody's.
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_stale(path)
        listener.bind(path)
        listener.listen(BACKLOG_OF_USERS if for_users else BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
        os.close(lock)
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
