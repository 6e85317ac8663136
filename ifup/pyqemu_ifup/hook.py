"""How a hook behaves as QEMU's child: descriptors, signals, the deadline, and what it says.

QEMU gives its scripts its own standard descriptors (fd 1 may be its QMP monitor), the tap's
descriptor without close-on-exec, its signal mask (SIGALRM, SIGIO, SIGUSR1, SIGBUS blocked), its
whole environment and its working directory, and waits for ever (QEMU net/tap.c,
os-posix.c:qemu_signal_init).

Imports nothing but what the interpreter has loaded anyway, and small C modules.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import gc
import os
import select
import signal
import stat
import sys
import syslog
import time
from _thread import get_native_id
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from pyqemu_ifconf.failure import Failure, Status, for_user
from pyqemu_ifconf.policy import POLICY_VARIABLE
from pyqemu_ifconf.shell import ifctl, printable, quote, readable
from pyqemu_ifup.deadline import GRACE, TAKEN_BACK, TOO_LATE, Deadline

TUN = os.makedev(10, 200)
"""/dev/net/tun (Documentation/admin-guide/devices.txt)."""
TUNGETIFF = 0x800454D2
"""_IOR('T', 210, unsigned int) of linux/if_tun.h."""
IFREQ_SIZE = 40
IFNAMSIZ = 16

SLACK = 0.1
"""Seconds beyond the deadline after which whatever still waits is broken off."""
LINE_MAX = 2000
"""Bytes of one line that is said or logged: less than a pipe's or a syslog's least."""
LATE = 0.3
"""Seconds beyond all that, after which the process ends though it cannot even be broken off."""
PATIENCE = 0.2
"""Seconds that whoever reads stderr or syslog may take for a line; then it is lost."""
RENEWAL = 0.01
"""Seconds of the patience with syslog that come back each second."""
MUTE = "something does not answer"
LOG_SOCKET = "/dev/log"
SAFE_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def open_standard_descriptors() -> None:
    """Give 0 and 1 to /dev/null, and 2 too where it is closed.

    Standard input may be QEMU's monitor and standard output its QMP channel. A closed one would
    be taken by the next descriptor opened here, a netlink socket say.
    """
    null = os.open("/dev/null", os.O_RDWR)
    while null <= 2:
        null = os.dup(null)
    os.dup2(null, 0)
    os.dup2(null, 1)
    try:
        os.fstat(2)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        os.dup2(null, 2)


def inherited_taps() -> list[str]:
    """Return the names of the taps whose descriptors we hold, by TUNGETIFF on each.

    A name that is not ASCII comes with surrogate escapes, as from os.fsdecode().
    """
    names = (read_tap_name(number) for number in map(int, os.listdir("/proc/self/fd")))
    return [name for name in names if name is not None]


def read_tap_name(descriptor: int) -> str | None:
    """Return the name of the tap that a descriptor is of, None where it is no tap's.

    Only a descriptor of /dev/net/tun is asked: what another device makes of TUNGETIFF is its own
    affair (a terminal that has hung up says EIO).
    """
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISCHR(found.st_mode) or found.st_rdev != TUN:
            return None
        request = fcntl.ioctl(descriptor, TUNGETIFF, bytes(IFREQ_SIZE))
    except OSError as error:
        # EBADFD: not attached to a tap yet; EBADF: the descriptor of the listing itself.
        if error.errno in (errno.EBADFD, errno.EBADF):
            return None
        raise
    return os.fsdecode(request[:IFNAMSIZ].split(b"\0", 1)[0])


def settle() -> None:
    """Make the process fit for work, whatever QEMU or a script left it with.

    The tap's descriptor is closed with all others above 2: a process that holds it keeps the tap
    alive after QEMU. Children inherit none of it: SIGPIPE and SIGXFSZ are ignored here only.
    """
    # NOTE: a process this short leaves the collector nothing to find; its passes over all that is
    # imported, the last one at exit, were a fifth of an up.
    gc.disable()
    atexit.register(gc.freeze)
    os.closerange(3, _descriptor_limit())
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    _make_policy_path_absolute()
    os.chdir("/")
    os.umask(0o077)
    os.environ["PATH"] = SAFE_PATH
    for name in [name for name in os.environ if name.startswith("OVS_")]:
        del os.environ[name]


def _make_policy_path_absolute() -> None:
    """Let a relative PYQEMU_IFUP_POLICY mean the caller's working directory, which we leave."""
    named = os.environ.get(POLICY_VARIABLE)
    if not named:
        return
    try:
        os.environ[POLICY_VARIABLE] = os.path.abspath(named)
    except FileNotFoundError:
        # The working directory is gone, and so is what is relative to it: the load will say so.
        return


def _descriptor_limit() -> int:
    """Return one more than the highest descriptor open."""
    return max(map(int, os.listdir("/proc/self/fd")), default=2) + 1


def prove_tap(tap: str, inherited: Iterable[str]) -> None:
    """Check that the descriptor QEMU gave us is `tap`'s; without one there is nothing to check.

    Raises Failure (77) where it is another tap's.
    """
    held = sorted(set(inherited))
    if held and tap not in held:
        raise Failure(
            Status.DENIED,
            f"not the tap that was handed over: its descriptor is of {readable(held[0])}",
            "",
            "call the hook with the name of the caller's own tap",
        )


_waited_for: dict[tuple[int, object], str] = {}
"""By thread, what is done that waits for somebody, outside every wait of ours.

The last of a thread's is the innermost.
"""


@contextmanager
def waiting_for(what: str, *, least: bool = False) -> Iterator[None]:
    """Let a run that is broken off meanwhile tell `what` it has waited for, in a clause.

    `least`: what is around it tells more, where there is something.
    """
    thread = get_native_id()
    if least and _clauses(thread):
        yield
        return
    key = thread, object()
    _waited_for[key] = what
    try:
        yield
    finally:
        del _waited_for[key]


def reading_policy(place: str) -> AbstractContextManager[None]:
    """Let a run that is broken off while it reads the policy in `place` tell so."""
    return waiting_for(
        f"the policy in {readable(place)}, or a folder on the way to it, cannot be read"
    )


def _clauses(thread: int) -> list[str]:
    # NOTE: a thread that was left behind has its own.
    return [what for (whose, _), what in list(_waited_for.items()) if whose == thread]


def who_is_mute() -> str:
    """Return in a clause what a run waits for that is broken off now."""
    return _waiting(os.getpid())


def who_holds_up(thread: int, seconds: float) -> str:
    """Return in a clause what a thread of ours, by its number, waits for after so many seconds.

    One that has worked, or waited for a processor, for the better part of them waits for nobody.
    """
    try:
        path = f"/proc/self/task/{thread}/schedstat"
        with open(path, encoding="ascii", newline="\n") as file:
            at_work, for_processor = (int(each) / 1e9 for each in file.read().split()[:2])
    except (OSError, ValueError):
        at_work = for_processor = 0.0
    if at_work + for_processor > seconds / 2:
        load, is_busy = _load()
        busy = is_busy or for_processor > at_work
        return f"this host is busy ({load})" if busy else f"there is too much to look at ({load})"
    return _waiting(thread)


def _waiting(thread: int) -> str:
    if clauses := _clauses(thread):
        return clauses[-1]
    load, is_busy = _load()
    return f"this host is busy, or {MUTE} ({load})" if is_busy else MUTE


def _load() -> tuple[str, bool]:
    """Return in words how busy this host is, and whether that is too busy."""
    waiting, processors = os.getloadavg()[0], os.cpu_count() or 1
    return f"load {waiting:.0f}, processors {processors}", waiting > 2 * processors


class _Alarm:
    """Breaks off what still waits a little after a Deadline, and ends a process that goes on.

    `given_up` returns the line that is said then, given what was waited for.
    """

    def __init__(self, given_up: Callable[[str], str]) -> None:
        from pyqemu_ifup.system.hard_end import HardEnd

        self._given_up = given_up
        self._deadline: Deadline | None = None
        self._undoes = False
        """Whether what was done is being taken back, for which there is one deadline more."""
        self._hard_end = HardEnd(_Log.program, given_up(MUTE), Status.TRY_AGAIN, self._give_up)

    def set(self, deadline: Deadline | None) -> None:
        """Ring after this deadline, and not after the one before; None: not at all."""
        if deadline is None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._hard_end.set(None)
            return
        if self._undoes and not deadline.undoes:
            return
        self._undoes = deadline.undoes
        self._deadline = deadline
        seconds = deadline.remaining() + SLACK
        signal.setitimer(signal.ITIMER_REAL, seconds)
        self._hard_end.set(seconds + LATE + (0 if deadline.undoes else GRACE))

    def ring(self, _number: int, _frame: object) -> None:
        """Break off what waits, as the handler of SIGALRM. Raises Failure (75)."""
        if self._undoes:
            self._give_up()
        assert self._deadline is not None
        late = self._deadline.expired(who_is_mute())
        self._deadline.undo()
        raise late

    def _give_up(self) -> None:
        line = self._given_up(who_is_mute())
        say(f"{_Log.program}: {line}")
        log(syslog.LOG_ERR, line)
        os._exit(Status.TRY_AGAIN)


@contextmanager
def within_deadline(
    seconds: float, *, hook: bool = True, left: str = "", tap: str | None = None
) -> Iterator[Deadline]:
    """Yield the Deadline of a hook: TERM, INT, HUP, and the end of its parent interrupt it.

    Of a person's program, which is no `hook`, the parent may end, and what it did stays done.
    `left` tells in words what becomes of what one that takes nothing back has left.

    The handlers only note the signal: what was begun is finished, and what follows is undone.
    Every wait has the time left as its limit; what waits elsewhere (a directory service, a file
    on a dead server) is broken off at the deadline by SIGALRM, which raises Failure (75). Where
    that does not end it, or an undo does not end in time, the process ends 2 s later, even where
    no handler runs. `tap` is what it is about.
    """
    parent = os.getppid()
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)

    def interrupted() -> str | None:
        if received:
            return f"received {signal.Signals(received[0]).name}"
        if hook and os.getppid() != parent:
            return f"the calling process {parent} has ended"
        return None

    def given_up(who: str) -> str:
        name = f"{readable(tap)}: " if tap is not None else ""
        return name + (half_done(tap, who) if hook else f"not done in time: {who}; try again")

    alarm = _Alarm(given_up)
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    for stop in STOP_SIGNALS:
        signal.signal(stop, note)
    signal.signal(signal.SIGALRM, alarm.ring)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    stopped, late = TAKEN_BACK, TOO_LATE
    if left:
        stopped, late = left, f"try again; {left}"
    elif not hook:
        stopped, late = "what was done stays done", "try again"
    try:
        yield Deadline(seconds, interrupted, read_end, alarm.set, stopped=stopped, late=late)
    finally:
        alarm.set(None)
        signal.set_wakeup_fd(-1)
        os.close(read_end)
        os.close(write_end)


def say(line: str, patience: float = PATIENCE) -> None:
    """Write one line to standard error; nobody there to read it is no error.

    What nobody takes in so many seconds is lost.
    """
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if not poll.poll(patience * 1000):
        return
    try:
        os.write(2, (printable(line)[:LINE_MAX] + "\n").encode("ascii"))
    except OSError as error:
        if error.errno not in (
            errno.EPIPE,
            errno.EAGAIN,
            errno.EIO,
            errno.ENOSPC,
            errno.EBADF,
            errno.EFBIG,
            errno.ECONNRESET,
            errno.ENOTCONN,
        ):
            raise


class _Log:
    """Who writes to syslog, how long that may wait, as of when, and how many lines were lost."""

    program = "pyqemu-ifup"
    aloud = False
    patience = PATIENCE
    since = 0.0
    lost = 0


def open_log(program: str, *, aloud: bool = False) -> None:
    """Let the lines of `log` be those of `program`, said `aloud` on a host without syslog."""
    _Log.program = program
    _Log.aloud = aloud


def log(priority: int, line: str) -> None:
    """Write one line to syslog, facility daemon; where nobody takes it in time, it is lost.

    All lines together wait no longer than PATIENCE, which comes back slowly; how many were lost is
    told with the first that is not.
    """
    # NOTE: not by syslog(3), which waits for ever for a daemon that is there but does not read.
    import socket

    began = time.monotonic()
    _Log.patience = min(PATIENCE, _Log.patience + (began - _Log.since) * RENEWAL)
    lines = [(priority, line)]
    if _Log.lost:
        lines.insert(0, (syslog.LOG_WARNING, f"syslog did not take {_Log.lost} lines"))
    now = time.strftime("%b %e %H:%M:%S")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(_Log.patience)
            sender.connect(LOG_SOCKET)
            for level, each in lines:
                head = f"<{syslog.LOG_DAEMON | level}>{now} {_Log.program}[{os.getpid()}]: "
                sender.send((head + printable(each)[:LINE_MAX]).encode("ascii"))
        _Log.lost = 0
    except (BlockingIOError, TimeoutError):
        _Log.lost += 1
    except OSError:
        # No syslog: there is nobody else to tell, but who has started us in the foreground.
        if _Log.aloud and priority <= syslog.LOG_INFO:
            say(f"{_Log.program}: {line}", 0)
    finally:
        _Log.since = time.monotonic()
        _Log.patience = max(0.0, _Log.patience - (_Log.since - began))


def narrator(program: str, tap: str | None) -> Callable[[str], None]:
    """Return what tells each step before it is taken: to stderr with PYQEMU_IFUP_DEBUG=1.

    `tap` is None where the steps are about all of them.
    """
    if os.environ.get("PYQEMU_IFUP_DEBUG") != "1":
        return lambda command: None
    whose = quote(tap) if tap is not None else "all taps"
    return lambda command: say(f"{program}: {whose}: {command}")


Hook = Callable[[str, list[str], Deadline], None]
"""What a hook does with a tap's name, the taps whose descriptors it was given, and its time."""


def half_done(tap: str | None, who: str) -> str:
    """Return what is said of a run that ended itself in the middle; `who` is a clause."""
    gc = ifctl("gc", *([tap] if tap is not None else []))
    return f"not done in time: {who}; what was begun could not be taken back; {gc} will"


def left_to_gc(tap: str) -> str:
    """Return in a clause what becomes of what is left of a tap, where nothing is taken back."""
    return f"{ifctl('gc', tap)} removes what is left"


def tell_left(error: BaseException, stopped: str, tap: str) -> None:
    """Have the failure of a run that was stopped tell that gc has to end it."""
    if isinstance(error, Failure) and error.remedy == stopped:
        error.remedy = left_to_gc(tap)


def run_hook(
    program: str, seconds: float, body: Hook, left: Callable[[str], str] = lambda tap: ""
) -> int:
    """Run `body` with the one argument of a hook, the tap's name, and return the exit status.

    `left` tells of a tap what is as for `within_deadline`.
    Says a failure once, on stderr and to syslog. An exception that is not a Failure is a bug: one
    line on stderr, the traceback to syslog, 70.
    """
    open_log(program)
    arguments = sys.argv[1:]
    tap = arguments[0] if arguments else ""
    try:
        open_standard_descriptors()
        inherited = inherited_taps()
        settle()
        if len(arguments) != 1:
            say(f"usage: {program} TAP")
            return int(Status.USAGE)
        with within_deadline(seconds, left=left(tap), tap=tap) as deadline:
            body(tap, inherited, deadline)
    except Failure as failure:
        _report(program, tap, str(failure if os.geteuid() == 0 else for_user(failure)))
        return int(failure.status)
    except Exception as error:  # NOTE: the outermost handler; all else catches by name.
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            _report(
                program,
                tap,
                f"cannot go on: {error.strerror}; raise the limit of open files "
                f"of the calling process",
            )
            return int(Status.REFUSED)
        _report(program, tap, explain_bug(error))
        return int(Status.BUG)
    return int(Status.DONE)


def explain_bug(error: Exception) -> str:
    """Write the traceback of `error`, which is being handled, to syslog and return the one line."""
    import traceback

    for line in traceback.format_exc().splitlines():
        log(syslog.LOG_ERR, line)
    return (
        f"internal error: {type(error).__name__}: {error}; "
        "the traceback is in syslog, please report it"
    )


def _report(program: str, tap: str, text: str) -> None:
    say(f"{program}: {readable(tap)}: {text}")
    log(syslog.LOG_ERR, f"{readable(tap)}: {text}")


def program_name(argv: list[str]) -> str:
    """Return the name that the program was called by, without its folder."""
    return os.path.basename(argv[0]) if argv and argv[0] else os.path.basename(sys.executable)
