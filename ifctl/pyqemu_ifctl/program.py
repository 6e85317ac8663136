"""What pyqemu-ifctl is called, and how it writes: before it knows its verb, and after."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    # NOTE: typing alone takes as long to load as all that is loaded before signals are heeded.
    from typing import TextIO

PROGRAM = "pyqemu-ifctl"


def put(stream: TextIO | None, text: str) -> None:
    """Write `text` at once; a stream that was closed before we began has no reader."""
    if stream is None or not text:
        return
    data = text.encode(stream.encoding or "utf-8", "backslashreplace")
    descriptor = stream.fileno()
    while data:
        data = data[os.write(descriptor, data) :]
