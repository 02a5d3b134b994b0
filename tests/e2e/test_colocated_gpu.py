"""Trainer and SGLang on one GPU: memory changes hands, weights go by handles of the GPU's memory, checksums agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.config.serving import SglangSettings
from megatron_klear.observe import names

pytestmark = pytest.mark.gpu

CONFIG = Path(__file__).parents[2] / "examples" / "quickstart_rl.yaml"
# SGLang's kernels want heads of 64 channels.
MODEL = ["model.hidden_size=512", "model.num_layers=4", "model.ffn_hidden_size=1024", "model.head_dim=64"]


@pytest.mark.parametrize("offload_weights", ["true", "false"])
def test_memory_changes_hands_and_weights_by_handles_are_proved(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    sglang_settings: SglangSettings,
    offload_weights: str,
) -> None:
    overrides = [
        *rl_overrides("shared"), *MODEL, "checkpoint.start_from=null", "model.dtype=bfloat16", "run.device=cuda",
        "rl.steps=3", "checkpoint.every_steps=1", "evaluation.every_steps=1", "reward.require_think=false",
        "rollout.engine=sglang", f"sglang.venv={sglang_settings.venv}", "sglang.placement=colocated",
        f"sglang.offload_weights={offload_weights}",
    ]  # fmt: skip
    launch = start("train_rl", CONFIG, overrides, ranks=1)
    assert launch.wait(900) == [0], launch.output()
    output = launch.output()
    assert output.count("proved by checksum") == 4
    assert "do not go to the engines by handles" not in output
    run = tmp_path / "shared"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["phase"] == "rl"]
    assert [row["step"] for row in steps] == [1, 2, 3]
    # Two implementations in bfloat16; other weights would be off by whole nats.
    assert all(row[names.MISMATCH_MEAN_ABS] < 0.1 for row in steps)
    for row in steps:
        free = {turn: row[names.at_turn(turn, "device_free_bytes")] for turn in names.TURNS}
        total = free["trainer"] + row[names.at_turn("trainer", "device_used_bytes")]
        # The engine takes most of the GPU (its KV cache is as large as fits), and gives all of that back.
        assert free["engines"] < 0.4 * total
        assert free["trainer"] - free["engines"] > 0.5 * total
        away = row[names.at_turn("trainer", "trainer_bytes")] - row[names.at_turn("engines", "trainer_bytes")]
        assert away > (0.99 if offload_weights == "true" else 0.8) * row[names.at_turn("trainer", "trainer_bytes")]
