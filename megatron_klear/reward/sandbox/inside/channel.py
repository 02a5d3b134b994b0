"""Messages through the sandbox's socket: marshalled data with its length in front."""

from __future__ import annotations

import marshal
import os
import struct
import sys
from typing import Any

LENGTH = struct.Struct("<Q")


def receive(fd: int) -> Any:
    """The next message; ends the process where the other side is gone."""
    (size,) = LENGTH.unpack(_read(fd, LENGTH.size))
    return marshal.loads(_read(fd, size))


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
