"""Runs that stop because engine and trainer disagree, by a real server: each cause is the one that is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_klear.config.serving import SglangSettings
from tests.e2e.served_runs import CONFIG

SHORT = ["evaluation.at_end=false", "checkpoint.every_steps=0", "reward.require_think=false", "rl.steps=3"]
ROUNDING = ["correction.stop_above_mean=1.0e-12"]
"""Two programs that compute the same in float32 are further apart than this, and by far less than a nat."""


@pytest.mark.parametrize(
    ("settings", "cause", "step"),
    [
        (ROUNDING, "Cause: numerics.", 1),
        ([*ROUNDING, "weight_sync.verify=logprobs"], "Cause: stale weights, or numerics.", 1),
        # The second step is sampled while the first is trained; a large update makes its tokens' age show.
        (
            ["scheduling.mode=one_step_off", "optimizer.lr=1.0e-2", "correction.stop_above_mean=1.0e-3"],
            "Cause: staleness. These tokens were sampled by versions 0 to 0, and version 1 is published",
            2,
        ),
    ],
    ids=["numerics", "unproved", "staleness"],
)
def test_the_cause_is_named(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    sglang_settings: SglangSettings,
    settings: list[str],
    cause: str,
    step: int,
) -> None:
    served = ["rollout.engine=sglang", f"sglang.venv={sglang_settings.venv}", "sglang.stream_interval=4"]
    launch = start("train_rl", CONFIG, [*rl_overrides("run"), *SHORT, *served, *settings], ranks=1)
    assert launch.wait(600) == [1], launch.output()
    text = launch.output()
    assert f"step {step}: engine and trainer disagree" in text, text
    assert cause in text
    assert text.count("Cause: ") == 1
