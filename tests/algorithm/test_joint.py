"""The joint objective."""

from __future__ import annotations

import math

import torch

from megatron_klear.algorithm import joint_objective


def test_by_hand_with_gradients() -> None:
    policy, lm = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    total = joint_objective(policy, lm, 0.5)
    total.backward()
    assert total.item() == 3.5
    assert policy.grad is not None
    assert lm.grad is not None
    assert (policy.grad.item(), lm.grad.item()) == (1.0, 0.5)


def test_a_weight_of_zero_leaves_the_policy_loss_alone() -> None:
    assert joint_objective(torch.tensor(2.0), torch.tensor(math.inf), 0.0).item() == 2.0
