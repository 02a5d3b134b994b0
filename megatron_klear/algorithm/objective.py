"""Which policy objective is trained, with its constants; and the dispatch that the trainer and the kernels call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_klear.algorithm.cispo import LOWEST_LOGPROB
from megatron_klear.algorithm.clip import clip_ratio, clip_scale_at_ratio
from megatron_klear.algorithm.gppo import gppo_scale_at_ratio
from megatron_klear.algorithm.ratio import DEFAULT_LOG_RATIO_LIMIT, aligned, attach_gradient, importance_ratio

ObjectiveKind = Literal["gppo", "clip", "cispo"]

MAX_LOG_RATIO_LIMIT = 80.0
"""exp of it still leaves room for an advantage and a weight within float32."""


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """A policy objective and its constants.

    Attributes:
        kind: `gppo` (Eqs. 11, 17), `clip` (Eqs. 1, 3, 6, 7) or `cispo` (Eq. 15).
        epsilon_low: the ratio's lower bound is 1 - epsilon_low; within 0..1.
        epsilon_high: the upper bound is 1 + epsilon_high; at least 0. `clip` with equal epsilons is PPO/GRPO.
        beta_low, beta_high: Eq. 17's beta_1 and beta_2; read by `gppo` only; at least 0, where 0 is PPO's clip:
            the tokens beyond that bound lose their gradient.
        log_ratio_limit: log-ratios are clamped to this before `exp`, nats.

    Raises:
        ValueError: a constant outside its range, or a limit inside the bounds; names every one.
    """

    kind: ObjectiveKind = "gppo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    beta_low: float = 1.0
    beta_high: float = 1.0
    log_ratio_limit: float = DEFAULT_LOG_RATIO_LIMIT

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in get_args(ObjectiveKind):
            problems.append(f"kind is {self.kind!r}, allowed are {', '.join(get_args(ObjectiveKind))}")
        if not 0.0 <= self.epsilon_low <= 1.0:
            problems.append(f"epsilon_low is {self.epsilon_low}, must be within 0 and 1")
        if not 0.0 <= self.epsilon_high < math.inf:
            problems.append(f"epsilon_high is {self.epsilon_high}, must be finite and at least 0")
        for name, beta in (("beta_low", self.beta_low), ("beta_high", self.beta_high)):
            if not 0.0 <= beta < math.inf:
                problems.append(f"{name} is {beta}, must be finite and at least 0")
        if not problems:
            # Inside the bounds the clamp would hide them: no ratio could ever reach 1 +- epsilon.
            bounds = [1.0 + self.epsilon_high] + ([1.0 - self.epsilon_low] if self.epsilon_low < 1.0 else [])
            reach = max(abs(math.log(bound)) for bound in bounds)
            if not reach < self.log_ratio_limit <= MAX_LOG_RATIO_LIMIT:
                problems.append(
                    f"log_ratio_limit is {self.log_ratio_limit}, must be above {reach:.3g} (the clip bounds) "
                    f"and at most {MAX_LOG_RATIO_LIMIT:g}"
                )
        if problems:
            raise ValueError("PolicyObjective: " + "; ".join(problems))


@torch.no_grad()
def policy_value_and_scale(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, objective: PolicyObjective
) -> tuple[Tensor, Tensor]:
    """Return each token's loss and its coefficient F, both detached: d(loss_t)/d(logp_t) = -A_t F_t.

    This is what a fused head needs: the gradient of a row is known as soon as its logprob is.

    Equation: Eqs. 10, 12, 16, 18, by `objective.kind`.

    Args:
        logprobs: [T] log-probabilities under pi_theta, nats.
        old_logprobs: [T] under pi_old.
        advantages: [T].
        objective: which loss.

    Returns:
        value [T] and scale F [T]; float32, or float64 for float64 `logprobs`; finite for any log-ratio.

    Raises:
        ValueError: shapes do not fit.
    """
    new, advantages = aligned(logprobs, advantages)
    ratio = importance_ratio(logprobs, old_logprobs, objective.log_ratio_limit)
    low, high = objective.epsilon_low, objective.epsilon_high
    if objective.kind == "gppo":
        scale = gppo_scale_at_ratio(
            ratio,
            advantages,
            epsilon_low=low,
            epsilon_high=high,
            beta_low=objective.beta_low,
            beta_high=objective.beta_high,
        )
        return -advantages * scale, scale
    clipped = clip_ratio(ratio, epsilon_low=low, epsilon_high=high)
    if objective.kind == "cispo":
        return -advantages * clipped * new.clamp(min=LOWEST_LOGPROB), clipped
    value = -torch.minimum(ratio * advantages, clipped * advantages)
    return value, clip_scale_at_ratio(ratio, advantages, epsilon_low=low, epsilon_high=high)


def policy_token_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, objective: PolicyObjective) -> Tensor:
    """Return each token's policy loss, differentiable in `logprobs`, before any weighting or mean.

    Equation: the summands of Eqs. 1, 3, 6, 7, 11, 15, 17 with their sign turned, by `objective.kind`.

    Args:
        logprobs: [T] log-probabilities under pi_theta, nats; receives the gradient.
        old_logprobs: [T] under pi_old.
        advantages: [T].
        objective: which loss.

    Returns:
        [T] float32, or float64 for float64 `logprobs`.

    Raises:
        ValueError: shapes do not fit.
    """
    value, scale = policy_value_and_scale(logprobs, old_logprobs, advantages, objective)
    return attach_gradient(logprobs, value, -aligned(logprobs, advantages)[1] * scale)
