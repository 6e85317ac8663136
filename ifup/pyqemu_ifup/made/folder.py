"""The folder that a made network has in /run: its lock, and the files of what serves it."""

from __future__ import annotations

import errno
import os

from pyqemu_ifconf.names import is_network_name
from pyqemu_ifup.drivers import dnsmasq
from pyqemu_ifup.system.lock import RUN, network_folders


def folder_of(network: str) -> str:
    """Return the folder of the network's files, in the network namespace of this process."""
    # NOTE: only the first namespace has this file, and a process that may not look into process 1
    # can tell, too (sysctl_core_net_init of net/core).
    if os.path.exists("/proc/sys/net/core/netdev_max_backlog"):
        return f"{RUN}/{network}"
    return f"{RUN}/{network}@{os.stat('/proc/self/ns/net').st_ino}"


def folders() -> list[str]:
    """Return the networks that have a folder in this network namespace."""
    networks = {name.partition("@")[0] for name in network_folders()}
    return sorted(
        network
        for network in networks
        if is_network_name(network) and os.path.isdir(folder_of(network))
    )


def is_bare(folder: str) -> bool:
    """Tell whether the folder has nothing but the network's lock."""
    return not any(os.path.exists(f"{folder}/{name}") for name in dnsmasq.FILES)


def forget(folder: str) -> None:
    """Remove the folder with its files, the lock among them; gone already is success."""
    for name in (*dnsmasq.FILES, "lock"):
        try:
            os.unlink(f"{folder}/{name}")
        except FileNotFoundError:
            continue
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise
