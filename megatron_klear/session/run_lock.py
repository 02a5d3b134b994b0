"""Keeps two runs out of one directory: the second would write over the first's metrics and checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"


class RunLock:
    """Holds a run directory for as long as this process lives, or until `release`.

    The system lets go of it however the process ends. On a file system that knows no locks nothing is held.

    Args:
        root: the run directory.

    Attributes:
        holder: who else holds the directory; empty when it is ours.
    """

    def __init__(self, root: Path) -> None:
        self.holder = ""
        self._file: IO[str] | None = open(root / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            self.holder = self._file.read().strip() or "another process"
            self.release()
        except OSError:
            return
        else:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()

    def release(self) -> None:
        """Let go; safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
