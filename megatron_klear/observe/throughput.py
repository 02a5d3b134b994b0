"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_klear.observe.ranges import nvtx_range


class Phases:
    """Adds up the seconds that a step spends in each of its phases.

    A phase inside another stops the outer one's clock, so that the phases of a step never sum to more than
    the step. Each phase is also an NVTX range.

    Args:
        clock: seconds, never going back.
        synchronize: called at the start and end of every phase, for instance `torch.cuda.synchronize`, where
            queued work should count in the phase that queued it; costs the overlap of phases.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, synchronize: Callable[[], None] | None = None
    ) -> None:
        self._clock = clock
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._mark = clock()

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Counts the time inside towards the phase `name`, also when it ends in an exception."""
        self._settle()
        self._open.append(name)
        try:
            with nvtx_range(name):
                yield
        finally:
            self._settle()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call, in the order of first entry; starts again from zero."""
        self._settle()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _settle(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now
