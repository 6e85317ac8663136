"""A control group whose processes may not use /dev/net/tun, as a container's or a unit's."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BPF = {"x86_64": 321, "aarch64": 280}
"""The number of bpf(2)."""
PROG_LOAD, PROG_ATTACH = 5, 8
OF_DEVICES, TO_DEVICES = 15, 6
"""BPF_PROG_TYPE_CGROUP_DEVICE and BPF_CGROUP_DEVICE of linux/bpf.h."""
LOAD, NOT_EQUAL, SET, EXIT = 0x61, 0x55, 0xB7, 0x95
PROGRAM = (
    # NOTE: operation, registers, offset, number; struct bpf_cgroup_dev_ctx has major and minor.
    (LOAD, 0x12, 4, 0),
    (NOT_EQUAL, 2, 4, 10),
    (LOAD, 0x12, 8, 0),
    (NOT_EQUAL, 2, 2, 200),
    (SET, 0, 0, 0),
    (EXIT, 0, 0, 0),
    (SET, 0, 0, 1),
    (EXIT, 0, 0, 0),
)
ENTER = 'echo $$ >"$0"/cgroup.procs && exec "$@"'


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    libc = ctypes.CDLL(None, use_errno=True)
    found: int = libc.syscall(BPF[platform.machine()], command, buffer, 128)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "bpf")
    return found


@contextmanager
def without_tun() -> Iterator[list[str]]:
    """Yield the command that executes the one after it where /dev/net/tun may not be opened."""
    code = b"".join(struct.pack("<BBhi", *each) for each in PROGRAM)
    text, licence = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    with tempfile.TemporaryDirectory(prefix="cgroup-") as name:
        subprocess.run(["mount", "-t", "cgroup2", "none", name], check=True)
        program = _bpf(PROG_LOAD, struct.pack(
            "=IIQQ", OF_DEVICES, len(PROGRAM), ctypes.addressof(text), ctypes.addressof(licence)
        ))  # fmt: skip
        group = Path(tempfile.mkdtemp(prefix="without-tun-", dir=name))
        try:
            folder = os.open(group, os.O_RDONLY)
            try:
                _bpf(PROG_ATTACH, struct.pack("=IIII", folder, program, TO_DEVICES, 0))
            finally:
                os.close(folder)
            yield ["sh", "-c", ENTER, str(group)]
        finally:
            os.close(program)
            group.rmdir()
            subprocess.run(["umount", "--lazy", name], check=True)
