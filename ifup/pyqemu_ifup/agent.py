"""What the agent and its clients must agree on to meet: docs/agent.md."""

from __future__ import annotations

WIRE = "pyqemu-ifup/1"
"""The version of the wire, the first field of each request."""
REQUEST_MAX = 4096
"""Bytes of a request."""
DEFAULT_SOCKET = "/run/pyqemu-ifup/agent.sock"
SOCKET_VARIABLE = "PYQEMU_IFUP_SOCKET"
"""Names another socket for a client; empty: no agent."""
