"""The joint objective of RL training with the LM loss on correct rollouts (Eq. 14)."""

from __future__ import annotations

from torch import Tensor


def joint_objective(policy_loss: Tensor, lm_loss: Tensor, lm_loss_weight: float) -> Tensor:
    """Add the LM loss on correct rollouts to the policy loss.

    Equation: Eq. 14. The trainer folds alpha into `lm_token_weights` instead and adds; both give the same sum.

    Args:
        policy_loss: scalar (or [...]), Eq. 11 or another policy loss.
        lm_loss: same shape, Eq. 13.
        lm_loss_weight: alpha; 0.1 in the paper.

    Returns:
        Same shape.
    """
    # Without this, alpha = 0 would turn an infinite LM loss into NaN.
    return policy_loss if lm_loss_weight == 0 else policy_loss + lm_loss_weight * lm_loss
