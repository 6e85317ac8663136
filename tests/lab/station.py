"""What stands in for a guest: frames in and out of a QEMU's tap, without a machine to boot.

QEMU's own hub joins the tap netdev and a netdev that speaks UDP to the test:

with Station(netns) as station, Qemu(*hook_arguments, *station.arguments("n0"), ...) as qemu:
    assert qemu.greeting
    station.send(frame(mac(1)))
"""

from __future__ import annotations

import select
import socket
import time

from lab.netns import Namespace
from lab.taps import FRAME_MAX, Want, any_frame

HOST = "127.0.0.1"


class Station:
    """One end of a UDP pair in the namespace, QEMU is the other; a context manager.

    `number` tells several of one namespace apart.
    """

    def __init__(self, netns: Namespace, number: int = 0) -> None:
        self.ours, self.theirs = (HOST, 7000 + 2 * number), (HOST, 7001 + 2 * number)
        with netns.enter():
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self.socket.bind(self.ours)
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Station:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def arguments(self, netdev: str) -> list[str]:
        """Return QEMU's arguments that join us to the netdev with this id."""
        near, far = (f"{host}:{port}" for host, port in (self.theirs, self.ours))
        return [
            *("-netdev", f"hubport,id=hub-{netdev},hubid=0,netdev={netdev}"),
            *("-netdev", f"socket,id=udp-{netdev},udp={far},localaddr={near}"),
            *("-netdev", f"hubport,id=station-{netdev},hubid=0,netdev=udp-{netdev}"),
        ]

    def send(self, frame: bytes) -> None:
        """Send `frame` as the guest would."""
        self.socket.sendto(frame, self.theirs)

    def recv(self, timeout: float = 1.0, want: Want = any_frame) -> bytes | None:
        """Return the first frame to the guest that `want` takes, None after `timeout` seconds."""
        end = time.monotonic() + timeout
        while select.select([self.socket], [], [], max(0.0, end - time.monotonic()))[0]:
            frame = self.socket.recv(FRAME_MAX)
            if want(frame):
                return frame
        return None
