"""An event loop whose clock jumps: hours of waiting pass in no time, and every run takes the same course."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Runs like asyncio's loop, except that `time()` stands still while callbacks run and jumps to the next timer.

    Nothing inside may wait for other threads or for sockets: the clock would not wait for them.
    """

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Simulated seconds since the start."""
        return self._now

    def jump(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


class _JumpingSelector(selectors.DefaultSelector):
    """Where the loop would sleep, time passes instead."""

    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events and timeout is None:
            raise RuntimeError("the simulation waits for something that no timer will bring")
        if not events and timeout is not None and timeout > 0:
            self._loop.jump(timeout)
        return events


def run_simulated(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in simulated time; tasks that it leaves are cancelled."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(work)


async def run_inline(function: Any, *arguments: Any) -> Any:
    """Call a blocking function at once, in place of `asyncio.to_thread`: threads know nothing of simulated time."""
    return function(*arguments)
