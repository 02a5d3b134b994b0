"""RMSNorm that Megatron's sequence parallelism understands, without Transformer Engine or apex."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor; marks its weight as computed on a slice of the sequence.

    Under sequence parallelism every tensor-parallel rank sees other tokens, so the weight's gradient must be
    summed over them: Megatron does that for parameters that carry `sequence_parallel = True`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
