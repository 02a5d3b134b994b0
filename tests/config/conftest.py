"""A small set of input files and a settings file that names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_klear.config import Settings, load_settings
from megatron_klear.errors import ConfigError

HF_CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
    "initializer_range": 0.03,
}

Load = Callable[..., Settings]
Problems = Callable[..., list[str]]


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(HF_CONFIG))
    (directory / "model.safetensors").write_bytes(b"not read by the settings")
    return directory


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """Settings that both entries accept at a world size of 1."""
    (tmp_path / "tokenizer").mkdir()
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 5, "content": "<e>"}]}
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("sft", "prompts", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    content = {
        "run": {"dir": str(tmp_path / "run")},
        "tokenizer": {"dir": str(tmp_path / "tokenizer")},
        "model": {"preset": "qwen3-tiny"},
        "data": {
            "sft": [str(tmp_path / "sft.jsonl")],
            "prompts": [str(tmp_path / "prompts.jsonl")],
            "heldout": [str(tmp_path / "heldout.jsonl")],
            "max_prompt_tokens": 64,
        },
        "packing": {"token_budget": 1024},
        "rollout": {"max_response_tokens": 128},
        "sft": {"epochs": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def load(config_file: Path) -> Load:
    def call(*overrides: str, entry: str = "rl", world_size: int = 1) -> Settings:
        return load_settings(config_file, overrides, entry=entry, world_size=world_size)  # type: ignore[arg-type]

    return call


@pytest.fixture
def problems(load: Load) -> Problems:
    """Problems of the settings under some overrides; none when they are fine."""

    def call(*overrides: str, entry: str = "rl", world_size: int = 1) -> list[str]:
        try:
            load(*overrides, entry=entry, world_size=world_size)
        except ConfigError as error:
            return list(error.problems)
        return []

    return call
