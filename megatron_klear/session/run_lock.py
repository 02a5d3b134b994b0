"""Keeps two runs out of one directory: the second would write over the first's metrics and checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_klear.errors import ConfigError

LOCK_FILE = ".lock"

LEASE_SECONDS = 120.0
"""How long a file server may believe in a machine that died (NFS leases usually last 90 s)."""

_RETRY_SECONDS = 2.0

log = logging.getLogger(__name__)


class RunLock:
    """Holds a run directory for as long as this process lives, or until `release`.

    The system lets go of it however the process ends. On a file system that knows no locks nothing is held. A holder on
    another machine is waited for: a job that is queued again after its node died must not be refused while the file
    server still takes the dead node for alive.

    Args:
        root: the run directory.
        lease_seconds: how long to wait for a holder on another machine.

    Attributes:
        holder: who else holds the directory; empty when it is ours.
    """

    def __init__(self, root: Path, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self.holder = ""
        self._file: IO[str] | None = open(root / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115
        deadline = time.monotonic() + lease_seconds
        while not self._take():
            elsewhere = not self.holder.endswith(f" on {socket.gethostname()}")
            if not elsewhere or time.monotonic() >= deadline:
                self.release()
                return
            log.info("%s is held by %s; waiting up to %.0f s in case it died", root, self.holder, lease_seconds)
            time.sleep(min(_RETRY_SECONDS, lease_seconds))

    def _take(self) -> bool:
        """Lock the file and sign it; False, with `holder` set, while somebody else holds it."""
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            self.holder = self._file.read().strip() or "another process"
            return False
        except OSError:  # no locks here
            self.holder = ""
            return True
        self.holder = ""
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return True

    def release(self) -> None:
        """Let go; safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextlib.contextmanager
def alone_in(root: Path, setting: str) -> Iterator[None]:
    """Make a directory, and keep other runs out of it meanwhile.

    Args:
        root: the directory.
        setting: dotted path of the setting, or the option, that names it.

    Raises:
        ConfigError: another run is in it; says which.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = RunLock(root)
    if lock.holder:
        raise ConfigError([f"{setting}: {root} is in use by {lock.holder}; wait for it, end it, or choose another"])
    try:
        yield
    finally:
        lock.release()
