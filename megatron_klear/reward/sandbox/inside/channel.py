"""Messages through the sandbox's socket: marshalled data with its length in front."""

from __future__ import annotations

import marshal
import os
import select
import struct
import sys
from typing import Any

LENGTH = struct.Struct("<Q")


def receive(fd: int) -> Any:
    """The next message; ends the process where the other side is gone."""
    (size,) = LENGTH.unpack(_read(fd, LENGTH.size))
    return marshal.loads(_read(fd, size))


def discard(fd: int) -> None:
    """Read away what is there, and keep nothing of it in memory."""
    buffer = bytearray(1 << 16)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while poller.poll(0) and os.readv(fd, [buffer]):
        buffer[:] = bytes(len(buffer))


def write(fd: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _read(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(fd, min(size - len(data), 1 << 20))
        if not part:
            sys.exit(0)
        data += part
    return bytes(data)
