"""A process of our own for what may wait for somebody, with none but the descriptors it needs."""

from __future__ import annotations

import os
import resource
import select
from collections.abc import Collection

PATIENCE = 1.0
"""Seconds that the child may take to close what it does not need."""


def fork_with(descriptors: Collection[int]) -> int:
    """Fork; return the child's process, or 0 in the child, which has these descriptors alone.

    It returns when the child has closed the others, so that none of these closes is the last one
    of a file: that one may wait for as long as its maker likes (SO_LINGER of socket(7)). Raises
    OSError as fork(2) and pipe(2). A child that takes longer than PATIENCE is not waited for.
    """
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError:
        os.close(ours)
        os.close(theirs)
        raise
    if pid == 0:
        alone = False
        try:
            close_but({*descriptors, theirs})
            os.close(theirs)
            alone = True
        finally:
            if not alone:
                os._exit(1)
        return 0
    os.close(theirs)
    try:
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        poll.poll(PATIENCE * 1000)
    finally:
        os.close(ours)
    return pid


def close_but(descriptors: Collection[int]) -> None:
    """Close all descriptors of this process, or of the thread's own table, but for these."""
    low = 0
    for descriptor in sorted(descriptors):
        # NOTE: closerange(0, 0) is everything to close_range(2).
        if low < descriptor:
            os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
