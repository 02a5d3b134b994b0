"""CISPO: REINFORCE with a clipped, detached importance weight (Eqs. 15, 16)."""

from __future__ import annotations

from torch import Tensor

from megatron_klear.algorithm.clip import clip_ratio
from megatron_klear.algorithm.ratio import DEFAULT_LOG_RATIO_LIMIT, aligned, attach_gradient, importance_ratio

LOWEST_LOGPROB = -1.0e4
"""Floor of the log-probability in CISPO's loss *value*, nats; the gradient does not depend on it."""


def cispo_gradient_scale(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    log_ratio_limit: float = DEFAULT_LOG_RATIO_LIMIT,
) -> Tensor:
    """Return CISPO's coefficient F, the clipped ratio: the loss has derivative -A F with respect to the logprob.

    Equation: Eq. 16, whose four cases are the clipped ratio whatever the sign of the advantage. The paper's
    text below it writes 1 + epsilon_l once for the upper bound; the equation's 1 + epsilon_h is used.

    Args:
        logprobs, old_logprobs: [...] log-probabilities of the taken tokens, nats.
        advantages: [...]; takes no part in F, here so that all objectives share one signature.
        epsilon_low, epsilon_high: distances of the bounds from 1.
        log_ratio_limit: largest absolute log-ratio, nats.

    Returns:
        [...] detached; float32, or float64 for float64 `logprobs`.
    """
    aligned(logprobs, advantages)
    ratio = importance_ratio(logprobs, old_logprobs, log_ratio_limit)
    return clip_ratio(ratio, epsilon_low=epsilon_low, epsilon_high=epsilon_high)


def cispo_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    log_ratio_limit: float = DEFAULT_LOG_RATIO_LIMIT,
) -> Tensor:
    """Return CISPO's loss of each token, -sg(clip(delta)) A log pi, before any weighting or mean.

    Equation: the summand of Eq. 15 with its sign turned. Eq. 15 prints delta where its gradient, Eq. 16, has
    the clipped and detached delta; the latter is what is meant and computed.

    Args:
        logprobs: [...] log-probabilities under pi_theta, nats; receives the gradient.
        old_logprobs: [...] under pi_old.
        advantages: [...]; shape of `logprobs` or broadcastable to it.
        epsilon_low, epsilon_high: distances of the bounds from 1.
        log_ratio_limit: largest absolute log-ratio, nats.

    Returns:
        [...] float32, or float64 for float64 `logprobs`; differentiable in `logprobs` only.
    """
    scale = cispo_gradient_scale(
        logprobs,
        old_logprobs,
        advantages,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        log_ratio_limit=log_ratio_limit,
    )
    values, advantages = aligned(logprobs, advantages)
    slope = -advantages * scale
    return attach_gradient(logprobs, slope * values.clamp(min=LOWEST_LOGPROB), slope)
