"""What an evaluation found: figures of each benchmark, as a table for people and as JSON for programs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from megatron_klear.evaluation.generations import Generation
from megatron_klear.evaluation.statistics import Estimate, ProblemCount, avg_at_n, pass_at
from megatron_klear.records import Grade, Outcome

if TYPE_CHECKING:
    from rich.table import Table

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A response and its grade."""

    generation: Generation
    grade: Grade


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """Figures of one benchmark.

    Attributes:
        name: of the benchmark.
        num_problems: in the benchmark, with or without responses.
        num_without_response: of those.
        num_responses: all, graded or not.
        responses_per_problem: fewest and most, over the problems that have any.
        avg: accuracy of one response (avg@n), over problems.
        pass_at_k: k -> pass@k.
        mean_reward: of graded responses; code is worth its share of passed tests. NaN without any.
        outcomes: how many responses ended in each outcome.
        share_cut: of responses that ended at the token budget.
        tokens: mean and 95 % point of the responses' lengths; None where nobody counted.
        problems: problem id -> how its responses were judged.
    """

    name: str
    num_problems: int
    num_without_response: int
    num_responses: int
    responses_per_problem: tuple[int, int]
    avg: Estimate
    pass_at_k: dict[int, Estimate]
    mean_reward: float
    outcomes: dict[Outcome, int]
    share_cut: float
    tokens: tuple[float, float] | None
    problems: dict[str, ProblemCount]

    @property
    def label(self) -> str:
        """`avg@n` with the n there is."""
        fewest, most = self.responses_per_problem
        return f"avg@{most}" if fewest == most else f"avg@{fewest}-{most}"


def summarize(
    name: str, problem_ids: Sequence[str], judged: Sequence[Judged], *, ks: Sequence[int], seed: int
) -> BenchmarkResult:
    """Figures of one benchmark from its judged responses.

    Args:
        name: of the benchmark.
        problem_ids: all its problems, those without a response included.
        judged: responses to these problems.
        ks: values of k for pass@k; empty takes powers of two up to the fewest graded responses of a problem, so that
            all problems with any take part in each. With fewer than k a problem takes no part in pass@k.
        seed: of the bootstrap.
    """
    by_problem: dict[str, list[Judged]] = defaultdict(list)
    for item in judged:
        by_problem[item.generation.problem_id].append(item)
    counts = {problem: _count(by_problem.get(problem, [])) for problem in problem_ids}
    numbers = [len(items) for items in by_problem.values()] or [0]
    fewest_graded = min((count.num_graded for count in counts.values() if count.num_graded), default=0)
    rewards = [item.grade.reward for item in judged if item.grade.outcome != "ungraded"]
    lengths = [item.generation.num_tokens for item in judged if item.generation.num_tokens is not None]
    found = Counter(item.grade.outcome for item in judged)
    cut = sum(item.generation.finish_reason == "length" for item in judged)
    return BenchmarkResult(
        name=name,
        num_problems=len(problem_ids),
        num_without_response=sum(problem not in by_problem for problem in problem_ids),
        num_responses=len(judged),
        responses_per_problem=(min(numbers), max(numbers)),
        avg=avg_at_n(counts, seed=seed),
        pass_at_k=pass_at(counts, ks or default_ks(fewest_graded), seed=seed),
        mean_reward=float(np.mean(rewards)) if rewards else math.nan,
        outcomes={outcome: found[outcome] for outcome in OUTCOMES},
        share_cut=cut / len(judged) if judged else math.nan,
        tokens=(float(np.mean(lengths)), float(np.quantile(lengths, 0.95))) if lengths else None,
        problems=counts,
    )


def coverage_lines(results: Sequence[BenchmarkResult]) -> list[str]:
    """One line for each benchmark with a figure that does not cover all its problems; none where all are covered."""
    lines = []
    for result in results:
        figures = [(result.label, result.avg), *((f"pass@{k}", value) for k, value in result.pass_at_k.items())]
        short = [
            f"{name} {covered(value, result)}" for name, value in figures if value.num_problems < result.num_problems
        ]
        if short:
            ungraded = result.num_problems - result.num_without_response - result.avg.num_problems
            lines.append(
                f"INCOMPLETE: {result.name}: problems covered: {', '.join(short)}; {result.num_without_response} have "
                f"no response, {ungraded} no graded one. These are not figures of the whole benchmark."
            )
    return lines


def covered(value: Estimate, result: BenchmarkResult) -> str:
    """`28 of 30`: the problems that a figure is of, and all."""
    return f"{value.num_problems:,} of {result.num_problems:,}"


def default_ks(num_responses: int) -> list[int]:
    """Powers of two up to the number of responses, and that number itself."""
    ks = [2**i for i in range(num_responses.bit_length())]
    return sorted({*ks, num_responses} - {0})


def _count(items: Sequence[Judged]) -> ProblemCount:
    outcomes = [item.grade.outcome for item in items]
    ungraded = outcomes.count("ungraded")
    return ProblemCount(
        num_graded=len(outcomes) - ungraded, num_correct=outcomes.count("correct"), num_ungraded=ungraded
    )


def as_json(results: Sequence[BenchmarkResult], facts: Mapping[str, Any]) -> dict[str, Any]:
    """All figures as plain JSON values; what is not a number is null.

    Args:
        results: one per benchmark.
        facts: what the figures were made with (model, sampling, versions); taken over as they are.
    """
    rows = [{**asdict(result), "label": result.label, "complete": not coverage_lines([result])} for result in results]
    return {"facts": dict(facts), "benchmarks": [_plain(row) for row in rows]}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results_table(results: Sequence[BenchmarkResult], rules: Mapping[str, str]) -> Table:
    """The figures for a terminal: accuracy in percent with its 95 % interval over problems.

    Args:
        results: one per benchmark.
        rules: what answers were graded by, to stand below the figures.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    told = "; ".join(f"{name}: {text}" for name, text in rules.items())
    caption = Text(f"graded by these rules: {told}") if rules else None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    for title in ("benchmark", "metric", "%", "95 % interval", "problems", "also", "%", "95 % interval", "problems"):
        table.add_column(title, justify="left" if title in ("benchmark", "metric", "also") else "right")
    for title in ("responses", "cut at limit", "mean tokens", "malformed", "ungraded"):
        table.add_column(title, justify="right")
    for result in results:
        most, best = next(reversed(result.pass_at_k.items()), (0, None))
        table.add_row(
            Text(result.name), result.label,
            percent(result.avg.mean), interval(result.avg), covered(result.avg, result),
            *(("", "", "", "") if best is None or most == 1 else (
                f"pass@{most}", percent(best.mean), interval(best), covered(best, result)
            )),
            f"{result.num_responses:,}", f"{percent(result.share_cut)} %",
            "-" if result.tokens is None else f"{result.tokens[0]:,.0f}",
            *(str(result.outcomes[name]) for name in ("malformed", "ungraded")),
        )  # fmt: skip
    return table


def percent(value: float) -> str:
    """`0.1234` as `12.3`."""
    return "-" if not math.isfinite(value) else f"{100 * value:.1f}"


def interval(value: Estimate) -> str:
    """`12.3 to 45.6`, in percent."""
    return "-" if not math.isfinite(value.low) else f"{percent(value.low)} to {percent(value.high)}"
