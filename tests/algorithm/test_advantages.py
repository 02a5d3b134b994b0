"""Group advantages against statistics from the standard library."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.algorithm import group_advantages, zero_advantage_mask

REWARDS = st.lists(st.sampled_from([-1.0, 0.0, 0.1, 0.25, 0.3, 1.0]), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rewards=REWARDS, data=st.data())
def test_equals_the_population_statistics_of_the_graded(rewards: list[float], data: st.DataObject) -> None:
    graded = data.draw(st.lists(st.booleans(), min_size=len(rewards), max_size=len(rewards)))
    kept = [reward for reward, ok in zip(rewards, graded, strict=True) if ok]
    # What an ungraded entry holds must not matter: NaN would spread through any product.
    held = [reward if ok else math.nan for reward, ok in zip(rewards, graded, strict=True)]
    result = group_advantages(torch.tensor(held, dtype=torch.float64), torch.tensor(graded)).tolist()
    centred = group_advantages(
        torch.tensor(held, dtype=torch.float64), torch.tensor(graded), normalize_std=False
    ).tolist()
    for index, ok in enumerate(graded):
        if not ok or len(set(kept)) == 1:
            assert result[index] == 0.0
            assert centred[index] == 0.0
        else:
            mean, deviation = statistics.fmean(kept), statistics.pstdev(kept)
            assert result[index] == pytest.approx((rewards[index] - mean) / deviation, abs=1e-12)
            assert centred[index] == pytest.approx(rewards[index] - mean, abs=1e-12)


def test_by_hand() -> None:
    # Mean 1/4, variance 3/16: the right answer lies sqrt(3) deviations above.
    result = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64))
    third = 1 / math.sqrt(3)
    torch.testing.assert_close(result, torch.tensor([[math.sqrt(3), -third, -third, -third]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.1, -1.0, 0.0, 1 / 3, 1e-30, 1e30])
@pytest.mark.parametrize("size", [1, 3, 8, 17])
def test_equal_rewards_give_exact_zeros(dtype: torch.dtype, value: float, size: int) -> None:
    result = group_advantages(torch.full((2, size), value, dtype=dtype))
    assert result.dtype == dtype
    assert torch.equal(result, torch.zeros(2, size, dtype=dtype))
    assert zero_advantage_mask(result).all()


def test_shifting_or_scaling_rewards_changes_nothing() -> None:
    rewards = torch.rand(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(3.0 * rewards - 7.0), group_advantages(rewards), rtol=0, atol=1e-12)


def test_mean_zero_and_variance_one() -> None:
    result = group_advantages(torch.rand(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(result.mean(-1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(result.square().mean(-1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_nan_reward_that_was_graded_stays_visible() -> None:
    result = group_advantages(torch.tensor([1.0, math.nan, 0.0]))
    assert result.isnan().any()
    assert not zero_advantage_mask(result)


def test_nothing_graded_and_no_responses() -> None:
    assert torch.equal(group_advantages(torch.tensor([1.0, 2.0]), torch.tensor([False, False])), torch.zeros(2))
    assert group_advantages(torch.zeros(3, 0)).shape == (3, 0)


def test_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match="floating"):
        group_advantages(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="last dimension"):
        group_advantages(torch.tensor(1.0))
    with pytest.raises(ValueError, match="must be equal"):
        group_advantages(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))
