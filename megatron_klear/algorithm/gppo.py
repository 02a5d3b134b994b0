"""Gradient-preserving clipping: GPPO and its general form with beta_low and beta_high (Eqs. 11, 12, 17, 18)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_klear.algorithm.ratio import DEFAULT_LOG_RATIO_LIMIT, aligned, attach_gradient, importance_ratio


def gppo_scale_at_ratio(
    ratio: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    beta_low: float = 1.0,
    beta_high: float = 1.0,
) -> Tensor:
    """Return GPPO's coefficient F for given ratios.

    Equation: Eq. 18; Eq. 12 when both betas are 1. F is beta_low (1 - epsilon_low) where delta < 1 - epsilon_low
    and A < 0, beta_high (1 + epsilon_high) where delta > 1 + epsilon_high and A > 0, and delta elsewhere. The
    inequalities are strict: exactly on a bound F is delta.

    Args:
        ratio: [...] delta, detached.
        advantages: [...] A-tilde, same shape and dtype.
        epsilon_low, epsilon_high: distances of the bounds from 1.
        beta_low, beta_high: beta_1 and beta_2, the scale of F beyond each bound.

    Returns:
        [...], dtype of `ratio`; positive for positive betas, so no token with an advantage is lost.
    """
    low, high = 1.0 - epsilon_low, 1.0 + epsilon_high
    scale = torch.where((ratio < low) & (advantages < 0), torch.full_like(ratio, beta_low * low), ratio)
    return torch.where((ratio > high) & (advantages > 0), torch.full_like(ratio, beta_high * high), scale)


def gppo_gradient_scale(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    beta_low: float = 1.0,
    beta_high: float = 1.0,
    log_ratio_limit: float = DEFAULT_LOG_RATIO_LIMIT,
) -> Tensor:
    """Return GPPO's coefficient F of each token: the loss has derivative -A F with respect to the logprob.

    Equation: Eq. 18; Eq. 12 when both betas are 1.

    Args:
        logprobs, old_logprobs: [...] log-probabilities of the taken tokens, nats.
        advantages: [...] A-tilde; shape of `logprobs` or broadcastable to it.
        epsilon_low, epsilon_high: the ratio's bounds are 1 - epsilon_low and 1 + epsilon_high.
        beta_low, beta_high: beta_1 and beta_2, the scale of F beyond each bound.
        log_ratio_limit: largest absolute log-ratio, nats.

    Returns:
        [...] detached; float32, or float64 for float64 `logprobs`.
    """
    ratio = importance_ratio(logprobs, old_logprobs, log_ratio_limit)
    return gppo_scale_at_ratio(
        ratio,
        aligned(logprobs, advantages)[1],
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta_low=beta_low,
        beta_high=beta_high,
    )


def gppo_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    beta_low: float = 1.0,
    beta_high: float = 1.0,
    log_ratio_limit: float = DEFAULT_LOG_RATIO_LIMIT,
) -> Tensor:
    """Return GPPO's loss of each token, before any weighting or mean: -A F, with derivative -A F.

    Equation: the summand of Eq. 17 with its sign turned (the paper maximises); Eq. 11 when both betas are 1.
    Written as `-A F exp(logp - sg(logp))`, which equals the printed quotient wherever that one is finite.

    Args:
        logprobs: [...] log-probabilities under pi_theta, nats; receives the gradient.
        old_logprobs: [...] under pi_old.
        advantages: [...] A-tilde; shape of `logprobs` or broadcastable to it.
        epsilon_low, epsilon_high: the ratio's bounds are 1 - epsilon_low and 1 + epsilon_high.
        beta_low, beta_high: beta_1 and beta_2, the scale of the loss beyond each bound.
        log_ratio_limit: largest absolute log-ratio, nats.

    Returns:
        [...] float32, or float64 for float64 `logprobs`; differentiable in `logprobs` only.
    """
    scale = gppo_gradient_scale(
        logprobs,
        old_logprobs,
        advantages,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta_low=beta_low,
        beta_high=beta_high,
        log_ratio_limit=log_ratio_limit,
    )
    slope = -aligned(logprobs, advantages)[1] * scale
    return attach_gradient(logprobs, slope, slope)
