"""KL estimates against the exact divergence of two categorical distributions."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_klear.algorithm import rollout_divergence


def test_both_estimators_are_unbiased() -> None:
    rng = torch.Generator().manual_seed(0)
    rollout = torch.log_softmax(torch.randn(6, generator=rng, dtype=torch.float64), -1)
    trainer = torch.log_softmax(torch.randn(6, generator=rng, dtype=torch.float64), -1)
    exact = float((rollout.exp() * (rollout - trainer)).sum())
    # One token per outcome, weighted by its probability: the expectation, without sampling noise.
    k1 = k3 = 0.0
    for token in range(6):
        one = torch.tensor([True])
        means = rollout_divergence(rollout[token : token + 1], trainer[token : token + 1], one).means()
        k1 += math.exp(float(rollout[token])) * means["kl_k1"]
        k3 += math.exp(float(rollout[token])) * means["kl_k3"]
        assert means["kl_k3"] >= 0.0
    assert k1 == pytest.approx(exact, abs=1e-14)
    assert k3 == pytest.approx(exact, abs=1e-14)


def test_by_hand_with_mask() -> None:
    rollout = torch.tensor([-1.0, -2.0, math.nan])
    trainer = torch.tensor([-1.5, -1.0, 0.0])
    means = rollout_divergence(rollout, trainer, torch.tensor([True, True, False])).means()
    assert means["kl_k1"] == pytest.approx((0.5 - 1.0) / 2)
    assert means["kl_k3"] == pytest.approx((math.exp(-0.5) - 1 + 0.5 + math.e - 1 - 1) / 2)
    gap = math.exp(-1) - math.exp(-1.5) + math.exp(-1) - math.exp(-2)
    assert means["mean_abs_prob_difference"] == pytest.approx(gap / 2)
    assert means["max_abs_log_ratio"] == 1.0


def test_equal_logprobs_give_exact_zero_and_parts_add_up() -> None:
    values = -torch.rand(50, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(50, dtype=torch.bool)
    assert set(rollout_divergence(values, values, mask).means().values()) == {0.0}
    other = values - 0.1 * torch.rand(50, generator=torch.Generator().manual_seed(2))
    whole = rollout_divergence(values, other, mask)
    parts = rollout_divergence(values[:20], other[:20], mask[:20]) + rollout_divergence(
        values[20:], other[20:], mask[20:]
    )
    torch.testing.assert_close(parts.sums, whole.sums)
    assert torch.equal(parts.max_abs_log_ratio, whole.max_abs_log_ratio)


def test_impossible_token_stays_finite_and_empty_is_zero() -> None:
    one = torch.tensor([True])
    means = rollout_divergence(torch.tensor([-math.inf]), torch.tensor([-1.0]), one).means()
    assert all(math.isfinite(value) for value in means.values())
    empty = torch.zeros(0)
    assert set(rollout_divergence(empty, empty, torch.zeros(0, dtype=torch.bool)).means().values()) == {0.0}
    with pytest.raises(ValueError, match="must be equal"):
        rollout_divergence(torch.zeros(2), torch.zeros(2), one)
