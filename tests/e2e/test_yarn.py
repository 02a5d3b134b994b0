"""YaRN in a real run: evaluations longer than the model's positions, rollouts as the trainer computes, an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

POSITIONS = 80


@pytest.mark.parametrize("apply_to", ["evaluation", "everything"])
def test_engine_and_trainer_agree_whatever_evaluation_does(
    apply_to: str, start: Callable, rl_overrides: Callable[[str], list[str]], tmp_path: Path
) -> None:
    yarn = [f"model.max_position_embeddings={POSITIONS}", "yarn.factor=2.5", f"yarn.apply_to={apply_to}"]
    # Some more held-out tokens than positions: without YaRN this would be refused.
    longer = ["data.max_prompt_tokens=40", "evaluation.max_response_tokens=46", "evaluation.every_steps=1"]
    steps = ["rl.steps=2", "checkpoint.export_hf=true", "model.dtype=float32"]
    run = start("train_rl", "examples/quickstart_rl.yaml", [*rl_overrides("rl"), *yarn, *longer, *steps], ranks=1)
    assert run.wait() == [0], run.output()
    rows = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    compared = [row["mismatch/max_abs"] for row in rows if "mismatch/max_abs" in row]
    assert compared
    # Two implementations in float32, logits below 20: a hundred roundings of one. With the other rotary embedding some
    # tokens differ by more than 0.01.
    assert max(compared) < 100 * 20 * 2**-24, compared
    assert sum("accuracy/heldout" in row for row in rows) == 3
    # Operations are counted in these two phases: under other names their time would be missing from the rate.
    updated = [row for row in rows if "loss/total" in row]
    assert updated
    for row in updated:
        assert {"phase_seconds/train", "phase_seconds/old logprobs", "throughput/model_tflops"} <= set(row)
    exported = json.loads((tmp_path / "rl" / "hf" / "config.json").read_text())
    wanted = {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": POSITIONS}
    assert exported["rope_scaling"] == wanted
    assert exported["max_position_embeddings"] == 200
