"""The per-token loss terms and the one number per token that the gradient needs; shared by all backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_klear.algorithm import PolicyObjective


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTerms:
    """What the loss of each token depends on besides its logprob; all [K] or [T], any floating dtype.

    Attributes:
        old_logprobs: log-probability under the policy before this step's updates.
        advantages: A-tilde.
        policy_weight, lm_weight: factors of the policy loss and of -logprob, denominators folded in.
        objective: which policy loss.
    """

    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    policy_weight: torch.Tensor
    lm_weight: torch.Tensor
    objective: PolicyObjective

    def select(self, rows: torch.Tensor | slice, dtype: torch.dtype) -> PolicyTerms:
        """The terms of some tokens, in `dtype`, cut from any graph."""
        return PolicyTerms(
            old_logprobs=self.old_logprobs.detach()[rows].to(dtype),
            advantages=self.advantages.detach()[rows].to(dtype),
            policy_weight=self.policy_weight.detach()[rows].to(dtype),
            lm_weight=self.lm_weight.detach()[rows].to(dtype),
            objective=self.objective,
        )

    def is_trained(self) -> torch.Tensor:
        """bool, whether a token has any loss at all (a NaN weight counts, so that it is seen)."""
        return self.policy_weight.ne(0) | self.lm_weight.ne(0)


def token_losses(logprobs: torch.Tensor, terms: PolicyTerms) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted policy loss, weighted lm loss, and d loss / d logprob of each token.

    Where a weight is zero its term is selected away, never multiplied: whatever an untrained token holds as
    old logprob or advantage, infinities and NaN included, cannot reach the loss.

    Equation: loss_t = u_t value_t - w_t logp_t and g_t = -u_t A_t F_t - w_t, with u and w the policy and lm
    weights, value and F from the objective (Eqs. 11-14, 17, 18).
    """
    # Here, not at import: log-probabilities alone need nothing but torch.
    from megatron_klear.algorithm import policy_value_and_scale

    value, scale = policy_value_and_scale(logprobs, terms.old_logprobs, terms.advantages, terms.objective)
    has_policy, has_lm = terms.policy_weight.ne(0), terms.lm_weight.ne(0)
    policy_loss = torch.where(has_policy, terms.policy_weight * value, 0.0)
    lm_loss = torch.where(has_lm, -terms.lm_weight * logprobs, 0.0)
    policy_gradient = torch.where(has_policy, -terms.policy_weight * terms.advantages * scale, 0.0)
    return policy_loss, lm_loss, policy_gradient - terms.lm_weight
