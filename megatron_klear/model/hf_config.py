"""The Hugging Face config of an architecture, for engines and exports."""

from __future__ import annotations

from typing import Any

from megatron_klear.config import Architecture
from megatron_klear.config.yarn import Yarn


def hf_config(arch: Architecture, *, dtype: str = "bfloat16", yarn: Yarn | None = None) -> dict[str, Any]:
    """Contents of the `config.json` that transformers reads a Qwen3 of these sizes from, as the published ones have it.

    Args:
        arch: sizes of the model.
        dtype: `bfloat16`, `float16` or `float32`, the data type of the weights beside it.
        yarn: scaled rotary embedding for whoever computes with this config; None for the plain one.
    """
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "hidden_size": arch.hidden_size,
        "initializer_range": arch.init_std,
        "intermediate_size": arch.ffn_hidden_size,
        "max_position_embeddings": arch.max_position_embeddings if yarn is None else yarn.positions,
        "max_window_layers": arch.num_layers,
        "model_type": "qwen3",
        "num_attention_heads": arch.num_attention_heads,
        "num_hidden_layers": arch.num_layers,
        "num_key_value_heads": arch.num_query_groups,
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_scaling": None if yarn is None else yarn.hf_scaling(),
        "rope_theta": arch.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": arch.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": arch.vocab_size,
    }
