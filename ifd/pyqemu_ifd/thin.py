"""The hooks as clients of the agent (docs/agent.md): whatever it does not do is done here.

Loads C modules only, and no Python but what `python3 -I -S` has loaded: the interpreter's own
start is most of what a hook costs. So a few lines of pyqemu_ifup.hook stand here once more, and
the rest of the toolkit is imported where the agent does not do the work.
"""

import _socket
import errno
import fcntl
import posix
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Iterable
else:
    import _signal

VERBS = {"pyqemu-ifup": b"up", "pyqemu-ifdown": b"down"}
VERSION = b"pyqemu-ifup/1"
ROOT_SOCKET = b"/run/pyqemu-ifup/agent.sock"
USERS_SOCKET = b"/run/pyqemu-ifup/users.sock"

TUNGETIFF = 0x800454D2
"""_IOR('T', 210, unsigned int) of linux/if_tun.h."""
TUN, S_IFMT, S_IFCHR = 10 << 8 | 200, 0o170000, 0o020000
"""/dev/net/tun, as os.makedev() makes it, and how stat(2) tells a character device."""
NO_TAP = (errno.EBADFD, errno.EBADF)
"""Not attached to a tap yet; and the descriptor of the listing itself."""

PACKET_MAX = 65536
SLICE = 0.25
"""Seconds of the longest wait: the end of the parent turns no descriptor ready."""
ACCEPT = 2.0
"""Seconds in which the agent must tell how long it may take."""
CAP_NET_ADMIN = 12
LONG = 8 if sys.maxsize >> 32 else 4
"""Bytes of the two numbers of a struct timeval."""
MARGIN = 3.0
"""Seconds beyond that deadline: the 2 s in which it may take back what it did, and one more."""
TRY_AGAIN = 75
GONE = "the agent has ended, or has too many connections"
LINE_MAX = 2000
"""Bytes of one line that is said: less than a pipe's least."""
PATIENCE = 0.2
"""Seconds that whoever reads stderr or syslog may take for a line; then it is lost."""
LOG_ERR = 3 << 3 | 3
"""LOG_DAEMON | LOG_ERR of syslog.h."""
SIGNALS: dict[int, str] = {
    _signal.SIGTERM: "SIGTERM",
    _signal.SIGINT: "SIGINT",
    _signal.SIGHUP: "SIGHUP",
}


def up() -> int:
    """Run pyqemu-ifup with the arguments of this process and return its exit status."""
    return run("pyqemu-ifup")


def down() -> int:
    """Run pyqemu-ifdown with the arguments of this process and return its exit status."""
    return run("pyqemu-ifdown")


def run(program: str, folders: "Iterable[str]" = ()) -> int:
    """Run the hook `program` with the arguments of this process and return its exit status.

    `folders` are those of the packages, which join the path where the work is done here.
    """
    status = ask(program)
    if status is not None:
        return status
    sys.path += folders
    if program == "pyqemu-ifup":
        from pyqemu_ifup.main import main
    else:
        from pyqemu_ifdown.main import main
    return main()


def ask(program: str) -> int | None:
    """Let the agent do the work; return the exit status, or None where it must be done here.

    What is irregular is left to be done, or told, here: a tap's descriptor is open then as it was.
    """
    environ = posix.environ
    uid = posix.geteuid()
    path = USERS_SOCKET if uid else ROOT_SOCKET
    if (uid, posix.getegid()) == (posix.getuid(), posix.getgid()):
        path = environ.get(b"PYQEMU_IFUP_SOCKET", path)
    if len(sys.argv) != 2 or not path or environ.get(b"PYQEMU_IFUP_POLICY"):
        return None
    tap = sys.argv[1]
    if not is_valid_name(tap):
        return None
    try:
        open_standard_descriptors()
        held, highest = find_taps()
        if held and tap not in held:
            return None
        # NOTE: all others go, other taps among them: who holds one keeps it alive after QEMU.
        descriptor = 3
        if held:
            posix.dup2(held[tap], descriptor)
            posix.closerange(descriptor + 1, highest + 1)
        else:
            posix.closerange(descriptor, highest + 1)
            descriptor = posix.open("/proc/self/ns/net", posix.O_RDONLY | posix.O_CLOEXEC)
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        client = Client(program, tap, connection)
        client.connect(path)
    except BlockingIOError:
        return client.give_up()
    except OSError:
        # NOTE: nothing has been asked for yet. What else than the agent is amiss is met again.
        return None
    debug = b"debug" if environ.get(b"PYQEMU_IFUP_DEBUG") == b"1" else b""
    fields = [VERSION, VERBS[program], tap.encode(), debug]
    if program == "pyqemu-ifup":
        fields.insert(3, network().encode(sys.getfilesystemencoding(), "surrogateescape"))
    return client.ask(b"\0".join(fields), descriptor)


class Client:
    """A hook that has the agent do its work on `tap`."""

    def __init__(self, program: str, tap: str, connection: _socket.socket) -> None:
        self.program = program
        self.tap = tap
        self.name = quote(tap)
        self.connection = connection
        self.parent = posix.getppid()
        self.start = time.monotonic()
        self.lack = ""
        """Why the agent does not do the work, where another attempt may help, in words."""
        self.reason = ""
        """Why the work must stop, in words; empty while it need not."""
        self.left = "nothing is left of it"
        """What is known of the work where it has stopped, in words."""
        end = "-- " if tap[:1] == "-" else ""
        self.gc = f"pyqemu-ifctl gc {end}{self.name} removes what is left"
        if program == "pyqemu-ifdown":
            self.left = self.gc

    def connect(self, path: bytes) -> None:
        """Connect to the agent. Raises OSError, BlockingIOError where too many others wait for it.

        Root does not wait for them: it does the work itself.
        """
        self.lack = "the agent does not take the connection"
        if posix.geteuid():
            # NOTE: a socket with a timeout of Python's does not wait here.
            limit = int(ACCEPT).to_bytes(LONG, sys.byteorder) + bytes(LONG)
            self.connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, limit)
            self.connection.connect(path)
            self.connection.settimeout(SLICE)
        else:
            self.connection.settimeout(SLICE)
            self.connection.connect(path)
        self.lack = ""

    def ask(self, request: bytes, descriptor: int) -> int | None:
        """Send the request with the descriptor that goes with it, and wait.

        Returns the exit status, None where the work must be done here.
        """
        for number in SIGNALS:
            _signal.signal(number, self._note)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
        status = self._wait() if self._send(request, descriptor) else None
        if status is None:
            # NOTE: first of all: what nobody waits for any more, the agent does not begin.
            self.connection.close()
            for number in SIGNALS:
                _signal.signal(number, _signal.SIG_DFL)
            status = self._stopped() if self.reason else self.give_up()
        return status

    def give_up(self) -> int | None:
        """Return None where the work can be done here, else say that it cannot just now."""
        if not self.lack or self.program != "pyqemu-ifup" or may_change_links():
            return None
        self._report(f"{self.lack}; try again")
        return TRY_AGAIN

    def stop(self, reason: str) -> None:
        """Tell the agent to take back what it has done; the answer is still to come."""
        self.reason = self.reason or reason
        try:
            self.connection.shutdown(_socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise

    def _note(self, number: int, _frame: object) -> None:
        self.stop(f"received {SIGNALS[number]}")

    def _send(self, request: bytes, descriptor: int) -> bool:
        """Tell whether the agent has the request; only then the descriptor is closed."""
        rights = descriptor.to_bytes(4, sys.byteorder)
        ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)]
        try:
            self.connection.sendmsg([request], ancillary, _socket.MSG_NOSIGNAL)
        except OSError:
            self.lack = GONE
            return False
        # NOTE: at once: the tap is to go with QEMU, also while we wait.
        posix.close(descriptor)
        posix.chdir("/")
        posix.umask(0o077)
        return True

    def _wait(self) -> int | None:
        """Wait for the answer and pass on what the agent says; return as `ask` does."""
        seconds, accepted = ACCEPT, False
        while time.monotonic() < self.start + seconds:
            if posix.getppid() != self.parent:
                self.stop(f"the calling process {self.parent} has ended")
            try:
                packet = self.connection.recv(PACKET_MAX)
            except (TimeoutError, ConnectionResetError):
                # NOTE: a reset is told once and first; what the agent sent is still to be read.
                continue
            kind, text = packet[:1], packet[1:]
            if kind == b"=" and text.isdigit():
                status = int(text)
                return self._stopped() if self.reason and status == TRY_AGAIN else status
            if kind == b"!" and text.isdigit():
                self.start, accepted = time.monotonic(), True
                seconds = int(text) + MARGIN
            elif kind == b"-":
                self._pass_on(text)
            elif kind == b"?":
                return None
            elif not packet:
                self.left = f"the agent has ended, {self.gc}"
                self.lack = GONE
                return None
        return self._late(seconds, accepted)

    def _late(self, seconds: float, accepted: bool) -> int | None:
        """Say that the agent has not answered in time; return as `ask` does."""
        self.left = "the agent does not answer, see pyqemu-ifctl agent"
        self.lack = f"the agent does not answer: waited {seconds:g} s"
        if not accepted:
            return None
        if self.reason:
            return self._stopped()
        self._report(f"{self.lack}; see pyqemu-ifctl agent")
        return TRY_AGAIN

    def _stopped(self) -> int:
        self._report(f"stopped: {self.reason}; {self.left}")
        return TRY_AGAIN

    def _pass_on(self, line: bytes) -> None:
        """Write a line of the agent's, but that the work has stopped: we know better why.

        What is left of it, which that line ends with, the agent knows.
        """
        stopped = f"{self.program}: {self.name}: stopped: ".encode()
        if not (self.reason and line.startswith(stopped)):
            say(line)
        elif b"; " in line:
            self.left = line.rpartition(b"; ")[2].decode("ascii", "replace")

    def _report(self, text: str) -> None:
        say(f"{self.program}: {self.name}: {text}".encode())
        log(self.program, f"{self.name}: {text}")


def say(line: bytes) -> None:
    """Write one line to standard error; the work goes on whatever becomes of it."""
    import select

    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if poll.poll(PATIENCE * 1000):
        try:
            posix.write(2, line[:LINE_MAX] + b"\n")
        except OSError:
            return


def log(program: str, line: str) -> None:
    """Write an error to syslog, facility daemon; where nobody takes it in time, it is lost."""
    now = time.strftime("%b %e %H:%M:%S")
    text = f"<{LOG_ERR}>{now} {program}[{posix.getpid()}]: {line}"
    try:
        sender = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
        sender.settimeout(PATIENCE)
        sender.connect("/dev/log")
        sender.send(text.encode())
    except OSError:
        return


def network() -> str:
    """Return what stands after the @ of the name that this program was called by."""
    return (sys.argv[0] or sys.executable).rpartition("/")[2].partition("@")[2]


def may_change_links() -> bool:
    """Tell whether this process has CAP_NET_ADMIN."""
    # NOTE: of what ends a line elsewhere, a process's name may hold all but \n.
    with open("/proc/self/status", encoding="ascii", errors="replace", newline="\n") as file:
        line = next(line for line in file if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> CAP_NET_ADMIN & 1)


def is_valid_name(name: str) -> bool:
    """Tell whether `name` can be an interface's, as pyqemu_ifconf.names does."""
    return (
        1 <= len(name) <= 15
        and name not in (".", "..")
        and all("!" <= character <= "~" and character not in "/:" for character in name)
    )


def quote(name: str) -> str:
    """Return a valid name as one word of a shell, as pyqemu_ifconf.shell does."""
    plain = name[0] != "=" and all(each.isalnum() or each in "@%+=:,./-_" for each in name)
    return name if plain else "'" + name.replace("'", "'\\''") + "'"


def open_standard_descriptors() -> None:
    """Give 0 and 1 to /dev/null, and 2 too where it is closed, as pyqemu_ifup.hook does."""
    null = posix.open("/dev/null", posix.O_RDWR)
    while null <= 2:
        null = posix.dup(null)
    posix.dup2(null, 0)
    posix.dup2(null, 1)
    try:
        posix.fstat(2)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        posix.dup2(null, 2)


def find_taps() -> tuple[dict[str, int], int]:
    """Return the taps whose descriptors we hold, by name, and the highest descriptor of all."""
    taps = {}
    numbers = [int(name) for name in posix.listdir("/proc/self/fd")]
    for number in numbers:
        try:
            found = posix.fstat(number)
            if found.st_rdev != TUN or found.st_mode & S_IFMT != S_IFCHR:
                continue
            request = fcntl.ioctl(number, TUNGETIFF, bytes(40))
        except OSError as error:
            if error.errno not in NO_TAP:
                raise
        else:
            taps[request[:16].partition(b"\0")[0].decode("ascii", "replace")] = number
    return taps, max(numbers)
