"""From lines of metrics to curves: which phases a run had, and each number as a function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """A metric over steps.

    Attributes:
        steps: float64 [K], rising.
        values: float64 [K]; NaN and infinity where the run logged them.
    """

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Series:
        """Without the values that are NaN or infinite."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])

    @property
    def last(self) -> float | None:
        """The last finite value; None where there is none."""
        values = self.finite.values
        return float(values[-1]) if len(values) else None

    @property
    def first(self) -> float | None:
        """The first finite value; None where there is none."""
        values = self.finite.values
        return float(values[0]) if len(values) else None

    def at(self, steps: Floats) -> Floats:
        """Values at the given steps, float64 [len(steps)], NaN where this series has none."""
        known = dict(zip(self.steps.tolist(), self.values.tolist(), strict=True))
        return np.array([known.get(step, np.nan) for step in steps.tolist()], dtype=np.float64)


class PhaseLog:
    """The lines of one training phase with its evaluations.

    Args:
        phase: `sft` or `rl`.
        rows: lines of metrics.jsonl, in order.
    """

    def __init__(self, phase: str, rows: Sequence[dict[str, Any]]) -> None:
        self.phase = phase
        self.rows = tuple(rows)

    def series(self, name: str) -> Series:
        """The metric `name` over steps; where a step was logged twice, the later value."""
        points = {int(row["step"]): row[name] for row in self.rows if _is_number(row.get(name))}
        steps = sorted(points)
        values = [float(points[step]) for step in steps]
        return Series(np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64))

    def names(self, prefix: str) -> tuple[str, ...]:
        """Names of the metrics that start with `prefix`, in the order of first appearance."""
        found = {name: None for row in self.rows for name in row if name.startswith(prefix)}
        return tuple(found)

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 where there is none."""
        return max((int(row["step"]) for row in self.rows), default=0)

    @property
    def seconds(self) -> float:
        """Time from the first line to the last, pauses between a kill and a resume included."""
        times = [float(row["time"]) for row in self.rows if _is_number(row.get("time"))]
        return max(times) - min(times) if times else 0.0


def split_phases(rows: Sequence[dict[str, Any]]) -> tuple[PhaseLog, ...]:
    """The training phases of a run in the order they ran, each with the evaluations made during it.

    An evaluation belongs to the training phase logged before it, or, before any training, to the next one;
    a run of evaluations alone is one phase called `eval`.
    """
    training = [str(row["phase"]) for row in rows if row["phase"] != "eval"]
    current = training[0] if training else "eval"
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["phase"] != "eval":
            current = str(row["phase"])
        by_phase.setdefault(current, []).append(row)
    return tuple(PhaseLog(phase, lines) for phase, lines in by_phase.items())


def add(parts: Sequence[Series]) -> Series:
    """The sum over the steps that any part has; what is missing or not finite counts as zero."""
    steps = np.unique(np.concatenate([part.steps for part in parts]))
    values = [np.nan_to_num(part.at(steps), posinf=0.0, neginf=0.0) for part in parts]
    return Series(steps, np.sum(values, axis=0))


def smooth(values: Floats, window: int) -> Floats:
    """Centred moving average, float64 [K], of finite values; at both ends the window is what there is of it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def smooth_median(values: Floats, window: int) -> Floats:
    """Centred moving median, float64 [K], of finite values; at both ends the window is what there is of it."""
    reach = window // 2
    padded = np.pad(values, reach, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)


def thin(series: Series, limit: int) -> Series:
    """At most about `limit` points that keep every spike: the least and the greatest value of each stretch."""
    if len(series) <= limit:
        return series
    edges = np.linspace(0, len(series), max(limit // 2, 1) + 1).astype(int)
    kept: list[int] = []
    for low, high in pairwise(edges.tolist()):
        values = series.values[low:high]
        if np.isfinite(values).any():
            kept += sorted({low + int(np.nanargmin(values)), low + int(np.nanargmax(values))})
    return Series(series.steps[kept], series.values[kept])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
