"""What `linear_policy_loss` means: full logits in float64 and autograd through the token loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from klear_kernels.linear_logprob.reference import reference_logprob
from klear_kernels.linear_policy_loss.function import PolicyLossOutput

if TYPE_CHECKING:
    from megatron_klear.algorithm import PolicyObjective


def reference_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    policy_weight: torch.Tensor,
    lm_weight: torch.Tensor,
    *,
    objective: PolicyObjective,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> PolicyLossOutput:
    """Float64 losses of the inputs as they are rounded; `loss` is differentiable through all logits.

    Args:
        hidden: [T, H], any floating dtype; the whole sequence.
        weight: [V, H]; the whole vocabulary.
        labels: int64 [T].
        old_logprobs, advantages, policy_weight, lm_weight: [T].
        objective, vocab_size, temperature, ignore_index: as in `linear_policy_loss`.
    """
    from megatron_klear.algorithm import policy_token_loss

    rows = reference_logprob(
        hidden, weight, labels, vocab_size=vocab_size, temperature=temperature, ignore_index=ignore_index
    )
    has_policy = (labels != ignore_index) & (policy_weight != 0)
    has_lm = (labels != ignore_index) & (lm_weight != 0)
    token_loss = policy_token_loss(
        rows.logprobs[has_policy], old_logprobs[has_policy].double(), advantages[has_policy].double(), objective
    )
    policy_loss = (policy_weight[has_policy].double() * token_loss).sum()
    lm_loss = -(lm_weight[has_lm].double() * rows.logprobs[has_lm]).sum()
    entropy = None if rows.entropy is None else rows.entropy.detach()
    return PolicyLossOutput(
        policy_loss + lm_loss, policy_loss.detach(), lm_loss.detach(), rows.logprobs.detach(), entropy
    )
