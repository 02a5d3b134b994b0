"""Off-policy correction in real runs: one that ends well, and one that stops for disagreeing too much."""

from __future__ import annotations

import json
from pathlib import Path

RL = "examples/quickstart_rl.yaml"
SFT = "examples/quickstart_sft.yaml"
SHORT = ["rl.steps=3", "checkpoint.every_steps=0", "evaluation.at_end=false"]


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_corrected_run_ends_well_and_reports_it(start, rl_overrides, tmp_path):
    launch = start("train_rl", RL, [*rl_overrides("run"), *SHORT, "correction.kind=token"])
    assert launch.wait() == [0, 0], launch.output()
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        # The in-process engine computes the same weights in the same precision.
        assert 0 <= line["mismatch/mean_abs"] < 1e-4
        assert line["mismatch/share_stale"] == 0
        assert abs(line["correction/weight_mean"] - 1) < 1e-4
        assert line["correction/share_cut"] == 0
        assert line["correction/effective_sample_size"] > 1 - 1e-6


def test_masked_sequences_teach_the_policy_nothing(start, sft_overrides, rl_overrides, tmp_path):
    """The same rollouts from the same weights, once with and once without almost all of the policy's gradient."""
    tuned = start("train_sft", SFT, [*sft_overrides("sft"), "sft.steps=150", "evaluation.at_end=false"])
    assert tuned.wait() == [0, 0], tuned.output()
    first: dict[str, dict[str, float]] = {}
    # Engine and trainer differ by rounding, so that hardly a sequence has a ratio of exactly 1.
    mask = ["correction.kind=sequence_mask", "correction.low=1.0", "correction.high=1.0"]
    for name, correction in (("plain", []), ("masked", mask)):
        overrides = [
            *rl_overrides(name), *SHORT, *correction, "rl.steps=1", "rl.minibatch_prompts=8",
            f"checkpoint.start_from={tmp_path / 'sft'}", "rollout.max_response_tokens=72", "reward.malformed=-2.0",
            "algorithm.lm_loss_weight=0.0",
        ]  # fmt: skip
        launch = start("train_rl", RL, overrides)
        assert launch.wait() == [0, 0], launch.output()
        (first[name],) = logged(tmp_path / name)
    plain, masked = first["plain"], first["masked"]
    assert plain["reward/std"] > 0, "some response is better than another"
    for same in ("reward/mean", "response/length_mean", "mismatch/mean_abs", "mismatch/max_abs"):
        assert masked[same] == plain[same]
    assert masked["correction/share_cut"] > 0.5
    assert masked["optimizer/grad_norm"] < 0.75 * plain["optimizer/grad_norm"]


def test_a_run_whose_engine_disagrees_stops_and_names_the_cause(start, rl_overrides):
    launch = start("train_rl", RL, [*rl_overrides("run"), *SHORT, "correction.stop_above_mean=1.0e-12"])
    assert launch.wait() == [1, 1], launch.output()
    text = launch.output()
    assert "Traceback" not in text, text
    assert text.count("step 1: engine and trainer disagree") == 1, "said once, by the first rank"
    assert "correction.stop_above_mean = 1e-12" in text
    assert "Cause: numerics" in text
