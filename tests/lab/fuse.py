"""File systems (fuse(4)) that answer nothing: at all, or no close by root, or just now and then."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.needs import lack

SERVER = """
import ctypes, errno, os, stat, struct, sys
LOOKUP, FORGET, GETATTR, OPEN, RELEASE, FLUSH, INIT, INTERRUPT, BATCH_FORGET = (
    1, 2, 3, 14, 18, 25, 26, 36, 42)
device = os.open("/dev/fuse", os.O_RDWR)
data = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"mute", os.fsencode(sys.argv[1]), b"fuse", 0, data):
    raise SystemExit(os.strerror(ctypes.get_errno()))

def attributes(node):
    mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o666
    return struct.pack("=6Q10I", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

print("ready", flush=True)
while True:
    request = os.read(device, 1 << 18)
    _, code, unique, node, uid = struct.unpack_from("=IIQQI", request)
    failure, answer = 0, b""
    if code == INIT:
        answer = struct.pack("=4I2H2I2H8I", 7, 31, 0, 0, 16, 12, 4096, 1, 1, 0, *[0] * 8)
    elif code == LOOKUP:
        answer = struct.pack("=4Q2I", 2, 0, 9999, 9999, 0, 0) + attributes(2)
    elif code == GETATTR:
        answer = struct.pack("=Q2I", 9999, 0, 0) + attributes(node)
    elif code == OPEN:
        answer = struct.pack("=Q2I", 1, 0, 0)
    elif code in (FORGET, INTERRUPT, BATCH_FORGET) or (code == FLUSH and uid == 0):
        continue
    elif code not in (FLUSH, RELEASE):
        failure = errno.ENOSYS
    os.write(device, struct.pack("=IiQ", 16 + len(answer), -failure, unique) + answer)
"""

FOLDER_SERVER = """
import ctypes, errno, os, stat, struct, sys
LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT, INTERRUPT, BATCH_FORGET = (
    1, 2, 3, 14, 15, 18, 25, 26, 36, 42)
device = os.open("/dev/fuse", os.O_RDWR)
data = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions".encode()
libc = ctypes.CDLL(None, use_errno=True)
source, place = sys.argv[1:]
if libc.mount(b"far", os.fsencode(place), b"fuse", 0, data):
    raise SystemExit(os.strerror(ctypes.get_errno()))
names = {1: ""}

def attributes(node):
    found = os.stat(os.path.join(source, names[node]))
    times = (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)
    return struct.pack(
        "=6Q10I", found.st_ino, found.st_size, 0, *(time // 10**9 for time in times),
        *(time % 10**9 for time in times), found.st_mode, 1, 0, 0, 0, 4096, 0)

print("ready", flush=True)
while True:
    request = os.read(device, 1 << 18)
    _, code, unique, node = struct.unpack_from("=IIQQ", request)
    failure, answer = 0, b""
    try:
        if code == INIT:
            answer = struct.pack("=4I2H2I2H8I", 7, 31, 0, 0, 16, 12, 4096, 1, 1, 0, *[0] * 8)
        elif code == LOOKUP:
            name = os.fsdecode(request[40:].rstrip(b"\\0"))
            number = os.stat(os.path.join(source, name)).st_ino
            names[number] = name
            answer = struct.pack("=4Q2I", number, 0, 0, 0, 0, 0) + attributes(number)
        elif code == GETATTR:
            answer = struct.pack("=Q2I", 0, 0, 0) + attributes(node)
        elif code == OPEN:
            answer = struct.pack("=Q2I", 1, 1, 0)
        elif code == READ:
            at, size = struct.unpack_from("=QI", request, 48)
            with open(os.path.join(source, names[node]), "rb") as file:
                answer = file.read()[at : at + size]
        elif code in (FORGET, INTERRUPT, BATCH_FORGET):
            continue
        elif code not in (FLUSH, RELEASE):
            failure = errno.ENOSYS
    except OSError as error:
        failure = error.errno
    os.write(device, struct.pack("=IiQ", 16 + len(answer), -failure, unique) + answer)
"""


@contextmanager
def file_server(source: Path, place: Path) -> Iterator[subprocess.Popen[str]]:
    """Have the files of the folder `source` in the folder `place` too, by a file server.

    Yields its process: it answers nothing, and keeps whoever asks, while that is stopped (SIGSTOP).
    """
    if not os.path.exists("/dev/fuse"):
        lack("no /dev/fuse")
    server = subprocess.Popen(
        [sys.executable, "-I", "-c", FOLDER_SERVER, str(source), str(place)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == "ready\n"
        yield server
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def mute_file(folder: Path) -> Iterator[Path]:
    """Yield the file, in a file system mounted in `folder`, which ends with the block.

    Who waits for it then gets an error.
    """
    if not os.path.exists("/dev/fuse"):
        lack("no /dev/fuse")
    place = folder / "mute"
    place.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-I", "-c", SERVER, str(place)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == "ready\n"
        yield place / "file"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def mute_folder(folder: Path) -> Iterator[None]:
    """Have a file system mounted on `folder` while the block runs, in which a look at a name waits.

    Who waits for it then gets an error.
    """
    if not os.path.exists("/dev/fuse"):
        lack("no /dev/fuse")
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    data = f"fd={server},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    try:
        if libc.mount(b"mute", bytes(folder), b"fuse", 0, data) != 0:
            raise OSError(ctypes.get_errno(), "cannot mount it")
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
    finally:
        os.close(server)
