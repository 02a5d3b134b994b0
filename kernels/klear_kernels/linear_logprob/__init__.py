"""Log-probabilities of labels under a linear head, differentiable, without the [T, V] logits."""

from __future__ import annotations

from klear_kernels.linear_logprob.function import LogprobOutput, linear_logprob

__all__ = ["LogprobOutput", "linear_logprob"]
