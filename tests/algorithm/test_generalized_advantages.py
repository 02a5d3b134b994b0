"""GAE against its two closed forms and a double sum."""

from __future__ import annotations

import pytest
import torch

from megatron_klear.algorithm import generalized_advantages

RNG = torch.Generator().manual_seed(11)
REWARDS = torch.randn(3, 6, generator=RNG, dtype=torch.float64)
VALUES = torch.randn(3, 7, generator=RNG, dtype=torch.float64)


def test_lambda_one_is_the_discounted_return_minus_the_value() -> None:
    gamma = 0.9
    result = generalized_advantages(REWARDS, VALUES, gamma=gamma, lam=1.0)
    for row in range(3):
        for t in range(6):
            total = sum(gamma ** (k - t) * float(REWARDS[row, k]) for k in range(t, 6))
            total += gamma ** (6 - t) * float(VALUES[row, 6])
            assert float(result[row, t]) == pytest.approx(total - float(VALUES[row, t]), abs=1e-13)


def test_lambda_zero_is_the_temporal_difference() -> None:
    result = generalized_advantages(REWARDS, VALUES, gamma=0.8, lam=0.0)
    torch.testing.assert_close(result, REWARDS + 0.8 * VALUES[:, 1:] - VALUES[:, :-1], rtol=0, atol=1e-15)


def test_double_sum_in_both_dtypes() -> None:
    gamma, lam = 0.97, 0.6
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        result = generalized_advantages(REWARDS.to(dtype), VALUES.to(dtype), gamma=gamma, lam=lam)
        assert result.dtype == dtype
        for t in range(6):
            expected = sum(
                (gamma * lam) ** k * (REWARDS[:, t + k] + gamma * VALUES[:, t + k + 1] - VALUES[:, t + k])
                for k in range(6 - t)
            )
            torch.testing.assert_close(result[:, t].double(), expected, rtol=0, atol=tolerance)


def test_zero_padding_at_the_end_changes_nothing() -> None:
    values = VALUES.clone()
    values[:, -1] = 0.0
    padded = generalized_advantages(
        torch.nn.functional.pad(REWARDS, (0, 4)), torch.nn.functional.pad(values, (0, 4)), gamma=0.9, lam=0.8
    )
    torch.testing.assert_close(padded[:, :6], generalized_advantages(REWARDS, values, gamma=0.9, lam=0.8))
    assert torch.equal(padded[:, 6:], torch.zeros(3, 4, dtype=torch.float64))


def test_empty_and_refusals() -> None:
    assert generalized_advantages(torch.zeros(2, 0), torch.zeros(2, 1)).shape == (2, 0)
    assert generalized_advantages(torch.tensor([2.0]), torch.tensor([0.5, 0.0])).tolist() == [1.5]
    with pytest.raises(ValueError, match="one entry more"):
        generalized_advantages(REWARDS, VALUES[:, :-1])
    with pytest.raises(ValueError, match=r"lam is 1\.5"):
        generalized_advantages(REWARDS, VALUES, lam=1.5)
