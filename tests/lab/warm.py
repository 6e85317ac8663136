"""Processes that run Python code without the start of an interpreter: forked from one that is warm.

That one, a child of the test run, has the libraries of others, which take most of a start, and
nothing of ours: each process imports that anew. This file is also what that one runs.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

CLONE_NEWNET = 0x40000000
_HOST = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
"""The network namespace of the test run, whichever its thread is in later."""
_server: tuple[subprocess.Popen[bytes], socket.socket] | None = None


class Warm:
    """A process that runs `code` as `python3 -I -c CODE ARGUMENTS` would, with `env`.

    Its network namespace is that of the calling thread. Its standard error is a pipe, input and
    output are /dev/null. It is no child of ours, but stays a zombie until `communicate`.
    """

    def __init__(self, code: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        request = {
            "code": code, "arguments": list(arguments), "env": dict(env), "cwd": os.getcwd(),
            "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        }  # fmt: skip
        reading, writing = os.pipe()
        self._stderr = reading
        self._ours, theirs = socket.socketpair()
        with ExitStack() as stack:
            stack.callback(os.close, writing)
            stack.enter_context(theirs)
            place = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, place)
            socket.send_fds(
                server()[1], [json.dumps(request).encode()], [place, writing, theirs.fileno()]
            )
        self.pid = int(self._ours.recv(64))

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end and return "" and its standard error. Raises TimeoutExpired."""
        said = b""
        waited = {self._stderr, self._ours.fileno()}
        while waited:
            ready = select.select(list(waited), [], [], timeout)[0]
            if not ready:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            if self._stderr in ready:
                chunk = os.read(self._stderr, 65536)
                said += chunk
                if not chunk:
                    waited.remove(self._stderr)
            if self._ours.fileno() in ready:
                self.returncode = int(self._ours.recv(64))
                waited.remove(self._ours.fileno())
        self._ours.shutdown(socket.SHUT_WR)
        assert self._ours.recv(1) == b"", "it is waited for, and no zombie any more"
        self._ours.close()
        os.close(self._stderr)
        return "", said.decode(errors="replace")

    def terminate(self) -> None:
        """Send it SIGTERM; one that has ended is fine."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL; one that has ended is fine."""
        os.kill(self.pid, signal.SIGKILL)


def server() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Return the warm interpreter, and the socket at which it takes requests."""
    global _server
    if _server is None:
        from lab.netns import entered

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = [sys.executable, "-I", __file__, str(theirs.fileno())]
        with theirs, entered(f"/proc/self/fd/{_HOST}"):
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"PATH": os.environ["PATH"]},
            )
        _server = process, ours
        atexit.register(_close)
    return _server


def pid() -> int | None:
    """Return the process id of the warm interpreter, None where there is none."""
    return None if _server is None else _server[0].pid


def _close() -> None:
    assert _server is not None
    process, ours = _server
    ours.close()
    process.wait()


def _serve(requests: socket.socket) -> dict[str, Any]:
    """Fork a process for each request, until there are no more; return in each with what it asks.

    Raises SystemExit at the end of requests.
    """
    import argparse, ovs.db.idl, pyroute2, yaml  # noqa: E401, F401, I001

    running: dict[int, tuple[int, socket.socket]] = {}
    ended: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for ready in select.select([requests.fileno(), *running, *ended], [], [])[0]:
            if ready in running:
                process, reply = running.pop(ready)
                os.close(ready)
                status = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
                assert status is not None
                code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
                reply.send(b"%d" % code)
                ended[reply.fileno()] = process, reply
            elif ready in ended:
                process, reply = ended.pop(ready)
                os.waitpid(process, 0)
                reply.close()
            else:
                data, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
                if not data:
                    raise SystemExit
                process = os.fork()
                if process == 0:
                    return _become(json.loads(data), *descriptors)
                for each in descriptors[:2]:
                    os.close(each)
                reply = socket.socket(fileno=descriptors[2])
                reply.send(b"%d" % process)
                running[os.pidfd_open(process)] = process, reply


def _become(request: dict[str, Any], place: int, stderr: int, _reply: int) -> dict[str, Any]:
    """Make this process what it would be if it had been started."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(place, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.dup2(stderr, 2)
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    resource.setrlimit(resource.RLIMIT_NOFILE, request["files"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["-c", *request["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return request


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _found = _serve(socket.socket(fileno=int(sys.argv[1])))
    exec(compile(_found["code"], "<string>", "exec"), {"__name__": "__main__"})
