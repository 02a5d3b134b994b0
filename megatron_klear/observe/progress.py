"""What a person sees while a run is going: a live display on a terminal, one compact line now and then elsewhere."""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_klear.observe import names
from megatron_klear.observe.readable import duration, quantity

_SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    (names.LOSS_TOTAL, "loss", quantity),
    (names.REWARD_MEAN, "reward", "{:.3f}".format),
    (names.ACCURACY_TRAIN, "accuracy", "{:.3f}".format),
    (names.ACCURACY_HELDOUT, "held-out", "{:.3f}".format),
    (names.TOKENS_PER_SECOND, "tokens/s", quantity),
    (names.MFU, "MFU", "{:.1%}".format),
)


class TimeLeft:
    """Estimates the time left from the median of the last steps, which one slow step does not move.

    Args:
        window: number of steps remembered.
    """

    def __init__(self, window: int = 21) -> None:
        self._seconds: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        """Takes the duration of a step in seconds."""
        self._seconds.append(seconds)

    def estimate(self, steps_left: int) -> float | None:
        """Seconds left; None before the first step has ended."""
        return statistics.median(self._seconds) * max(steps_left, 0) if self._seconds else None


class Progress:
    """Shows steps, the phase inside the step, the latest numbers, elapsed time and time left.

    Use it as a context manager: it leaves the terminal as it found it, also when the run fails.

    Args:
        title: what runs, for instance "SFT".
        total_steps: steps of the whole run.
        done_steps: steps that were done before (a resumed run).
        noun: what a step is called, for entries whose steps are rows or problems.
        enabled: False shows nothing; every rank but the first.
        stream: where to; standard error by default, so that standard output keeps a run's results.
        interactive: live display or lines; None looks whether `stream` is a terminal.
        line_seconds: without a live display, the least time between two lines.
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        *,
        done_steps: int = 0,
        noun: str = "step",
        enabled: bool = True,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        line_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total_steps, self.done_steps = title, total_steps, done_steps
        self._noun = noun
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled
        self._interactive = _is_terminal(self._stream) if interactive is None else interactive
        self._line_seconds = line_seconds
        self._clock = clock
        self._time_left = TimeLeft()
        self._values: dict[str, float] = {}
        self._phases: list[_Phase] = []
        self._start = self._step_start = clock()
        self._last_line = float("-inf")
        self._live: Live | None = None
        self._moved_handlers: list[tuple[logging.StreamHandler[Any], TextIO]] = []

    def __enter__(self) -> Self:
        self._start = self._step_start = self._clock()
        if self._enabled and self._interactive:
            console = Console(file=self._stream, force_terminal=True)
            # What is printed to a standard output that goes to a file must go on doing so.
            self._live = Live(
                console=console,
                refresh_per_second=2,
                get_renderable=self._render,
                redirect_stdout=_is_terminal(sys.stdout),
            )
            self._live.start()
            self._move_log_handlers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._live is None:
            self._print(
                f"[{self.title}] stopped by {kind.__name__} in {self._noun} {self._current_step()}/{self.total_steps}"
            )
        self.close()

    def close(self) -> None:
        """Ends the live display, which stays as it was last; safe to call twice."""
        if self._live is not None:
            live, self._live = self._live, None
            for handler, stream in self._moved_handlers:
                handler.setStream(stream)
            self._moved_handlers.clear()
            live.stop()

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Tells that a step has ended.

        Args:
            step: number of steps done now.
            values: the step's metrics by their names; those not shown are passed over.
        """
        now = self._clock()
        if step > self.done_steps:
            self._time_left.add((now - self._step_start) / (step - self.done_steps))
        self._step_start, self.done_steps = now, step
        self.update(values)
        if step >= self.total_steps:
            self._last_line = float("-inf")
        self._line_if_due()

    def update(self, values: Mapping[str, Any]) -> None:
        """Takes newer numbers without ending a step, for instance the accuracy on held-out problems."""
        self._values.update({name: float(values[name]) for name, _, _ in _SHOWN if name in values})

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """Shows a phase of the step; yields `advance(count=1)`, to be called as its parts get done.

        Args:
            name: what is going on, for instance "generating".
            total: number of parts; None if there are none to count.
        """
        phase = _Phase(name, total)
        self._phases.append(phase)

        def advance(count: int = 1) -> None:
            phase.done += count
            self._line_if_due()

        try:
            yield advance
        finally:
            self._phases.remove(phase)

    def note(self, text: str) -> None:
        """Prints a line at once, above the live display where there is one."""
        if not self._enabled:
            return
        if self._live is not None:
            self._live.console.print(Text(_printable(text)), soft_wrap=True)
        else:
            self._print(text)

    def _current_step(self) -> int:
        return min(self.done_steps + 1, self.total_steps)

    def _line_if_due(self) -> None:
        now = self._clock()
        if self._live is not None or not self._enabled or now - self._last_line < self._line_seconds:
            return
        self._last_line = now
        self._print(self._line())

    def _line(self) -> str:
        if self._phases:
            parts = [
                f"[{self.title}] {self._noun} {self._current_step()}/{self.total_steps} {self._phases[-1].label()}"
            ]
        else:
            parts = [f"[{self.title}] {self._noun} {self.done_steps}/{self.total_steps}"]
        parts += [f"{label} {text}" for label, text in self._numbers()]
        parts += [f"{label} {text}" for label, text in self._times()]
        return "  ".join(parts)

    def _numbers(self) -> list[tuple[str, str]]:
        return [(label, show(self._values[name])) for name, label, show in _SHOWN if name in self._values]

    def _times(self) -> list[tuple[str, str]]:
        times = [("elapsed", duration(self._clock() - self._start))]
        left = self._time_left.estimate(self.total_steps - self.done_steps)
        if left is not None and self.done_steps < self.total_steps:
            # The part of the current step that has passed already is not left any more.
            times.append(("left", duration(max(left - (self._clock() - self._step_start), 0.0))))
        return times

    def _print(self, text: str) -> None:
        if not self._enabled:
            return
        try:
            print(_printable(text), file=self._stream, flush=True)
        except (OSError, UnicodeEncodeError):
            # Nobody reads any more (a closed pipe), or the stream cannot spell it: no reason to end the run.
            return

    def _render(self) -> Group:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, min_width=12)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        bar_width = 28 if self._columns() >= 90 else 10
        times = [f"   {label} {text}" for label, text in self._times()]
        grid.add_row(
            Text(self.title, "bold"),
            _bar(self.done_steps, max(self.total_steps, 1), bar_width),
            Text.assemble(f"{self._noun} {self.done_steps}/{self.total_steps}", *times),
        )
        for phase in list(self._phases):
            bar = _bar(phase.done, phase.total, bar_width) if phase.total else Text("")
            grid.add_row(Text(phase.name), bar, Text(phase.count()))
        shown = [((f"{label} ", "dim"), (f"{text}   ", "bold")) for label, text in self._numbers()]
        numbers = Text.assemble(*(part for pair in shown for part in pair))
        return Group(grid, numbers) if shown else Group(grid)

    def _columns(self) -> int:
        return self._live.console.width if self._live is not None else 80

    def _move_log_handlers(self) -> None:
        # A log line written straight to the terminal would tear the display; the live display has put a proxy
        # that prints above it in place of sys.stdout and sys.stderr, but handlers hold the real streams.
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler and handler.stream in (sys.__stderr__, sys.__stdout__):
                self._moved_handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr)


class _Phase:
    """A phase of the step and how much of it is done."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name, self.total, self.done = name, total, 0

    def count(self) -> str:
        """How much is done, as `37/128`; empty where nothing is counted."""
        if self.total is None:
            return str(self.done) if self.done else ""
        return f"{self.done}/{self.total}"

    def label(self) -> str:
        """Name and count."""
        return f"{self.name} {self.count()}".rstrip()


def _bar(done: int, total: int, width: int) -> ProgressBar:
    return ProgressBar(total=total, completed=done, width=width, complete_style="cyan", finished_style="green")


def _is_terminal(stream: TextIO) -> bool:
    # Asked of the stream itself: rich also answers to FORCE_COLOR, which says nothing of moving cursors.
    try:
        return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    except (AttributeError, ValueError):
        return False


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
