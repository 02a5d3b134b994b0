"""What a report says in words and figures: accuracies, the headline, the tiles, rollouts to read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_klear.observe import names
from megatron_klear.observe.charts import PHASE_TITLES
from megatron_klear.observe.readable import byte_size, duration, quantity
from megatron_klear.observe.series import PhaseLog

_LONGEST_TEXT = 30_000
"""Characters of a text that the page shows; the middle of a longer one is left out."""

_THINK_END = "</think>"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy on held-out problems at one moment.

    Attributes:
        label: when, for instance "After RL".
        phase: the training phase it belongs to.
        step: steps of that phase done then.
        value: share of answers correct.
        count: graded answers behind it; None if it was not logged.
        stderr: standard error; the binomial one where none was logged, None without a count.
    """

    label: str
    phase: str
    step: int
    value: float
    count: int | None
    stderr: float | None


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure worth a large font."""

    label: str
    value: str
    unit: str
    detail: str


def accuracies(logs: Sequence[PhaseLog]) -> list[Accuracy]:
    """First and last held-out accuracy of each phase; where two phases meet at the same value, it is told once."""
    points: list[Accuracy] = []
    for log in logs:
        series = log.series(names.ACCURACY_HELDOUT).finite
        title = PHASE_TITLES.get(log.phase, log.phase)
        for index in sorted({0, len(series) - 1}) if len(series) else []:
            step = int(series.steps[index])
            before = index == 0 and (step == 0 or len(series) > 1)
            label = ("Before " if step == 0 else "Early in ") + title if before else "After " + title
            point = _accuracy_at(log, label if log.phase != "eval" else title, step, float(series.values[index]))
            previous = points[-1] if points else None
            meets = previous is not None and previous.phase != log.phase and before
            if meets and previous is not None and (previous.value, previous.count) == (point.value, point.count):
                continue
            points.append(point)
    return points


def headline(points: Sequence[Accuracy]) -> str:
    """One sentence on what the last training phase did to the accuracy; empty without two points to compare."""
    if len(points) < 2:
        return ""
    before, after = points[-2], points[-1]
    change = after.value - before.value
    title = PHASE_TITLES.get(after.phase, after.phase)
    if before.stderr is None or after.stderr is None:
        return f"During {title}, held-out accuracy went from {before.value:.3f} to {after.value:.3f} ({change:+.3f})."
    error = math.hypot(before.stderr, after.stderr)
    span = f"from {before.value:.3f} to {after.value:.3f} ({change:+.3f} ± {error:.3f}, {after.count} answers)"
    if abs(change) <= 2 * error:
        return f"{title} did not change held-out accuracy beyond the uncertainty of measuring it: it went {span}."
    return f"{title} {'raised' if change > 0 else 'lowered'} held-out accuracy {span}."


def tiles(logs: Sequence[PhaseLog], points: Sequence[Accuracy]) -> list[Tile]:
    """The figures at the top of the page, about the last phase."""
    if not logs:
        return []
    log = logs[-1]
    found: list[Tile] = []
    if points:
        last = points[-1]
        count = f"{last.count} answers" if last.count is not None else f"step {last.step}"
        error = f"± {last.stderr:.3f}" if last.stderr is not None else ""
        found.append(Tile("Held-out accuracy", f"{last.value:.3f}", error, f"{last.label}, {count}"))
    for name, label, unit, show in (
        (names.REWARD_MEAN, "Reward", "", "{:.3f}".format),
        (names.LOSS_TOTAL, "Loss", "", quantity),
        (names.RESPONSE_LENGTH_MEAN, "Response length", "tokens", quantity),
    ):
        values = log.series(name).finite.values
        if len(values) and not (label == "Loss" and log.phase == "rl"):
            few = max(1, min(5, len(values) // 4))
            start, end = float(values[:few].mean()), float(values[-few:].mean())
            found.append(Tile(label, show(end), unit, f"At first {show(start)}"))
    speed = log.series(names.TOKENS_PER_SECOND).finite.values
    if len(speed):
        found.append(Tile("Throughput", quantity(float(np.median(speed))), "tokens/s", "Median of all steps"))
    found += _utilization_tile(log)
    memory = log.series(names.MEMORY_PEAK_BYTES).finite.values
    if len(memory):
        size, unit = byte_size(float(memory.max())).split()
        found.append(Tile("Peak memory", size, unit, "Of one process"))
    title = PHASE_TITLES.get(log.phase, log.phase)
    found.append(Tile("Steps", f"{log.last_step:,}", title, f"In {duration(log.seconds)}, pauses included"))
    return found


def _utilization_tile(log: PhaseLog) -> list[Tile]:
    """Model operations per second, with their share of the data sheet's rate, else of the measured one."""
    rate = log.series(names.MODEL_TFLOPS).finite.values
    if not len(rate):
        return []
    detail = "Median of all steps"
    for name, of in ((names.MFU_DATASHEET, "the data sheet"), (names.MFU, "measured products")):
        share = log.series(name).finite.values
        if len(share):
            detail = f"{100 * float(np.median(share)):.1f}% of {of}"
            break
    median = float(np.median(rate)) * 1e12
    value = quantity(median)
    letter = value[-1] if value[-1].isalpha() else ""
    return [Tile("Model compute", value.removesuffix(letter), f"{letter}FLOP/s per device", detail)]


def pick_rollouts(examples: Sequence[dict[str, Any]], *, each: int = 3) -> list[dict[str, Any]]:
    """Sections of rollouts to read: right and wrong ones of the last steps, and one of each from the first.

    Args:
        examples: lines of examples.jsonl, in order.
        each: how many right and how many wrong ones, of different problems as far as there are any.
    """
    right = [row for row in examples if row["outcome"] == "correct"]
    wrong = [row for row in examples if row["outcome"] in ("wrong", "malformed", "partial")]
    sections = []
    shown: set[int] = set()
    for title, rows in (("Right answers", right), ("Wrong answers", wrong)):
        chosen = _different(_mixed(rows[::-1]), each)
        shown |= {id(row) for row in chosen}
        if chosen:
            note = "From the latest steps. The thinking part is set in grey."
            sections.append({"title": title, "note": note, "examples": [readable_response(row) for row in chosen]})
    first = [row for rows in (right, wrong) for row in _different(rows, 1) if id(row) not in shown]
    if first:
        note = "For comparison with the above: what the model wrote at the start of the run."
        sections.append(
            {"title": "From the first steps", "note": note, "examples": [readable_response(row) for row in first]}
        )
    return sections


def last_values(log: PhaseLog) -> list[dict[str, str]]:
    """The last value of every metric of a phase, with unit and meaning."""
    rows = []
    for name in sorted(name for name in log.names("") if name not in ("step", "time", "phase")):
        series = log.series(name)
        if not len(series):
            continue
        value, metric = float(series.values[-1]), names.describe(name)
        shown = byte_size(value) if metric.unit == "bytes" and math.isfinite(value) else f"{value:.6g}"
        unit = "" if metric.unit == "bytes" else metric.unit
        step = f"{series.steps[-1]:.0f}"
        rows.append({"name": name, "step": step, "value": shown, "unit": unit, "meaning": metric.meaning})
    return rows


def _accuracy_at(log: PhaseLog, label: str, step: int, value: float) -> Accuracy:
    at = np.array([step], dtype=np.float64)
    count = float(log.series(names.ACCURACY_HELDOUT_COUNT).at(at)[0])
    stderr = float(log.series(names.ACCURACY_HELDOUT_STDERR).at(at)[0])
    known = math.isfinite(count) and count > 0
    if not math.isfinite(stderr):
        stderr = math.sqrt(max(value * (1 - value), 0.0) / count) if known else math.nan
    return Accuracy(
        label=label,
        phase=log.phase,
        step=step,
        value=value,
        count=int(count) if known else None,
        stderr=stderr if math.isfinite(stderr) else None,
    )


def _mixed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with the first of each outcome in front, so that a few of them show every way of being wrong."""
    by_outcome: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_outcome.setdefault(row["outcome"], row)
    front = list(by_outcome.values())
    taken = {id(row) for row in front}
    return front + [row for row in rows if id(row) not in taken]


def _different(rows: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The first rows, one per problem; a second of the same problem only where there are too few."""
    by_problem: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_problem.setdefault(row["prompt_id"], row)
    chosen = list(by_problem.values())[:limit]
    taken = {id(row) for row in chosen}
    return chosen + [row for row in rows if id(row) not in taken][: limit - len(chosen)]


def readable_response(
    row: Mapping[str, Any], *, longest: int = _LONGEST_TEXT, whole: str = "examples.jsonl has them"
) -> dict[str, Any]:
    """A response as a page shows it: thinking part apart, long texts shortened, words for how it ended.

    Args:
        row: `prompt`, `reference`, `response`, `reward`, `finish_reason`, and whatever else the page shows.
        longest: characters of a text that are shown.
        whole: where the characters that are left out can be found.
    """

    def shortened(text: str) -> str:
        return _shortened(text, longest, whole)

    response = row["response"]
    cut = response.rfind(_THINK_END)
    split = cut + len(_THINK_END) if cut >= 0 else 0
    endings = {"stop": "ended by itself", "length": "cut off at the token limit", "abort": "interrupted"}
    return {
        **row,
        "prompt": shortened(row["prompt"]),
        "reference": shortened(row["reference"]),
        "thinking": shortened(response[:split]),
        "answer": shortened(response[split:]) if split < len(response) or split else "(empty)",
        "reward": f"{row['reward']:.3g}",
        "ending": endings.get(row["finish_reason"], row["finish_reason"]),
    }


def _shortened(text: str, longest: int, whole: str) -> str:
    if len(text) <= longest:
        return text
    half = longest // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n\n[... {left_out:,} characters left out; {whole} ...]\n\n{text[-half:]}"
