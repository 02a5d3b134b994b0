"""PPO's clipped surrogate, symmetric (PPO, GRPO) or asymmetric (clip-higher): Eqs. 1, 3, 5, 6, 7 and 10.

The equations differ in what they average over, which is the business of `token_weights`, and in whether the
two epsilons are equal. What one token contributes is the same in all of them and stands here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_klear.algorithm.ratio import DEFAULT_LOG_RATIO_LIMIT, aligned, attach_gradient, importance_ratio


def clip_ratio(ratio: Tensor, *, epsilon_low: float = 0.2, epsilon_high: float = 0.28) -> Tensor:
    """Clip ratios to [1 - epsilon_low, 1 + epsilon_high].

    Equation: Eq. 5.

    Args:
        ratio: [...] delta.
        epsilon_low, epsilon_high: distances of the bounds from 1.

    Returns:
        [...], dtype of `ratio`.
    """
    return ratio.clamp(min=1.0 - epsilon_low, max=1.0 + epsilon_high)


def clip_scale_at_ratio(
    ratio: Tensor, advantages: Tensor, *, epsilon_low: float = 0.2, epsilon_high: float = 0.28
) -> Tensor:
    """Return the clipped surrogate's coefficient F for given ratios: delta, or 0 where the clip binds.

    Equation: I_t r_t of Eq. 10, with clip-higher's bounds. I_t is 1 where r A <= clip(r) A, hence also exactly
    on a bound.

    Args:
        ratio: [...] delta, detached.
        advantages: [...] same shape and dtype.
        epsilon_low, epsilon_high: distances of the bounds from 1.

    Returns:
        [...], dtype of `ratio`.
    """
    too_low = (ratio < 1.0 - epsilon_low) & (advantages < 0)
    too_high = (ratio > 1.0 + epsilon_high) & (advantages > 0)
    return torch.where(too_low | too_high, torch.zeros_like(ratio), ratio)


def clip_gradient_scale(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    log_ratio_limit: float = DEFAULT_LOG_RATIO_LIMIT,
) -> Tensor:
    """Return the clipped surrogate's coefficient F: the loss has derivative -A F with respect to the logprob.

    Equation: I_t r_t of Eq. 10.

    Args:
        logprobs, old_logprobs: [...] log-probabilities of the taken tokens, nats.
        advantages: [...]; shape of `logprobs` or broadcastable to it.
        epsilon_low, epsilon_high: distances of the bounds from 1; equal for PPO and GRPO.
        log_ratio_limit: largest absolute log-ratio, nats.

    Returns:
        [...] detached; float32, or float64 for float64 `logprobs`.
    """
    ratio = importance_ratio(logprobs, old_logprobs, log_ratio_limit)
    advantages = aligned(logprobs, advantages)[1]
    return clip_scale_at_ratio(ratio, advantages, epsilon_low=epsilon_low, epsilon_high=epsilon_high)


def clip_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    log_ratio_limit: float = DEFAULT_LOG_RATIO_LIMIT,
) -> Tensor:
    """Return the clipped surrogate's loss of each token, -min(r A, clip(r) A), before any weighting or mean.

    Equation: the summand of Eqs. 1 and 3 (equal epsilons), 6 and 7, with its sign turned.

    Args:
        logprobs: [...] log-probabilities under pi_theta, nats; receives the gradient.
        old_logprobs: [...] under pi_old.
        advantages: [...]; shape of `logprobs` or broadcastable to it.
        epsilon_low, epsilon_high: distances of the bounds from 1; equal for PPO and GRPO.
        log_ratio_limit: largest absolute log-ratio, nats.

    Returns:
        [...] float32, or float64 for float64 `logprobs`; differentiable in `logprobs` only.
    """
    ratio = importance_ratio(logprobs, old_logprobs, log_ratio_limit)
    advantages = aligned(logprobs, advantages)[1]
    clipped = clip_ratio(ratio, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    value = -torch.minimum(ratio * advantages, clipped * advantages)
    scale = clip_scale_at_ratio(ratio, advantages, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return attach_gradient(logprobs, value, -advantages * scale)
