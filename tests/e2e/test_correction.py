"""Off-policy correction in real runs: one that ends well, and one that stops for disagreeing too much."""

from __future__ import annotations

import json

RL = "examples/quickstart_rl.yaml"
SHORT = ["rl.steps=3", "checkpoint.every_steps=0", "evaluation.at_end=false"]


def test_a_corrected_run_ends_well_and_reports_it(start, rl_overrides, tmp_path):
    launch = start("train_rl", RL, [*rl_overrides("run"), *SHORT, "correction.kind=token"])
    assert launch.wait() == [0, 0], launch.output()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        # The in-process engine computes the same weights in the same precision.
        assert 0 <= line["mismatch/mean_abs"] < 1e-4
        assert line["mismatch/share_stale"] == 0
        assert abs(line["correction/weight_mean"] - 1) < 1e-4
        assert line["correction/share_cut"] == 0
        assert line["correction/effective_sample_size"] > 1 - 1e-6
        assert line["loss/policy"] != 0


def test_a_run_whose_engine_disagrees_stops_and_names_the_cause(start, rl_overrides):
    launch = start("train_rl", RL, [*rl_overrides("run"), *SHORT, "correction.stop_above_mean=1.0e-12"])
    assert launch.wait() == [1, 1], launch.output()
    text = launch.output()
    assert "Traceback" not in text, text
    assert text.count("step 1: engine and trainer disagree") == 1, "said once, by the first rank"
    assert "correction.stop_above_mean = 1e-12" in text
    assert "Cause: numerics" in text
