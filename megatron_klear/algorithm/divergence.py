"""How far the policy that sampled lies from the trainer's: KL estimates from the sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klear.algorithm.ratio import DEFAULT_LOG_RATIO_LIMIT, clamped_log_ratio


@dataclass(frozen=True, slots=True, eq=False)
class RolloutDivergence:
    """Sums over tokens that add up over microbatches and ranks, and a largest difference.

    Attributes:
        sums: float64 [4]: tokens, sum of k1, sum of k3, sum of |difference of probabilities|; all-reduce by SUM.
        max_abs_log_ratio: float64 scalar, nats; all-reduce by MAX.
    """

    sums: Tensor
    max_abs_log_ratio: Tensor

    def __add__(self, other: RolloutDivergence) -> RolloutDivergence:
        device = self.sums.device
        largest = torch.maximum(self.max_abs_log_ratio, other.max_abs_log_ratio.to(device))
        return RolloutDivergence(self.sums + other.sums.to(device), largest)

    def means(self) -> dict[str, float]:
        """Return `kl_k1`, `kl_k3` (nats per token), `mean_abs_prob_difference`, `max_abs_log_ratio`; 0 if empty."""
        num_tokens, k1, k3, probability = self.sums.tolist()
        count = num_tokens or 1.0
        return {
            "kl_k1": k1 / count,
            "kl_k3": k3 / count,
            "mean_abs_prob_difference": probability / count,
            "max_abs_log_ratio": float(self.max_abs_log_ratio),
        }


@torch.no_grad()
def rollout_divergence(
    rollout_logprobs: Tensor,
    logprobs: Tensor,
    mask: Tensor,
    *,
    log_ratio_limit: float = DEFAULT_LOG_RATIO_LIMIT,
) -> RolloutDivergence:
    """Estimate KL(rollout || trainer) from the tokens that the rollout policy sampled.

    Equation: with x = log pi_trainer - log pi_rollout, k1 = -x (unbiased, of either sign) and
    k3 = exp(x) - 1 - x (unbiased, never negative, less noisy). Source: J. Schulman, "Approximating KL
    Divergence", 2020. x is clamped, so that one impossible token leaves the mean readable.

    Args:
        rollout_logprobs: [T] as sampled by the engine, nats.
        logprobs: [T] of the same tokens under the trainer, at the same temperature.
        mask: [T] bool, true for sampled tokens.
        log_ratio_limit: largest absolute x, nats.

    Returns:
        Sums on the device of `logprobs`.

    Raises:
        ValueError: shapes do not fit.
    """
    if mask.shape != logprobs.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, logprobs {tuple(logprobs.shape)}: must be equal")
    new, old = logprobs.to(torch.float64), rollout_logprobs.to(torch.float64)
    mask = mask.to(torch.bool)
    zero = torch.zeros_like(new)
    x = torch.where(mask, clamped_log_ratio(new, old, log_ratio_limit), zero)
    k3 = torch.expm1(x) - x
    difference = torch.where(mask, (new.exp() - old.exp()).abs(), zero)
    sums = torch.stack([mask.sum().to(torch.float64), -x.sum(), k3.sum(), difference.sum()])
    return RolloutDivergence(sums, x.abs().amax() if x.numel() else zero.sum())
