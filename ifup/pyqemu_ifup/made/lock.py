"""The lock of a made network: nobody makes it or takes it away while another process has it.

The lock says nothing else. What is there, and whose it is, the live system says.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext

from pyqemu_ifup.host import Host
from pyqemu_ifup.made.folder import folder_of
from pyqemu_ifup.system.lock import RUN, Lock, cannot_use, lock_file, make_folder, open_lock

HOLD = 2.0
"""Seconds that a user's up or down may have a network's lock; 2 s more take back what it did."""


@asynccontextmanager
async def hold(host: Host, network: str) -> AsyncIterator[str]:
    """Wait for the network's lock and hold it for the block; yield the network's folder.

    What is done for a user ends in HOLD seconds. Raises Failure: 75, which names the process that
    has the lock, else as `cannot_use`.
    """
    folder = folder_of(network)
    try:
        descriptor = await _lock(folder, network, host)
    except OSError as error:
        raise cannot_use(folder, error) from error
    with Lock(descriptor), _briefly(host):
        yield folder


def _briefly(host: Host) -> AbstractContextManager[object]:
    """Have what is done for a user end in HOLD seconds."""
    if host.brief and host.deadline.remaining() > HOLD:
        return host.until(host.deadline.child(HOLD))
    return nullcontext()


async def _lock(folder: str, network: str, host: Host) -> int:
    """Return a descriptor that has the lock. Raises OSError, Failure (75)."""
    path = f"{folder}/lock"
    while True:
        host.deadline.check(f"network {network} is being taken away")
        for each in (RUN, folder):
            make_folder(each)
        try:
            lock = open_lock(path)
        except FileNotFoundError:
            continue  # NOTE: the process that takes the network away removes its folder.
        try:
            await lock_file(lock, host.deadline, f"network {network}", last=host.brief)
            if _is_same(path, lock):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _is_same(path: str, descriptor: int) -> bool:
    """Tell whether the path is still the file that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
