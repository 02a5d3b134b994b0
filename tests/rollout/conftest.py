"""A tiny Qwen3 whose predictions are far from uniform, and prompts of ragged lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_klear.records import Prompt
from megatron_klear.rollout import LocalEngine

VOCAB = 29


@pytest.fixture
def fields() -> dict[str, Any]:
    """An HF config: grouped heads, a head size that is not hidden / heads, untied embeddings."""
    return {
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.25,
    }


@pytest.fixture
def make_reference(fields: dict[str, Any]) -> Callable[..., Qwen3ForCausalLM]:
    """Transformers' own model, its own attention; norm weights are moved off 1 so that they matter."""

    def make(seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Qwen3ForCausalLM(Qwen3Config.from_dict(fields | changes)).eval().requires_grad_(False)
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def make_engine(fields: dict[str, Any]) -> Callable[..., LocalEngine]:
    """An engine with the weights of a reference model, as version 0."""

    def make(reference: Qwen3ForCausalLM, *, changes: dict[str, Any] | None = None, **options: Any) -> LocalEngine:
        engine = LocalEngine(fields | (changes or {}), **options)
        engine.update_weights(reference.named_parameters(), version=0)
        return engine

    return make


@pytest.fixture
def make_prompts() -> Callable[..., list[Prompt]]:
    """Prompts with random tokens, one per length."""

    def make(*lengths: int, seed: int = 0) -> list[Prompt]:
        rng = np.random.default_rng(seed)
        return [
            Prompt(prompt_id=f"p{i}", domain="math", token_ids=rng.integers(0, VOCAB, length), reference="0")
            for i, length in enumerate(lengths)
        ]

    return make
