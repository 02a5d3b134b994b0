"""Servers of others (`sglang.urls`) that were lost: whoever started them starts them again, and we ask and wait."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from megatron_klear.rollout.sglang import wait_until_answering

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_UNHEARD_SECONDS = 120.0
"""How long a request may stay unheard; a file may take a minute to be seen over a network file system."""
_WAKE_SECONDS = 0.2


class ServersOfOthers:
    """Stands where `MachineFleets` stands for our own: nothing is started or ended here.

    Args:
        urls: of the servers; a server that comes back has the URL that it had.
        requests: setting `sglang.restart_requests`: directory in which a file HOST_PORT asks for a server's end and
            new start, and is removed when it has ended; None where nobody would see it.
        unheard_seconds: after which a request is taken back.
    """

    def __init__(
        self, urls: Sequence[str], requests: Path | None = None, *, unheard_seconds: float = _UNHEARD_SECONDS
    ) -> None:
        self._urls = tuple(urls)
        self._requests, self._unheard_seconds = requests, unheard_seconds

    def stop(self, index: int) -> None:
        """Ask for the end of a server that hangs or lags; of one that has ended there is nothing to end.

        `wait_ready` then waits until somebody has ended it.
        """
        request = self._request(index)
        if request is None or not self.is_there(index):
            return
        try:
            request.parent.mkdir(parents=True, exist_ok=True)
            request.touch()
        except OSError as error:
            log.warning("%s: cannot be asked to end (sglang.restart_requests): %s", self._urls[index], error)

    def is_there(self, index: int) -> bool:
        """Whether a process listens at its URL: one that has ended, or still loads its model, does not."""
        where = urlsplit(self._urls[index])
        return _listens(where.hostname or "", where.port or 0)

    def start(self, index: int) -> None:
        """Nothing: it is not ours to start."""

    def wait_ready(self, index: int, waiting: Callable[[], None]) -> None:
        """Wait until it answers; `waiting` ends that by raising, as the manager does after scheduling.start_seconds."""
        request = self._request(index)
        if request is not None:
            try:
                self._wait_until_heard(index, request, waiting)
            finally:
                with contextlib.suppress(OSError):  # it could not be made either
                    request.unlink(missing_ok=True)
        wait_until_answering([self._urls[index]], math.inf, waiting)

    def url(self, index: int) -> str:
        """http://HOST:PORT."""
        return self._urls[index]

    def _request(self, index: int) -> Path | None:
        where = urlsplit(self._urls[index])
        return None if self._requests is None else self._requests / f"{where.hostname}_{where.port}"

    def _wait_until_heard(self, index: int, request: Path, waiting: Callable[[], None]) -> None:
        deadline = time.monotonic() + self._unheard_seconds
        while request.exists():
            if time.monotonic() > deadline:
                log.warning(
                    "%s: nobody ended it within %.0f s of being asked to by %s (sglang.restart_requests)",
                    self._urls[index], self._unheard_seconds, request,
                )  # fmt: skip
                return
            waiting()
            time.sleep(_WAKE_SECONDS)


def _listens(host: str, port: int) -> bool:
    """Whether a process is there: also one that is stopped does, and one that has ended, or still loads, does not."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return True
    except OSError:
        return False
