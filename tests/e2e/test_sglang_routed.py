"""A whole run through SGLang's router: what is drawn goes through it, weights and interruptions past it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_klear.config import load_settings
from megatron_klear.config.serving import SglangSettings
from megatron_klear.model import hf_config
from megatron_klear.observe import names
from megatron_klear.rollout.ledger import LedgerReader
from megatron_klear.rollout.sglang import ServerFleet
from tests.e2e.served_runs import CONFIG, check_ledger, published, step_rows

STEPS, PER_STEP = 5, 8


def test_an_asynchronous_run_through_a_router_over_two_servers(
    start: Callable[..., Any],
    start_router: Callable[[list[str]], str],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    sglang_settings: SglangSettings,
) -> None:
    arch = load_settings(CONFIG, rl_overrides("routed"), entry="rl", world_size=2).architecture
    two = dataclasses.replace(sglang_settings, servers=2)
    config = hf_config(arch, dtype="float32")
    with ServerFleet(
        two, config, tmp_path / "servers", dtype="float32", on_cpu=True, batch_responses=8, longest_sequence=88
    ) as fleet:
        for index in range(2):
            fleet.start(index)
        for index in range(2):
            fleet.wait_ready(index)
        urls = [fleet.url(index) for index in range(2)]
        overrides = [
            *rl_overrides("routed"), f"rl.steps={STEPS}", "evaluation.at_end=true", "reward.require_think=false",
            "rollout.engine=sglang", f"sglang.urls=[{', '.join(urls)}]", f"sglang.router_url={start_router(urls)}",
            "scheduling.mode=async", "scheduling.max_staleness=2", "scheduling.in_flight=6",
            "weight_sync.transport=distributed", "sglang.stream_interval=4",
        ]  # fmt: skip
        launch = start("train_rl", CONFIG, overrides)
        assert launch.wait(400) == [0, 0], launch.output()
    run = tmp_path / "routed"
    assert published(launch) == list(range(STEPS + 1))
    assert launch.output().count("proved by checksum") == STEPS + 1
    check_ledger(run, steps=STEPS, per_step=PER_STEP, staleness=2)
    rows = step_rows(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert sum(row[names.REQUESTS_INTERRUPTED] for row in rows) > 0, "a publish interrupts, past the router"
    assert all(row[names.REQUESTS_FAILED] == 0 for row in rows)
    # Tokens of the published version alone must agree with the trainer to rounding.
    assert all(row[names.MISMATCH_MAX_ABS] < 1e-4 for row in rows if row[names.MISMATCH_SHARE_STALE] == 0)
    with LedgerReader(run / "ledger.sqlite") as reader:
        versions = {
            version
            for step in reader.steps()
            for group in reader.groups_of_step(step)
            for rollout in group.rollouts.values()
            for version, _ in rollout.policy_versions
        }
    assert len(versions) > 2, "each token is known by the weights that drew it"
    logs = [(tmp_path / "servers" / "logs" / f"engine_{i}.log").read_text(errors="replace") for i in range(2)]
    generated = [len(re.findall(r"POST /generate ", log)) for log in logs]
    assert min(generated) > 0, "the router shares out"
