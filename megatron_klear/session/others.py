"""Servers of others (`sglang.urls`) that were lost: whoever started them starts them again, and we wait for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megatron_klear.rollout.sglang import wait_until_answering


class ServersOfOthers:
    """Stands where `MachineFleets` stands for our own: nothing is started or ended.

    Args:
        urls: of the servers; a server that comes back has the URL that it had.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = tuple(urls)

    def stop(self, index: int) -> None:
        """Nothing: it is not ours to end."""

    def start(self, index: int) -> None:
        """Nothing: it is not ours to start."""

    def wait_ready(self, index: int, waiting: Callable[[], None]) -> None:
        """Wait until it answers; `waiting` ends that by raising, as the manager does after scheduling.start_seconds."""
        wait_until_answering([self._urls[index]], math.inf, waiting)

    def url(self, index: int) -> str:
        """http://HOST:PORT."""
        return self._urls[index]
