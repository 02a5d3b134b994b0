"""The settings that the README shows for Qwen3-8B are accepted as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_klear.config import PRESETS, load_settings

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything that the example names is there, the weights as an empty file."""
    arch = PRESETS["qwen3-8b"]
    config = {
        "model_type": "qwen3",
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    model = tmp_path / "Qwen3-8B-Base"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").touch()
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    for name in ("train-00.jsonl", "train-01.jsonl", "math.jsonl", "aime.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "runs" / "sft-8b" / "checkpoints" / "step_00000100").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sft(directory: Path) -> dict:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    return yaml.safe_load(block.replace("/models/", f"{directory}/"))


def test_the_sft_example(directory, sft):
    (directory / "sft-8b.yaml").write_text(yaml.safe_dump(sft))
    settings = load_settings("sft-8b.yaml", entry="sft", world_size=8)
    assert settings.architecture.num_layers == 36
    assert settings.sft.batch_sequences == 128


def test_the_rl_example_changes_what_its_text_says(directory, sft):
    text = README[README.index("RL takes the same file") :].split("\n\n")[0]
    changes = [yaml.safe_load(code.replace("\n", " ")) for code in re.findall(r"`(\w+: \{.*?\})`", text, re.DOTALL)]
    assert [section for change in changes for section in change] == [
        "run", "checkpoint", "data", "optimizer", "rl", "rollout",
    ]  # fmt: skip
    for section in ("run", "data", "optimizer", "sft"):
        del sft[section]
    for change in changes:
        sft.update(change)
    (directory / "rl-8b.yaml").write_text(yaml.safe_dump(sft))
    settings = load_settings("rl-8b.yaml", entry="rl", world_size=8)
    assert settings.run.dir == "runs/rl-8b"
