"""How many tokens, and how much of the gradient, lie beyond the clip bounds: low or high, by sign of A."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klear.algorithm.objective import PolicyObjective, policy_value_and_scale
from megatron_klear.algorithm.ratio import aligned, importance_ratio

REGION_NAMES = ("low_positive", "low_negative", "high_positive", "high_negative")
"""Ratio below 1 - epsilon_low or above 1 + epsilon_high, times advantage above or below 0.

Of these, `low_negative` and `high_positive` are the ones that PPO clips to zero and GPPO keeps."""


@dataclass(frozen=True, slots=True, eq=False)
class ClipRegions:
    """Sums over tokens that add up over microbatches and ranks; fractions are taken last.

    Attributes:
        sums: float64 [10]: tokens per region [4], gradient mass per region [4], all tokens, all mass.
            A token's gradient mass is |policy_weight A F|; only tokens with a policy weight count.
    """

    sums: Tensor

    def __add__(self, other: ClipRegions) -> ClipRegions:
        return ClipRegions(self.sums + other.sums.to(self.sums.device))

    def fractions(self) -> dict[str, float]:
        """Return the share of tokens and of gradient mass in each region.

        Returns:
            `tokens/<region>` and `gradient/<region>` for each of `REGION_NAMES`, 0..1; zeros if nothing counted.
        """
        values = self.sums.tolist()
        num_tokens, mass = values[8], values[9]
        result = {}
        for index, name in enumerate(REGION_NAMES):
            result[f"tokens/{name}"] = values[index] / num_tokens if num_tokens else 0.0
            result[f"gradient/{name}"] = values[4 + index] / mass if mass else 0.0
        return result


@torch.no_grad()
def clip_regions(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, policy_weight: Tensor, objective: PolicyObjective
) -> ClipRegions:
    """Sum tokens and gradient mass per region.

    Equation: the cases of Eq. 16, which name all four regions; F is that of the objective in use.

    Args:
        logprobs, old_logprobs, advantages, policy_weight: [T].
        objective: whose bounds and F to use.

    Returns:
        Sums on the device of `logprobs`, ready to be added or all-reduced.

    Raises:
        ValueError: shapes do not fit.
    """
    _, advantages, weight = aligned(logprobs, advantages, policy_weight)
    ratio = importance_ratio(logprobs, old_logprobs, objective.log_ratio_limit)
    _, scale = policy_value_and_scale(logprobs, old_logprobs, advantages, objective)
    counted = weight != 0
    zero = torch.zeros((), dtype=torch.float64, device=ratio.device)
    # Select, never multiply: what an ignored position holds must not reach the sums.
    mass = torch.where(counted, (weight * advantages * scale).to(torch.float64).abs(), zero)
    low, high = ratio < 1.0 - objective.epsilon_low, ratio > 1.0 + objective.epsilon_high
    members = [side & sign & counted for side in (low, high) for sign in (advantages > 0, advantages < 0)]
    sums = [member.sum().to(torch.float64) for member in members]
    sums += [torch.where(member, mass, zero).sum() for member in members]
    sums += [counted.sum().to(torch.float64), mass.sum()]
    return ClipRegions(torch.stack(sums))


def clip_region_fractions(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, policy_weight: Tensor, objective: PolicyObjective
) -> dict[str, float]:
    """Return the share of tokens and of gradient mass in each of the four regions, of these tokens alone.

    Args:
        logprobs, old_logprobs, advantages, policy_weight: [T].
        objective: whose bounds and F to use.

    Returns:
        `tokens/<region>` and `gradient/<region>` for each of `REGION_NAMES`, 0..1.

    Raises:
        ValueError: shapes do not fit.
    """
    return clip_regions(logprobs, old_logprobs, advantages, policy_weight, objective).fractions()
