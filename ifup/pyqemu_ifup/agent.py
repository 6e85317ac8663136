"""What the agents and their clients must agree on to meet: docs/agent.md."""

from __future__ import annotations

import os

WIRE = "pyqemu-ifup/1"
"""The version of the wire, the first field of each request."""
REQUEST_MAX = 4096
"""Bytes of a request."""
ROOT_SOCKET = "/run/pyqemu-ifup/agent.sock"
"""Where root's agent listens, to root alone."""
USERS_SOCKET = "/run/pyqemu-ifup/users.sock"
"""Where the agent of everybody else listens."""
USERS_UNIT = "pyqemu-ifd-users.socket"
"""What has that one started."""
SOCKET_VARIABLE = "PYQEMU_IFUP_SOCKET"
"""Names another socket for a client; empty: no agent. Raised privilege ignores it."""


def default_socket() -> str:
    """Return where the agent for this process listens: root's, or that of everybody else."""
    return ROOT_SOCKET if os.geteuid() == 0 else USERS_SOCKET


def find_socket() -> str:
    """Return the path of the agent's socket for this process, empty where there shall be none."""
    if (os.geteuid(), os.getegid()) != (os.getuid(), os.getgid()):
        return default_socket()
    return os.environ.get(SOCKET_VARIABLE, default_socket())
