"""Off-policy weights against loops by hand and exact expectations, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_klear.algorithm import OffPolicyCorrection, off_policy_weights

KINDS = ("token", "sequence", "token_mask", "sequence_mask")
LENGTHS = (5, 1, 9, 4, 7)
PROMPTS = (2, 1, 3, 1, 0)  # the second sequence has no sampled token at all


def problem(seed: int, scale: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    rollout = -3 * torch.rand(total, generator=rng, dtype=torch.float64)
    old = rollout + scale * torch.randn(total, generator=rng, dtype=torch.float64)
    sequence_of = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = torch.cat([torch.arange(n) >= p for n, p in zip(LENGTHS, PROMPTS, strict=True)])
    return old, rollout, mask, sequence_of


def by_hand(old, rollout, mask, sequence_of, correction) -> tuple[list[float], list[tuple[float, bool]]]:
    """Weights of all tokens, and (weight, cut) of every unit, by plain Python."""
    weights, units = [1.0] * len(old), []

    def weigh(ratio: float) -> tuple[float, bool]:
        if correction.kind in ("token", "sequence"):
            return min(ratio, correction.cap), ratio > correction.cap
        inside = correction.low <= ratio <= correction.high
        return (ratio if inside else 0.0), not inside

    for sequence in range(len(LENGTHS)):
        places = [t for t in range(len(old)) if int(sequence_of[t]) == sequence and bool(mask[t])]
        ratios = [math.exp(float(old[t]) - float(rollout[t])) for t in places]
        if correction.kind.startswith("sequence") and places:
            product = math.prod(ratios)
            ratio = product if correction.sequence_ratio == "product" else product ** (1 / len(ratios))
            units.append(weigh(ratio))
            for t in places:
                weights[t] = units[-1][0]
        elif not correction.kind.startswith("sequence"):
            for t, ratio in zip(places, ratios, strict=True):
                units.append(weigh(ratio))
                weights[t] = units[-1][0]
    return weights, units


@pytest.mark.parametrize("sequence_ratio", ["geometric_mean", "product"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_statistics_equal_a_loop(kind, sequence_ratio) -> None:
    correction = OffPolicyCorrection(kind=kind, cap=1.1, low=0.8, high=1.2, sequence_ratio=sequence_ratio)
    cut_somewhere = kept_somewhere = False
    for seed in range(5):
        old, rollout, mask, sequence_of = problem(seed)
        weights, stats = off_policy_weights(old, rollout, mask, sequence_of, correction, bound=0.4)
        expected, units = by_hand(old, rollout, mask, sequence_of, correction)
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
        differences = [abs(float(a) - float(b)) for a, b, m in zip(old, rollout, mask, strict=True) if m]
        values = stats.values()
        total, squares = sum(w for w, _ in units), sum(w * w for w, _ in units)
        assert values["weight_mean"] == pytest.approx(total / len(units), rel=1e-12)
        assert values["share_cut"] == pytest.approx(sum(c for _, c in units) / len(units), rel=1e-12)
        assert values["effective_sample_size"] == pytest.approx(
            total**2 / (len(units) * squares) if squares else 0.0, rel=1e-12
        )
        assert values["mean_abs"] == pytest.approx(sum(differences) / len(differences), rel=1e-12)
        assert values["max_abs"] == pytest.approx(max(differences), rel=1e-12)
        assert values["share_beyond"] == pytest.approx(sum(d > 0.4 for d in differences) / len(differences), rel=1e-12)
        cut_somewhere |= any(c for _, c in units)
        kept_somewhere |= any(not c for _, c in units)
    assert cut_somewhere
    assert kept_somewhere


def test_by_closed_form() -> None:
    """Two sequences: ratios (4, 1/4) and (2, 2)."""
    x = torch.tensor([math.log(4), -math.log(4), math.log(2), math.log(2)], dtype=torch.float64)
    zeros, all_sampled, of = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool), [0, 0, 1, 1]
    expected = {
        ("token", "product"): [3, 0.25, 2, 2],
        ("token_mask", "product"): [0, 0, 2, 2],
        ("sequence", "geometric_mean"): [1, 1, 2, 2],
        ("sequence", "product"): [1, 1, 3, 3],
        ("sequence_mask", "geometric_mean"): [1, 1, 2, 2],
        ("sequence_mask", "product"): [1, 1, 0, 0],
    }
    for (kind, ratio), weights in expected.items():
        correction = OffPolicyCorrection(kind=kind, cap=3, low=0.5, high=3, sequence_ratio=ratio)
        found, stats = off_policy_weights(x, zeros, all_sampled, torch.tensor(of), correction)
        torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64), rtol=1e-14, atol=0)
    assert stats.values()["effective_sample_size"] == pytest.approx(0.5)
    assert stats.values()["share_cut"] == 0.5


def test_importance_sampling_makes_the_engines_mean_the_trainers() -> None:
    """Over all outcomes: sum of mu * w * f is the mean of f under pi, but for what a cap cuts off."""
    rng = torch.Generator().manual_seed(0)
    mu = torch.log_softmax(torch.randn(8, generator=rng, dtype=torch.float64), -1)
    pi = torch.log_softmax(torch.randn(8, generator=rng, dtype=torch.float64), -1)
    f = torch.rand(8, generator=rng, dtype=torch.float64)
    every, of = torch.ones(8, dtype=torch.bool), torch.arange(8)
    for kind in ("token", "sequence"):  # sequences of one token
        free, _ = off_policy_weights(pi, mu, every, of, OffPolicyCorrection(kind=kind, cap=1e6))
        assert float((mu.exp() * free * f).sum()) == pytest.approx(float((pi.exp() * f).sum()), rel=1e-13)
        capped, _ = off_policy_weights(pi, mu, every, of, OffPolicyCorrection(kind=kind, cap=1.5))
        cut = (pi.exp() - 1.5 * mu.exp()).clamp(min=0)
        assert float(cut.sum()) > 0
        assert float((mu.exp() * capped * f).sum()) == pytest.approx(float(((pi.exp() - cut) * f).sum()), rel=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_constants_of_the_gradient(kind) -> None:
    old, rollout, mask, sequence_of = problem(1)
    old.requires_grad_()
    rollout.requires_grad_()
    weights, _ = off_policy_weights(old, rollout, mask, sequence_of, OffPolicyCorrection(kind=kind))
    assert not weights.requires_grad
    loss = old.square()
    (gradient,) = torch.autograd.grad((weights * loss).sum(), [old])
    torch.testing.assert_close(gradient, weights * 2 * old.detach(), rtol=1e-14, atol=0)


def test_none_weighs_nothing_and_equal_policies_weigh_exactly_1() -> None:
    old, rollout, mask, sequence_of = problem(2)
    weights, stats = off_policy_weights(old, rollout, mask, sequence_of, OffPolicyCorrection())
    assert torch.equal(weights, torch.ones_like(weights))
    assert stats.values()["share_cut"] == 0
    for kind in KINDS:
        weights, stats = off_policy_weights(old, old, mask, sequence_of, OffPolicyCorrection(kind=kind))
        assert torch.equal(weights, torch.ones_like(weights))
        assert stats.values()["effective_sample_size"] == pytest.approx(1.0, abs=1e-15)
        assert stats.values()["mean_abs"] == 0


@pytest.mark.parametrize("kind", ["token", "sequence", "sequence_mask"])
def test_statistics_of_parts_add_up(kind) -> None:
    old, rollout, mask, sequence_of = problem(3)
    correction = OffPolicyCorrection(kind=kind, cap=1.1, low=0.9, high=1.1)
    _, whole = off_policy_weights(old, rollout, mask, sequence_of, correction)
    cut = sum(LENGTHS[:3])
    _, first = off_policy_weights(old[:cut], rollout[:cut], mask[:cut], sequence_of[:cut], correction)
    _, rest = off_policy_weights(old[cut:], rollout[cut:], mask[cut:], sequence_of[cut:] - 3, correction)
    torch.testing.assert_close((first + rest).sums, whole.sums, rtol=1e-13, atol=1e-13)
    assert (first + rest).values()["max_abs"] == whole.values()["max_abs"]


@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind) -> None:
    """Long sequences stay finite; a NaN stays a NaN, also behind a mask; nothing sampled is no division by 0."""
    correction = OffPolicyCorrection(kind=kind, sequence_ratio="product")
    of = torch.zeros(5000, dtype=torch.int64)
    every = torch.ones(5000, dtype=torch.bool)
    for sign in (1.0, -1.0):
        weights, stats = off_policy_weights(torch.full((5000,), sign), torch.zeros(5000), every, of, correction)
        assert bool(torch.isfinite(weights).all())
        assert all(math.isfinite(value) for value in stats.values().values())
    broken = torch.zeros(5000)
    broken[17] = math.nan
    weights, stats = off_policy_weights(broken, torch.zeros(5000), every, of, correction)
    assert bool(weights[17].isnan())
    assert math.isnan(stats.values()["mean_abs"])
    assert stats.values()["share_beyond"] == 1 / 5000
    none = torch.zeros(0)
    weights, stats = off_policy_weights(none, none, none.bool(), none.long(), correction)
    assert weights.shape == (0,)
    assert stats.values()["mean_abs"] == 0
    assert stats.values()["effective_sample_size"] == 1


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="must enclose 1"):
        OffPolicyCorrection(kind="token_mask", low=0.5, high=0.9)
    with pytest.raises(ValueError, match=r"cap is 0\.5"):
        OffPolicyCorrection(kind="token", cap=0.5)
    old, rollout, mask, _ = problem(0)
    with pytest.raises(ValueError, match="one shape"):
        off_policy_weights(old, rollout, mask, torch.arange(3), OffPolicyCorrection())
