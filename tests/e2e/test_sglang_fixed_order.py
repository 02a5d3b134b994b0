"""A run in a fixed order whose real servers and trainer are killed ends in the bits of one that was left in peace."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.run_comparison import compare, is_equal
from megatron_klear.config.serving import SglangSettings
from megatron_klear.observe import names
from tests.e2e.served_runs import CONFIG, check_ledger, published, servers_of, step_rows, wait_for

STEPS, PER_STEP = 9, 8


def test_kills_leave_no_trace_in_losses_tokens_and_weights(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    sglang_settings: SglangSettings,
) -> None:
    """Synchronous, two tensor ranks, weights by files, tokens by seed: every number of every step is the same."""

    def overrides(name: str) -> list[str]:
        return [
            *rl_overrides(name), f"rl.steps={STEPS}", "parallel.tp=2", "rollout.engine=sglang",
            f"sglang.venv={sglang_settings.venv}", "sglang.deterministic=true", "sglang.stream_interval=4",
            "scheduling.mode=sync", "scheduling.order=fixed", "scheduling.stall_seconds=60",
            "weight_sync.transport=disk", "reward.require_think=false", "checkpoint.every_steps=2",
        ]  # fmt: skip

    peace, run = tmp_path / "peace", tmp_path / "disturbed"
    launch = start("train_rl", CONFIG, overrides("peace"))
    assert launch.wait(900) == [0, 0], launch.output()
    assert published(launch) == list(range(STEPS + 1))
    assert launch.output().count("proved by checksum") == STEPS + 1
    # Float32 on both sides; old weights or another temperature would be off by far more.
    assert all(0.0 <= row[names.MISMATCH_MAX_ABS] < 1e-4 for row in step_rows(peace))
    assert not servers_of(peace)

    rng = random.Random()
    seed = rng.randrange(10**6)
    rng.seed(seed)
    print(f"random places by seed {seed}")
    launch = start("train_rl", CONFIG, overrides("disturbed"))
    wait_for(2, run, launch)
    time.sleep(rng.uniform(0.0, 2.0))
    rng.choice(servers_of(run)).send_signal(signal.SIGKILL)
    wait_for(5, run, launch)
    time.sleep(rng.uniform(0.0, 2.0))
    launch.signal(signal.SIGKILL)
    launch.wait(900)
    assert "is back with the current weights" in launch.output()
    before = published(launch)
    launch = start("train_rl", CONFIG, overrides("disturbed"))
    assert launch.wait(900) == [0, 0], launch.output()

    # By one within a life; a resumed one begins with the version of its checkpoint, whose weights are the same.
    after = published(launch)
    assert before == list(range(len(before)))
    assert after == list(range(after[0], STEPS + 1))
    assert after[0] % 2 == 0
    assert 4 <= after[0] <= before[-1]
    check_ledger(run, steps=STEPS, per_step=PER_STEP, staleness=0)
    compared = compare(run, peace)
    assert is_equal(compared), compared
    assert {names.LOSS_TOTAL, names.OPTIMIZER_GRAD_NORM, names.MISMATCH_MAX_ABS} <= set(compared["metrics_compared"])
    assert len({row[names.LOSS_TOTAL] for row in step_rows(peace)}) > STEPS // 2, "losses that say nothing are no proof"
    told = [json.loads((folder / "result.json").read_text()) for folder in (run, peace)]
    assert told[0] == told[1]
    assert not servers_of(run)
