"""Settings of a small recipe, and the 8B's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_klear.config import Entry, Settings
from megatron_klear.config.plan_settings import judge_plan

EIGHT_B: dict[str, dict[str, Any]] = {
    "run": {"dir": "runs/x"},
    "tokenizer": {"dir": "/nowhere/8b"},
    "model": {"preset": "qwen3-8b", "hf_dir": "/nowhere/8b"},
    "data": {"sft": ["/nowhere/a.jsonl"], "prompts": ["/nowhere/b.jsonl"]},
    "sft": {"epochs": 4},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A settings file for an 8B whose model and data are elsewhere."""
    path = tmp_path / "8b.yaml"
    path.write_text(yaml.safe_dump(EIGHT_B))
    return path


@pytest.fixture
def settings_for(config: Path) -> Callable[..., Settings]:
    """Settings of the 8B under overrides, which must fit together."""

    def make(*overrides: str, entry: Entry = "sft", gpus: int = 8) -> Settings:
        settings, problems = judge_plan(config, overrides, entry=entry, world_size=gpus)
        assert problems == []
        return settings

    return make
