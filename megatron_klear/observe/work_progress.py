"""What a person sees of work that is counted in things, and perhaps in bytes: how much is done, and the time left."""

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


class WorkProgress:
    """A bar on a terminal, a line every few seconds elsewhere.

    Args:
        title: what is being done, for instance "writing".
        total: how many things are to be done.
        total_bytes: how many bytes they are, if the time left depends on these.
        noun: what is counted.
        done: things that were done before; the time left is judged by the others.
        stream: where to; standard error by default.
        line_seconds: without a terminal, the least time between two lines.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        title: str,
        total: int,
        total_bytes: int | None = None,
        *,
        noun: str = "tensors",
        done: int = 0,
        stream: TextIO | None = None,
        line_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.total_bytes, self.noun = title, total, total_bytes, noun
        self.done, self.done_bytes, self._done_before = done, 0, done
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
            self._bar.add_task(self.title, total=max(self.total_bytes or self.total, 1), state=self.state())
            self._show()
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

    def advance(self, count: int, num_bytes: int = 0) -> None:
        """Count things and bytes that are done."""
        with self._lock:
            self.done += count
            self.done_bytes += num_bytes
            if self._bar is not None:
                self._show()
            elif self._clock() - self._last_line >= self._line_seconds:
                self._last_line = self._clock()
                self._stream.write(f"{self.title}: {self.state()}\n")
                self._stream.flush()

    def state(self) -> str:
        """`120/399 tensors, 5.21G/16.4G bytes, 0:35 left`."""
        text = f"{self.done:,}/{self.total:,} {self.noun}"
        done, total = self.done - self._done_before, self.total - self._done_before
        if self.total_bytes is not None:
            text += f", {quantity(self.done_bytes)}/{quantity(self.total_bytes)} bytes"
            done, total = self.done_bytes, self.total_bytes
        if done and total > done:
            text += f", {duration((self._clock() - self._start) * (total - done) / done)} left"
        return text

    def _show(self) -> None:
        assert self._bar is not None
        completed = self.done if self.total_bytes is None else self.done_bytes
        self._bar.update(self._bar.task_ids[0], completed=completed, state=self.state())
