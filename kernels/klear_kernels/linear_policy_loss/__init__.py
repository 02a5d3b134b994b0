"""The policy loss plus the language-model loss of a linear head, without the [T, V] logits."""

from __future__ import annotations

from klear_kernels.linear_policy_loss.function import PolicyLossOutput, linear_policy_loss

__all__ = ["PolicyLossOutput", "linear_policy_loss"]
