"""What a person sees while a model is converted: tensors and bytes done, and the time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megatron_klear.observe.readable import duration, quantity


class ConversionProgress:
    """A bar on a terminal, a line every few seconds elsewhere.

    Args:
        title: what is being done, for instance "writing".
        total: how many things are to be done.
        total_bytes: how many bytes they are.
        noun: what is counted.
        stream: where to; standard error by default.
        line_seconds: without a terminal, the least time between two lines.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        title: str,
        total: int,
        total_bytes: int,
        *,
        noun: str = "tensors",
        stream: TextIO | None = None,
        line_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.total_bytes, self.noun = title, total, total_bytes, noun
        self.done = self.done_bytes = 0
        self._stream = stream if stream is not None else sys.stderr
        self._line_seconds, self._clock = line_seconds, clock
        self._start = self._last_line = clock()
        self._lock = threading.Lock()  # files are checked in several threads
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._start = self._last_line = self._clock()
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Progress(*columns, console=Console(file=self._stream))
            self._bar.add_task(self.title, total=max(self.total_bytes, 1), state=self.state())
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self.total:
            self._stream.write(f"{self.title}: {self.state()} in {duration(self._clock() - self._start)}\n")
            self._stream.flush()

    def advance(self, count: int, num_bytes: int) -> None:
        """Count things and bytes that are done."""
        with self._lock:
            self.done += count
            self.done_bytes += num_bytes
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self.done_bytes, state=self.state())
            elif self._clock() - self._last_line >= self._line_seconds:
                self._last_line = self._clock()
                self._stream.write(f"{self.title}: {self.state()}\n")
                self._stream.flush()

    def state(self) -> str:
        """`120/399 tensors, 5.21G/16.4G bytes, 0:35 left`."""
        text = f"{self.done}/{self.total} {self.noun}, {quantity(self.done_bytes)}/{quantity(self.total_bytes)} bytes"
        elapsed, left = self._clock() - self._start, self.total_bytes - self.done_bytes
        if self.done_bytes and left > 0:
            text += f", {duration(elapsed * left / self.done_bytes)} left"
        return text
