"""The entries on one GPU with NCCL, in bfloat16 and in float32: SFT learns, RL takes its weights on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def logged(run: Path, kind: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss/total" in row or kind == "rl"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sft_then_rl(
    dtype: str,
    start: Callable,
    sft_overrides: Callable[[str], list[str]],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
) -> None:
    where = ["run.device=cuda", f"model.dtype={dtype}"]
    steps = ["sft.steps=60", "optimizer.lr=1.0e-2", "checkpoint.every_steps=0"]
    sft = start("train_sft", "examples/quickstart_sft.yaml", [*sft_overrides("sft"), *steps, *where], ranks=1)
    assert sft.wait() == [0], sft.output()
    losses = [row["loss/total"] for row in logged(tmp_path / "sft", "sft")]
    assert len(losses) == 60
    # A mean over sequences of sums over tokens: from guessing evenly to knowing the form of an answer.
    assert losses[-1] < 0.6 * losses[0]
    result = json.loads((tmp_path / "sft" / "result.json").read_text())
    assert result["count"] > 0

    steps = ["rl.steps=4", "evaluation.at_end=false", f"checkpoint.start_from={tmp_path / 'sft'}"]
    rl = start("train_rl", "examples/quickstart_rl.yaml", [*rl_overrides("rl"), *steps, *where], ranks=1)
    assert rl.wait() == [0], rl.output()
    rows = logged(tmp_path / "rl", "rl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert max(row.get("optimizer/grad_norm", 0.0) for row in rows) > 0
    # Two implementations in one data type: logits of about 10 round by 2^-8 of themselves in bfloat16 and by 2^-24 in
    # float32. A typical difference x of logprobs makes a KL of x^2 / 2; x is taken as 1.5 and as 100 such roundings.
    difference = 1.5 * 10 * 2**-8 if dtype == "bfloat16" else 100 * 10 * 2**-24
    assert all(row["kl/rollout_trainer"] < difference**2 / 2 for row in rows if "kl/rollout_trainer" in row)
