"""Correcting for tokens that were sampled by another policy than the trainer's old one (engine against trainer).

The engine computes the same model with other kernels, and may have sampled under older weights, so that its policy
mu is not pi_old. The gradient of the objective splits as pi_theta / mu = (pi_theta / pi_old) * (pi_old / mu): the first
ratio is clipped by the objective, the second is a constant weight, made here. Source of the split: J. Hilton et al.,
"Batch size-invariance for policy optimization", 2022 (decoupled objective).

These weights multiply the policy weights *after* those got their denominators, which count tokens whatever they
weigh. So the loss stays a plain sum with denominators known before the forward pass, and the estimator stays that
of plain importance sampling: dividing by the sum of the weights instead would tie every token's gradient to all others
and undo part of the correction. The language-model loss of Eq. 13 is not weighted: it is maximum likelihood on correct
answers, right whoever wrote them, and no expectation under a policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_klear.algorithm.divergence import RolloutDivergence, rollout_divergence
from megatron_klear.algorithm.ratio import DEFAULT_LOG_RATIO_LIMIT, clamped_log_ratio

CorrectionKind = Literal["none", "token", "sequence", "token_mask", "sequence_mask"]
SequenceRatio = Literal["geometric_mean", "product"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPolicyCorrection:
    """Which weights correct for the sampling policy.

    Attributes:
        kind: `none` (all 1); `token` and `sequence` truncate the ratio at `cap`; `token_mask` and `sequence_mask` keep
            it inside [low, high] and give 0 outside.
        cap: largest weight of the truncated kinds.
        low, high: bounds of the masked kinds.
        sequence_ratio: ratio of a sequence: product of its tokens' ratios, or their geometric mean.

    Raises:
        ValueError: bounds that do not enclose 1, the weight of a token sampled by pi_old itself.
    """

    kind: CorrectionKind = "none"
    cap: float = 2.0
    low: float = 0.5
    high: float = 2.0
    sequence_ratio: SequenceRatio = "geometric_mean"

    def __post_init__(self) -> None:
        if not (self.cap >= 1 and 0 <= self.low <= 1 <= self.high):
            raise ValueError(
                f"cap is {self.cap}, must be at least 1; low and high are {self.low} and {self.high}, must enclose 1"
            )

    @property
    def by_sequence(self) -> bool:
        """Whether all tokens of a sequence have the same weight."""
        return self.kind in ("sequence", "sequence_mask")


@dataclass(frozen=True, slots=True, eq=False)
class OffPolicyStats:
    """Sums that add up over batches and ranks; units are tokens, or sequences for the kinds by sequence.

    Attributes:
        sums: float64 [7]: tokens, sum of |x|, tokens with |x| beyond the bound, units, sum of weights, sum of squared
            weights, units whose ratio was truncated or masked; with x = log pi_old - log mu. All-reduce by SUM.
        divergence: KL estimates and the largest |x|.
    """

    sums: Tensor
    divergence: RolloutDivergence

    def __add__(self, other: OffPolicyStats) -> OffPolicyStats:
        return OffPolicyStats(self.sums + other.sums.to(self.sums.device), self.divergence + other.divergence)

    def values(self) -> dict[str, float]:
        """Return means and shares by name.

        Equation: effective_sample_size = (sum w)^2 / (n sum w^2), between 0 and 1: the share of an on-policy sample
        that estimates as well. Source: A. Kong, "A note on importance sampling using standardized weights", 1992.

        Returns:
            mean_abs and max_abs (nats), share_beyond, kl_k1 and kl_k3 (nats per token), weight_mean, share_cut,
            effective_sample_size. Without tokens 0, and 1 for the two that measure weights.
        """
        tokens, absolute, beyond, units, weights, squares, cut = self.sums.tolist()
        means = self.divergence.means()
        return {
            "mean_abs": absolute / (tokens or 1.0),
            "max_abs": means["max_abs_log_ratio"],
            "share_beyond": beyond / (tokens or 1.0),
            "kl_k1": means["kl_k1"],
            "kl_k3": means["kl_k3"],
            "weight_mean": weights / units if units else 1.0,
            "share_cut": cut / (units or 1.0),
            "effective_sample_size": weights * weights / (units * squares) if squares else float(not units),
        }


@torch.no_grad()
def off_policy_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    sequence_of: Tensor,
    correction: OffPolicyCorrection,
    *,
    bound: float = 1.0,
) -> tuple[Tensor, OffPolicyStats]:
    """Weigh sampled tokens by the ratio of the trainer's old policy to the policy that sampled them.

    Equation: x_t = log pi_old(t) - log mu(t); s = x_t by token, and by sequence sum x_t (product) or mean x_t
    (geometric mean). Truncated: min(exp s, cap). Masked: exp s where low <= exp s <= high, else 0.
    Sources: truncation: E. Ionides, "Truncated importance sampling", 2008; between engine and trainer by token:
    F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025; masked by token:
    Ling Team, "Every step evolves" (IcePop), 2025; by sequence: J. Liu et al., "When speed kills stability", 2025;
    geometric mean: C. Zheng et al., "Group sequence policy optimization", 2025.

    Args:
        old_logprobs: [T] by the trainer, nats.
        rollout_logprobs: [T] as sampled by the engine, nats, same temperature.
        mask: bool [T], true for sampled tokens.
        sequence_of: int64 [T], 0 .. N-1, the sequence of each token.
        correction: which weights.
        bound: |x| beyond which a token is counted, nats.

    Returns:
        Weights [T], float64, detached, 1 where `mask` is false, NaN where a log-probability is; and the statistics.

    Raises:
        ValueError: shapes that differ.
    """
    if not old_logprobs.shape == rollout_logprobs.shape == mask.shape == sequence_of.shape:
        raise ValueError("old_logprobs, rollout_logprobs, mask and sequence_of must have one shape")
    mask = mask.to(torch.bool)
    raw = clamped_log_ratio(old_logprobs.to(torch.float64), rollout_logprobs.to(torch.float64))
    x = torch.where(mask, raw, torch.zeros_like(raw))
    lengths = _sum_by_sequence(mask.to(torch.float64), sequence_of)
    ratio = _ratio(x, lengths, sequence_of, correction)
    if correction.kind in ("token", "sequence"):
        weights, cut = ratio.clamp(max=correction.cap), ratio > correction.cap
    elif correction.kind == "none":
        weights, cut = torch.ones_like(ratio), torch.zeros_like(mask)
    else:
        cut = (ratio < correction.low) | (ratio > correction.high)
        weights = torch.where(cut, torch.zeros_like(ratio), ratio)
    # Of a sequence's tokens each counts 1 / length, so that sums over tokens are sums over sequences.
    unit = mask / lengths.clamp(min=1.0)[sequence_of] if correction.by_sequence else mask.to(torch.float64)
    stats = OffPolicyStats(
        torch.stack(
            [
                lengths.sum(),
                x.abs().sum(),
                (~(x.abs() <= bound)).to(torch.float64).sum(),  # a NaN is beyond every bound
                unit.sum(),
                (unit * weights).sum(),
                (unit * weights.square()).sum(),
                (unit * cut).sum(),
            ]
        ),
        rollout_divergence(rollout_logprobs, old_logprobs, mask),
    )
    return torch.where(mask, weights, torch.ones_like(weights)), stats


def _ratio(x: Tensor, lengths: Tensor, sequence_of: Tensor, correction: OffPolicyCorrection) -> Tensor:
    """The ratio exp s of each token, finite whatever the sequence's length."""
    if correction.by_sequence:
        sums = _sum_by_sequence(x, sequence_of)
        if correction.sequence_ratio == "geometric_mean":
            sums = sums / lengths.clamp(min=1.0)
        x = sums[sequence_of]
    return x.clamp(min=-DEFAULT_LOG_RATIO_LIMIT, max=DEFAULT_LOG_RATIO_LIMIT).exp()


def _sum_by_sequence(values: Tensor, sequence_of: Tensor) -> Tensor:
    count = int(sequence_of.max()) + 1 if sequence_of.numel() else 0
    return torch.zeros(count, dtype=torch.float64, device=values.device).index_add(0, sequence_of, values)
