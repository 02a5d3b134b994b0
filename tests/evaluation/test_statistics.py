"""Accuracies and their intervals, against enumeration of everything that could be drawn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_klear.evaluation.statistics import RESAMPLES, ProblemCount, avg_at_n, estimate, pass_at, pass_at_k


@pytest.mark.parametrize(("num_responses", "num_correct"), [(n, c) for n in range(1, 8) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_response(num_responses: int, num_correct: int) -> None:
    responses = [i < num_correct for i in range(num_responses)]
    for k in range(1, num_responses + 1):
        draws = list(itertools.combinations(responses, k))
        assert pass_at_k(num_responses, num_correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_of_impossible_numbers_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of {n} responses with {c} correct"):
        pass_at_k(n, c, k)


def test_the_interval_is_that_of_all_resamples() -> None:
    values = [0.0, 0.1, 0.5, 1.0, 0.7]
    means = np.sort([np.mean(draw) for draw in itertools.product(values, repeat=len(values))])
    found = estimate(values, seed=3)
    assert found.mean == pytest.approx(0.46, abs=1e-15)
    # The exact distribution has 3,125 draws; 10,000 random ones find its 2.5 % points up to the standard error of a
    # quantile's rank, sqrt(0.025 * 0.975 / 10,000) = 0.0016; five of these are allowed.
    slack = 5 * math.sqrt(0.025 * 0.975 / RESAMPLES)
    for end, rank in ((found.low, 0.025), (found.high, 0.975)):
        assert np.quantile(means, rank - slack) <= end <= np.quantile(means, rank + slack)


def test_the_interval_narrows_with_problems_as_the_standard_error_does() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(400)
    found = estimate(values, seed=0)
    width = 2 * 1.959964 * values.std() / math.sqrt(len(values))  # what the central limit theorem says
    # The rank of either end is off by up to 5 standard errors, which moves a normal quantile by 8 % of 1.96.
    assert found.high - found.low == pytest.approx(width, rel=0.1)


def test_the_same_seed_gives_the_same_interval_in_any_number_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.linspace(0.0, 1.0, 7)
    whole = estimate(values, seed=1)
    monkeypatch.setattr("megatron_klear.evaluation.statistics._RESAMPLED_AT_A_TIME", 70)
    assert estimate(values, seed=1) == whole


def test_without_problems_there_is_no_number() -> None:
    nothing = estimate([], seed=0)
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.low)
    assert nothing.num_problems == 0


def count(graded: int, correct: int, ungraded: int = 0) -> ProblemCount:
    return ProblemCount(num_graded=graded, num_correct=correct, num_ungraded=ungraded)


def test_avg_at_n_weighs_problems_equally_and_leaves_out_what_was_not_graded() -> None:
    counts = {"a": count(4, 1), "b": count(2, 2, 2), "c": count(0, 0, 4)}
    found = avg_at_n(counts, seed=0)
    assert found.mean == (0.25 + 1.0) / 2  # not 3 of 6, and nothing for c
    assert found.num_problems == 2


def test_pass_at_uses_the_problems_that_have_enough_responses() -> None:
    counts = {"a": count(4, 1), "b": count(2, 2), "c": count(0, 0, 4)}
    found = pass_at(counts, [4, 1, 2, 8], seed=0)
    assert list(found) == [1, 2, 4]
    assert found[2].mean == pytest.approx((0.5 + 1.0) / 2)
    assert (found[4].mean, found[4].num_problems) == (1.0, 1)
