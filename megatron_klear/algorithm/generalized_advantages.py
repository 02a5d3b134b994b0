"""Generalized advantage estimation for PPO with a value function (Eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def generalized_advantages(rewards: Tensor, values: Tensor, *, gamma: float = 1.0, lam: float = 1.0) -> Tensor:
    """Return the discounted sum of temporal differences from each step on.

    Equation: Eq. 2, delta_t = r_t + gamma V(s_{t+1}) - V(s_t). Sequences padded at the end need no mask: with
    zeros for reward and value there, the padding's temporal differences are 0.

    Args:
        rewards: [..., T] floating, reward of each step.
        values: [..., T + 1], V of each state; the last is that of the state after the last step, 0 if terminal.
        gamma: discount factor, 0 to 1.
        lam: GAE's lambda, 0 (one-step difference) to 1 (return minus value).

    Returns:
        [..., T], dtype and device of `rewards`, detached.

    Raises:
        ValueError: shapes do not fit, or a factor is outside 0..1.
    """
    if rewards.dim() == 0 or values.shape != (*rewards.shape[:-1], rewards.shape[-1] + 1):
        raise ValueError(
            f"values must have one entry more than rewards along the last dimension, got {tuple(values.shape)} "
            f"for rewards of {tuple(rewards.shape)}"
        )
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= factor <= 1.0:
            raise ValueError(f"{name} is {factor}, must be within 0 and 1")
    rewards, values = rewards.detach(), values.detach()
    differences = rewards + gamma * values[..., 1:] - values[..., :-1]
    result = torch.empty_like(rewards)
    running = torch.zeros(rewards.shape[:-1], dtype=rewards.dtype, device=rewards.device)
    for step in range(rewards.shape[-1] - 1, -1, -1):
        running = differences[..., step] + gamma * lam * running
        result[..., step] = running
    return result
