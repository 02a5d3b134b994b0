"""Metrics of a run: one JSON object per line in metrics.jsonl, and the same numbers in TensorBoard.

A line is `{"step": 3, "time": 1750000000.0, "phase": "rl", "reward/mean": 0.5, ...}`: `step` counts finished
steps (0 is before training), `time` is in Unix seconds, `phase` is `sft`, `rl` or `eval`, and all else are
the names of `observe.names`. JSON knows no NaN or infinity: they are written as the strings "nan", "inf" and
"-inf", and `read_metrics` turns them back.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, get_args

from megatron_klear.observe.examples import EXAMPLES_FILE
from megatron_klear.observe.jsonl import JsonLinesFile, keep_through_step, read_json_lines, set_aside
from megatron_klear.observe.names import Phase

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

_RESERVED = ("step", "time", "phase")
_SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Metrics(Protocol):
    """Where a loop logs its numbers; `open_metrics` gives the one that fits this process."""

    def log(self, step: int, phase: Phase, values: Mapping[str, Any]) -> None:
        """Records the numbers of one step."""

    def close(self) -> None:
        """Puts everything on disk; safe to call twice."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SilentMetrics:
    """Takes what a `MetricsWriter` takes and writes nothing: for every rank but the first."""

    def log(self, step: int, phase: Phase, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class MetricsWriter:
    """Writes the metrics of a run; one process per run directory has one.

    Args:
        run_dir: the run directory; made if it is missing.
        tensorboard: also write event files under `run_dir/tensorboard`.
        resume_step: the last step of the checkpoint that the run goes on from. Lines of later steps, which a
            killed run may have left, are dropped from metrics.jsonl and from the example rollouts, and hidden
            from TensorBoard. None starts anew: files of an earlier run are renamed, not overwritten.
        sync_seconds: how often, at most, the file is forced to disk.
    """

    def __init__(
        self, run_dir: str | Path, *, tensorboard: bool, resume_step: int | None, sync_seconds: float = 5.0
    ) -> None:
        root = Path(run_dir)
        root.mkdir(parents=True, exist_ok=True)
        for path in (root / METRICS_FILE, root / EXAMPLES_FILE):
            if resume_step is None:
                aside = set_aside(path)
                if aside is not None:
                    logger.warning("starting anew: the earlier %s is now %s", path, aside.name)
            else:
                keep_through_step(path, resume_step)
        self.path = root / METRICS_FILE
        self._file = JsonLinesFile(self.path)
        self._sync_seconds = sync_seconds
        self._synced = time.monotonic()
        first_step = 0 if resume_step is None else resume_step + 1
        self._board = _open_board(root / TENSORBOARD_FOLDER, first_step) if tensorboard else None

    def log(self, step: int, phase: Phase, values: Mapping[str, Any]) -> None:
        """Records the numbers of one step.

        Args:
            step: number of finished steps, 0 before training.
            phase: `sft`, `rl` or `eval`.
            values: numbers by name; NumPy scalars and tensors of one element are fine, NaN and infinity too.

        Raises:
            ValueError: if `phase` is unknown, a name is reserved, or a value is not a number.
        """
        if phase not in get_args(Phase):
            raise ValueError(f"phase is {phase!r}, must be one of {', '.join(get_args(Phase))}")
        numbers = {name: _number(name, value) for name, value in values.items()}
        now = time.time()
        row: dict[str, Any] = {"step": int(step), "time": round(now, 3), "phase": phase}
        row.update((name, _spell(number)) for name, number in numbers.items())
        self._file.append(row)
        if time.monotonic() - self._synced >= self._sync_seconds:
            self._file.sync()
            self._synced = time.monotonic()
        self._log_board(step, now, numbers)

    def close(self) -> None:
        """Puts everything on disk; safe to call twice."""
        self._file.close()
        if self._board is not None:
            board, self._board = self._board, None
            try:
                board.close()
            except OSError as error:
                logger.warning("TensorBoard's last events are not on disk: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _log_board(self, step: int, now: float, numbers: Mapping[str, float]) -> None:
        if self._board is None:
            return
        try:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, global_step=int(step), walltime=now)
        except OSError as error:
            logger.warning("TensorBoard is off from step %d on (%s); metrics.jsonl goes on", step, error)
            self._board = None


def open_metrics(run_dir: str | Path, *, rank: int, tensorboard: bool, resume_step: int | None) -> Metrics:
    """The metrics of this process: a `MetricsWriter` on rank 0, a `SilentMetrics` on all others."""
    if rank != 0:
        return SilentMetrics()
    return MetricsWriter(run_dir, tensorboard=tensorboard, resume_step=resume_step)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or of the one in a run directory, with NaN and infinity as floats again.

    A half-written line is left out; so are lines without a step.

    Raises:
        OSError: if the file cannot be read.
    """
    path = Path(path)
    rows = read_json_lines(path / METRICS_FILE if path.is_dir() else path)
    return [
        {name: _unspell(name, value) for name, value in row.items()}
        for row in rows
        if isinstance(row.get("step"), int) and isinstance(row.get("phase"), str)
    ]


def _number(name: str, value: Any) -> float | int:
    if name in _RESERVED:
        raise ValueError(f"a metric cannot be called {name!r}: every line has that field already")
    number = value.item() if hasattr(value, "item") and not isinstance(value, (int, float)) else value
    if isinstance(number, bool):
        return int(number)
    if not isinstance(number, (int, float)):
        raise ValueError(f"metric {name} is {value!r} ({type(value).__name__}), must be a number")
    return number


def _spell(number: float | int) -> float | int | str:
    if isinstance(number, int) or math.isfinite(number):
        return float(number) if isinstance(number, float) else number
    return "nan" if math.isnan(number) else ("inf" if number > 0 else "-inf")


def _unspell(name: str, value: Any) -> Any:
    return _SPELLED.get(value, value) if isinstance(value, str) and name not in _RESERVED else value


def _open_board(folder: Path, first_step: int) -> Any:
    # Imported here: it costs a second or more, and only rank 0 needs it.
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        logger.warning("no TensorBoard events will be written (%s); metrics.jsonl has every number", error)
        return None
    # The marker hides events of steps >= purge_step that a killed run left behind.
    return SummaryWriter(log_dir=str(folder), purge_step=first_step)
