"""Small Qwen3 models in Hugging Face directories, with weights that transformers made and wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "rope_theta": 5e4,
    "initializer_range": 0.1,
}
TOKENIZER = {
    "tokenizer.json": json.dumps(
        {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 7, "content": "<|im_end|>"}]}
    ),
    "tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>"}),
    "merges.txt": "a b\n",
    "chat_template.jinja": "{{ messages }}",
}


@pytest.fixture(scope="session")
def make_hf() -> Callable[..., Path]:
    """Write a model with random weights, norms included, and tokenizer files; returns the directory."""

    def make(
        directory: Path, *, dtype: torch.dtype = torch.float32, shard: str = "100KB", seed: int = 0, **overrides: Any
    ) -> Path:
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **overrides}))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.generation_config = GenerationConfig(temperature=0.6, top_p=0.95, do_sample=True, eos_token_id=[7, 8])
        model.to(dtype).save_pretrained(directory, max_shard_size=shard)
        for name, text in TOKENIZER.items():
            (directory / name).write_text(text)
        return directory

    return make
