"""klear_kernels: the language-model head, fused with log-probabilities and with the policy loss.

Neither operation ever holds more than a chunk of the [T, V] logits. Both work on the shard of a
vocabulary-parallel head and on sequence-parallel hidden states. Torch is the only requirement of
`linear_logprob`; `linear_policy_loss` also takes the equations of `megatron_klear.algorithm`.

The two operations are also the names of the packages that hold them, and the functions win: reach a
module inside by its full name, as in `from klear_kernels.linear_logprob.reference import reference_logprob`.
"""

from __future__ import annotations

from klear_kernels.linear_logprob.function import LogprobOutput, linear_logprob
from klear_kernels.linear_policy_loss.function import PolicyLossOutput, linear_policy_loss

__all__ = ["LogprobOutput", "PolicyLossOutput", "linear_logprob", "linear_policy_loss"]
