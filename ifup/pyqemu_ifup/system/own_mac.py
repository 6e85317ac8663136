"""The MACs that this host gives what is its own: local ones, and no other host's."""

from __future__ import annotations

from hashlib import sha256

from pyqemu_ifup.mark import find_here

MACHINE_IDS = ("/etc/machine-id", "/var/lib/dbus/machine-id")
"""Where a host's own id is (machine-id(5))."""
NO_MAC = "00:00:00:00:00:00"
"""What a Linux bridge has whose last port has gone, and nothing can be sent to."""


def find_host_id() -> str | None:
    """Return what no other host is called, None where this one has no id."""
    for path in MACHINE_IDS:
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                found = file.read().strip()
        except (FileNotFoundError, PermissionError):
            continue
        if found and found != "uninitialized":
            return found
    return None


def this_host() -> str:
    """Return what no other host is called; one without an id has it until it is started again."""
    return find_host_id() or find_here().boot_id


def mac_for(bridge: str, host: str) -> str:
    """Return the MAC that a bridge of this name is to have on a host: the same each time.

    Locally administered (IEEE 802, 8.4), and below the `fe:` of the taps.
    """
    return "02:" + sha256(f"bridge {bridge}\0{host}".encode()).digest()[:5].hex(":")
