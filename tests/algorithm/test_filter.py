"""Zero-advantage filtering."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_klear.algorithm import group_advantages, zero_advantage_mask


def test_all_right_all_wrong_and_mixed() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0], [1.0, -1.0, 1.0]])
    assert zero_advantage_mask(group_advantages(rewards)).tolist() == [True, True, False]


def test_a_group_whose_only_difference_is_ungraded_is_left_out() -> None:
    rewards = torch.tensor([[1.0, 1.0, 0.0]])
    graded = torch.tensor([[True, True, False]])
    assert zero_advantage_mask(group_advantages(rewards, graded)).tolist() == [True]
    assert zero_advantage_mask(group_advantages(rewards)).tolist() == [False]


def test_tiny_advantages_and_nan_stay() -> None:
    assert zero_advantage_mask(torch.tensor([[0.0, 1e-30], [0.0, math.nan], [-0.0, 0.0]])).tolist() == [
        False,
        False,
        True,
    ]


def test_refuses_a_scalar() -> None:
    with pytest.raises(ValueError, match="last dimension"):
        zero_advantage_mask(torch.tensor(0.0))
