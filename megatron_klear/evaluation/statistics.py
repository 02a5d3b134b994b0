"""avg@n and pass@k over problems, with confidence intervals by bootstrap.

A problem that has no graded response takes no part in any figure: a grader that failed says nothing about the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
"""Resampled sets of problems behind an interval."""

_RESAMPLED_AT_A_TIME = 2**22
"""Draws in memory at a time, whatever the number of problems."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over problems.

    Attributes:
        mean: NaN where no problem could be judged.
        low, high: ends of its confidence interval; NaN like the mean.
        num_problems: problems that take part.
    """

    mean: float
    low: float
    high: float
    num_problems: int


def pass_at_k(num_responses: int, num_correct: int, k: int) -> float:
    """Probability that of k responses, drawn from those there are without putting back, one or more is correct.

    Equation: 1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. 2021, "Evaluating Large Language Models
    Trained on Code", Eq. 1.

    Args:
        num_responses: n, graded responses of the problem.
        num_correct: c of them that are correct.
        k: at most n.

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    if not 1 <= k <= num_responses or not 0 <= num_correct <= num_responses:
        raise ValueError(f"pass@{k} of {num_responses} responses with {num_correct} correct is not defined")
    return 1.0 - math.comb(num_responses - num_correct, k) / math.comb(num_responses, k)


def estimate(values: Sequence[float] | NDArray[np.float64], *, seed: int, confidence: float = 0.95) -> Estimate:
    """Mean of per-problem values with the percentile bootstrap interval over problems.

    Problems are what a benchmark samples from a subject; responses to one problem are not independent of one another.

    Args:
        values: float [P], one per problem.
        seed: of the resampling.
        confidence: share of resampled means within the interval.
    """
    given = np.asarray(values, np.float64)
    count = len(given)
    if count == 0:
        return Estimate(mean=math.nan, low=math.nan, high=math.nan, num_problems=0)
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    at_a_time = max(1, _RESAMPLED_AT_A_TIME // count)
    for first in range(0, RESAMPLES, at_a_time):
        number = min(at_a_time, RESAMPLES - first)
        means[first : first + number] = given[rng.integers(0, count, (number, count))].mean(axis=1)
    outside = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [outside, 1.0 - outside])
    return Estimate(mean=float(given.mean()), low=float(low), high=float(high), num_problems=count)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemCount:
    """How the responses to one problem were judged.

    Attributes:
        num_graded: responses with a grade.
        num_correct: of those.
        num_ungraded: responses whose grader failed.
    """

    num_graded: int
    num_correct: int
    num_ungraded: int


def avg_at_n(counts: Mapping[str, ProblemCount], *, seed: int) -> Estimate:
    """Accuracy of one response, averaged over the responses of each problem and then over problems."""
    return estimate([c.num_correct / c.num_graded for c in counts.values() if c.num_graded], seed=seed)


def pass_at(counts: Mapping[str, ProblemCount], ks: Sequence[int], *, seed: int) -> dict[int, Estimate]:
    """pass@k for each k over the problems that have k graded responses; a k that no problem has is left out."""
    found = {}
    for k in sorted(set(ks)):
        values = [pass_at_k(c.num_graded, c.num_correct, k) for c in counts.values() if c.num_graded >= k]
        if values:
            found[k] = estimate(values, seed=seed)
    return found
